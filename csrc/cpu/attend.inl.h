/* attend.inl.h - attention of up to eight query rows over sinks, a run of packed blocks, window, in
 * one online softmax; and merging the runs of a head.
 *
 * A query row is a pair (query position, query head of the group); all rows of a tile share each
 * reading of the codes. Tokens are taken in pieces of at most MKVQ_TILE_TOKENS. Scores are in units
 * of ln 2, so that probabilities are powers of two. Rotated and plain values are summed apart; the
 * rotation is undone once per query row and run. */
typedef struct {
    const mkvq_attend_args *args;
    int64_t row, head, first_row; /* query row 0 of the tile, counted over positions * group */
    int rows, exact, any_rotated;
    int64_t total; /* tokens of this batch row, where a mask needs them */
    float largest[MKVQ_TILE_ROWS], sum[MKVQ_TILE_ROWS];
    float reference[MKVQ_TILE_ROWS];            /* sum of q mu */
    float q[MKVQ_TILE_ROWS][MKVQ_MAX_HEAD_DIM]; /* times scaling / ln 2 */
    float q_of[MKVQ_MAX_HEAD_DIM][8];           /* the same, [channel][row] */
    float s[MKVQ_TILE_ROWS][MKVQ_TILE_TOKENS];  /* scores, then probabilities */
    float plain[MKVQ_TILE_ROWS][MKVQ_MAX_HEAD_DIM], rotated[MKVQ_TILE_ROWS][MKVQ_MAX_HEAD_DIM];
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

/* ---- masks ----------------------------------------------------------------------------------- */
/* n elements, at most eight, of a mask row: -inf where hidden, else what is added. */
static inline vf load_mask(const uint8_t *p, int dtype, int64_t stride, int n)
{
    uint8_t room[8 * 4] = {0};
    if (n < 8) { /* nothing may be read behind the row's end */
        copy_row(room, p, dtype, stride, n);
        p = room, stride = 1;
    }
    if (dtype != MKVQ_BOOL) {
        const vf x = load8(p, dtype, stride);
        return vf_hide_below(vf_max(vf_set1(-FLT_MAX), vf_mul(x, vf_set1(LOG2E))), x, -FLT_MAX);
    }
    if (stride != 1) {
        copy_row(room, p, dtype, stride, 8);
        p = room;
    }
    return vf_hide_below(vf_set1(0.0f), vf_from_vi(vi_load_u8(p)), 0.5f);
}

/* Softcap and mask of n scores that begin at token `position` of the row. */
static void mask_scores(attend_state *w, int64_t position, int n)
{
    const mkvq_attend_args *a = w->args;
    const int64_t group = a->q.shape[1] / a->history->kv_heads;
    const float cap = a->softcap * LOG2E;
    for (int r = 0; r < w->rows && (a->softcap != 0.0f || a->mask_kind); r++) {
        float *s = w->s[r];
        const int64_t query = (w->first_row + r) / group,
                      head = w->head * group + (w->first_row + r) % group;
        if (a->softcap != 0.0f)
            for (int t = 0; t < n; t++)
                s[t] = cap * tanhf(s[t] / cap);
        if (a->mask_kind == MKVQ_MASK_CAUSAL) {
            const int64_t last =
                w->total - a->q.shape[2] + query - position; /* newest token the query may see */
            for (int64_t t = last < 0 ? 0 : last + 1; t < n; t++)
                s[t] = -INFINITY;
        } else if (a->mask_kind == MKVQ_MASK_ARRAY) {
            const int64_t step = a->mask.stride[3] * mkvq_dtype_bytes(a->mask.dtype);
            const uint8_t *p = mkvq_at(&a->mask, w->row, head, query) +
                               ((a->start ? a->start[w->row] : 0) + position) * step;
            for (int t = 0; t < n; t += 8, p += 8 * step) {
                const vf m = load_mask(p, a->mask.dtype, a->mask.stride[3], n - t < 8 ? n - t : 8);
                /* a hidden NaN key stays hidden */
                vf_store(s + t, vf_hide_below(vf_add(vf_load(s + t), m), m, -FLT_MAX));
            }
        }
    }
}

/* ---- softmax --------------------------------------------------------------------------------- */
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
            const float shrink = old == -INFINITY ? 0.0f : exp2_scalar(old - now);
            w->largest[r] = now, w->sum[r] *= shrink;
            for (int c = 0; c < dim; c += 8) {
                float *plain = w->plain[r] + c, *rotated = w->rotated[r] + c;
                vf_store(plain, vf_mul(vf_load(plain), vf_set1(shrink)));
                vf_store(rotated, vf_mul(vf_load(rotated), vf_set1(shrink)));
            }
        }
        const vf base = vf_set1(w->largest[r] == -INFINITY ? 0.0f : w->largest[r]);
        vf sum = vf_set1(0.0f);
        for (int t = 0; t < end; t += 8) {
            const vf p = exp2_vector(vf_sub(vf_load(s + t), base));
            vf_store(s + t, p);
            sum = vf_add(sum, p);
        }
        w->sum[r] += vf_sum(sum);
    }
}

/* ---- pieces of the history ------------------------------------------------------------------- */
static void attend_exact(attend_state *w, const uint8_t *k, const uint8_t *v, const mkvq_view *kv,
                         const mkvq_view *vv, int64_t n, int64_t position)
{
    const int64_t k_step = kv->stride[2] * mkvq_dtype_bytes(kv->dtype),
                  v_step = vv->stride[2] * mkvq_dtype_bytes(vv->dtype);
    const int dim = (int)w->args->q.shape[3];
    for (int64_t t = 0; t < n; t += MKVQ_TILE_TOKENS) {
        const int count = n - t < MKVQ_TILE_TOKENS ? (int)(n - t) : MKVQ_TILE_TOKENS;
        score_exact(w->s, k + t * k_step, k_step, kv->dtype, kv->stride[3], dim, w->q, w->rows,
                    count);
        mask_scores(w, position + t, count);
        soften(w, count);
        value_exact(w->plain, w->s, v + t * v_step, v_step, vv->dtype, vv->stride[3], dim, w->rows,
                    count);
    }
}

/* Sum of q mu over the coded channels of a record. */
static void reference_of(const attend_state *w, const mkvq_layout *l, const uint16_t *mu,
                         float *reference)
{
    vf sum = vf_load(w->reference);
    if (!(l->head.flags & MKVQ_FLAG_REFERENCE))
        sum = vf_set1(0.0f);
    else
        for (int i = l->coded; i < l->head.head_dim; i++) {
            const float m = mkvq_f16_to_f32(mu[l->order[i]]);
            sum = vf_sub(sum, vf_mul(vf_load(w->q_of[l->order[i]]), vf_set1(m)));
        }
    vf_store(reference, sum);
}

static inline void prefetch(const uint8_t *p, int64_t n)
{
    for (int64_t i = 0; i < n; i += 64)
        __builtin_prefetch(p + i);
}

/* `next`: where the next record begins, to be fetched meanwhile; it is about as long as this one. */
static int64_t attend_record(attend_state *w, const uint8_t *record, const uint16_t *mu,
                             int64_t position, const uint8_t *next)
{
    mkvq_layout l;
    float reference[8];
    mkvq_layout_read(&l, record);
    const int dim = l.head.head_dim, tokens = l.head.tokens;
    const mkvq_view dense = {NULL, {0}, {0, 0, dim, 1}, l.head.dtype};
    const int64_t half = mkvq_up64(l.nbytes / 2); /* of the next record, which is about as long */
    if (l.head.kind == MKVQ_KIND_EXACT) {
        attend_exact(w, record + l.exact_keys, record + l.values, &dense, &dense, tokens, position);
        return tokens;
    }
    prefetch(next, half);
    find_runs(&w->queries, record, &l, w->args->precision);
    reference_of(w, &l, mu, reference);
    for (int t = 0; t < tokens; t += MKVQ_TILE_TOKENS) {
        const int n = tokens - t < MKVQ_TILE_TOKENS ? tokens - t : MKVQ_TILE_TOKENS;
        score_coded(w->s, record, &l, &w->queries, (const float (*)[8])w->q_of, reference, w->rows,
                    t, n, w->args->precision);
        mask_scores(w, position + t, n);
        soften(w, n);
        if (t == 0)
            prefetch(next + half, half);
        if (!l.head.value_bits) {
            const int64_t step = dim * mkvq_dtype_bytes(l.head.dtype);
            value_exact(w->plain, w->s, record + l.values + t * step, step, l.head.dtype, 1, dim,
                        w->rows, n);
        } else {
            const int rotated = l.head.flags & MKVQ_FLAG_ROTATION;
            value_coded(rotated ? w->rotated : w->plain, w->s, record, &l, &w->weights, w->rows, t,
                        n, w->exact);
            w->any_rotated |= rotated;
        }
    }
    return tokens;
}

/* ---- units of work --------------------------------------------------------------------------- */
static void begin_tile(attend_state *w, const mkvq_attend_args *a, const mkvq_attend_plan *plan,
                       int64_t row, int64_t head, int64_t tile)
{
    const mkvq_history *h = a->history;
    const int64_t group = a->q.shape[1] / h->kv_heads, all = group * a->q.shape[2];
    const int dim = (int)a->q.shape[3];
    w->args = a, w->row = row, w->head = head, w->first_row = tile * plan->rows;
    w->rows = all - w->first_row < plan->rows ? (int)(all - w->first_row) : (int)plan->rows;
    w->exact = a->precision == MKVQ_PRECISION_EXACT, w->any_rotated = 0;
    for (int r = 0; r < w->rows; r++) {
        const int64_t query = (w->first_row + r) / group,
                      query_head = head * group + (w->first_row + r) % group;
        load_row(w->q[r], mkvq_at(&a->q, row, query_head, query), a->q.dtype, a->q.stride[3], dim);
        for (int c = 0; c < dim; c += 8) {
            vf_store(w->q[r] + c, vf_mul(vf_load(w->q[r] + c), vf_set1(a->scaling * LOG2E)));
            vf_store(w->plain[r] + c, vf_set1(0.0f));
            vf_store(w->rotated[r] + c, vf_set1(0.0f));
        }
        w->largest[r] = -INFINITY, w->sum[r] = 0.0f;
    }
    const uint16_t *mu = h->mu ? h->mu + (row * h->kv_heads + head) * dim : NULL;
    vf reference = vf_set1(0.0f);
    for (int c = 0; c < dim; c += 8) {
        vf x[8];
        for (int r = 0; r < 8; r++)
            x[r] = r < w->rows ? vf_load(w->q[r] + c) : vf_set1(0.0f);
        vf_transpose(x);
        for (int i = 0; i < 8; i++) {
            vf_store(w->q_of[c + i], x[i]);
            if (mu)
                reference = vf_fma(x[i], vf_set1(mkvq_f16_to_f32(mu[c + i])), reference);
        }
    }
    vf_store(w->reference, reference);
}

/* Rows of a partial result: largest score, sum of 2^(score - largest), the same sum of values. */
static void end_tile(attend_state *w, float *partial)
{
    const int dim = (int)w->args->q.shape[3];
    for (int r = 0; r < w->rows; r++, partial += 2 + dim) {
        partial[0] = w->largest[r], partial[1] = w->sum[r];
        if (w->any_rotated)
            hadamard(w->rotated[r], dim);
        for (int c = 0; c < dim; c += 8) {
            const vf x = vf_load(w->plain[r] + c);
            vf_store(partial + 2 + c, w->any_rotated ? vf_add(x, vf_load(w->rotated[r] + c)) : x);
        }
    }
}

/* Output rows of a tile from the partial results of all its runs. */
static void merge_unit(const mkvq_attend_args *a, const mkvq_attend_plan *plan, int64_t row,
                       int64_t head, int64_t tile, const float *partials)
{
    const int64_t group = a->q.shape[1] / a->history->kv_heads, all = group * a->q.shape[2];
    const int dim = (int)a->q.shape[3];
    const int64_t size = plan->rows * (2 + dim);
    for (int64_t i = tile * plan->rows; i < all && i < (tile + 1) * plan->rows; i++) {
        const float *first = partials + (i - tile * plan->rows) * (2 + dim);
        const int64_t query_head = head * group + i % group;
        float out[MKVQ_MAX_HEAD_DIM] = {0}, largest = -INFINITY, sum = 0.0f;
        for (int64_t run = 0; run < plan->runs; run++)
            largest = first[run * size] > largest ? first[run * size] : largest;
        for (int64_t run = 0; run < plan->runs; run++) {
            const float *part = first + run * size;
            const float shrink = part[0] == largest ? 1.0f : exp2_scalar(part[0] - largest);
            sum += part[1] * shrink;
            for (int c = 0; c < dim; c += 8)
                vf_store(out + c, vf_fma(vf_load(part + 2 + c), vf_set1(shrink), vf_load(out + c)));
        }
        if (a->sink_logits && largest != -INFINITY)
            sum += expf(a->sink_logits[query_head] - largest / LOG2E);
        const float inverse = sum == 0.0f ? 0.0f : 1.0f / sum; /* nothing to see: zeros */
        for (int c = 0; c < dim; c += 8)
            vf_store(out + c, vf_mul(vf_load(out + c), vf_set1(inverse)));
        store_row(mkvq_at(&a->out, row, query_head, i / group), a->out.dtype, a->out.stride[3], out,
                  dim);
    }
}

/* The record that this thread most likely reads next. */
static const uint8_t *next_record(const mkvq_history *h, int64_t row, int64_t head, int64_t block)
{
    if (block + 1 < h->blocks[row])
        return mkvq_record_at(h, row, head, block + 1);
    return mkvq_record_at(h, row, head + 1 < h->kv_heads ? head + 1 : head, 0);
}

/* One run of blocks; the sinks belong to the first run, the window to the last. */
static void attend_unit(const mkvq_attend_args *a, const mkvq_attend_plan *plan, int64_t row,
                        int64_t head, int64_t tile, int64_t run, float *partial)
{
    const mkvq_history *h = a->history;
    const int dim = (int)a->q.shape[3];
    const int64_t blocks = h->blocks[row], begin = blocks * run / plan->runs,
                  end = blocks * (run + 1) / plan->runs;
    const int64_t exact = a->exact[row], sinks = exact < a->sink_length ? exact : a->sink_length;
    const uint16_t *mu = h->mu ? h->mu + (row * h->kv_heads + head) * dim : NULL;
    int64_t position = sinks;
    attend_state w;
    begin_tile(&w, a, plan, row, head, tile);
    if (a->mask_kind) {
        w.total = exact + mkvq_tokens_before(h, row, blocks);
        position += mkvq_tokens_before(h, row, begin);
    }
    if (run == 0 && sinks) /* an empty buffer may have no address */
        attend_exact(&w, mkvq_at(&a->k, row, head, 0), mkvq_at(&a->v, row, head, 0), &a->k, &a->v,
                     sinks, 0);
    for (int64_t j = begin; j < end; j++) {
        const uint8_t *record = mkvq_record_at(h, row, head, j);
        position += attend_record(&w, record, mu, position, next_record(h, row, head, j));
    }
    if (run == plan->runs - 1 && exact > sinks)
        attend_exact(&w, mkvq_at(&a->k, row, head, sinks), mkvq_at(&a->v, row, head, sinks), &a->k,
                     &a->v, exact - sinks, position);
    if (plan->runs > 1) {
        end_tile(&w, partial);
        return;
    }
    float only[MKVQ_TILE_ROWS * (2 + MKVQ_MAX_HEAD_DIM)];
    end_tile(&w, only);
    merge_unit(a, plan, row, head, tile, only);
}
