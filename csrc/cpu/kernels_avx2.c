/* kernels_avx2.c - the avx2 kernels; the file name picks the compiler flags. */
#include "vec_avx2.h"

#include "kernels.inl.h"
