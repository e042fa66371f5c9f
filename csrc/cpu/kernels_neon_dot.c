/* kernels_neon_dot.c - the NEON kernels with dot products of bytes; the file name picks the
 * compiler flags. */
#include "vec_neon_dot.h"

#include "kernels.inl.h"
