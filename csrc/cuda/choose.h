// choose.h - statistics of a block's channels, one octet each, and the tiers that follow from them.
#ifndef MKVQ_CHOOSE_H
#define MKVQ_CHOOSE_H
#include "pack_room.h"

#include "../cpu/budget.inl.h"

// Channel means, rounded to float16; false if one is not finite.
MKVQ_PHASE bool find_reference()
{
    pack_room *s = room();
    const int dim = s->job.codec.head_dim, tokens = s->job.codec.block_length;
    for (int c = 0; c < dim; c += tile_channels(tokens)) {
        const int channels = channels_from(c, s);
        bool bad = load_channels(c, channels, NULL, s);
        if (any_in_block(bad))
            return false;
        if (key_row() < channels) {
            const float *x = s->tile + key_row() * (tokens + 1);
            vf sum = vf_set1(0.0f);
            for (int t = 0; t < tokens; t += 8)
                sum = vf_add(sum, vf_load(x + t));
            const uint16_t half = mkvq_f32_to_f16(vf_sum(sum) / (float)tokens);
            bad = (half & 0x7c00) == 0x7c00;
            if (MKVQ_LEADS)
                s->half[c + key_row()] = half, s->mu[c + key_row()] = mkvq_f16_to_f32(half);
        }
        if (any_in_block(bad))
            return false;
    }
    return true;
}

// The block's reference is known, found now, or not needed: true; it does not fit: false.
MKVQ_DEVICE bool begin_block(pack_room *s)
{
    if (!mkvq_has_reference(&s->job.codec))
        return true;
    if (!s->block.known)
        return find_reference();
    const int c = thread_index(), dim = s->job.codec.head_dim;
    if (c < dim) {
        s->half[c] = s->job.args.mu[s->block.unit * dim + c];
        s->mu[c] = mkvq_f16_to_f32(s->half[c]);
    }
    sync_block();
    return true;
}

// Statistics of all channels; false if a key is not finite.
MKVQ_PHASE bool measure_block()
{
    pack_room *s = room();
    const int dim = s->job.codec.head_dim, tokens = s->job.codec.block_length;
    for (int c = 0; c < dim; c += tile_channels(tokens)) {
        const int channels = channels_from(c, s);
        if (any_in_block(load_channels(c, channels, mu_of(s), s)))
            return false;
        if (key_row() < channels)
            measure_channel(&s->job.codec, s->tile + key_row() * (tokens + 1), c + key_row(),
                            &s->stats);
        sync_block();
    }
    return true;
}

// Of the channel with this many before it.
MKVQ_DEVICE int tier_at(const uint16_t *pattern, int rank)
{
    int t = MKVQ_TIER_EXACT;
    while (t > 0 && rank >= pattern[t])
        rank -= pattern[t--];
    return t;
}

// Channels before this one by falling A, ties by rising index; the bits of a float >= 0 order like it.
MKVQ_DEVICE int rank_of(const float *score, int dim, int channel)
{
    const uint32_t mine = mkvq_bits(score[channel]);
    int rank = 0;
    for (int c = 0; c < dim; c++) {
        const uint32_t other = mkvq_bits(score[c]);
        rank += other > mine || (other == mine && c < channel);
    }
    return rank;
}

// Expected logit error of a pattern, or NO_FIT, by one thread: the sum has an order.
MKVQ_DEVICE float pattern_cost(const pack_room *s, const float *importance, const uint16_t *pattern)
{
    float cost = 0.0f;
    bool fits = true;
    for (int c = 0; c < s->job.codec.head_dim; c++) {
        const int t = tier_at(pattern, s->rank[c]);
        if (t == MKVQ_TIER_EXACT)
            continue;
        const float weight = importance ? importance[c] * importance[c] : 1.0f;
        const float error = channel_error(&s->job.codec, &s->stats, c, t);
        fits = fits && error != NO_FIT;
        cost += weight * error;
    }
    return fits ? cost : NO_FIT;
}

// The pattern with the least cost, -1 if none can be coded.
MKVQ_DEVICE int best_pattern(pack_room *s)
{
    const int patterns = s->job.codec.n_patterns, p = thread_index();
    if (!has_choice(&s->job.codec))
        return 0;
    if (p < patterns)
        s->cost[p] = pattern_cost(s, s->block.importance, s->job.codec.patterns[p]);
    sync_block();
    int best = -1;
    for (int i = 0; i < patterns; i++)
        if (s->cost[i] != NO_FIT && (best < 0 || s->cost[i] < s->cost[best]))
            best = i;
    return best;
}

// The tiers of one head within its own budget, by one thread.
MKVQ_PHASE void spend_own_budget()
{
    pack_room *s = room();
    s->chosen = choose_within_budget(&s->job.codec, &s->stats, s->block.importance, s->block.record,
                                     s->tier);
}

// Tier id of every channel; false if the block must become an exact record.
MKVQ_DEVICE bool choose_block(pack_room *s)
{
    const mkvq_codec *codec = &s->job.codec;
    const int c = thread_index(), dim = codec->head_dim, only = only_tier(codec);
    if (only >= 0) {
        if (c < dim)
            s->tier[c] = (uint8_t)only;
        return true;
    }
    if (!measure_block())
        return false;
    if (mkvq_has_budget(codec)) {
        if (c == 0)
            spend_own_budget();
        sync_block();
        return s->chosen != 0;
    }
    if (c < dim)
        s->score[c] = channel_score(&s->stats, s->block.importance, c);
    sync_block();
    if (codec->allocate == MKVQ_ALLOCATE_THRESHOLD) {
        if (c < dim)
            s->tier[c] = (uint8_t)threshold_tier(codec, s->score[c]);
        return true;
    }
    if (c < dim)
        s->rank[c] = (uint8_t)rank_of(s->score, dim, c);
    sync_block();
    const int best = best_pattern(s);
    if (best < 0)
        return false;
    if (c < dim)
        s->tier[c] = (uint8_t)tier_at(codec->patterns[best], s->rank[c]);
    return true;
}
#endif
