/* cuda_module.c - the module mixkvq._cuda: the table of CUDA calls that mixkvq._torch imports, and
 * what this machine has to run them. The CUDA runtime is part of the module and looks for the driver
 * at its first call, so that the module can be imported where there is none. */
#define PY_SSIZE_T_CLEAN
#include <Python.h>
#include <cuda_runtime_api.h>

#include "cuda/mixkvq_cuda.h"

static const mkvq_cuda_api api = {
    MKVQ_API_VERSION,           mkvq_cuda_salience, mkvq_cuda_pack,
    mkvq_cuda_unpack,           mkvq_cuda_append,   mkvq_cuda_attend,
    mkvq_cuda_attend_workspace,
};

static PyObject *failed(cudaError_t rc)
{
    PyErr_Format(PyExc_RuntimeError, "%s (CUDA error %d)", cudaGetErrorString(rc), (int)rc);
    return NULL;
}

static PyObject *versions(PyObject *module, PyObject *unused)
{
    (void)module, (void)unused;
    int driver = 0;
    const cudaError_t rc = cudaDriverGetVersion(&driver);
    return rc == cudaSuccess ? Py_BuildValue("(ii)", CUDART_VERSION, driver) : failed(rc);
}

/* (name, major, minor, bytes of memory) */
static PyObject *describe(int device)
{
    struct cudaDeviceProp properties;
    const cudaError_t rc = cudaGetDeviceProperties(&properties, device);
    if (rc != cudaSuccess)
        return failed(rc);
    return Py_BuildValue("(siin)", properties.name, properties.major, properties.minor,
                         (Py_ssize_t)properties.totalGlobalMem);
}

static PyObject *devices(PyObject *module, PyObject *unused)
{
    (void)module, (void)unused;
    int count = 0;
    const cudaError_t rc = cudaGetDeviceCount(&count);
    if (rc != cudaSuccess)
        return failed(rc);
    PyObject *list = PyList_New(0);
    for (int i = 0; list && i < count; i++) {
        PyObject *item = describe(i);
        if (!item || PyList_Append(list, item) < 0)
            Py_CLEAR(list);
        Py_XDECREF(item);
    }
    return list;
}

/* ---- module ---------------------------------------------------------------------------------- */
static PyMethodDef methods[] = {
    {"versions", versions, METH_NOARGS,
     "versions()\n--\n\n(CUDA runtime of this module, newest one that the driver serves), as 13000 "
     "for 13.0; 0: there is no driver."},
    {"devices", devices, METH_NOARGS,
     "devices()\n--\n\n(name, major and minor compute capability, bytes of memory) of every "
     "device. "
     "Raises RuntimeError with what the CUDA runtime says."},
    {NULL, NULL, 0, NULL},
};

static int exec_module(PyObject *module)
{
    PyObject *capsule = PyCapsule_New((void *)&api, MKVQ_CUDA_CAPSULE, NULL);
    const int rc = capsule ? PyModule_AddObjectRef(module, "_C_API", capsule) : -1;
    Py_XDECREF(capsule);
    if (rc < 0 || PyModule_AddStringConstant(module, "__version__", MKVQ_VERSION) < 0 ||
        PyModule_AddStringConstant(module, "built", MKVQ_BUILT_CUDA) < 0)
        return -1;
    return 0;
}

static PyModuleDef_Slot slots[] = {{Py_mod_exec, (void *)exec_module}, {0, NULL}};
static struct PyModuleDef definition = {
    PyModuleDef_HEAD_INIT, "mixkvq._cuda", NULL, 0, methods, slots, NULL, NULL, NULL,
};

PyMODINIT_FUNC PyInit__cuda(void)
{
    return PyModuleDef_Init(&definition);
}
