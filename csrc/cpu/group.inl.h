/* group.inl.h - coding one group: n contiguous floats (n a multiple of 8) to b-bit codes with
 * one scale and offset.
 *
 * docs/format.md section 4, "Coding a group", step by step. The lanes of a vector are the eight
 * partial sums.
 *
 * The search is faster than it is written there, with the same result (search_fast). */

typedef struct {
    float scale, offset;
    uint16_t scale_bits, offset_bits; /* as stored: e5m3 byte and int8, or two float16 */
    int limit;                        /* largest code; 0 in a constant group of fp16 metadata */
    int raised;
    float error;
} group_code;

typedef struct {
    float low, high;
} group_range;

static inline group_range find_range(const float *x, int n)
{
    vf low = vf_load(x), high = low;
    for (int i = 8; i < n; i += 8) {
        const vf y = vf_load(x + i);
        low = vf_min(low, y), high = vf_max(high, y);
    }
    return (group_range){vf_hmin(low), vf_hmax(high)};
}

/* Step 2: rounds scale and offset to their stored form; 0 if they do not fit. */
static inline int fit(float range, float low, int bits, int metadata, group_code *g)
{
    const float raw = range / (float)((1 << bits) - 1);
    low += 0.0f; /* -0 counts as +0 */
    g->limit = (1 << bits) - 1, g->raised = 0;
    if (metadata == MKVQ_META_FP16_FP16) {
        g->scale_bits = mkvq_f32_to_f16(raw), g->offset_bits = mkvq_f32_to_f16(low);
        g->scale = mkvq_f16_to_f32(g->scale_bits), g->offset = mkvq_f16_to_f32(g->offset_bits);
        if (!(g->scale > 0x1p-24f))
            g->scale = 0x1p-24f, g->scale_bits = 1;
        return (g->scale_bits & 0x7c00) != 0x7c00 && (g->offset_bits & 0x7c00) != 0x7c00;
    }
    if (!(raw <= MKVQ_E5M3_MAX))
        return 0;
    int code = mkvq_e5m3_code(raw);
    const int first = code;
    float z = low / mkvq_offset_unit(mkvq_e5m3_value((uint8_t)code), bits);
    while (!(z > -127.5f && z < 127.5f)) { /* 127.5 rounds to 128 */
        if (++code > 255)
            return 0;
        z = low / mkvq_offset_unit(mkvq_e5m3_value((uint8_t)code), bits);
    }
    const float k = mkvq_round(z);
    g->scale = mkvq_e5m3_value((uint8_t)code);
    g->offset = k * mkvq_offset_unit(g->scale, bits) + 0.0f;
    g->scale_bits = (uint16_t)code, g->offset_bits = (uint8_t)(int8_t)k, g->raised = code != first;
    return 1;
}

/* Step 3, as whole floats: division, clamp, round (clamping first changes nothing and keeps the
 * rounding small). */
static inline vf codes_of(vf x, const group_code *g)
{
    const vf z = vf_div(vf_sub(x, vf_set1(g->offset)), vf_set1(g->scale));
    return vf_round(vf_min(vf_max(z, vf_set1(0.0f)), vf_set1((float)g->limit)));
}

/* What step 4 asks of the group itself, its mean and the energy around it, and of the rule. */
typedef struct {
    float mean, energy;
    float weight; /* of the error along the group, beyond its squared error */
} group_moments;

static inline group_moments find_moments(const float *x, int n, int rule)
{
    vf sum = vf_set1(0.0f), squares = sum;
    for (int i = 0; i < n; i += 8)
        sum = vf_add(sum, vf_load(x + i));
    const float mean = vf_sum(sum) / (float)n;
    for (int i = 0; i < n; i += 8) {
        const vf y = vf_sub(vf_load(x + i), vf_set1(mean));
        squares = vf_add(squares, vf_mul(y, y));
    }
    return (group_moments){mean, vf_sum(squares), rule == MKVQ_RANGE_SEARCH_MSE ? 0.0f : 15.0f};
}

/* Step 4: squared error, and more for its part along the group, which does not average out. */
static inline float weighted_error(const float *x, int n, const group_code *g, group_moments m)
{
    vf squares = vf_set1(0.0f), along = squares;
    for (int i = 0; i < n; i += 8) {
        const vf y = vf_load(x + i), c = codes_of(y, g);
        const vf d = vf_sub(y, vf_add(vf_mul(c, vf_set1(g->scale)), vf_set1(g->offset)));
        squares = vf_add(squares, vf_mul(d, d));
        along = vf_add(along, vf_mul(d, vf_sub(y, vf_set1(m.mean))));
    }
    const float a = vf_sum(along);
    return vf_sum(squares) + m.weight * (m.energy > 0.0f ? a / m.energy * a : 0.0f);
}

/* ---- search ---------------------------------------------------------------------------------- */
/* Step 1; the last ratio fills up the vector. */
static const float search_ratios[5][8] = {{1, .9f, .8f, .7f, .6f, .5f, .4f, .4f},
                                          {1, .92f, .84f, .76f, .68f, .6f, .52f, .44f},
                                          {1, .93f, .86f, .79f, .72f, .65f, .65f, .65f},
                                          {1, .94f, .88f, .8f, .8f, .8f, .8f, .8f},
                                          {1, 1, 1, 1, 1, 1, 1, 1}};

static inline const float *ratios_of(int bits)
{
    return search_ratios[bits == 8 ? 4 : bits - 1];
}

/* The candidates one by one. */
static int search_all(const float *x, int n, group_range r, int bits, int metadata, int rule,
                      group_code *best)
{
    const float middle = (r.high + r.low) * 0.5f, half = (r.high - r.low) * 0.5f;
    const group_moments moments = find_moments(x, n, rule);
    int found = 0, scale = -1, offset = 0; /* as the candidate before has them stored */
    for (int i = 0; i < 8 && (i == 0 || ratios_of(bits)[i] < ratios_of(bits)[i - 1]); i++) {
        const float ratio = ratios_of(bits)[i];
        group_code g;
        if (!fit(2.0f * ratio * half, middle - ratio * half, bits, metadata, &g))
            continue;
        if (g.scale_bits == scale && g.offset_bits == offset)
            continue; /* the same error: it cannot win */
        scale = g.scale_bits, offset = g.offset_bits;
        if (metadata == MKVQ_META_FP16_FP16 && r.high == r.low)
            g.limit = 0;
        g.error = weighted_error(x, n, &g, moments);
        if (!found || g.error < best->error)
            *best = g, found = 1;
    }
    return found;
}

/* Per ratio: what is stored (the offset in steps of its unit), what a code is worth, and the
 * factors of x that give the quotient. */
typedef struct {
    float scale[8], steps[8], offset[8], inverse[8], shift[8];
    unsigned distinct; /* bit i: differs from candidate i - 1; one that does not has its error */
} candidates;

/* Step 2 for all ratios at once, e5m3 metadata; 0 if one does not fit or raises its scale. */
static inline int fit_candidates(group_range r, int bits, candidates *c)
{
    const vf ratio = vf_load(ratios_of(bits)), half = vf_set1((r.high - r.low) * 0.5f);
    const vf range = vf_mul(vf_add(ratio, ratio), half);
    const vf raw = vf_div(range, vf_set1((float)((1 << bits) - 1)));
    const vf low = vf_add(vf_sub(vf_set1((r.high + r.low) * 0.5f), vf_mul(ratio, half)),
                          vf_set1(0.0f)); /* -0 counts as +0 */
    const vi u = vi_bits(raw), odd = vi_and1(vi_shr(u, 20), 1);
    const vi nearest = vi_and1(vi_add(vi_add(u, odd), vi_set1(0x7ffff)), 0xfff00000u);
    const vf scale = vf_max(vf_set1(MKVQ_E5M3_MIN), vf_of_bits(nearest));
    const vf unit = vf_mul(scale, vf_set1(mkvq_offset_unit(1.0f, bits))), z = vf_div(low, unit);
    const vf inverse = vf_div(vf_set1(1.0f), scale), steps = vf_round(z);
    const vf offset = vf_add(vf_mul(steps, unit), vf_set1(0.0f));
    if (!vf_all_below(raw, 240.00002f) || !vf_all_below(vf_abs(z), 127.5f))
        return 0;
    vf_store(c->scale, scale), vf_store(c->offset, offset), vf_store(c->steps, steps);
    vf_store(c->inverse, inverse);
    vf_store(c->shift, vf_sub(vf_set1(0.0f), vf_mul(offset, inverse)));
    c->distinct =
        255u & ~(vf_equal(scale, vf_previous(scale)) & vf_equal(steps, vf_previous(steps)));
    return 1;
}

/* What is added up for one candidate, eight elements at a time. */
typedef struct {
    vf squares, along, edge;
} search_sums;

/* Adds eight elements x, y = x - mean, for candidate i; `edge` becomes the largest distance of a
 * quotient from its code.
 *
 * There is no division: |offset / scale| is at most 127 (four bits), so that x * inverse + shift is
 * off by less than 3.5e-5 wherever it is not clamped. Where it lies farther than EDGE from a
 * rounding tie the code is right; other candidates are done again. code * scale is exact (four
 * bits by four): fusing it with the addition changes nothing. */
#define EDGE 0x1p-14f
static inline __attribute__((always_inline)) void try_candidate(vf x, vf y, const candidates *c,
                                                                int i, float limit, search_sums *t)
{
    const vf z = vf_clamp(vf_fma(x, vf_set1(c->inverse[i]), vf_set1(c->shift[i])), limit);
    const vf code = vf_round(z);
    t->edge = vf_widest(t->edge, vf_sub(z, code));
    const vf d = vf_sub(x, vf_fma(code, vf_set1(c->scale[i]), vf_set1(c->offset[i])));
    t->squares = vf_add(t->squares, vf_mul(d, d));
    t->along = vf_add(t->along, vf_mul(d, y));
}

/* The candidate as a code. */
static inline void get_candidate(const candidates *c, int i, int bits, float error, group_code *g)
{
    g->scale = c->scale[i], g->offset = c->offset[i];
    g->scale_bits = (uint16_t)((mkvq_bits(c->scale[i]) >> 20) - MKVQ_E5M3_BIAS);
    g->offset_bits = (uint8_t)(int8_t)c->steps[i];
    g->limit = (1 << bits) - 1, g->raised = 0, g->error = error;
}

/* Lane i: vf_sum of x[i]. */
static inline vf sums_of(vf x[8])
{
    vf_transpose(x);
    return vf_add(vf_add(vf_add(x[0], x[4]), vf_add(x[2], x[6])),
                  vf_add(vf_add(x[1], x[5]), vf_add(x[3], x[7])));
}

/* Errors of the candidates that came too near to a tie, by division. */
static vf exact_errors(const float *x, int n, const candidates *c, int bits, group_moments m,
                       const vf *edges, vf errors)
{
    float error[8];
    vf_store(error, errors);
    for (int i = 0; i < 8; i++) {
        group_code g;
        if (!(c->distinct >> i & 1) || vf_all_below(edges[i], 0.5f - EDGE))
            continue;
        get_candidate(c, i, bits, 0.0f, &g);
        error[i] = weighted_error(x, n, &g, m);
    }
    return vf_load(error);
}

/* Search with e5m3 metadata and at most four bits, two candidates at a time. */
static int search_fast(const float *x, int n, group_range r, int bits, int rule, group_code *best)
{
    candidates c;
    if (!fit_candidates(r, bits, &c))
        return search_all(x, n, r, bits, MKVQ_META_E5M3_INT8, rule, best);
    const float limit = (float)((1 << bits) - 1);
    const group_moments m = find_moments(x, n, rule);
    const vf zero = vf_set1(0.0f);
    vf squares[8], along[8], edges[8], widest = zero;
    for (int i = 0; i < 8; i++)
        squares[i] = vf_set1(INFINITY), along[i] = zero;
    for (unsigned left = c.distinct; left;) {
        const int a = __builtin_ctz(left);
        left &= left - 1;
        const int b = left ? __builtin_ctz(left) : a;
        left &= left - 1;
        search_sums first = {zero, zero, zero}, second = first;
        for (int t = 0; t < n; t += 8) {
            const vf at = vf_load(x + t), y = vf_sub(at, vf_set1(m.mean));
            try_candidate(at, y, &c, a, limit, &first);
            try_candidate(at, y, &c, b, limit, &second);
        }
        squares[a] = first.squares, along[a] = first.along, edges[a] = first.edge;
        squares[b] = second.squares, along[b] = second.along, edges[b] = second.edge;
        widest = vf_max(widest, vf_max(first.edge, second.edge));
    }
    vf errors = sums_of(squares);
    if (m.energy > 0.0f) {
        const vf sum = sums_of(along), share = vf_mul(vf_div(sum, vf_set1(m.energy)), sum);
        errors = vf_add(errors, vf_mul(vf_set1(m.weight), share));
    }
    if (!vf_all_below(widest, 0.5f - EDGE))
        errors = exact_errors(x, n, &c, bits, m, edges, errors);
    const float least = vf_hmin(errors);
    get_candidate(&c, __builtin_ctz(vf_equal(errors, vf_set1(least))), bits, least, best);
    return 1;
}

/* Chooses scale and offset of a group whose minimum and maximum are `r`; 0 if nothing fits.
 * `error` is set when asked for. */
static int code_group(const float *x, int n, group_range r, int bits, int metadata, int rule,
                      int need_error, group_code *best)
{
    const int search = rule != MKVQ_RANGE_MINMAX;
    if (search && bits < 8)
        return MKVQ_WIDE && metadata == MKVQ_META_E5M3_INT8
                   ? search_fast(x, n, r, bits, rule, best)
                   : search_all(x, n, r, bits, metadata, rule, best);
    const float middle = (r.high + r.low) * 0.5f, half = (r.high - r.low) * 0.5f;
    const float range = search ? 2.0f * half : r.high - r.low;
    const float low = search ? middle - half : r.low;
    if (!fit(range, low, bits, metadata, best))
        return 0;
    if (metadata == MKVQ_META_FP16_FP16 && r.high == r.low)
        best->limit = 0;
    best->error = need_error ? weighted_error(x, n, best, find_moments(x, n, rule)) : 0.0f;
    return 1;
}
