/* query.inl.h - scores of a tile of query rows against the keys of a coded record. */

/* Columns are filled up, the one-bit ones also at the front: see find_runs. */
#define MAX_ENTRIES (MKVQ_MAX_HEAD_DIM + 64)
#define KEY_RUNS 4 /* 8 bits, 4, 3 and 2, 1 */

/* Channels of one width of columns. */
typedef struct {
    int begin, end;     /* in stored order */
    int entry, entries; /* of its columns */
    int lead;           /* entries before the first channel, of zero weight */
} key_run;

typedef struct {
    key_run runs[KEY_RUNS];
    float scale[MKVQ_MAX_HEAD_DIM + 8], offset[MKVQ_MAX_HEAD_DIM + 8];
    float middle[MAX_ENTRIES]; /* code of each entry */
    float x[MAX_ENTRIES][8];   /* query times scale, in entry order */
    int32_t pairs[MAX_ENTRIES / 2][8];
    float factor[KEY_RUNS][8], constant[8];
} query_tile;

/* The one-bit tier shares its columns with the third bits of the 3-bit tier, which come first; its
 * entries begin with the half column in which they end. */
static void find_runs(query_tile *w, const mkvq_layout *l)
{
    static const int column[KEY_RUNS] = {4, 8, 16, 16}, bits[KEY_RUNS] = {8, 4, 2, 1};
    const int *n = l->counts, of[KEY_RUNS] = {n[MKVQ_TIER_8], n[MKVQ_TIER_4],
                                              n[MKVQ_TIER_3] + n[MKVQ_TIER_2], n[MKVQ_TIER_1]};
    for (int r = 0, stored = 0, entry = 0; r < KEY_RUNS; r++) {
        key_run *run = &w->runs[r];
        run->lead = r == KEY_RUNS - 1 && of[r] ? n[MKVQ_TIER_3] % 16 : 0;
        run->begin = stored, run->end = stored += of[r];
        run->entry = entry;
        run->entries = (run->lead + of[r] + column[r] - 1) / column[r] * column[r];
        entry += run->entries;
    }
    for (int r = 0; r < KEY_RUNS; r++)
        fill_middle(w->middle + w->runs[r].entry, bits[r], w->runs[r].entries);
    fill_middle(w->middle + w->runs[2].entry, 3, n[MKVQ_TIER_3]);
}

/* Scales and offsets of one key group, in stored order. A tier's vectors run over its end and are
 * put right by the next tier. */
static void read_key_metadata(query_tile *w, const uint8_t *record, const mkvq_layout *l, int group)
{
    static const uint8_t tiers[] = {MKVQ_TIER_8, MKVQ_TIER_4, MKVQ_TIER_3, MKVQ_TIER_2,
                                    MKVQ_TIER_1};
    const int metadata = l->head.metadata & 15;
    const uint8_t *scales = record + l->key_meta,
                  *offsets = scales + (int64_t)mkvq_meta_bytes(metadata) * l->key_groups * l->coded;
    for (int t = 0, i = 0; t < 5; i += l->counts[tiers[t++]])
        read_metadata(scales, offsets, (int64_t)group * l->coded + i, metadata,
                      mkvq_tier_bits(tiers[t]), w->scale + i, w->offset + i, l->counts[tiers[t]]);
}

/* Operands of one key group for q[channel][row]; constant[row] = reference[row] + sum of q times
 * offset. */
static void fold_queries(query_tile *w, const uint8_t *record, const mkvq_layout *l, int group,
                         const float (*q)[8], const float *reference, int exact)
{
    static const int column[KEY_RUNS] = {4, 8, 16, 16};
    /* sums in four parts, for short chains */
    vf sum0 = vf_load(reference), sum1 = vf_set1(0.0f), sum2 = sum1, sum3 = sum1;
    read_key_metadata(w, record, l, group);
    for (int r = 0; r < KEY_RUNS; r++) {
        const key_run *run = &w->runs[r];
        float (*x)[8] = w->x + run->entry;
        vf top = vf_set1(0.0f), top1 = top;
        int e = 0, i = run->begin;
        for (; e < run->lead; e++)
            vf_store(x[e], vf_set1(0.0f));
#define CHANNEL(k, sum, largest) \
    { \
        const vf query = vf_load(q[l->order[i + k]]), \
                 folded = vf_mul(query, vf_set1(w->scale[i + k])); \
        vf_store(x[e + k], folded); \
        largest = larger(largest, folded); \
        sum = vf_fma(query, vf_set1(w->offset[i + k]), sum); \
    }
        for (; i + 4 <= run->end; i += 4, e += 4) {
            CHANNEL(0, sum0, top)
            CHANNEL(1, sum1, top1)
            CHANNEL(2, sum2, top)
            CHANNEL(3, sum3, top1)
        }
        for (; i < run->end; i++, e++)
            CHANNEL(0, sum0, top)
#undef CHANNEL
        for (; e < run->entries; e++)
            vf_store(x[e], vf_set1(0.0f));
        if (!exact)
            sum0 = vf_add(sum0, make_pairs((const float (*)[8])x, w->middle + run->entry,
                                           run->entries, column[r], vf_max(top, top1),
                                           w->pairs + run->entry / 2, w->factor[r]));
    }
    vf_store(w->constant, vf_add(vf_add(sum0, sum1), vf_add(sum2, sum3)));
}

/* s[row][token] += scores of n tokens from t on, of the channels of one run. */
static void score_run(float (*s)[MKVQ_TILE_TOKENS], const uint8_t *record, const mkvq_layout *l,
                      const query_tile *w, int r, int rows, int t, int n, int exact)
{
    static const float one[8] = {1, 1, 1, 1, 1, 1, 1, 1}, zero[8] = {0};
    const key_run *run = &w->runs[r];
    const int64_t tokens = l->head.tokens;
    const int *columns = l->columns, third = l->counts[MKVQ_TIER_3];
    const uint32_t *words = (const uint32_t *)(const void *)(record + l->key_columns) + t,
                   *two_bit = words + (columns[0] + columns[1]) * tokens,
                   *one_bit = two_bit + columns[2] * tokens;
    const float *factor = exact ? one : w->factor[r];
    const dot_function *dot = exact ? dotf : dot16;
    dot_operands o = {w->pairs + run->entry / 2, (const float (*)[8])w->x + run->entry};
    if (r < 2) {
        const dot_columns d = {.words = r ? words + columns[0] * tokens : words,
                               .step = tokens,
                               .columns = columns[r]};
        dot[r ? DOT_4 : DOT_8](&d, &o, s[0], MKVQ_TILE_TOKENS, factor, zero, n, rows);
    } else if (r == 2) { /* columns with and without third bits */
        const int with = (third + 15) / 16;
        dot_columns d = {two_bit, one_bit, tokens, with, 0, ALL_THIRD_BITS};
        for (int i = 16 * with - 1; i >= third; i--)
            d.tail &= ~(1u << mkvq_one_bit(i % 16));
        if (with)
            dot[DOT_3](&d, &o, s[0], MKVQ_TILE_TOKENS, factor, zero, n, rows);
        d.words += with * tokens, d.columns = columns[2] - with;
        o.pairs += 8 * with, o.x += 16 * with;
        if (d.columns)
            dot[DOT_2](&d, &o, s[0], MKVQ_TILE_TOKENS, factor, zero, n, rows);
    } else {
        const dot_columns d = {.words = one_bit + third / 32 * tokens,
                               .step = tokens,
                               .columns = run->entries / 16,
                               .upper = third / 16 % 2};
        dot[DOT_1](&d, &o, s[0], MKVQ_TILE_TOKENS, factor, zero, n, rows);
    }
}

/* s[row][token] += scores of n tokens from t on, of the exact channels. */
static void score_exact_channels(float (*s)[MKVQ_TILE_TOKENS], const uint8_t *record,
                                 const mkvq_layout *l, const float (*q)[8], int rows, int t, int n)
{
    const int size = mkvq_dtype_bytes(l->head.dtype);
    for (int i = l->coded; i < l->head.head_dim; i++) {
        const uint8_t *k =
            record + l->exact_keys + ((int64_t)(i - l->coded) * l->head.tokens + t) * size;
        for (int at = 0; at < n; at += 8, k += 8 * size) {
            const vf x = load8(k, l->head.dtype, 1);
            for (int r = 0; r < rows; r++) {
                const vf sum = vf_load(s[r] + at);
                vf_store(s[r] + at, vf_fma(x, vf_set1(q[l->order[i]][r]), sum));
            }
        }
    }
}

/* Scores of tokens begin ... begin + n of a coded record, both multiples of 32. reference[row]: sum
 * of q mu over the coded channels. */
static void score_coded(float (*s)[MKVQ_TILE_TOKENS], const uint8_t *record, const mkvq_layout *l,
                        query_tile *w, const float (*q)[8], const float *reference, int rows,
                        int begin, int n, int exact)
{
    const int group = l->head.key_group;
    for (int t = 0, count; t < n; t += count) {
        const int token = begin + t, rest = group - token % group;
        float (*to)[MKVQ_TILE_TOKENS] = (float (*)[MKVQ_TILE_TOKENS])(s[0] + t);
        count = rest < n - t ? rest : n - t;
        fold_queries(w, record, l, token / group, q, reference, exact);
        for (int r = 0; r < rows; r++)
            for (int i = 0; i < count; i += 8)
                vf_store(to[r] + i, vf_set1(w->constant[r]));
        for (int r = 0; r < KEY_RUNS; r++)
            if (w->runs[r].entries)
                score_run(to, record, l, w, r, rows, token, count, exact);
        score_exact_channels(to, record, l, q, rows, token, count);
    }
}
