/* vec_neon.h - the vector vocabulary of vec_scalar.h for 64-bit ARM: eight lanes in two NEON
 * registers. Same names, same results; only vf_fma rounds once. vec_neon_dot.h builds on it. */
#ifndef MKVQ_VEC_H
#define MKVQ_VEC_H
#include "../numeric.h"
#include <arm_neon.h>
#include <math.h>

#ifndef MKVQ_ISA_TABLE
#define MKVQ_ISA_NAME "neon"
#define MKVQ_ISA_TABLE mkvq_kernels_neon
#endif

/* a vector operation costs little more than what one of its lanes would */
#define MKVQ_WIDE 1

/* accumulators stay in registers only where loops over them are unrolled */
#define MKVQ_PRAGMA(text) _Pragma(#text)
#define MKVQ_UNROLL(n) MKVQ_PRAGMA(GCC unroll n)

typedef struct {
    float32x4_t lo, hi;
} vf;
typedef struct {
    uint32x4_t lo, hi;
} vi;

static inline vf vf_set1(float x)
{
    const float32x4_t r = vdupq_n_f32(x);
    return (vf){r, r};
}

static inline vf vf_load(const float *p)
{
    return (vf){vld1q_f32(p), vld1q_f32(p + 4)};
}

static inline void vf_store(float *p, vf x)
{
    vst1q_f32(p, x.lo);
    vst1q_f32(p + 4, x.hi);
}

static inline vf vf_load_f16(const uint16_t *p)
{
    const float16x8_t h = vreinterpretq_f16_u16(vld1q_u16(p));
    return (vf){vcvt_f32_f16(vget_low_f16(h)), vcvt_high_f32_f16(h)};
}

static inline vf vf_load_bf16(const uint16_t *p)
{
    const uint16x8_t h = vld1q_u16(p);
    return (vf){vreinterpretq_f32_u32(vshll_n_u16(vget_low_u16(h), 16)),
                vreinterpretq_f32_u32(vshll_high_n_u16(h, 16))};
}

#define MKVQ_VF_BINARY(name, operation) \
    static inline vf name(vf a, vf b) \
    { \
        return (vf){operation(a.lo, b.lo), operation(a.hi, b.hi)}; \
    }
MKVQ_VF_BINARY(vf_add, vaddq_f32)
MKVQ_VF_BINARY(vf_sub, vsubq_f32)
MKVQ_VF_BINARY(vf_mul, vmulq_f32)
MKVQ_VF_BINARY(vf_div, vdivq_f32)

/* not vmaxq_f32 and vminq_f32, which treat NaN and zeros of both signs otherwise */
static inline float32x4_t greater_or_second(float32x4_t a, float32x4_t b)
{
    return vbslq_f32(vcgtq_f32(a, b), a, b);
}

static inline float32x4_t less_or_second(float32x4_t a, float32x4_t b)
{
    return vbslq_f32(vcltq_f32(a, b), a, b);
}
MKVQ_VF_BINARY(vf_max, greater_or_second)
MKVQ_VF_BINARY(vf_min, less_or_second)

static inline vf vf_fma(vf a, vf b, vf c)
{
    return (vf){vfmaq_f32(c.lo, a.lo, b.lo), vfmaq_f32(c.hi, a.hi, b.hi)};
}

static inline vf vf_fma_sum(vf a, vf b, vf sum)
{
    return vf_fma(a, b, sum);
}

static inline vf vf_round(vf x)
{
    return (vf){vrndnq_f32(x.lo), vrndnq_f32(x.hi)};
}

static inline vf vf_abs(vf x)
{
    return (vf){vabsq_f32(x.lo), vabsq_f32(x.hi)};
}

static inline vf vf_clamp(vf x, float low, float high)
{
    const float32x4_t a = vdupq_n_f32(low), b = vdupq_n_f32(high);
    return (vf){vminq_f32(vmaxq_f32(x.lo, a), b), vminq_f32(vmaxq_f32(x.hi, a), b)};
}

/* Bits of the lanes that are all ones. */
static inline unsigned lane_mask(uint32x4_t lo, uint32x4_t hi)
{
    static const uint32_t bit[8] = {1, 2, 4, 8, 16, 32, 64, 128};
    return vaddvq_u32(vorrq_u32(vandq_u32(lo, vld1q_u32(bit)), vandq_u32(hi, vld1q_u32(bit + 4))));
}

static inline unsigned vf_less(vf a, vf b)
{
    return lane_mask(vcltq_f32(a.lo, b.lo), vcltq_f32(a.hi, b.hi));
}

static inline unsigned vf_equal(vf a, vf b)
{
    return lane_mask(vceqq_f32(a.lo, b.lo), vceqq_f32(a.hi, b.hi));
}

static inline vf vf_hide_below(vf p, vf x, float limit)
{
    const float32x4_t top = vdupq_n_f32(limit), hidden = vdupq_n_f32(-INFINITY);
    return (vf){vbslq_f32(vcltq_f32(x.lo, top), hidden, p.lo),
                vbslq_f32(vcltq_f32(x.hi, top), hidden, p.hi)};
}

static inline float32x4_t zero_below(float32x4_t p, float32x4_t x, float32x4_t limit)
{
    return vreinterpretq_f32_u32(vbicq_u32(vreinterpretq_u32_f32(p), vcltq_f32(x, limit)));
}

static inline vf vf_zero_below(vf p, vf x, float limit)
{
    return (vf){zero_below(p.lo, x.lo, vdupq_n_f32(limit)),
                zero_below(p.hi, x.hi, vdupq_n_f32(limit))};
}

static inline float vf_sum(vf x)
{
    const float32x4_t a = vaddq_f32(x.lo, x.hi);                       /* 0+4 1+5 2+6 3+7 */
    const float32x2_t b = vadd_f32(vget_low_f32(a), vget_high_f32(a)); /* even sum, odd sum */
    return vget_lane_f32(b, 0) + vget_lane_f32(b, 1);
}

/* maxnm and minnm leave NaN out, as a comparison does */
static inline float vf_hmax(vf x)
{
    return vmaxnmvq_f32(vmaxnmq_f32(x.lo, x.hi));
}

static inline float vf_hmin(vf x)
{
    return vminnmvq_f32(vminnmq_f32(x.lo, x.hi));
}

static inline int vf_finite(vf x)
{
    const uint32x4_t widest =
        vmaxq_u32(vreinterpretq_u32_f32(vabsq_f32(x.lo)), vreinterpretq_u32_f32(vabsq_f32(x.hi)));
    return vmaxvq_u32(widest) < 0x7f800000u;
}

static inline vi vi_load(const uint32_t *p)
{
    return (vi){vld1q_u32(p), vld1q_u32(p + 4)};
}

static inline vi vi_set1(uint32_t x)
{
    const uint32x4_t r = vdupq_n_u32(x);
    return (vi){r, r};
}

static inline void vi_store(uint32_t *p, vi x)
{
    vst1q_u32(p, x.lo);
    vst1q_u32(p + 4, x.hi);
}

static inline vi vi_or(vi a, vi b)
{
    return (vi){vorrq_u32(a.lo, b.lo), vorrq_u32(a.hi, b.hi)};
}

static inline vi vi_and1(vi a, uint32_t mask)
{
    return (vi){vandq_u32(a.lo, vdupq_n_u32(mask)), vandq_u32(a.hi, vdupq_n_u32(mask))};
}

static inline vi vi_add(vi a, vi b)
{
    return (vi){vaddq_u32(a.lo, b.lo), vaddq_u32(a.hi, b.hi)};
}

static inline vi vi_bits(vf x)
{
    return (vi){vreinterpretq_u32_f32(x.lo), vreinterpretq_u32_f32(x.hi)};
}

static inline vf vf_of_bits(vi x)
{
    return (vf){vreinterpretq_f32_u32(x.lo), vreinterpretq_f32_u32(x.hi)};
}

/* operators, not vshlq_u32: a constant count becomes part of the instruction */
static inline vi vi_shl(vi a, int count)
{
    return (vi){a.lo << (uint32_t)count, a.hi << (uint32_t)count};
}

static inline vi vi_shr(vi a, int count)
{
    return (vi){a.lo >> (uint32_t)count, a.hi >> (uint32_t)count};
}

static inline vi vi_from_vf(vf x)
{
    return (vi){vreinterpretq_u32_s32(vcvtq_s32_f32(x.lo)),
                vreinterpretq_u32_s32(vcvtq_s32_f32(x.hi))};
}

static inline vf vf_from_vi(vi x)
{
    return (vf){vcvtq_f32_s32(vreinterpretq_s32_u32(x.lo)),
                vcvtq_f32_s32(vreinterpretq_s32_u32(x.hi))};
}

static inline vi vi_load_u8(const uint8_t *p)
{
    const uint16x8_t x = vmovl_u8(vld1_u8(p));
    return (vi){vmovl_u16(vget_low_u16(x)), vmovl_high_u16(x)};
}

static inline vi vi_load_i8(const uint8_t *p)
{
    const int16x8_t x = vmovl_s8(vreinterpret_s8_u8(vld1_u8(p)));
    return (vi){vreinterpretq_u32_s32(vmovl_s16(vget_low_s16(x))),
                vreinterpretq_u32_s32(vmovl_high_s16(x))};
}

static inline vi vi_pair16(vi low, vi high)
{
    return (vi){vsliq_n_u32(low.lo, high.lo, 16), vsliq_n_u32(low.hi, high.hi, 16)};
}

static inline float32x4_t pow2(float32x4_t n)
{
    const int32x4_t exponent = vaddq_s32(vcvtq_s32_f32(n), vdupq_n_s32(127));
    return vreinterpretq_f32_s32(vshlq_n_s32(exponent, 23));
}

static inline vf vf_pow2(vf n)
{
    return (vf){pow2(n.lo), pow2(n.hi)};
}

/* r[i] lane j <-> r[j] lane i, four by four */
static inline void transpose4(float32x4_t r[4])
{
    const float32x4x2_t a = vzipq_f32(r[0], r[2]), b = vzipq_f32(r[1], r[3]);
    const float32x4x2_t c = vzipq_f32(a.val[0], b.val[0]), d = vzipq_f32(a.val[1], b.val[1]);
    r[0] = c.val[0], r[1] = c.val[1], r[2] = d.val[0], r[3] = d.val[1];
}

static inline void vf_transpose(vf r[8])
{
    for (int i = 0; i < 8; i += 4) {
        float32x4_t lo[4] = {r[i].lo, r[i + 1].lo, r[i + 2].lo, r[i + 3].lo};
        float32x4_t hi[4] = {r[i].hi, r[i + 1].hi, r[i + 2].hi, r[i + 3].hi};
        transpose4(lo), transpose4(hi);
        for (int j = 0; j < 4; j++)
            r[i + j] = (vf){lo[j], hi[j]};
    }
    for (int j = 0; j < 4; j++) {
        const float32x4_t corner = r[j].hi;
        r[j].hi = r[j + 4].lo, r[j + 4].lo = corner;
    }
}

static inline vf vf_butterfly(vf x, int stride)
{
    static const uint32_t second[2][4] = {{0, ~0u, 0, ~0u}, {0, 0, ~0u, ~0u}};
    if (stride == 4)
        return (vf){vaddq_f32(x.lo, x.hi), vsubq_f32(x.lo, x.hi)};
    const uint32x4_t mask = vld1q_u32(second[stride - 1]);
    const vf y = stride == 1 ? (vf){vrev64q_f32(x.lo), vrev64q_f32(x.hi)}
                             : (vf){vextq_f32(x.lo, x.lo, 2), vextq_f32(x.hi, x.hi, 2)};
    const vf sum = vf_add(x, y), difference = vf_sub(y, x);
    return (vf){vbslq_f32(mask, difference.lo, sum.lo), vbslq_f32(mask, difference.hi, sum.hi)};
}

/* eight doubles */
typedef struct {
    float64x2_t part[4];
} vd;

static inline vd vd_load(const double *p)
{
    return (vd){{vld1q_f64(p), vld1q_f64(p + 2), vld1q_f64(p + 4), vld1q_f64(p + 6)}};
}

static inline void vd_store(double *p, vd x)
{
    for (int i = 0; i < 4; i++)
        vst1q_f64(p + 2 * i, x.part[i]);
}

/* the square of a float is exact in double: fused or not, the sum is rounded once */
static inline vd vd_add_power(vd sum, vf x, int power)
{
    const float64x2_t part[4] = {vcvt_f64_f32(vget_low_f32(x.lo)), vcvt_high_f64_f32(x.lo),
                                 vcvt_f64_f32(vget_low_f32(x.hi)), vcvt_high_f64_f32(x.hi)};
    for (int i = 0; i < 4; i++) {
        const float64x2_t s = sum.part[i], a = part[i];
        sum.part[i] = power == 2 ? vfmaq_f64(s, a, a) : vaddq_f64(s, vabsq_f64(a));
    }
    return sum;
}

/* ---- the wide vocabulary: see vec_wide8.h ---------------------------------------------------- */
/* One register: sums of products are kept as two, and 32 have to hold those of eight rows. */
#define MKVQ_LANES 4
#define MKVQ_PAIR_ROWS 5
#define MKVQ_PAIR_ROWS_3 4 /* with third bits */

typedef float32x4_t wf;
typedef uint32x4_t wi;
typedef struct {
    int32x4_t first, second; /* of lanes 0, 0, 1, 1 and 2, 2, 3, 3 */
} ws;

static inline wi wi_load(const uint32_t *p, int lanes)
{
    (void)lanes;
    return vld1q_u32(p);
}

static inline wi wi_set1(uint32_t x)
{
    return vdupq_n_u32(x);
}

static inline wi wi_or(wi a, wi b)
{
    return vorrq_u32(a, b);
}

static inline wi wi_and1(wi a, uint32_t mask)
{
    return vandq_u32(a, vdupq_n_u32(mask));
}

static inline wi wi_shl(wi a, int count)
{
    return a << (uint32_t)count;
}

static inline wi wi_shr(wi a, int count)
{
    return a >> (uint32_t)count;
}

static inline ws ws_zero(void)
{
    return (ws){vdupq_n_s32(0), vdupq_n_s32(0)};
}

static inline ws ws_dot16(ws sum, wi codes, wi operands)
{
    const int16x8_t a = vreinterpretq_s16_u32(codes), b = vreinterpretq_s16_u32(operands);
    return (ws){vmlal_s16(sum.first, vget_low_s16(a), vget_low_s16(b)),
                vmlal_high_s16(sum.second, a, b)};
}

static inline wi ws_total(ws sum)
{
    return vreinterpretq_u32_s32(vpaddq_s32(sum.first, sum.second));
}

#ifndef MKVQ_SPLIT16
static inline ws ws_dot8(ws sum, wi codes, wi operands)
{
    const int8x16_t a = vreinterpretq_s8_u32(codes), b = vreinterpretq_s8_u32(operands);
    return (ws){vpadalq_s16(sum.first, vmull_s8(vget_low_s8(a), vget_low_s8(b))),
                vpadalq_s16(sum.second, vmull_high_s8(a, b))};
}

static inline wi ws_total8(ws sum)
{
    return ws_total(sum);
}
#endif

static inline wf wf_from_wi(wi a)
{
    return vcvtq_f32_s32(vreinterpretq_s32_u32(a));
}

static inline wf wf_set1(float x)
{
    return vdupq_n_f32(x);
}

static inline wf wf_load(const float *p, int lanes)
{
    (void)lanes;
    return vld1q_f32(p);
}

static inline void wf_store(float *p, wf x, int lanes)
{
    (void)lanes;
    vst1q_f32(p, x);
}

static inline wf wf_add(wf a, wf b)
{
    return vaddq_f32(a, b);
}

static inline wf wf_fma(wf a, wf b, wf c)
{
    return vfmaq_f32(c, a, b);
}

static inline wf wf_fma_sum(wf a, wf b, wf sum)
{
    return vfmaq_f32(sum, a, b);
}
#endif
