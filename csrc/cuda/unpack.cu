// unpack.cu - records back to tokens, one block of threads for each: 32 tokens at a time are decoded into a
// tile of shared memory, from which they leave token by token. Keys are decoded with lanes along
// tokens, as in the key columns, values with lanes along channels, as in the value rows.
#include "device.h"
#include "elements.h"
#include "mixkvq_cuda.h"
#include "octet.h"
#include "order.h"

#include "../cpu/hadamard.inl.h"
#include "../cpu/metadata.inl.h"

namespace
{
constexpr int THREADS = 256, WARPS = 8;
constexpr int TILE = 32;            // tokens
constexpr int KEY_PITCH = TILE + 1; // of the tile of keys, [channels][tokens]: a column in 32 banks

struct unpack_job {
    mkvq_history history;
    mkvq_view k, v;
    const int64_t *first;
};

struct unpack_room {
    mkvq_layout layout;
    float mu[MKVQ_MAX_HEAD_DIM];
    uint8_t tier[MKVQ_MAX_HEAD_DIM], stored[MKVQ_MAX_HEAD_DIM];
    order_room order;
    alignas(16) float tile[1]; // and more
};

// Header, tiers, stored order and sections of a record.
MKVQ_DEVICE void read_layout(unpack_room *s, const uint8_t *record)
{
    mkvq_layout *l = &s->layout;
    const int c = thread_index();
    if (c == 0)
        memcpy(&l->head, record, sizeof l->head);
    sync_block();
    if (l->head.kind == MKVQ_KIND_CODED) {
        if (c < l->head.head_dim) {
            const uint8_t *map = record + MKVQ_HEADER_BYTES + 3 * (c / 8);
            const uint32_t word = map[0] | (uint32_t)map[1] << 8 | (uint32_t)map[2] << 16;
            s->tier[c] = word >> 3 * (c % 8) & 7;
        }
        order_channels(s->tier, l->head.head_dim, &s->order, l, s->stored);
    }
    if (c == 0)
        mkvq_layout_sections(l);
    sync_block();
}

// Exact tokens from rows of the record's dtype: verbatim where the dtypes agree, so that NaN payloads
// survive.
MKVQ_DEVICE void copy_exact(const mkvq_view &out, uint8_t *p, const uint8_t *rows,
                            const mkvq_header &h)
{
    const int size = mkvq_dtype_bytes(h.dtype), out_size = mkvq_dtype_bytes(out.dtype);
    if (out.dtype == h.dtype) {
        copy_tokens<false>(out, p, h.tokens, const_cast<uint8_t *>(rows));
        return;
    }
    for (int i = thread_index(); i < h.tokens * h.head_dim; i += THREADS) {
        const int t = i / h.head_dim, c = i % h.head_dim;
        store_element(p + (t * out.stride[2] + c * out.stride[3]) * out_size, out.dtype,
                      load_element(rows + (int64_t)i * size, h.dtype));
    }
}

// The code at `place` of element `at` of columns (rows) of `length` words.
MKVQ_DEVICE uint32_t code_at(const uint32_t *words, int64_t length, int at, mkvq_code_place place)
{
    const uint32_t low = words[place.words * length + at] >> place.shift & place.mask;
    return place.third < 0 ? low
                           : low | (words[place.third * length + at] >> place.third_shift & 1) << 2;
}

// Key of token t in the channel at index `stored`.
MKVQ_DEVICE float unpack_key(const unpack_room *s, const uint8_t *record, int stored, int t)
{
    const mkvq_layout &l = s->layout;
    const int tokens = l.head.tokens, metadata = l.head.metadata & 15;
    if (stored >= l.coded)
        return load_element(record + l.exact_keys +
                                ((int64_t)(stored - l.coded) * tokens + t) *
                                    mkvq_dtype_bytes(l.head.dtype),
                            l.head.dtype);
    const int channel = l.order[stored], bits = mkvq_tier_bits(s->tier[channel]);
    const uint8_t *scales = record + l.key_meta;
    const uint8_t *offsets = scales + (int64_t)mkvq_meta_bytes(metadata) * l.key_groups * l.coded;
    const int64_t at = (int64_t)(t / l.head.key_group) * l.coded + stored;
    const float scale = get_metadata(scales, at, metadata);
    const float offset = get_offset(offsets, at, metadata, scale, bits);
    const uint32_t code =
        code_at((const uint32_t *)(record + l.key_columns), tokens, t, mkvq_key_place(&l, stored));
    const float x = (float)(int)code * scale + offset;
    return l.head.flags & MKVQ_FLAG_REFERENCE ? x + s->mu[channel] : x;
}

MKVQ_DEVICE void unpack_keys(const mkvq_view &out, uint8_t *p, const uint8_t *record,
                             unpack_room *s)
{
    const mkvq_header &h = s->layout.head;
    const int lane = thread_index() % 32, warp = thread_index() / 32,
              size = mkvq_dtype_bytes(out.dtype);
    for (int t = 0; t < h.tokens; t += TILE) {
        for (int i = warp; i < h.head_dim; i += WARPS)
            s->tile[s->layout.order[i] * KEY_PITCH + lane] = unpack_key(s, record, i, t + lane);
        sync_block();
        for (int i = warp; i < TILE; i += WARPS)
            for (int c = lane; c < h.head_dim; c += 32)
                store_element(p + ((t + i) * out.stride[2] + c * out.stride[3]) * size, out.dtype,
                              s->tile[c * KEY_PITCH + i]);
        sync_block();
    }
}

// Value of token t in a channel, still rotated if the record says so.
MKVQ_DEVICE float unpack_value(const unpack_room *s, const uint8_t *record, int t, int channel)
{
    const mkvq_layout &l = s->layout;
    const int tokens = l.head.tokens, metadata = l.head.metadata >> 4;
    const uint8_t *scales = record + l.value_meta;
    const uint8_t *offsets = scales + (int64_t)mkvq_meta_bytes(metadata) * l.value_groups * tokens;
    const int64_t at = (int64_t)(channel / l.head.value_group) * tokens + t;
    const float scale = get_metadata(scales, at, metadata);
    const float offset = get_offset(offsets, at, metadata, scale, l.head.value_bits);
    const uint32_t code = code_at((const uint32_t *)(record + l.values), l.head.head_dim, channel,
                                  mkvq_value_place(&l, t));
    return (float)(int)code * scale + offset;
}

MKVQ_DEVICE void unpack_values(const mkvq_view &out, uint8_t *p, const uint8_t *record,
                               unpack_room *s)
{
    const mkvq_header &h = s->layout.head;
    const int lane = thread_index() % 32, warp = thread_index() / 32,
              size = mkvq_dtype_bytes(out.dtype);
    const int pitch = octet_pitch(h.head_dim);
    for (int t = 0; t < h.tokens; t += TILE) {
        for (int i = warp; i < TILE; i += WARPS)
            for (int c = lane; c < h.head_dim; c += 32)
                s->tile[i * pitch + c] = unpack_value(s, record, t + i, c);
        sync_block();
        if (h.flags & MKVQ_FLAG_ROTATION) {
            hadamard(s->tile + thread_index() / 8 * pitch, h.head_dim);
            sync_block();
        }
        for (int i = warp; i < TILE; i += WARPS)
            for (int c = lane; c < h.head_dim; c += 32)
                store_element(p + ((t + i) * out.stride[2] + c * out.stride[3]) * size, out.dtype,
                              s->tile[i * pitch + c]);
        sync_block();
    }
}

// Block: one record.
MKVQ_KERNEL(THREADS, 3) unpack_kernel(const unpack_job a)
{
    const mkvq_history &h = a.history;
    const int64_t unit = block_x() / h.place_stride, block = block_x() % h.place_stride;
    const int64_t row = unit / h.kv_heads, head = unit % h.kv_heads;
    if (block >= h.blocks[row])
        return;
    const uint8_t *record = (const uint8_t *)(uintptr_t)h.place[unit * h.place_stride + block];
    const int64_t token = a.first[row] + block * h.block_tokens;
    uint8_t *k = mkvq_at(&a.k, row, head, token), *v = mkvq_at(&a.v, row, head, token);
    unpack_room *s = (unpack_room *)shared_memory();
    const mkvq_layout &l = s->layout;
    if (h.mu && thread_index() < h.head_dim)
        s->mu[thread_index()] = mkvq_f16_to_f32(h.mu[unit * h.head_dim + thread_index()]);
    read_layout(s, record);
    if (l.head.kind == MKVQ_KIND_EXACT)
        copy_exact(a.k, k, record + l.exact_keys, l.head);
    else
        unpack_keys(a.k, k, record, s);
    if (l.head.kind == MKVQ_KIND_EXACT || !l.head.value_bits)
        copy_exact(a.v, v, record + l.values, l.head);
    else
        unpack_values(a.v, v, record, s);
}
} // namespace

mkvq_status mkvq_cuda_unpack(const mkvq_unpack_args *args, void *stream, mkvq_error *error)
{
    const mkvq_status status = mkvq_check_unpack(args, MKVQ_ON_DEVICE, error);
    if (status != MKVQ_OK)
        return status;
    const mkvq_history &h = *args->history;
    const int64_t records = h.batch * h.kv_heads * h.place_stride;
    if (records == 0)
        return MKVQ_OK;
    const int keys = h.head_dim * KEY_PITCH, values = TILE * octet_pitch(h.head_dim);
    return launch(unpack_kernel, {records}, THREADS,
                  (int)offsetof(unpack_room, tile) + 4 * (keys > values ? keys : values), stream,
                  unpack_job{h, args->k, args->v, args->first}, error);
}
