/* isa.c - all instruction sets of this CPU on the same input: sums of queries, references, records and
 * what they unpack to, bit for bit; attention bit for bit among those that fuse multiply and add, and
 * of the scalar one within the error that csrc/mixkvq.h promises both, where its condition on the
 * logits holds. Records may be damaged after they were packed. */
#include "fuzz.h"

#define MAX_LEVELS 8
#define ROWS 2
#define HEADS 2

/* Both the same bits, or both not a number (whose sign and payload are nowhere said). */
static void same_numbers(const float *a, const float *b, int64_t n)
{
    for (int64_t i = 0; i < n; i++)
        MUST(mkvq_bits(a[i]) == mkvq_bits(b[i]) || (isnan(a[i]) && isnan(b[i])));
}

typedef struct {
    packed p;
    float *k, *v, *out;
    double *sum;
} results;

static mkvq_view floats(fuzz *f, int64_t heads, int64_t n, int64_t d, float **p)
{
    *p = ARRAY(f, float, ROWS, heads, n, d);
    return (mkvq_view){*p, {ROWS, heads, n, d}, {heads * n * d, n * d, d, 1}, MKVQ_F32};
}

/* The largest logit, to know what the promised error is worth. */
static double largest_logit(const mkvq_view *q, const mkvq_view *k, const float *decoded,
                            int64_t packed_tokens, float scaling)
{
    const int64_t d = q->shape[3], group = q->shape[1] / HEADS;
    double most = 0;
    for (int64_t b = 0; b < ROWS; b++)
        for (int64_t h = 0; h < q->shape[1]; h++)
            for (int64_t i = 0; i < q->shape[2]; i++)
                for (int64_t t = 0; t < packed_tokens + k->shape[2]; t++) {
                    double sum = 0;
                    const float *x = (float *)(void *)mkvq_at(q, b, h, i), *y;
                    y = t < packed_tokens
                            ? decoded + ((b * HEADS + h / group) * packed_tokens + t) * d
                            : (float *)(void *)mkvq_at(k, b, h / group, t - packed_tokens);
                    for (int64_t c = 0; c < d; c++)
                        sum += fabs((double)x[c] * (double)y[c]);
                    if (!(sum * scaling <= most))
                        most = sum * scaling;
                }
    return most;
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    fuzz f = begin(data, size);
    static const double promised[] = {2e-3, 1e-5, 6e-2};
    const mkvq_codec codec = draw_codec(&f);
    const int64_t d = codec.head_dim, T = codec.block_length, most = chance(&f, 6) ? 10 : 1,
                  window = below(&f, 20), queries = 1 + below(&f, 3),
                  heads = HEADS * (1 + below(&f, 4));
    const int levels = mkvq_isa_count(), moderate = chance(&f, 2), damaged = chance(&f, 6);
    int64_t first[ROWS] = {0}, blocks[ROWS] = {most, most}, exact[ROWS] = {window, window};
    results r[MAX_LEVELS] = {{.k = NULL}};
    float *unused;
    if (T * d * most > 1 << 15)
        goto end;
    const mkvq_view k = view_of(&f, ROWS, HEADS, T * most, d, codec.dtype, 0),
                    v = view_of(&f, ROWS, HEADS, T * most, d, codec.dtype, 0);
    const mkvq_view q = floats(&f, heads, queries, d, &unused),
                    wk = floats(&f, HEADS, window, d, &unused),
                    wv = floats(&f, HEADS, window, d, &unused);
    if (!k.data || !v.data)
        goto end;
    const mkvq_view *views[] = {&k, &v, &q, &wk, &wv};
    for (int i = 0; i < 5; i++)
        fill_view(&f, views[i], moderate);
    mkvq_attend_args attend = {.q = q, .k = wk, .v = wv, .exact = exact};
    attend.precision = below(&f, 3), attend.sink_length = (int32_t)(window ? below(&f, 2) : 0);
    attend.mask_kind = below(&f, 2), attend.scaling = 1.0f / (float)(1 + below(&f, 16));
    attend.softcap = chance(&f, 4) ? 30.0f : 0.0f;
    const uint64_t damage = draw(&f, 8);
    for (int i = 0; i < levels; i++) {
        if (!mkvq_isa_supported(i))
            continue;
        MUST(mkvq_set_isa(mkvq_isa_name(i)) == MKVQ_OK);
        r[i].p = packing(&f, codec, ROWS, HEADS, most);
        mkvq_pack_args *a = &r[i].p.args;
        a->codec = &codec, a->first = first, a->blocks = blocks, a->k = k, a->v = v;
        if (!a->out)
            goto end;
        MUST(mkvq_pack(a, NULL) == MKVQ_OK);
        const int64_t records = ROWS * HEADS * most;
        MUST(!memcmp(a->sizes, r[0].p.args.sizes, (size_t)records * 8));
        MUST(!memcmp(a->raised, r[0].p.args.raised, (size_t)records * 8));
        for (int64_t j = 0; j < records; j++)
            MUST(!memcmp(a->out + j * a->out_stride, r[0].p.args.out + j * a->out_stride,
                         (size_t)a->sizes[j]));
        if (codec.key_reference)
            MUST(!memcmp(a->mu, r[0].p.args.mu, (size_t)(ROWS * HEADS * d * 2)) &&
                 !memcmp(a->has_mu, r[0].p.args.has_mu, ROWS * HEADS));
        for (int64_t j = 0; damaged && j < a->sizes[0] - 64; j++)
            if ((damage >> j % 61 & 7) == 7) /* metadata and codes */
                a->out[64 + j] ^= (uint8_t)(damage >> j % 53);
    }
    for (int i = 0; i < levels; i++) {
        if (!mkvq_isa_supported(i))
            continue;
        MUST(mkvq_set_isa(mkvq_isa_name(i)) == MKVQ_OK);
        mkvq_history h = history_of(&f, &r[i].p);
        mkvq_error error;
        const mkvq_status status = checked(mkvq_check_history(&h, &error), &error);
        MUST(status == MKVQ_OK || damaged);
        if (status != MKVQ_OK)
            break;
        mkvq_unpack_args u = {.history = &h, .first = first};
        u.k = floats(&f, HEADS, T * most, d, &r[i].k),
        u.v = floats(&f, HEADS, T * most, d, &r[i].v);
        MUST(mkvq_unpack(&u, NULL) == MKVQ_OK);
        same_numbers(r[i].k, r[0].k, ROWS * HEADS * T * most * d);
        same_numbers(r[i].v, r[0].v, ROWS * HEADS * T * most * d);

        mkvq_salience_args s = {.q = q, .kv_heads = HEADS, .power = 1 + moderate};
        s.sum = r[i].sum = ARRAY(&f, double, ROWS, HEADS, d);
        MUST(mkvq_salience(&s, NULL) == MKVQ_OK);
        for (int64_t j = 0; j < ROWS * HEADS * d; j++)
            MUST(!memcmp(s.sum + j, r[0].sum + j, 8) || (isnan(s.sum[j]) && isnan(r[0].sum[j])));

        attend.history = &h, attend.out = floats(&f, heads, queries, d, &r[i].out);
        attend.workspace_bytes = mkvq_attend_workspace(&attend);
        attend.workspace = attend.workspace_bytes ? room(&f, attend.workspace_bytes) : NULL;
        MUST(mkvq_attend(&attend, NULL) == MKVQ_OK);
        if (i > 1)
            same_numbers(r[i].out, r[1].out, ROWS * heads * queries * d);
    }
    if (r[0].out && r[1].out) {
        const int64_t n = ROWS * heads * queries * d;
        double squares = 0, errors = 0;
        for (int64_t i = 0; i < n; i++)
            squares += (double)r[0].out[i] * r[0].out[i],
                errors += pow((double)r[0].out[i] - r[1].out[i], 2);
        const double logit = largest_logit(&q, &wk, r[0].k, T * most, attend.scaling);
        if (moderate && !damaged && logit <= 2)
            MUST(sqrt(errors) <= 2 * promised[attend.precision] * sqrt(squares));
    }
end:
    mkvq_set_isa(NULL);
    finish(&f);
    return 0;
}
