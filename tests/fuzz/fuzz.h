/* fuzz.h - what the targets share: choices drawn from the bytes of an input, arrays of exactly the
 * size that a call may touch (AddressSanitizer sees whatever lies behind), codecs and numbers.
 *
 * A target is a function LLVMFuzzerTestOneInput over one input: libFuzzer calls it (make fuzz), or
 * replay.c with the files of tests/data/fuzz. It ends the process if a property does not hold. */
#ifndef MKVQ_FUZZ_H
#define MKVQ_FUZZ_H
#define _POSIX_C_SOURCE 200112L /* posix_memalign */
#include "core.h"
#include <float.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

#define MUST(condition) \
    do { \
        if (!(condition)) { \
            fprintf(stderr, "%s:%d: does not hold: %s\n", __FILE__, __LINE__, #condition); \
            abort(); \
        } \
    } while (0)

/* ---- choices --------------------------------------------------------------------------------- */
#define MAX_ROOMS 64

typedef struct {
    const uint8_t *at, *end;
    uint64_t noise;         /* state of a generator, seeded by the input */
    void *rooms[MAX_ROOMS]; /* to be freed, and what is said of them below */
    size_t sizes[MAX_ROOMS];
    int n;
} fuzz;

static inline uint64_t draw(fuzz *f, int bytes)
{
    uint64_t x = 0;
    for (int i = 0; i < bytes && f->at < f->end; i++)
        x |= (uint64_t)*f->at++ << 8 * i;
    return x;
}

static inline int below(fuzz *f, int n)
{
    return (int)(draw(f, n > 256 ? 2 : 1) % (unsigned)n);
}

static inline int chance(fuzz *f, int one_in)
{
    return below(f, one_in) == one_in - 1; /* 0, which inputs end in, is no */
}

static inline uint64_t noise(fuzz *f)
{
    f->noise ^= f->noise << 13, f->noise ^= f->noise >> 7, f->noise ^= f->noise << 17;
    return f->noise;
}

static inline fuzz begin(const uint8_t *data, size_t size)
{
    fuzz f = {.at = data, .end = data + size};
    f.noise = draw(&f, 2) + 88172645463325252u;
    return f;
}

/* ---- arrays ---------------------------------------------------------------------------------- */
#define MAX_ROOM (1 << 22)

/* Exactly `bytes` bytes on a 64-byte boundary, zero; NULL if they are more than an array has. */
static inline void *room(fuzz *f, int64_t bytes)
{
    void *p = NULL;
    if (bytes < 0 || bytes > MAX_ROOM)
        return NULL;
    MUST(f->n < MAX_ROOMS && posix_memalign(&p, 64, (size_t)bytes) == 0);
    memset(p, 0, (size_t)bytes);
    f->rooms[f->n] = p, f->sizes[f->n++] = (size_t)bytes;
    return p;
}

static inline void finish(fuzz *f)
{
    while (f->n)
        free(f->rooms[--f->n]);
}

/* A number that changes when any room does. */
static inline uint64_t contents(const fuzz *f)
{
    uint64_t sum = 0;
    for (int i = 0; i < f->n; i++)
        for (size_t j = 0; j < f->sizes[i]; j++)
            sum = (sum + ((const uint8_t *)f->rooms[i])[j] + 1) * 1099511628211u;
    return sum;
}

typedef __int128 wide;

static inline wide product(const int64_t *n, int count)
{
    wide all = 1;
    for (int i = 0; i < count; i++)
        all = all < 0 || all > INT64_MAX ? all : all * n[i];
    return all;
}

/* A room of count[0] * count[1] * ... elements, NULL if that is no size. */
#define ARRAY(f, type, ...) \
    ((type *)array_of(f, (const int64_t[]){__VA_ARGS__, sizeof(type)}, \
                      sizeof((const int64_t[]){__VA_ARGS__, 1}) / sizeof(int64_t)))
static inline void *array_of(fuzz *f, const int64_t *count, size_t n)
{
    const wide bytes = product(count, (int)n);
    return bytes > MAX_ROOM ? NULL : room(f, (int64_t)bytes);
}

/* Gives a view memory for the elements that it reaches and no other; NULL if there is none so large.
 * Of strides that an array cannot have, none. */
static inline void place_view(fuzz *f, mkvq_view *v)
{
    wide low = 0, high = 1;
    for (int i = 0; i < 4; i++) {
        const wide reach = ((wide)v->shape[i] - 1) * v->stride[i];
        if (v->shape[i] <= 0) {
            low = high = 0;
            break;
        }
        *(reach < 0 ? &low : &high) += reach;
    }
    const int64_t size = mkvq_dtype_bytes(v->dtype);
    const wide bytes = high - low > MAX_ROOM ? high - low : (high - low) * size;
    uint8_t *p = bytes > MAX_ROOM ? NULL : room(f, (int64_t)bytes);
    v->data = p ? p - (int64_t)low * size : NULL;
}

/* Whether a call over this view is quick. */
static inline int is_small(const mkvq_view *v)
{
    int64_t n = 1;
    for (int i = 0; i < 4; i++)
        if (__builtin_mul_overflow(n, v->shape[i] > 0 ? v->shape[i] : 1, &n))
            return 0;
    return n <= 1 << 17;
}

/* A view of this shape: dense, heads behind tokens, with gaps, backwards, or the same for all
 * entries of a dimension, which outputs never are. */
static inline mkvq_view view_of(fuzz *f, int64_t b, int64_t h, int64_t n, int64_t d, int dtype,
                                int output)
{
    mkvq_view v = {NULL, {b, h, n, d}, {h * n * d, n * d, d, 1}, dtype};
    const int style = below(f, output ? 6 : 8), gap = 1 + below(f, 3);
    if (style == 1)
        v.stride[0] = h * n * d, v.stride[1] = d, v.stride[2] = h * d;
    if (style == 2)
        for (int i = 0; i < 4; i++)
            v.stride[i] *= gap;
    if (style == 3)
        v.stride[0] = d, v.stride[1] = b * d, v.stride[2] = h * b * d;
    if (style == 4)
        v.stride[below(f, 4)] *= -1;
    if (style == 5)
        v.stride[2] += gap, v.stride[1] = n * v.stride[2] + gap,
                            v.stride[0] = h * v.stride[1] + gap;
    if (style > 5)
        v.stride[below(f, 4)] = 0;
    place_view(f, &v);
    return v;
}

/* ---- numbers --------------------------------------------------------------------------------- */
static inline void put_number(uint8_t *p, int dtype, float x)
{
    const uint16_t half = dtype == MKVQ_F16 ? mkvq_f32_to_f16(x) : mkvq_f32_to_bf16(x);
    memcpy(p, dtype == MKVQ_F32 ? (void *)&x : (void *)&half, (size_t)mkvq_dtype_bytes(dtype));
}

/* Fills elements: 0 moderate numbers, 1 the input's own bytes, 2 random bytes, 3 one number, 4 few
 * different ones; then some elements take numbers of the input. `moderate` allows 0 only. */
static inline void fill(fuzz *f, uint8_t *p, int64_t count, int dtype, int moderate)
{
    const int size = mkvq_dtype_bytes(dtype), style = moderate ? 0 : below(f, 5);
    const uint8_t *bytes = f->at, *end = f->end;
    const float scale = ldexpf(1.0f, moderate ? 0 : below(f, 16) - 8), base = (float)below(f, 9);
    for (int64_t i = 0; i < count; i++) {
        const uint64_t r = noise(f);
        const float x = (float)(int32_t)(r >> 32) * 0x1p-30f;
        if (style == 0)
            put_number(p + i * size, dtype, x * scale + base * (moderate ? 0.0f : scale));
        else if (style == 1)
            for (int j = 0; j < size; j++)
                p[i * size + j] = bytes < end ? bytes[(i * size + j) % (end - bytes)] : 0;
        else if (style == 2)
            memcpy(p + i * size, &r, (size_t)size);
        else
            put_number(p + i * size, dtype, scale * (style == 3 ? base : (float)(r % 5) - base));
    }
    for (int i = moderate || !count ? 0 : below(f, 5); i > 0; i--) {
        const uint64_t at = draw(f, 2), bits = draw(f, size);
        memcpy(p + (int64_t)(at % (uint64_t)count) * size, &bits, (size_t)size);
    }
}

/* All elements of a view in a room of their own. */
static inline void fill_view(fuzz *f, const mkvq_view *v, int moderate)
{
    for (int i = 0; i < f->n; i++) {
        const uint8_t *p = f->rooms[i];
        if ((uint8_t *)v->data >= p && (uint8_t *)v->data < p + f->sizes[i])
            fill(f, f->rooms[i], (int64_t)f->sizes[i] / mkvq_dtype_bytes(v->dtype), v->dtype,
                 moderate);
    }
}

/* ---- codecs ---------------------------------------------------------------------------------- */
static inline int draw_dtype(fuzz *f)
{
    return MKVQ_F32 + below(f, 3);
}

static inline int draw_bits(fuzz *f)
{
    static const uint8_t bits[] = {2, 3, 4, 8, 1, 0};
    return bits[below(f, 6)];
}

/* Any valid codec, most of them small. */
static inline mkvq_codec draw_codec(fuzz *f)
{
    mkvq_codec c;
    memset(&c, 0, sizeof c);
    c.head_dim = 8 * (1 + below(f, chance(f, 4) ? 32 : 5));
    c.dtype = draw_dtype(f), c.allocate = below(f, 5);
    c.block_length = c.allocate == MKVQ_ALLOCATE_EXACT ? 1 + below(f, 70)
                                                       : 32 * (1 + below(f, chance(f, 8) ? 32 : 4));
    if (c.allocate == MKVQ_ALLOCATE_EXACT)
        return c;
    c.key_group = 8 * (1 + below(f, 16));
    while (c.block_length % c.key_group)
        c.key_group -= 8;
    c.key_metadata = below(f, 2), c.key_range = below(f, 3), c.key_reference = below(f, 2);
    c.value_bits = draw_bits(f);
    c.value_group = 8 * (1 + below(f, c.head_dim / 8));
    c.value_metadata = below(f, 2), c.value_range = below(f, 3), c.value_rotation = below(f, 2);
    c.pattern_cost = below(f, 2);
    const int least = (c.head_dim + 31) / 32;
    c.budget_columns = least + below(f, c.head_dim / 4 - least + 1);
    c.threshold_low = (float)below(f, 256) / 32.0f;
    c.threshold_high = c.threshold_low + (float)below(f, 256) / 32.0f;
    c.n_patterns = 1 + (chance(f, 2) ? below(f, MKVQ_MAX_PATTERNS) : 0);
    for (int p = 0; p < c.n_patterns; p++)
        for (int t = below(f, MKVQ_TIERS), left = c.head_dim; left; t = (t + 1) % MKVQ_TIERS) {
            const int n = chance(f, 2) ? 1 + below(f, left) : left;
            c.patterns[p][t] = (uint16_t)(c.patterns[p][t] + n), left -= n;
        }
    MUST(mkvq_check_codec(&c, NULL) == MKVQ_OK);
    return c;
}

/* ---- instruction sets ------------------------------------------------------------------------ */
/* One of those that this CPU has. */
static inline void draw_isa(fuzz *f)
{
    const int level = below(f, mkvq_isa_count());
    MUST(mkvq_set_isa(mkvq_isa_supported(level) ? mkvq_isa_name(level) : NULL) == MKVQ_OK);
}

/* ---- what every call keeps ------------------------------------------------------------------- */
/* A status is one of the header's, and an error says what it is about. */
static inline mkvq_status checked(mkvq_status status, const mkvq_error *error)
{
    MUST(status >= MKVQ_OK && status < MKVQ_E_DEVICE);
    MUST(strcmp(mkvq_status_text(status), "unknown status") != 0);
    MUST(status == MKVQ_OK || (error->argument && *error->argument && error->allowed));
    return status;
}

/* Two halves, the second first. */
static inline void halves(int64_t n, int64_t grain, mkvq_body body, void *ctx)
{
    (void)grain;
    body(n / 2, n, ctx);
    body(0, n / 2, ctx);
}

/* ---- packing --------------------------------------------------------------------------------- */
typedef struct {
    mkvq_codec codec;
    mkvq_pack_args args;
    int64_t rows, heads;
} packed;

/* Arrays for packing `most` blocks of every head, with outputs of their own. */
static inline packed packing(fuzz *f, mkvq_codec codec, int64_t rows, int64_t heads, int64_t most)
{
    packed p = {.codec = codec, .rows = rows, .heads = heads};
    mkvq_pack_args *a = &p.args;
    const int64_t records = rows * heads * most;
    a->max_blocks = most, a->out_stride = mkvq_record_bound(&codec);
    a->out = room(f, records * a->out_stride);
    a->sizes = ARRAY(f, int64_t, records), a->raised = ARRAY(f, int64_t, records);
    if (codec.key_reference)
        a->mu = ARRAY(f, uint16_t, rows, heads, codec.head_dim),
        a->has_mu = ARRAY(f, uint8_t, rows, heads);
    return p;
}

/* The packed records as a history, in one slab. */
static inline mkvq_history history_of(fuzz *f, const packed *p)
{
    const mkvq_pack_args *a = &p->args;
    const int64_t units = p->rows * p->heads;
    uint64_t *base = ARRAY(f, uint64_t, 1);
    int64_t *bytes = ARRAY(f, int64_t, 1), *place = ARRAY(f, int64_t, units, a->max_blocks);
    *base = (uint64_t)(uintptr_t)a->out, *bytes = units * a->max_blocks * a->out_stride;
    for (int64_t i = 0; i < units * a->max_blocks; i++)
        place[i] = a->sizes[i] ? i * a->out_stride : -1;
    return (mkvq_history){.slab_base = base,
                          .slab_bytes = bytes,
                          .slabs = 1,
                          .place = place,
                          .place_stride = a->max_blocks,
                          .blocks = a->blocks,
                          .mu = a->mu,
                          .batch = (int32_t)p->rows,
                          .kv_heads = (int32_t)p->heads,
                          .head_dim = p->codec.head_dim};
}
#endif
