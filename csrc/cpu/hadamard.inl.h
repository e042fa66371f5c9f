/* hadamard.inl.h - the orthonormal Sylvester-Hadamard transform of docs/format.md section 4, in
 * place.
 *
 * n = m * 2^p channels (n a multiple of 8, so 2^p >= 8): strides 1, 2, 4 inside a vector, the
 * others between vectors. n log n additions. */
static void hadamard(float *x, int n)
{
    static const float scale[] = {0x1.6a09e6p-2f, 0.25f,  0x1.6a09e6p-3f, 0.125f,
                                  0x1.6a09e6p-4f, 0.0625f}; /* 2^(-p/2), p = 3 ... 8 */
    const int run = n & -n;
    for (int c = 0; c < n; c += 8) {
        vf y = vf_load(x + c);
        for (int stride = 1; stride < 8; stride *= 2)
            y = vf_butterfly(y, stride);
        vf_store(x + c, y);
    }
    for (int stride = 8; stride < run; stride *= 2)
        for (int c = 0; c < n; c += 8) {
            if (c & stride)
                continue;
            const vf a = vf_load(x + c), b = vf_load(x + c + stride);
            vf_store(x + c, vf_add(a, b));
            vf_store(x + c + stride, vf_sub(a, b));
        }
    const vf s = vf_set1(scale[__builtin_ctz((unsigned)run) - 3]);
    for (int c = 0; c < n; c += 8)
        vf_store(x + c, vf_mul(vf_load(x + c), s));
}
