/* layer_handle.c - mixkvq._core.Layer: the packed history and the exact window of one layer, parsed
 * and checked once.
 *
 * The handle copies where the records lie and checks them when it is made. Of the window and its
 * lengths it keeps addresses (and references to the arrays it was given) and reads them at every
 * call, so what is changed in place is seen. A call parses only what changes per step: queries and
 * output. */
#include "array.h"
#include <string.h>

typedef struct {
    PyObject_HEAD mkvq_history history;
    mkvq_view k, v;
    int64_t *exact;
    const int64_t *start;
    int32_t sink_length;
    int64_t *tables;               /* copies of slab_base, slab_bytes, place, blocks */
    PyObject *arrays;              /* the constructor's arguments, kept alive */
    int reading, appending, forks; /* calls under way, and in which process; changed with the GIL */
} handle;

/* ---- life ------------------------------------------------------------------------------------ */
static const void *copy_table(int64_t **to, const void *from, int64_t n)
{
    void *copy = *to;
    if (n > 0)
        memcpy(copy, from, (size_t)n * sizeof **to);
    *to += n;
    return copy;
}

/* Makes the tables the handle's own: nobody else can change what has been checked. */
static int keep_history(handle *self)
{
    mkvq_history *h = &self->history;
    const int64_t places = (int64_t)h->batch * h->kv_heads * h->place_stride;
    mkvq_error error = {0};
    int64_t *at = self->tables =
        PyMem_Malloc((size_t)(2 * h->slabs + places + h->batch + 1) * sizeof(int64_t));
    if (!at) {
        PyErr_NoMemory();
        return -1;
    }
    h->slab_base = copy_table(&at, h->slab_base, h->slabs);
    h->slab_bytes = copy_table(&at, h->slab_bytes, h->slabs);
    h->place = copy_table(&at, h->place, places);
    h->blocks = copy_table(&at, h->blocks, h->batch);
    const mkvq_status status = mkvq_check_history(h, &error);
    if (status == MKVQ_OK)
        return 0;
    mkvq_py_raise(status, &error);
    return -1;
}

static int parse(handle *self, PyObject *const *o, int32_t sink_length)
{
    mkvq_history *h = &self->history;
    void *exact, *start, *slab_base, *slab_bytes, *place, *blocks, *mu;
    if (mkvq_py_view(o[0], "k", 0, MKVQ_BF16, &self->k) < 0 ||
        mkvq_py_view(o[1], "v", 0, MKVQ_BF16, &self->v) < 0)
        return -1;
    int64_t rows[1] = {self->k.shape[0]}, slabs[1] = {-1},
            places[3] = {self->k.shape[0], self->k.shape[1], -1};
    int64_t channels[3] = {self->k.shape[0], self->k.shape[1], self->k.shape[3]};
    if (mkvq_py_dense(o[2], "exact", 0, MKVQ_PY_I64, 1, rows, &exact) < 0 ||
        mkvq_py_dense(o[3], "start", MKVQ_PY_OPTIONAL, MKVQ_PY_I64, 1, rows, &start) < 0 ||
        mkvq_py_dense(o[4], "slab_base", 0, MKVQ_PY_U64, 1, slabs, &slab_base) < 0 ||
        mkvq_py_dense(o[5], "slab_bytes", 0, MKVQ_PY_I64, 1, slabs, &slab_bytes) < 0 ||
        mkvq_py_dense(o[6], "place", 0, MKVQ_PY_I64, 3, places, &place) < 0 ||
        mkvq_py_dense(o[7], "blocks", 0, MKVQ_PY_I64, 1, rows, &blocks) < 0 ||
        mkvq_py_dense(o[8], "mu", MKVQ_PY_OPTIONAL, MKVQ_PY_U16, 3, channels, &mu) < 0)
        return -1;
    self->exact = exact, self->start = start, self->sink_length = sink_length;
    h->slab_base = slab_base, h->slab_bytes = slab_bytes, h->slabs = slabs[0];
    h->place = place, h->place_stride = places[2], h->blocks = blocks, h->mu = mu;
    h->batch = (int32_t)rows[0], h->kv_heads = (int32_t)places[1],
    h->head_dim = (int32_t)channels[2];
    if (h->batch == rows[0] && h->kv_heads == places[1] && h->head_dim == channels[2])
        return 0;
    PyErr_SetString(PyExc_ValueError, "k has a size above 2147483647 (wrong shape)");
    return -1;
}

static PyObject *layer_new(PyTypeObject *type, PyObject *args, PyObject *kwargs)
{
    static char *names[] = {"k",          "v",     "exact",  "start", "sink_length", "slab_base",
                            "slab_bytes", "place", "blocks", "mu",    NULL};
    PyObject *o[9];
    int sink_length;
    if (!PyArg_ParseTupleAndKeywords(args, kwargs, "OOOOiOOOOO:Layer", names, &o[0], &o[1], &o[2],
                                     &o[3], &sink_length, &o[4], &o[5], &o[6], &o[7], &o[8]))
        return NULL;
    const allocfunc allocate = (allocfunc)PyType_GetSlot(type, Py_tp_alloc);
    handle *self = (handle *)allocate(type, 0);
    if (!self)
        return NULL;
    self->arrays = PyTuple_Pack(9, o[0], o[1], o[2], o[3], o[4], o[5], o[6], o[7], o[8]);
    if (self->arrays && parse(self, o, sink_length) == 0 && keep_history(self) == 0)
        return (PyObject *)self;
    Py_DECREF(self);
    return NULL;
}

static int layer_traverse(PyObject *self, visitproc visit, void *arg)
{
    Py_VISIT(Py_TYPE(self));
    Py_VISIT(((handle *)self)->arrays);
    return 0;
}

static int layer_clear(PyObject *self)
{
    (void)self; /* arrays cannot refer back to the handle; dropping them early would leave dangling
                   addresses */
    return 0;
}

static void layer_dealloc(PyObject *self)
{
    PyTypeObject *type = Py_TYPE(self);
    PyObject_GC_UnTrack(self);
    Py_CLEAR(((handle *)self)->arrays);
    PyMem_Free(((handle *)self)->tables);
    ((freefunc)PyType_GetSlot(type, Py_tp_free))(self);
    Py_DECREF(type);
}

/* ---- calls ----------------------------------------------------------------------------------- */
/* Sizes of 1 in the first three dimensions of the mask stretch to those of q. */
static void stretch(mkvq_view *mask, const mkvq_view *q)
{
    for (int i = 0; i < 3; i++)
        if (mask->shape[i] == 1) {
            mask->shape[i] = q->shape[i];
            mask->stride[i] = 0;
        }
}

/* The core checks the window's lengths once and reads them again: `append`, which changes them, runs
 * alone. Calls that were under way in other threads at a fork are none of the child's. */
static int enter(handle *self, int appends)
{
    const int forks = mkvq_py_forks();
    if (self->forks != forks)
        self->reading = self->appending = 0, self->forks = forks;
    if (self->appending || (appends && self->reading)) {
        PyErr_SetString(PyExc_RuntimeError,
                        "the Layer is in use by another thread: append runs alone");
        return -1;
    }
    if (appends)
        self->appending = 1;
    else
        self->reading++;
    return 0;
}

static PyObject *leave(handle *self, PyObject *result)
{
    if (self->appending)
        self->appending = 0;
    else
        self->reading--;
    return result;
}

static PyObject *call_append(mkvq_append_args *a)
{
    MKVQ_PY_CALL(mkvq_append(a, &error));
}

static PyObject *call_unpack(mkvq_unpack_args *a)
{
    MKVQ_PY_CALL(mkvq_unpack(a, &error));
}

static PyObject *call_attend(mkvq_attend_args *a)
{
    const int64_t bytes = mkvq_attend_workspace(a);
    mkvq_py_workspace workspace = {NULL, 0};
    mkvq_error error = {0};
    mkvq_status status;
    if (bytes > 0 && !(workspace = mkvq_py_take_workspace(bytes)).memory)
        return NULL;
    a->workspace = workspace.memory, a->workspace_bytes = workspace.bytes;
    Py_BEGIN_ALLOW_THREADS
    status = mkvq_attend(a, &error);
    Py_END_ALLOW_THREADS
    if (bytes > 0)
        mkvq_py_give_workspace(workspace);
    if (status == MKVQ_OK)
        Py_RETURN_NONE;
    mkvq_py_raise(status, &error);
    return NULL;
}

static PyObject *layer_attend(PyObject *obj, PyObject *const *args, Py_ssize_t n)
{
    handle *self = (handle *)obj;
    mkvq_attend_args a = {
        .history = &self->history,
        .k = self->k,
        .v = self->v,
        .exact = self->exact,
        .start = self->start,
        .sink_length = self->sink_length,
        .executor = mkvq_py_executor(),
    };
    if (mkvq_py_count(n, 8,
                      "attend(q, out, mask, causal, scaling, softcap, sink_logits, "
                      "precision)") < 0 ||
        mkvq_py_view(args[0], "q", 0, MKVQ_BF16, &a.q) < 0 ||
        mkvq_py_view(args[1], "out", MKVQ_PY_WRITE, MKVQ_BF16, &a.out) < 0 ||
        mkvq_py_float(args[4], "scaling", &a.scaling) < 0 ||
        mkvq_py_float(args[5], "softcap", &a.softcap) < 0 ||
        mkvq_py_int32(args[7], "precision", &a.precision) < 0)
        return NULL;
    const int causal = PyObject_IsTrue(args[3]);
    if (causal < 0)
        return NULL;
    a.mask_kind = causal ? MKVQ_MASK_CAUSAL : MKVQ_MASK_NONE;
    if (args[2] != Py_None) {
        if (causal) {
            PyErr_SetString(PyExc_ValueError, "causal is True, must be False when a mask is given");
            return NULL;
        }
        if (mkvq_py_view(args[2], "mask", MKVQ_PY_MASK, MKVQ_BF16, &a.mask) < 0)
            return NULL;
        a.mask_kind = MKVQ_MASK_ARRAY;
        stretch(&a.mask, &a.q);
    }
    void *sink_logits;
    int64_t heads[1] = {a.q.shape[1]};
    if (mkvq_py_dense(args[6], "sink_logits", MKVQ_PY_OPTIONAL, MKVQ_PY_F32, 1, heads,
                      &sink_logits) < 0)
        return NULL;
    a.sink_logits = sink_logits;
    return enter(self, 0) < 0 ? NULL : leave(self, call_attend(&a));
}

static PyObject *layer_append(PyObject *obj, PyObject *const *args, Py_ssize_t n)
{
    handle *self = (handle *)obj;
    mkvq_append_args a = {.k = self->k, .v = self->v, .exact = self->exact};
    static const char *const names[] = {"k", "v", "exact"};
    for (int i = 0; i < 3; i++)
        if (mkvq_py_writable(PyTuple_GetItem(self->arrays, i), names[i]) < 0)
            return NULL;
    if (mkvq_py_count(n, 2, "append(k_new, v_new)") < 0 ||
        mkvq_py_view(args[0], "k_new", 0, MKVQ_BF16, &a.k_new) < 0 ||
        mkvq_py_view(args[1], "v_new", 0, MKVQ_BF16, &a.v_new) < 0)
        return NULL;
    return enter(self, 1) < 0 ? NULL : leave(self, call_append(&a));
}

static PyObject *layer_unpack(PyObject *obj, PyObject *const *args, Py_ssize_t n)
{
    handle *self = (handle *)obj;
    mkvq_unpack_args a = {.history = &self->history, .executor = mkvq_py_executor()};
    if (mkvq_py_count(n, 3, "unpack(k, v, first)") < 0 ||
        mkvq_py_view(args[0], "k", MKVQ_PY_WRITE, MKVQ_BF16, &a.k) < 0 ||
        mkvq_py_view(args[1], "v", MKVQ_PY_WRITE, MKVQ_BF16, &a.v) < 0)
        return NULL;
    void *first;
    int64_t rows[1] = {self->history.batch};
    if (mkvq_py_dense(args[2], "first", 0, MKVQ_PY_I64, 1, rows, &first) < 0)
        return NULL;
    a.first = first;
    return enter(self, 0) < 0 ? NULL : leave(self, call_unpack(&a));
}

static PyMethodDef methods[] = {
    {"attend", (PyCFunction)(void (*)(void))layer_attend, METH_FASTCALL,
     "attend(q, out, mask, causal, scaling, softcap, sink_logits, precision)\n--\n\n"
     "Attention of q [B,Q,n,D] over packed blocks and window into out, of the same shape."},
    {"append", (PyCFunction)(void (*)(void))layer_append, METH_FASTCALL,
     "append(k_new, v_new)\n--\n\nCopies new tokens [B,H,n,D] behind the window and counts them in "
     "exact."},
    {"unpack", (PyCFunction)(void (*)(void))layer_unpack, METH_FASTCALL,
     "unpack(k, v, first)\n--\n\nDecodes the packed blocks of row b into k, v [B,H,n,D] from token "
     "first[b] on."},
    {NULL, NULL, 0, NULL},
};
static PyType_Slot slots[] = {
    {Py_tp_new, (void *)layer_new},
    {Py_tp_dealloc, (void *)layer_dealloc},
    {Py_tp_traverse, (void *)layer_traverse},
    {Py_tp_clear, (void *)layer_clear},
    {Py_tp_methods, methods},
    {Py_tp_doc, "One layer's packed history and exact window, parsed once; see mkvq_history and "
                "mkvq_attend_args in mixkvq.h. slab_base holds addresses, which cannot be checked: "
                "slab_bytes must be there, as long as the layer is."},
    {0, NULL},
};
PyType_Spec mkvq_py_layer_spec = {
    "mixkvq._core.Layer",
    sizeof(handle),
    0,
    Py_TPFLAGS_DEFAULT | Py_TPFLAGS_HAVE_GC | Py_TPFLAGS_BASETYPE,
    slots,
};
