// pack_keys.h - the keys of a coded record: scales and offsets, an octet per channel and group; then
// the columns, a thread per word, which gathers the codes of the channels that share it; exact
// channels bit for bit.
#ifndef MKVQ_PACK_KEYS_H
#define MKVQ_PACK_KEYS_H
#include "pack_room.h"

// float16 metadata of a constant group, whose codes are all 0, carry this mark on the scale until the
// columns are written: nothing else tells the group from one whose range is tiny.
constexpr uint16_t CONSTANT_MARK = 0x8000;

struct key_planes {
    uint8_t *scales, *offsets;
};

MKVQ_DEVICE key_planes find_planes(const pack_room *s, uint8_t *record)
{
    const mkvq_layout &l = s->layout;
    uint8_t *scales = record + l.key_meta;
    return {scales,
            scales + (int64_t)mkvq_meta_bytes(s->job.codec.key_metadata) * l.key_groups * l.coded};
}

// Chooses scales and offsets of a channel's groups number `part`, `part` + `parts` ...; false if one does
// not fit. x: the channel's block.
MKVQ_DEVICE bool fit_channel(pack_room *s, const key_planes &planes, int channel, const float *x,
                             int part, int parts)
{
    const mkvq_codec &codec = s->job.codec;
    const mkvq_layout &l = s->layout;
    const int tier = s->tier[channel], n = codec.key_group;
    uint32_t raised = 0;
    float largest = 0.0f;
    for (int i = part; i < l.key_groups; i += parts) {
        const float *y = x + i * n;
        const group_range range = find_range(y, n);
        group_code g;
        if (!code_group(y, n, range, mkvq_tier_bits(tier), codec.key_metadata, codec.key_range, 0,
                        &g))
            return false;
        const int64_t at = (int64_t)i * l.coded + s->stored[channel];
        if (MKVQ_LEADS) {
            put_metadata(planes.scales, at, codec.key_metadata,
                         (uint16_t)(g.scale_bits | (g.limit == 0.0f ? CONSTANT_MARK : 0)));
            put_metadata(planes.offsets, at, codec.key_metadata, g.offset_bits);
        }
        raised += (uint32_t)g.raised;
        largest = g.scale > largest ? g.scale : largest;
    }
    if (MKVQ_LEADS) {
        max_shared(&s->largest[tier], mkvq_bits(largest));
        add_shared(&s->raised, raised);
    }
    return true;
}

MKVQ_PHASE bool fit_keys()
{
    pack_room *s = room();
    const int dim = s->job.codec.head_dim, tokens = s->job.codec.block_length,
              width = tile_channels(tokens);
    const key_planes planes = find_planes(s, s->block.record);
    for (int c = 0; c < dim; c += width) {
        const int channels = channels_from(c, s), row = key_row() % width;
        if (any_in_block(load_channels(c, channels, mu_of(s), s)))
            return false;
        const bool fits = row >= channels || s->tier[c + row] == MKVQ_TIER_EXACT ||
                          fit_channel(s, planes, c + row, s->tile + row * (tokens + 1),
                                      key_row() / width, PACK_OCTETS / width);
        if (any_in_block(!fits))
            return false;
    }
    return true;
}

// Code of an element of the coded channel at index `stored`, in group `group`.
MKVQ_DEVICE uint32_t key_code(const pack_room *s, const key_planes &planes, int stored, int bits,
                              int group, float x)
{
    const int metadata = s->job.codec.key_metadata;
    const int64_t at = (int64_t)group * s->layout.coded + stored;
    group_code g;
    g.scale = get_metadata(planes.scales, at, metadata);
    g.limit = g.scale > 0.0f ? (float)((1 << bits) - 1) : 0.0f; // a marked one is negative
    g.scale = fabsf(g.scale);
    g.offset = get_offset(planes.offsets, at, metadata, g.scale, bits);
    return (uint32_t)(int)codes_of(x, &g);
}

// Word of a key column; x: the tile's column of the token, in group `group`.
MKVQ_DEVICE uint32_t key_word(const pack_room *s, const key_planes &planes, int column, int group,
                              const float *x, int pitch)
{
    const mkvq_layout &l = s->layout;
    const int *n = l.counts;
    int kind = 0; // 8, 4, two, one bit
    for (; column >= l.columns[kind]; kind++)
        column -= l.columns[kind];
    const int width = 8 >> kind, per = 32 / width;
    const int threes = n[MKVQ_TIER_8] + n[MKVQ_TIER_4], twos = threes + n[MKVQ_TIER_3];
    const int entries = kind == 0   ? n[MKVQ_TIER_8]
                        : kind == 1 ? n[MKVQ_TIER_4]
                        : kind == 2 ? n[MKVQ_TIER_3] + n[MKVQ_TIER_2]
                                    : n[MKVQ_TIER_3] + n[MKVQ_TIER_1];
    const int first = kind == 0 ? 0 : kind == 1 ? n[MKVQ_TIER_8] : threes;
    uint32_t word = 0;
    for (int i = 0; i < per && column * per + i < entries; i++) {
        int stored = first + column * per + i;
        const int three = kind >= 2 && stored < twos;
        if (kind == 3 && !three)
            stored += n[MKVQ_TIER_2];
        const uint32_t code =
            key_code(s, planes, stored, three ? 3 : width, group, x[l.order[stored] * pitch]);
        if (kind == 3)
            word |= (three ? code >> 2 : code) << mkvq_one_bit(i);
        else
            word |= (three ? code & 3 : code) << width * i;
    }
    return word;
}

MKVQ_PHASE void write_columns()
{
    pack_room *s = room();
    const mkvq_view &k = s->job.args.k;
    const mkvq_layout &l = s->layout;
    const int dim = s->job.codec.head_dim, tokens = s->job.codec.block_length,
              lane = thread_index() % 32;
    const int columns = l.columns[0] + l.columns[1] + l.columns[2] + l.columns[3];
    const int most = tile_tokens(dim, tokens);
    const key_planes planes = find_planes(s, s->block.record);
    uint32_t *words = (uint32_t *)(s->block.record + l.key_columns);
    for (int t = 0; t < tokens; t += most) {
        const int n = most < tokens - t ? most : tokens - t;
        load_keys(k, s->block.k + t * k.stride[2] * mkvq_dtype_bytes(k.dtype), dim, n, mu_of(s),
                  s->tile, most + 1);
        sync_block();
        for (int i = thread_index() / 32; i < columns * (n / 32); i += PACK_WARPS) {
            const int column = i % columns, at = i / columns * 32 + lane;
            words[(int64_t)column * tokens + t + at] = key_word(
                s, planes, column, (t + at) / s->job.codec.key_group, s->tile + at, most + 1);
        }
        sync_block();
    }
    if (s->job.codec.key_metadata == MKVQ_META_FP16_FP16)
        for (int i = thread_index(); i < l.key_groups * l.coded; i += PACK_THREADS)
            ((uint16_t *)planes.scales)[i] &= (uint16_t)~CONSTANT_MARK;
}

MKVQ_DEVICE void copy_exact_keys(const pack_room *s)
{
    const mkvq_view &k = s->job.args.k;
    const mkvq_layout &l = s->layout;
    const int tokens = s->job.codec.block_length, size = mkvq_dtype_bytes(k.dtype);
    uint8_t *out = s->block.record + l.exact_keys;
    for (int e = thread_index() / 32; e < l.counts[MKVQ_TIER_EXACT]; e += PACK_WARPS)
        for (int t = thread_index() % 32; t < tokens; t += 32)
            copy_element(out + ((int64_t)e * tokens + t) * size,
                         s->block.k + (t * k.stride[2] + l.order[l.coded + e] * k.stride[3]) * size,
                         size);
}

// False if a key is not finite or a group does not fit.
MKVQ_DEVICE bool pack_keys(pack_room *s)
{
    if (!fit_keys())
        return false;
    if (s->layout.coded)
        write_columns();
    copy_exact_keys(s);
    return true;
}
#endif
