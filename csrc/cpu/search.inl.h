/* search.inl.h - the range search of up to eight groups of the same width side by side: lanes are
 * groups. e5m3 metadata, at most four bits.
 *
 * It finds what search_all finds, without its divisions and without its order of additions. The
 * errors it computes are those of docs/format.md section 4 up to the rounding of their sums, for
 * which there is a bound: a candidate whose error is the least by more than that is the winner. Where
 * two are closer, or anything else is unusual, the group is left to search_all.
 *
 * Codes come from a multiplication. v = x * inverse + shift is the quotient plus BASE + 1/2 plus
 * `edge`, a bound of how far it is off and how far the division of section 4 is. BASE puts the codes
 * 0 ... 15 into one binade of floats, so that the bits of v above FRACTION bits are the code, and the
 * code is certain where those below are worth at least 2 * edge. */
#define BASE 48.0f
#define FRACTION 18
#define WHOLE (~0u << FRACTION)

/* One unit of rounding. An element of at most 16 steps: x * inverse and offset * inverse are off by a
 * unit of the quotient and two of offset / scale together, shift and v by half a place below 64 plus
 * offset / scale; the division by two units of 16: 164 + 2 |offset / scale| in all. */
#define UNIT 0x1p-24f
#define EDGE_FIXED (180.0f * UNIT)
#define EDGE_OFFSET (3.0f * UNIT)

/* Two errors differ for sure where they do by this part: sums of n terms in the order of section 4
 * are off by n/8 + 5 units, ours by n/2 + 2, and so is the sum along the group, by the Cauchy-Schwarz
 * inequality of sqrt(squares * energy); that enters the error with 2 * sqrt(15). */
static inline float search_margin(int n)
{
    return (8.0f * (float)n + 128.0f) * UNIT;
}

/* One candidate of every group. */
typedef struct {
    vf scale, steps, offset, inverse, shift, edge;
} search_candidate;

/* Step 2 for one ratio; lanes where it fits without a raised scale. */
static inline unsigned fit_candidate(vf middle, vf half, float ratio, int bits, search_candidate *c)
{
    const vf range = vf_mul(vf_set1(2.0f * ratio), half);
    const vf raw = vf_div(range, vf_set1((float)((1 << bits) - 1)));
    const vf low = vf_add(vf_sub(middle, vf_mul(vf_set1(ratio), half)), vf_set1(0.0f));
    const vi u = vi_bits(raw), odd = vi_and1(vi_shr(u, 20), 1);
    const vi nearest = vi_and1(vi_add(vi_add(u, odd), vi_set1(0x7ffff)), 0xfff00000u);
    c->scale = vf_max(vf_set1(MKVQ_E5M3_MIN), vf_of_bits(nearest));
    const vf unit = vf_mul(c->scale, vf_set1(mkvq_offset_unit(1.0f, bits))), z = vf_div(low, unit);
    c->steps = vf_round(z);
    c->offset = vf_add(vf_mul(c->steps, unit), vf_set1(0.0f));
    c->inverse = vf_div(vf_set1(1.0f), c->scale);
    const vf ratio_of_offset = vf_mul(c->offset, c->inverse);
    c->edge = vf_add(vf_set1(EDGE_FIXED), vf_mul(vf_abs(ratio_of_offset), vf_set1(EDGE_OFFSET)));
    c->shift = vf_sub(vf_add(vf_set1(BASE + 0.5f), c->edge), ratio_of_offset);
    return vf_less(raw, vf_set1(240.00002f)) & vf_less(vf_abs(z), vf_set1(127.5f));
}

/* BASE plus the code in the upper bits. */
static inline vf quick_quotient(vf x, vf inverse, vf shift, float limit)
{
    return vf_clamp(vf_fma(x, inverse, shift), BASE + 0.5f, BASE + 0.5f + limit);
}

typedef struct {
    vf squares, along, least; /* least: of the parts below a code */
} search_sums;

static MKVQ_INLINE void add_element(vf x, vf y, const search_candidate *c, vf base, float limit,
                                    search_sums *s)
{
    const vf v = quick_quotient(x, c->inverse, c->shift, limit);
    const vf code = vf_of_bits(vi_and1(vi_bits(v), WHOLE));
    s->least = vf_min(s->least, vf_sub(v, code));
    const vf d = vf_sub(x, vf_fma(code, c->scale, base)); /* the value is exact: 15 bits */
    s->squares = vf_fma(d, d, s->squares);
    s->along = vf_fma(d, y, s->along);
}

/* x[n][8], y = x - mean */
static inline search_sums try_candidate(const float *x, const float *y, int n,
                                        const search_candidate *c, float limit)
{
    const search_candidate k = *c;
    const vf base = vf_sub(k.offset, vf_mul(vf_set1(BASE), k.scale)), one = vf_set1(1.0f);
    search_sums a = {vf_set1(0.0f), vf_set1(0.0f), one}, b = a;
    for (int t = 0; t < n; t += 2, x += 16, y += 16) {
        add_element(vf_load(x), vf_load(y), &k, base, limit, &a);
        add_element(vf_load(x + 8), vf_load(y + 8), &k, base, limit, &b);
    }
    return (search_sums){vf_add(a.squares, b.squares), vf_add(a.along, b.along),
                         vf_min(a.least, b.least)};
}

/* Sums of docs/format.md section 4 from the eight partial sums of every lane. */
static inline vf combine_sums(const vf x[8])
{
    return vf_add(vf_add(vf_add(x[0], x[4]), vf_add(x[2], x[6])),
                  vf_add(vf_add(x[1], x[5]), vf_add(x[3], x[7])));
}

/* Lane i: vf_sum of x[i]. */
static inline vf sums_of(vf x[8])
{
    vf_transpose(x);
    return combine_sums(x);
}

/* Middle and half of the range; y = x - mean, the mean summed as section 4 wants; energy of y. */
static vf center(const float *x, float *y, int n, vf *middle, vf *half)
{
    vf sum[8], low = vf_set1(INFINITY), high = vf_set1(-INFINITY);
    for (int j = 0; j < 8; j++)
        sum[j] = vf_set1(0.0f);
    for (int t = 0; t < n; t += 8) {
        MKVQ_UNROLL(8)
        for (int j = 0; j < 8; j++) {
            const vf z = vf_load(x + 8 * (t + j));
            sum[j] = vf_add(sum[j], z);
            low = vf_min(low, z), high = vf_max(high, z);
        }
    }
    *middle = vf_mul(vf_add(high, low), vf_set1(0.5f));
    *half = vf_mul(vf_sub(high, low), vf_set1(0.5f));
    const vf mean = vf_div(combine_sums(sum), vf_set1((float)n));
    vf energy[2] = {vf_set1(0.0f), vf_set1(0.0f)};
    for (int t = 0; t < n; t += 2) {
        MKVQ_UNROLL(2)
        for (int j = 0; j < 2; j++) {
            const vf z = vf_sub(vf_load(x + 8 * (t + j)), mean);
            vf_store(y + 8 * (t + j), z);
            energy[j] = vf_fma(z, z, energy[j]);
        }
    }
    return vf_add(energy[0], energy[1]);
}

/* x[n][8] from eight rows */
static inline void interleave(const float *const *rows, int n, float *x)
{
    for (int t = 0; t < n; t += 8) {
        vf r[8];
        for (int i = 0; i < 8; i++)
            r[i] = vf_load(rows[i] + t);
        vf_transpose(r);
        for (int i = 0; i < 8; i++)
            vf_store(x + 8 * (t + i), r[i]);
    }
}

/* Searches the groups rows[8][n]; returns the lanes that are done, others are for search_all. */
static unsigned search_octet(const float *const *rows, int n, int bits, int rule, group_code *best)
{
    float x[8 * MKVQ_MAX_BLOCK], y[8 * MKVQ_MAX_BLOCK];
    float error[8][8], scale[8][8], steps[8][8], offset[8][8], inverse[8][8], shift[8][8];
    const float limit = (float)((1 << bits) - 1);
    const vf weight = vf_set1(rule == MKVQ_RANGE_SEARCH_MSE ? 0.0f : 15.0f);
    vf middle, half, before_scale = vf_set1(0.0f), before_steps = before_scale;
    uint8_t uncertain[8] = {0};
    interleave(rows, n, x);
    const vf energy = center(x, y, n, &middle, &half);
    /* no term is lost to underflow that matters; a constant group is none of these */
    unsigned done = vf_less(vf_set1(0x1p-80f), energy);
    for (int i = 0; i < 8; i++)
        vf_store(error[i], vf_set1(INFINITY));
    for (int i = 0; i < 8 && (i == 0 || ratios_of(bits)[i] < ratios_of(bits)[i - 1]); i++) {
        search_candidate c;
        done &= fit_candidate(middle, half, ratios_of(bits)[i], bits, &c);
        const search_sums s = try_candidate(x, y, n, &c, limit);
        const vf share = vf_mul(vf_div(s.along, energy), s.along);
        vf_store(error[i], vf_add(s.squares, vf_mul(weight, share)));
        /* A code that may be the next one changes the square little, the sum along the group much:
         * then the squares are all that is known, and that from below. */
        unsigned unsure = vf_less(s.least, vf_add(c.edge, c.edge));
        uncertain[i] = (uint8_t)unsure;
        if (unsure) {
            float squares[8];
            vf_store(squares, vf_mul(s.squares, vf_set1(1.0f - 0x1p-10f)));
            for (; unsure; unsure &= unsure - 1)
                error[i][__builtin_ctz(unsure)] = squares[__builtin_ctz(unsure)];
        }
        /* stored as the candidate before: the same error, it cannot win */
        unsigned same = vf_equal(c.scale, before_scale) & vf_equal(c.steps, before_steps);
        for (; same; same &= same - 1)
            error[i][__builtin_ctz(same)] = INFINITY;
        before_scale = c.scale, before_steps = c.steps;
        vf_store(scale[i], c.scale), vf_store(steps[i], c.steps), vf_store(offset[i], c.offset);
        vf_store(inverse[i], c.inverse), vf_store(shift[i], c.shift);
    }
    vf errors[8]; /* lanes: candidates */
    for (int i = 0; i < 8; i++)
        errors[i] = vf_load(error[i]);
    vf_transpose(errors);
    for (int lane = 0; lane < 8; lane++) {
        const float least = vf_hmin(errors[lane]);
        const unsigned close =
            vf_less(errors[lane], vf_set1(least * (1.0f + search_margin(n)))) & 255u;
        const int i = close ? __builtin_ctz(close) : 0;
        if ((close & (close - 1)) || !(least > 0x1p-90f && least < 0x1p100f) ||
            (uncertain[i] >> lane & 1))
            done &= ~(1u << lane);
        if (!(done >> lane & 1))
            continue; /* for code_group: steps found here need not fit a byte */
        group_code *g = best + lane;
        g->scale = scale[i][lane], g->offset = offset[i][lane];
        g->scale_bits = (uint16_t)((mkvq_bits(g->scale) >> 20) - MKVQ_E5M3_BIAS);
        g->offset_bits = (uint8_t)(int8_t)steps[i][lane];
        g->limit = limit, g->raised = 0;
        g->inverse = inverse[i][lane], g->shift = shift[i][lane];
    }
    return done;
}

/* Codes `count` <= 8 groups of n elements and the same width; 0 if one does not fit. */
static int code_octet(const float *const *rows, int count, int n, int bits, int metadata, int rule,
                      int need_error, group_code *best)
{
    unsigned done = 0;
    /* fewer are searched faster one by one */
    if (MKVQ_WIDE && count > 2 && rule != MKVQ_RANGE_MINMAX && bits < 8 &&
        metadata == MKVQ_META_E5M3_INT8) {
        const float *all[8];
        for (int i = 0; i < 8; i++)
            all[i] = rows[i < count ? i : count - 1];
        done = search_octet(all, n, bits, rule, best);
    }
    for (int i = 0; i < count; i++) {
        if (!(done >> i & 1)) {
            if (!code_group(rows[i], n, find_range(rows[i], n), bits, metadata, rule, need_error,
                            best + i))
                return 0;
        } else if (need_error)
            best[i].error = weighted_error(rows[i], n, best + i, find_moments(rows[i], n, rule));
    }
    return 1;
}

/* Codes of eight elements of a group that has been searched here. */
static inline vi quick_codes(vf x, const group_code *g)
{
    const vf v = quick_quotient(x, vf_set1(g->inverse), vf_set1(g->shift), g->limit);
    return vi_and1(vi_shr(vi_bits(v), FRACTION), 15);
}

static inline vi find_codes(vf x, const group_code *g)
{
    return g->inverse != 0.0f ? quick_codes(x, g) : vi_from_vf(codes_of(x, g));
}
