/* Reads small files of known forms, many in one call, without the interpreter lock.

It parses nothing. A Form is made by Python code (files/batch_reader.py) of a file that it has
parsed: byte runs that must be equal, runs of digits, a prefix that may differ, and the extents that
hold the leaves. All of its bounds are checked when it is made, against the size of the file. A file
is compared with the forms of its size only, by fstat of the open file, and what fits none of them
is left to Python.

    read(forms, paths, whole, scratch, rows, control)   files into scratch; a row for each
    copy(forms, rows, which, scratch, target, offsets)  leaves out of scratch, to their places

Nothing here blocks a signal: a call that one interrupts returns early, and the caller calls again.
No memory is allocated while the interpreter lock is released. */

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

typedef unsigned char byte;
/* The columns of a row: int64 each. batch_reader.py has the same names. */
enum { STATUS, START, DEVICE, INODE, SIZE, MTIME, COLUMNS };

/* Values of STATUS that are not the number of a form. */
enum { UNKNOWN = -1, LEFT_TO_PYTHON = -2 };

/* What the caller and the call tell each other while the interpreter lock is released: the file
   that is being read, nanoseconds from the beginning of the call to the beginning of that file, and
   whether to return after it. */
enum { CURRENT, SINCE, STOP, CONTROLS };
enum { ALIGNMENT = 64, SIGNALS_NS = 50000000 };

typedef struct { int64_t start, count; } Run;
typedef struct { int64_t start, offset, count; } Extent;

enum { EQUAL, CONTENT, DIGITS, PREFIXES, EXTENTS, PARTS };

typedef struct {
    PyObject_HEAD
    int64_t size; /* of the file */
    int64_t span; /* of the feature: the end of its last leaf */
    /* In these bytes objects, which nothing changes: runs, but for CONTENT, which is what the
       equal runs hold, end to end, and for EXTENTS. */
    PyObject *held[PARTS];
    const void *part[PARTS];
    Py_ssize_t count[PARTS];
} Form;

static void
Form_dealloc(Form *self)
{
    PyTypeObject *type = Py_TYPE((PyObject *)self);
    for (int i = 0; i < PARTS; i++) {
        Py_XDECREF(self->held[i]);
    }
    freefunc release = (freefunc)PyType_GetSlot(type, Py_tp_free);
    release(self);
    Py_DECREF(type);
}

static int
within(int64_t start, int64_t count, int64_t size)
{
    return start >= 0 && count >= 0 && start <= size && count <= size - start;
}

static int
runs_within(const Run *run, Py_ssize_t runs, int64_t size, int64_t *total)
{
    for (Py_ssize_t i = 0; i < runs; i++) {
        if (!within(run[i].start, run[i].count, size) || run[i].count > INT64_MAX - *total) {
            return 0;
        }
        *total += run[i].count;
    }
    return 1;
}

static int
is_sound(Form *self)
{
    int64_t equal = 0, others = 0;
    const Run *prefix = self->part[PREFIXES];
    const Extent *extent = self->part[EXTENTS];
    if (self->size <= 0 || !runs_within(self->part[EQUAL], self->count[EQUAL], self->size, &equal)
        || !runs_within(self->part[DIGITS], self->count[DIGITS], self->size, &others)
        || !runs_within(prefix, self->count[PREFIXES], self->size, &others)
        || equal != self->count[CONTENT]) {
        return 0;
    }
    int sound = 1;
    for (Py_ssize_t i = 1; i < self->count[PREFIXES]; i++) {
        sound = sound && prefix[i].count == prefix[0].count;
    }
    for (Py_ssize_t i = 0; sound && i < self->count[EXTENTS]; i++) {
        Extent e = extent[i];
        sound = within(e.start, e.count, self->size) && within(e.offset, e.count, INT64_MAX);
        self->span = sound && e.offset + e.count > self->span ? e.offset + e.count : self->span;
    }
    return sound;
}

static PyObject *
Form_new(PyTypeObject *type, PyObject *args, PyObject *kwargs)
{
    static const Py_ssize_t widths[PARTS] = {sizeof(Run), 1, sizeof(Run), sizeof(Run),
                                             sizeof(Extent)};
    long long size;
    PyObject *part[PARTS];
    (void)kwargs;
    if (!PyArg_ParseTuple(args, "LSSSSS:Form", &size, &part[EQUAL], &part[CONTENT], &part[DIGITS],
                          &part[PREFIXES], &part[EXTENTS])) {
        return NULL;
    }
    allocfunc allocate = (allocfunc)PyType_GetSlot(type, Py_tp_alloc);
    Form *self = (Form *)allocate(type, 0);
    if (self == NULL) {
        return NULL;
    }
    int sound = 1;
    self->size = size;
    for (int i = 0; i < PARTS; i++) {
        Py_ssize_t nbytes = PyBytes_Size(part[i]);
        self->held[i] = Py_NewRef(part[i]);
        self->part[i] = PyBytes_AsString(part[i]);
        self->count[i] = nbytes / widths[i];
        sound = sound && nbytes % widths[i] == 0
                && (widths[i] == 1 || (uintptr_t)self->part[i] % sizeof(int64_t) == 0);
    }
    if (!sound || !is_sound(self)) {
        PyErr_SetString(PyExc_ValueError, "a run or an extent is not within its file");
        Py_DECREF((PyObject *)self);
        return NULL;
    }
    return (PyObject *)self;
}

static PyType_Slot form_slots[] = {
    {Py_tp_new, Form_new},
    {Py_tp_dealloc, Form_dealloc},
    {Py_tp_doc, "Form(size, equal, content, digits, prefixes, extents)\n\n"
                "What a file of this size must hold, and where its leaves lie. Runs are int64\n"
                "pairs (start, count), extents (start, offset, count), all as bytes."},
    {0, NULL},
};
static PyType_Spec form_spec = {
    "gpucache_pipes.files._native.Form", sizeof(Form), 0, Py_TPFLAGS_DEFAULT, form_slots};

/* Whether `data`, which has form->size bytes, is of this form. */
static int
fits(const Form *form, const byte *data)
{
    const byte *expected = form->part[CONTENT];
    const Run *equal = form->part[EQUAL], *digits = form->part[DIGITS];
    const Run *prefix = form->part[PREFIXES];
    for (Py_ssize_t i = 0; i < form->count[EQUAL]; i++) {
        if (memcmp(data + equal[i].start, expected, equal[i].count) != 0) {
            return 0;
        }
        expected += equal[i].count;
    }
    for (Py_ssize_t i = 0; i < form->count[DIGITS]; i++) {
        const byte *at = data + digits[i].start, *end = at + digits[i].count;
        if (at == end) {
            return 0;
        }
        for (; at < end; at++) {
            if (*at < '0' || *at > '9') {
                return 0;
            }
        }
    }
    if (form->count[PREFIXES] == 0) {
        return 1;
    }
    const byte *first = data + prefix[0].start;
    for (int64_t at = 0; at < prefix[0].count; at++) {
        if (first[at] == '/' || first[at] == 0 || first[at] > 127) {
            return 0;
        }
    }
    for (Py_ssize_t i = 1; i < form->count[PREFIXES]; i++) {
        if (memcmp(data + prefix[i].start, first, prefix[0].count) != 0) {
            return 0;
        }
    }
    return 1;
}

/* A tuple of forms, in ascending order of size. Made while the interpreter lock is held; the caller
   of the function holds the tuple. */
typedef struct {
    Py_ssize_t count;
    const Form **form;
} Forms;

static PyObject *form_type; /* set once, when the module is first imported */

static int
forms_of(PyObject *items, Forms *forms)
{
    forms->count = PyTuple_Size(items);
    forms->form = PyMem_Malloc((forms->count + 1) * sizeof(Form *));
    if (forms->form == NULL) {
        return PyErr_NoMemory() == NULL ? -1 : 0;
    }
    for (Py_ssize_t i = 0; i < forms->count; i++) {
        PyObject *item = PyTuple_GetItem(items, i);
        forms->form[i] = (const Form *)item;
        if ((PyObject *)Py_TYPE(item) != form_type
            || (i && forms->form[i - 1]->size > forms->form[i]->size)) {
            PyErr_SetString(PyExc_ValueError, "not a tuple of forms in ascending order of size");
            return -1;
        }
    }
    return 0;
}

/* The number of the form of these bytes, or UNKNOWN. */
static int64_t
find(const Forms *forms, const byte *data, int64_t size)
{
    Py_ssize_t low = 0, high = forms->count;
    while (low < high) {
        Py_ssize_t middle = low + (high - low) / 2;
        if (forms->form[middle]->size < size) {
            low = middle + 1;
        }
        else {
            high = middle;
        }
    }
    for (; low < forms->count && forms->form[low]->size == size; low++) {
        if (fits(forms->form[low], data)) {
            return low;
        }
    }
    return UNKNOWN;
}

/* Reading */

static int64_t
now(void)
{
    struct timespec time;
    clock_gettime(CLOCK_MONOTONIC, &time);
    return (int64_t)time.tv_sec * 1000000000 + time.tv_nsec;
}

typedef enum { DONE, FULL, INTERRUPTED } Outcome;

/* Read one file into `scratch`, which has `room` bytes. The row says what became of it. */
static Outcome
read_one(const char *path, const Forms *forms, byte *scratch, int64_t room, int64_t whole,
         int64_t *row, int64_t *read_bytes)
{
    struct stat status;
    row[STATUS] = LEFT_TO_PYTHON;
    row[SIZE] = *read_bytes = 0;
    /* O_NONBLOCK: opening a FIFO must not block. */
    int fd = open(path, O_RDONLY | O_CLOEXEC | O_NONBLOCK);
    if (fd < 0) {
        return errno == EINTR ? INTERRUPTED : DONE;
    }
    Outcome outcome = DONE;
    if (fstat(fd, &status) == 0 && S_ISREG(status.st_mode)) {
        int64_t size = status.st_size, got = 0;
        row[DEVICE] = (int64_t)status.st_dev;
        row[INODE] = (int64_t)status.st_ino;
        row[SIZE] = size;
#if defined(__APPLE__)
        row[MTIME] = (int64_t)status.st_mtimespec.tv_sec * 1000000000 + status.st_mtimespec.tv_nsec;
#else
        row[MTIME] = (int64_t)status.st_mtim.tv_sec * 1000000000 + status.st_mtim.tv_nsec;
#endif
        if (size > 0 && size <= whole) {
            if (size >= room) {
                outcome = FULL;  /* one byte more is read than there should be */
            }
            while (outcome == DONE && got < size) {
                ssize_t count = read(fd, scratch + got, size - got + 1);
                if (count <= 0) {
                    outcome = count < 0 && errno == EINTR ? INTERRUPTED : DONE;
                    break;
                }
                got += count;
            }
            if (outcome == DONE && got == size) {
                row[STATUS] = find(forms, scratch, size);
                *read_bytes = size;
            }
        }
    }
    close(fd);  /* not again after EINTR: the descriptor is closed, and may be another file's */
    return outcome;
}

/* The buffer holds at least `count` int64. Sets an exception if not. */
static int64_t *
int64s(const Py_buffer *buffer, Py_ssize_t count)
{
    if (buffer->len / (Py_ssize_t)sizeof(int64_t) < count
        || (uintptr_t)buffer->buf % sizeof(int64_t)) {
        PyErr_SetString(PyExc_ValueError, "an array of int64 is too short or not aligned");
        return NULL;
    }
    return buffer->buf;
}

/* Bytes objects of the paths; None where the system can have no such path. */
static PyObject *
encoded(PyObject *paths, const char **pointers)
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
        if (one == NULL) {
            Py_CLEAR(held);
        }
        else {
            PyTuple_SetItem(held, i, one);
        }
    }
    return held;
}

static PyObject *
read_files(PyObject *module, PyObject *args)
{
    PyObject *items, *paths, *held = NULL;
    Forms forms = {0, NULL};
    long long whole;
    Py_buffer scratch, table, control;
    (void)module;
    if (!PyArg_ParseTuple(args, "O!O!Lw*w*w*:read", &PyTuple_Type, &items, &PyTuple_Type, &paths,
                          &whole, &scratch, &table, &control)) {
        return NULL;
    }
    Py_ssize_t count = PyTuple_Size(paths), done = 0;
    int64_t *rows = int64s(&table, count * COLUMNS), *told = int64s(&control, CONTROLS);
    const char **pointers = NULL;
    if (rows != NULL && told != NULL && forms_of(items, &forms) == 0) {
        pointers = PyMem_Malloc((count + 1) * sizeof(char *));
        held = pointers == NULL ? PyErr_NoMemory() : encoded(paths, pointers);
    }
    if (held != NULL) {
        byte *memory = scratch.buf;
        int64_t used = 0;
        Py_BEGIN_ALLOW_THREADS
        int64_t begin = now(), checked = begin;
        for (; done < count; done++) {
            int64_t *row = rows + done * COLUMNS;
            if (__atomic_load_n(told + STOP, __ATOMIC_RELAXED)) {
                break;
            }
            int64_t time = now();
            if (time - checked > SIGNALS_NS) {
                /* Storage is slow: most file systems do not let a signal interrupt a read. */
                Py_BLOCK_THREADS
                int raised = PyErr_CheckSignals();
                Py_UNBLOCK_THREADS
                if (raised) {
                    break;
                }
                checked = time;
            }
            __atomic_store_n(told + SINCE, time - begin, __ATOMIC_RELAXED);
            __atomic_store_n(told + CURRENT, done, __ATOMIC_RELAXED);
            row[START] = used;
            row[STATUS] = LEFT_TO_PYTHON;
            if (pointers[done] == NULL) {
                continue;
            }
            int64_t nbytes;
            Outcome outcome = read_one(pointers[done], &forms, memory + used, scratch.len - used,
                                       whole, row, &nbytes);
            if (outcome == INTERRUPTED || (outcome == FULL && used)) {
                break;
            }
            if (nbytes) {
                used += (nbytes + ALIGNMENT - 1) / ALIGNMENT * ALIGNMENT;
                used = used > scratch.len ? scratch.len : used;
            }
        }
        Py_END_ALLOW_THREADS
    }
    Py_XDECREF(held);
    PyMem_Free((void *)pointers);
    PyMem_Free((void *)forms.form);
    PyBuffer_Release(&scratch);
    PyBuffer_Release(&table);
    PyBuffer_Release(&control);
    return PyErr_Occurred() ? NULL : PyLong_FromSsize_t(done);
}

static PyObject *
copy_files(PyObject *module, PyObject *args)
{
    PyObject *items;
    Forms forms = {0, NULL};
    Py_buffer table, numbers, scratch, target, places;
    (void)module;
    if (!PyArg_ParseTuple(args, "O!y*y*y*w*y*:copy", &PyTuple_Type, &items, &table, &numbers,
                          &scratch, &target, &places)) {
        return NULL;
    }
    Py_ssize_t count = numbers.len / (Py_ssize_t)sizeof(int64_t);
    Py_ssize_t last = table.len / (COLUMNS * (Py_ssize_t)sizeof(int64_t));
    const int64_t *rows = int64s(&table, 0), *which = int64s(&numbers, 0);
    const int64_t *offsets = int64s(&places, count);
    if (rows != NULL && which != NULL && offsets != NULL && forms_of(items, &forms) == 0) {
        int sound = 1;
        Py_BEGIN_ALLOW_THREADS
        for (Py_ssize_t i = 0; sound && i < count; i++) {
            int64_t number = which[i], offset = offsets[i];
            sound = number >= 0 && number < last;
            int64_t status = sound ? rows[number * COLUMNS + STATUS] : UNKNOWN;
            int64_t start = sound ? rows[number * COLUMNS + START] : 0;
            const Form *form = status >= 0 && status < forms.count ? forms.form[status] : NULL;
            sound = form != NULL && within(start, form->size, scratch.len)
                    && within(offset, form->span, target.len);
            const Extent *extent = sound ? form->part[EXTENTS] : NULL;
            for (Py_ssize_t n = 0; sound && n < form->count[EXTENTS]; n++) {
                Extent e = extent[n];
                memmove((byte *)target.buf + offset + e.offset,
                       (const byte *)scratch.buf + start + e.start, e.count);
            }
        }
        Py_END_ALLOW_THREADS
        if (!sound) {
            PyErr_SetString(PyExc_ValueError, "a file or its place is not within its memory");
        }
    }
    PyMem_Free((void *)forms.form);
    PyBuffer_Release(&table);
    PyBuffer_Release(&numbers);
    PyBuffer_Release(&scratch);
    PyBuffer_Release(&target);
    PyBuffer_Release(&places);
    return PyErr_Occurred() ? NULL : Py_NewRef(Py_None);
}

/* The module */

static PyMethodDef methods[] = {
    {"read", read_files, METH_VARARGS,
     "read(forms, paths, whole, scratch, rows, control) -> int\n\n"
     "Read files of at most `whole` bytes into scratch, and compare them with the forms of their\n"
     "sizes. Returns how many there are before the one at which it stopped, because scratch is full,\n"
     "because of a signal, or because control[STOP] is not 0."},
    {"copy", copy_files, METH_VARARGS,
     "copy(forms, rows, which, scratch, target, offsets)\n\n"
     "Copy the leaves of files that were read into scratch to these offsets of target."},
    {NULL, NULL, 0, NULL},
};

static int
execute(PyObject *module)
{
    if (form_type == NULL) {
        form_type = PyType_FromSpec(&form_spec);
    }
    return form_type == NULL ? -1 : PyModule_AddObjectRef(module, "Form", form_type);
}

static PyModuleDef_Slot slots[] = {
    {Py_mod_exec, execute},
#if defined(Py_GIL_DISABLED)
    {Py_mod_gil, Py_MOD_GIL_NOT_USED},
#endif
    {0, NULL},
};

static struct PyModuleDef definition = {
    PyModuleDef_HEAD_INIT, "gpucache_pipes.files._native",
    "Reads small files of known forms, many in one call.", 0, methods, slots, NULL, NULL, NULL};

PyMODINIT_FUNC
PyInit__native(void)
{
    return PyModuleDef_Init(&definition);
}
