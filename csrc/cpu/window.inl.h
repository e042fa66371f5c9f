/* window.inl.h - scores and sums over exact keys and values: sinks, window, exact records, and the
 * exact channels of coded ones. */

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

/* out[row] += sum over n vectors v of eight elements, `step` bytes apart, each times its weight of
 * this row: entry i of row r at weight + r * row_step + i * entry_step. */
static MKVQ_INLINE void add_octets(float *out, int64_t out_step, const float *weight,
                                   int64_t row_step, int64_t entry_step, const uint8_t *v,
                                   int64_t step, int dtype, int64_t stride, int n, const int rows)
{
    vf a0, a1, a2, a3, a4, a5, a6, a7;
#define ROW(r) a##r = vf_load(out + (r < rows ? r : 0) * out_step);
    DOT_ROWS(ROW)
#undef ROW
    for (int i = 0; i < n; i++, v += step, weight += entry_step) {
        const vf x = load8(v, dtype, stride);
#define ROW(r) \
    if (rows > r) \
        a##r = vf_fma_sum(x, vf_set1(weight[r * row_step]), a##r);
        DOT_ROWS(ROW)
#undef ROW
    }
#define ROW(r) \
    if (rows > r) \
        vf_store(out + r * out_step, a##r);
    DOT_ROWS(ROW)
#undef ROW
}

#define ADD_WEIGHTED(rows) \
    add_octets(out, out_step, weight, row_step, entry_step, v, step, dtype, stride, n, rows); \
    return;

static void add_weighted(float *out, int64_t out_step, const float *weight, int64_t row_step,
                         int64_t entry_step, const uint8_t *v, int64_t step, int dtype,
                         int64_t stride, int n, int rows)
{
    switch (rows) {
    case 1: ADD_WEIGHTED(1)
    case 2: ADD_WEIGHTED(2)
    case 3: ADD_WEIGHTED(3)
    case 4: ADD_WEIGHTED(4)
    case 5: ADD_WEIGHTED(5)
    case 6: ADD_WEIGHTED(6)
    case 7: ADD_WEIGHTED(7)
    default: ADD_WEIGHTED(8)
    }
}

/* out[row] += sum over n rows of exact values, `step` bytes apart. */
static void value_exact(float (*out)[MKVQ_MAX_HEAD_DIM], float (*p)[MKVQ_TILE_TOKENS],
                        const uint8_t *v, int64_t step, int dtype, int64_t stride, int dim,
                        int rows, int n)
{
    const int64_t chunk = 8 * stride * mkvq_dtype_bytes(dtype);
    for (int c = 0; c < dim; c += 8, v += chunk)
        add_weighted(out[0] + c, MKVQ_MAX_HEAD_DIM, p[0], MKVQ_TILE_TOKENS, 1, v, step, dtype,
                     stride, n, rows);
}

/* s[row][token] += scores of n tokens from t on, of the exact channels of a coded record. */
static void score_exact_channels(float (*s)[MKVQ_TILE_TOKENS], const uint8_t *record,
                                 const mkvq_layout *l, const float (*q)[8], int rows, int t, int n)
{
    const int size = mkvq_dtype_bytes(l->head.dtype), channels = l->head.head_dim - l->coded;
    const int64_t step = (int64_t)l->head.tokens * size;
    const uint8_t *k = record + l->exact_keys + (int64_t)t * size;
    float x[MKVQ_MAX_HEAD_DIM][8];
    for (int i = 0; i < channels; i++)
        vf_store(x[i], vf_load(q[l->order[l->coded + i]]));
    for (int at = 0; channels && at < n; at += 8, k += 8 * size)
        add_weighted(s[0] + at, MKVQ_TILE_TOKENS, x[0], 1, 8, k, step, l->head.dtype, 1, channels,
                     rows);
}
