// octet.h - the vector vocabulary of cpu/vec_scalar.h on a GPU: the eight lanes of a vector are eight
// neighbouring threads, four vectors to a warp. Of an array a thread touches only the elements that
// are its lane's, so that what it stores and loads needs no barrier.
//
// What is coded from it is the text that the CPU core runs: cpu/group.inl.h, hadamard.inl.h,
// measure.inl.h.
#ifndef MKVQ_OCTET_H
#define MKVQ_OCTET_H
#include "device.h"

#include "../core.h"
#include <math.h>

#define MKVQ_LEADS ((thread_index() & 7) == 0)

typedef float vf; // one lane

MKVQ_DEVICE uint32_t octet_mask()
{
    return 0xffu << (thread_index() & 24);
}
MKVQ_DEVICE vf vf_set1(float x)
{
    return x;
}
MKVQ_DEVICE vf vf_load(const float *p)
{
    return p[thread_index() & 7];
}
MKVQ_DEVICE void vf_store(float *p, vf x)
{
    p[thread_index() & 7] = x;
}
MKVQ_DEVICE vf vf_add(vf a, vf b)
{
    return a + b;
}
MKVQ_DEVICE vf vf_sub(vf a, vf b)
{
    return a - b;
}
MKVQ_DEVICE vf vf_mul(vf a, vf b)
{
    return a * b;
}
MKVQ_DEVICE vf vf_div(vf a, vf b)
{
    return a / b;
}
// x / scale, rounded once, for scales that records can hold (of 11 bits at most) and quotients that are
// not so small that they are code 0 anyway: the division of the scale is left out of loops, and what
// remains has no case that needs a function. tests/test_cuda_quotient.py tries all of them.
MKVQ_DEVICE vf vf_quotient(vf x, float scale)
{
    const float inverse = 1.0f / scale, q = x * inverse;
    return fmaf(fmaf(-q, scale, x), inverse, q);
}
MKVQ_DEVICE vf vf_max(vf a, vf b)
{
    return a > b ? a : b;
}
MKVQ_DEVICE vf vf_min(vf a, vf b)
{
    return a < b ? a : b;
}
MKVQ_DEVICE vf vf_round(vf x)
{
    return mkvq_round(x);
}
// ((0+4)+(2+6)) + ((1+5)+(3+7)), in all lanes: a + b is b + a.
MKVQ_DEVICE float vf_sum(vf x)
{
    for (int flip = 4; flip; flip /= 2)
        x += shuffle_xor(octet_mask(), x, flip);
    return x;
}
MKVQ_DEVICE float vf_hmax(vf x)
{
    for (int flip = 4; flip; flip /= 2)
        x = vf_max(x, shuffle_xor(octet_mask(), x, flip));
    return x;
}
MKVQ_DEVICE float vf_hmin(vf x)
{
    for (int flip = 4; flip; flip /= 2)
        x = vf_min(x, shuffle_xor(octet_mask(), x, flip));
    return x;
}
MKVQ_DEVICE vf vf_butterfly(vf x, int stride)
{
    const float other = shuffle_xor(octet_mask(), x, stride);
    return thread_index() & stride ? other - x : x + other;
}

// How far rows of n elements are apart in shared memory, so that rows that the octets of a warp read at
// the same time lie in different banks.
MKVQ_FN int octet_pitch(int n)
{
    return n % 16 == 0 ? n + 8 : n;
}
#endif
