// order.h - the stored order of a record's channels, by all threads of a block, one per channel.
#ifndef MKVQ_ORDER_H
#define MKVQ_ORDER_H
#include "device.h"

#include "../core.h"

// Channels of every tier among the channels of a warp.
struct order_room {
    uint8_t counts[MKVQ_MAX_HEAD_DIM / 32][MKVQ_TIERS];
};

// Tiers come as 8, 4, 3, 2, 1 bits, exact.
MKVQ_DEVICE int tier_rank(int tier)
{
    return tier == MKVQ_TIER_EXACT ? MKVQ_TIER_EXACT : MKVQ_TIER_8 - tier;
}

// Fills counts, stored order and `coded` from the tiers of the channels, and the index in stored order of
// every channel. Begins and ends with a sync_block; at least as many threads as channels.
MKVQ_DEVICE void order_channels(const uint8_t *tier, int dim, order_room *room, mkvq_layout *l,
                                uint8_t *stored)
{
    const int channel = thread_index(), warp = channel / 32, warps = (dim + 31) / 32;
    sync_block();
    const int mine = channel < dim ? tier[channel] : (int)MKVQ_TIERS;
    int at = 0;
    for (int t = 0; t < MKVQ_TIERS; t++) {
        const uint32_t same = ballot(0xffffffffu, mine == t);
        if (mine == t)
            at = count_bits(same & ((1u << channel % 32) - 1));
        if (channel % 32 == 0 && warp < warps)
            room->counts[warp][t] = (uint8_t)count_bits(same);
    }
    sync_block();
    if (channel < dim) {
        for (int w = 0; w < warps; w++)
            for (int t = 0; t < MKVQ_TIERS; t++)
                if (tier_rank(t) < tier_rank(mine) || (t == mine && w < warp))
                    at += room->counts[w][t];
        l->order[at] = (uint8_t)channel;
        stored[channel] = (uint8_t)at;
    }
    if (channel < MKVQ_TIERS) {
        int count = 0;
        for (int w = 0; w < warps; w++)
            count += room->counts[w][channel];
        l->counts[channel] = count;
        if (channel == MKVQ_TIER_EXACT)
            l->coded = dim - count;
    }
    sync_block();
}
#endif
