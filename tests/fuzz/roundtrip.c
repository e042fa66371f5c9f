/* roundtrip.c - any numbers through any codec: what docs/format.md says of the record that comes out.
 *
 *   - packing again gives the same bytes: record, sizes, reference;
 *   - the record is whole, of this codec and not beyond its bound, and bytes that belong to nothing
 *     are zero: padding, unused entries, fields that do not apply;
 *   - an exact record, exact channels and exact values come back bit for bit;
 *   - every code is the nearest one: clamp(round((x - offset) / scale), 0, 2^b - 1);
 *   - fold bounds are those of the largest scale;
 *   - packing what was unpacked gives the same record where nothing is lost twice (repacks_alike). */
#include "fuzz.h"

typedef struct {
    const mkvq_layout *l;
    const uint8_t *record;
    float scale[MKVQ_TIERS], value_scale; /* the largest */
    uint8_t *codes;                       /* bits of the record that codes occupy */
    int least;                            /* a scale is the least there is, or raised */
} reading;

static float read_scale(const uint8_t *p, int64_t at, int64_t plane, int metadata, int bits,
                        float *offset)
{
    uint16_t half[2];
    if (metadata == MKVQ_META_E5M3_INT8) {
        const float scale = mkvq_e5m3_value(p[at]);
        *offset = (float)(int8_t)p[plane + at] * mkvq_offset_unit(scale, bits);
        return scale;
    }
    memcpy(half, p + 2 * at, 2), memcpy(half + 1, p + 2 * (plane + at), 2);
    *offset = mkvq_f16_to_f32(half[1]);
    return mkvq_f16_to_f32(half[0]);
}

static uint32_t read_code(reading *r, int64_t begin, int64_t length, int64_t at,
                          mkvq_code_place place)
{
    uint32_t low, third = 0;
    const int64_t first = begin + 4 * (place.words * length + at);
    memcpy(&low, r->record + first, 4);
    uint32_t mask = place.mask << place.shift, used;
    memcpy(&used, r->codes + first, 4);
    MUST(!(used & mask));
    used |= mask, memcpy(r->codes + first, &used, 4);
    if (place.third >= 0) {
        const int64_t second = begin + 4 * (place.third * length + at);
        memcpy(&third, r->record + second, 4), memcpy(&used, r->codes + second, 4);
        mask = 1u << place.third_shift;
        MUST(!(used & mask));
        used |= mask, memcpy(r->codes + second, &used, 4);
        third = third >> place.third_shift & 1;
    }
    return (low >> place.shift & place.mask) | third << 2;
}

static void nearest(uint32_t code, float x, float scale, float offset, int bits, int constant)
{
    const float most = constant ? 0.0f : (float)((1 << bits) - 1), z = (x - offset) / scale;
    const float clamped = z < 0.0f ? 0.0f : z > most ? most : z;
    MUST((float)code == nearbyintf(clamped));
}

static float number_at(const mkvq_view *v, int64_t t, int64_t c)
{
    const int size = mkvq_dtype_bytes(v->dtype);
    const uint8_t *p = mkvq_at(v, 0, 0, t) + c * v->stride[3] * size;
    uint16_t half;
    float x;
    memcpy(&x, p, v->dtype == MKVQ_F32 ? 4 : 2), memcpy(&half, p, 2);
    return v->dtype == MKVQ_F32   ? x
           : v->dtype == MKVQ_F16 ? mkvq_f16_to_f32(half)
                                  : mkvq_bf16_to_f32(half);
}

static int same_bits(const mkvq_view *a, const mkvq_view *b, int64_t t, int64_t c)
{
    const int size = mkvq_dtype_bytes(a->dtype);
    return !memcmp(mkvq_at(a, 0, 0, t) + c * a->stride[3] * size,
                   mkvq_at(b, 0, 0, t) + c * b->stride[3] * size, (size_t)size);
}

static void constant_group(const mkvq_view *v, const float *mu, int along, int64_t t, int64_t c,
                           int n, int *constant)
{
    float low = INFINITY, high = -INFINITY;
    for (int i = 0; i < n; i++) {
        const float x = number_at(v, t + (along ? 0 : i), c + (along ? i : 0)) - (mu ? mu[c] : 0);
        low = x < low ? x : low, high = x > high ? x : high;
    }
    *constant = low == high;
}

static void check_keys(reading *r, const mkvq_view *k, const mkvq_view *back, const float *mu)
{
    const mkvq_layout *l = r->l;
    const int metadata = l->head.metadata & 15, group = l->head.key_group;
    const int64_t plane = (int64_t)l->key_groups * l->coded;
    for (int i = 0; i < l->head.head_dim; i++) {
        const int c = l->order[i], tier = mkvq_stored_tier(l, i), bits = mkvq_tier_bits(tier);
        for (int t = 0, constant = 0; t < l->head.tokens; t++) {
            if (tier == MKVQ_TIER_EXACT) {
                MUST(same_bits(k, back, t, c));
                continue;
            }
            float offset;
            const float scale =
                read_scale(r->record + l->key_meta, (int64_t)(t / group) * l->coded + i, plane,
                           metadata, bits, &offset);
            if (t % group == 0)
                constant_group(k, mu, 0, t, c, group, &constant);
            nearest(read_code(r, l->key_columns, l->head.tokens, t, mkvq_key_place(l, i)),
                    number_at(k, t, c) - (mu ? mu[c] : 0.0f), scale, offset, bits,
                    constant && metadata == MKVQ_META_FP16_FP16);
            r->scale[tier] = scale > r->scale[tier] ? scale : r->scale[tier];
            r->least |= scale <= MKVQ_E5M3_MIN;
        }
    }
}

static void check_values(reading *r, const mkvq_view *v, const mkvq_view *back)
{
    const mkvq_layout *l = r->l;
    const int metadata = l->head.metadata >> 4, group = l->head.value_group,
              bits = l->head.value_bits, dim = l->head.head_dim;
    for (int t = 0; t < l->head.tokens; t++)
        for (int c = 0, constant = 0; c < dim; c++) {
            if (!bits) {
                MUST(same_bits(v, back, t, c));
                continue;
            }
            float offset;
            const float scale =
                read_scale(r->record + l->value_meta, (int64_t)(c / group) * l->head.tokens + t,
                           (int64_t)l->value_groups * l->head.tokens, metadata, bits, &offset);
            const uint32_t code = read_code(r, l->values, dim, c, mkvq_value_place(l, t));
            if (c % group == 0)
                constant_group(v, NULL, 1, t, c, group < dim - c ? group : dim - c, &constant);
            if (!(l->head.flags & MKVQ_FLAG_ROTATION))
                nearest(code, number_at(v, t, c), scale, offset, bits,
                        constant && metadata == MKVQ_META_FP16_FP16);
            r->value_scale = scale > r->value_scale ? scale : r->value_scale;
            r->least |= scale <= MKVQ_E5M3_MIN;
        }
}

/* What is neither header, map, metadata, code nor exact value must be zero. */
static void check_padding(const reading *r)
{
    const mkvq_layout *l = r->l;
    const int64_t tokens = l->head.tokens, dim = l->head.head_dim;
    const int64_t keys = 2 * mkvq_meta_bytes(l->head.metadata & 15) * l->key_groups * l->coded,
                  values = 2 * mkvq_meta_bytes(l->head.metadata >> 4) * l->value_groups * tokens,
                  rows = l->head.value_bits ? 4 * dim * mkvq_value_rows(l->head.value_bits, tokens)
                                            : tokens * dim * mkvq_dtype_bytes(l->head.dtype);
    for (int64_t i = 0; i < l->nbytes; i++) {
        const int known = i < MKVQ_HEADER_BYTES + 3 * dim / 8 ||
                          (i >= l->key_meta && i < l->key_meta + keys) ||
                          (i >= l->value_meta && i < l->value_meta + values) ||
                          (i >= l->exact_keys && i < l->values) ||
                          (!l->head.value_bits && i >= l->values && i < l->values + rows);
        MUST(known || !(r->record[i] & ~r->codes[i]));
    }
}

static void check_coded(fuzz *f, reading *r, const mkvq_view *k, const mkvq_view *v,
                        const mkvq_view *k_back, const mkvq_view *v_back, const uint16_t *half)
{
    const mkvq_layout *l = r->l;
    float mu[MKVQ_MAX_HEAD_DIM];
    for (int c = 0; half && c < l->head.head_dim; c++)
        mu[c] = mkvq_f16_to_f32(half[c]);
    r->codes = room(f, l->nbytes);
    check_keys(r, k, k_back, half ? mu : NULL);
    check_values(r, v, v_back);
    check_padding(r);
    for (int i = 0; i < 4; i++)
        MUST(l->head.key_fold[i] == mkvq_fold_bound(r->scale[MKVQ_TIER_4 - i]));
    MUST(l->head.value_fold == mkvq_fold_bound(r->value_scale));
}

/* One or two bits, whose lowest and highest values are on the grid, with e5m3 metadata that nothing
 * raised, and no reference, rotation, clipping or rounding of the output: the values of a group are
 * coded with the scale and the offset that they were made of. */
static int repacks_alike(const mkvq_codec *c, const reading *r, int64_t raised)
{
    const int *n = r->l->counts;
    return c->dtype == MKVQ_F32 && c->allocate == MKVQ_ALLOCATE_PATTERNS && c->n_patterns == 1 &&
           n[MKVQ_TIER_1] + n[MKVQ_TIER_2] + n[MKVQ_TIER_EXACT] == c->head_dim &&
           (!r->l->coded || n[MKVQ_TIER_1] == c->head_dim || n[MKVQ_TIER_2] == c->head_dim) &&
           c->key_metadata == MKVQ_META_E5M3_INT8 && c->key_range == MKVQ_RANGE_MINMAX &&
           !c->key_reference && c->value_bits < 3 &&
           (!c->value_bits || (c->value_metadata == MKVQ_META_E5M3_INT8 &&
                               c->value_range == MKVQ_RANGE_MINMAX && !c->value_rotation)) &&
           !raised && !r->least;
}

static mkvq_view dense(fuzz *f, const mkvq_codec *c)
{
    const int64_t n = c->block_length, d = c->head_dim;
    return (mkvq_view){ARRAY(f, uint8_t, n, d, mkvq_dtype_bytes(c->dtype)),
                       {1, 1, n, d},
                       {n * d, n * d, d, 1},
                       c->dtype};
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    fuzz f = begin(data, size);
    draw_isa(&f);
    const mkvq_codec codec = draw_codec(&f);
    const int64_t d = codec.head_dim, one = 1, zero = 0;
    packed p[3] = {packing(&f, codec, 1, 1, 1), packing(&f, codec, 1, 1, 1),
                   packing(&f, codec, 1, 1, 1)};
    for (int i = 0; i < 3; i++)
        p[i].args.codec = &codec, p[i].args.blocks = &one, p[i].args.first = &zero;
    mkvq_pack_args *a = &p[0].args;
    a->k = view_of(&f, 1, 1, codec.block_length, d, codec.dtype, 0);
    a->v = view_of(&f, 1, 1, codec.block_length, d, codec.dtype, 0);
    mkvq_view k_back = dense(&f, &codec), v_back = dense(&f, &codec);
    if (!a->k.data || !a->v.data || !a->out || !k_back.data || !v_back.data || !p[2].args.out)
        goto end;
    fill_view(&f, &a->k, chance(&f, 8)), fill_view(&f, &a->v, chance(&f, 8));
    if (chance(&f, 3)) {
        float *importance = ARRAY(&f, float, d);
        for (int64_t c = 0; c < d; c++)
            importance[c] = (float)(noise(&f) % 100);
        p[0].args.importance = p[1].args.importance = importance;
    }
    p[1].args.k = a->k, p[1].args.v = a->v;
    for (int i = 0; i < 2; i++)
        MUST(mkvq_pack(&p[i].args, NULL) == MKVQ_OK);
    mkvq_record_info info;
    MUST(mkvq_inspect(a->out, a->out_stride, &info, NULL) == MKVQ_OK);
    MUST(info.nbytes == *a->sizes && *p[1].args.sizes == *a->sizes &&
         *a->raised == *p[1].args.raised);
    MUST(!memcmp(a->out, p[1].args.out, (size_t)info.nbytes));
    MUST(!codec.key_reference || (*a->has_mu == *p[1].args.has_mu && *a->has_mu == !info.kind &&
                                  !memcmp(a->mu, p[1].args.mu, (size_t)d * 2)));
    MUST(info.dtype == codec.dtype && info.head_dim == d && info.tokens == codec.block_length);

    const mkvq_history h = history_of(&f, &p[0]);
    const mkvq_unpack_args back = {.history = &h, .k = k_back, .v = v_back, .first = &zero};
    MUST(mkvq_unpack(&back, NULL) == MKVQ_OK);
    mkvq_layout l;
    mkvq_layout_read(&l, a->out);
    reading r = {.l = &l, .record = a->out};
    if (info.kind == MKVQ_KIND_EXACT)
        for (int64_t i = 0; i < codec.block_length * d; i++)
            MUST(same_bits(&a->k, &k_back, i / d, i % d) &&
                 same_bits(&a->v, &v_back, i / d, i % d));
    else
        check_coded(&f, &r, &a->k, &a->v, &k_back, &v_back, codec.key_reference ? a->mu : NULL);
    if (info.kind == MKVQ_KIND_EXACT || repacks_alike(&codec, &r, *a->raised)) {
        mkvq_pack_args *again = &p[2].args;
        again->k = k_back, again->v = v_back;
        MUST(mkvq_pack(again, NULL) == MKVQ_OK && *again->sizes == info.nbytes);
        MUST(!memcmp(again->out, a->out, (size_t)info.nbytes));
    }
end:
    finish(&f);
    return 0;
}
