/* vec_wide8.h - the wide vocabulary, in which codes are multiplied, where a vector has eight lanes:
 * names for the eight-lane vocabulary.
 *
 * wi and wf are vectors of MKVQ_LANES integers or floats, ws sums of products of 16-bit halves or of
 * bytes, which need not lie in the order of lanes until ws_total or ws_total8. Loads and stores take the number of
 * lanes that count, a multiple of eight or MKVQ_LANES; here it is always eight. */
#ifndef MKVQ_VEC_WIDE8_H
#define MKVQ_VEC_WIDE8_H

#define MKVQ_LANES 8
/* Up to this many query rows two vectors of codes share an operand: as the registers allow. */
#define MKVQ_PAIR_ROWS 4
#define MKVQ_PAIR_ROWS_3 3 /* with third bits */

typedef vf wf;
typedef vi wi;
typedef vi ws;

static inline wi wi_load(const uint32_t *p, int lanes)
{
    (void)lanes;
    return vi_load(p);
}

static inline wi wi_set1(uint32_t x)
{
    return vi_set1(x);
}

static inline wi wi_or(wi a, wi b)
{
    return vi_or(a, b);
}

static inline wi wi_and1(wi a, uint32_t mask)
{
    return vi_and1(a, mask);
}

static inline wi wi_shl(wi a, int count)
{
    return vi_shl(a, count);
}

static inline wi wi_shr(wi a, int count)
{
    return vi_shr(a, count);
}

static inline ws ws_zero(void)
{
    return vi_set1(0);
}

static inline ws ws_dot16(ws sum, wi codes, wi operands)
{
    return vi_dot16(sum, codes, operands);
}

static inline wi ws_total(ws sum)
{
    return sum;
}

static inline ws ws_dot8(ws sum, wi codes, wi operands)
{
    return vi_dot8(sum, codes, operands);
}

static inline wi ws_total8(ws sum)
{
    return vi_dot8_total(sum);
}

static inline wf wf_from_wi(wi a)
{
    return vf_from_vi(a);
}

static inline wf wf_set1(float x)
{
    return vf_set1(x);
}

static inline wf wf_load(const float *p, int lanes)
{
    (void)lanes;
    return vf_load(p);
}

static inline void wf_store(float *p, wf x, int lanes)
{
    (void)lanes;
    vf_store(p, x);
}

static inline wf wf_add(wf a, wf b)
{
    return vf_add(a, b);
}

static inline wf wf_fma(wf a, wf b, wf c)
{
    return vf_fma(a, b, c);
}

/* fma into a sum that the compiler must keep where it is, in a register */
static inline wf wf_fma_sum(wf a, wf b, wf sum)
{
    return vf_fma_sum(a, b, sum);
}
#endif
