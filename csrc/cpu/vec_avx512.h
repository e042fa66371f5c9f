/* vec_avx512.h - the vector vocabulary of vec_scalar.h for AVX-512 (F, BW, VL, DQ, VNNI).
 *
 * The eight lanes are those of vec_avx2.h, compiled with 32 registers: the codec's sums are defined
 * over eight lanes, wider ones would only add shuffles. Mask registers replace what AVX2 does by
 * blending with a constant. */
#ifndef MKVQ_VEC_AVX512_H
#define MKVQ_VEC_AVX512_H
#define MKVQ_ISA_NAME "avx512"
#define MKVQ_ISA_TABLE mkvq_kernels_avx512
#include "vec_avx2.h"
#endif
