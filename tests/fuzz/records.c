/* records.c - hostile records: whatever the bytes of a record and the places of a history are, every
 * entry point that reads records returns a status, touches nothing outside of the slab, and writes
 * nothing unless it succeeds.
 *
 * Records are the input's bytes as they are; or with the magic, the version and the length that their
 * fields ask for; or with allowed fields too, so that most are whole and the kernels see their scales,
 * offsets and codes. */
#include "fuzz.h"

#define MAX_RECORDS 3

/* One record; its slab has exactly the bytes that it needs. */
static uint8_t *draw_record(fuzz *f, int64_t *bytes)
{
    mkvq_layout l;
    uint8_t head[MKVQ_HEADER_BYTES + 3 * MKVQ_MAX_HEAD_DIM / 8];
    static const uint8_t sizes[] = {1, 2, 3, 4, 8, 16, 32};
    const int style = below(f, 5), mended = style < 3;
    for (size_t i = 0; i < sizeof head; i++)
        head[i] = (uint8_t)draw(f, 1);
    memcpy(&l.head, head, sizeof l.head);
    if (mended) { /* numbers that are allowed, chosen by those that are there */
        mkvq_header *h = &l.head;
        h->magic = MKVQ_MAGIC, h->version = MKVQ_FORMAT_VERSION, h->kind %= 2;
        h->dtype = (uint8_t)(MKVQ_F32 + h->dtype % 3);
        h->head_dim = (uint16_t)(8 * sizes[h->head_dim % (chance(f, 4) ? 7 : 4)]);
        h->tokens = (uint16_t)(h->kind ? 1 + h->tokens % 300 : 32 * (1 + h->tokens % 5));
        h->value_bits = (uint8_t)(h->value_bits % 6 == 5 ? 8 : h->value_bits % 6);
        h->key_group = (uint16_t)(8 * (1 + h->key_group % 4));
        while (h->kind == MKVQ_KIND_CODED && h->tokens % h->key_group)
            h->key_group = (uint16_t)(h->key_group - 8);
        h->value_group = (uint16_t)(8 * (1 + h->value_group % (h->head_dim / 8)));
        h->metadata &= 0x11, h->flags &= 3;
        memcpy(head, h, sizeof *h);
        const uint8_t *map = head + MKVQ_HEADER_BYTES;
        uint8_t tier[MKVQ_MAX_HEAD_DIM];
        for (int c = 0; c < h->head_dim; c++)
            tier[c] = (uint8_t)((map[c / 8] >> c % 8 & 1 ? map[c % 96] : map[0]) % MKVQ_TIERS);
        mkvq_map_write(head + MKVQ_HEADER_BYTES, h->head_dim, tier);
        mkvq_layout_read(&l, head);
        h->nbytes = (uint32_t)(*bytes = l.nbytes);
        memcpy(head, h, sizeof *h);
    } else
        *bytes = (int64_t)draw(f, 2) % 4096;
    if (style == 3) {
        mkvq_header *h = &l.head;
        h->magic = MKVQ_MAGIC, h->version = MKVQ_FORMAT_VERSION;
        memcpy(head, h, sizeof *h);
        if (h->key_group && h->value_group && h->head_dim <= MKVQ_MAX_HEAD_DIM) {
            mkvq_layout_read(&l, head);
            h->nbytes = (uint32_t)l.nbytes;
            memcpy(head, h, sizeof *h);
            *bytes = l.nbytes < MAX_ROOM && !chance(f, 4) ? l.nbytes : *bytes;
        }
    }
    uint8_t *record = room(f, *bytes);
    const int64_t known = *bytes < (int64_t)sizeof head ? *bytes : (int64_t)sizeof head;
    if (!record)
        return NULL;
    if (*bytes > known)
        fill(f, record + known, *bytes - known, MKVQ_BOOL, 0);
    if (mended && l.head.kind == MKVQ_KIND_EXACT)
        fill(f, record + 64, (l.nbytes - 64) / mkvq_dtype_bytes(l.head.dtype), l.head.dtype, 0);
    else if (mended)
        memcpy(record, head, (size_t)l.key_meta);
    memcpy(record, head, mended ? MKVQ_HEADER_BYTES : (size_t)known);
    return record;
}

static void inspect(const uint8_t *record, int64_t bytes)
{
    mkvq_record_info info;
    mkvq_error error;
    if (checked(mkvq_inspect(record, bytes, &info, &error), &error) != MKVQ_OK)
        return;
    int channels = 0;
    for (int t = 0; t < MKVQ_TIERS; t++)
        channels += info.channels[t];
    for (int c = 0; c < info.head_dim; c++)
        MUST(info.tier[c] < MKVQ_TIERS && info.channels[info.tier[c]] > 0);
    MUST(channels == info.head_dim && info.nbytes <= bytes && info.nbytes % 64 == 0);
    MUST(info.metadata_bytes >= 0 && info.metadata_bytes + info.code_bytes <= info.nbytes);
}

static void unpack(fuzz *f, const mkvq_history *h, int64_t tokens)
{
    mkvq_error error;
    mkvq_unpack_args a = {.history = h, .executor = chance(f, 2) ? halves : NULL};
    const int dtype = draw_dtype(f), less = chance(f, 8);
    int64_t *first = ARRAY(f, int64_t, h->batch);
    for (int b = 0; b < h->batch; b++)
        first[b] = below(f, 3);
    a.first = first;
    a.k = view_of(f, h->batch, h->kv_heads, tokens + 2 - 2 * less, h->head_dim, dtype, 1);
    a.v = view_of(f, h->batch, h->kv_heads, tokens + 2 - 2 * less, h->head_dim, draw_dtype(f), 1);
    const uint64_t before = contents(f);
    if (checked(mkvq_unpack(&a, &error), &error) != MKVQ_OK)
        MUST(contents(f) == before);
}

static void attend(fuzz *f, const mkvq_history *h, int64_t tokens)
{
    mkvq_error error;
    mkvq_attend_args a = {.history = h, .executor = chance(f, 2) ? halves : NULL};
    const int64_t queries = below(f, 10), heads = h->kv_heads * (1 + below(f, 3)),
                  window = below(f, 12), dim = h->head_dim;
    const int dtype = draw_dtype(f);
    int64_t *exact = ARRAY(f, int64_t, h->batch), *start = ARRAY(f, int64_t, h->batch);
    for (int b = 0; b < h->batch; b++)
        exact[b] = window - (window ? below(f, 2) : 0), start[b] = below(f, 3);
    a.exact = exact, a.start = chance(f, 2) ? start : NULL;
    a.q = view_of(f, h->batch, heads, queries, dim, draw_dtype(f), 0);
    a.out = view_of(f, h->batch, heads, queries, dim, draw_dtype(f), 1);
    a.k = view_of(f, h->batch, h->kv_heads, window, dim, dtype, 0);
    a.v = view_of(f, h->batch, h->kv_heads, window, dim, dtype, 0);
    fill_view(f, &a.q, 0), fill_view(f, &a.k, 0), fill_view(f, &a.v, 0);
    a.mask_kind = below(f, 3), a.precision = below(f, 3);
    if (a.mask_kind == MKVQ_MASK_ARRAY) {
        a.mask =
            view_of(f, h->batch, heads, queries, tokens + window + 2, MKVQ_F32 + below(f, 4), 0);
        fill_view(f, &a.mask, 0);
    }
    a.sink_length = below(f, 3);
    a.scaling = (float)below(f, 256) / 64.0f, a.softcap = chance(f, 3) ? (float)below(f, 50) : 0.0f;
    if (chance(f, 4)) {
        float *logits = ARRAY(f, float, heads);
        fill(f, (uint8_t *)logits, heads, MKVQ_F32, 0), a.sink_logits = logits;
    }
    if (chance(f, 2))
        a.workspace_bytes = mkvq_attend_workspace(&a), a.workspace = room(f, a.workspace_bytes);
    const uint64_t before = contents(f);
    if (checked(mkvq_attend(&a, &error), &error) != MKVQ_OK)
        MUST(contents(f) == before);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    fuzz f = begin(data, size);
    uint64_t *base = ARRAY(&f, uint64_t, MAX_RECORDS);
    int64_t *bytes = ARRAY(&f, int64_t, MAX_RECORDS), tokens = 0;
    mkvq_error error;
    draw_isa(&f);
    mkvq_history h = {.slab_base = base, .slab_bytes = bytes, .slabs = 1 + below(&f, MAX_RECORDS)};
    for (int i = 0; i < h.slabs; i++) {
        uint8_t *record = draw_record(&f, bytes + i);
        if (!record)
            goto end;
        base[i] = (uint64_t)(uintptr_t)record;
        inspect(record, bytes[i]);
        mkvq_record_info info;
        if (mkvq_inspect(record, bytes[i], &info, NULL) == MKVQ_OK && !chance(&f, 16))
            h.head_dim = info.head_dim;
    }
    if (!h.head_dim)
        h.head_dim = 8 * below(&f, 5);
    h.batch = 1 + below(&f, 2), h.kv_heads = 1 + below(&f, 2), h.place_stride = 1 + below(&f, 3);
    /* enough for runs of their own */
    if (chance(&f, 8))
        h.place_stride = 20;
    int64_t *blocks = ARRAY(&f, int64_t, h.batch);
    int64_t *place = ARRAY(&f, int64_t, h.batch, h.kv_heads, h.place_stride);
    for (int b = 0; b < h.batch; b++)
        blocks[b] = chance(&f, 16) ? (int8_t)draw(&f, 1) : h.place_stride - chance(&f, 4);
    for (int i = 0; i < h.batch * h.kv_heads * h.place_stride; i++) {
        const int hostile = h.place_stride < 20 && chance(&f, 16);
        place[i] = hostile ? (int64_t)draw(&f, 8) : (i % h.slabs) << MKVQ_SLAB_SHIFT;
        if (h.place_stride < 20 && chance(&f, 2))
            place[i] = (int64_t)below(&f, (int)h.slabs) << MKVQ_SLAB_SHIFT;
    }
    h.blocks = blocks, h.place = place;
    if (!chance(&f, 8)) {
        uint16_t *mu = ARRAY(&f, uint16_t, h.batch, h.kv_heads, MKVQ_MAX_HEAD_DIM);
        fill(&f, (uint8_t *)mu, (int64_t)h.batch * h.kv_heads * h.head_dim, MKVQ_F16, 0), h.mu = mu;
    }
    mkvq_history known = h;
    const mkvq_status status = checked(mkvq_check_history(&known, &error), &error);
    for (int b = 0; b < h.batch && status == MKVQ_OK; b++) {
        const int64_t n = mkvq_tokens_before(&known, b, h.blocks[b]);
        MUST(n == mkvq_tokens_before(&h, b, h.blocks[b]));
        tokens = n > tokens ? n : tokens;
    }
    const mkvq_history *given = status == MKVQ_OK && chance(&f, 2) ? &known : &h;
    unpack(&f, given, tokens);
    attend(&f, given, tokens);
end:
    finish(&f);
    return 0;
}
