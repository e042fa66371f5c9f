// torch_ops.cpp - mixkvq._torch: the core's calls as torch operators, for compiled graphs and C++.
//
// LibTorch stable ABI, target 2.10: one binary serves every later torch. No algorithm here: tensors
// become the argument structs of mixkvq.h, calls go through the table that mixkvq._core exports.
// Importing the module makes torch's intra-op pool the executor of both modules. Fake kernels are
// in mixkvq/torch_module.py.
#include <Python.h>

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <initializer_list>
#include <optional>
#include <string>
#include <tuple>
#include <vector>

#include "mixkvq.h"

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using Optional = std::optional<Tensor>;

namespace
{
const mkvq_api *api = nullptr; // set when the module is imported

void torch_executor(int64_t n, int64_t grain, mkvq_body body, void *ctx)
{
    if (torch_parallel_for(0, n, grain, body, ctx) !=
        0) // the bodies throw nothing: nothing has run
        body(0, n, ctx);
}

// ---- tensors to views and addresses -------------------------------------------------------------
int32_t dtype_of(const Tensor &t, const char *name)
{
    switch (t.scalar_type()) {
    case ScalarType::Float: return MKVQ_F32;
    case ScalarType::Half: return MKVQ_F16;
    case ScalarType::BFloat16: return MKVQ_BF16;
    case ScalarType::Bool: return MKVQ_BOOL;
    default:
        STD_TORCH_CHECK(false, name, " must be float32, float16 or bfloat16 (a mask: or bool)");
    }
}

mkvq_view view(const Tensor &t, const char *name)
{
    STD_TORCH_CHECK(t.is_cpu(), name, " must be on the CPU");
    STD_TORCH_CHECK(t.dim() == 4, name, " is ", t.dim(), "-dimensional, must be 4-dimensional");
    mkvq_view v{};
    v.data = t.data_ptr();
    v.dtype = dtype_of(t, name);
    for (int i = 0; i < 4; i++) {
        v.shape[i] = t.size(i);
        v.stride[i] = t.stride(i);
    }
    return v;
}

// Sizes of 1 in the first three dimensions of the mask stretch to those of q.
mkvq_view mask_view(const Tensor &t, const mkvq_view &q)
{
    mkvq_view v = view(t, "mask");
    for (int i = 0; i < 3; i++)
        if (v.shape[i] == 1) {
            v.shape[i] = q.shape[i];
            v.stride[i] = 0;
        }
    return v;
}

// Address of a dense side array of this type and shape.
template <typename T>
T *dense(const Tensor &t, const char *name, ScalarType type, std::initializer_list<int64_t> shape)
{
    STD_TORCH_CHECK(t.is_cpu(), name, " must be on the CPU");
    STD_TORCH_CHECK(t.scalar_type() == type, name, " has the wrong dtype");
    STD_TORCH_CHECK(t.is_contiguous(), name, " must be contiguous");
    STD_TORCH_CHECK(t.dim() == static_cast<int64_t>(shape.size()), name, " is ", t.dim(),
                    "-dimensional, must be ", shape.size(), "-dimensional");
    int64_t i = 0;
    for (int64_t size : shape) {
        STD_TORCH_CHECK(t.size(i) == size, name, " is of size ", t.size(i), " in dimension ", i,
                        ", must be of size ", size);
        i++;
    }
    return static_cast<T *>(t.data_ptr());
}

template <typename T>
T *dense(const Optional &t, const char *name, ScalarType type, std::initializer_list<int64_t> shape)
{
    return t ? dense<T>(*t, name, type, shape) : nullptr;
}

void check(mkvq_status status, const mkvq_error &error)
{
    if (status == MKVQ_OK)
        return;
    STD_TORCH_CHECK(error.argument, api->status_text(status));
    STD_TORCH_CHECK(false, error.argument, " is ", error.value, ", must be ", error.allowed, " (",
                    api->status_text(status), ")");
}

// ---- arguments shared by several ops ------------------------------------------------------------
// The packed history of a layer, with the slab addresses it points to.
struct History {
    std::vector<uint64_t> base;
    std::vector<int64_t> bytes;
    mkvq_history c{};

    History(const std::vector<Tensor> &slabs, const Tensor &place, const Tensor &blocks,
            const Optional &mu, const mkvq_view &k)
    {
        for (const Tensor &slab : slabs) {
            base.push_back(reinterpret_cast<uintptr_t>(
                dense<uint8_t>(slab, "slabs", ScalarType::Byte, {slab.numel()})));
            bytes.push_back(slab.numel());
        }
        const int64_t *shape = k.shape;
        STD_TORCH_CHECK(place.dim() == 3, "place must be 3-dimensional");
        c.slab_base = base.data(), c.slab_bytes = bytes.data();
        c.slabs = static_cast<int64_t>(base.size());
        c.place_stride = place.size(2);
        c.place =
            dense<int64_t>(place, "place", ScalarType::Long, {shape[0], shape[1], c.place_stride});
        c.blocks = dense<int64_t>(blocks, "blocks", ScalarType::Long, {shape[0]});
        c.mu = dense<uint16_t>(mu, "mu", ScalarType::Half, {shape[0], shape[1], shape[3]});
        c.batch = static_cast<int32_t>(shape[0]), c.kv_heads = static_cast<int32_t>(shape[1]);
        c.head_dim = static_cast<int32_t>(shape[3]);
    }
};

// `fields`: the integers of mkvq_codec in order, head_dim to budget_columns, then MKVQ_TIERS counts
// per pattern.
mkvq_codec codec_of(const std::vector<int64_t> &fields, const std::vector<double> &thresholds)
{
    mkvq_codec c{};
    int32_t *const scalars[] = {
        &c.head_dim,       &c.block_length, &c.dtype,          &c.allocate,     &c.key_group,
        &c.key_metadata,   &c.key_range,    &c.key_reference,  &c.value_bits,   &c.value_group,
        &c.value_metadata, &c.value_range,  &c.value_rotation, &c.pattern_cost, &c.budget_columns};
    const size_t n = std::size(scalars), counts = fields.size() - n;
    STD_TORCH_CHECK(
        fields.size() >= n && counts % MKVQ_TIERS == 0 &&
            counts <= MKVQ_MAX_PATTERNS * MKVQ_TIERS && thresholds.size() == 2,
        "codec must be 15 fields and 6 channel counts per pattern, thresholds 2 numbers");
    for (int64_t field : fields)
        STD_TORCH_CHECK(field >= 0 && field <= UINT16_MAX, "codec has a field ", field,
                        ", must be 0 to 65535");
    for (size_t i = 0; i < n; i++)
        *scalars[i] = static_cast<int32_t>(fields[i]);
    for (size_t i = 0; i < counts; i++)
        c.patterns[i / MKVQ_TIERS][i % MKVQ_TIERS] = static_cast<uint16_t>(fields[n + i]);
    c.n_patterns = static_cast<int32_t>(counts / MKVQ_TIERS);
    c.threshold_high = static_cast<float>(thresholds[0]);
    c.threshold_low = static_cast<float>(thresholds[1]);
    mkvq_error error{};
    check(api->check_codec(&c, &error), error);
    return c;
}

// ---- the ops ------------------------------------------------------------------------------------
void salience_(Tensor sum, const Tensor q, int64_t kv_heads, int64_t power, const Optional first)
{
    mkvq_salience_args a{};
    mkvq_error error{};
    a.q = view(q, "q");
    a.kv_heads = static_cast<int32_t>(kv_heads), a.power = static_cast<int32_t>(power);
    a.first = dense<int64_t>(first, "first", ScalarType::Long, {a.q.shape[0]});
    a.sum = dense<double>(sum, "sum", ScalarType::Double, {a.q.shape[0], kv_heads, a.q.shape[3]});
    a.executor = api->executor();
    check(api->salience(&a, &error), error);
}

std::tuple<Tensor, Tensor, Tensor> pack(const Tensor k, const Tensor v,
                                        const std::vector<int64_t> fields,
                                        const std::vector<double> thresholds, const Tensor first,
                                        const Tensor blocks, int64_t max_blocks,
                                        const Optional importance, Optional mu, Optional has_mu)
{
    const mkvq_codec codec = codec_of(fields, thresholds);
    mkvq_pack_args a{};
    mkvq_error error{};
    a.codec = &codec;
    a.k = view(k, "k"), a.v = view(v, "v");
    STD_TORCH_CHECK(max_blocks >= 0, "max_blocks is ", max_blocks, ", must not be negative");
    const int64_t b = a.k.shape[0], h = a.k.shape[1], d = a.k.shape[3];
    const int64_t bound = api->record_bound(&codec);
    Tensor out = torch::stable::new_zeros(k, {b, h, max_blocks, bound}, ScalarType::Byte);
    Tensor sizes = torch::stable::new_zeros(k, {b, h, max_blocks}, ScalarType::Long);
    Tensor raised = torch::stable::new_zeros(k, {b, h, max_blocks}, ScalarType::Long);
    a.first = dense<int64_t>(first, "first", ScalarType::Long, {b});
    a.blocks = dense<int64_t>(blocks, "blocks", ScalarType::Long, {b});
    a.max_blocks = max_blocks;
    a.importance = dense<float>(importance, "importance", ScalarType::Float, {b, h, d});
    a.mu = dense<uint16_t>(mu, "mu", ScalarType::Half, {b, h, d});
    a.has_mu = dense<uint8_t>(has_mu, "has_mu", ScalarType::Byte, {b, h});
    a.out = static_cast<uint8_t *>(out.data_ptr()), a.out_stride = bound;
    a.sizes = static_cast<int64_t *>(sizes.data_ptr());
    a.raised = static_cast<int64_t *>(raised.data_ptr());
    a.executor = api->executor();
    check(api->pack(&a, &error), error);
    return {out, sizes, raised};
}

void unpack(const std::vector<Tensor> slabs, const Tensor place, const Tensor blocks,
            const Optional mu, Tensor k, Tensor v, const Tensor first)
{
    mkvq_unpack_args a{};
    mkvq_error error{};
    a.k = view(k, "k"), a.v = view(v, "v");
    const History history(slabs, place, blocks, mu, a.k);
    a.history = &history.c;
    a.first = dense<int64_t>(first, "first", ScalarType::Long, {a.k.shape[0]});
    a.executor = api->executor();
    check(api->unpack(&a, &error), error);
}

void append_(Tensor k, Tensor v, Tensor exact, const Tensor k_new, const Tensor v_new)
{
    mkvq_append_args a{};
    mkvq_error error{};
    a.k = view(k, "k"), a.v = view(v, "v");
    a.k_new = view(k_new, "k_new"), a.v_new = view(v_new, "v_new");
    a.exact = dense<int64_t>(exact, "exact", ScalarType::Long, {a.k.shape[0]});
    check(api->append(&a, &error), error);
}

Tensor attend(const Tensor q, const std::vector<Tensor> slabs, const Tensor place,
              const Tensor blocks, const Optional mu, const Tensor k, const Tensor v,
              const Tensor exact, const Optional start, int64_t sink_length, const Optional mask,
              bool causal, double scaling, double softcap, const Optional sink_logits,
              int64_t precision)
{
    mkvq_attend_args a{};
    mkvq_error error{};
    a.q = view(q, "q"), a.k = view(k, "k"), a.v = view(v, "v");
    const int64_t b = a.q.shape[0], h = a.q.shape[1], n = a.q.shape[2], d = a.q.shape[3];
    const History history(slabs, place, blocks, mu, a.k);
    a.history = &history.c;
    a.exact = dense<int64_t>(exact, "exact", ScalarType::Long, {a.k.shape[0]});
    a.start = dense<int64_t>(start, "start", ScalarType::Long, {a.k.shape[0]});
    a.sink_length = static_cast<int32_t>(sink_length);
    STD_TORCH_CHECK(!(mask && causal), "causal is True, must be False when a mask is given");
    a.mask_kind = mask ? MKVQ_MASK_ARRAY : causal ? MKVQ_MASK_CAUSAL : MKVQ_MASK_NONE;
    if (mask)
        a.mask = mask_view(*mask, a.q);
    a.scaling = static_cast<float>(scaling), a.softcap = static_cast<float>(softcap);
    a.sink_logits = dense<float>(sink_logits, "sink_logits", ScalarType::Float, {h});
    a.executor = api->executor();
    const Tensor rows = torch::stable::new_empty(q, {b, n, h, d});
    const Tensor out = torch::stable::transpose(rows, 1, 2);
    a.out = view(out, "out");
    STD_TORCH_CHECK(precision >= 0 && precision <= MKVQ_PRECISION_FAST, "precision is ", precision,
                    ", must be 0, 1 or 2");
    a.precision = static_cast<int32_t>(precision);
    const Tensor workspace =
        torch::stable::new_empty(q, {api->attend_workspace(&a)}, ScalarType::Byte);
    a.workspace_bytes = workspace.numel();
    a.workspace = a.workspace_bytes ? workspace.data_ptr() : nullptr;
    check(api->attend(&a, &error), error);
    return rows;
}

STABLE_TORCH_LIBRARY(mixkvq, m)
{
    m.def("salience_(Tensor(a!) sum, Tensor q, int kv_heads, int power, Tensor? first) -> ()");
    m.def("pack(Tensor k, Tensor v, int[] codec, float[] thresholds, Tensor first, Tensor blocks, "
          "int max_blocks, Tensor? importance, Tensor(a!)? mu, Tensor(b!)? has_mu) "
          "-> (Tensor, Tensor, Tensor)");
    m.def("unpack(Tensor[] slabs, Tensor place, Tensor blocks, Tensor? mu, Tensor(a!) k, "
          "Tensor(b!) v, Tensor first) -> ()");
    m.def(
        "append_(Tensor(a!) k, Tensor(b!) v, Tensor(c!) exact, Tensor k_new, Tensor v_new) -> ()");
    m.def("attend(Tensor q, Tensor[] slabs, Tensor place, Tensor blocks, Tensor? mu, Tensor k, "
          "Tensor v, Tensor exact, Tensor? start, int sink_length, Tensor? mask, bool causal, "
          "float scaling, float softcap, Tensor? sink_logits, int precision=0) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(mixkvq, CPU, m)
{
    m.impl("salience_", TORCH_BOX(&salience_));
    m.impl("pack", TORCH_BOX(&pack));
    m.impl("unpack", TORCH_BOX(&unpack));
    m.impl("append_", TORCH_BOX(&append_));
    m.impl("attend", TORCH_BOX(&attend));
}

// ---- module -------------------------------------------------------------------------------------
int exec_module(PyObject *)
{
    api = static_cast<const mkvq_api *>(PyCapsule_Import(MKVQ_CAPSULE, 0));
    if (!api)
        return -1;
    if (api->version != MKVQ_API_VERSION) {
        PyErr_SetString(
            PyExc_ImportError,
            "mixkvq._torch and mixkvq._core are of different versions: reinstall mixkvq");
        return -1;
    }
    api->set_executor(torch_executor);
    return 0;
}

PyModuleDef_Slot slots[] = {{Py_mod_exec, reinterpret_cast<void *>(exec_module)}, {0, nullptr}};
PyModuleDef definition = {
    PyModuleDef_HEAD_INIT, "mixkvq._torch", nullptr, 0, nullptr, slots, nullptr, nullptr, nullptr};
} // namespace

PyMODINIT_FUNC PyInit__torch(void)
{
    return PyModuleDef_Init(&definition);
}
