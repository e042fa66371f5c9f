/* query.inl.h - scores of a tile of query rows against the keys of a coded record. */

/* Columns are filled up, the one-bit ones also at the front: see find_runs. */
#define MAX_ENTRIES (MKVQ_MAX_HEAD_DIM + 96)
#define KEY_RUNS 5

/* Coded channels whose columns are read in one way. */
typedef struct {
    dot_kind kind;
    dot_columns columns; /* at token 0 */
    int begin, end;      /* channels in stored order */
    int lead;            /* entries before the first channel, of zero weight */
    int entry, entries;  /* of the columns, among those of all runs */
} key_run;

typedef struct {
    key_run runs[KEY_RUNS];
    float scale[MKVQ_MAX_HEAD_DIM + 8], offset[MKVQ_MAX_HEAD_DIM + 8];
    float middle[MAX_ENTRIES]; /* code of each entry */
    float x[MAX_ENTRIES][8];   /* query times scale, in entry order */
    int32_t pairs[MAX_ENTRIES / 2][8];
    float factor[KEY_RUNS][8], constant[8];
} query_tile;

/* The runs of a record: columns of 8 bits, of 4, two-bit columns with third bits, two-bit columns
 * without, one-bit columns. The last column with third bits may hold channels of two bits; the one-
 * bit tier begins in the half column in which the third bits end. */
static void find_runs(query_tile *w, const uint8_t *record, const mkvq_layout *l, int precision)
{
    static const uint8_t bits[KEY_RUNS] = {8, 4, 2, 2, 1};
    const int *n = l->counts, *columns = l->columns, threes = n[MKVQ_TIER_3],
              with = (threes + 15) / 16, two_bit = threes + n[MKVQ_TIER_2],
              mixed = 16 * with < two_bit ? 16 * with : two_bit;
    const int of[KEY_RUNS] = {n[MKVQ_TIER_8], n[MKVQ_TIER_4], mixed, two_bit - mixed,
                              n[MKVQ_TIER_1]};
    const int one_bit = columns[0] + columns[1] + columns[2];
    const int first[KEY_RUNS] = {0, columns[0], columns[0] + columns[1],
                                 columns[0] + columns[1] + with, one_bit + threes / 32};
    const uint32_t *words = (const uint32_t *)(const void *)(record + l->key_columns);
    const int64_t tokens = l->head.tokens;
    for (int r = 0, stored = 0, entry = 0; r < KEY_RUNS; r++) {
        key_run *run = &w->runs[r];
        const int column = entries_of(r);
        run->kind = r == DOT_2 && precision == MKVQ_PRECISION_FAST ? DOT_BYTES : (dot_kind)r;
        run->begin = stored, run->end = stored += of[r];
        run->lead = r == DOT_1 && of[r] ? threes % 16 : 0;
        run->entry = entry;
        run->entries = (run->lead + of[r] + column - 1) / column * column;
        run->columns = (dot_columns){.words = words + first[r] * tokens,
                                     .third = words + one_bit * tokens,
                                     .step = tokens,
                                     .columns = run->entries / column,
                                     .upper = r == DOT_1 && threes / 16 % 2,
                                     .tail = ALL_THIRD_BITS};
        fill_middle(w->middle + entry, bits[r], run->entries);
        entry += run->entries;
    }
    for (int i = 16 * with - 1; i >= threes; i--)
        w->runs[DOT_3].columns.tail &= ~(1u << mkvq_one_bit(i % 16));
    fill_middle(w->middle + w->runs[DOT_3].entry, 3, threes);
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
                         const float (*q)[8], const float *reference, int precision)
{
    /* sums in four parts, for short chains */
    vf sum0 = vf_load(reference), sum1 = vf_set1(0.0f), sum2 = sum1, sum3 = sum1;
    read_key_metadata(w, record, l, group);
    for (int r = 0; r < KEY_RUNS; r++) {
        const key_run *run = &w->runs[r];
        float (*x)[8] = w->x + run->entry;
        int32_t (*pairs)[8] = w->pairs + run->entry / 2;
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
        top = vf_max(top, top1);
        if (precision == MKVQ_PRECISION_EXACT || !run->entries)
            continue;
        const vf cost =
            run->kind == DOT_BYTES
                ? make_bytes((const float (*)[8])x, run->entries, top, pairs, w->factor[r])
                : make_pairs((const float (*)[8])x, w->middle + run->entry, run->entries,
                             entries_of(run->kind), top, pairs, w->factor[r]);
        sum0 = vf_add(sum0, cost);
    }
    vf_store(w->constant, vf_add(vf_add(sum0, sum1), vf_add(sum2, sum3)));
}

/* Scores of tokens begin ... begin + n of a coded record, both multiples of 32, of which find_runs
 * has been told. reference[row]: sum of q mu over the coded channels. */
static void score_coded(float (*s)[MKVQ_TILE_TOKENS], const uint8_t *record, const mkvq_layout *l,
                        query_tile *w, const float (*q)[8], const float *reference, int rows,
                        int begin, int n, int precision)
{
    static const float one[8] = {1, 1, 1, 1, 1, 1, 1, 1}, zero[8] = {0};
    const int group = l->head.key_group, exact = precision == MKVQ_PRECISION_EXACT;
    for (int t = 0, count; t < n; t += count) {
        const int token = begin + t, rest = group - token % group;
        float (*to)[MKVQ_TILE_TOKENS] = (float (*)[MKVQ_TILE_TOKENS])(s[0] + t);
        count = rest < n - t ? rest : n - t;
        fold_queries(w, record, l, token / group, q, reference, precision);
        for (int r = 0; r < rows; r++)
            for (int i = 0; i < count; i += 8)
                vf_store(to[r] + i, vf_set1(w->constant[r]));
        for (int r = 0; r < KEY_RUNS; r++) {
            const key_run *run = &w->runs[r];
            dot_operands o = {w->pairs + run->entry / 2, (const float (*)[8])w->x + run->entry};
            dot_columns d = run->columns;
            int left = d.columns;
            d.words += token, d.third += token;
            for (; left > 0; left -= d.columns, d.words += d.columns * d.step) {
                d.columns = run->kind == DOT_BYTES && left > BYTE_COLUMNS ? BYTE_COLUMNS : left;
                (exact ? dotf : dot16)[run->kind](&d, &o, to[0], MKVQ_TILE_TOKENS,
                                                  exact ? one : w->factor[r], zero, count, rows);
                o.pairs += 4 * d.columns; /* of dot8; the others have taken all columns */
            }
        }
        score_exact_channels(to, record, l, q, rows, token, count);
    }
}
