/* value.inl.h - adds probabilities times the values of a run of tokens to the output rows.
 *
 * Value scales are folded into the probabilities: sum_t p_t (s_t c_t + o_t) = sum_t (p_t s_t)
 * c_t + sum_t p_t o_t. A row word carries the codes of 4 ... 32 tokens for one channel; the
 * lanes of a vector are eight channels. */
typedef struct {
    float folded[MKVQ_TILE_ROWS][MKVQ_TILE_TOKENS];
    float constant[MKVQ_TILE_ROWS];
} weight_tile;

static void fold_weights(weight_tile *w, float (*p)[MKVQ_TILE_TOKENS], const uint8_t *record,
                         const mkvq_layout *l, int group, int rows, int begin, int n)
{
    const int metadata = l->head.metadata >> 4, bits = l->head.value_bits;
    const uint8_t *scales = record + l->value_meta;
    const uint8_t *offsets =
        scales + (int64_t)mkvq_meta_bytes(metadata) * l->value_groups * l->head.tokens;
    float scale[MKVQ_TILE_TOKENS], offset[MKVQ_TILE_TOKENS];
    for (int t = 0; t < n; t++) {
        const int64_t at = (int64_t)group * l->head.tokens + begin + t;
        scale[t] = get_metadata(scales, at, metadata);
        offset[t] = get_offset(offsets, at, metadata, scale[t], bits);
    }
    for (int r = 0; r < rows; r++) {
        vf sum = vf_set1(0.0f);
        for (int t = 0; t < n; t += 8) {
            const vf x = vf_load(p[r] + t);
            vf_store(w->folded[r] + t, vf_mul(x, vf_load(scale + t)));
            sum = vf_fma(x, vf_load(offset + t), sum);
        }
        w->constant[r] = vf_sum(sum);
    }
}

/* acc[r] += codes of the rows of one width for eight channels, tokens 0 ... n of the tile. */
static inline __attribute__((always_inline)) void value_rows(vf *acc, const uint32_t *words,
                                                             int dim, int n, const weight_tile *w,
                                                             const int bits, const int rows)
{
    for (int t = 0; t < n; words += dim) {
        const vi word = vi_load(words);
        MKVQ_UNROLL(32)
        for (int i = 0; i < 32 / bits; i++, t++) {
            const vf code = vf_from_vi(
                vi_and1(vi_shr(word, bits == 1 ? mkvq_one_bit(i) : bits * i), (1u << bits) - 1));
            MKVQ_UNROLL(8)
            for (int r = 0; r < rows; r++)
                acc[r] = vf_fma(code, vf_set1(w->folded[r][t]), acc[r]);
        }
    }
}

static inline __attribute__((always_inline)) void value_run(float *out, const uint32_t *words,
                                                            int dim, int tokens, int bits,
                                                            int begin, int n, int first, int last,
                                                            const weight_tile *w, const int rows)
{
    for (int c = first; c < last; c += 8) {
        vf acc[MKVQ_TILE_ROWS];
        for (int r = 0; r < rows; r++)
            acc[r] = vf_set1(0.0f);
        if (bits == 3) { /* the plane of weight 4 first */
            value_rows(acc, words + (int64_t)dim * (tokens / 16 + begin / 32) + c, dim, n, w, 1,
                       rows);
            for (int r = 0; r < rows; r++)
                acc[r] = vf_mul(acc[r], vf_set1(4.0f));
        }
        if (bits == 1)
            value_rows(acc, words + (int64_t)dim * (begin / 32) + c, dim, n, w, 1, rows);
        else if (bits <= 3)
            value_rows(acc, words + (int64_t)dim * (begin / 16) + c, dim, n, w, 2, rows);
        else if (bits == 4)
            value_rows(acc, words + (int64_t)dim * (begin / 8) + c, dim, n, w, 4, rows);
        else
            value_rows(acc, words + (int64_t)dim * (begin / 4) + c, dim, n, w, 8, rows);
        for (int r = 0; r < rows; r++) {
            float *o = out + r * MKVQ_MAX_HEAD_DIM + c;
            vf_store(o, vf_add(vf_load(o), vf_add(acc[r], vf_set1(w->constant[r]))));
        }
    }
}

/* out[r] += sum over tokens begin ... begin + n (multiples of 32) of p[r] times decoded values,
 * still rotated. */
static void value_coded(float *out, float (*p)[MKVQ_TILE_TOKENS], const uint8_t *record,
                        const mkvq_layout *l, weight_tile *w, int rows, int begin, int n)
{
    const uint32_t *words = (const uint32_t *)(const void *)(record + l->values);
    const int dim = l->head.head_dim, tokens = l->head.tokens, bits = l->head.value_bits;
    for (int i = 0, c = 0; i < l->value_groups; i++, c += l->head.value_group) {
        const int last = c + l->head.value_group < dim ? c + l->head.value_group : dim;
        fold_weights(w, p, record, l, i, rows, begin, n);
        if (rows == 1)
            value_run(out, words, dim, tokens, bits, begin, n, c, last, w, 1);
        else if (rows == 2)
            value_run(out, words, dim, tokens, bits, begin, n, c, last, w, 2);
        else if (rows == 4)
            value_run(out, words, dim, tokens, bits, begin, n, c, last, w, 4);
        else
            value_run(out, words, dim, tokens, bits, begin, n, c, last, w, 8);
    }
}

/* out[r] += sum over n rows of exact values, `step` bytes apart. */
static void value_exact(float *out, float (*p)[MKVQ_TILE_TOKENS], const uint8_t *v, int64_t step,
                        int dtype, int64_t stride, int dim, int rows, int n)
{
    const int64_t chunk = 8 * stride * mkvq_dtype_bytes(dtype);
    for (int c = 0; c < dim; c += 8, v += chunk) {
        vf acc[MKVQ_TILE_ROWS];
        for (int r = 0; r < rows; r++)
            acc[r] = vf_load(out + r * MKVQ_MAX_HEAD_DIM + c);
        const uint8_t *at = v;
        for (int t = 0; t < n; t++, at += step) {
            const vf x = load8(at, dtype, stride);
            for (int r = 0; r < rows; r++)
                acc[r] = vf_fma(x, vf_set1(p[r][t]), acc[r]);
        }
        for (int r = 0; r < rows; r++)
            vf_store(out + r * MKVQ_MAX_HEAD_DIM + c, acc[r]);
    }
}
