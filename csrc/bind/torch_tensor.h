// torch_tensor.h - torch's tensors as the core takes arrays: views, dense addresses, codec, history.
#ifndef MKVQ_TORCH_TENSOR_H
#define MKVQ_TORCH_TENSOR_H
#include <torch/headeronly/core/ScalarType.h>

#include <array>
#include <initializer_list>
#include <vector>

#include "torch_device.h"

namespace
{
using Optional = std::optional<Tensor>;
using torch::headeronly::ScalarType;

// ---- arrays -------------------------------------------------------------------------------------
inline int32_t dtype_of(const Tensor &t, const char *name)
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

inline mkvq_view view(const Where &where, const Tensor &t, const char *name)
{
    where.expect(t, name);
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
inline mkvq_view mask_view(const Where &where, const Tensor &t, const mkvq_view &q)
{
    mkvq_view v = view(where, t, "mask");
    for (int i = 0; i < 3; i++)
        if (v.shape[i] == 1) {
            v.shape[i] = q.shape[i];
            v.stride[i] = 0;
        }
    return v;
}

// Address of a dense side array of this type and shape.
template <typename T>
T *dense(const Where &where, const Tensor &t, const char *name, ScalarType type,
         std::initializer_list<int64_t> shape)
{
    where.expect(t, name);
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
T *dense(const Where &where, const Optional &t, const char *name, ScalarType type,
         std::initializer_list<int64_t> shape)
{
    return t ? dense<T>(where, *t, name, type, shape) : nullptr;
}

inline int32_t int32_of(int64_t value, const char *name)
{
    STD_TORCH_CHECK(value >= INT32_MIN && value <= INT32_MAX, name, " is ", value,
                    ", must fit into 32 bits");
    return static_cast<int32_t>(value);
}

// ---- arguments shared by several ops ------------------------------------------------------------
// All memory of the process as slabs of 2^40 bytes: an address is then a place in it.
constexpr int64_t ALL_SLABS = 256, SLAB_SIZE = int64_t{1} << MKVQ_SLAB_SHIFT;

inline const std::array<uint64_t, ALL_SLABS> &all_memory()
{
    static const auto base = [] {
        std::array<uint64_t, ALL_SLABS> table{};
        for (size_t i = 0; i < table.size(); i++)
            table[i] = static_cast<uint64_t>(i) << MKVQ_SLAB_SHIFT;
        return table;
    }();
    return base;
}

// The packed history of a layer. Without `record_bytes` places are indices of slabs and offsets in
// them, and the core checks every record; with it they are addresses of records of at most that size
// and of `block_tokens` tokens, for which the caller vouches.
struct History {
    std::vector<uint64_t> base;
    std::vector<int64_t> bytes;
    mkvq_history c{};

    History(const Where &where, const std::vector<Tensor> &slabs, const Tensor &place,
            const Tensor &blocks, const Optional &mu, const mkvq_view &k, int64_t block_tokens,
            int64_t record_bytes)
    {
        for (const Tensor &slab : slabs) {
            base.push_back(reinterpret_cast<uintptr_t>(
                dense<uint8_t>(where, slab, "slabs", ScalarType::Byte, {slab.numel()})));
            bytes.push_back(slab.numel());
        }
        const int64_t *shape = k.shape;
        STD_TORCH_CHECK(place.dim() == 3, "place must be 3-dimensional");
        STD_TORCH_CHECK(block_tokens >= 0 && block_tokens <= UINT16_MAX, "block_tokens is ",
                        block_tokens, ", must be from 0 to 65535");
        STD_TORCH_CHECK(record_bytes >= 0, "record_bytes is ", record_bytes,
                        ", must not be negative");
        STD_TORCH_CHECK(!record_bytes || slabs.empty(), "slabs are ", slabs.size(),
                        ", must be none where record_bytes says that places are addresses");
        if (record_bytes && !where.by_kernels()) {
            base.assign(all_memory().begin(), all_memory().end());
            bytes.assign(base.size(), SLAB_SIZE);
            c.checked = 1;
        }
        c.slab_base = base.data(), c.slab_bytes = bytes.data();
        c.slabs = static_cast<int64_t>(base.size());
        c.place_stride = place.size(2);
        c.place = dense<int64_t>(where, place, "place", ScalarType::Long,
                                 {shape[0], shape[1], c.place_stride});
        c.blocks = dense<int64_t>(where, blocks, "blocks", ScalarType::Long, {shape[0]});
        c.mu = dense<uint16_t>(where, mu, "mu", ScalarType::Half, {shape[0], shape[1], shape[3]});
        c.batch = static_cast<int32_t>(shape[0]), c.kv_heads = static_cast<int32_t>(shape[1]);
        c.head_dim = static_cast<int32_t>(shape[3]);
        if (record_bytes)
            c.block_tokens = static_cast<int32_t>(block_tokens), c.record_bytes = record_bytes;
    }
    History(const History &) = delete; // c points into the others
};

// `fields`: the integers of mkvq_codec in order, head_dim to budget_columns, then MKVQ_TIERS counts
// per pattern.
inline mkvq_codec codec_of(const std::vector<int64_t> &fields,
                           const std::vector<double> &thresholds)
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
} // namespace
#endif
