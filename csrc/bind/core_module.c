/* core_module.c - the module mixkvq._core: functions, types, and the table that mixkvq._torch
 * imports. */
#include <stdlib.h>
#include <string.h>

#include "array.h"

static const mkvq_api api = {
    MKVQ_API_VERSION,  mkvq_status_text,      mkvq_check_codec,
    mkvq_record_bound, mkvq_inspect,          mkvq_salience,
    mkvq_pack,         mkvq_unpack,           mkvq_append,
    mkvq_attend,       mkvq_attend_workspace, mkvq_py_set_executor,
    mkvq_py_executor,
};

/* ---- instruction sets ------------------------------------------------------------------------ */
static PyObject *isa(PyObject *module, PyObject *unused)
{
    (void)module, (void)unused;
    return PyUnicode_FromString(mkvq_isa());
}

static PyObject *isas(PyObject *module, PyObject *unused)
{
    (void)module, (void)unused;
    PyObject *list = PyList_New(0);
    for (int level = 0; list && level < mkvq_isa_count(); level++) {
        PyObject *item = Py_BuildValue("(sO)", mkvq_isa_name(level),
                                       mkvq_isa_supported(level) ? Py_True : Py_False);
        if (!item || PyList_Append(list, item) < 0)
            Py_CLEAR(list);
        Py_XDECREF(item);
    }
    return list;
}

/* Sets the error `type` "WHAT is 'NAME', must be one of scalar, avx2", with a note at levels that
 * this CPU lacks. */
static void refuse_isa(PyObject *type, const char *what, PyObject *name)
{
    char levels[256] = "";
    for (int level = 0; level < mkvq_isa_count(); level++) {
        strncat(levels, level ? ", " : "", sizeof levels - strlen(levels) - 1);
        strncat(levels, mkvq_isa_name(level), sizeof levels - strlen(levels) - 1);
        strncat(levels, mkvq_isa_supported(level) ? "" : " (not on this CPU)",
                sizeof levels - strlen(levels) - 1);
    }
    PyErr_Format(type, "%s is %R, must be one of %s", what, name, levels);
}

static PyObject *set_isa(PyObject *module, PyObject *name)
{
    (void)module;
    if (name == Py_None) {
        mkvq_set_isa(NULL);
        Py_RETURN_NONE;
    }
    Py_ssize_t size;
    const char *text = PyUnicode_Check(name) ? PyUnicode_AsUTF8AndSize(name, &size) : NULL;
    if (!text) {
        if (!PyErr_Occurred())
            PyErr_Format(PyExc_TypeError, "name is %R, must be a str or None", name);
        return NULL;
    }
    if (strlen(text) != (size_t)size || mkvq_set_isa(text) != MKVQ_OK) {
        refuse_isa(PyExc_ValueError, "name", name);
        return NULL;
    }
    Py_RETURN_NONE;
}

/* ---- parallel -------------------------------------------------------------------------------- */
static PyObject *set_executor_address(PyObject *module, PyObject *address)
{
    (void)module;
    void *pointer = PyLong_AsVoidPtr(address);
    if (!pointer && PyErr_Occurred())
        return NULL;
    mkvq_py_set_torch_pool((uintptr_t)pointer);
    Py_RETURN_NONE;
}

/* ---- what was built: all from the compile itself --------------------------------------------- */
#if defined(__clang__)
#define COMPILER "clang " __VERSION__
#elif defined(__GNUC__)
#define COMPILER "gcc " __VERSION__
#else
#define COMPILER "unknown"
#endif
/* By setup.py: version of the torch that mixkvq._torch, and toolkit and parts that mixkvq._cuda was
 * built with. */
#ifdef MKVQ_BUILT_TORCH
#define MKVQ_TORCH_MODULE " _torch"
#else
#define MKVQ_TORCH_MODULE
#define MKVQ_BUILT_TORCH NULL
#define MKVQ_TORCH_TARGET NULL
#endif
#ifdef MKVQ_BUILT_CUDA
#define MKVQ_CUDA_MODULE " _cuda"
#else
#define MKVQ_CUDA_MODULE
#define MKVQ_BUILT_CUDA NULL
#endif
#define MKVQ_MODULES "_core" MKVQ_TORCH_MODULE MKVQ_CUDA_MODULE

static PyObject *build_info(PyObject *module, PyObject *unused)
{
    (void)module, (void)unused;
    return Py_BuildValue("{s:s,s:s,s:l,s:s,s:s,s:s,s:z,s:z,s:z}", "version", MKVQ_VERSION,
                         "compiler", COMPILER, "std", (long)__STDC_VERSION__, "python_abi",
                         "abi3 cp311", "numpy_abi", "2.0", "modules", MKVQ_MODULES, "torch_headers",
                         MKVQ_BUILT_TORCH, "torch_target", MKVQ_TORCH_TARGET, "cuda_kernels",
                         MKVQ_BUILT_CUDA);
}

/* ---- module ---------------------------------------------------------------------------------- */
static PyMethodDef methods[] = {
    {"pack", (PyCFunction)(void (*)(void))mkvq_py_pack, METH_FASTCALL,
     "pack(codec, k, v, first, blocks, importance, mu, has_mu, out, out_stride, sizes, "
     "raised)\n--\n\n"
     "Packs blocks of k, v [B,H,n,D] into records; see mkvq_pack_args in mixkvq.h."},
    {"salience", (PyCFunction)(void (*)(void))mkvq_py_salience, METH_FASTCALL,
     "salience(q, kv_heads, power, first, sum)\n--\n\nAdds |q|^power per KV head and channel to "
     "sum [B,H,D]."},
    {"inspect", mkvq_py_inspect, METH_O,
     "inspect(record)\n--\n\nReads and checks a record; see mkvq_record_info in mixkvq.h."},
    {"isa", isa, METH_NOARGS, "isa()\n--\n\nInstruction set in use."},
    {"isas", isas, METH_NOARGS,
     "isas()\n--\n\n(name, supported by this CPU) of every instruction set built, best last."},
    {"set_isa", set_isa, METH_O,
     "set_isa(name)\n--\n\nChooses an instruction set for all threads; None: the best."},
    {"build_info", build_info, METH_NOARGS, "build_info()\n--\n\nHow this module was compiled."},
    {"set_executor_address", set_executor_address, METH_O,
     "set_executor_address(address)\n--\n\nRuns loops in torch's pool: the address of "
     "torch_parallel_for; 0: serial."},
    {NULL, NULL, 0, NULL},
};

static int add_type(PyObject *module, const char *name, PyType_Spec *spec, PyObject **keep)
{
    *keep = PyType_FromModuleAndSpec(module, spec, NULL);
    if (!*keep && !PyErr_Occurred()) /* CPython 3.11 does not always say that it had no memory */
        PyErr_NoMemory();
    return *keep ? PyModule_AddObjectRef(module, name, *keep) : -1;
}

static int add_api(PyObject *module)
{
    PyObject *capsule = PyCapsule_New((void *)&api, MKVQ_CAPSULE, NULL);
    const int rc = capsule ? PyModule_AddObjectRef(module, "_C_API", capsule) : -1;
    Py_XDECREF(capsule);
    return rc;
}

static int exec_module(PyObject *module)
{
    mkvq_py_state *state = PyModule_GetState(module);
    if (mkvq_py_import_numpy() < 0 ||
        add_type(module, "Codec", &mkvq_py_codec_spec, &state->codec_type) < 0 ||
        add_type(module, "Layer", &mkvq_py_layer_spec, &state->layer_type) < 0 ||
        add_api(module) < 0 ||
        PyModule_AddStringConstant(module, "__version__", MKVQ_VERSION) < 0 ||
        mkvq_py_read_threads() < 0 || mkvq_py_watch_forks() < 0)
        return -1;
    const char *wanted = getenv("MIXKVQ_ISA");
    if (wanted && *wanted && mkvq_set_isa(wanted) != MKVQ_OK) {
        PyObject *name = PyUnicode_DecodeFSDefault(wanted);
        if (name)
            refuse_isa(PyExc_ImportError, "MIXKVQ_ISA", name);
        Py_XDECREF(name);
        return -1;
    }
    return 0;
}

static int traverse(PyObject *module, visitproc visit, void *arg)
{
    mkvq_py_state *state = PyModule_GetState(module);
    Py_VISIT(state->codec_type);
    Py_VISIT(state->layer_type);
    return 0;
}

static int clear(PyObject *module)
{
    mkvq_py_state *state = PyModule_GetState(module);
    Py_CLEAR(state->codec_type);
    Py_CLEAR(state->layer_type);
    return 0;
}

static PyModuleDef_Slot slots[] = {{Py_mod_exec, (void *)exec_module}, {0, NULL}};
static struct PyModuleDef definition = {
    PyModuleDef_HEAD_INIT,
    "mixkvq._core",
    NULL,
    sizeof(mkvq_py_state),
    methods,
    slots,
    traverse,
    clear,
    NULL,
};

PyMODINIT_FUNC PyInit__core(void)
{
    return PyModuleDef_Init(&definition);
}
