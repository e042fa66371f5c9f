/* codec_handle.c - mixkvq._core.Codec: a checked mkvq_codec. */
#include "bind.h"

typedef struct {
    PyObject_HEAD mkvq_codec codec;
} handle;

const mkvq_codec *mkvq_py_codec_of(PyObject *codec)
{
    return &((handle *)codec)->codec;
}

/* patterns: a sequence of sequences of MKVQ_TIERS channel counts. */
static int read_pattern(PyObject *pattern, uint16_t *counts)
{
    const Py_ssize_t tiers = PySequence_Size(pattern);
    if (tiers < 0)
        return -1;
    if (tiers != MKVQ_TIERS) {
        PyErr_Format(PyExc_ValueError,
                     "a pattern has %zd entries, must have %d (channels per tier)", tiers,
                     MKVQ_TIERS);
        return -1;
    }
    for (int t = 0; t < MKVQ_TIERS; t++) {
        int32_t count;
        PyObject *item = PySequence_GetItem(pattern, t);
        const int rc = item ? mkvq_py_int32(item, "patterns", &count) : -1;
        Py_XDECREF(item);
        if (rc < 0)
            return -1;
        if (count < 0 || count > MKVQ_MAX_HEAD_DIM) {
            PyErr_Format(PyExc_ValueError,
                         "patterns is %d, must be 0 to %d channels (value out of range)",
                         (int)count, MKVQ_MAX_HEAD_DIM);
            return -1;
        }
        counts[t] = (uint16_t)count;
    }
    return 0;
}

static int read_patterns(PyObject *patterns, mkvq_codec *codec)
{
    const Py_ssize_t n = PySequence_Size(patterns);
    if (n < 0)
        return -1;
    if (n > MKVQ_MAX_PATTERNS) {
        PyErr_Format(PyExc_ValueError, "n_patterns is %zd, must be 1 to %d (value out of range)", n,
                     MKVQ_MAX_PATTERNS);
        return -1;
    }
    codec->n_patterns = (int32_t)n;
    for (Py_ssize_t p = 0; p < n; p++) {
        PyObject *pattern = PySequence_GetItem(patterns, p);
        const int rc = pattern ? read_pattern(pattern, codec->patterns[p]) : -1;
        Py_XDECREF(pattern);
        if (rc < 0)
            return -1;
    }
    return 0;
}

static PyObject *codec_new(PyTypeObject *type, PyObject *args, PyObject *kwargs)
{
    static char *names[] = {"head_dim",
                            "block_length",
                            "dtype",
                            "allocate",
                            "key_group",
                            "key_metadata",
                            "key_range",
                            "key_reference",
                            "value_bits",
                            "value_group",
                            "value_metadata",
                            "value_range",
                            "value_rotation",
                            "pattern_cost",
                            "budget_columns",
                            "threshold_high",
                            "threshold_low",
                            "patterns",
                            NULL};
    mkvq_codec c = {0};
    mkvq_error error = {0};
    PyObject *patterns;
    if (!PyArg_ParseTupleAndKeywords(
            args, kwargs, "iiiiiiiiiiiiiiiffO:Codec", names, &c.head_dim, &c.block_length, &c.dtype,
            &c.allocate, &c.key_group, &c.key_metadata, &c.key_range, &c.key_reference,
            &c.value_bits, &c.value_group, &c.value_metadata, &c.value_range, &c.value_rotation,
            &c.pattern_cost, &c.budget_columns, &c.threshold_high, &c.threshold_low, &patterns))
        return NULL;
    if (read_patterns(patterns, &c) < 0)
        return NULL;
    const mkvq_status status = mkvq_check_codec(&c, &error);
    if (status != MKVQ_OK) {
        mkvq_py_raise(status, &error);
        return NULL;
    }
    const allocfunc allocate = (allocfunc)PyType_GetSlot(type, Py_tp_alloc);
    handle *self = (handle *)allocate(type, 0);
    if (self)
        self->codec = c;
    return (PyObject *)self;
}

static void codec_dealloc(PyObject *self)
{
    PyTypeObject *type = Py_TYPE(self);
    ((freefunc)PyType_GetSlot(type, Py_tp_free))(self);
    Py_DECREF(type);
}

static PyObject *record_bound(PyObject *self, void *unused)
{
    (void)unused;
    return PyLong_FromLongLong(mkvq_record_bound(mkvq_py_codec_of(self)));
}

static PyGetSetDef getset[] = {
    {"record_bound", record_bound, NULL, "bytes of the largest record that this codec can produce",
     NULL},
    {NULL, NULL, NULL, NULL, NULL},
};
static PyType_Slot slots[] = {
    {Py_tp_new, (void *)codec_new},
    {Py_tp_dealloc, (void *)codec_dealloc},
    {Py_tp_getset, getset},
    {Py_tp_doc,
     "How a block is coded: a checked mkvq_codec. Integers are the C enums of mixkvq.h."},
    {0, NULL},
};
PyType_Spec mkvq_py_codec_spec = {"mixkvq._core.Codec", sizeof(handle), 0, Py_TPFLAGS_DEFAULT,
                                  slots};
