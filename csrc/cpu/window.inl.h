/* window.inl.h - scores and sums over rows of exact keys and values: sinks, window, exact records. */

/* Eight rows of `dim` floats, `step` bytes apart, widened to `room` unless they can be read where
 * they are; rows from n on repeat the last. */
static void float_rows(const uint8_t *p, int64_t step, int dtype, int64_t stride, int dim, int n,
                       float (*room)[MKVQ_MAX_HEAD_DIM], const float **rows)
{
    for (int i = 0; i < 8; i++) {
        const uint8_t *row = p + (i < n ? i : n - 1) * step;
        rows[i] = (const float *)(const void *)row;
        if (dtype == MKVQ_F32 && stride == 1)
            continue;
        if (i < n)
            load_row(room[i], row, dtype, stride, dim);
        rows[i] = room[i < n ? i : n - 1];
    }
}

/* Scores of n rows of exact keys, `step` bytes apart. */
static void score_exact(float (*s)[MKVQ_TILE_TOKENS], const uint8_t *k, int64_t step, int dtype,
                        int64_t stride, int dim, float (*q)[MKVQ_MAX_HEAD_DIM], int rows, int n)
{
    float room[8][MKVQ_MAX_HEAD_DIM];
    for (int t = 0; t < n; t += 8, k += 8 * step) {
        const float *key[8];
        float_rows(k, step, dtype, stride, dim, n - t, room, key);
        for (int r = 0; r < rows; r++) {
            vf a0 = vf_set1(0.0f), a1 = a0, a2 = a0, a3 = a0, a4 = a0, a5 = a0, a6 = a0, a7 = a0;
            for (int c = 0; c < dim; c += 8) {
                const vf x = vf_load(q[r] + c);
#define TOKEN(i) a##i = vf_fma_sum(vf_load(key[i] + c), x, a##i);
                TOKEN(0) TOKEN(1) TOKEN(2) TOKEN(3) TOKEN(4) TOKEN(5) TOKEN(6) TOKEN(7)
#undef TOKEN
            }
            vf sums[8] = {a0, a1, a2, a3, a4, a5, a6, a7};
            vf_store(s[r] + t, sums_of(sums));
        }
    }
}

/* out[row][c ... c + 8] += sum over n rows of exact values. */
static MKVQ_INLINE void value_octet(float (*out)[MKVQ_MAX_HEAD_DIM], float (*p)[MKVQ_TILE_TOKENS],
                                    const uint8_t *v, int64_t step, int dtype, int64_t stride,
                                    int c, int n, const int rows)
{
    vf a0, a1, a2, a3, a4, a5, a6, a7;
#define EACH(M) M(0) M(1) M(2) M(3) M(4) M(5) M(6) M(7)
#define ROW(r) a##r = vf_load(out[r < rows ? r : 0] + c);
    EACH(ROW)
#undef ROW
    for (int t = 0; t < n; t++, v += step) {
        const vf x = load8(v, dtype, stride);
#define ROW(r) \
    if (rows > r) \
        a##r = vf_fma_sum(x, vf_set1(p[r][t]), a##r);
        EACH(ROW)
#undef ROW
    }
#define ROW(r) \
    if (rows > r) \
        vf_store(out[r] + c, a##r);
    EACH(ROW)
#undef ROW
#undef EACH
}

/* out[row] += sum over n rows of exact values, `step` bytes apart. */
static void value_exact(float (*out)[MKVQ_MAX_HEAD_DIM], float (*p)[MKVQ_TILE_TOKENS],
                        const uint8_t *v, int64_t step, int dtype, int64_t stride, int dim,
                        int rows, int n)
{
    const int64_t chunk = 8 * stride * mkvq_dtype_bytes(dtype);
    for (int c = 0; c < dim; c += 8, v += chunk)
        switch (rows) {
        case 1: value_octet(out, p, v, step, dtype, stride, c, n, 1); break;
        case 2: value_octet(out, p, v, step, dtype, stride, c, n, 2); break;
        case 3: value_octet(out, p, v, step, dtype, stride, c, n, 3); break;
        case 4: value_octet(out, p, v, step, dtype, stride, c, n, 4); break;
        case 5: value_octet(out, p, v, step, dtype, stride, c, n, 5); break;
        case 6: value_octet(out, p, v, step, dtype, stride, c, n, 6); break;
        case 7: value_octet(out, p, v, step, dtype, stride, c, n, 7); break;
        default: value_octet(out, p, v, step, dtype, stride, c, n, 8); break;
        }
}
