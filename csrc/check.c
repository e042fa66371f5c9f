/* check.c - every argument check of the core, in one place and for every back end. Kernels trust
 * what has passed here. */
#include "core.h"
#include <math.h>
#include <stddef.h>

static mkvq_status fail(mkvq_error *error, mkvq_status status, const char *argument, int64_t value,
                        const char *allowed)
{
    if (error)
        *error = (mkvq_error){argument, allowed, value};
    return status;
}

#define REQUIRE(condition, status, argument, value, allowed) \
    do { \
        if (!(condition)) \
            return fail(error, status, argument, (int64_t)(value), allowed); \
    } while (0)
#define PASS(call) \
    do { \
        const mkvq_status passed = (call); \
        if (passed != MKVQ_OK) \
            return passed; \
    } while (0)

/* A float in an error, whose value is an integer: cut, or the nearest that fits; 0 for NaN. */
static int64_t integer(float x)
{
    if (isnan(x))
        return 0;
    return x >= 0x1p63f ? INT64_MAX : x < -0x1p63f ? INT64_MIN : (int64_t)x;
}

static int is_float(int dtype)
{
    return dtype == MKVQ_F32 || dtype == MKVQ_F16 || dtype == MKVQ_BF16;
}

static mkvq_status check_head_dim(int64_t dim, mkvq_error *error)
{
    REQUIRE(dim >= 8 && dim <= MKVQ_MAX_HEAD_DIM && dim % 8 == 0, MKVQ_E_SHAPE, "head_dim", dim,
            "a multiple of 8 from 8 to 256");
    return MKVQ_OK;
}

/* More than a process can address. Sizes and strides within it leave room in 64 bits for every
 * product that the core makes of them; a stride of 0 needs no memory for any size. */
#define MAX_ELEMENTS (INT64_C(1) << 48)

mkvq_status mkvq_check_extent(const mkvq_view *v, const char *name, mkvq_error *error)
{
    int64_t elements = 1;
    for (int i = 0; i < 4; i++) {
        REQUIRE(v->shape[i] >= 0, MKVQ_E_SHAPE, name, v->shape[i],
                "of sizes that are not negative");
        const int64_t n = v->shape[i] ? v->shape[i] : 1;
        REQUIRE(n <= MAX_ELEMENTS / elements, MKVQ_E_SHAPE, name, n, "of at most 2^48 elements");
        elements *= n;
        REQUIRE(v->stride[i] <= MAX_ELEMENTS / n && v->stride[i] >= -MAX_ELEMENTS / n, MKVQ_E_SHAPE,
                name, v->stride[i], "of strides over at most 2^48 elements");
    }
    return MKVQ_OK;
}

static int is_empty(const mkvq_view *v)
{
    int empty = 0;
    for (int i = 0; i < 4; i++)
        empty |= v->shape[i] == 0;
    return empty;
}

static mkvq_status check_view(const mkvq_view *v, const char *name, mkvq_error *error)
{
    REQUIRE(is_float(v->dtype), MKVQ_E_DTYPE, name, v->dtype,
            "float32 (1), float16 (2) or bfloat16 (3)");
    PASS(mkvq_check_extent(v, name, error));
    REQUIRE(is_empty(v) || v->data, MKVQ_E_NULL, name, 0, "an address");
    return check_head_dim(v->shape[3], error);
}

static mkvq_status check_written(const mkvq_view *v, const char *name, mkvq_error *error)
{
    PASS(check_view(v, name, error));
    for (int i = 0; i < 4; i++)
        REQUIRE(v->shape[i] <= 1 || v->stride[i] != 0 || is_empty(v), MKVQ_E_SHAPE, name,
                v->stride[i], "of strides other than 0, as it is written");
    return MKVQ_OK;
}

static mkvq_status same_shape(const mkvq_view *a, const mkvq_view *b, const char *name,
                              mkvq_error *error)
{
    for (int i = 0; i < 4; i++)
        REQUIRE(a->shape[i] == b->shape[i], MKVQ_E_SHAPE, name, b->shape[i],
                "of the same shape as its partner");
    return MKVQ_OK;
}

/* ---- codec ----------------------------------------------------------------------------------- */
static int bits_allowed(int bits)
{
    return bits == 1 || bits == 2 || bits == 3 || bits == 4 || bits == 8;
}

mkvq_status mkvq_check_codec(const mkvq_codec *c, mkvq_error *error)
{
    REQUIRE(c, MKVQ_E_NULL, "codec", 0, "an address");
    PASS(check_head_dim(c->head_dim, error));
    REQUIRE(is_float(c->dtype), MKVQ_E_DTYPE, "dtype", c->dtype,
            "float32 (1), float16 (2) or bfloat16 (3)");
    REQUIRE(c->allocate >= 0 && c->allocate <= MKVQ_ALLOCATE_LAYER, MKVQ_E_VALUE, "allocate",
            c->allocate, "0 to 4");
    if (c->allocate == MKVQ_ALLOCATE_EXACT) {
        REQUIRE(c->block_length >= 1 && c->block_length <= 65535, MKVQ_E_VALUE, "block_length",
                c->block_length, "1 to 65535");
        return MKVQ_OK;
    }
    REQUIRE(c->block_length >= 32 && c->block_length <= MKVQ_MAX_BLOCK && c->block_length % 32 == 0,
            MKVQ_E_VALUE, "block_length", c->block_length, "a multiple of 32 from 32 to 1024");
    REQUIRE(c->key_group >= 8 && c->key_group % 8 == 0 && c->block_length % c->key_group == 0,
            MKVQ_E_VALUE, "key_group", c->key_group, "a multiple of 8 that divides block_length");
    REQUIRE(c->key_metadata == 0 || c->key_metadata == 1, MKVQ_E_VALUE, "key_metadata",
            c->key_metadata, "0 or 1");
    REQUIRE(c->key_range >= 0 && c->key_range <= MKVQ_RANGE_SEARCH_MSE, MKVQ_E_VALUE, "key_range",
            c->key_range, "0, 1 or 2");
    REQUIRE(c->key_reference == 0 || c->key_reference == 1, MKVQ_E_VALUE, "key_reference",
            c->key_reference, "0 or 1");
    REQUIRE(c->value_bits == 0 || bits_allowed(c->value_bits), MKVQ_E_VALUE, "value_bits",
            c->value_bits, "1, 2, 3, 4, 8, or 0 for exact");
    if (c->value_bits) {
        REQUIRE(c->value_group >= 8 && c->value_group % 8 == 0 && c->value_group <= c->head_dim,
                MKVQ_E_VALUE, "value_group", c->value_group, "a multiple of 8 up to head_dim");
        REQUIRE(c->value_metadata == 0 || c->value_metadata == 1, MKVQ_E_VALUE, "value_metadata",
                c->value_metadata, "0 or 1");
        REQUIRE(c->value_range >= 0 && c->value_range <= MKVQ_RANGE_SEARCH_MSE, MKVQ_E_VALUE,
                "value_range", c->value_range, "0, 1 or 2");
        REQUIRE(c->value_rotation == 0 || c->value_rotation == 1, MKVQ_E_VALUE, "value_rotation",
                c->value_rotation, "0 or 1");
    }
    if (c->allocate == MKVQ_ALLOCATE_THRESHOLD) {
        REQUIRE(c->threshold_low >= 0.0f && c->threshold_high >= c->threshold_low, MKVQ_E_VALUE,
                "threshold_high", integer(c->threshold_high),
                "at least threshold_low, which is at least 0");
        return MKVQ_OK;
    }
    REQUIRE(c->pattern_cost == 0 || c->pattern_cost == 1, MKVQ_E_VALUE, "pattern_cost",
            c->pattern_cost, "0 or 1");
    if (mkvq_has_budget(c)) {
        REQUIRE(c->budget_columns >= (c->head_dim + 31) / 32 &&
                    c->budget_columns <= c->head_dim / 4,
                MKVQ_E_VALUE, "budget_columns", c->budget_columns,
                "from ceil(head_dim / 32) to head_dim / 4");
        return MKVQ_OK;
    }
    REQUIRE(c->n_patterns >= 1 && c->n_patterns <= MKVQ_MAX_PATTERNS, MKVQ_E_VALUE, "n_patterns",
            c->n_patterns, "1 to 16");
    for (int p = 0; p < c->n_patterns; p++) {
        int64_t sum = 0;
        for (int t = 0; t < MKVQ_TIERS; t++)
            sum += c->patterns[p][t];
        REQUIRE(sum == c->head_dim, MKVQ_E_VALUE, "patterns", sum,
                "channels that sum to head_dim in every pattern");
    }
    return MKVQ_OK;
}

static int64_t coded_bytes(const mkvq_codec *c, const uint16_t *pattern)
{
    mkvq_layout l;
    memset(&l, 0, sizeof l);
    l.head.kind = MKVQ_KIND_CODED, l.head.dtype = (uint8_t)c->dtype,
    l.head.value_bits = (uint8_t)c->value_bits;
    l.head.head_dim = (uint16_t)c->head_dim, l.head.tokens = (uint16_t)c->block_length;
    l.head.key_group = (uint16_t)c->key_group, l.head.value_group = (uint16_t)c->value_group;
    l.head.metadata = (uint8_t)(c->key_metadata | (c->value_bits ? c->value_metadata << 4 : 0));
    for (int t = 0; t < MKVQ_TIERS; t++)
        l.counts[t] = pattern[t];
    l.coded = c->head_dim - pattern[MKVQ_TIER_EXACT];
    mkvq_layout_sections(&l);
    return l.nbytes;
}

int64_t mkvq_record_bound(const mkvq_codec *c)
{
    if (mkvq_check_codec(c, NULL) != MKVQ_OK)
        return 0;
    int64_t bound =
        mkvq_up64(64 + 2 * (int64_t)c->block_length * c->head_dim * mkvq_dtype_bytes(c->dtype));
    if (c->allocate == MKVQ_ALLOCATE_EXACT)
        return bound;
    /* any split is possible: the longest pure one, plus metadata and the padding of two columns */
    if (c->allocate == MKVQ_ALLOCATE_THRESHOLD) {
        const uint16_t most[MKVQ_TIERS] = {0, 0, 0, 0, 0, (uint16_t)c->head_dim},
                       none[MKVQ_TIERS] = {0, (uint16_t)c->head_dim};
        const int64_t metadata = 2 * mkvq_meta_bytes(c->key_metadata) *
                                 (int64_t)(c->block_length / c->key_group) * c->head_dim;
        const int64_t exact = coded_bytes(c, most), coded = coded_bytes(c, none);
        const int64_t larger = (exact > coded ? exact : coded) + mkvq_up64(metadata) +
                               2 * 4 * (int64_t)c->block_length;
        return larger > bound ? larger : bound;
    }
    if (mkvq_has_budget(c)) { /* of a pool one head may take the 8-bit tier everywhere */
        const uint16_t two_bits[MKVQ_TIERS] = {0, (uint16_t)c->head_dim};
        const int most =
            c->allocate == MKVQ_ALLOCATE_BUDGET ? c->budget_columns : c->head_dim / 4 + 3;
        const int64_t columns = most - (c->head_dim + 15) / 16;
        const int64_t coded = coded_bytes(c, two_bits) + 4 * (int64_t)c->block_length * columns;
        return coded > bound ? coded : bound;
    }
    for (int p = 0; p < c->n_patterns; p++) {
        const int64_t n = coded_bytes(c, c->patterns[p]);
        bound = n > bound ? n : bound;
    }
    return bound;
}

/* ---- records --------------------------------------------------------------------------------- */
/* Checks the fields of a header, without the channel map. */
static mkvq_status check_header(const mkvq_header *h, int64_t available, mkvq_error *error)
{
    REQUIRE(available >= MKVQ_HEADER_BYTES, MKVQ_E_SPACE, "record", available, "at least 32 bytes");
    REQUIRE(h->magic == MKVQ_MAGIC, MKVQ_E_MAGIC, "record", h->magic,
            "0x51564b4d (\"MKVQ\") at the start");
    REQUIRE(h->version == MKVQ_FORMAT_VERSION, MKVQ_E_VERSION, "record version", h->version, "1");
    REQUIRE(h->kind <= MKVQ_KIND_EXACT, MKVQ_E_RECORD, "record kind", h->kind, "0 or 1");
    REQUIRE(is_float(h->dtype), MKVQ_E_RECORD, "record dtype", h->dtype, "1, 2 or 3");
    PASS(check_head_dim(h->head_dim, error));
    REQUIRE(h->nbytes <= available, MKVQ_E_SPACE, "record nbytes", h->nbytes,
            "at most the bytes available");
    if (h->kind == MKVQ_KIND_EXACT) {
        REQUIRE(h->tokens >= 1, MKVQ_E_RECORD, "record tokens", h->tokens, "at least 1");
        return MKVQ_OK;
    }
    REQUIRE(h->tokens >= 32 && h->tokens <= MKVQ_MAX_BLOCK && h->tokens % 32 == 0, MKVQ_E_RECORD,
            "record tokens", h->tokens, "a multiple of 32 from 32 to 1024");
    REQUIRE(h->key_group >= 8 && h->key_group % 8 == 0 && h->tokens % h->key_group == 0,
            MKVQ_E_RECORD, "record key_group", h->key_group, "a multiple of 8 that divides tokens");
    REQUIRE(h->value_bits == 0 || bits_allowed(h->value_bits), MKVQ_E_RECORD, "record value_bits",
            h->value_bits, "0, 1, 2, 3, 4 or 8");
    REQUIRE(h->value_bits == 0 ||
                (h->value_group >= 8 && h->value_group % 8 == 0 && h->value_group <= h->head_dim),
            MKVQ_E_RECORD, "record value_group", h->value_group, "a multiple of 8 up to head_dim");
    REQUIRE((h->metadata & 15) <= 1 && h->metadata >> 4 <= 1, MKVQ_E_RECORD, "record metadata",
            h->metadata, "0 or 1 in each nibble");
    REQUIRE(h->flags <= 3, MKVQ_E_RECORD, "record flags", h->flags, "0 to 3");
    return MKVQ_OK;
}

/* The whole record: header, channel map, length. */
static mkvq_status check_record(const uint8_t *record, int64_t available, mkvq_layout *l,
                                mkvq_error *error)
{
    mkvq_header h;
    REQUIRE(available >= 64, MKVQ_E_SPACE, "record", available, "at least 64 bytes");
    memcpy(&h, record, sizeof h);
    PASS(check_header(&h, available, error));
    REQUIRE(h.kind == MKVQ_KIND_EXACT ||
                available >= mkvq_up64(MKVQ_HEADER_BYTES + 3 * h.head_dim / 8),
            MKVQ_E_SPACE, "record", available, "at least header and channel map");
    mkvq_layout_read(l, record);
    REQUIRE(l->coded + l->counts[MKVQ_TIER_EXACT] == h.head_dim, MKVQ_E_RECORD,
            "record channel map", h.head_dim - l->coded - l->counts[MKVQ_TIER_EXACT],
            "tier ids 0 to 5 (the value counts the others)");
    REQUIRE(l->nbytes == h.nbytes, MKVQ_E_RECORD, "record nbytes", h.nbytes,
            "what its fields add up to");
    return MKVQ_OK;
}

mkvq_status mkvq_inspect(const void *record, int64_t available, mkvq_record_info *info,
                         mkvq_error *error)
{
    REQUIRE(record && info, MKVQ_E_NULL, "record", 0, "an address");
    mkvq_layout l;
    PASS(check_record(record, available, &l, error));
    const mkvq_header *h = &l.head;
    memset(info, 0, sizeof *info);
    info->kind = h->kind, info->dtype = h->dtype, info->value_bits = h->value_bits;
    info->head_dim = h->head_dim, info->tokens = h->tokens, info->key_group = h->key_group,
    info->value_group = h->value_group;
    info->key_metadata = h->metadata & 15, info->value_metadata = h->metadata >> 4;
    info->key_reference = h->flags & MKVQ_FLAG_REFERENCE,
    info->value_rotation = (h->flags & MKVQ_FLAG_ROTATION) != 0;
    for (int i = 0; i < h->head_dim; i++)
        info->tier[l.order[i]] = (uint8_t)mkvq_stored_tier(&l, i);
    for (int t = 0; t < MKVQ_TIERS; t++)
        info->channels[t] = l.counts[t];
    info->nbytes = l.nbytes;
    const int64_t size = mkvq_dtype_bytes(h->dtype), elements = (int64_t)h->tokens * h->head_dim;
    if (h->kind == MKVQ_KIND_EXACT) {
        info->code_bytes = 2 * elements * size;
        return MKVQ_OK;
    }
    info->metadata_bytes =
        2 * (mkvq_meta_bytes(info->key_metadata) * (int64_t)l.key_groups * l.coded +
             mkvq_meta_bytes(info->value_metadata) * (int64_t)l.value_groups * h->tokens);
    info->code_bytes = l.values - l.key_columns +
                       (h->value_bits ? 4 * h->head_dim * mkvq_value_rows(h->value_bits, h->tokens)
                                      : elements * size);
    return MKVQ_OK;
}

/* All records of a history: whole, inside their slab, of this head_dim, as many tokens in every
 * head; those coded against a reference need mu. */
static mkvq_status check_records(const mkvq_history *h, int32_t *block_tokens, mkvq_error *error)
{
    int common = 0, first = 1;
    for (int64_t b = 0; b < h->batch; b++)
        for (int64_t j = 0; j < h->blocks[b]; j++) {
            int tokens = 0;
            for (int64_t head = 0; head < h->kv_heads; head++) {
                const int64_t place = h->place[(b * h->kv_heads + head) * h->place_stride + j];
                const int64_t slab = place >> MKVQ_SLAB_SHIFT,
                              offset = place & ((INT64_C(1) << MKVQ_SLAB_SHIFT) - 1);
                REQUIRE(place >= 0 && slab < h->slabs, MKVQ_E_SHAPE, "place", place,
                        "an index of a slab and an offset in it");
                REQUIRE(offset % 64 == 0 && offset + 64 <= h->slab_bytes[slab], MKVQ_E_SHAPE,
                        "place", place, "a multiple of 64 inside the slab");
                REQUIRE(h->slab_base[slab] && h->slab_base[slab] % 64 == 0, MKVQ_E_VALUE, "slab",
                        h->slab_base[slab], "an address that is a multiple of 64");
                mkvq_layout l;
                PASS(check_record((const uint8_t *)(uintptr_t)h->slab_base[slab] + offset,
                                  h->slab_bytes[slab] - offset, &l, error));
                REQUIRE(l.head.head_dim == h->head_dim, MKVQ_E_RECORD, "record head_dim",
                        l.head.head_dim, "that of the history");
                REQUIRE(l.head.kind == MKVQ_KIND_EXACT || !(l.head.flags & MKVQ_FLAG_REFERENCE) ||
                            h->mu,
                        MKVQ_E_NULL, "mu", 0, "given: a record is coded against it");
                REQUIRE(head == 0 || l.head.tokens == tokens, MKVQ_E_RECORD, "record tokens",
                        l.head.tokens, "the same in every head of a block");
                tokens = l.head.tokens;
            }
            common = first || common == tokens ? tokens : 0, first = 0;
        }
    *block_tokens = common;
    return MKVQ_OK;
}

static mkvq_status check_history(const mkvq_history *h, int place, int32_t *block_tokens,
                                 mkvq_error *error)
{
    REQUIRE(h, MKVQ_E_NULL, "history", 0, "an address");
    REQUIRE(h->batch >= 0 && h->kv_heads >= 1, MKVQ_E_SHAPE, "history kv_heads", h->kv_heads,
            "at least 1");
    PASS(check_head_dim(h->head_dim, error));
    REQUIRE(h->batch == 0 || h->blocks, MKVQ_E_NULL, "blocks", 0, "an address");
    if (place == MKVQ_ON_DEVICE) {
        REQUIRE(h->place_stride >= 0, MKVQ_E_SHAPE, "place", h->place_stride, "not negative");
        if (h->batch == 0 || h->place_stride == 0)
            return MKVQ_OK;
        REQUIRE(h->place, MKVQ_E_NULL, "place", 0, "an address");
        REQUIRE(h->block_tokens >= 1 && h->block_tokens <= 65535, MKVQ_E_VALUE, "block_tokens",
                h->block_tokens, "the length of all blocks");
        REQUIRE(h->record_bytes >= 64, MKVQ_E_VALUE, "record_bytes", h->record_bytes,
                "an upper bound of all records");
        return MKVQ_OK;
    }
    if (h->checked)
        return MKVQ_OK;
    for (int64_t b = 0; b < h->batch; b++) {
        REQUIRE(h->blocks[b] >= 0 && h->blocks[b] <= h->place_stride, MKVQ_E_SHAPE, "blocks",
                h->blocks[b], "0 to the number of places per head");
        REQUIRE(h->blocks[b] == 0 || (h->place && h->slab_base && h->slab_bytes), MKVQ_E_NULL,
                "place", 0, "an address");
    }
    return check_records(h, block_tokens, error);
}

mkvq_status mkvq_check_history(mkvq_history *history, mkvq_error *error)
{
    int32_t tokens = 0;
    REQUIRE(history, MKVQ_E_NULL, "history", 0, "an address");
    history->checked = 0;
    PASS(check_history(history, MKVQ_ON_HOST, &tokens, error));
    history->checked = 1, history->block_tokens = tokens;
    return MKVQ_OK;
}

/* ---- calls ----------------------------------------------------------------------------------- */
mkvq_status mkvq_check_salience(const mkvq_salience_args *a, int place, mkvq_error *error)
{
    REQUIRE(a, MKVQ_E_NULL, "args", 0, "an address");
    PASS(check_view(&a->q, "q", error));
    REQUIRE(a->kv_heads >= 1 && a->q.shape[1] % a->kv_heads == 0, MKVQ_E_SHAPE, "kv_heads",
            a->kv_heads, "a divisor of the number of query heads");
    REQUIRE(a->power == 1 || a->power == 2, MKVQ_E_VALUE, "power", a->power, "1 or 2");
    REQUIRE(a->sum || a->q.shape[0] == 0, MKVQ_E_NULL, "sum", 0, "an address");
    for (int64_t b = 0; place == MKVQ_ON_HOST && a->first && b < a->q.shape[0]; b++)
        REQUIRE(a->first[b] >= 0 && a->first[b] <= a->q.shape[2], MKVQ_E_VALUE, "first",
                a->first[b], "0 to the number of queries");
    return MKVQ_OK;
}

mkvq_status mkvq_check_pack(const mkvq_pack_args *a, int place, mkvq_error *error)
{
    REQUIRE(a, MKVQ_E_NULL, "args", 0, "an address");
    PASS(mkvq_check_codec(a->codec, error));
    PASS(check_view(&a->k, "k", error));
    PASS(check_view(&a->v, "v", error));
    PASS(same_shape(&a->k, &a->v, "v", error));
    REQUIRE(a->k.dtype == a->codec->dtype, MKVQ_E_DTYPE, "k", a->k.dtype, "of the codec's dtype");
    REQUIRE(a->v.dtype == a->codec->dtype, MKVQ_E_DTYPE, "v", a->v.dtype, "of the codec's dtype");
    REQUIRE(a->k.shape[3] == a->codec->head_dim, MKVQ_E_SHAPE, "k", a->k.shape[3],
            "of the codec's head_dim");
    const int64_t rows = a->k.shape[0], heads = a->k.shape[1], length = a->codec->block_length;
    REQUIRE(a->max_blocks >= 0, MKVQ_E_VALUE, "max_blocks", a->max_blocks, "not negative");
    if (rows == 0 || heads == 0)
        return MKVQ_OK;
    REQUIRE(a->first && a->blocks, MKVQ_E_NULL, "blocks", 0, "an address");
    for (int64_t b = 0; place == MKVQ_ON_HOST && b < rows; b++) {
        REQUIRE(a->blocks[b] >= 0 && a->blocks[b] <= a->max_blocks, MKVQ_E_VALUE, "blocks",
                a->blocks[b], "0 to max_blocks");
        REQUIRE(a->first[b] >= 0 && a->first[b] <= a->k.shape[2] &&
                    a->blocks[b] <= (a->k.shape[2] - a->first[b]) / length,
                MKVQ_E_VALUE, "first", a->first[b], "such that all blocks lie inside k and v");
    }
    if (a->max_blocks == 0)
        return MKVQ_OK;
    REQUIRE(a->out && a->sizes, MKVQ_E_NULL, "out", 0, "an address");
    REQUIRE((uintptr_t)a->out % 64 == 0, MKVQ_E_VALUE, "out", (uintptr_t)a->out % 64,
            "aligned to 64 bytes");
    REQUIRE(a->out_stride % 64 == 0 && a->out_stride >= mkvq_record_bound(a->codec), MKVQ_E_SPACE,
            "out_stride", a->out_stride, "a multiple of 64, at least the codec's record bound");
    REQUIRE(!a->codec->key_reference || a->codec->allocate == MKVQ_ALLOCATE_EXACT ||
                (a->mu && a->has_mu),
            MKVQ_E_NULL, "mu", 0, "given: the codec has a key reference");
    for (int64_t i = 0;
         place == MKVQ_ON_HOST && a->importance && i < rows * heads * a->codec->head_dim; i++)
        REQUIRE(a->importance[i] >= 0.0f && isfinite(a->importance[i]), MKVQ_E_VALUE, "importance",
                i, "finite and not negative (the value is the index)");
    return MKVQ_OK;
}

mkvq_status mkvq_check_unpack(const mkvq_unpack_args *a, int place, mkvq_error *error)
{
    REQUIRE(a, MKVQ_E_NULL, "args", 0, "an address");
    int32_t ignored;
    PASS(check_history(a->history, place, &ignored, error));
    PASS(check_written(&a->k, "k", error));
    PASS(check_written(&a->v, "v", error));
    PASS(same_shape(&a->k, &a->v, "v", error));
    const mkvq_history *h = a->history;
    REQUIRE(a->k.shape[0] == h->batch, MKVQ_E_SHAPE, "k", a->k.shape[0], "of the history's batch");
    REQUIRE(a->k.shape[1] == h->kv_heads, MKVQ_E_SHAPE, "k", a->k.shape[1],
            "of the history's heads");
    REQUIRE(a->k.shape[3] == h->head_dim, MKVQ_E_SHAPE, "k", a->k.shape[3],
            "of the history's head_dim");
    REQUIRE(h->batch == 0 || a->first, MKVQ_E_NULL, "first", 0, "an address");
    for (int64_t b = 0; place == MKVQ_ON_HOST && b < h->batch; b++)
        REQUIRE(a->first[b] >= 0 &&
                    a->first[b] <= a->k.shape[2] - mkvq_tokens_before(h, b, h->blocks[b]),
                MKVQ_E_SPACE, "first", a->first[b], "such that all blocks fit into k and v");
    return MKVQ_OK;
}

mkvq_status mkvq_check_append(const mkvq_append_args *a, int place, mkvq_error *error)
{
    REQUIRE(a, MKVQ_E_NULL, "args", 0, "an address");
    const mkvq_view *views[4] = {&a->k, &a->v, &a->k_new, &a->v_new};
    const char *names[4] = {"k", "v", "k_new", "v_new"};
    for (int i = 0; i < 4; i++) {
        PASS(i < 2 ? check_written(views[i], names[i], error)
                   : check_view(views[i], names[i], error));
        REQUIRE(views[i]->dtype == a->k.dtype, MKVQ_E_DTYPE, names[i], views[i]->dtype,
                "of the buffer's dtype");
        for (int d = 0; d < 4; d++)
            REQUIRE(d == 2 || views[i]->shape[d] == a->k.shape[d], MKVQ_E_SHAPE, names[i],
                    views[i]->shape[d], "of the buffer's batch, heads and head_dim");
    }
    REQUIRE(a->k.shape[2] == a->v.shape[2] && a->k_new.shape[2] == a->v_new.shape[2], MKVQ_E_SHAPE,
            "v_new", a->v_new.shape[2], "of as many tokens as k_new");
    REQUIRE(a->exact || a->k.shape[0] == 0, MKVQ_E_NULL, "exact", 0, "an address");
    for (int64_t b = 0; place == MKVQ_ON_HOST && b < a->k.shape[0]; b++)
        REQUIRE(a->exact[b] >= 0 && a->exact[b] <= a->k.shape[2] - a->k_new.shape[2], MKVQ_E_SPACE,
                "exact", a->exact[b], "such that the new tokens fit into the buffer");
    return MKVQ_OK;
}

mkvq_status mkvq_check_attend(const mkvq_attend_args *a, int place, mkvq_error *error)
{
    REQUIRE(a, MKVQ_E_NULL, "args", 0, "an address");
    int32_t ignored;
    PASS(check_history(a->history, place, &ignored, error));
    PASS(check_view(&a->q, "q", error));
    PASS(check_written(&a->out, "out", error));
    PASS(same_shape(&a->q, &a->out, "out", error));
    PASS(check_view(&a->k, "k", error));
    PASS(check_view(&a->v, "v", error));
    PASS(same_shape(&a->k, &a->v, "v", error));
    const mkvq_history *h = a->history;
    REQUIRE(a->q.shape[0] == h->batch, MKVQ_E_SHAPE, "q", a->q.shape[0], "of the history's batch");
    REQUIRE(a->k.shape[0] == h->batch, MKVQ_E_SHAPE, "k", a->k.shape[0], "of the history's batch");
    REQUIRE(a->k.shape[1] == h->kv_heads, MKVQ_E_SHAPE, "k", a->k.shape[1],
            "of the history's heads");
    REQUIRE(a->q.shape[1] >= 1 && a->q.shape[1] % h->kv_heads == 0, MKVQ_E_SHAPE, "q",
            a->q.shape[1], "of a multiple of the history's heads");
    REQUIRE(a->q.shape[3] == h->head_dim, MKVQ_E_SHAPE, "q", a->q.shape[3],
            "of the history's head_dim");
    REQUIRE(a->k.shape[3] == h->head_dim, MKVQ_E_SHAPE, "k", a->k.shape[3],
            "of the history's head_dim");
    REQUIRE(a->sink_length >= 0, MKVQ_E_VALUE, "sink_length", a->sink_length, "not negative");
    REQUIRE(a->softcap >= 0.0f && isfinite(a->softcap), MKVQ_E_VALUE, "softcap",
            integer(a->softcap), "finite and not negative");
    REQUIRE(isfinite(a->scaling), MKVQ_E_VALUE, "scaling", integer(a->scaling), "finite");
    REQUIRE(a->mask_kind >= 0 && a->mask_kind <= MKVQ_MASK_ARRAY, MKVQ_E_VALUE, "mask_kind",
            a->mask_kind, "0, 1 or 2");
    REQUIRE(a->precision >= 0 && a->precision <= MKVQ_PRECISION_FAST, MKVQ_E_VALUE, "precision",
            a->precision, "0, 1 or 2");
    REQUIRE(h->batch == 0 || a->exact, MKVQ_E_NULL, "exact", 0, "an address");
    REQUIRE(place == MKVQ_ON_DEVICE || !a->workspace ||
                a->workspace_bytes >= mkvq_attend_workspace(a),
            MKVQ_E_SPACE, "workspace", a->workspace_bytes, "mkvq_attend_workspace bytes, or NULL");
    REQUIRE((uintptr_t)a->workspace % 4 == 0, MKVQ_E_VALUE, "workspace",
            (uintptr_t)a->workspace % 4, "aligned to 4 bytes");
    if (a->mask_kind == MKVQ_MASK_ARRAY) {
        REQUIRE(is_float(a->mask.dtype) || a->mask.dtype == MKVQ_BOOL, MKVQ_E_DTYPE, "mask",
                a->mask.dtype, "bool or a float type");
        PASS(mkvq_check_extent(&a->mask, "mask", error));
        REQUIRE(a->mask.data, MKVQ_E_NULL, "mask", 0, "an address");
        for (int i = 0; i < 3; i++)
            REQUIRE(a->mask.shape[i] == a->q.shape[i], MKVQ_E_SHAPE, "mask", a->mask.shape[i],
                    "of the shape of q in its first three dimensions (stride 0 broadcasts)");
    }
    for (int64_t b = 0; place == MKVQ_ON_HOST && b < h->batch; b++) {
        REQUIRE(a->exact[b] >= 0 && a->exact[b] <= a->k.shape[2], MKVQ_E_SHAPE, "exact",
                a->exact[b], "0 to the buffer's tokens");
        REQUIRE(h->blocks[b] == 0 || a->exact[b] >= a->sink_length, MKVQ_E_VALUE, "exact",
                a->exact[b], "at least sink_length in a row that has blocks");
        const int64_t total = a->exact[b] + mkvq_tokens_before(h, b, h->blocks[b]),
                      start = a->start ? a->start[b] : 0;
        REQUIRE(start >= 0, MKVQ_E_VALUE, "start", start, "not negative");
        REQUIRE(a->mask_kind != MKVQ_MASK_ARRAY || start <= a->mask.shape[3] - total, MKVQ_E_SHAPE,
                "mask", a->mask.shape[3], "as wide as start plus all tokens of the row");
    }
    return MKVQ_OK;
}
