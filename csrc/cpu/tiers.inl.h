/* tiers.inl.h - how many bits each key channel of a block gets: thresholds on A_d = I_d * S_d
 * (arXiv 2512.19206), or the best pattern of a menu; budget.inl.h for budgets. */
#define NO_FIT (-1.0f)

typedef struct {
    float spread[MKVQ_MAX_HEAD_DIM];   /* max - min of the block */
    float variance[MKVQ_MAX_HEAD_DIM]; /* for the cost model */
    float
        measured[MKVQ_MAX_HEAD_DIM]
                [MKVQ_TIERS]; /* error per token of each tier, NO_FIT where a group does not fit */
} channel_stats;

/* Whether the choice compares expected errors. */
static int has_choice(const mkvq_codec *codec)
{
    return mkvq_has_budget(codec) ||
           (codec->allocate == MKVQ_ALLOCATE_PATTERNS && codec->n_patterns > 1);
}

static int uses_tier(const mkvq_codec *codec, int tier)
{
    if (mkvq_has_budget(codec))
        return 1;
    for (int p = 0; p < codec->n_patterns; p++)
        if (codec->patterns[p][tier])
            return 1;
    return 0;
}

/* The tier of all channels where nothing depends on the data, else -1. */
static int only_tier(const mkvq_codec *codec)
{
    if (codec->allocate != MKVQ_ALLOCATE_PATTERNS || codec->n_patterns > 1)
        return -1;
    for (int t = 0; t < MKVQ_TIERS; t++)
        if (codec->patterns[0][t] == codec->head_dim)
            return t;
    return -1;
}

/* Statistics of one channel, x[0..T). */
static void measure_channel(const mkvq_codec *codec, const float *x, int channel,
                            channel_stats *stats)
{
    const int tokens = codec->block_length;
    const group_range r = find_range(x, tokens);
    stats->spread[channel] = r.high - r.low;
    if (!has_choice(codec))
        return;
    if (codec->pattern_cost == MKVQ_COST_MODEL) {
        vf sum = vf_set1(0.0f), squares = sum;
        for (int t = 0; t < tokens; t += 8)
            sum = vf_add(sum, vf_load(x + t));
        const vf mean = vf_set1(vf_sum(sum) / (float)tokens);
        for (int t = 0; t < tokens; t += 8) {
            const vf d = vf_sub(vf_load(x + t), mean);
            squares = vf_add(squares, vf_mul(d, d));
        }
        stats->variance[channel] = vf_sum(squares) / (float)tokens;
        return;
    }
    for (int tier = 0; tier < MKVQ_TIER_EXACT; tier++) {
        if (!uses_tier(codec, tier))
            continue;
        float error = 0.0f;
        int fits = 1;
        for (int t = 0; t < tokens && fits; t += codec->key_group) {
            group_code g;
            fits = code_group(x + t, codec->key_group, find_range(x + t, codec->key_group),
                              mkvq_tier_bits(tier), codec->key_metadata, codec->key_range, 1, &g);
            if (fits)
                error += g.error;
        }
        stats->measured[channel][tier] = fits ? error / (float)tokens : NO_FIT;
    }
}

/* Channels by falling A, ties by rising index: a merge sort of (A, ~index) keys; the bits of a
 * float >= 0 order like the float. */
static void rank_channels(const float *salience, int n, uint8_t *rank)
{
    uint64_t keys[2][MKVQ_MAX_HEAD_DIM], *from = keys[0], *to = keys[1];
    for (int c = 0; c < n; c++)
        from[c] = (uint64_t)mkvq_bits(salience[c]) << 32 | (uint32_t)(n - c);
    for (int width = 1; width < n; width *= 2) {
        for (int begin = 0; begin < n; begin += 2 * width) {
            const int middle = begin + width < n ? begin + width : n,
                      end = middle + width < n ? middle + width : n;
            for (int a = begin, b = middle, i = begin; i < end; i++)
                to[i] = b >= end || (a < middle && from[a] > from[b]) ? from[a++] : from[b++];
        }
        uint64_t *swap = from;
        from = to, to = swap;
    }
    for (int i = 0; i < n; i++)
        rank[i] = (uint8_t)(n - (int)(uint32_t)from[i]);
}

static void assign_pattern(const uint16_t *pattern, const uint8_t *rank, uint8_t *tier)
{
    int i = 0;
    for (int t = MKVQ_TIER_EXACT; t >= 0; t--)
        for (int n = pattern[t]; n > 0; n--)
            tier[rank[i++]] = (uint8_t)t;
}

/* Expected error per token of a channel in a tier below exact, or NO_FIT. */
static inline float channel_error(const mkvq_codec *codec, const channel_stats *stats, int channel,
                                  int tier)
{
    static const float error_of_bits[MKVQ_TIER_EXACT] = {0.56f, 0.125f, 0.031f, 0.0082f, 0.0003f};
    return codec->pattern_cost == MKVQ_COST_MODEL ? stats->variance[channel] * error_of_bits[tier]
                                                  : stats->measured[channel][tier];
}

/* Expected logit error of each assignment, or NO_FIT: channels outer, so that the sums of all
 * patterns, each in channel order, run side by side. */
static void pattern_costs(const mkvq_codec *codec, const channel_stats *stats,
                          const float *importance, uint8_t (*const tier)[MKVQ_MAX_HEAD_DIM],
                          float *cost)
{
    int fits[MKVQ_MAX_PATTERNS], used[MKVQ_TIER_EXACT];
    for (int p = 0; p < codec->n_patterns; p++)
        cost[p] = 0.0f, fits[p] = 1;
    for (int t = 0; t < MKVQ_TIER_EXACT; t++)
        used[t] = uses_tier(codec, t);
    for (int c = 0; c < codec->head_dim; c++) {
        const float weight = importance ? importance[c] * importance[c] : 1.0f;
        float term[MKVQ_TIERS] = {0}; /* exact: no error */
        int coded[MKVQ_TIERS] = {1, 1, 1, 1, 1, 1};
        for (int t = 0; t < MKVQ_TIER_EXACT; t++) {
            if (!used[t])
                continue;
            const float error = channel_error(codec, stats, c, t);
            coded[t] = error != NO_FIT;
            term[t] = weight * error;
        }
        for (int p = 0; p < codec->n_patterns; p++)
            cost[p] += term[tier[p][c]], fits[p] &= coded[tier[p][c]];
    }
    for (int p = 0; p < codec->n_patterns; p++)
        cost[p] = fits[p] ? cost[p] : NO_FIT;
}

/* Tier id of every channel; 0 if no pattern can be coded. */
static int choose_tiers(const mkvq_codec *codec, const channel_stats *stats,
                        const float *importance, uint8_t *tier)
{
    float salience[MKVQ_MAX_HEAD_DIM];
    uint8_t rank[MKVQ_MAX_HEAD_DIM], trial[MKVQ_MAX_PATTERNS][MKVQ_MAX_HEAD_DIM];
    const int dim = codec->head_dim;
    for (int c = 0; c < dim; c++)
        salience[c] = (importance ? importance[c] : 1.0f) * (stats->spread[c] / 3.0f) + 0.0f;
    if (codec->allocate == MKVQ_ALLOCATE_THRESHOLD) {
        for (int c = 0; c < dim; c++)
            tier[c] = salience[c] > codec->threshold_high  ? MKVQ_TIER_EXACT
                      : salience[c] > codec->threshold_low ? MKVQ_TIER_4
                                                           : MKVQ_TIER_2;
        return 1;
    }
    rank_channels(salience, dim, rank);
    if (!has_choice(codec)) {
        assign_pattern(codec->patterns[0], rank, tier);
        return 1;
    }
    float cost[MKVQ_MAX_PATTERNS];
    int best = -1;
    for (int p = 0; p < codec->n_patterns; p++)
        assign_pattern(codec->patterns[p], rank, trial[p]);
    pattern_costs(codec, stats, importance, trial, cost);
    for (int p = 0; p < codec->n_patterns; p++)
        if (cost[p] != NO_FIT && (best < 0 || cost[p] < cost[best]))
            best = p;
    if (best >= 0)
        memcpy(tier, trial[best], (size_t)dim);
    return best >= 0;
}
