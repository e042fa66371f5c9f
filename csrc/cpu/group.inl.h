/* group.inl.h - coding one group: n contiguous floats (n a multiple of 8) to b-bit codes with
 * one scale and offset.
 *
 * docs/format.md section 4, "Coding a group", step by step. The lanes of a vector are the eight
 * partial sums. search.inl.h finds what search_all finds for eight groups at a time. */

typedef struct {
    float scale, offset;
    uint16_t scale_bits, offset_bits; /* as stored: e5m3 byte and int8, or two float16 */
    float limit;                      /* largest code; 0 in a constant group of fp16 metadata */
    int raised;
    float error;
    float inverse, shift; /* of quick_quotient; inverse 0: codes need a division */
} group_code;

typedef struct {
    float low, high;
} group_range;

MKVQ_BODY inline group_range find_range(const float *x, int n)
{
    vf low = vf_load(x), high = low;
    for (int i = 8; i < n; i += 8) {
        const vf y = vf_load(x + i);
        low = vf_min(low, y), high = vf_max(high, y);
    }
    return (group_range){vf_hmin(low), vf_hmax(high)};
}

/* Step 2: rounds scale and offset to their stored form; 0 if they do not fit. */
MKVQ_BODY inline int fit(float range, float low, int bits, int metadata, group_code *g)
{
    const float raw = range / (float)((1 << bits) - 1);
    low += 0.0f; /* -0 counts as +0 */
    g->limit = (float)((1 << bits) - 1), g->raised = 0;
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
MKVQ_BODY inline vf codes_of(vf x, const group_code *g)
{
    const vf z = vf_quotient(vf_sub(x, vf_set1(g->offset)), g->scale);
    return vf_round(vf_min(vf_max(z, vf_set1(0.0f)), vf_set1(g->limit)));
}

/* What step 4 asks of the group itself, its mean and the energy around it, and of the rule. */
typedef struct {
    float mean, energy;
    float weight; /* of the error along the group, beyond its squared error */
} group_moments;

MKVQ_BODY inline group_moments find_moments(const float *x, int n, int rule)
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
MKVQ_BODY inline float weighted_error(const float *x, int n, const group_code *g, group_moments m)
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
/* Step 1; the last ratio fills up the row. */
MKVQ_TABLE float search_ratios[5][8] = {{1, .9f, .8f, .7f, .6f, .5f, .4f, .4f},
                                        {1, .92f, .84f, .76f, .68f, .6f, .52f, .44f},
                                        {1, .93f, .86f, .79f, .72f, .65f, .65f, .65f},
                                        {1, .94f, .88f, .8f, .8f, .8f, .8f, .8f},
                                        {1, 1, 1, 1, 1, 1, 1, 1}};

MKVQ_BODY inline const float *ratios_of(int bits)
{
    return search_ratios[bits == 8 ? 4 : bits - 1];
}

/* The candidates one by one. */
MKVQ_BODY int search_all(const float *x, int n, group_range r, int bits, int metadata, int rule,
                         group_code *best)
{
    const float middle = (r.high + r.low) * 0.5f, half = (r.high - r.low) * 0.5f;
    const group_moments moments = find_moments(x, n, rule);
    int found = 0, scale = -1, offset = 0; /* as the candidate before has them stored */
    for (int i = 0; i < 8 && (i == 0 || ratios_of(bits)[i] < ratios_of(bits)[i - 1]); i++) {
        const float ratio = ratios_of(bits)[i];
        group_code g;
        g.inverse = g.shift = 0.0f;
        if (!fit(2.0f * ratio * half, middle - ratio * half, bits, metadata, &g))
            continue;
        if (g.scale_bits == scale && g.offset_bits == offset)
            continue; /* the same error: it cannot win */
        scale = g.scale_bits, offset = g.offset_bits;
        if (metadata == MKVQ_META_FP16_FP16 && r.high == r.low)
            g.limit = 0.0f;
        g.error = weighted_error(x, n, &g, moments);
        if (!found || g.error < best->error)
            *best = g, found = 1;
    }
    return found;
}

/* Chooses scale and offset of a group whose minimum and maximum are `r`; 0 if nothing fits.
 * `error` is set when asked for. */
MKVQ_BODY int code_group(const float *x, int n, group_range r, int bits, int metadata, int rule,
                         int need_error, group_code *best)
{
    const int search = rule != MKVQ_RANGE_MINMAX;
    best->inverse = best->shift = 0.0f;
    if (search && bits < 8)
        return search_all(x, n, r, bits, metadata, rule, best);
    const float middle = (r.high + r.low) * 0.5f, half = (r.high - r.low) * 0.5f;
    const float range = search ? 2.0f * half : r.high - r.low;
    const float low = search ? middle - half : r.low;
    if (!fit(range, low, bits, metadata, best))
        return 0;
    if (metadata == MKVQ_META_FP16_FP16 && r.high == r.low)
        best->limit = 0.0f;
    best->error = need_error ? weighted_error(x, n, best, find_moments(x, n, rule)) : 0.0f;
    return 1;
}
