/* hadamard.inl.h - the orthonormal Sylvester-Hadamard transform of docs/format.md section 4, in
 * place.
 *
 * n = m * 2^p channels (n a multiple of 8, so 2^p >= 8): strides 1, 2, 4 inside a vector, the
 * others between vectors. n log n additions. The strides below 64 are done on eight vectors at a time,
 * which stay in registers. */

/* Strides from 1 to 4 * vectors, of 8 * vectors channels. */
MKVQ_BODY MKVQ_INLINE void transform_part(float *x, const int vectors)
{
    vf y[8];
    MKVQ_UNROLL(8)
    for (int i = 0; i < vectors; i++) {
        y[i] = vf_load(x + 8 * i);
        MKVQ_UNROLL(3)
        for (int stride = 1; stride < 8; stride *= 2)
            y[i] = vf_butterfly(y[i], stride);
    }
    MKVQ_UNROLL(3)
    for (int stride = 1; stride < vectors; stride *= 2) {
        MKVQ_UNROLL(8)
        for (int i = 0; i < vectors; i++) {
            if (i & stride)
                continue;
            const vf a = y[i], b = y[i + stride];
            y[i] = vf_add(a, b), y[i + stride] = vf_sub(a, b);
        }
    }
    MKVQ_UNROLL(8)
    for (int i = 0; i < vectors; i++)
        vf_store(x + 8 * i, y[i]);
}

MKVQ_BODY void hadamard(float *x, int n)
{
    static const float scale[] = {0x1.6a09e6p-2f, 0.25f,  0x1.6a09e6p-3f, 0.125f,
                                  0x1.6a09e6p-4f, 0.0625f}; /* 2^(-p/2), p = 3 ... 8 */
    const int run = n & -n, part = run < 64 ? run : 64;
    for (int c = 0; c < n; c += part)
        if (part == 64)
            transform_part(x + c, 8);
        else if (part == 32)
            transform_part(x + c, 4);
        else if (part == 16)
            transform_part(x + c, 2);
        else
            transform_part(x + c, 1);
    for (int stride = 64; stride < run; stride *= 2)
        for (int c = 0; c < n; c += 2 * stride)
            for (int i = c; i < c + stride; i += 8) {
                const vf a = vf_load(x + i), b = vf_load(x + i + stride);
                vf_store(x + i, vf_add(a, b));
                vf_store(x + i + stride, vf_sub(a, b));
            }
    int power = 0;
    while (8 << power < run)
        power++;
    const vf s = vf_set1(scale[power]);
    for (int c = 0; c < n; c += 8)
        vf_store(x + c, vf_mul(vf_load(x + c), s));
}
