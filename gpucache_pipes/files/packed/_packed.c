/* Reads records of packed segments, and the versions of files, many in one call, without the
interpreter lock.

    read(records, memory, control)      byte ranges of open files, to their places in memory
    versions(paths, versions, control)  size and modification time of files

It parses nothing. Where an array says what is not within memory, the call raises ValueError before
it reads. A call that a signal interrupts returns early, and the caller calls again. */

#include "../_native.h"

/* The columns of a record, int64 each; native.py has the same names. GOT is what was read. */
enum { DESCRIPTOR, START, COUNT, PLACE, GOT, COLUMNS };
enum { SIZE, MTIME, VERSION };

static PyObject *read_records(PyObject *module, PyObject *args)
{
    Py_buffer table, memory, control;
    (void)module;
    if (!PyArg_ParseTuple(args, "w*w*w*:read", &table, &memory, &control)) {
        return NULL;
    }
    Py_ssize_t count = table.len / (COLUMNS * (Py_ssize_t)sizeof(int64_t)), done = 0;
    int64_t *rows = int64s(&table, count * COLUMNS), *told = int64s(&control, CONTROLS);
    int sound = rows != NULL && told != NULL;
    for (Py_ssize_t i = 0; sound && i < count; i++) {
        const int64_t *row = rows + i * COLUMNS;
        sound = row[START] >= 0 && within(row[PLACE], row[COUNT], memory.len);
        if (!sound) {
            PyErr_SetString(PyExc_ValueError, "a record is not within its memory");
        }
    }
    if (sound) {
        Watch watch = watch_of(told);
        watch.state = PyEval_SaveThread();
        for (int interrupted = 0; done < count; done++) {
            int64_t *row = rows + done * COLUMNS;
            if (!may_begin(&watch, done)) {
                break;
            }
            ssize_t more = 1;
            for (row[GOT] = 0; more > 0 && row[GOT] < row[COUNT]; row[GOT] += more > 0 ? more : 0) {
                more = pread((int)row[DESCRIPTOR], (byte *)memory.buf + row[PLACE] + row[GOT],
                             row[COUNT] - row[GOT], row[START] + row[GOT]);
                interrupted = more < 0 && errno == EINTR;
            }
            if (interrupted) {
                break;
            }
        }
        PyEval_RestoreThread(watch.state);
    }
    PyBuffer_Release(&table);
    PyBuffer_Release(&memory);
    PyBuffer_Release(&control);
    return PyErr_Occurred() ? NULL : PyLong_FromSsize_t(done);
}

static PyObject *versions_of(PyObject *module, PyObject *args)
{
    PyObject *paths, *held = NULL;
    Py_buffer table, control;
    (void)module;
    if (!PyArg_ParseTuple(args, "O!w*w*:versions", &PyTuple_Type, &paths, &table, &control)) {
        return NULL;
    }
    Py_ssize_t count = PyTuple_Size(paths), done = 0;
    int64_t *rows = int64s(&table, count * VERSION), *told = int64s(&control, CONTROLS);
    const char **pointers = NULL;
    if (rows != NULL && told != NULL) {
        pointers = PyMem_Malloc((count + 1) * sizeof(char *));
        held = pointers == NULL ? PyErr_NoMemory() : encoded(paths, pointers);
    }
    if (held != NULL) {
        Watch watch = watch_of(told);
        watch.state = PyEval_SaveThread();
        for (; done < count && may_begin(&watch, done); done++) {
            struct stat status;
            int64_t *row = rows + done * VERSION;
            row[SIZE] = row[MTIME] = -1;
            if (pointers[done] != NULL && stat(pointers[done], &status) == 0) {
                row[SIZE] = status.st_size;
                row[MTIME] = (int64_t)status.st_mtim.tv_sec * 1000000000 + status.st_mtim.tv_nsec;
            }
        }
        PyEval_RestoreThread(watch.state);
    }
    Py_XDECREF(held);
    PyMem_Free((void *)pointers);
    PyBuffer_Release(&table);
    PyBuffer_Release(&control);
    return PyErr_Occurred() ? NULL : PyLong_FromSsize_t(done);
}

static PyMethodDef methods[] = {
    {"read", read_records, METH_VARARGS,
     "read(records, memory, control) -> int\n\n"
     "Read byte ranges into memory. Returns how many there are before the one at which it stopped,\n"
     "because of a signal, or because control[STOP] is not 0."},
    {"versions", versions_of, METH_VARARGS,
     "versions(paths, versions, control) -> int\n\n"
     "Size and modification time in nanoseconds of files; -1 where stat fails. Returns as read."},
    {NULL, NULL, 0, NULL},
};

static PyModuleDef_Slot slots[] = {
#if defined(Py_GIL_DISABLED)
    {Py_mod_gil, Py_MOD_GIL_NOT_USED},
#endif
    {0, NULL},
};

static struct PyModuleDef definition = {
    PyModuleDef_HEAD_INIT, "gpucache_pipes.files.packed._packed",
    "Reads records of packed segments, many in one call.", 0, methods, slots, NULL, NULL, NULL};

PyMODINIT_FUNC PyInit__packed(void)
{
    return PyModuleDef_Init(&definition);
}
