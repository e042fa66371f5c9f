/* kernels_neon.c - the NEON kernels; every 64-bit ARM processor runs them. */
#include "vec_neon.h"

#include "kernels.inl.h"
