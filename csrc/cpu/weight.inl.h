/* weight.inl.h - adds probabilities times the values of a coded record to the output rows. */
typedef struct {
    float scale[MKVQ_TILE_TOKENS + 8], offset[MKVQ_TILE_TOKENS + 8];
    float middle[MKVQ_TILE_TOKENS]; /* code */
    float x[MKVQ_TILE_TOKENS][8];   /* probability times scale */
    int32_t pairs[MKVQ_TILE_TOKENS / 2][8];
    float factor[8], constant[8];
} weight_tile;

/* Operands of the n tokens from `begin` on for one value group; constant[row] = sum of p times
 * offset. */
static void fold_weights(weight_tile *w, float (*p)[MKVQ_TILE_TOKENS], const uint8_t *record,
                         const mkvq_layout *l, int group, int rows, int begin, int n, int exact)
{
    const int metadata = l->head.metadata >> 4, bits = l->head.value_bits;
    const uint8_t *scales = record + l->value_meta,
                  *offsets = scales +
                             (int64_t)mkvq_meta_bytes(metadata) * l->value_groups * l->head.tokens;
    vf top = vf_set1(0.0f), constant[MKVQ_TILE_ROWS];
    read_metadata(scales, offsets, (int64_t)group * l->head.tokens + begin, metadata, bits,
                  w->scale, w->offset, n);
    for (int r = 0; r < MKVQ_TILE_ROWS; r++)
        constant[r] = vf_set1(0.0f);
    for (int t = 0; t < n; t += 8) {
        const vf scale = vf_load(w->scale + t), offset = vf_load(w->offset + t);
        vf x[8];
        for (int r = 0; r < 8; r++) {
            x[r] = vf_set1(0.0f);
            if (r >= rows)
                continue;
            const vf y = vf_load(p[r] + t);
            x[r] = vf_mul(y, scale);
            constant[r] = vf_fma(y, offset, constant[r]);
        }
        vf_transpose(x);
        for (int i = 0; i < 8; i++) {
            vf_store(w->x[t + i], x[i]);
            top = vf_max(x[i], top);
        }
    }
    for (int r = 0; r < MKVQ_TILE_ROWS; r++)
        w->constant[r] = r < rows ? vf_sum(constant[r]) : 0.0f;
    if (exact)
        return;
    fill_middle(w->middle, bits, n);
    const vf cost = make_pairs((const float (*)[8])w->x, w->middle, n,
                               bits == 8 || bits == 4 ? 32 / bits : 16, top, w->pairs, w->factor);
    vf_store(w->constant, vf_add(vf_load(w->constant), cost));
}

/* out[row] += sum over tokens begin ... begin + n (multiples of 32) of p[row] times decoded values,
 * still rotated. */
static void value_coded(float (*out)[MKVQ_MAX_HEAD_DIM], float (*p)[MKVQ_TILE_TOKENS],
                        const uint8_t *record, const mkvq_layout *l, weight_tile *w, int rows,
                        int begin, int n, int exact)
{
    static const float one[8] = {1, 1, 1, 1, 1, 1, 1, 1};
    const int dim = l->head.head_dim, bits = l->head.value_bits;
    static const dot_kind kinds[9] = {
        [8] = DOT_8, [4] = DOT_4, [3] = DOT_3, [2] = DOT_2, [1] = DOT_1};
    const dot_kind kind = kinds[bits];
    const uint32_t *words = (const uint32_t *)(const void *)(record + l->values);
    const dot_operands o = {w->pairs, (const float (*)[8])w->x};
    dot_columns d = {.step = dim, .columns = n / entries_of(kind), .tail = ALL_THIRD_BITS};
    for (int i = 0, c = 0; i < l->value_groups; i++, c += l->head.value_group) {
        const int left = dim - c, width = left < l->head.value_group ? left : l->head.value_group;
        fold_weights(w, p, record, l, i, rows, begin, n, exact);
        d.words = words + (int64_t)dim * (bits == 3 ? begin / 16 : begin * bits / 32) + c;
        d.third = words + (int64_t)dim * (l->head.tokens / 16 + begin / 32) + c;
        (exact ? dotf : dot16)[kind](&d, &o, out[0] + c, MKVQ_MAX_HEAD_DIM, exact ? one : w->factor,
                                     w->constant, width, rows);
    }
}
