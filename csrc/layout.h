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
    uint8_t tier[MKVQ_MAX_HEAD_DIM];
    uint8_t order[MKVQ_MAX_HEAD_DIM]; /* stored index -> channel: coded channels, then exact ones */
    int counts[MKVQ_TIERS];
    int coded;                    /* channels that have codes */
    int columns[4];               /* 8, 4, two and one bit */
    int key_groups, value_groups; /* metadata entries per channel, per token */
    int64_t key_meta, value_meta, key_columns, exact_keys, values, nbytes;
} mkvq_layout;

static inline int64_t mkvq_up64(int64_t n)
{
    return (n + 63) / 64 * 64;
}

static inline int mkvq_dtype_bytes(int dtype)
{
    return dtype == MKVQ_F32 ? 4 : dtype == MKVQ_BOOL ? 1 : 2;
}

static inline int mkvq_meta_bytes(int metadata)
{
    return metadata == MKVQ_META_FP16_FP16 ? 2 : 1;
}

static inline int mkvq_tier_bits(int tier)
{
    static const uint8_t bits[MKVQ_TIERS] = {1, 2, 3, 4, 8, 0};
    return bits[tier];
}

/* Words of one token column (keys) or one channel row (values) that values of `bits` bits take
 * per `tokens` entries. */
static inline int64_t mkvq_value_rows(int bits, int64_t tokens)
{
    return bits == 3 ? tokens / 16 + tokens / 32 : tokens * bits / 32;
}

/* Fills counts and stored order from `tier`. */
static inline void mkvq_layout_order(mkvq_layout *layout)
{
    static const uint8_t rank[MKVQ_TIERS] = {4, 3, 2, 1, 0, 5}; /* 8, 4, 3, 2, 1 bits, exact */
    int next[MKVQ_TIERS + 1] = {0};
    const int dim = layout->head.head_dim;
    for (int c = 0; c < dim; c++)
        next[rank[layout->tier[c]] + 1]++;
    for (int t = 0; t < MKVQ_TIERS; t++)
        layout->counts[t] = next[rank[t] + 1];
    for (int r = 0; r < MKVQ_TIERS; r++)
        next[r + 1] += next[r];
    for (int c = 0; c < dim; c++)
        layout->order[next[rank[layout->tier[c]]]++] = (uint8_t)c;
    layout->coded = dim - layout->counts[MKVQ_TIER_EXACT];
}

/* Fills section offsets and length from head and counts. */
static inline void mkvq_layout_sections(mkvq_layout *layout)
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

static inline mkvq_code_place mkvq_key_place(const mkvq_layout *layout, int stored)
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

static inline mkvq_code_place mkvq_value_place(const mkvq_layout *layout, int token)
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

/* Channel map, three bits per channel, eight channels in three bytes. */
static inline void mkvq_map_read(const uint8_t *map, int dim, uint8_t *tier)
{
    for (int c = 0; c < dim; c += 8, map += 3) {
        const uint32_t word = map[0] | (uint32_t)map[1] << 8 | (uint32_t)map[2] << 16;
        for (int i = 0; i < 8; i++)
            tier[c + i] = word >> 3 * i & 7;
    }
}

static inline void mkvq_map_write(uint8_t *map, int dim, const uint8_t *tier)
{
    for (int c = 0; c < dim; c += 8, map += 3) {
        uint32_t word = 0;
        for (int i = 0; i < 8; i++)
            word |= (uint32_t)tier[c + i] << 3 * i;
        map[0] = (uint8_t)word, map[1] = (uint8_t)(word >> 8), map[2] = (uint8_t)(word >> 16);
    }
}

/* Reads a record that has been checked. */
static inline void mkvq_layout_read(mkvq_layout *layout, const uint8_t *record)
{
    memcpy(&layout->head, record, sizeof layout->head);
    if (layout->head.kind == MKVQ_KIND_EXACT)
        memset(layout->tier, MKVQ_TIER_EXACT, sizeof layout->tier);
    else
        mkvq_map_read(record + MKVQ_HEADER_BYTES, layout->head.head_dim, layout->tier);
    mkvq_layout_order(layout);
    mkvq_layout_sections(layout);
}
#endif
