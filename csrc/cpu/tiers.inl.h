/* tiers.inl.h - how many bits each key channel of a block gets: thresholds on A_d = I_d * S_d
 * (arXiv 2512.19206), or the best pattern of a menu; budget.inl.h for budgets. */

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
        salience[c] = channel_score(stats, importance, c);
    if (codec->allocate == MKVQ_ALLOCATE_THRESHOLD) {
        for (int c = 0; c < dim; c++)
            tier[c] = (uint8_t)threshold_tier(codec, salience[c]);
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
