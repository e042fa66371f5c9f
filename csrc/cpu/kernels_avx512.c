/* kernels_avx512.c - the AVX-512 kernels; the file name picks the compiler flags. */
#include "vec_avx512.h"

#include "kernels.inl.h"
