/* vec_avx512.h - the vector vocabulary for AVX-512 (F, BW, DQ, VL, VNNI).
 *
 * The eight lanes are those of vec_avx2.h, compiled for 32 registers: sums of the codec are defined
 * over eight lanes. The wide vocabulary (vec_wide8.h documents it) has sixteen; what is left of a
 * row is loaded and stored under a mask. */
#ifndef MKVQ_VEC_AVX512_H
#define MKVQ_VEC_AVX512_H
#ifdef MKVQ_SIMDE
#include "vec_simde.h"
#else
#define MKVQ_ISA_NAME "avx512"
#endif
#define MKVQ_ISA_TABLE mkvq_kernels_avx512

#define MKVQ_LANES 16
#define MKVQ_PAIR_ROWS 8
#define MKVQ_PAIR_ROWS_3 8 /* with third bits */
#include "vec_avx2.h"

typedef __m512 wf;
typedef __m512i wi;
typedef __m512i ws;

static inline __mmask16 first_lanes(int lanes)
{
    return (__mmask16)((1u << lanes) - 1);
}

static inline wi wi_load(const uint32_t *p, int lanes)
{
    return lanes == MKVQ_LANES ? _mm512_loadu_si512(p)
                               : _mm512_maskz_loadu_epi32(first_lanes(lanes), p);
}

static inline wi wi_set1(uint32_t x)
{
    return _mm512_set1_epi32((int32_t)x);
}

static inline wi wi_or(wi a, wi b)
{
    return _mm512_or_si512(a, b);
}

static inline wi wi_and1(wi a, uint32_t mask)
{
    return _mm512_and_si512(a, _mm512_set1_epi32((int32_t)mask));
}

static inline wi wi_shl(wi a, int count)
{
    return _mm512_sll_epi32(a, _mm_cvtsi32_si128(count));
}

static inline wi wi_shr(wi a, int count)
{
    return __builtin_constant_p(count) ? _mm512_srli_epi32(a, (unsigned)count)
                                       : _mm512_srl_epi32(a, _mm_cvtsi32_si128(count));
}

static inline ws ws_zero(void)
{
    return _mm512_setzero_si512();
}

static inline ws ws_dot16(ws sum, wi a, wi b)
{
    return _mm512_dpwssd_epi32(sum, a, b);
}

static inline wi ws_total(ws sum)
{
    return sum;
}

static inline ws ws_dot8(ws sum, wi a, wi b)
{
    return _mm512_dpbusd_epi32(sum, a, b);
}

static inline wi ws_total8(ws sum)
{
    return sum;
}

static inline wf wf_from_wi(wi a)
{
    return _mm512_cvtepi32_ps(a);
}

static inline wf wf_set1(float x)
{
    return _mm512_set1_ps(x);
}

static inline wf wf_load(const float *p, int lanes)
{
    return lanes == MKVQ_LANES ? _mm512_loadu_ps(p) : _mm512_maskz_loadu_ps(first_lanes(lanes), p);
}

static inline void wf_store(float *p, wf x, int lanes)
{
    if (lanes == MKVQ_LANES)
        _mm512_storeu_ps(p, x);
    else
        _mm512_mask_storeu_ps(p, first_lanes(lanes), x);
}

static inline wf wf_add(wf a, wf b)
{
    return _mm512_add_ps(a, b);
}

static inline wf wf_fma(wf a, wf b, wf c)
{
    return _mm512_fmadd_ps(a, b, c);
}

static inline wf wf_fma_sum(wf a, wf b, wf sum)
{
    return _mm512_fmadd_ps(a, b, sum);
}
#endif
