/* array.h - the one place where Python objects become addresses: NumPy arrays, or tuples (address,
 * dtype, shape, strides).
 *
 * A tuple is trusted: whoever builds it (mixkvq.ops, from a tensor) vouches for address, shape and
 * lifetime. All functions return 0, or -1 with an error set that names the argument; they borrow,
 * they never copy and never hold a reference. */
#ifndef MKVQ_BIND_ARRAY_H
#define MKVQ_BIND_ARRAY_H
#include "bind.h"

enum { MKVQ_PY_WRITE = 1, MKVQ_PY_OPTIONAL = 2, MKVQ_PY_MASK = 4 };

/* Element kinds of dense side arrays. U16 takes float16 arrays too (bits), U64 int64 ones. */
typedef enum {
    MKVQ_PY_I64,
    MKVQ_PY_U64,
    MKVQ_PY_F64,
    MKVQ_PY_F32,
    MKVQ_PY_U16,
    MKVQ_PY_U8
} mkvq_py_kind;

int mkvq_py_import_numpy(void);

/* Refuses NumPy arrays that may not be written. MKVQ_PY_WRITE does it while parsing. */
int mkvq_py_writable(PyObject *obj, const char *name);

/* A 4-D array with any strides that are whole elements. uint16 arrays hold bits of the 16-bit type
 * `bits16` (MKVQ_F16 or MKVQ_BF16). MKVQ_PY_MASK also allows bool. */
int mkvq_py_view(PyObject *obj, const char *name, int flags, int32_t bits16, mkvq_view *view);

/* A dense C array of `ndim` sizes; a wanted size of -1 accepts any and is replaced by the size
 * found. With MKVQ_PY_OPTIONAL, None gives a NULL address. */
int mkvq_py_dense(PyObject *obj, const char *name, int flags, mkvq_py_kind kind, int ndim,
                  int64_t *sizes, void **address);
#endif
