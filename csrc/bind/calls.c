/* calls.c - the functions of mixkvq._core that need no layer: pack, salience, inspect; and reading
 * of scalars. */
#include "array.h"

void mkvq_py_raise(mkvq_status status, const mkvq_error *error)
{
    const char *text = mkvq_status_text(status);
    if (error->argument)
        PyErr_Format(PyExc_ValueError, "%s is %lld, must be %s (%s)", error->argument,
                     (long long)error->value, error->allowed, text);
    else
        PyErr_SetString(PyExc_ValueError, text);
}

int mkvq_py_count(Py_ssize_t n, Py_ssize_t want, const char *usage)
{
    if (n == want)
        return 0;
    PyErr_Format(PyExc_TypeError, "%zd arguments given, must be %zd: %s", n, want, usage);
    return -1;
}

int mkvq_py_int64(PyObject *obj, const char *name, int64_t *value)
{
    int overflow = 0;
    *value = PyLong_AsLongLongAndOverflow(obj, &overflow);
    if (overflow)
        PyErr_Format(PyExc_ValueError, "%s is %S, must fit 64 bits (value out of range)", name,
                     obj);
    else if (*value == -1 && PyErr_Occurred() && PyErr_ExceptionMatches(PyExc_TypeError))
        PyErr_Format(PyExc_TypeError, "%s is %R, must be an integer", name, obj);
    return PyErr_Occurred() ? -1 : 0;
}

int mkvq_py_int32(PyObject *obj, const char *name, int32_t *value)
{
    int64_t wide;
    if (mkvq_py_int64(obj, name, &wide) < 0)
        return -1;
    *value = (int32_t)wide;
    if (*value != wide) {
        PyErr_Format(PyExc_ValueError, "%s is %lld, must fit 32 bits (value out of range)", name,
                     (long long)wide);
        return -1;
    }
    return 0;
}

int mkvq_py_float(PyObject *obj, const char *name, float *value)
{
    const double wide = PyFloat_AsDouble(obj);
    if (wide == -1.0 && PyErr_Occurred()) {
        if (PyErr_ExceptionMatches(PyExc_TypeError))
            PyErr_Format(PyExc_TypeError, "%s is %R, must be a number", name, obj);
        return -1;
    }
    *value = (float)wide;
    return 0;
}

PyObject *mkvq_py_salience(PyObject *module, PyObject *const *args, Py_ssize_t n)
{
    (void)module;
    mkvq_salience_args a = {.executor = mkvq_py_executor()};
    if (mkvq_py_count(n, 5, "salience(q, kv_heads, power, first, sum)") < 0 ||
        mkvq_py_view(args[0], "q", 0, MKVQ_BF16, &a.q) < 0 ||
        mkvq_py_int32(args[1], "kv_heads", &a.kv_heads) < 0 ||
        mkvq_py_int32(args[2], "power", &a.power) < 0)
        return NULL;
    void *first, *sum;
    int64_t rows[1] = {a.q.shape[0]}, sums[3] = {a.q.shape[0], a.kv_heads, a.q.shape[3]};
    if (mkvq_py_dense(args[3], "first", MKVQ_PY_OPTIONAL, MKVQ_PY_I64, 1, rows, &first) < 0 ||
        mkvq_py_dense(args[4], "sum", MKVQ_PY_WRITE, MKVQ_PY_F64, 3, sums, &sum) < 0)
        return NULL;
    a.first = first, a.sum = sum;
    MKVQ_PY_CALL(mkvq_salience(&a, &error));
}

/* The output of pack holds rows * heads * max_blocks records of out_stride bytes. */
static int check_room(int64_t room, int64_t records, int64_t stride)
{
    if (stride < 0 || (records > 0 && stride > room / records)) {
        PyErr_Format(
            PyExc_ValueError,
            "out is %lld bytes, must be %lld records of out_stride (%lld) bytes (output too small)",
            (long long)room, (long long)records, (long long)stride);
        return -1;
    }
    return 0;
}

PyObject *mkvq_py_pack(PyObject *module, PyObject *const *args, Py_ssize_t n)
{
    const char *usage =
        "pack(codec, k, v, first, blocks, importance, mu, has_mu, out, out_stride, sizes, raised)";
    const mkvq_py_state *state = PyModule_GetState(module);
    mkvq_pack_args a = {.executor = mkvq_py_executor()};
    if (mkvq_py_count(n, 12, usage) < 0)
        return NULL;
    if (!PyObject_TypeCheck(args[0], (PyTypeObject *)state->codec_type)) {
        PyErr_SetString(PyExc_TypeError, "codec must be a mixkvq._core.Codec");
        return NULL;
    }
    a.codec = mkvq_py_codec_of(args[0]);
    const int32_t bits16 = a.codec->dtype == MKVQ_F16 ? MKVQ_F16 : MKVQ_BF16;
    if (mkvq_py_view(args[1], "k", 0, bits16, &a.k) < 0 ||
        mkvq_py_view(args[2], "v", 0, bits16, &a.v) < 0 ||
        mkvq_py_int64(args[9], "out_stride", &a.out_stride) < 0)
        return NULL;
    void *first, *blocks, *importance, *mu, *has_mu, *out, *sizes, *raised;
    int64_t rows[1] = {a.k.shape[0]}, heads[2] = {a.k.shape[0], a.k.shape[1]}, bytes[1] = {-1};
    int64_t channels[3] = {a.k.shape[0], a.k.shape[1], a.k.shape[3]},
            records[3] = {a.k.shape[0], a.k.shape[1], -1};
    if (mkvq_py_dense(args[3], "first", 0, MKVQ_PY_I64, 1, rows, &first) < 0 ||
        mkvq_py_dense(args[4], "blocks", 0, MKVQ_PY_I64, 1, rows, &blocks) < 0 ||
        mkvq_py_dense(args[5], "importance", MKVQ_PY_OPTIONAL, MKVQ_PY_F32, 3, channels,
                      &importance) < 0 ||
        mkvq_py_dense(args[6], "mu", MKVQ_PY_OPTIONAL | MKVQ_PY_WRITE, MKVQ_PY_U16, 3, channels,
                      &mu) < 0 ||
        mkvq_py_dense(args[7], "has_mu", MKVQ_PY_OPTIONAL | MKVQ_PY_WRITE, MKVQ_PY_U8, 2, heads,
                      &has_mu) < 0 ||
        mkvq_py_dense(args[8], "out", MKVQ_PY_WRITE, MKVQ_PY_U8, 1, bytes, &out) < 0 ||
        mkvq_py_dense(args[10], "sizes", MKVQ_PY_WRITE, MKVQ_PY_I64, 3, records, &sizes) < 0 ||
        mkvq_py_dense(args[11], "raised", MKVQ_PY_OPTIONAL | MKVQ_PY_WRITE, MKVQ_PY_I64, 3, records,
                      &raised) < 0 ||
        check_room(bytes[0], records[0] * records[1] * records[2], a.out_stride) < 0)
        return NULL;
    a.first = first, a.blocks = blocks, a.max_blocks = records[2], a.importance = importance;
    a.mu = mu, a.has_mu = has_mu, a.out = out, a.sizes = sizes, a.raised = raised;
    MKVQ_PY_CALL(mkvq_pack(&a, &error));
}

static PyObject *info_dict(const mkvq_record_info *i)
{
    PyObject *tier = PyBytes_FromStringAndSize((const char *)i->tier, i->head_dim);
    if (!tier)
        return NULL;
    return Py_BuildValue(
        "{s:i,s:i,s:i,s:i,s:i,s:i,s:i,s:i,s:i,s:i,s:i,s:(iiiiii),s:L,s:L,s:L,s:N}", "kind", i->kind,
        "dtype", i->dtype, "value_bits", i->value_bits, "head_dim", i->head_dim, "tokens",
        i->tokens, "key_group", i->key_group, "value_group", i->value_group, "key_metadata",
        i->key_metadata, "value_metadata", i->value_metadata, "key_reference", i->key_reference,
        "value_rotation", i->value_rotation, "channels", i->channels[0], i->channels[1],
        i->channels[2], i->channels[3], i->channels[4], i->channels[5], "nbytes",
        (long long)i->nbytes, "metadata_bytes", (long long)i->metadata_bytes, "code_bytes",
        (long long)i->code_bytes, "tier", tier);
}

PyObject *mkvq_py_inspect(PyObject *module, PyObject *record)
{
    (void)module;
    Py_buffer buffer;
    mkvq_record_info info;
    mkvq_error error = {0};
    if (PyObject_GetBuffer(record, &buffer, PyBUF_SIMPLE) < 0)
        return NULL;
    const mkvq_status status = mkvq_inspect(buffer.buf, buffer.len, &info, &error);
    PyBuffer_Release(&buffer);
    if (status != MKVQ_OK) {
        mkvq_py_raise(status, &error);
        return NULL;
    }
    return info_dict(&info);
}
