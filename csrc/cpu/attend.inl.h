/* attend.inl.h - attention of up to eight query rows over one row and head: sinks, packed
 * blocks, window, in one online softmax.
 *
 * A query row is a pair (query position, query head of the group); all rows of a tile share each
 * reading of the keys. Tokens are taken in runs of at most MKVQ_TILE_TOKENS. Rotated and plain
 * values are summed apart; the rotation is undone once per query row, at the end. */
typedef struct {
    const mkvq_attend_args *args;
    int64_t row, head, first_row; /* query row 0 of the tile, counted over positions * group */
    int rows, padded;             /* in use; rounded up to 1, 2, 4, 8, the others zero */
    int64_t total;                /* tokens of this batch row */
    float q[MKVQ_TILE_ROWS * MKVQ_MAX_HEAD_DIM]; /* times scaling */
    float s[MKVQ_TILE_ROWS][MKVQ_TILE_TOKENS];   /* scores, then probabilities */
    float plain[MKVQ_TILE_ROWS * MKVQ_MAX_HEAD_DIM], rotated[MKVQ_TILE_ROWS * MKVQ_MAX_HEAD_DIM];
    float largest[MKVQ_TILE_ROWS], sum[MKVQ_TILE_ROWS];
    int any_rotated;
    query_tile queries;
    weight_tile weights;
} attend_state;

static const float LOG2E = 1.44269504088896341f;

/* 2^x, relative error below 2e-7; 0 below -126; NaN stays. */
static inline vf exp2_vector(vf x)
{
    const vf y = vf_max(vf_set1(-126.0f), vf_min(vf_set1(126.0f), x)), n = vf_round(y),
             f = vf_sub(y, n);
    vf p = vf_set1(1.535336188319500e-4f); /* minimax of 2^f on [-1/2, 1/2] */
    p = vf_fma(p, f, vf_set1(1.339887440266574e-3f));
    p = vf_fma(p, f, vf_set1(9.618437357674640e-3f));
    p = vf_fma(p, f, vf_set1(5.550332471162809e-2f));
    p = vf_fma(p, f, vf_set1(2.402264791363012e-1f));
    p = vf_fma(p, f, vf_set1(6.931472028550421e-1f));
    p = vf_fma(p, f, vf_set1(1.0f));
    return vf_zero_below(vf_mul(p, vf_pow2(n)), x, -126.0f);
}

static inline float exp2_scalar(float x)
{
    float lanes[8];
    vf_store(lanes, exp2_vector(vf_set1(x)));
    return lanes[0];
}

static inline float load_mask(const uint8_t *p, int dtype)
{
    float x;
    uint16_t half;
    if (dtype == MKVQ_BOOL)
        return *p ? 0.0f : -INFINITY;
    if (dtype == MKVQ_F32) {
        memcpy(&x, p, 4);
        return x;
    }
    memcpy(&half, p, 2);
    return dtype == MKVQ_F16 ? mkvq_f16_to_f32(half) : mkvq_bf16_to_f32(half);
}

/* Softcap and mask of n scores that begin at token `position` of the row. */
static void mask_scores(attend_state *w, int64_t position, int n)
{
    const mkvq_attend_args *a = w->args;
    const int64_t group = a->q.shape[1] / a->history->kv_heads;
    for (int r = 0; r < w->rows; r++) {
        float *s = w->s[r];
        const int64_t query = (w->first_row + r) / group,
                      head = w->head * group + (w->first_row + r) % group;
        if (a->softcap != 0.0f)
            for (int t = 0; t < n; t++)
                s[t] = a->softcap * tanhf(s[t] / a->softcap);
        if (a->mask_kind == MKVQ_MASK_CAUSAL) {
            const int64_t last =
                w->total - a->q.shape[2] + query - position; /* newest token the query may see */
            for (int64_t t = last < 0 ? 0 : last + 1; t < n; t++)
                s[t] = -INFINITY;
        } else if (a->mask_kind == MKVQ_MASK_ARRAY) {
            const int64_t step = a->mask.stride[3] * mkvq_dtype_bytes(a->mask.dtype);
            const uint8_t *p = mkvq_at(&a->mask, w->row, head, query) +
                               ((a->start ? a->start[w->row] : 0) + position) * step;
            for (int t = 0; t < n; t++, p += step) {
                const float m = load_mask(p, a->mask.dtype);
                s[t] = m == -INFINITY ? m : s[t] + m; /* a hidden NaN key stays hidden */
            }
        }
    }
}

/* Turns n scores into probabilities relative to the running maximum; sums and outputs so far
 * follow a new maximum. */
static void soften(attend_state *w, int n)
{
    const int dim = (int)w->args->q.shape[3], end = (n + 7) / 8 * 8;
    for (int r = 0; r < w->rows; r++) {
        float *s = w->s[r];
        for (int t = n; t < end; t++)
            s[t] = -INFINITY;
        vf top = vf_set1(w->largest[r]);
        for (int t = 0; t < end; t += 8)
            top = vf_max(top, vf_load(s + t));
        const float old = w->largest[r], now = vf_hmax(top);
        if (now > old) {
            const float shrink = old == -INFINITY ? 0.0f : exp2_scalar((old - now) * LOG2E);
            w->largest[r] = now, w->sum[r] *= shrink;
            for (int c = 0; c < dim; c += 8) {
                float *plain = w->plain + r * MKVQ_MAX_HEAD_DIM + c,
                      *rotated = w->rotated + r * MKVQ_MAX_HEAD_DIM + c;
                vf_store(plain, vf_mul(vf_load(plain), vf_set1(shrink)));
                vf_store(rotated, vf_mul(vf_load(rotated), vf_set1(shrink)));
            }
        }
        const vf base = vf_set1(w->largest[r] == -INFINITY ? 0.0f : w->largest[r]);
        vf sum = vf_set1(0.0f);
        for (int t = 0; t < end; t += 8) {
            const vf p = exp2_vector(vf_mul(vf_sub(vf_load(s + t), base), vf_set1(LOG2E)));
            vf_store(s + t, p);
            sum = vf_add(sum, p);
        }
        w->sum[r] += vf_sum(sum);
    }
}

static void attend_exact(attend_state *w, const uint8_t *k, const uint8_t *v, const mkvq_view *kv,
                         const mkvq_view *vv, int64_t n, int64_t position)
{
    const int64_t k_step = kv->stride[2] * mkvq_dtype_bytes(kv->dtype),
                  v_step = vv->stride[2] * mkvq_dtype_bytes(vv->dtype);
    const int dim = (int)w->args->q.shape[3];
    for (int64_t t = 0; t < n; t += MKVQ_TILE_TOKENS) {
        const int count = n - t < MKVQ_TILE_TOKENS ? (int)(n - t) : MKVQ_TILE_TOKENS;
        score_exact(w->s, k + t * k_step, k_step, kv->dtype, kv->stride[3], dim, w->q, w->padded,
                    count);
        mask_scores(w, position + t, count);
        soften(w, count);
        value_exact(w->plain, w->s, v + t * v_step, v_step, vv->dtype, vv->stride[3], dim,
                    w->padded, count);
    }
}

static int64_t attend_record(attend_state *w, const uint8_t *record, const uint16_t *mu,
                             int64_t position)
{
    mkvq_layout l;
    mkvq_layout_read(&l, record);
    const int dim = l.head.head_dim, tokens = l.head.tokens;
    const mkvq_view dense = {NULL, {0}, {0, 0, dim, 1}, l.head.dtype};
    if (l.head.kind == MKVQ_KIND_EXACT) {
        attend_exact(w, record + l.exact_keys, record + l.values, &dense, &dense, tokens, position);
        return tokens;
    }
    gather_queries(&w->queries, &l, w->q, w->padded,
                   l.head.flags & MKVQ_FLAG_REFERENCE ? mu : NULL);
    for (int t = 0; t < tokens; t += MKVQ_TILE_TOKENS) {
        const int n = tokens - t < MKVQ_TILE_TOKENS ? tokens - t : MKVQ_TILE_TOKENS;
        score_coded(w->s, record, &l, &w->queries, w->q, w->padded, t, t + n);
        mask_scores(w, position + t, n);
        soften(w, n);
        if (!l.head.value_bits) {
            const int64_t step = dim * mkvq_dtype_bytes(l.head.dtype);
            value_exact(w->plain, w->s, record + l.values + t * step, step, l.head.dtype, 1, dim,
                        w->padded, n);
        } else {
            const int rotated = l.head.flags & MKVQ_FLAG_ROTATION;
            value_coded(rotated ? w->rotated : w->plain, w->s, record, &l, &w->weights, w->padded,
                        t, n);
            w->any_rotated |= rotated;
        }
    }
    return tokens;
}

static void finish(attend_state *w)
{
    const mkvq_attend_args *a = w->args;
    const int64_t group = a->q.shape[1] / a->history->kv_heads;
    const int dim = (int)a->q.shape[3];
    for (int r = 0; r < w->rows; r++) {
        float *out = w->plain + r * MKVQ_MAX_HEAD_DIM,
              *rotated = w->rotated + r * MKVQ_MAX_HEAD_DIM, sum = w->sum[r];
        const int64_t query = (w->first_row + r) / group,
                      head = w->head * group + (w->first_row + r) % group;
        if (w->any_rotated) {
            hadamard(rotated, dim);
            for (int c = 0; c < dim; c += 8)
                vf_store(out + c, vf_add(vf_load(out + c), vf_load(rotated + c)));
        }
        if (a->sink_logits && w->largest[r] != -INFINITY)
            sum += expf(a->sink_logits[head] - w->largest[r]);
        const float inverse = sum == 0.0f ? 0.0f : 1.0f / sum; /* nothing to see: zeros */
        for (int c = 0; c < dim; c += 8)
            vf_store(out + c, vf_mul(vf_load(out + c), vf_set1(inverse)));
        store_row(mkvq_at(&a->out, w->row, head, query), a->out.dtype, a->out.stride[3], out, dim);
    }
}

static void attend_unit(const mkvq_attend_args *a, int64_t row, int64_t head, int64_t tile)
{
    const mkvq_history *h = a->history;
    const int64_t group = a->q.shape[1] / h->kv_heads, all = group * a->q.shape[2];
    const int dim = (int)a->q.shape[3];
    attend_state w;
    w.args = a, w.row = row, w.head = head, w.first_row = tile * MKVQ_TILE_ROWS;
    w.rows = all - w.first_row < MKVQ_TILE_ROWS ? (int)(all - w.first_row) : MKVQ_TILE_ROWS;
    w.padded = w.rows <= 2 ? w.rows : w.rows <= 4 ? 4 : 8;
    w.any_rotated = 0;
    memset(w.q, 0, sizeof w.q);
    memset(w.s, 0, sizeof w.s);
    memset(w.plain, 0, sizeof w.plain);
    memset(w.rotated, 0, sizeof w.rotated);
    for (int r = 0; r < w.rows; r++) {
        float *q = w.q + r * MKVQ_MAX_HEAD_DIM;
        const int64_t query = (w.first_row + r) / group,
                      query_head = head * group + (w.first_row + r) % group;
        load_row(q, mkvq_at(&a->q, row, query_head, query), a->q.dtype, a->q.stride[3], dim);
        for (int c = 0; c < dim; c += 8)
            vf_store(q + c, vf_mul(vf_load(q + c), vf_set1(a->scaling)));
        w.largest[r] = -INFINITY, w.sum[r] = 0.0f;
    }
    const int64_t exact = a->exact[row], sinks = exact < a->sink_length ? exact : a->sink_length;
    const uint16_t *mu = h->mu ? h->mu + (row * h->kv_heads + head) * dim : NULL;
    int64_t position = sinks;
    w.total = exact;
    for (int64_t j = 0; j < h->blocks[row]; j++) {
        const uint8_t *record = mkvq_record_at(h, row, head, j);
        w.total += ((const mkvq_header *)(const void *)record)->tokens;
    }
    attend_exact(&w, mkvq_at(&a->k, row, head, 0), mkvq_at(&a->v, row, head, 0), &a->k, &a->v,
                 sinks, 0);
    for (int64_t j = 0; j < h->blocks[row]; j++)
        position += attend_record(&w, mkvq_record_at(h, row, head, j), mu, position);
    attend_exact(&w, mkvq_at(&a->k, row, head, sinks), mkvq_at(&a->v, row, head, sinks), &a->k,
                 &a->v, exact - sinks, position);
    finish(&w);
}
