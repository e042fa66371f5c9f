/* arguments.c - hostile argument structs: whatever their numbers are, and whichever pointers are
 * missing, every entry point returns a status, and writes nothing unless it succeeds.
 *
 * Arrays are as large as the struct says; where none can be, the pointer is NULL. Calls that would
 * take too long (a stride of 0 makes large shapes of little memory) are checked and not made. */
#include "fuzz.h"

/* A number that is mostly as given. */
static int64_t size(fuzz *f, int64_t usual)
{
    static const int64_t hostile[] = {0,
                                      -1,
                                      1,
                                      2,
                                      3,
                                      INT64_MAX,
                                      INT64_MIN,
                                      INT32_MAX,
                                      INT32_MIN,
                                      INT64_C(1) << 31,
                                      INT64_C(1) << 32,
                                      INT64_C(1) << 40,
                                      INT64_C(1) << 62,
                                      65535,
                                      65536,
                                      1024};
    if (!chance(f, 12))
        return usual;
    return chance(f, 3) ? (int64_t)draw(f, 8) : hostile[below(f, 16)];
}

static int32_t number(fuzz *f, int usual)
{
    return (int32_t)(chance(f, 16) ? (int64_t)draw(f, 4) : size(f, usual));
}

static float real(fuzz *f, float usual)
{
    static const float hostile[] = {0.0f, -1.0f, INFINITY, -INFINITY, NAN, FLT_MAX, 1e-45f, -0.0f};
    return chance(f, 10) ? hostile[below(f, 8)] : usual;
}

/* A pointer that is mostly as given. */
static void *maybe(fuzz *f, const void *p)
{
    return chance(f, 40) ? NULL : (void *)(uintptr_t)p;
}

static mkvq_view hostile_view(fuzz *f, int64_t b, int64_t h, int64_t n, int64_t d, int dtype,
                              int output)
{
    mkvq_view v = {NULL, {size(f, b), size(f, h), size(f, n), size(f, d)}, {0}, number(f, dtype)};
    for (int64_t i = 3, step = 1; i >= 0; i--) {
        v.stride[i] = size(f, chance(f, 12) ? 0 : step);
        if (__builtin_mul_overflow(step, v.shape[i], &step))
            step = 0;
    }
    place_view(f, &v);
    if (v.data && !output && is_small(&v))
        fill_view(f, &v, 1);
    v.data = maybe(f, v.data);
    return v;
}

/* Small numbers of an array of `count`, now and then a hostile one. */
static int64_t *rows(fuzz *f, int64_t count, int64_t usual)
{
    int64_t *p = ARRAY(f, int64_t, count);
    for (int64_t i = 0; p && i < count && i < 1000; i++)
        p[i] = size(f, usual);
    return p;
}

static mkvq_executor some_executor(fuzz *f)
{
    return chance(f, 2) ? halves : NULL;
}

static mkvq_codec hostile_codec(fuzz *f)
{
    mkvq_codec c = draw_codec(f);
    int32_t *fields[] = {&c.head_dim,       &c.block_length, &c.dtype,          &c.allocate,
                         &c.key_group,      &c.key_metadata, &c.key_range,      &c.key_reference,
                         &c.value_bits,     &c.value_group,  &c.value_metadata, &c.value_range,
                         &c.value_rotation, &c.pattern_cost, &c.budget_columns, &c.n_patterns};
    for (int i = below(f, 3); i > 0; i--) {
        int32_t *field = fields[below(f, 16)];
        *field = number(f, *field);
    }
    c.threshold_high = real(f, c.threshold_high), c.threshold_low = real(f, c.threshold_low);
    if (chance(f, 8))
        c.patterns[below(f, MKVQ_MAX_PATTERNS)][below(f, MKVQ_TIERS)] = (uint16_t)draw(f, 2);
    return c;
}

static void check_codec(fuzz *f)
{
    mkvq_error error;
    const mkvq_codec c = hostile_codec(f);
    const int64_t bound = mkvq_record_bound(&c);
    if (checked(mkvq_check_codec(maybe(f, &c), &error), &error) == MKVQ_OK)
        MUST(bound >= 64 && bound % 64 == 0);
    MUST(bound >= 0);
}

static void inspect(fuzz *f)
{
    mkvq_error error;
    mkvq_record_info info;
    const int64_t bytes = below(f, 200);
    uint8_t *record = room(f, bytes);
    fill(f, record, bytes, MKVQ_BOOL, 0);
    checked(mkvq_inspect(maybe(f, record), chance(f, 8) ? -bytes : bytes, maybe(f, &info), &error),
            &error);
}

static void salience(fuzz *f)
{
    mkvq_error error;
    const int64_t b = below(f, 3), heads = 1 + below(f, 3);
    mkvq_salience_args a = {.kv_heads = number(f, (int)heads), .power = number(f, 1 + below(f, 2))};
    a.q = hostile_view(f, b, heads * (1 + below(f, 3)), below(f, 9), 8 * (1 + below(f, 4)), 1, 0);
    a.first = chance(f, 2) ? rows(f, a.q.shape[0], below(f, 3)) : NULL;
    a.sum = maybe(f, ARRAY(f, double, a.q.shape[0], a.kv_heads, a.q.shape[3]));
    a.executor = some_executor(f);
    const uint64_t before = contents(f);
    const mkvq_status status = checked(mkvq_check_salience(maybe(f, &a), 0, &error), &error);
    if (status == MKVQ_OK && is_small(&a.q))
        MUST(mkvq_salience(&a, &error) == MKVQ_OK);
    else
        MUST(contents(f) == before);
}

static void pack(fuzz *f)
{
    mkvq_error error;
    const mkvq_codec c = chance(f, 4) ? hostile_codec(f) : draw_codec(f);
    const int64_t b = below(f, 3), h = below(f, 3), most = below(f, 3), d = c.head_dim;
    mkvq_pack_args a = {.codec = maybe(f, &c), .max_blocks = size(f, most)};
    a.k = hostile_view(f, b, h, most * (uint16_t)c.block_length + below(f, 3), d, c.dtype, 0);
    a.v = a.k;
    if (chance(f, 4))
        a.v = hostile_view(f, a.k.shape[0], a.k.shape[1], a.k.shape[2], a.k.shape[3], a.k.dtype, 0);
    const int64_t B = a.k.shape[0], H = a.k.shape[1];
    a.first = rows(f, B, below(f, 2)), a.blocks = maybe(f, rows(f, B, most));
    a.importance = chance(f, 4) ? ARRAY(f, float, B, H, d) : NULL;
    if (a.importance && chance(f, 4))
        fill(f, (uint8_t *)(uintptr_t)a.importance, B * H * d, MKVQ_F32, 0);
    a.mu = maybe(f, ARRAY(f, uint16_t, B, H, d)), a.has_mu = maybe(f, ARRAY(f, uint8_t, B, H));
    a.out_stride = size(f, mkvq_record_bound(&c));
    a.out = maybe(f, ARRAY(f, uint8_t, B, H, a.max_blocks, a.out_stride));
    if (a.out && chance(f, 20))
        a.out++;
    a.sizes = maybe(f, ARRAY(f, int64_t, B, H, a.max_blocks));
    a.raised = chance(f, 2) ? ARRAY(f, int64_t, B, H, a.max_blocks) : NULL;
    a.executor = some_executor(f);
    const uint64_t before = contents(f);
    const mkvq_status status = checked(mkvq_check_pack(maybe(f, &a), 0, &error), &error);
    if (status == MKVQ_OK && is_small(&a.k))
        MUST(mkvq_pack(&a, &error) == MKVQ_OK);
    else
        MUST(contents(f) == before);
}

/* A history of exact records, one per block and head. */
static mkvq_history hostile_history(fuzz *f, int64_t *tokens)
{
    mkvq_codec c = {.head_dim = 8 * (1 + below(f, 3)),
                    .block_length = 1 + below(f, 9),
                    .dtype = MKVQ_F32,
                    .allocate = MKVQ_ALLOCATE_EXACT};
    const int64_t most = below(f, chance(f, 8) ? 20 : 3);
    packed p = packing(f, c, below(f, 3), 1 + below(f, 2), most);
    p.args.codec = &p.codec;
    p.args.k = view_of(f, p.rows, p.heads, most * c.block_length, c.head_dim, MKVQ_F32, 0);
    p.args.v = p.args.k, p.args.first = ARRAY(f, int64_t, p.rows);
    int64_t *blocks = ARRAY(f, int64_t, p.rows);
    for (int i = 0; i < p.rows; i++)
        blocks[i] = most;
    p.args.blocks = blocks;
    MUST(mkvq_pack(&p.args, NULL) == MKVQ_OK);
    mkvq_history h = history_of(f, &p);
    *tokens = most * c.block_length;
    h.batch = number(f, h.batch), h.kv_heads = number(f, h.kv_heads);
    h.head_dim = number(f, h.head_dim), h.slabs = size(f, h.slabs);
    if (h.slabs > 1) /* fewer there are not */
        h.slabs = 1;
    h.place_stride = size(f, h.place_stride);
    if (h.batch != p.rows || h.kv_heads != p.heads || h.place_stride != p.args.max_blocks) {
        int64_t *place = ARRAY(f, int64_t, h.batch, h.kv_heads, h.place_stride);
        h.place = place;
        h.blocks = rows(f, h.batch, most);
    }
    if (chance(f, 8) && h.place && h.batch > 0 && h.kv_heads > 0 && h.place_stride > 0)
        ((int64_t *)(uintptr_t)h.place)[0] = size(f, 0);
    if (chance(f, 16) && blocks != NULL && p.rows > 0)
        blocks[0] = size(f, most);
    h.place = maybe(f, h.place), h.blocks = maybe(f, h.blocks);
    h.slab_base = maybe(f, h.slab_base), h.slab_bytes = maybe(f, h.slab_bytes);
    return h;
}

static void unpack(fuzz *f)
{
    mkvq_error error;
    int64_t tokens;
    mkvq_history h = hostile_history(f, &tokens);
    mkvq_unpack_args a = {.history = maybe(f, &h), .executor = some_executor(f)};
    a.k = hostile_view(f, h.batch, h.kv_heads, tokens + below(f, 2), h.head_dim, draw_dtype(f), 1);
    a.v = hostile_view(f, h.batch, h.kv_heads, a.k.shape[2], h.head_dim, draw_dtype(f), 1);
    a.first = maybe(f, rows(f, h.batch, 0));
    if (chance(f, 2))
        checked(mkvq_check_history(maybe(f, &h), &error), &error);
    const uint64_t before = contents(f);
    const mkvq_status status = checked(mkvq_check_unpack(maybe(f, &a), 0, &error), &error);
    if (status == MKVQ_OK && is_small(&a.k))
        MUST(mkvq_unpack(&a, &error) == MKVQ_OK);
    else
        MUST(contents(f) == before);
}

static void append(fuzz *f)
{
    mkvq_error error;
    mkvq_append_args a;
    const int64_t b = below(f, 3), h = below(f, 3), n = below(f, 4), more = below(f, 4),
                  d = 8 * (1 + below(f, 3));
    const int dtype = draw_dtype(f);
    a.k = hostile_view(f, b, h, n + more, d, dtype, 1);
    a.v = hostile_view(f, b, h, n + more, d, dtype, 1);
    a.k_new = hostile_view(f, b, h, n, d, dtype, 0);
    a.v_new = hostile_view(f, b, h, n, d, dtype, 0);
    a.exact = maybe(f, rows(f, a.k.shape[0], more));
    const uint64_t before = contents(f);
    const mkvq_status status = checked(mkvq_check_append(maybe(f, &a), 0, &error), &error);
    if (status == MKVQ_OK && is_small(&a.k_new))
        MUST(mkvq_append(&a, &error) == MKVQ_OK);
    else
        MUST(contents(f) == before);
}

static void attend(fuzz *f)
{
    mkvq_error error;
    int64_t tokens;
    mkvq_history h = hostile_history(f, &tokens);
    const int64_t heads = h.kv_heads * (int64_t)(1 + below(f, 2)), n = below(f, 4),
                  window = below(f, 6);
    mkvq_attend_args a = {.history = maybe(f, &h), .executor = some_executor(f)};
    a.q = hostile_view(f, h.batch, heads, n, h.head_dim, draw_dtype(f), 0);
    a.out = hostile_view(f, a.q.shape[0], a.q.shape[1], a.q.shape[2], a.q.shape[3], 1, 1);
    a.k = hostile_view(f, h.batch, h.kv_heads, window, h.head_dim, draw_dtype(f), 0);
    a.v = a.k;
    a.exact = maybe(f, rows(f, h.batch, window));
    a.start = chance(f, 2) ? rows(f, h.batch, below(f, 2)) : NULL;
    a.sink_length = number(f, below(f, 2)), a.mask_kind = number(f, below(f, 3));
    a.precision = number(f, below(f, 3));
    a.scaling = real(f, 0.25f), a.softcap = real(f, (float)below(f, 2));
    a.mask = hostile_view(f, a.q.shape[0], a.q.shape[1], a.q.shape[2], tokens + window + 1,
                          MKVQ_F32 + below(f, 4), 0);
    a.sink_logits = chance(f, 4) ? ARRAY(f, float, a.q.shape[1]) : NULL;
    if (chance(f, 2)) {
        a.workspace_bytes = size(f, mkvq_attend_workspace(&a));
        uint8_t *workspace = room(f, a.workspace_bytes);
        a.workspace = workspace && chance(f, 20) ? workspace + 1 : workspace;
    }
    if (chance(f, 2))
        checked(mkvq_check_history(maybe(f, &h), &error), &error);
    const uint64_t before = contents(f);
    const mkvq_status status = checked(mkvq_check_attend(maybe(f, &a), 0, &error), &error);
    if (status == MKVQ_OK && is_small(&a.q))
        MUST(mkvq_attend(&a, &error) == MKVQ_OK);
    else
        MUST(contents(f) == before);
}

static void isa(fuzz *f)
{
    char name[8];
    for (size_t i = 0; i < sizeof name; i++)
        name[i] = (char)draw(f, 1);
    name[sizeof name - 1] = 0;
    const int level = number(f, 0);
    MUST(!mkvq_isa_name(level) == (level < 0 || level >= mkvq_isa_count()));
    MUST(mkvq_isa_name(level) || !mkvq_isa_supported(level));
    const mkvq_status status = mkvq_set_isa(name);
    MUST(status == MKVQ_OK ? strcmp(mkvq_isa(), name) == 0 : status == MKVQ_E_ISA);
    mkvq_set_isa(NULL);
    MUST(*mkvq_status_text((mkvq_status)level));
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t bytes)
{
    static void (*const calls[])(fuzz *) = {check_codec, inspect, salience, pack,
                                            unpack,      append,  attend,   isa};
    fuzz f = begin(data, bytes);
    draw_isa(&f);
    calls[below(&f, 8)](&f);
    finish(&f);
    return 0;
}
