/* layout.h - docs/format.md in C: the header of a record and where its sections lie. Host and
 * device code share it. */
#ifndef MKVQ_LAYOUT_H
#define MKVQ_LAYOUT_H
#include "mixkvq.h"
#include "numeric.h"
#include <string.h>

#if defined(__BYTE_ORDER__) && __BYTE_ORDER__ != __ORDER_LITTLE_ENDIAN__
#error "records are little-endian and are read in place: a big-endian host is not supported"
#endif

#define MKVQ_MAGIC 0x51564b4du /* "MKVQ" */
#define MKVQ_FORMAT_VERSION 1
#define MKVQ_HEADER_BYTES 32
#define MKVQ_KIND_CODED 0
#define MKVQ_KIND_EXACT 1
#define MKVQ_FLAG_REFERENCE 1
#define MKVQ_FLAG_ROTATION 2

typedef struct {
    uint32_t magic;
    uint8_t version, kind, dtype, value_bits;
    uint16_t head_dim, tokens, key_group, value_group;
    uint8_t metadata, flags;
    uint16_t value_fold;
    uint32_t nbytes;
    uint16_t key_fold[4]; /* 4, 3, 2, 1 bits */
} mkvq_header;

typedef char mkvq_header_is_32_bytes[sizeof(mkvq_header) == MKVQ_HEADER_BYTES ? 1 : -1];

/* A record's fields and section offsets, from its header and channel map. */
typedef struct {
    mkvq_header head;
    uint8_t order[MKVQ_MAX_HEAD_DIM + 8]; /* stored index -> channel: coded channels, then exact
                                             ones; room for whole words */
    int counts[MKVQ_TIERS];
    int coded;                    /* channels that have codes */
    int columns[4];               /* 8, 4, two and one bit */
    int key_groups, value_groups; /* metadata entries per channel, per token */
    int64_t key_meta, value_meta, key_columns, exact_keys, values, nbytes;
} mkvq_layout;

MKVQ_FN int64_t mkvq_up64(int64_t n)
{
    return (n + 63) / 64 * 64;
}

MKVQ_FN int mkvq_dtype_bytes(int dtype)
{
    return dtype == MKVQ_F32 ? 4 : dtype == MKVQ_BOOL ? 1 : 2;
}

MKVQ_FN int mkvq_meta_bytes(int metadata)
{
    return metadata == MKVQ_META_FP16_FP16 ? 2 : 1;
}

MKVQ_FN int mkvq_tier_bits(int tier)
{
    static const uint8_t bits[MKVQ_TIERS] = {1, 2, 3, 4, 8, 0};
    return bits[tier];
}

/* Words of one token column (keys) or one channel row (values) that values of `bits` bits take
 * per `tokens` entries. */
MKVQ_FN int64_t mkvq_value_rows(int bits, int64_t tokens)
{
    return bits == 3 ? tokens / 16 + tokens / 32 : tokens * bits / 32;
}

/* The channels 8i + j whose bit j of `bits` is set, ascending, one byte each; the other bytes are
 * garbage. */
MKVQ_FN uint64_t mkvq_set_channels(unsigned bits, int first)
{
#define MKVQ_BIT(b, i) ((uint64_t)((b) >> (i) & 1))
#define MKVQ_BELOW(b, i) __builtin_popcount((b) & ((1u << (i)) - 1))
#define MKVQ_SET(b, i) (MKVQ_BIT(b, i) * (i) << 8 * (MKVQ_BELOW(b, i) & 7))
#define MKVQ_SETS(b) \
    (MKVQ_SET(b, 1) | MKVQ_SET(b, 2) | MKVQ_SET(b, 3) | MKVQ_SET(b, 4) | MKVQ_SET(b, 5) | \
     MKVQ_SET(b, 6) | MKVQ_SET(b, 7))
#define MKVQ_SETS4(b) MKVQ_SETS(b), MKVQ_SETS(b + 1), MKVQ_SETS(b + 2), MKVQ_SETS(b + 3)
#define MKVQ_SETS16(b) MKVQ_SETS4(b), MKVQ_SETS4(b + 4), MKVQ_SETS4(b + 8), MKVQ_SETS4(b + 12)
#define MKVQ_SETS64(b) MKVQ_SETS16(b), MKVQ_SETS16(b + 16), MKVQ_SETS16(b + 32), MKVQ_SETS16(b + 48)
    static const uint64_t sets[256] = {MKVQ_SETS64(0u), MKVQ_SETS64(64u), MKVQ_SETS64(128u),
                                       MKVQ_SETS64(192u)};
    return sets[bits] + UINT64_C(0x0101010101010101) * (unsigned)first;
}

/* Bits 0, 3, 6 ... 21 of x, side by side. */
MKVQ_FN unsigned mkvq_every_third(uint32_t x)
{
    x &= 0x249249;
    x = (x ^ x >> 2) & 0x0c30c3;
    x = (x ^ x >> 4) & 0x00f00f;
    return (x ^ x >> 8) & 0xff;
}

/* Fills counts, stored order and `coded` from a channel map: three bits per channel, eight channels
 * in three bytes. Tier ids above the last are of no tier: `counts` then add up to less than
 * head_dim. */
MKVQ_FN void mkvq_layout_order(mkvq_layout *layout, const uint8_t *map)
{
    static const uint8_t rank[MKVQ_TIERS] = {MKVQ_TIER_8, MKVQ_TIER_4, MKVQ_TIER_3,
                                             MKVQ_TIER_2, MKVQ_TIER_1, MKVQ_TIER_EXACT};
    uint64_t plane[3][MKVQ_MAX_HEAD_DIM / 64] = {{0}}; /* bit c: a bit of the id of channel c */
    uint8_t *bytes[3] = {(uint8_t *)plane[0], (uint8_t *)plane[1], (uint8_t *)plane[2]};
    const int dim = layout->head.head_dim;
    int n = 0;
    for (int c = 0; c < dim; c += 8, map += 3) {
        const uint32_t word = map[0] | (uint32_t)map[1] << 8 | (uint32_t)map[2] << 16;
        for (int i = 0; i < 3; i++)
            bytes[i][c / 8] = (uint8_t)mkvq_every_third(word >> i);
    }
    for (int r = 0; r < MKVQ_TIERS; r++) {
        const int t = rank[r], begin = n;
        for (int w = 0; w < (dim + 63) / 64; w++) {
            uint64_t of = (t & 1 ? plane[0][w] : ~plane[0][w]) &
                          (t & 2 ? plane[1][w] : ~plane[1][w]) &
                          (t & 4 ? plane[2][w] : ~plane[2][w]);
            if (64 * w + 64 > dim)
                of &= (UINT64_C(1) << (dim - 64 * w)) - 1;
            for (int c = 64 * w; of; c += 8, of >>= 8) {
                const uint64_t channels = mkvq_set_channels(of & 255, c);
                memcpy(layout->order + n, &channels, 8);
                n += __builtin_popcount(of & 255);
            }
        }
        layout->counts[t] = n - begin;
    }
    layout->coded = n - layout->counts[MKVQ_TIER_EXACT];
}

/* Tier of the channel at index `stored`. */
MKVQ_FN int mkvq_stored_tier(const mkvq_layout *layout, int stored)
{
    static const uint8_t rank[MKVQ_TIERS - 1] = {MKVQ_TIER_8, MKVQ_TIER_4, MKVQ_TIER_3, MKVQ_TIER_2,
                                                 MKVQ_TIER_1};
    for (int r = 0; r < MKVQ_TIERS - 1; stored -= layout->counts[rank[r]], r++)
        if (stored < layout->counts[rank[r]])
            return rank[r];
    return MKVQ_TIER_EXACT;
}

/* Fills section offsets and length from head and counts. */
MKVQ_FN void mkvq_layout_sections(mkvq_layout *layout)
{
    const mkvq_header *h = &layout->head;
    const int *n = layout->counts;
    const int64_t tokens = h->tokens, dim = h->head_dim, size = mkvq_dtype_bytes(h->dtype);
    if (h->kind == MKVQ_KIND_EXACT) {
        layout->exact_keys = 64;
        layout->values = 64 + tokens * dim * size;
        layout->nbytes = mkvq_up64(64 + 2 * tokens * dim * size);
        layout->key_meta = layout->value_meta = layout->key_columns = 64;
        layout->key_groups = layout->value_groups = 0;
        memset(layout->columns, 0, sizeof layout->columns);
        return;
    }
    layout->columns[0] = (n[MKVQ_TIER_8] + 3) / 4;
    layout->columns[1] = (n[MKVQ_TIER_4] + 7) / 8;
    layout->columns[2] = (n[MKVQ_TIER_3] + n[MKVQ_TIER_2] + 15) / 16;
    layout->columns[3] = (n[MKVQ_TIER_3] + n[MKVQ_TIER_1] + 31) / 32;
    const int64_t columns =
        layout->columns[0] + layout->columns[1] + layout->columns[2] + layout->columns[3];
    layout->key_groups = h->tokens / h->key_group;
    layout->value_groups = h->value_bits ? (h->head_dim + h->value_group - 1) / h->value_group : 0;
    layout->key_meta = mkvq_up64(MKVQ_HEADER_BYTES + 3 * dim / 8);
    layout->value_meta = layout->key_meta + 2 * mkvq_meta_bytes(h->metadata & 15) *
                                                (int64_t)layout->key_groups * layout->coded;
    layout->key_columns = mkvq_up64(layout->value_meta + 2 * mkvq_meta_bytes(h->metadata >> 4) *
                                                             tokens * layout->value_groups);
    layout->exact_keys = layout->key_columns + 4 * tokens * columns;
    layout->values = layout->exact_keys + n[MKVQ_TIER_EXACT] * tokens * size;
    layout->nbytes =
        mkvq_up64(layout->values + (h->value_bits ? 4 * dim * mkvq_value_rows(h->value_bits, tokens)
                                                  : tokens * dim * size));
}

/* Where the codes of one channel (or of one token's values) lie: column (row) of the low bits
 * and bit position; for 3 bits also those of the third bit, else third is -1. Columns are
 * counted over all key columns, rows over all value rows. */
typedef struct {
    int words, shift, third, third_shift;
    uint32_t mask; /* of the low bits */
} mkvq_code_place;

MKVQ_FN mkvq_code_place mkvq_key_place(const mkvq_layout *layout, int stored)
{
    const int *n = layout->counts, *columns = layout->columns;
    const int two = columns[0] + columns[1], ones = two + columns[2];
    int entry = stored;
    if (entry < n[MKVQ_TIER_8])
        return (mkvq_code_place){entry / 4, 8 * (entry % 4), -1, 0, 255};
    entry -= n[MKVQ_TIER_8];
    if (entry < n[MKVQ_TIER_4])
        return (mkvq_code_place){columns[0] + entry / 8, 4 * (entry % 8), -1, 0, 15};
    entry -= n[MKVQ_TIER_4];
    if (entry < n[MKVQ_TIER_3])
        return (mkvq_code_place){two + entry / 16, 2 * (entry % 16), ones + entry / 32,
                                 mkvq_one_bit(entry % 32), 3};
    if (entry < n[MKVQ_TIER_3] + n[MKVQ_TIER_2])
        return (mkvq_code_place){two + entry / 16, 2 * (entry % 16), -1, 0, 3};
    entry -= n[MKVQ_TIER_2];
    return (mkvq_code_place){ones + entry / 32, mkvq_one_bit(entry % 32), -1, 0, 1};
}

MKVQ_FN mkvq_code_place mkvq_value_place(const mkvq_layout *layout, int token)
{
    const int bits = layout->head.value_bits;
    if (bits == 3)
        return (mkvq_code_place){token / 16, 2 * (token % 16),
                                 layout->head.tokens / 16 + token / 32, mkvq_one_bit(token % 32),
                                 3};
    if (bits == 1)
        return (mkvq_code_place){token / 32, mkvq_one_bit(token % 32), -1, 0, 1};
    const int per = 32 / bits;
    return (mkvq_code_place){token / per, bits * (token % per), -1, 0, (1u << bits) - 1};
}

MKVQ_FN void mkvq_map_write(uint8_t *map, int dim, const uint8_t *tier)
{
    for (int c = 0; c < dim; c += 8, map += 3) {
        uint32_t word = 0;
        for (int i = 0; i < 8; i++)
            word |= (uint32_t)tier[c + i] << 3 * i;
        map[0] = (uint8_t)word, map[1] = (uint8_t)(word >> 8), map[2] = (uint8_t)(word >> 16);
    }
}

/* Reads a record whose header has been checked. */
MKVQ_FN void mkvq_layout_read(mkvq_layout *layout, const uint8_t *record)
{
    memcpy(&layout->head, record, sizeof layout->head);
    if (layout->head.kind == MKVQ_KIND_EXACT) {
        memset(layout->counts, 0, sizeof layout->counts);
        layout->counts[MKVQ_TIER_EXACT] = layout->head.head_dim, layout->coded = 0;
        for (int c = 0; c < layout->head.head_dim; c++)
            layout->order[c] = (uint8_t)c;
    } else
        mkvq_layout_order(layout, record + MKVQ_HEADER_BYTES);
    mkvq_layout_sections(layout);
}
#endif
