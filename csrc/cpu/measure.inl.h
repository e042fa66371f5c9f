/* measure.inl.h - what the choice of tiers wants to know of the channels of a block. Where the lanes of
 * a vector are threads, MKVQ_LEADS is 1 in the one that writes. */
#define NO_FIT (-1.0f)

typedef struct {
    float spread[MKVQ_MAX_HEAD_DIM];   /* max - min of the block */
    float variance[MKVQ_MAX_HEAD_DIM]; /* for the cost model */
    float
        measured[MKVQ_MAX_HEAD_DIM]
                [MKVQ_TIERS]; /* error per token of each tier, NO_FIT where a group does not fit */
} channel_stats;

/* Whether the choice compares expected errors. */
MKVQ_FN int has_choice(const mkvq_codec *codec)
{
    return mkvq_has_budget(codec) ||
           (codec->allocate == MKVQ_ALLOCATE_PATTERNS && codec->n_patterns > 1);
}

MKVQ_FN int uses_tier(const mkvq_codec *codec, int tier)
{
    if (mkvq_has_budget(codec))
        return 1;
    for (int p = 0; p < codec->n_patterns; p++)
        if (codec->patterns[p][tier])
            return 1;
    return 0;
}

/* The tier of all channels where nothing depends on the data, else -1. */
MKVQ_FN int only_tier(const mkvq_codec *codec)
{
    if (codec->allocate != MKVQ_ALLOCATE_PATTERNS || codec->n_patterns > 1)
        return -1;
    for (int t = 0; t < MKVQ_TIERS; t++)
        if (codec->patterns[0][t] == codec->head_dim)
            return t;
    return -1;
}

/* Statistics of one channel, x[0..T). */
MKVQ_BODY void measure_channel(const mkvq_codec *codec, const float *x, int channel,
                               channel_stats *stats)
{
    const int tokens = codec->block_length;
    const group_range r = find_range(x, tokens);
    if (MKVQ_LEADS)
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
        const float variance = vf_sum(squares) / (float)tokens;
        if (MKVQ_LEADS)
            stats->variance[channel] = variance;
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
        if (MKVQ_LEADS)
            stats->measured[channel][tier] = fits ? error / (float)tokens : NO_FIT;
    }
}

/* Expected error per token of a channel in a tier below exact, or NO_FIT. */
MKVQ_FN float channel_error(const mkvq_codec *codec, const channel_stats *stats, int channel,
                            int tier)
{
    static const float error_of_bits[MKVQ_TIER_EXACT] = {0.56f, 0.125f, 0.031f, 0.0082f, 0.0003f};
    return codec->pattern_cost == MKVQ_COST_MODEL ? stats->variance[channel] * error_of_bits[tier]
                                                  : stats->measured[channel][tier];
}

/* A_d. */
MKVQ_FN float channel_score(const channel_stats *stats, const float *importance, int channel)
{
    return (importance ? importance[channel] : 1.0f) * (stats->spread[channel] / 3.0f) + 0.0f;
}

MKVQ_FN int threshold_tier(const mkvq_codec *codec, float score)
{
    return score > codec->threshold_high  ? MKVQ_TIER_EXACT
           : score > codec->threshold_low ? MKVQ_TIER_4
                                          : MKVQ_TIER_2;
}
