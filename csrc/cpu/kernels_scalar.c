/* kernels_scalar.c - the scalar kernels; the file name picks the compiler flags. */
#include "vec_scalar.h"

#include "kernels.inl.h"
