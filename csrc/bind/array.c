/* array.c - NumPy arrays and (address, dtype, shape, strides) tuples to mkvq_view and to plain
 * addresses. */
#include "array.h"

#define NPY_NO_DEPRECATED_API NPY_2_0_API_VERSION
#define NPY_TARGET_VERSION NPY_2_0_API_VERSION
#include <numpy/arrayobject.h>

int mkvq_py_import_numpy(void)
{
    return PyArray_ImportNumPyAPI();
}

static int wrong_type(PyObject *obj, const char *name)
{
    PyObject *type = PyType_GetName(Py_TYPE(obj));
    if (type)
        PyErr_Format(
            PyExc_TypeError,
            "%s is of type %U, must be a NumPy array or a tuple (address, dtype, shape, strides)",
            name, type);
    Py_XDECREF(type);
    return -1;
}

static int wrong_dtype(PyArrayObject *array, const char *name, const char *allowed)
{
    PyErr_Format(PyExc_ValueError, "%s is of dtype %S, must be %s (wrong element type)", name,
                 PyArray_DESCR(array), allowed);
    return -1;
}

static int wrong_ndim(const char *name, long long found, int ndim)
{
    PyErr_Format(PyExc_ValueError, "%s is %lld-dimensional, must be %d-dimensional (wrong shape)",
                 name, found, ndim);
    return -1;
}

int mkvq_py_writable(PyObject *obj, const char *name)
{
    if (!PyArray_Check(obj) || PyArray_ISWRITEABLE((PyArrayObject *)obj))
        return 0;
    PyErr_Format(PyExc_ValueError, "%s is a read-only array, must be writable: it receives results",
                 name);
    return -1;
}

/* What a kernel assumes of memory: native byte order, aligned elements, and leave to write. */
static int check_memory(PyArrayObject *array, const char *name, int flags)
{
    if (!PyArray_ISNOTSWAPPED(array) || !PyArray_ISALIGNED(array)) {
        PyErr_Format(PyExc_ValueError,
                     "%s is byte-swapped or unaligned, must be native and aligned "
                     "(wrong element type)",
                     name);
        return -1;
    }
    return flags & MKVQ_PY_WRITE ? mkvq_py_writable((PyObject *)array, name) : 0;
}

/* ---- tuples ---------------------------------------------------------------------------------- */
static int read_integers(PyObject *obj, const char *name, const char *what, int ndim, int64_t *out)
{
    if (!PyTuple_Check(obj)) {
        PyErr_Format(PyExc_TypeError, "%s: %s of the tuple form must be a tuple of %d integers",
                     name, what, ndim);
        return -1;
    }
    if (PyTuple_Size(obj) != ndim)
        return wrong_ndim(name, (long long)PyTuple_Size(obj), ndim);
    for (int i = 0; i < ndim; i++) {
        out[i] = PyLong_AsLongLong(PyTuple_GetItem(obj, i));
        if (out[i] == -1 && PyErr_Occurred())
            return -1;
    }
    return 0;
}

static int read_tuple(PyObject *obj, const char *name, int ndim, void **address, int32_t *dtype,
                      int64_t *shape, int64_t *strides)
{
    if (PyTuple_Size(obj) != 4) {
        PyErr_Format(PyExc_TypeError,
                     "%s is a tuple of %zd, must be (address, dtype, shape, strides)", name,
                     PyTuple_Size(obj));
        return -1;
    }
    *address = PyLong_AsVoidPtr(PyTuple_GetItem(obj, 0));
    if (!*address && PyErr_Occurred())
        return -1;
    if (mkvq_py_int32(PyTuple_GetItem(obj, 1), name, dtype) < 0)
        return -1;
    if (read_integers(PyTuple_GetItem(obj, 2), name, "shape", ndim, shape) < 0)
        return -1;
    for (int i = 0; i < ndim; i++)
        if (shape[i] < 0) {
            PyErr_Format(PyExc_ValueError, "%s has size %lld, must not be negative (wrong shape)",
                         name, (long long)shape[i]);
            return -1;
        }
    return strides ? read_integers(PyTuple_GetItem(obj, 3), name, "strides", ndim, strides) : 0;
}

/* ---- views ----------------------------------------------------------------------------------- */
static int view_dtype(PyArrayObject *array, const char *name, int flags, int32_t bits16,
                      int32_t *dtype)
{
    switch (PyArray_TYPE(array)) {
    case NPY_FLOAT32: *dtype = MKVQ_F32; return 0;
    case NPY_FLOAT16: *dtype = MKVQ_F16; return 0;
    case NPY_UINT16: *dtype = bits16; return 0;
    case NPY_BOOL:
        if (flags & MKVQ_PY_MASK) {
            *dtype = MKVQ_BOOL;
            return 0;
        }
    }
    return wrong_dtype(array, name,
                       flags & MKVQ_PY_MASK
                           ? "bool, float32, float16 or uint16 (bits of a 16-bit float)"
                           : "float32, float16 or uint16 (bits of a 16-bit float)");
}

int mkvq_py_view(PyObject *obj, const char *name, int flags, int32_t bits16, mkvq_view *view)
{
    if (PyTuple_Check(obj))
        return read_tuple(obj, name, 4, &view->data, &view->dtype, view->shape, view->stride);
    if (!PyArray_Check(obj))
        return wrong_type(obj, name);
    PyArrayObject *array = (PyArrayObject *)obj;
    if (PyArray_NDIM(array) != 4)
        return wrong_ndim(name, PyArray_NDIM(array), 4);
    if (view_dtype(array, name, flags, bits16, &view->dtype) < 0 ||
        check_memory(array, name, flags) < 0)
        return -1;
    const npy_intp item = PyArray_ITEMSIZE(array);
    view->data = PyArray_DATA(array);
    for (int i = 0; i < 4; i++) {
        const npy_intp stride = PyArray_STRIDE(array, i);
        view->shape[i] = PyArray_DIM(array, i);
        view->stride[i] = view->shape[i] > 1 ? stride / item : 0;
        if (view->shape[i] > 1 && stride % item) {
            PyErr_Format(
                PyExc_ValueError,
                "%s has a stride of %lld bytes, must be a multiple of its %lld-byte elements", name,
                (long long)stride, (long long)item);
            return -1;
        }
    }
    return 0;
}

/* ---- dense side arrays ----------------------------------------------------------------------- */
static int dense_dtype(PyArrayObject *array, const char *name, mkvq_py_kind kind)
{
    static const struct {
        int type, also;
        const char *allowed;
    } kinds[] = {
        [MKVQ_PY_I64] = {NPY_INT64, NPY_INT64, "int64"},
        [MKVQ_PY_U64] = {NPY_UINT64, NPY_INT64, "uint64 or int64"},
        [MKVQ_PY_F64] = {NPY_FLOAT64, NPY_FLOAT64, "float64"},
        [MKVQ_PY_F32] = {NPY_FLOAT32, NPY_FLOAT32, "float32"},
        [MKVQ_PY_U16] = {NPY_UINT16, NPY_FLOAT16, "uint16 or float16"},
        [MKVQ_PY_U8] = {NPY_UINT8, NPY_UINT8, "uint8"},
    };
    /* long and long long are two types of one size: compare what the bytes mean */
    const int type = PyArray_TYPE(array);
    if (type == kinds[kind].type || PyArray_EquivTypenums(type, kinds[kind].type) ||
        PyArray_EquivTypenums(type, kinds[kind].also))
        return 0;
    return wrong_dtype(array, name, kinds[kind].allowed);
}

static int check_sizes(const char *name, int ndim, const int64_t *found, int64_t *sizes)
{
    for (int i = 0; i < ndim; i++) {
        if (sizes[i] >= 0 && sizes[i] != found[i]) {
            PyErr_Format(PyExc_ValueError,
                         "%s is of size %lld in dimension %d, must be of size %lld (wrong shape)",
                         name, (long long)found[i], i, (long long)sizes[i]);
            return -1;
        }
        sizes[i] = found[i];
    }
    return 0;
}

int mkvq_py_dense(PyObject *obj, const char *name, int flags, mkvq_py_kind kind, int ndim,
                  int64_t *sizes, void **address)
{
    int64_t found[4] = {0};
    *address = NULL;
    if ((flags & MKVQ_PY_OPTIONAL) && obj == Py_None)
        return 0;
    if (PyTuple_Check(obj)) {
        int32_t ignored;
        return read_tuple(obj, name, ndim, address, &ignored, found, NULL) < 0
                   ? -1
                   : check_sizes(name, ndim, found, sizes);
    }
    if (!PyArray_Check(obj))
        return wrong_type(obj, name);
    PyArrayObject *array = (PyArrayObject *)obj;
    if (PyArray_NDIM(array) != ndim)
        return wrong_ndim(name, PyArray_NDIM(array), ndim);
    if (dense_dtype(array, name, kind) < 0 || check_memory(array, name, flags) < 0)
        return -1;
    if (!PyArray_IS_C_CONTIGUOUS(array)) {
        PyErr_Format(PyExc_ValueError, "%s is strided, must be C-contiguous (wrong shape)", name);
        return -1;
    }
    for (int i = 0; i < ndim; i++)
        found[i] = PyArray_DIM(array, i);
    *address = PyArray_DATA(array);
    return check_sizes(name, ndim, found, sizes);
}
