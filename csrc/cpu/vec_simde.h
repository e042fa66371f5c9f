/* vec_simde.h - AVX-512 without a CPU that has it: SIMDe's functions under Intel's names, and the
 * few that SIMDe 0.7 lacks. A build for tests (MIXKVQ_SIMDE=1), which runs on any AVX2 machine. */
#ifndef MKVQ_VEC_SIMDE_H
#define MKVQ_VEC_SIMDE_H
#define SIMDE_ENABLE_NATIVE_ALIASES
#include <simde/x86/avx512.h>
#include <stdint.h>
#include <string.h>

#define MKVQ_ISA_NAME "avx512-simde"

static inline __m512 simde_convert_int32(__m512i a)
{
    int32_t from[16];
    float to[16];
    memcpy(from, &a, sizeof from);
    for (int i = 0; i < 16; i++)
        to[i] = (float)from[i];
    return simde_mm512_loadu_ps(to);
}

/* Reads and writes nothing but the lanes of the mask. */
static inline __m512i simde_load_lanes(__mmask16 mask, const void *p)
{
    uint32_t to[16] = {0};
    for (int i = 0; i < 16; i++)
        if (mask >> i & 1)
            memcpy(&to[i], (const char *)p + 4 * i, 4);
    return simde_mm512_loadu_si512(to);
}

static inline void simde_store_lanes(float *p, __mmask16 mask, __m512 x)
{
    float from[16];
    memcpy(from, &x, sizeof from);
    for (int i = 0; i < 16; i++)
        if (mask >> i & 1)
            p[i] = from[i];
}

#define _mm512_cvtepi32_ps simde_convert_int32
#define _mm512_maskz_loadu_epi32 simde_load_lanes
#define _mm512_maskz_loadu_ps(mask, p) simde_mm512_castsi512_ps(simde_load_lanes(mask, p))
#define _mm512_mask_storeu_ps simde_store_lanes
#endif
