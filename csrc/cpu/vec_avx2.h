/* vec_avx2.h - the vector vocabulary of vec_scalar.h for AVX2 + FMA + F16C. Same names, same
 * results; only vf_fma rounds once. vec_avx512.h builds on it. */
#ifndef MKVQ_VEC_H
#define MKVQ_VEC_H
#include "../numeric.h"
#include <immintrin.h>
#include <math.h>

#ifndef MKVQ_ISA_TABLE
#define MKVQ_ISA_NAME "avx2"
#define MKVQ_ISA_TABLE mkvq_kernels_avx2
#endif

/* a vector operation costs what one of its lanes would */
#define MKVQ_WIDE 1

/* accumulators stay in registers only where loops over them are unrolled */
#define MKVQ_PRAGMA(text) _Pragma(#text)
#define MKVQ_UNROLL(n) MKVQ_PRAGMA(GCC unroll n)

typedef __m256 vf;
typedef __m256i vi;

static inline vf vf_set1(float x)
{
    return _mm256_set1_ps(x);
}

static inline vf vf_load(const float *p)
{
    return _mm256_loadu_ps(p);
}

static inline void vf_store(float *p, vf x)
{
    _mm256_storeu_ps(p, x);
}

static inline vf vf_load_f16(const uint16_t *p)
{
    return _mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)p));
}

static inline vf vf_load_bf16(const uint16_t *p)
{
    return _mm256_castsi256_ps(
        _mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i *)p)), 16));
}

static inline vf vf_add(vf a, vf b)
{
    return _mm256_add_ps(a, b);
}

static inline vf vf_sub(vf a, vf b)
{
    return _mm256_sub_ps(a, b);
}

static inline vf vf_mul(vf a, vf b)
{
    return _mm256_mul_ps(a, b);
}

static inline vf vf_div(vf a, vf b)
{
    return _mm256_div_ps(a, b);
}

static inline vf vf_max(vf a, vf b)
{
    return _mm256_max_ps(a, b);
}

static inline vf vf_min(vf a, vf b)
{
    return _mm256_min_ps(a, b);
}

static inline vf vf_fma(vf a, vf b, vf c)
{
    return _mm256_fmadd_ps(a, b, c);
}

static inline vf vf_fma_sum(vf a, vf b, vf sum)
{
    sum = _mm256_fmadd_ps(a, b, sum);
    __asm__("" : "+x"(sum));
    return sum;
}

static inline vf vf_round(vf x)
{
    return _mm256_round_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
}

static inline vf vf_abs(vf x)
{
    return _mm256_andnot_ps(_mm256_set1_ps(-0.0f), x);
}

/* Floats > 0 order like their bits, a negative one is a negative integer: integer minima and maxima
 * leave the float adders to the rest of a loop. */
static inline vf vf_clamp(vf x, float low, float high)
{
    const __m256i a = _mm256_castps_si256(_mm256_set1_ps(low)),
                  b = _mm256_castps_si256(_mm256_set1_ps(high));
    return _mm256_castsi256_ps(_mm256_min_epi32(_mm256_max_epi32(_mm256_castps_si256(x), a), b));
}

static inline unsigned vf_less(vf a, vf b)
{
    return (unsigned)_mm256_movemask_ps(_mm256_cmp_ps(a, b, _CMP_LT_OQ));
}

static inline unsigned vf_equal(vf a, vf b)
{
    return (unsigned)_mm256_movemask_ps(_mm256_cmp_ps(a, b, _CMP_EQ_OQ));
}

static inline vf vf_hide_below(vf p, vf x, float limit)
{
    return _mm256_blendv_ps(p, _mm256_set1_ps(-INFINITY),
                            _mm256_cmp_ps(x, _mm256_set1_ps(limit), _CMP_LT_OQ));
}

static inline vf vf_zero_below(vf p, vf x, float limit)
{
    return _mm256_andnot_ps(_mm256_cmp_ps(x, _mm256_set1_ps(limit), _CMP_LT_OQ), p);
}

static inline float vf_sum(vf x)
{
    __m128 a =
        _mm_add_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps(x, 1)); /* 0+4 1+5 2+6 3+7 */
    a = _mm_add_ps(a, _mm_movehl_ps(a, a));                                 /* even sum, odd sum */
    return _mm_cvtss_f32(_mm_add_ss(a, _mm_shuffle_ps(a, a, 1)));
}

static inline float vf_hmax(vf x)
{
    __m128 a = _mm_max_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps(x, 1));
    a = _mm_max_ps(a, _mm_movehl_ps(a, a));
    return _mm_cvtss_f32(_mm_max_ss(a, _mm_shuffle_ps(a, a, 1)));
}

static inline float vf_hmin(vf x)
{
    __m128 a = _mm_min_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps(x, 1));
    a = _mm_min_ps(a, _mm_movehl_ps(a, a));
    return _mm_cvtss_f32(_mm_min_ss(a, _mm_shuffle_ps(a, a, 1)));
}

static inline int vf_finite(vf x)
{
    const __m256i a = _mm256_and_si256(_mm256_castps_si256(x), _mm256_set1_epi32(0x7fffffff));
    return _mm256_testz_si256(_mm256_cmpgt_epi32(a, _mm256_set1_epi32(0x7f7fffff)),
                              _mm256_set1_epi32(-1));
}

static inline vi vi_load(const uint32_t *p)
{
    return _mm256_loadu_si256((const __m256i *)p);
}

static inline vi vi_set1(uint32_t x)
{
    return _mm256_set1_epi32((int32_t)x);
}

static inline void vi_store(uint32_t *p, vi x)
{
    _mm256_storeu_si256((__m256i *)p, x);
}

static inline vi vi_or(vi a, vi b)
{
    return _mm256_or_si256(a, b);
}

static inline vi vi_and1(vi a, uint32_t mask)
{
    return _mm256_and_si256(a, _mm256_set1_epi32((int32_t)mask));
}

static inline vi vi_add(vi a, vi b)
{
    return _mm256_add_epi32(a, b);
}

static inline vi vi_bits(vf x)
{
    return _mm256_castps_si256(x);
}

static inline vf vf_of_bits(vi x)
{
    return _mm256_castsi256_ps(x);
}

static inline vi vi_shl(vi a, int count)
{
    return _mm256_sll_epi32(a, _mm_cvtsi32_si128(count));
}

static inline vi vi_shr(vi a, int count)
{
    return __builtin_constant_p(count) ? _mm256_srli_epi32(a, count)
                                       : _mm256_srl_epi32(a, _mm_cvtsi32_si128(count));
}

static inline vi vi_from_vf(vf x)
{
    return _mm256_cvtps_epi32(x);
}

static inline vf vf_from_vi(vi x)
{
    return _mm256_cvtepi32_ps(x);
}

static inline vi vi_load_u8(const uint8_t *p)
{
    return _mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i *)p));
}

static inline vi vi_load_i8(const uint8_t *p)
{
    return _mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i *)p));
}

static inline vi vi_pair16(vi low, vi high)
{
    return _mm256_blend_epi16(low, _mm256_slli_epi32(high, 16), 0xaa);
}

/* The empty statement keeps gcc from summing up in trees, which need more registers than there
 * are. */
static inline vi vi_dot16(vi sum, vi a, vi b)
{
    sum = _mm256_add_epi32(sum, _mm256_madd_epi16(a, b));
    __asm__("" : "+x"(sum));
    return sum;
}

/* 16-bit sums: 40 steps of two products of at most 3 * 127 fit */
static inline vi vi_dot8(vi sum, vi a, vi b)
{
    sum = _mm256_add_epi16(sum, _mm256_maddubs_epi16(a, b));
    __asm__("" : "+x"(sum));
    return sum;
}

static inline vi vi_dot8_total(vi sum)
{
    return _mm256_madd_epi16(sum, _mm256_set1_epi16(1));
}

static inline vf vf_pow2(vf n)
{
    return _mm256_castsi256_ps(
        _mm256_slli_epi32(_mm256_add_epi32(_mm256_cvtps_epi32(n), _mm256_set1_epi32(127)), 23));
}

static inline void vf_transpose(vf r[8])
{
    const vf a0 = _mm256_unpacklo_ps(r[0], r[1]), a1 = _mm256_unpackhi_ps(r[0], r[1]);
    const vf a2 = _mm256_unpacklo_ps(r[2], r[3]), a3 = _mm256_unpackhi_ps(r[2], r[3]);
    const vf a4 = _mm256_unpacklo_ps(r[4], r[5]), a5 = _mm256_unpackhi_ps(r[4], r[5]);
    const vf a6 = _mm256_unpacklo_ps(r[6], r[7]), a7 = _mm256_unpackhi_ps(r[6], r[7]);
    const vf b0 = _mm256_shuffle_ps(a0, a2, 0x44), b1 = _mm256_shuffle_ps(a0, a2, 0xee);
    const vf b2 = _mm256_shuffle_ps(a1, a3, 0x44), b3 = _mm256_shuffle_ps(a1, a3, 0xee);
    const vf b4 = _mm256_shuffle_ps(a4, a6, 0x44), b5 = _mm256_shuffle_ps(a4, a6, 0xee);
    const vf b6 = _mm256_shuffle_ps(a5, a7, 0x44), b7 = _mm256_shuffle_ps(a5, a7, 0xee);
    r[0] = _mm256_permute2f128_ps(b0, b4, 0x20), r[4] = _mm256_permute2f128_ps(b0, b4, 0x31);
    r[1] = _mm256_permute2f128_ps(b1, b5, 0x20), r[5] = _mm256_permute2f128_ps(b1, b5, 0x31);
    r[2] = _mm256_permute2f128_ps(b2, b6, 0x20), r[6] = _mm256_permute2f128_ps(b2, b6, 0x31);
    r[3] = _mm256_permute2f128_ps(b3, b7, 0x20), r[7] = _mm256_permute2f128_ps(b3, b7, 0x31);
}

static inline vf vf_butterfly(vf x, int stride)
{
    const vf y = stride == 1   ? _mm256_permute_ps(x, 0xb1)
                 : stride == 2 ? _mm256_permute_ps(x, 0x4e)
                               : _mm256_permute2f128_ps(x, x, 1);
    const vf sum = _mm256_add_ps(x, y), difference = _mm256_sub_ps(y, x);
    return stride == 1   ? _mm256_blend_ps(sum, difference, 0xaa)
           : stride == 2 ? _mm256_blend_ps(sum, difference, 0xcc)
                         : _mm256_blend_ps(sum, difference, 0xf0);
}

/* eight doubles */
typedef struct {
    __m256d lo, hi;
} vd;

static inline vd vd_load(const double *p)
{
    return (vd){_mm256_loadu_pd(p), _mm256_loadu_pd(p + 4)};
}

static inline void vd_store(double *p, vd x)
{
    _mm256_storeu_pd(p, x.lo), _mm256_storeu_pd(p + 4, x.hi);
}

/* The square of a float is exact in double: fused or not, the sum is rounded once. */
static inline vd vd_add_power(vd sum, vf x, int power)
{
    const __m256d lo = _mm256_cvtps_pd(_mm256_castps256_ps128(x)),
                  hi = _mm256_cvtps_pd(_mm256_extractf128_ps(x, 1)), sign = _mm256_set1_pd(-0.0);
    if (power == 2)
        return (vd){_mm256_fmadd_pd(lo, lo, sum.lo), _mm256_fmadd_pd(hi, hi, sum.hi)};
    return (vd){_mm256_add_pd(sum.lo, _mm256_andnot_pd(sign, lo)),
                _mm256_add_pd(sum.hi, _mm256_andnot_pd(sign, hi))};
}

#ifndef MKVQ_LANES
#include "vec_wide8.h"
#endif
#endif
