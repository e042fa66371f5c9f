/* score.inl.h - scores of 1, 2, 4 or 8 query rows against the keys of one record.
 *
 * Key scales are folded into the query once per key group, so that a score is a dot product of
 * codes and folded query plus one constant:
 *     q.k = sum_i (q_i s_i) c_i + sum_i q_i (o_i + mu_i)
 * A column word carries the codes of 4 ... 32 channels for one token; the lanes of a vector are
 * eight tokens. The "entries" below are the places of the columns in order, unused ones
 * included: a 3-bit channel has one entry in a two-bit and one, of weight 4, in a one-bit
 * column. */
#define MAX_ENTRIES (2 * MKVQ_MAX_HEAD_DIM + 64)

typedef struct {
    int entries;
    int begin[4];                /* first entry of the 8-, 4-, two- and one-bit columns */
    int16_t stored[MAX_ENTRIES]; /* index in stored order, -1: unused place */
    uint8_t bits[MAX_ENTRIES];   /* of the channel's tier */
    float weight[MAX_ENTRIES];   /* 1, or 4 for the third bit */
} entry_map;

static void map_entries(const mkvq_layout *l, entry_map *m)
{
    static const uint8_t per[4] = {4, 8, 16, 32};
    const int *n = l->counts;
    const int first3 = n[MKVQ_TIER_8] + n[MKVQ_TIER_4],
              first1 = first3 + n[MKVQ_TIER_3] + n[MKVQ_TIER_2];
    /* the stored runs that fill each kind of column: 8 | 4 | 3, 2 | 3, 1 bits */
    const int run[4][2][2] = {{{0, n[MKVQ_TIER_8]}, {0, 0}},
                              {{n[MKVQ_TIER_8], n[MKVQ_TIER_4]}, {0, 0}},
                              {{first3, n[MKVQ_TIER_3] + n[MKVQ_TIER_2]}, {0, 0}},
                              {{first3, n[MKVQ_TIER_3]}, {first1, n[MKVQ_TIER_1]}}};
    int e = 0;
    for (int kind = 0; kind < 4; kind++) {
        const int end = e + l->columns[kind] * per[kind];
        m->begin[kind] = e;
        for (int r = 0; r < 2; r++)
            for (int i = 0; i < run[kind][r][1]; i++, e++) {
                const int stored = run[kind][r][0] + i,
                          bits = mkvq_tier_bits(l->tier[l->order[stored]]);
                m->stored[e] = (int16_t)stored, m->bits[e] = (uint8_t)bits;
                m->weight[e] = kind == 3 && bits == 3 ? 4.0f : 1.0f;
            }
        for (; e < end; e++)
            m->stored[e] = -1, m->weight[e] = 0.0f;
    }
    m->entries = e;
    for (; e < (m->entries + 7) / 8 * 8; e++) /* vectors may run over the end */
        m->stored[e] = -1, m->weight[e] = 0.0f;
}

/* A tile of query rows, gathered for one record. */
typedef struct {
    entry_map map;
    float gathered[MKVQ_TILE_ROWS][MAX_ENTRIES]; /* q in entry order */
    float folded[MKVQ_TILE_ROWS][MAX_ENTRIES];   /* times the scales of the key group at hand */
    float scale[MAX_ENTRIES], offset[MAX_ENTRIES];
    float reference[MKVQ_TILE_ROWS]; /* sum of q mu over the coded channels */
} query_tile;

static void gather_queries(query_tile *w, const mkvq_layout *l, const float *q, int rows,
                           const uint16_t *mu)
{
    map_entries(l, &w->map);
    const int padded = (w->map.entries + 7) / 8 * 8;
    float reference[MKVQ_MAX_HEAD_DIM];
    for (int i = 0; mu && i < l->coded; i++)
        reference[i] = mkvq_f16_to_f32(mu[l->order[i]]);
    for (int r = 0; r < rows; r++) {
        const float *x = q + r * MKVQ_MAX_HEAD_DIM;
        for (int e = 0; e < padded; e++)
            w->gathered[r][e] = w->map.stored[e] >= 0 ? x[l->order[w->map.stored[e]]] : 0.0f;
        float sum = 0.0f;
        for (int i = 0; mu && i < l->coded; i++)
            sum += x[l->order[i]] * reference[i];
        w->reference[r] = sum;
    }
}

/* Folds the scales of key group `group` into the queries; constant[r] = sum of q (offset + mu). */
static void fold_queries(query_tile *w, const uint8_t *record, const mkvq_layout *l, int group,
                         int rows, float *constant)
{
    const int metadata = l->head.metadata & 15, padded = (w->map.entries + 7) / 8 * 8;
    const uint8_t *scales = record + l->key_meta;
    const uint8_t *offsets = scales + (int64_t)mkvq_meta_bytes(metadata) * l->key_groups * l->coded;
    for (int e = 0; e < padded; e++) {
        const int stored = w->map.stored[e];
        if (stored < 0) {
            w->scale[e] = w->offset[e] = 0.0f;
            continue;
        }
        const int64_t at = (int64_t)group * l->coded + stored;
        const float scale = get_metadata(scales, at, metadata);
        w->scale[e] = scale * w->map.weight[e];
        /* the second entry of a 3-bit channel must not count the offset again */
        w->offset[e] = w->map.weight[e] == 1.0f
                           ? get_offset(offsets, at, metadata, scale, w->map.bits[e])
                           : 0.0f;
    }
    for (int r = 0; r < rows; r++) {
        vf sum = vf_set1(0.0f);
        for (int e = 0; e < padded; e += 8) {
            const vf q = vf_load(w->gathered[r] + e);
            vf_store(w->folded[r] + e, vf_mul(q, vf_load(w->scale + e)));
            sum = vf_fma(q, vf_load(w->offset + e), sum);
        }
        constant[r] = vf_sum(sum) + w->reference[r];
    }
}

/* acc[r] += codes of the columns of one width, times the folded queries, for eight tokens.
 * `rows` and `bits` are constants after inlining. */
static inline __attribute__((always_inline)) void score_columns(vf *acc, const uint32_t *words,
                                                                int64_t length, int columns,
                                                                const query_tile *w, int entry,
                                                                const int bits, const int rows)
{
    for (int c = 0; c < columns; c++, words += length) {
        const vi word = vi_load(words);
        MKVQ_UNROLL(32)
        for (int i = 0; i < 32 / bits; i++, entry++) {
            const vf code = vf_from_vi(
                vi_and1(vi_shr(word, bits == 1 ? mkvq_one_bit(i) : bits * i), (1u << bits) - 1));
            MKVQ_UNROLL(8)
            for (int r = 0; r < rows; r++)
                acc[r] = vf_fma(code, vf_set1(w->folded[r][entry]), acc[r]);
        }
    }
}

/* Scores of tokens begin ... end (multiples of 8 inside one key group) to s[r][token - origin]. */
static inline __attribute__((always_inline)) void
score_run(float (*s)[MKVQ_TILE_TOKENS], const uint8_t *record, const mkvq_layout *l,
          const query_tile *w, const float *q, const float *constant, int begin, int end,
          int origin, const int rows)
{
    const int64_t tokens = l->head.tokens;
    const int size = mkvq_dtype_bytes(l->head.dtype);
    for (int t = begin; t < end; t += 8) {
        vf acc[MKVQ_TILE_ROWS];
        const uint32_t *words = (const uint32_t *)(const void *)(record + l->key_columns) + t;
        for (int r = 0; r < rows; r++)
            acc[r] = vf_set1(constant[r]);
        score_columns(acc, words, tokens, l->columns[0], w, w->map.begin[0], 8, rows);
        words += l->columns[0] * tokens;
        score_columns(acc, words, tokens, l->columns[1], w, w->map.begin[1], 4, rows);
        words += l->columns[1] * tokens;
        score_columns(acc, words, tokens, l->columns[2], w, w->map.begin[2], 2, rows);
        words += l->columns[2] * tokens;
        score_columns(acc, words, tokens, l->columns[3], w, w->map.begin[3], 1, rows);
        for (int i = l->coded; i < l->head.head_dim; i++) {
            const vf k = load8(record + l->exact_keys + ((i - l->coded) * tokens + t) * size,
                               l->head.dtype, 1);
            for (int r = 0; r < rows; r++)
                acc[r] = vf_fma(k, vf_set1(q[r * MKVQ_MAX_HEAD_DIM + l->order[i]]), acc[r]);
        }
        for (int r = 0; r < rows; r++)
            vf_store(s[r] + (t - origin), acc[r]);
    }
}

/* Scores of tokens begin ... end of a coded record; begin and end are multiples of 32. */
static void score_coded(float (*s)[MKVQ_TILE_TOKENS], const uint8_t *record, const mkvq_layout *l,
                        query_tile *w, const float *q, int rows, int begin, int end)
{
    const int group = l->head.key_group;
    float constant[MKVQ_TILE_ROWS];
    for (int t = begin; t < end;) {
        const int stop = (t / group + 1) * group < end ? (t / group + 1) * group : end;
        fold_queries(w, record, l, t / group, rows, constant);
        if (rows == 1)
            score_run(s, record, l, w, q, constant, t, stop, begin, 1);
        else if (rows == 2)
            score_run(s, record, l, w, q, constant, t, stop, begin, 2);
        else if (rows == 4)
            score_run(s, record, l, w, q, constant, t, stop, begin, 4);
        else
            score_run(s, record, l, w, q, constant, t, stop, begin, 8);
        t = stop;
    }
}

/* Scores of n rows of exact keys, `step` bytes apart. */
static void score_exact(float (*s)[MKVQ_TILE_TOKENS], const uint8_t *k, int64_t step, int dtype,
                        int64_t stride, int dim, const float *q, int rows, int n)
{
    const int64_t chunk = 8 * stride * mkvq_dtype_bytes(dtype);
    for (int t = 0; t < n; t++, k += step) {
        vf acc[MKVQ_TILE_ROWS];
        for (int r = 0; r < rows; r++)
            acc[r] = vf_set1(0.0f);
        const uint8_t *p = k;
        for (int c = 0; c < dim; c += 8, p += chunk) {
            const vf x = load8(p, dtype, stride);
            for (int r = 0; r < rows; r++)
                acc[r] = vf_fma(x, vf_load(q + r * MKVQ_MAX_HEAD_DIM + c), acc[r]);
        }
        for (int r = 0; r < rows; r++)
            s[r][t] = vf_sum(acc[r]);
    }
}
