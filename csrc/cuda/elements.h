// elements.h - elements of any float dtype and stride, read and written by the threads of a block.
#ifndef MKVQ_ELEMENTS_H
#define MKVQ_ELEMENTS_H
#include "device.h"

#include "../core.h"

MKVQ_DEVICE float load_element(const uint8_t *p, int dtype)
{
    if (dtype == MKVQ_F32)
        return *(const float *)p;
    const uint16_t half = *(const uint16_t *)p;
    return dtype == MKVQ_F16 ? f16_float(half) : mkvq_bf16_to_f32(half);
}

MKVQ_DEVICE void store_element(uint8_t *p, int dtype, float x)
{
    if (dtype == MKVQ_F32)
        *(float *)p = x;
    else
        *(uint16_t *)p = dtype == MKVQ_F16 ? mkvq_f32_to_f16(x) : mkvq_f32_to_bf16(x);
}

// The same bits.
MKVQ_DEVICE void copy_element(uint8_t *to, const uint8_t *from, int size)
{
    if (size == 4)
        *(uint32_t *)to = *(const uint32_t *)from;
    else
        *(uint16_t *)to = *(const uint16_t *)from;
}

MKVQ_DEVICE bool is_finite(float x)
{
    return (mkvq_bits(x) & 0x7fffffffu) < 0x7f800000u;
}

// Whether rows of 16 bytes can be read at all tokens of a head that begins at p.
MKVQ_DEVICE bool is_whole(const mkvq_view &v, const uint8_t *p)
{
    return v.stride[3] == 1 && (uintptr_t)p % 16 == 0 &&
           v.stride[2] * mkvq_dtype_bytes(v.dtype) % 16 == 0;
}

// Copies `tokens` tokens, bit for bit, between a view, where they begin at p, and dense rows, which
// begin at a multiple of 16. All threads take part.
template <bool to_rows>
MKVQ_DEVICE void copy_tokens(const mkvq_view &v, uint8_t *p, int tokens, uint8_t *rows)
{
    const int dim = (int)v.shape[3], size = mkvq_dtype_bytes(v.dtype);
    const int64_t step = v.stride[2] * size;
    const bool whole = is_whole(v, p);
    const int unit = whole ? 16 : size, pieces = dim * size / unit;
    const int64_t apart = whole ? 16 : v.stride[3] * size;
    for (int i = thread_index(); i < tokens * pieces; i += thread_count()) {
        uint8_t *q = p + i / pieces * step + i % pieces * apart, *r = rows + (int64_t)i * unit;
        if (whole)
            *(uint4 *)(to_rows ? r : q) = *(const uint4 *)(to_rows ? q : r);
        else
            copy_element(to_rows ? r : q, to_rows ? q : r, size);
    }
}
#endif
