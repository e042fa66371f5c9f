/* vec_scalar.h - the vector vocabulary in plain C: eight lanes, the yardstick for every
 * instruction set.
 *
 * vf: eight floats, vi: eight 32-bit integers. max/min return their second operand when a
 * comparison is false (as AVX does), so NaN in the second operand survives. vf_fma may round
 * once or twice: the codec uses it only where that makes no difference. */
#ifndef MKVQ_VEC_H
#define MKVQ_VEC_H
#include "../numeric.h"
#include <math.h>

#define MKVQ_ISA_NAME "scalar"
#define MKVQ_ISA_TABLE mkvq_kernels_scalar

/* lanes are loops: no way round that needs more operations pays */
#define MKVQ_WIDE 0

/* unrolling plain loops over lanes only costs compile time */
#define MKVQ_UNROLL(n)

typedef struct {
    float lane[8];
} vf;
typedef struct {
    uint32_t lane[8];
} vi;

#define LANES(i) for (int i = 0; i < 8; i++)

static inline vf vf_set1(float x)
{
    vf r;
    LANES(i) r.lane[i] = x;
    return r;
}

static inline vf vf_load(const float *p)
{
    vf r;
    memcpy(&r, p, sizeof r);
    return r;
}

static inline void vf_store(float *p, vf x)
{
    memcpy(p, &x, sizeof x);
}

static inline vf vf_load_f16(const uint16_t *p)
{
    vf r;
    LANES(i) r.lane[i] = mkvq_f16_to_f32(p[i]);
    return r;
}

static inline vf vf_load_bf16(const uint16_t *p)
{
    vf r;
    LANES(i) r.lane[i] = mkvq_bf16_to_f32(p[i]);
    return r;
}

#define MKVQ_VF_BINARY(name, expression) \
    static inline vf name(vf a, vf b) \
    { \
        vf r; \
        LANES(i) \
        { \
            const float x = a.lane[i], y = b.lane[i]; \
            r.lane[i] = expression; \
        } \
        return r; \
    }
MKVQ_VF_BINARY(vf_add, x + y)
MKVQ_VF_BINARY(vf_sub, x - y)
MKVQ_VF_BINARY(vf_mul, x *y)
MKVQ_VF_BINARY(vf_div, x / y)
MKVQ_VF_BINARY(vf_max, x > y ? x : y)
MKVQ_VF_BINARY(vf_min, x < y ? x : y)

static inline vf vf_fma(vf a, vf b, vf c)
{
    vf r;
    LANES(i) r.lane[i] = a.lane[i] * b.lane[i] + c.lane[i];
    return r;
}

/* fma for sums of many terms */
static inline vf vf_fma_sum(vf a, vf b, vf sum)
{
    return vf_fma(a, b, sum);
}

/* Nearest integers, ties to even, of |x| < 2^22. */
static inline vf vf_round(vf x)
{
    vf r;
    LANES(i) r.lane[i] = mkvq_round(x.lane[i]);
    return r;
}

static inline vf vf_abs(vf x)
{
    LANES(i) x.lane[i] = fabsf(x.lane[i]);
    return x;
}

/* low ... high of x; 0 < low */
static inline vf vf_clamp(vf x, float low, float high)
{
    return vf_min(vf_max(x, vf_set1(low)), vf_set1(high));
}

/* bit i: lane i of a is less than that of b, neither NaN */
static inline unsigned vf_less(vf a, vf b)
{
    unsigned mask = 0;
    LANES(i) mask |= (unsigned)(a.lane[i] < b.lane[i]) << i;
    return mask;
}

/* bit i: lanes i are equal */
static inline unsigned vf_equal(vf a, vf b)
{
    unsigned mask = 0;
    LANES(i) mask |= (unsigned)(a.lane[i] == b.lane[i]) << i;
    return mask;
}

/* p where x >= limit or x is NaN, else -infinity */
static inline vf vf_hide_below(vf p, vf x, float limit)
{
    LANES(i) p.lane[i] = x.lane[i] < limit ? -INFINITY : p.lane[i];
    return p;
}

/* p where x >= limit or x is NaN, else 0 */
static inline vf vf_zero_below(vf p, vf x, float limit)
{
    vf r;
    LANES(i) r.lane[i] = x.lane[i] < limit ? 0.0f : p.lane[i];
    return r;
}

/* The sum of docs/format.md section 4: ((0+4)+(2+6)) + ((1+5)+(3+7)). */
static inline float vf_sum(vf x)
{
    const float *s = x.lane;
    return ((s[0] + s[4]) + (s[2] + s[6])) + ((s[1] + s[5]) + (s[3] + s[7]));
}

static inline float vf_hmax(vf x)
{
    float m = x.lane[0];
    LANES(i) m = x.lane[i] > m ? x.lane[i] : m;
    return m;
}

static inline float vf_hmin(vf x)
{
    float m = x.lane[0];
    LANES(i) m = x.lane[i] < m ? x.lane[i] : m;
    return m;
}

/* 1 if no lane is infinite or NaN */
static inline int vf_finite(vf x)
{
    int ok = 1;
    LANES(i) ok &= (mkvq_bits(x.lane[i]) & 0x7fffffffu) < 0x7f800000u;
    return ok;
}

static inline vi vi_load(const uint32_t *p)
{
    vi r;
    memcpy(&r, p, sizeof r);
    return r;
}

static inline vi vi_set1(uint32_t x)
{
    vi r;
    LANES(i) r.lane[i] = x;
    return r;
}

static inline void vi_store(uint32_t *p, vi x)
{
    memcpy(p, &x, sizeof x);
}

static inline vi vi_or(vi a, vi b)
{
    LANES(i) a.lane[i] |= b.lane[i];
    return a;
}

static inline vi vi_and1(vi a, uint32_t mask)
{
    LANES(i) a.lane[i] &= mask;
    return a;
}

static inline vi vi_add(vi a, vi b)
{
    LANES(i) a.lane[i] += b.lane[i];
    return a;
}

/* the same 32 bits */
static inline vi vi_bits(vf x)
{
    vi r;
    memcpy(&r, &x, sizeof r);
    return r;
}

static inline vf vf_of_bits(vi x)
{
    vf r;
    memcpy(&r, &x, sizeof r);
    return r;
}

static inline vi vi_shl(vi a, int count)
{
    LANES(i) a.lane[i] <<= count;
    return a;
}

static inline vi vi_shr(vi a, int count)
{
    LANES(i) a.lane[i] >>= count;
    return a;
}

/* integers of whole, non-negative floats, and back */
static inline vi vi_from_vf(vf x)
{
    vi r;
    LANES(i) r.lane[i] = (uint32_t)(int32_t)x.lane[i];
    return r;
}

static inline vf vf_from_vi(vi x)
{
    vf r;
    LANES(i) r.lane[i] = (float)(int32_t)x.lane[i];
    return r;
}

/* eight bytes, eight signed bytes */
static inline vi vi_load_u8(const uint8_t *p)
{
    vi r;
    LANES(i) r.lane[i] = p[i];
    return r;
}

static inline vi vi_load_i8(const uint8_t *p)
{
    vi r;
    LANES(i) r.lane[i] = (uint32_t)(int8_t)p[i];
    return r;
}

/* lower half of low, lower half of high above it */
static inline vi vi_pair16(vi low, vi high)
{
    LANES(i) low.lane[i] = (low.lane[i] & 0xffff) | high.lane[i] << 16;
    return low;
}

/* sum + a.low * b.low + a.high * b.high of signed 16-bit halves, for dot products of many terms */
static inline vi vi_dot16(vi sum, vi a, vi b)
{
    LANES(i)
    sum.lane[i] += (uint32_t)((int16_t)a.lane[i] * (int16_t)b.lane[i] +
                              (int16_t)(a.lane[i] >> 16) * (int16_t)(b.lane[i] >> 16));
    return sum;
}

/* For sums of products of bytes 0 ... 3 of a with signed bytes of b: vi_dot8_total turns the sum of up
 * to 40 steps, of four products each, into an integer. */
static inline vi vi_dot8(vi sum, vi a, vi b)
{
    LANES(i)
    for (int k = 0; k < 32; k += 8)
        sum.lane[i] += (uint32_t)((int)(a.lane[i] >> k & 255) * (int8_t)(b.lane[i] >> k));
    return sum;
}

static inline vi vi_dot8_total(vi sum)
{
    return sum;
}

/* 2^n of whole floats -126 <= n <= 127; anything of NaN */
static inline vf vf_pow2(vf n)
{
    vf r;
    LANES(i) r.lane[i] = mkvq_float((mkvq_bits(n.lane[i] + 12582912.0f) + 127) << 23);
    return r;
}

/* r[i] lane j <-> r[j] lane i */
static inline void vf_transpose(vf r[8])
{
    for (int i = 0; i < 8; i++)
        for (int j = 0; j < i; j++) {
            const float x = r[i].lane[j];
            r[i].lane[j] = r[j].lane[i];
            r[j].lane[i] = x;
        }
}

/* butterflies inside a vector with stride 1, 2 or 4: lane i (bit `stride` clear) gets x_i + x_j,
 * lane j = i + stride gets x_i - x_j */
static inline vf vf_butterfly(vf x, int stride)
{
    vf r;
    LANES(i)
    r.lane[i] = i & stride ? x.lane[i - stride] - x.lane[i] : x.lane[i] + x.lane[i + stride];
    return r;
}

/* eight doubles */
typedef struct {
    double lane[8];
} vd;

static inline vd vd_load(const double *p)
{
    vd r;
    memcpy(&r, p, sizeof r);
    return r;
}

static inline void vd_store(double *p, vd x)
{
    memcpy(p, &x, sizeof x);
}

/* sum + |x|^power, the square exact */
static inline vd vd_add_power(vd sum, vf x, int power)
{
    LANES(i)
    {
        const double a = x.lane[i];
        sum.lane[i] += power == 2 ? a * a : fabs(a);
    }
    return sum;
}

#include "vec_wide8.h"
#endif
