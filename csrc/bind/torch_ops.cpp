// torch_ops.cpp - mixkvq._torch: the core's calls as torch operators, for CUDA tensors, compiled
// graphs and C++.
//
// LibTorch stable ABI, target 2.10: one binary serves every later torch. No algorithm here: tensors
// become the argument structs of mixkvq.h, calls go through the tables that mixkvq._core and
// mixkvq._cuda export. The CPU and the CUDA operators are the same functions (torch_device.h).
// Importing the module makes torch's intra-op pool the executor of both modules. Fake kernels are
// in mixkvq/torch_module.py.
#include <Python.h>

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <tuple>

#include "torch_tensor.h"

namespace
{
void torch_executor(int64_t n, int64_t grain, mkvq_body body, void *ctx)
{
    if (torch_parallel_for(0, n, grain, body, ctx) !=
        0) // the bodies throw nothing: nothing has run
        body(0, n, ctx);
}

// ---- the ops ------------------------------------------------------------------------------------
void salience_(Tensor sum, const Tensor q, int64_t kv_heads, int64_t power, const Optional first)
{
    const Where where(q, "q");
    mkvq_salience_args a{};
    a.q = view(where, q, "q");
    a.kv_heads = int32_of(kv_heads, "kv_heads"), a.power = int32_of(power, "power");
    a.first = dense<int64_t>(where, first, "first", ScalarType::Long, {a.q.shape[0]});
    a.sum = dense<double>(where, sum, "sum", ScalarType::Double,
                          {a.q.shape[0], kv_heads, a.q.shape[3]});
    a.executor = api->executor();
    where.call(api->salience, &mkvq_cuda_api::salience, a);
}

std::tuple<Tensor, Tensor, Tensor> pack(const Tensor k, const Tensor v,
                                        const std::vector<int64_t> fields,
                                        const std::vector<double> thresholds, const Tensor first,
                                        const Tensor blocks, int64_t max_blocks,
                                        const Optional importance, Optional mu, Optional has_mu)
{
    const Where where(k, "k");
    const mkvq_codec codec = codec_of(fields, thresholds);
    mkvq_pack_args a{};
    a.codec = &codec;
    a.k = view(where, k, "k"), a.v = view(where, v, "v");
    STD_TORCH_CHECK(max_blocks >= 0, "max_blocks is ", max_blocks, ", must not be negative");
    const int64_t b = a.k.shape[0], h = a.k.shape[1], d = a.k.shape[3];
    const int64_t bound = api->record_bound(&codec);
    Tensor out = where.by_kernels() // which write whole records, and nobody reads what lies behind
                     ? torch::stable::new_empty(k, {b, h, max_blocks, bound}, ScalarType::Byte)
                     : torch::stable::new_zeros(k, {b, h, max_blocks, bound}, ScalarType::Byte);
    Tensor sizes = torch::stable::new_zeros(k, {b, h, max_blocks}, ScalarType::Long);
    Tensor raised = torch::stable::new_zeros(k, {b, h, max_blocks}, ScalarType::Long);
    a.first = dense<int64_t>(where, first, "first", ScalarType::Long, {b});
    a.blocks = dense<int64_t>(where, blocks, "blocks", ScalarType::Long, {b});
    a.max_blocks = max_blocks;
    a.importance = dense<float>(where, importance, "importance", ScalarType::Float, {b, h, d});
    a.mu = dense<uint16_t>(where, mu, "mu", ScalarType::Half, {b, h, d});
    a.has_mu = dense<uint8_t>(where, has_mu, "has_mu", ScalarType::Byte, {b, h});
    a.out = static_cast<uint8_t *>(out.data_ptr()), a.out_stride = bound;
    a.sizes = static_cast<int64_t *>(sizes.data_ptr());
    a.raised = static_cast<int64_t *>(raised.data_ptr());
    a.executor = api->executor();
    where.call(api->pack, &mkvq_cuda_api::pack, a);
    return {out, sizes, raised};
}

void unpack(const std::vector<Tensor> slabs, const Tensor place, const Tensor blocks,
            const Optional mu, Tensor k, Tensor v, const Tensor first, int64_t block_tokens,
            int64_t record_bytes)
{
    const Where where(k, "k");
    mkvq_unpack_args a{};
    a.k = view(where, k, "k"), a.v = view(where, v, "v");
    const History history(where, slabs, place, blocks, mu, a.k, block_tokens, record_bytes);
    a.history = &history.c;
    a.first = dense<int64_t>(where, first, "first", ScalarType::Long, {a.k.shape[0]});
    a.executor = api->executor();
    where.call(api->unpack, &mkvq_cuda_api::unpack, a);
}

void append_(Tensor k, Tensor v, Tensor exact, const Tensor k_new, const Tensor v_new)
{
    const Where where(k, "k");
    mkvq_append_args a{};
    a.k = view(where, k, "k"), a.v = view(where, v, "v");
    a.k_new = view(where, k_new, "k_new"), a.v_new = view(where, v_new, "v_new");
    a.exact = dense<int64_t>(where, exact, "exact", ScalarType::Long, {a.k.shape[0]});
    where.call(api->append, &mkvq_cuda_api::append, a);
}

int32_t precision_of(int64_t precision)
{
    STD_TORCH_CHECK(precision >= 0 && precision <= MKVQ_PRECISION_FAST, "precision is ", precision,
                    ", must be 0, 1 or 2");
    return static_cast<int32_t>(precision);
}

// Bytes of workspace that the kernels want for such calls; 0 where the core has its own.
int64_t attend_workspace(const Tensor q, const Tensor place, const Tensor blocks, const Tensor k,
                         int64_t precision, int64_t block_tokens, int64_t record_bytes)
{
    const Where where(q, "q");
    if (!where.by_kernels())
        return 0;
    mkvq_attend_args a{};
    a.q = a.out = view(where, q, "q"), a.k = a.v = view(where, k, "k");
    const History history(where, {}, place, blocks, {}, a.k, block_tokens, record_bytes);
    a.history = &history.c;
    a.precision = precision_of(precision);
    return cuda.table->attend_workspace(&a);
}

Tensor attend(const Tensor q, const std::vector<Tensor> slabs, const Tensor place,
              const Tensor blocks, const Optional mu, const Tensor k, const Tensor v,
              const Tensor exact, const Optional start, int64_t sink_length, const Optional mask,
              bool causal, double scaling, double softcap, const Optional sink_logits,
              int64_t precision, int64_t block_tokens, int64_t record_bytes, Optional workspace)
{
    const Where where(q, "q");
    mkvq_attend_args a{};
    a.q = view(where, q, "q"), a.k = view(where, k, "k"), a.v = view(where, v, "v");
    const int64_t b = a.q.shape[0], h = a.q.shape[1], n = a.q.shape[2], d = a.q.shape[3];
    const History history(where, slabs, place, blocks, mu, a.k, block_tokens, record_bytes);
    a.history = &history.c;
    a.exact = dense<int64_t>(where, exact, "exact", ScalarType::Long, {a.k.shape[0]});
    a.start = dense<int64_t>(where, start, "start", ScalarType::Long, {a.k.shape[0]});
    a.sink_length = int32_of(sink_length, "sink_length");
    STD_TORCH_CHECK(!(mask && causal), "causal is True, must be False when a mask is given");
    a.mask_kind = mask ? MKVQ_MASK_ARRAY : causal ? MKVQ_MASK_CAUSAL : MKVQ_MASK_NONE;
    if (mask)
        a.mask = mask_view(where, *mask, a.q);
    a.scaling = static_cast<float>(scaling), a.softcap = static_cast<float>(softcap);
    a.sink_logits = dense<float>(where, sink_logits, "sink_logits", ScalarType::Float, {h});
    a.executor = api->executor();
    const Tensor rows = torch::stable::new_empty(q, {b, n, h, d});
    a.out = a.q, a.out.data = rows.data_ptr();
    a.out.stride[0] = n * h * d, a.out.stride[1] = d, a.out.stride[2] = h * d, a.out.stride[3] = 1;
    a.precision = precision_of(precision);
    std::optional<Tensor> own;
    if (!workspace || !where.by_kernels()) {
        // counters of the kernels begin at zero
        own =
            where.by_kernels()
                ? torch::stable::new_zeros(q, {cuda.table->attend_workspace(&a)}, ScalarType::Byte)
                : torch::stable::new_empty(q, {api->attend_workspace(&a)}, ScalarType::Byte);
        workspace = own;
    }
    a.workspace_bytes = workspace->numel();
    a.workspace =
        dense<uint8_t>(where, *workspace, "workspace", ScalarType::Byte, {a.workspace_bytes});
    if (a.workspace_bytes == 0)
        a.workspace = nullptr;
    where.call(api->attend, &mkvq_cuda_api::attend, a);
    return rows;
}

STABLE_TORCH_LIBRARY(mixkvq, m)
{
    m.def("salience_(Tensor(a!) sum, Tensor q, int kv_heads, int power, Tensor? first) -> ()");
    m.def("pack(Tensor k, Tensor v, int[] codec, float[] thresholds, Tensor first, Tensor blocks, "
          "int max_blocks, Tensor? importance, Tensor(a!)? mu, Tensor(b!)? has_mu) "
          "-> (Tensor, Tensor, Tensor)");
    m.def("unpack(Tensor[] slabs, Tensor place, Tensor blocks, Tensor? mu, Tensor(a!) k, "
          "Tensor(b!) v, Tensor first, int block_tokens=0, int record_bytes=0) -> ()");
    m.def(
        "append_(Tensor(a!) k, Tensor(b!) v, Tensor(c!) exact, Tensor k_new, Tensor v_new) -> ()");
    m.def("attend_workspace(Tensor q, Tensor place, Tensor blocks, Tensor k, int precision, "
          "int block_tokens, int record_bytes) -> int");
    m.def("attend(Tensor q, Tensor[] slabs, Tensor place, Tensor blocks, Tensor? mu, Tensor k, "
          "Tensor v, Tensor exact, Tensor? start, int sink_length, Tensor? mask, bool causal, "
          "float scaling, float softcap, Tensor? sink_logits, int precision=0, "
          "int block_tokens=0, int record_bytes=0, Tensor(a!)? workspace=None) -> Tensor");
}

template <typename Library> void implement(Library &m)
{
    m.impl("salience_", TORCH_BOX(&salience_));
    m.impl("pack", TORCH_BOX(&pack));
    m.impl("unpack", TORCH_BOX(&unpack));
    m.impl("append_", TORCH_BOX(&append_));
    m.impl("attend_workspace", TORCH_BOX(&attend_workspace));
    m.impl("attend", TORCH_BOX(&attend));
}

STABLE_TORCH_LIBRARY_IMPL(mixkvq, CPU, m)
{
    implement(m);
}

STABLE_TORCH_LIBRARY_IMPL(mixkvq, CUDA, m)
{
    implement(m);
}

// ---- module -------------------------------------------------------------------------------------
int same_version(uint32_t version, const char *other)
{
    if (version == MKVQ_API_VERSION)
        return 0;
    PyErr_Format(PyExc_ImportError,
                 "mixkvq._torch and mixkvq.%s are of different versions: reinstall mixkvq", other);
    return -1;
}

PyObject *set_cuda(PyObject *, PyObject *args)
{
    PyObject *capsule;
    unsigned long long stream = 0;
    int on_host = 0;
    if (!PyArg_ParseTuple(args, "O|Kp:set_cuda", &capsule, &stream, &on_host))
        return nullptr;
    const mkvq_cuda_api *table = nullptr;
    if (capsule != Py_None) {
        table =
            static_cast<const mkvq_cuda_api *>(PyCapsule_GetPointer(capsule, MKVQ_CUDA_CAPSULE));
        if (!table || same_version(table->version, "_cuda") < 0)
            return nullptr;
    }
    cuda.table = table, cuda.on_host = table && on_host;
    cuda.current_stream =
        reinterpret_cast<decltype(cuda.current_stream)>(static_cast<uintptr_t>(stream));
    Py_RETURN_NONE;
}

int exec_module(PyObject *)
{
    api = static_cast<const mkvq_api *>(PyCapsule_Import(MKVQ_CAPSULE, 0));
    if (!api || same_version(api->version, "_core") < 0)
        return -1;
    api->set_executor(torch_executor);
    return 0;
}

PyMethodDef methods[] = {{"set_cuda", set_cuda, METH_VARARGS,
                          "set_cuda(capsule, current_stream=0, on_host=False)\n--\n\n"
                          "Use the kernels of this table of mixkvq._cuda (None: of none). "
                          "`current_stream`: the address of "
                          "aoti_torch_get_current_cuda_stream, which torch before 2.13 needs. "
                          "`on_host`: they run on the "
                          "host and serve CPU tensors, as the emulator of the tests does."},
                         {nullptr, nullptr, 0, nullptr}};
PyModuleDef_Slot slots[] = {{Py_mod_exec, reinterpret_cast<void *>(exec_module)}, {0, nullptr}};
PyModuleDef definition = {
    PyModuleDef_HEAD_INIT, "mixkvq._torch", nullptr, 0, methods, slots, nullptr, nullptr, nullptr};
} // namespace

PyMODINIT_FUNC PyInit__torch(void)
{
    return PyModuleDef_Init(&definition);
}
