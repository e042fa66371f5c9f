// attend_map.cuh - the header and channel map of a coded record: where sections lie, and for each coded
// channel where its weights go. A thread has a channel.
#ifndef MKVQ_ATTEND_MAP_CUH
#define MKVQ_ATTEND_MAP_CUH
#include "attend_planes.cuh"

// What fold_keys knows of a coded channel, in two words. x: channel, its unit of offsets (below),
// power and place of the weight of its entry, in bits 0, 8, 12 and 16. y: the last two for the third bit
// of a 3-bit code, whose weight is four times as large; NO_THIRD of others.
enum : uint32_t { NO_THIRD = 0xffffffffu };

// The unit of int8 offsets is scale * 2^(unit - 3); by tier.
MKVQ_DEVICE int unit_of(int tier)
{
    return tier == MKVQ_TIER_8 ? 5 : tier;
}

MKVQ_DEVICE uint32_t pack_place(entry_place e)
{
    return (uint32_t)e.power << 12 | (uint32_t)e.at << 16;
}

// Lanes that `plane` bits of three ballots give the tier.
MKVQ_DEVICE uint32_t lanes_of(const uint32_t plane[3], int tier)
{
    return (tier & 1 ? plane[0] : ~plane[0]) & (tier & 2 ? plane[1] : ~plane[1]) &
           (tier & 4 ? plane[2] : ~plane[2]);
}

MKVQ_DEVICE void find_sections(record_sections *s, const record_bytes &record, const int counts[6],
                               int dim)
{
    const mkvq_header *h = (const mkvq_header *)record.at(0); // 32 bytes stay together
    const int eight = counts[MKVQ_TIER_8], four = counts[MKVQ_TIER_4], three = counts[MKVQ_TIER_3];
    const int columns[4] = {(eight + 3) / 4, (four + 7) / 8,
                            (three + counts[MKVQ_TIER_2] + 15) / 16,
                            (three + counts[MKVQ_TIER_1] + 31) / 32};
    // divisions are seldom needed
    if (s->key_group != h->key_group || s->tokens != h->tokens)
        s->key_groups = h->tokens / h->key_group;
    if (!h->value_bits)
        s->value_groups = 0;
    else
        s->value_groups = h->value_group == dim ? 1 : (dim + h->value_group - 1) / h->value_group;
    s->tokens = h->tokens, s->key_group = h->key_group, s->value_group = h->value_group;
    s->value_bits = h->value_bits;
    s->value_bound = mkvq_float((uint32_t)h->value_fold << 16);
    s->dtype = h->dtype, s->flags = h->flags;
    s->key_metadata = h->metadata & 15, s->value_metadata = h->metadata >> 4;
    s->exact = counts[MKVQ_TIER_EXACT], s->coded = dim - s->exact;
    int all = 0, step = 0;
    for (int i = 0; i < 4; i++) {
        s->columns[i] = columns[i], s->step[i] = step;
        all += columns[i], step += plane_steps(8u >> i, (unsigned)columns[i]);
    }
    s->steps = step;
    const int key_bytes = mkvq_meta_bytes(s->key_metadata),
              value_bytes = mkvq_meta_bytes(s->value_metadata);
    const uint32_t key_meta = (uint32_t)mkvq_up64(MKVQ_HEADER_BYTES + 3 * dim / 8);
    s->key_meta = key_meta;
    s->value_meta = key_meta + (uint32_t)(2 * key_bytes * s->key_groups * s->coded);
    s->key_columns =
        (s->value_meta + (uint32_t)(2 * value_bytes * s->tokens * s->value_groups) + 63) / 64 * 64;
    s->exact_keys = s->key_columns + (uint32_t)(4 * s->tokens * all);
    s->values = s->exact_keys + (uint32_t)(s->exact * s->tokens * mkvq_dtype_bytes(s->dtype));
}

// Of numbers that add up to less than 256.
MKVQ_DEVICE int add_bytes(uint32_t x)
{
    return (int)(x * 0x01010101u >> 24);
}

// Ranks of channels inside their tier come from ballots; lane t of a warp counts those of tier t.
template <int ROWS>
MKVQ_DEVICE void read_map(const attend_tile<ROWS> &u, const record_bytes &record)
{
    constexpr int STEP = attend_tile<ROWS>::STEP;
    const uint32_t all = (uint32_t)ALL_LANES;
    const int c = thread_index(), bit = MKVQ_HEADER_BYTES * 8 + 3 * c, id = u.lane & 7;
    int tier = 7; // none
    if (c < u.a.dim)
        tier =
            (*record.at((uint32_t)bit / 8) | *record.at((uint32_t)bit / 8 + 1) << 8) >> (bit % 8) &
            7;
    uint32_t plane[3];
    MKVQ_UNROLL_ALL
    for (int i = 0; i < 3; i++)
        plane[i] = ballot(all, tier >> i & 1);
    int rank = count_bits(lanes_of(plane, tier) & ((1u << u.lane) - 1));
    if (u.lane < 8)
        u.m.channels_of[id][u.warp] = (uint8_t)count_bits(lanes_of(plane, id));
    sync_block();
    const uint2 n = *(const uint2 *)u.m.channels_of[id];
    const uint32_t low = u.warp < 4 ? (1u << 8 * u.warp) - 1 : 0xffffffffu,
                   high = u.warp > 4 ? (1u << 8 * (u.warp - 4)) - 1 : 0;
    const int total = add_bytes(n.x) + add_bytes(n.y),
              before = add_bytes(n.x & low) + add_bytes(n.y & high);
    int counts[MKVQ_TIERS];
    rank += (int)shuffle(all, (uint32_t)before, tier);
    MKVQ_UNROLL_ALL
    for (int t = 0; t < MKVQ_TIERS; t++)
        counts[t] = (int)shuffle(all, (uint32_t)total, t);
    const unsigned n8 = (unsigned)counts[MKVQ_TIER_8], n4 = (unsigned)counts[MKVQ_TIER_4],
                   n3 = (unsigned)counts[MKVQ_TIER_3], n2 = (unsigned)counts[MKVQ_TIER_2],
                   n1 = (unsigned)counts[MKVQ_TIER_1];
    if (thread_index() == 0)
        find_sections(&u.m.record, record, counts, u.a.dim);
    // first steps of the planes of 4, 2 and 1 bits
    const int step4 = plane_steps(8, (n8 + 3) / 4), step2 = step4 + plane_steps(4, (n4 + 7) / 8),
              step1 = step2 + plane_steps(2, (n3 + n2 + 15) / 16);
    unsigned stored = (unsigned)rank, entry = (unsigned)rank, bits = 8;
    int step = 0;
    uint32_t third = NO_THIRD;
    if (tier == MKVQ_TIER_EXACT)
        stored += n8 + n4 + n3 + n2 + n1;
    else if (tier == MKVQ_TIER_4)
        stored += n8, bits = 4, step = step4;
    else if (tier == MKVQ_TIER_3) {
        stored += n8 + n4, bits = 2, step = step2;
        entry_place e = find_entry(1, entry, STEP);
        e.at += step1 * STEP;
        third = pack_place(e);
    } else if (tier == MKVQ_TIER_2)
        stored += n8 + n4 + n3, entry += n3, bits = 2, step = step2;
    else if (tier == MKVQ_TIER_1)
        stored += n8 + n4 + n3 + n2, entry += n3, bits = 1, step = step1;
    entry_place e = find_entry(bits, entry, STEP);
    e.at += step * STEP;
    if (c < u.a.dim)
        u.channels()[stored] = {(uint32_t)c | (uint32_t)unit_of(tier) << 8 | pack_place(e), third};
}
#endif
