/* What the native modules have in common. */

#include <pyconfig.h> /* says whether Py_GIL_DISABLED */
#if !defined(Py_GIL_DISABLED)
#define Py_LIMITED_API 0x030B0000
#endif
#define PY_SSIZE_T_CLEAN
#include <Python.h>

#include <errno.h>
#include <fcntl.h>
#include <stdint.h>
#include <string.h>
#include <sys/stat.h>
#include <time.h>
#include <unistd.h>
#if defined(__APPLE__)
#define st_mtim st_mtimespec
#endif

typedef unsigned char byte;

/* What the caller and the call tell each other while the interpreter lock is released: the file
   that is being read, nanoseconds from the beginning of the call to the beginning of that file, and
   whether to return after it. */
enum { CURRENT, SINCE, STOP, CONTROLS };
enum { SIGNALS_NS = 50000000 };

static int64_t now(void)
{
    struct timespec time;
    clock_gettime(CLOCK_MONOTONIC, &time);
    return (int64_t)time.tv_sec * 1000000000 + time.tv_nsec;
}

static int within(int64_t start, int64_t count, int64_t size)
{
    return start >= 0 && count >= 0 && start <= size && count <= size - start;
}

/* The buffer holds at least `count` int64. Sets an exception if not. */
static int64_t *int64s(const Py_buffer *buffer, Py_ssize_t count)
{
    if (buffer->len / (Py_ssize_t)sizeof(int64_t) < count
        || (uintptr_t)buffer->buf % sizeof(int64_t)) {
        PyErr_SetString(PyExc_ValueError, "an array of int64 is too short or not aligned");
        return NULL;
    }
    return buffer->buf;
}

/* Bytes objects of the paths; None where the system can have no such path. */
static PyObject *encoded(PyObject *paths, const char **pointers)
{
    Py_ssize_t count = PyTuple_Size(paths);
    PyObject *held = PyTuple_New(count);
    for (Py_ssize_t i = 0; held != NULL && i < count; i++) {
        PyObject *one = NULL;
        if (!PyUnicode_FSConverter(PyTuple_GetItem(paths, i), &one)
            && PyErr_ExceptionMatches(PyExc_Exception)) {
            PyErr_Clear();
            one = Py_NewRef(Py_None);
        }
        pointers[i] = one != NULL && one != Py_None ? PyBytes_AsString(one) : NULL;
        if (one == NULL || PyTuple_SetItem(held, i, one) < 0) {
            Py_CLEAR(held);
        }
    }
    return held;
}

/* A call that goes from file to file without the interpreter lock. */
typedef struct {
    int64_t *told, begin, checked;
    PyThreadState *state; /* of the interpreter, while its lock is released */
} Watch;

static Watch watch_of(int64_t *told)
{
    int64_t time = now();
    return (Watch){told, time, time, NULL};
}

/* Tell that file `number` begins. 0 if the call should return instead: it was told to, or a signal
   handler has raised. */
static int may_begin(Watch *watch, int64_t number)
{
    if (__atomic_load_n(watch->told + STOP, __ATOMIC_RELAXED)) {
        return 0;
    }
    int64_t time = now();
    if (time - watch->checked > SIGNALS_NS) {
        /* Storage is slow: most file systems do not let a signal interrupt a read. */
        PyEval_RestoreThread(watch->state);
        int raised = PyErr_CheckSignals();
        watch->state = PyEval_SaveThread();
        if (raised) {
            return 0;
        }
        watch->checked = time;
    }
    __atomic_store_n(watch->told + SINCE, time - watch->begin, __ATOMIC_RELAXED);
    __atomic_store_n(watch->told + CURRENT, number, __ATOMIC_RELAXED);
    return 1;
}
