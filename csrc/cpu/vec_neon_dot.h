/* vec_neon_dot.h - vec_neon.h with the dot product instructions of Armv8.2, which multiply and add
 * four bytes at once.
 *
 * MKVQ_SPLIT16: operands of 16 bits are kept as bytes, high * 256 + low, so that codes of four
 * entries are multiplied by two instructions, where products of 16 bits take four and twice the
 * work of taking codes apart. The sums are the same integers. */
#ifndef MKVQ_VEC_NEON_DOT_H
#define MKVQ_VEC_NEON_DOT_H
#define MKVQ_ISA_NAME "neon-dot"
#define MKVQ_ISA_TABLE mkvq_kernels_neon_dot
#define MKVQ_SPLIT16
#include "vec_neon.h"

/* Bytes of four operands, of which a holds the first and third, b the second and fourth: the low
 * bytes, without sign, and the high ones. */
static inline vi vi_low_bytes(vi a, vi b)
{
    return (vi){
        vreinterpretq_u32_u8(vtrn1q_u8(vreinterpretq_u8_u32(a.lo), vreinterpretq_u8_u32(b.lo))),
        vreinterpretq_u32_u8(vtrn1q_u8(vreinterpretq_u8_u32(a.hi), vreinterpretq_u8_u32(b.hi)))};
}

static inline vi vi_high_bytes(vi a, vi b)
{
    return (vi){
        vreinterpretq_u32_u8(vtrn2q_u8(vreinterpretq_u8_u32(a.lo), vreinterpretq_u8_u32(b.lo))),
        vreinterpretq_u32_u8(vtrn2q_u8(vreinterpretq_u8_u32(a.hi), vreinterpretq_u8_u32(b.hi)))};
}

/* Adds codes 0 ... 127, one in each byte, times operands. */
static inline ws ws_dot_split(ws sum, wi codes, wi low, wi high)
{
    const uint32x4_t first = vreinterpretq_u32_s32(sum.first);
    return (ws){vreinterpretq_s32_u32(
                    vdotq_u32(first, vreinterpretq_u8_u32(codes), vreinterpretq_u8_u32(low))),
                vdotq_s32(sum.second, vreinterpretq_s8_u32(codes), vreinterpretq_s8_u32(high))};
}

static inline wi ws_total_split(ws sum)
{
    return vreinterpretq_u32_s32(vaddq_s32(sum.first, vshlq_n_s32(sum.second, 8)));
}

static inline ws ws_dot8(ws sum, wi codes, wi operands)
{
    sum.first = vdotq_s32(sum.first, vreinterpretq_s8_u32(codes), vreinterpretq_s8_u32(operands));
    return sum;
}

static inline wi ws_total8(ws sum)
{
    return vreinterpretq_u32_s32(sum.first);
}
#endif
