/* numeric.h - number formats of the record and the few float rules every back end shares; plain
 * C, usable in device code.
 *
 * Rounding is half to even everywhere. Nothing here depends on the rounding mode other than the
 * default, on errno or on libm. */
#ifndef MKVQ_NUMERIC_H
#define MKVQ_NUMERIC_H
#include <stdint.h>
#include <string.h>

/* MKVQ_BODY: of a function over the vector vocabulary (cpu/vec_*.h, cuda/octet.h). */
#ifdef __CUDACC__
#define MKVQ_FN static __host__ __device__ inline
#define MKVQ_BODY static __device__
#define MKVQ_TABLE static __device__ const
#else
#define MKVQ_FN static inline
#define MKVQ_BODY static
#define MKVQ_TABLE static const
#endif

#define MKVQ_E5M3_MIN 0x1p-24f
#define MKVQ_E5M3_MAX 240.0f
#define MKVQ_E5M3_BIAS 824 /* (127 - 24) << 3: byte + bias are the upper bits of the float */

MKVQ_FN uint32_t mkvq_bits(float x)
{
    uint32_t u;
    memcpy(&u, &x, sizeof u);
    return u;
}

MKVQ_FN float mkvq_float(uint32_t u)
{
    float x;
    memcpy(&x, &u, sizeof x);
    return x;
}

/* Nearest integer, ties to even, for |x| < 2^22: adding 1.5 * 2^23 leaves no room for a
 * fraction. */
MKVQ_FN float mkvq_round(float x)
{
    const float magic = 12582912.0f;
    return (x + magic) - magic;
}

/* ---- float16 and bfloat16 -------------------------------------------------------------------- */
MKVQ_FN float mkvq_f16_to_f32(uint16_t h)
{
    const uint32_t sign = (uint32_t)(h & 0x8000u) << 16, rest = h & 0x7fffu;
    if (rest >= 0x7c00u) /* infinite or NaN */
        return mkvq_float(sign | 0x7f800000u | (rest & 0x3ffu) << 13);
    if (rest >= 0x400u)
        return mkvq_float(sign | ((rest << 13) + (112u << 23)));
    return mkvq_float(sign | mkvq_bits((float)rest * 0x1p-24f)); /* subnormal: exact */
}

MKVQ_FN uint16_t mkvq_f32_to_f16(float x)
{
    const uint32_t u = mkvq_bits(x), sign = (u >> 16) & 0x8000u, a = u & 0x7fffffffu;
    if (a > 0x7f800000u)
        return (uint16_t)(sign | 0x7e00u |
                          (a >> 13 & 0x1ffu)); /* quiet NaN, payload kept as far as it fits */
    if (a >= 0x47800000u)
        return (uint16_t)(sign | 0x7c00u); /* 65536 and above */
    if (a < 0x38800000u) /* below 2^-14: the unit is 2^-24, and adding 0.5 rounds to it */
        return (uint16_t)(sign | (mkvq_bits(mkvq_float(a) + 0.5f) - 0x3f000000u));
    return (uint16_t)(sign | ((a + 0xfffu + (a >> 13 & 1u)) - (112u << 23)) >> 13);
}

MKVQ_FN float mkvq_bf16_to_f32(uint16_t h)
{
    return mkvq_float((uint32_t)h << 16);
}

MKVQ_FN uint16_t mkvq_f32_to_bf16(float x)
{
    const uint32_t u = mkvq_bits(x);
    if ((u & 0x7fffffffu) > 0x7f800000u)
        return (uint16_t)(u >> 16 | 0x40u);
    return (uint16_t)((u + 0x7fffu + (u >> 16 & 1u)) >> 16);
}

/* Upper half of a positive float, rounded up: a bound that is never too small. */
MKVQ_FN uint16_t mkvq_fold_bound(float x)
{
    return (uint16_t)((mkvq_bits(x) + 0xffffu) >> 16);
}

/* ---- e5m3 scales ----------------------------------------------------------------------------- */
MKVQ_FN float mkvq_e5m3_value(uint8_t code)
{
    return mkvq_float((uint32_t)(code + MKVQ_E5M3_BIAS) << 20);
}

/* Nearest code of 0 <= x <= 240. */
MKVQ_FN uint8_t mkvq_e5m3_code(float x)
{
    if (!(x > MKVQ_E5M3_MIN))
        return 0;
    const uint32_t u = mkvq_bits(x);
    return (uint8_t)(((u + 0x7ffffu + (u >> 20 & 1u)) >> 20) - MKVQ_E5M3_BIAS);
}

/* Unit of an int8 offset: scale * 2^min(bits - 4, 2). */
MKVQ_FN float mkvq_offset_unit(float scale, int bits)
{
    static const float factor[9] = {0, 0.125f, 0.25f, 0.5f, 1.0f, 2.0f, 4.0f, 4.0f, 4.0f};
    return scale * factor[bits];
}

/* Place of entry i in a one-bit word: see docs/format.md section 3.2. */
MKVQ_FN int mkvq_one_bit(int i)
{
    return 8 * (i % 16 / 4) + 4 * (i / 16) + i % 4;
}
#endif
