/* bind.h - what the files of mixkvq._core share. Everything here converts and calls; nothing
 * computes.
 *
 * CPython's limited API (abi3, 3.11 on) and the NumPy 2.0 C API; only array.c includes NumPy. */
#ifndef MKVQ_BIND_H
#define MKVQ_BIND_H
#define PY_SSIZE_T_CLEAN
#include <Python.h>

#include "mixkvq.h"

/* Types that functions of the module must recognise. */
typedef struct {
    PyObject *codec_type;
    PyObject *layer_type;
} mkvq_py_state;

/* ---- errors ---------------------------------------------------------------------------------- */
/* Sets ValueError "argument is VALUE, must be ALLOWED (status text)". */
void mkvq_py_raise(mkvq_status status, const mkvq_error *error);
/* Runs `call` without the GIL and returns None, or NULL with its status as an error. */
#define MKVQ_PY_CALL(call) \
    do { \
        mkvq_error error = {0}; \
        mkvq_status status; \
        Py_BEGIN_ALLOW_THREADS \
        status = call; \
        Py_END_ALLOW_THREADS \
        if (status == MKVQ_OK) \
            Py_RETURN_NONE; \
        mkvq_py_raise(status, &error); \
        return NULL; \
    } while (0)

/* ---- calls.c --------------------------------------------------------------------------------- */
PyObject *mkvq_py_pack(PyObject *module, PyObject *const *args, Py_ssize_t n);
PyObject *mkvq_py_salience(PyObject *module, PyObject *const *args, Py_ssize_t n);
PyObject *mkvq_py_inspect(PyObject *module, PyObject *record);
/* 0, or -1 with TypeError when a call has not exactly `want` arguments; `usage` names them. */
int mkvq_py_count(Py_ssize_t n, Py_ssize_t want, const char *usage);
/* A Python int that fits int64_t (int32_t). -1 with an error set otherwise; the error names the
 * argument. */
int mkvq_py_int64(PyObject *obj, const char *name, int64_t *value);
int mkvq_py_int32(PyObject *obj, const char *name, int32_t *value);
int mkvq_py_float(PyObject *obj, const char *name, float *value);

/* ---- handles --------------------------------------------------------------------------------- */
extern PyType_Spec mkvq_py_codec_spec, mkvq_py_layer_spec;
const mkvq_codec *mkvq_py_codec_of(PyObject *codec);

/* ---- workspace.c ------------------------------------------------------------------------------- */
typedef struct {
    void *memory;
    int64_t bytes;
} mkvq_py_workspace;
/* At least `bytes` bytes; on failure none, with MemoryError set. */
mkvq_py_workspace mkvq_py_take_workspace(int64_t bytes);
void mkvq_py_give_workspace(mkvq_py_workspace workspace);

/* ---- parallel.c ------------------------------------------------------------------------------ */
/* What the core gets as its executor: NULL (this thread) until one is installed, and in a process
 * forked since. */
mkvq_executor mkvq_py_executor(void);
void mkvq_py_set_executor(mkvq_executor executor);
/* Address of torch_parallel_for of libtorch; 0 goes back to serial. */
void mkvq_py_set_torch_pool(uintptr_t address);
/* From now on a forked process uses no pool; -1 with MemoryError if that cannot be arranged. */
int mkvq_py_watch_forks(void);
/* How many forks this process is away from the one that imported the module. */
int mkvq_py_forks(void);
/* Reads MIXKVQ_NUM_THREADS; -1 with ImportError if it is not a positive number. */
int mkvq_py_read_threads(void);
#endif
