/* Reads small files of known forms, many in one call, without the interpreter lock.

It parses nothing. A Form is made by Python code (files/batch_reader.py) of files that it has
parsed: byte runs that must be equal, runs of digits, a prefix that may differ, and numbers that
follow from the sizes of the parts that differ in size. Its bounds are checked when it is made, and
again for each file, whose size is that of the open file by fstat. What fits no form is left to
Python.

    read(forms, paths, whole, scratch, rows, control)   files into scratch; a row for each
    find(forms, scratch, rows)                          the forms of files that are in scratch
    copy(scratch, target, moves)                        leaves out of scratch, to their places

Nothing here blocks a signal: a call that one interrupts returns early, and the caller calls again.
No memory is allocated while the interpreter lock is released. */

#include "_native.h"

/* The columns of a row, int64 each, and values of STATUS that are not the number of a form.
   chunks.py has the same names. */
enum { STATUS, START, DEVICE, INODE, SIZE, MTIME, COLUMNS };
enum { UNKNOWN = -1, LEFT_TO_PYTHON = -2 };

enum { ALIGNMENT = 64 };

/* Some parts of a file may differ in size from one to the next: the growing parts. A position is as
   in the file that the form was made of, with the number of growing parts before it. */
typedef struct { int64_t start, count, after; } Run;

/* A little-endian number that is base + (growth of the parts from..to) * factor / divisor. */
typedef struct { int64_t start, width, after, base, from, to, factor, divisor; } Number;

enum { EQUAL, CONTENT, DIGITS, PREFIXES, NUMBERS, PARTS };
enum { MOST_GROWING = 16, MOST_FACTOR = 1 << 24 };

typedef struct {
    PyObject_HEAD
    int64_t size;    /* of the file that it was made of, and of all if nothing grows */
    int64_t growing; /* parts that grow; the first numbers tell how much all but the last one do */
    /* In these bytes objects, which nothing changes: runs, but for NUMBERS, and for CONTENT, which
       is what the equal runs hold, end to end. */
    PyObject *held[PARTS];
    const void *part[PARTS];
    Py_ssize_t count[PARTS];
} Form;

static void Form_dealloc(Form *self)
{
    PyTypeObject *type = Py_TYPE((PyObject *)self);
    for (int i = 0; i < PARTS; i++) {
        Py_XDECREF(self->held[i]);
    }
    ((freefunc)PyType_GetSlot(type, Py_tp_free))(self);
    Py_DECREF(type);
}

static int between(int64_t low, int64_t value, int64_t high)
{
    return low <= value && value <= high;
}

static int runs_within(const Form *form, int part, int64_t *total)
{
    const Run *run = form->part[part];
    for (Py_ssize_t i = 0; i < form->count[part]; i++) {
        if (!within(run[i].start, run[i].count, form->size)
            || run[i].count > INT64_MAX - *total || !between(0, run[i].after, form->growing)) {
            return 0;
        }
        *total += run[i].count;
    }
    return 1;
}

static int is_sound(const Form *form)
{
    int64_t equal = 0, others = 0;
    const Run *prefix = form->part[PREFIXES];
    const Number *number = form->part[NUMBERS];
    int sound = form->size > 0 && between(0, form->growing, MOST_GROWING)
                && runs_within(form, EQUAL, &equal) && equal == form->count[CONTENT]
                && runs_within(form, DIGITS, &others) && runs_within(form, PREFIXES, &others)
                && form->count[NUMBERS] >= form->growing - 1;
    for (Py_ssize_t i = 1; sound && i < form->count[PREFIXES]; i++) {
        sound = prefix[i].count == prefix[0].count;
    }
    for (Py_ssize_t i = 0; sound && i < form->count[NUMBERS]; i++) {
        Number n = number[i];
        int tells = i < form->growing - 1; /* how much a part has grown */
        sound = between(1, n.width, 4) && within(n.start, n.width, form->size)
                && between(tells ? form->growing : 0, n.after, form->growing)
                && between(0, n.from, n.to) && n.to <= form->growing
                && between(0, n.base, INT32_MAX) && between(0, n.factor, MOST_FACTOR)
                && between(1, n.divisor, INT32_MAX)
                && (!tells || (n.from == i && n.to == i + 1 && n.factor == 1 && n.divisor == 1));
    }
    return sound;
}

static PyObject *Form_new(PyTypeObject *type, PyObject *args, PyObject *kwargs)
{
    static const Py_ssize_t widths[PARTS] = {sizeof(Run), 1, sizeof(Run), sizeof(Run),
                                             sizeof(Number)};
    long long size, growing;
    PyObject *part[PARTS];
    (void)kwargs;
    if (!PyArg_ParseTuple(args, "LLSSSSS:Form", &size, &growing, &part[EQUAL], &part[CONTENT],
                          &part[DIGITS], &part[PREFIXES], &part[NUMBERS])) {
        return NULL;
    }
    Form *self = (Form *)((allocfunc)PyType_GetSlot(type, Py_tp_alloc))(type, 0);
    if (self == NULL) {
        return NULL;
    }
    int sound = 1;
    self->size = size;
    self->growing = growing;
    for (int i = 0; i < PARTS; i++) {
        Py_ssize_t nbytes = PyBytes_Size(part[i]);
        self->held[i] = Py_NewRef(part[i]);
        self->part[i] = PyBytes_AsString(part[i]);
        self->count[i] = nbytes / widths[i];
        sound = sound && nbytes % widths[i] == 0
                && (widths[i] == 1 || (uintptr_t)self->part[i] % sizeof(int64_t) == 0);
    }
    if (!sound || !is_sound(self)) {
        PyErr_SetString(PyExc_ValueError, "a run or a number is not within its file");
        Py_DECREF((PyObject *)self);
        return NULL;
    }
    return (PyObject *)self;
}

static PyType_Slot form_slots[] = {
    {Py_tp_new, Form_new}, {Py_tp_dealloc, Form_dealloc},
    {Py_tp_doc, "Form(size, growing, equal, content, digits, prefixes, numbers)\n\n"
                "What a file must hold. Runs and numbers are arrays of int64, as bytes."},
    {0, NULL},
};
static PyType_Spec form_spec = {
    "gpucache_pipes.files._native.Form", sizeof(Form), 0, Py_TPFLAGS_DEFAULT, form_slots};

static int64_t value_of(const byte *at, int64_t width)
{
    int64_t value = 0;
    for (int64_t i = width; i-- > 0;) {
        value = value << 8 | at[i];
    }
    return value;
}

/* Find by how much the parts of this file have grown. `shift[n]`: the first n parts, together. */
static int grown(const Form *form, const byte *data, int64_t size, int64_t *shift)
{
    const Number *number = form->part[NUMBERS];
    int64_t all = size - form->size, last = form->growing - 1;
    shift[0] = 0;
    int sound = form->growing || all == 0;
    for (int64_t i = 0; sound && i < last; i++) {
        int64_t start = number[i].start + all, width = number[i].width;
        sound = within(start, width, size);
        shift[i + 1] = sound ? shift[i] + value_of(data + start, width) - number[i].base : 0;
    }
    shift[form->growing] = all;
    return sound;
}

/* Whether `data`, a file of this size, is of this form. */
static int fits(const Form *form, const byte *data, int64_t size)
{
    const byte *expected = form->part[CONTENT], *first = NULL;
    const Run *equal = form->part[EQUAL], *digits = form->part[DIGITS];
    const Run *prefix = form->part[PREFIXES];
    const Number *number = form->part[NUMBERS];
    int64_t shift[MOST_GROWING + 1];
    int sound = grown(form, data, size, shift);
    for (Py_ssize_t i = 0; sound && i < form->count[EQUAL]; i++) {
        int64_t start = equal[i].start + shift[equal[i].after];
        sound = within(start, equal[i].count, size)
                && memcmp(data + start, expected, equal[i].count) == 0;
        expected += equal[i].count;
    }
    for (Py_ssize_t i = 0; sound && i < form->count[NUMBERS]; i++) {
        Number n = number[i];
        int64_t start = n.start + shift[n.after], growth = shift[n.to] - shift[n.from];
        sound = between(-INT32_MAX, growth, INT32_MAX) && growth * n.factor % n.divisor == 0
                && within(start, n.width, size)
                && value_of(data + start, n.width) == n.base + growth * n.factor / n.divisor
                && (n.width < 4 || data[start + 3] < 128); /* in pickles they have a sign */
    }
    for (Py_ssize_t i = 0; sound && i < form->count[DIGITS]; i++) {
        int64_t at = digits[i].start + shift[digits[i].after], end = at + digits[i].count;
        sound = sound && at < end && within(at, digits[i].count, size);
        for (; sound && at < end; at++) {
            sound = data[at] >= '0' && data[at] <= '9';
        }
    }
    for (Py_ssize_t i = 0; sound && i < form->count[PREFIXES]; i++) {
        int64_t start = prefix[i].start + shift[prefix[i].after];
        sound = within(start, prefix[i].count, size);
        first = sound && i == 0 ? data + start : first;
        for (int64_t at = 0; sound && at < prefix[0].count; at++) {
            byte b = data[start + at];
            sound = b == first[at] && b != '/' && b != 0 && b <= 127;
        }
    }
    return sound;
}

/* A tuple of forms: those with growing parts, then the others in ascending order of size. Made
   while the interpreter lock is held; the caller of the function holds the tuple. */
typedef struct {
    Py_ssize_t count, growing;
    const Form **form;
} Forms;

static PyObject *form_type; /* set once, when the module is first imported */

static int forms_of(PyObject *items, Forms *forms)
{
    forms->count = PyTuple_Size(items);
    forms->form = PyMem_Malloc((forms->count + 1) * sizeof(Form *));
    if (forms->form == NULL) {
        return PyErr_NoMemory() == NULL ? -1 : 0;
    }
    for (Py_ssize_t i = 0; i < forms->count; i++) {
        PyObject *item = PyTuple_GetItem(items, i);
        const Form *form = (const Form *)item;
        forms->form[i] = form;
        if ((PyObject *)Py_TYPE(item) != form_type
            || (form->growing ? forms->growing < i
                              : i > forms->growing && forms->form[i - 1]->size > form->size)) {
            PyErr_SetString(PyExc_ValueError, "not a tuple of forms in ascending order of size");
            return -1;
        }
        forms->growing += form->growing != 0;
    }
    return 0;
}

/* The number of the form of these bytes, or UNKNOWN. */
static int64_t find(const Forms *forms, const byte *data, int64_t size)
{
    Py_ssize_t low = 0, high = forms->count;
    for (; low < forms->growing; low++) {
        if (fits(forms->form[low], data, size)) {
            return low;
        }
    }
    while (low < high) {
        Py_ssize_t middle = low + (high - low) / 2;
        int below = forms->form[middle]->size < size;
        low = below ? middle + 1 : low;
        high = below ? high : middle;
    }
    for (; low < forms->count && forms->form[low]->size == size; low++) {
        if (fits(forms->form[low], data, size)) {
            return low;
        }
    }
    return UNKNOWN;
}

/* Reading */

typedef enum { DONE, FULL, INTERRUPTED } Outcome;

/* Read one file into `scratch`, which has `room` bytes. The row says what became of it. */
static Outcome read_one(const char *path, const Forms *forms, byte *scratch, int64_t room,
                        int64_t whole, int64_t *row, int64_t *read_bytes)
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
        row[MTIME] = (int64_t)status.st_mtim.tv_sec * 1000000000 + status.st_mtim.tv_nsec;
        if (size > 0 && size <= whole) {
            ssize_t count = 1;
            outcome = size >= room ? FULL : DONE; /* one byte more is read than there should be */
            while (outcome == DONE && count > 0 && got < size) {
                count = read(fd, scratch + got, size - got + 1);
                outcome = count < 0 && errno == EINTR ? INTERRUPTED : DONE;
                got += count > 0 ? count : 0;
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

static PyObject *read_files(PyObject *module, PyObject *args)
{
    PyObject *items, *paths, *held = NULL;
    Forms forms = {0, 0, NULL};
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
        Watch watch = watch_of(told);
        watch.state = PyEval_SaveThread();
        for (; done < count; done++) {
            int64_t *row = rows + done * COLUMNS;
            if (!may_begin(&watch, done)) {
                break;
            }
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
        PyEval_RestoreThread(watch.state);
    }
    Py_XDECREF(held);
    PyMem_Free((void *)pointers);
    PyMem_Free((void *)forms.form);
    PyBuffer_Release(&scratch);
    PyBuffer_Release(&table);
    PyBuffer_Release(&control);
    return PyErr_Occurred() ? NULL : PyLong_FromSsize_t(done);
}

static PyObject *find_forms(PyObject *module, PyObject *args)
{
    PyObject *items;
    Forms forms = {0, 0, NULL};
    Py_buffer scratch, table;
    (void)module;
    if (!PyArg_ParseTuple(args, "O!y*w*:find", &PyTuple_Type, &items, &scratch, &table)) {
        return NULL;
    }
    Py_ssize_t count = table.len / (COLUMNS * (Py_ssize_t)sizeof(int64_t));
    int64_t *row = int64s(&table, count * COLUMNS);
    if (row != NULL && forms_of(items, &forms) == 0) {
        int sound = 1;
        Py_BEGIN_ALLOW_THREADS
        for (Py_ssize_t i = 0; sound && i < count; i++, row += COLUMNS) {
            if (row[STATUS] != LEFT_TO_PYTHON) {
                sound = within(row[START], row[SIZE], scratch.len);
                row[STATUS] = sound ? find(&forms, (const byte *)scratch.buf + row[START], row[SIZE])
                                    : LEFT_TO_PYTHON;
            }
        }
        Py_END_ALLOW_THREADS
        if (!sound) {
            PyErr_SetString(PyExc_ValueError, "a file is not within scratch");
        }
    }
    PyMem_Free((void *)forms.form);
    PyBuffer_Release(&scratch);
    PyBuffer_Release(&table);
    return PyErr_Occurred() ? NULL : Py_NewRef(Py_None);
}

static PyObject *copy_files(PyObject *module, PyObject *args)
{
    Py_buffer scratch, target, moves;
    (void)module;
    if (!PyArg_ParseTuple(args, "y*w*y*:copy", &scratch, &target, &moves)) {
        return NULL;
    }
    Py_ssize_t count = moves.len / (3 * (Py_ssize_t)sizeof(int64_t));
    const int64_t *move = int64s(&moves, 3 * count);
    int sound = 1;
    if (move != NULL) {
        Py_BEGIN_ALLOW_THREADS
        for (Py_ssize_t i = 0; sound && i < count; i++, move += 3) {
            sound = within(move[0], move[2], scratch.len) && within(move[1], move[2], target.len);
            if (sound) {
                memmove((byte *)target.buf + move[1], (const byte *)scratch.buf + move[0], move[2]);
            }
        }
        Py_END_ALLOW_THREADS
        if (!sound) {
            PyErr_SetString(PyExc_ValueError, "a leaf or its place is not within its memory");
        }
    }
    PyBuffer_Release(&scratch);
    PyBuffer_Release(&target);
    PyBuffer_Release(&moves);
    return PyErr_Occurred() ? NULL : Py_NewRef(Py_None);
}

/* The module */

static PyMethodDef methods[] = {
    {"read", read_files, METH_VARARGS,
     "read(forms, paths, whole, scratch, rows, control) -> int\n\n"
     "Read files of at most `whole` bytes into scratch, and compare them with the forms. Returns\n"
     "how many there are before the one at which it stopped, because scratch is full, because of\n"
     "a signal, or because control[STOP] is not 0."},
    {"find", find_forms, METH_VARARGS,
     "find(forms, scratch, rows)\n\n"
     "Compare files that are in scratch, as the rows say, with the forms, and note which they have.\n"
     "Files that are left to Python are passed over."},
    {"copy", copy_files, METH_VARARGS,
     "copy(scratch, target, moves)\n\n"
     "Copy bytes out of scratch: int64 triples (start, offset in target, count)."},
    {NULL, NULL, 0, NULL},
};

static int execute(PyObject *module)
{
    form_type = form_type == NULL ? PyType_FromSpec(&form_spec) : form_type;
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

PyMODINIT_FUNC PyInit__native(void)
{
    return PyModuleDef_Init(&definition);
}
