/* dot.inl.h - codes times operands, where a decode spends its time:
 *
 *     out[r][lane] += bias[r] + factor[r] * sum over the entries of columns of code * operand[r]
 *
 * for 1 ... 8 query rows r. A column is one u32 per lane that carries the codes of 4 ... 32 entries
 * (docs/format.md sections 3.2 and 3.4): lanes are tokens and entries channels where queries meet
 * keys, lanes are channels and entries tokens where probabilities meet values.
 *
 * dot16: operands are 16-bit integers. A step multiplies the codes of two entries, one in each
 * half of a 32-bit lane, by a pair of operands; sums are 32-bit integers, which 256 channels of
 * eight-bit codes cannot overflow. dot8, of two-bit codes only: operands are bytes, a step
 * multiplies four entries, one in each byte of a lane; so does a step of dot16 where an instruction
 * set has operands split into bytes. dotf: operands are floats, a step is one entry.
 *
 * Sums are named, not an array: gcc keeps arrays in memory once a loop runs over them. Functions
 * are copied for every number of rows, which must be a constant for the sums to be registers. */
typedef enum { DOT_8, DOT_4, DOT_3, DOT_2, DOT_1, DOT_BYTES } dot_kind; /* DOT_BYTES: dot8 */

typedef struct {
    const uint32_t *words; /* of the first column, at the first lane */
    const uint32_t *third; /* DOT_3: likewise, the one-bit columns with the third bits */
    int64_t step;          /* words from one column to the next */
    int columns;           /* DOT_1: half columns, of 16 entries */
    int upper;             /* DOT_1: 1 if the upper half of the first column comes first */
    uint32_t tail;         /* DOT_3: which third bits count in the last column */
} dot_columns;

/* Operands of entry e in a column of 2n: dot16 pairs[e % n] of the column, entry e < n in the lower
 * half, unless split_pairs has split them; dot8 pairs[e % 4], byte e / 4; dotf x[e]. Eight rows
 * each. */
typedef struct {
    const int32_t (*pairs)[8];
    const float (*x)[8];
} dot_operands;

#ifdef MKVQ_SPLIT16 /* eight-bit codes are too large for signed bytes */
#define SPLIT(kind) ((kind) != DOT_8 && (kind) != DOT_BYTES)
#else
#define SPLIT(kind) 0
#endif

#define ALL_THIRD_BITS 0x0f0f0f0fu
#define BYTE_COLUMNS 10 /* of one dot8 at most: 40 steps */

/* Entries of a column, or of a half column of single bits. */
static inline int entries_of(int kind)
{
    return kind == DOT_8 ? 4 : kind == DOT_4 ? 8 : 16;
}

/* Codes of entry j, and of its partners: in the upper half of a lane half a column on, or in every
 * byte a quarter on. `third`: third bits, shifted such that that of entry 0 is bit 2. */
static MKVQ_INLINE wi codes_at(wi words, wi third, int j, const int kind, const int partners)
{
    const uint32_t both = partners == 4 ? 0x01010101u : partners == 2 ? 0x00010001u : 1u;
    const int one = 8 * (j / 4) + j % 4;
    if (kind == DOT_8)
        return wi_and1(wi_shr(words, 8 * j), 255 * both);
    if (kind == DOT_4)
        return wi_and1(wi_shr(words, 4 * j), 15 * both);
    if (kind == DOT_1)
        return wi_and1(wi_shr(words, one), both);
    if (kind == DOT_BYTES)
        return wi_and1(wi_shr(words, 2 * j), 0x03030303u);
    const wi low = wi_and1(wi_shr(words, 2 * j), 3 * both);
    return kind == DOT_2 ? low : wi_or(low, wi_and1(wi_shr(third, one), 4 * both));
}

/* Words of column c at lane `at`, and its third bits. */
static MKVQ_INLINE void load_column(const dot_columns *d, int c, int at, int lanes, const int kind,
                                    wi *words, wi *third)
{
    const int half = c + d->upper;
    if (kind == DOT_1) {
        *words = wi_load(d->words + half / 2 * d->step + at, lanes);
        *words = half & 1 ? wi_shr(*words, 4) : *words;
        return;
    }
    *words = wi_load(d->words + c * d->step + at, lanes);
    if (kind != DOT_3)
        return;
    *third = wi_load(d->third + c / 2 * d->step + at, lanes);
    *third =
        wi_and1(c & 1 ? wi_shr(*third, 4) : *third, c == d->columns - 1 ? d->tail : ALL_THIRD_BITS);
    *third = wi_shl(*third, 2);
}

#define DOT_ROWS(M) M(0) M(1) M(2) M(3) M(4) M(5) M(6) M(7)

typedef struct {
    ws a0, a1, a2, a3, a4, a5, a6, a7, b0, b1, b2, b3, b4, b5, b6, b7;
} sums16;

typedef struct {
    wf a0, a1, a2, a3, a4, a5, a6, a7, b0, b1, b2, b3, b4, b5, b6, b7;
} sumsf;

/* Adds the products of a step; `high` is of split operands, `q` their low bytes. */
static MKVQ_INLINE ws add_products(ws sum, wi codes, wi q, wi high, const int kind)
{
    (void)high;
#ifdef MKVQ_SPLIT16
    if (SPLIT(kind))
        return ws_dot_split(sum, codes, q, high);
#endif
    return kind == DOT_BYTES ? ws_dot8(sum, codes, q) : ws_dot16(sum, codes, q);
}

/* One step of one vector a, or of two, a and b. */
static MKVQ_INLINE void step16(sums16 *s, wi a, wi b, const int32_t (*pairs)[8], const int kind,
                               const int rows, const int two)
{
#define ROW(r) \
    if (rows > r) { \
        const wi q = wi_set1((uint32_t)pairs[0][r]), \
                 high = SPLIT(kind) ? wi_set1((uint32_t)pairs[1][r]) : q; \
        s->a##r = add_products(s->a##r, a, q, high, kind); \
        if (two) \
            s->b##r = add_products(s->b##r, b, q, high, kind); \
    }
    DOT_ROWS(ROW)
#undef ROW
}

static MKVQ_INLINE void stepf(sumsf *s, wi a, wi b, const float *x, const int rows, const int two)
{
    const wf fa = wf_from_wi(a), fb = wf_from_wi(b);
#define ROW(r) \
    if (rows > r) { \
        const wf q = wf_set1(x[r]); \
        s->a##r = wf_fma_sum(fa, q, s->a##r); \
        if (two) \
            s->b##r = wf_fma_sum(fb, q, s->b##r); \
    }
    DOT_ROWS(ROW)
#undef ROW
}

static MKVQ_INLINE wf total(ws sum, const int kind)
{
#ifdef MKVQ_SPLIT16
    if (SPLIT(kind))
        return wf_from_wi(ws_total_split(sum));
#endif
    return wf_from_wi(kind == DOT_BYTES ? ws_total8(sum) : ws_total(sum));
}

static MKVQ_INLINE void add_to(float *out, int lanes, wf sum, float factor, float bias)
{
    const wf before = wf_add(wf_load(out, lanes), wf_set1(bias));
    wf_store(out, wf_fma(sum, wf_set1(factor), before), lanes);
}

/* One vector of lanes from `at` on, or two; `lanes` of the last count. */
static MKVQ_INLINE void dot16_vectors(const dot_columns *d, const dot_operands *o, float *out,
                                      int64_t out_step, const float *factor, const float *bias,
                                      int at, int lanes, const int kind, const int rows,
                                      const int two)
{
    sums16 s;
    const int steps = kind == DOT_BYTES ? 4 : entries_of(kind) / 2, split = SPLIT(kind) ? 2 : 1;
    const int32_t (*pairs)[8] = o->pairs;
#define ROW(r) s.a##r = s.b##r = ws_zero();
    DOT_ROWS(ROW)
#undef ROW
    for (int c = 0; c < d->columns; c++, pairs += steps) {
        wi a, b, third_a, third_b;
        load_column(d, c, at, two ? MKVQ_LANES : lanes, kind, &a, &third_a);
        if (two)
            load_column(d, c, at + MKVQ_LANES, lanes, kind, &b, &third_b);
        else
            b = a, third_b = third_a;
        MKVQ_UNROLL(8)
        for (int j = 0; j < steps / split; j++)
            step16(&s, codes_at(a, third_a, j, kind, 2 * split),
                   codes_at(b, third_b, j, kind, 2 * split), pairs + split * j, kind, rows, two);
    }
#define ROW(r) \
    if (rows > r) { \
        float *p = out + r * out_step + at; \
        add_to(p, two ? MKVQ_LANES : lanes, total(s.a##r, kind), factor[r], bias[r]); \
        if (two) \
            add_to(p + MKVQ_LANES, lanes, total(s.b##r, kind), factor[r], bias[r]); \
    }
    DOT_ROWS(ROW)
#undef ROW
}

static MKVQ_INLINE void dotf_vectors(const dot_columns *d, const dot_operands *o, float *out,
                                     int64_t out_step, const float *factor, const float *bias,
                                     int at, int lanes, const int kind, const int rows,
                                     const int two)
{
    sumsf s;
    const int steps = entries_of(kind);
    const float (*x)[8] = o->x;
#define ROW(r) s.a##r = s.b##r = wf_set1(0.0f);
    DOT_ROWS(ROW)
#undef ROW
    for (int c = 0; c < d->columns; c++, x += steps) {
        wi a, b, third_a, third_b;
        load_column(d, c, at, two ? MKVQ_LANES : lanes, kind, &a, &third_a);
        if (two)
            load_column(d, c, at + MKVQ_LANES, lanes, kind, &b, &third_b);
        else
            b = a, third_b = third_a;
        MKVQ_UNROLL(16)
        for (int j = 0; j < steps; j++)
            stepf(&s, codes_at(a, third_a, j, kind, 1), codes_at(b, third_b, j, kind, 1), x[j],
                  rows, two);
    }
#define ROW(r) \
    if (rows > r) { \
        float *p = out + r * out_step + at; \
        add_to(p, two ? MKVQ_LANES : lanes, s.a##r, factor[r], bias[r]); \
        if (two) \
            add_to(p + MKVQ_LANES, lanes, s.b##r, factor[r], bias[r]); \
    }
    DOT_ROWS(ROW)
#undef ROW
}

/* All lanes: two vectors at a time while they fill, then one. */
#define DOT_RUN(vectors, kind, rows) \
    { \
        int at = 0; \
        if (rows <= (kind == DOT_3 ? MKVQ_PAIR_ROWS_3 : MKVQ_PAIR_ROWS)) \
            for (; at + MKVQ_LANES < n; at += 2 * MKVQ_LANES) { \
                const int left = n - at - MKVQ_LANES; \
                vectors(d, o, out, out_step, factor, bias, at, \
                        left < MKVQ_LANES ? left : MKVQ_LANES, kind, rows, 1); \
            } \
        for (; at < n; at += MKVQ_LANES) \
            vectors(d, o, out, out_step, factor, bias, at, \
                    n - at < MKVQ_LANES ? n - at : MKVQ_LANES, kind, rows, 0); \
    }

#define DOT_FUNCTION(name, vectors, kind) \
    static __attribute__((noinline)) void name(const dot_columns *d, const dot_operands *o, \
                                               float *out, int64_t out_step, const float *factor, \
                                               const float *bias, int n, int rows) \
    { \
        switch (rows) { \
        case 1: DOT_RUN(vectors, kind, 1) return; \
        case 2: DOT_RUN(vectors, kind, 2) return; \
        case 3: DOT_RUN(vectors, kind, 3) return; \
        case 4: DOT_RUN(vectors, kind, 4) return; \
        case 5: DOT_RUN(vectors, kind, 5) return; \
        case 6: DOT_RUN(vectors, kind, 6) return; \
        case 7: DOT_RUN(vectors, kind, 7) return; \
        default: DOT_RUN(vectors, kind, 8) return; \
        } \
    }

DOT_FUNCTION(dot16_8, dot16_vectors, DOT_8)
DOT_FUNCTION(dot16_4, dot16_vectors, DOT_4)
DOT_FUNCTION(dot16_3, dot16_vectors, DOT_3)
DOT_FUNCTION(dot16_2, dot16_vectors, DOT_2)
DOT_FUNCTION(dot16_1, dot16_vectors, DOT_1)
DOT_FUNCTION(dot8_2, dot16_vectors, DOT_BYTES)
DOT_FUNCTION(dotf_8, dotf_vectors, DOT_8)
DOT_FUNCTION(dotf_4, dotf_vectors, DOT_4)
DOT_FUNCTION(dotf_3, dotf_vectors, DOT_3)
DOT_FUNCTION(dotf_2, dotf_vectors, DOT_2)
DOT_FUNCTION(dotf_1, dotf_vectors, DOT_1)

typedef void (*dot_function)(const dot_columns *, const dot_operands *, float *, int64_t,
                             const float *, const float *, int, int);

static const dot_function dot16[] = {dot16_8, dot16_4, dot16_3, dot16_2, dot16_1, dot8_2};
static const dot_function dotf[] = {dotf_8, dotf_4, dotf_3, dotf_2, dotf_1};
