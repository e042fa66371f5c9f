// pack_values.h - the values of a coded record, 32 tokens at a time: an octet per token rotates it,
// codes its groups and leaves the codes in the tile; then a thread per word gathers them.
#ifndef MKVQ_PACK_VALUES_H
#define MKVQ_PACK_VALUES_H
#include "pack_room.h"

MKVQ_DEVICE void load_values(int token, pack_room *s)
{
    const mkvq_view &v = s->job.args.v;
    const int dim = s->job.codec.head_dim, size = mkvq_dtype_bytes(v.dtype),
              pitch = octet_pitch(dim);
    const int lane = thread_index() % 32, warp = thread_index() / 32;
    for (int c = lane; c < dim; c += 32) {
        const uint8_t *p = s->block.v + (token * v.stride[2] + c * v.stride[3]) * size;
        float x[VALUE_TOKENS / PACK_WARPS];
        MKVQ_UNROLL(4)
        for (int i = 0; i < VALUE_TOKENS / PACK_WARPS; i++)
            x[i] = load_element(p + (warp + i * PACK_WARPS) * v.stride[2] * size, v.dtype);
        MKVQ_UNROLL(4)
        for (int i = 0; i < VALUE_TOKENS / PACK_WARPS; i++)
            s->tile[(warp + i * PACK_WARPS) * pitch + c] = x[i];
    }
}

// Replaces one token's values by their codes, as integers; false if a group does not fit.
MKVQ_DEVICE bool code_token(pack_room *s, uint8_t *record, int token, float *x)
{
    const mkvq_codec &codec = s->job.codec;
    const mkvq_layout &l = s->layout;
    const int dim = codec.head_dim, metadata = codec.value_metadata;
    uint8_t *scales = record + l.value_meta;
    uint8_t *offsets =
        scales + (int64_t)mkvq_meta_bytes(metadata) * l.value_groups * codec.block_length;
    uint32_t raised = 0;
    float largest = 0.0f;
    for (int i = 0, c = 0; i < l.value_groups; i++, c += codec.value_group) {
        const int n = c + codec.value_group < dim ? codec.value_group : dim - c;
        const group_range range = find_range(x + c, n);
        group_code g;
        if (!code_group(x + c, n, range, codec.value_bits, metadata, codec.value_range, 0, &g))
            return false;
        const int64_t at = (int64_t)i * codec.block_length + token;
        if (MKVQ_LEADS) {
            put_metadata(scales, at, metadata, g.scale_bits);
            put_metadata(offsets, at, metadata, g.offset_bits);
        }
        for (int j = c; j < c + n; j += 8)
            vf_store(x + j, mkvq_float((uint32_t)(int)codes_of(vf_load(x + j), &g)));
        raised += (uint32_t)g.raised;
        largest = g.scale > largest ? g.scale : largest;
    }
    if (MKVQ_LEADS) {
        max_shared(&s->largest_value, mkvq_bits(largest));
        add_shared(&s->raised, raised);
    }
    return true;
}

// Word of channel `x` of the tile that holds entry 0 ... of `bits` bits each from token `token` of the
// tile on: the codes' bits from `shift` on.
MKVQ_DEVICE uint32_t value_word(const float *x, int pitch, int token, int bits, int shift)
{
    const uint32_t mask = (1u << bits) - 1;
    uint32_t word = 0;
    for (int i = 0; i < 32 / bits; i++) {
        const uint32_t code = mkvq_bits(x[(token + i) * pitch]) >> shift & mask;
        word |= code << (bits == 1 ? mkvq_one_bit(i) : bits * i);
    }
    return word;
}

// Rows of one width for the 32 tokens of a tile, the first of them row `row` of the record.
MKVQ_DEVICE void write_rows(const pack_room *s, uint32_t *words, int row, int bits, int shift)
{
    const int dim = s->job.codec.head_dim, pitch = octet_pitch(dim);
    for (int i = thread_index(); i < bits * dim; i += PACK_THREADS)
        words[(int64_t)row * dim + i] =
            value_word(s->tile + i % dim, pitch, i / dim * (32 / bits), bits, shift);
}

MKVQ_PHASE bool pack_coded_values()
{
    pack_room *s = room();
    const int dim = s->job.codec.head_dim, tokens = s->job.codec.block_length,
              bits = s->job.codec.value_bits;
    uint32_t *words = (uint32_t *)(s->block.record + s->layout.values);
    for (int t = 0; t < tokens; t += VALUE_TOKENS) {
        float *x = s->tile + value_row() * octet_pitch(dim);
        load_values(t, s);
        sync_block();
        if (s->job.codec.value_rotation)
            hadamard(x, dim);
        bool bad = false;
        for (int c = 0; c < dim; c += 8)
            bad = bad || !is_finite(vf_load(x + c)); // also where the rotation overflowed
        if (any_in_block(bad))
            return false;
        if (any_in_block(!code_token(s, s->block.record, t + value_row(), x)))
            return false;
        if (bits == 3) {
            write_rows(s, words, t / 16, 2, 0);
            write_rows(s, words, tokens / 16 + t / 32, 1, 2);
        } else
            write_rows(s, words, t / 32 * bits, bits, 0);
        sync_block();
    }
    return true;
}

MKVQ_DEVICE bool copy_exact_values(const pack_room *s)
{
    const mkvq_view &v = s->job.args.v;
    const int dim = s->job.codec.head_dim, size = mkvq_dtype_bytes(v.dtype);
    bool bad = false;
    for (int t = thread_index() / 32; t < s->job.codec.block_length; t += PACK_WARPS)
        for (int c = thread_index() % 32; c < dim; c += 32)
            bad = bad || !is_finite(load_element(
                             s->block.v + (t * v.stride[2] + c * v.stride[3]) * size, v.dtype));
    if (any_in_block(bad))
        return false;
    copy_tokens<true>(v, s->block.v, s->job.codec.block_length, s->block.record + s->layout.values);
    return true;
}

// False if a value is not finite or a group does not fit.
MKVQ_DEVICE bool pack_values(pack_room *s)
{
    return s->job.codec.value_bits ? pack_coded_values() : copy_exact_values(s);
}
#endif
