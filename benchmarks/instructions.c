/* instructions.c - fixed calls of the core whose instructions instructions.py counts under valgrind.
 *
 * `instructions` prints the names of the cases of a level, `instructions LEVEL` makes them in this
 * order: each prepares its arguments, then calls measure() once, around which counting is on. Nothing
 * here depends on a clock, on Python, on the presets of the product or on libm. */
#include "mixkvq.h"
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { HEADS = 2, TOKENS = 1024, WINDOW = 20, SINKS = 4, BLOCK = 128 };

/* What the presets of the same names look like; `patterns` for head_dim 64. */
static const mkvq_codec codecs[] = {
    {.key_group = 64,
     .key_range = MKVQ_RANGE_SEARCH,
     .key_reference = 1,
     .value_bits = 3,
     .value_range = MKVQ_RANGE_SEARCH,
     .value_rotation = 1,
     .n_patterns = 4,
     .patterns = {{0, 16, 32, 16}, {0, 32, 0, 32}, {4, 20, 28, 8, 4}, {24, 8, 8, 16, 8}}},
    {.key_group = 128,
     .key_range = MKVQ_RANGE_SEARCH,
     .key_reference = 1,
     .value_bits = 2,
     .value_range = MKVQ_RANGE_SEARCH,
     .value_rotation = 1,
     .n_patterns = 4,
     .patterns = {{0, 48, 0, 16}, {8, 24, 24, 8}, {24, 8, 8, 24}, {20, 20, 12, 8, 4}}},
    {.key_group = 64,
     .key_range = MKVQ_RANGE_SEARCH,
     .key_reference = 1,
     .value_bits = 4,
     .value_range = MKVQ_RANGE_SEARCH,
     .value_rotation = 1,
     .n_patterns = 3,
     .patterns = {{0, 0, 0, 64}, {0, 16, 0, 40, 8}, {8, 8, 24, 8, 16}}},
    {.allocate = MKVQ_ALLOCATE_THRESHOLD,
     .key_group = 32,
     .key_metadata = MKVQ_META_FP16_FP16,
     .value_bits = 2,
     .value_group = 32,
     .value_metadata = MKVQ_META_FP16_FP16,
     .threshold_high = 1.44f,
     .threshold_low = 0.79f},
    {.key_group = 32,
     .key_metadata = MKVQ_META_FP16_FP16,
     .value_bits = 2,
     .value_group = 32,
     .value_metadata = MKVQ_META_FP16_FP16,
     .n_patterns = 1,
     .patterns = {{0, 64}}},
};
static const char *const names[] = {"default", "compact", "near-lossless", "paper", "kivi-2"};
enum { DEFAULT, COMPACT, NEAR_LOSSLESS, PAPER, KIVI };

typedef enum { DECODE, FLUSH, SALIENCE } verb;
typedef struct {
    verb verb;
    int codec, head_dim, group; /* group: query heads per key/value head */
} instruction_case;

static const instruction_case cases[] = {
    {DECODE, DEFAULT, 64, 1},  {DECODE, DEFAULT, 64, 4},  {DECODE, DEFAULT, 64, 8},
    {DECODE, DEFAULT, 128, 1}, {DECODE, DEFAULT, 128, 4}, {DECODE, DEFAULT, 128, 8},
    {DECODE, COMPACT, 64, 1},  {DECODE, COMPACT, 64, 4},  {DECODE, COMPACT, 64, 8},
    {DECODE, COMPACT, 128, 1}, {DECODE, COMPACT, 128, 4}, {DECODE, COMPACT, 128, 8},
    {FLUSH, DEFAULT, 128, 0},  {FLUSH, COMPACT, 128, 0},  {FLUSH, NEAR_LOSSLESS, 128, 0},
    {FLUSH, PAPER, 128, 0},    {FLUSH, KIVI, 128, 0},     {FLUSH, DEFAULT, 64, 0},
    {SALIENCE, 0, 128, 4},
};
enum { CASES = sizeof cases / sizeof cases[0] };

static void print_name(const instruction_case *c)
{
    if (c->verb == DECODE)
        printf("decode %s d=%d G=%d\n", names[c->codec], c->head_dim, c->group);
    else if (c->verb == FLUSH)
        printf("flush %s d=%d\n", names[c->codec], c->head_dim);
    else
        printf("salience d=%d G=%d\n", c->head_dim, c->group);
}

static void fail(const char *what, mkvq_status status, const mkvq_error *error)
{
    fprintf(stderr, "%s: %s (%s is %lld, must be %s)\n", what, mkvq_status_text(status),
            error->argument, (long long)error->value, error->allowed);
    exit(1);
}

/* Numbers of about unit variance: twelve of splitmix64 added up. */
static float noise(uint64_t *state)
{
    float sum = -6.0f;
    for (int i = 0; i < 12; i++) {
        uint64_t z = *state += 0x9e3779b97f4a7c15u;
        z = (z ^ z >> 30) * 0xbf58476d1ce4e5b9u;
        z = (z ^ z >> 27) * 0x94d049bb133111ebu;
        sum += (float)(z >> 40) * 0x1p-24f;
    }
    return sum;
}

static void *room(size_t bytes)
{
    void *p = aligned_alloc(64, (bytes + 63) / 64 * 64);
    if (!p)
        exit(1);
    memset(p, 0, (bytes + 63) / 64 * 64);
    return p;
}

/* [1, heads, tokens, dim] with channels of unequal width and offset, as keys have. */
static mkvq_view make(int heads, int tokens, int dim, int uneven, uint64_t seed)
{
    mkvq_view v = {.data = room((size_t)heads * tokens * dim * 4),
                   .shape = {1, heads, tokens, dim},
                   .stride = {(int64_t)heads * tokens * dim, (int64_t)tokens * dim, dim, 1},
                   .dtype = MKVQ_F32};
    float *x = v.data;
    for (int h = 0; h < heads; h++)
        for (int c = 0; c < dim; c++) {
            uint64_t channel = seed + (uint64_t)(h * dim + c) * 977;
            float width = 1.0f, middle = 0.0f;
            if (uneven) {
                const float a = noise(&channel);
                width = 0.25f + a * a, middle = 2.0f * noise(&channel);
            }
            for (int t = 0; t < tokens; t++)
                x[((int64_t)h * tokens + t) * dim + c] = noise(&channel) * width + middle;
        }
    return v;
}

/* Calls with which counting goes on and off; the symbol is named to valgrind. */
__attribute__((noinline)) void measure(verb verb, const void *args);

void measure(verb verb, const void *args)
{
    mkvq_error error = {"", "", 0};
    const mkvq_status status = verb == DECODE  ? mkvq_attend(args, &error)
                               : verb == FLUSH ? mkvq_pack(args, &error)
                                               : mkvq_salience(args, &error);
    if (status != MKVQ_OK)
        fail("measure", status, &error);
}

typedef struct {
    mkvq_codec codec;
    int64_t first, blocks, sizes[HEADS * TOKENS / BLOCK];
    float importance[HEADS * MKVQ_MAX_HEAD_DIM];
    uint16_t mu[HEADS * MKVQ_MAX_HEAD_DIM];
    uint8_t has_mu[HEADS];
    mkvq_pack_args args;
} packed;

static void prepare_pack(packed *p, const instruction_case *c, int tokens)
{
    const int dim = c->head_dim;
    uint64_t seed = 1;
    memset(p, 0, sizeof *p);
    p->codec = codecs[c->codec];
    p->codec.head_dim = dim, p->codec.block_length = BLOCK, p->codec.dtype = MKVQ_F32;
    if (!p->codec.value_group)
        p->codec.value_group = dim;
    for (int i = 0; i < p->codec.n_patterns; i++)
        for (int t = 0; t < MKVQ_TIERS; t++)
            p->codec.patterns[i][t] = (uint16_t)(p->codec.patterns[i][t] * dim / 64);
    p->blocks = tokens / BLOCK;
    for (int i = 0; i < HEADS * dim; i++) {
        const float a = noise(&seed);
        p->importance[i] = 0.3f + a * a;
    }
    const int64_t bound = mkvq_record_bound(&p->codec);
    p->args = (mkvq_pack_args){.codec = &p->codec,
                               .k = make(HEADS, tokens, dim, 1, 2),
                               .v = make(HEADS, tokens, dim, 0, 3),
                               .first = &p->first,
                               .blocks = &p->blocks,
                               .max_blocks = p->blocks,
                               .importance = p->importance,
                               .mu = p->mu,
                               .has_mu = p->has_mu,
                               .out = room((size_t)(HEADS * p->blocks * bound)),
                               .out_stride = bound,
                               .sizes = p->sizes};
}

static void decode(const instruction_case *c)
{
    packed p;
    mkvq_error error;
    prepare_pack(&p, c, TOKENS);
    const mkvq_status status = mkvq_pack(&p.args, &error);
    if (status != MKVQ_OK)
        fail("pack", status, &error);
    int64_t place[HEADS * TOKENS / BLOCK];
    for (int64_t i = 0; i < HEADS * p.blocks; i++)
        place[i] = i * p.args.out_stride;
    const uint64_t base = (uint64_t)(uintptr_t)p.args.out;
    const int64_t bytes = HEADS * p.blocks * p.args.out_stride, exact = WINDOW;
    const mkvq_history history = {.slab_base = &base,
                                  .slab_bytes = &bytes,
                                  .slabs = 1,
                                  .place = place,
                                  .place_stride = p.blocks,
                                  .blocks = &p.blocks,
                                  .mu = p.mu,
                                  .batch = 1,
                                  .kv_heads = HEADS,
                                  .head_dim = c->head_dim};
    mkvq_attend_args a = {.q = make(HEADS * c->group, 1, c->head_dim, 0, 4),
                          .out = make(HEADS * c->group, 1, c->head_dim, 0, 4),
                          .history = &history,
                          .k = make(HEADS, WINDOW, c->head_dim, 1, 2),
                          .v = make(HEADS, WINDOW, c->head_dim, 0, 3),
                          .exact = &exact,
                          .sink_length = SINKS,
                          .mask_kind = MKVQ_MASK_CAUSAL,
                          .scaling = c->head_dim == 64 ? 0.125f : 0.0883883f};
    a.workspace_bytes = mkvq_attend_workspace(&a);
    a.workspace = room((size_t)a.workspace_bytes);
    measure(DECODE, &a);
}

static void flush(const instruction_case *c)
{
    packed p;
    mkvq_error error;
    prepare_pack(&p, c, BLOCK);
    const mkvq_status status =
        mkvq_pack(&p.args, &error); /* sets the reference, as a prefill does */
    if (status != MKVQ_OK)
        fail("pack", status, &error);
    measure(FLUSH, &p.args);
}

static void salience(const instruction_case *c)
{
    static double sum[HEADS * MKVQ_MAX_HEAD_DIM];
    const mkvq_salience_args a = {.q = make(HEADS * c->group, BLOCK, c->head_dim, 0, 4),
                                  .kv_heads = HEADS,
                                  .power = 2,
                                  .sum = sum};
    measure(SALIENCE, &a);
}

int main(int n, char **arguments)
{
    if (n == 2 && mkvq_set_isa(arguments[1]) != MKVQ_OK) {
        fprintf(stderr, "%s cannot run here\n", arguments[1]);
        return 1;
    }
    for (int i = 0; i < CASES; i++)
        if (n != 2)
            print_name(cases + i);
        else if (cases[i].verb == DECODE)
            decode(cases + i);
        else if (cases[i].verb == FLUSH)
            flush(cases + i);
        else
            salience(cases + i);
    return 0;
}
