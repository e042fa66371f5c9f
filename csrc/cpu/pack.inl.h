/* pack.inl.h - one block of one head: statistics, codes, record.
 *
 * Keys are read eight channels at a time and transposed, so that a channel's tokens are
 * contiguous: lanes are tokens, as in the key columns. Values are read a token at a time: lanes
 * are channels, as in the value rows. Either way eight rows (channels of one tier; tokens) are coded
 * together, and the codes that share a word are put together before they are or-ed into it. */
typedef struct {
    const mkvq_pack_args *args;
    int64_t row, head, token; /* first token of the block */
    const float *mu;          /* [D] or NULL */
    int64_t raised;
    int kept; /* the panels of all channels, loaded for the choice, are still there */
} block_source;

/* Room for eight channels of the longest block, or for all channels of a usual one: then keys are
 * loaded and transposed once. */
#define PANEL_FLOATS 32768

static inline int keeps_panels(const mkvq_codec *codec)
{
    return codec->head_dim * codec->block_length <= PANEL_FLOATS;
}

static MKVQ_INLINE int load_panel_as(const block_source *s, int channel, const float *mu,
                                     float *panel, const int dtype, const int64_t stride)
{
    const mkvq_view *k = &s->args->k;
    const int tokens = s->args->codec->block_length, size = mkvq_dtype_bytes(dtype);
    const uint8_t *p = mkvq_at(k, s->row, s->head, s->token) + channel * stride * size;
    vf lost[2] = {vf_set1(0.0f), vf_set1(0.0f)}; /* 0 * x is 0 or NaN */
    for (int t = 0; t < tokens; t += 8) {
        vf r[8];
        MKVQ_UNROLL(8)
        for (int i = 0; i < 8; i++, p += k->stride[2] * size) {
            r[i] = load8(p, dtype, stride);
            lost[i & 1] = vf_fma(r[i], vf_set1(0.0f), lost[i & 1]);
        }
        vf_transpose(r);
        MKVQ_UNROLL(8)
        for (int i = 0; i < 8; i++)
            vf_store(panel + i * tokens + t, mu ? vf_sub(r[i], vf_set1(mu[channel + i])) : r[i]);
    }
    return vf_finite(vf_add(lost[0], lost[1]));
}

/* Eight channels from `channel` on, minus mu, to panel[8][T]; 0 if a value is not finite. */
static int load_panel(const block_source *s, int channel, const float *mu, float *panel)
{
    const mkvq_view *k = &s->args->k;
    if (k->stride[3] != 1)
        return load_panel_as(s, channel, mu, panel, k->dtype, k->stride[3]);
    if (k->dtype == MKVQ_F32)
        return load_panel_as(s, channel, mu, panel, MKVQ_F32, 1);
    if (k->dtype == MKVQ_F16)
        return load_panel_as(s, channel, mu, panel, MKVQ_F16, 1);
    return load_panel_as(s, channel, mu, panel, MKVQ_BF16, 1);
}

/* Channel means, rounded to float16; 0 if one is not finite. */
static int find_reference(const block_source *s, float *panel, uint16_t *half, float *mu)
{
    const mkvq_codec *codec = s->args->codec;
    for (int c = 0; c < codec->head_dim; c += 8) {
        if (!load_panel(s, c, NULL, panel))
            return 0;
        for (int i = 0; i < 8; i++) {
            vf sum = vf_set1(0.0f);
            for (int t = 0; t < codec->block_length; t += 8)
                sum = vf_add(sum, vf_load(panel + i * codec->block_length + t));
            half[c + i] = mkvq_f32_to_f16(vf_sum(sum) / (float)codec->block_length);
            mu[c + i] = mkvq_f16_to_f32(half[c + i]);
            if ((half[c + i] & 0x7c00) == 0x7c00)
                return 0;
        }
    }
    return 1;
}

static inline void put_bits(uint32_t *words, vi bits)
{
    vi_store(words, vi_or(vi_load(words), bits));
}

/* Ors the codes of n elements into their words; `words` are those of the first element in the first
 * column (row); columns are `length` words long. */
static void put_group(uint32_t *words, int64_t length, mkvq_code_place place, const float *x, int n,
                      const group_code *g)
{
    uint32_t *low = words + place.words * length,
             *third = place.third < 0 ? NULL : words + place.third * length;
    for (int i = 0; i < n; i += 8) {
        const vi code = find_codes(vf_load(x + i), g);
        put_bits(low + i, vi_shl(vi_and1(code, place.mask), place.shift));
        if (third)
            put_bits(third + i, vi_shl(vi_shr(code, 2), place.third_shift));
    }
}

/* The same for eight groups whose codes share their words. */
static MKVQ_INLINE void put_octet(uint32_t *low, uint32_t *third, const mkvq_code_place *places,
                                  const float *const *rows, int n, const group_code *g, int quick)
{
    for (int i = 0; i < n; i += 8) {
        vi a = vi_set1(0), b = a;
        MKVQ_UNROLL(8)
        for (int r = 0; r < 8; r++) {
            const vf x = vf_load(rows[r] + i);
            const vi code = quick ? quick_codes(x, g + r) : vi_from_vf(codes_of(x, g + r));
            a = vi_or(a, vi_shl(vi_and1(code, places->mask), places[r].shift));
            if (third)
                b = vi_or(b, vi_shl(vi_shr(code, 2), places[r].third_shift));
        }
        put_bits(low + i, a);
        if (third)
            put_bits(third + i, b);
    }
}

static void put_codes(uint32_t *words, int64_t length, const mkvq_code_place *places,
                      const float *const *rows, int count, int n, const group_code *g)
{
    const mkvq_code_place *p = places;
    int together = count == 8, quick = 1;
    for (int r = 0; r < count; r++) {
        together &= places[r].words == p->words && places[r].third == p->third;
        quick &= g[r].inverse != 0.0f;
    }
    uint32_t *low = words + p->words * length,
             *third = p->third < 0 ? NULL : words + p->third * length;
    if (!together)
        for (int r = 0; r < count; r++)
            put_group(words, length, places[r], rows[r], n, g + r);
    else if (!third && quick)
        put_octet(low, NULL, places, rows, n, g, 1);
    else if (!third)
        put_octet(low, NULL, places, rows, n, g, 0);
    else if (quick)
        put_octet(low, third, places, rows, n, g, 1);
    else
        put_octet(low, third, places, rows, n, g, 0);
}

/* Up to eight channels of one tier. */
typedef struct {
    int count;
    int stored[8]; /* index in stored order */
    const float *x[8];
} channel_octet;

/* Codes channels of one tier; 0 if a group does not fit. */
static int pack_channels(block_source *s, const mkvq_layout *l, int tier, const channel_octet *rows,
                         uint8_t *record, float *largest)
{
    const mkvq_codec *codec = s->args->codec;
    uint8_t *scales = record + l->key_meta;
    uint8_t *offsets =
        scales + (int64_t)mkvq_meta_bytes(codec->key_metadata) * l->key_groups * l->coded;
    mkvq_code_place places[8];
    const float *x[8];
    for (int r = 0; r < rows->count; r++)
        places[r] = mkvq_key_place(l, rows->stored[r]);
    for (int i = 0, t = 0; i < l->key_groups; i++, t += codec->key_group) {
        group_code g[8];
        for (int r = 0; r < rows->count; r++)
            x[r] = rows->x[r] + t;
        if (!code_octet(x, rows->count, codec->key_group, mkvq_tier_bits(tier), codec->key_metadata,
                        codec->key_range, 0, g))
            return 0;
        for (int r = 0; r < rows->count; r++) {
            const int64_t at = (int64_t)i * l->coded + rows->stored[r];
            put_metadata(scales, at, codec->key_metadata, g[r].scale_bits);
            put_metadata(offsets, at, codec->key_metadata, g[r].offset_bits);
            s->raised += g[r].raised;
            largest[tier] = g[r].scale > largest[tier] ? g[r].scale : largest[tier];
        }
        put_codes((uint32_t *)(void *)(record + l->key_columns) + t, codec->block_length, places, x,
                  rows->count, codec->key_group, g);
    }
    return 1;
}

/* The block's keys of one channel, bit for bit; x[T] holds them as floats, minus mu. */
static void copy_channel(const block_source *s, int channel, const float *x, uint8_t *out)
{
    const mkvq_view *k = &s->args->k;
    const int size = mkvq_dtype_bytes(k->dtype);
    const int64_t step = k->stride[2] * size;
    const uint8_t *p = mkvq_at(k, s->row, s->head, s->token) + channel * k->stride[3] * size;
    const int tokens = s->args->codec->block_length;
    if (k->dtype == MKVQ_F32 && !s->mu) {
        memcpy(out, x, (size_t)tokens * 4);
        return;
    }
    for (int t = 0; t < tokens; t++, p += step, out += size)
        if (size == 4)
            memcpy(out, p, 4);
        else
            memcpy(out, p, 2);
}

static int pack_keys(block_source *s, const mkvq_layout *l, const uint8_t *tiers, float *panel,
                     uint8_t *record, float *largest)
{
    const int dim = l->head.head_dim, tokens = l->head.tokens,
              size = mkvq_dtype_bytes(l->head.dtype), mixed = l->counts[tiers[0]] != dim;
    if (mixed && !s->kept && keeps_panels(s->args->codec)) { /* octets of one tier are full */
        for (int c = 0; c < dim; c += 8)
            if (!load_panel(s, c, s->mu, panel + c * tokens))
                return 0;
        s->kept = 1;
    }
    const int width = s->kept ? dim : 8;
    for (int c = 0; c < dim; c += width) {
        channel_octet rows = {0};
        int tier = MKVQ_TIER_EXACT; /* of the rows */
        if (!s->kept && !load_panel(s, c, s->mu, panel))
            return 0;
        for (int i = 0; i < dim; i++) {
            const int channel = l->order[i];
            const float *x = panel + (channel - c) * tokens;
            if (channel < c || channel >= c + width)
                continue;
            if (rows.count == 8 || tiers[channel] != tier) {
                if (rows.count && !pack_channels(s, l, tier, &rows, record, largest))
                    return 0;
                rows.count = 0, tier = tiers[channel];
            }
            if (tier == MKVQ_TIER_EXACT)
                copy_channel(s, channel, x,
                             record + l->exact_keys + (int64_t)(i - l->coded) * tokens * size);
            else
                rows.stored[rows.count] = i, rows.x[rows.count++] = x;
        }
        if (rows.count && !pack_channels(s, l, tier, &rows, record, largest))
            return 0;
    }
    return 1;
}

/* Codes the values of eight tokens from t on; 0 if a group does not fit. */
static int pack_tokens(block_source *s, const mkvq_layout *l, int t, const float *const *rows,
                       uint8_t *record, float *largest)
{
    const mkvq_codec *codec = s->args->codec;
    const int dim = codec->head_dim;
    uint8_t *scales = record + l->value_meta;
    uint8_t *offsets = scales + (int64_t)mkvq_meta_bytes(codec->value_metadata) * l->value_groups *
                                    codec->block_length;
    mkvq_code_place places[8];
    const float *x[8];
    for (int r = 0; r < 8; r++)
        places[r] = mkvq_value_place(l, t + r);
    for (int i = 0, c = 0; i < l->value_groups; i++, c += codec->value_group) {
        const int n = c + codec->value_group < dim ? codec->value_group : dim - c;
        group_code g[8];
        for (int r = 0; r < 8; r++)
            x[r] = rows[r] + c;
        if (!code_octet(x, 8, n, codec->value_bits, codec->value_metadata, codec->value_range, 0,
                        g))
            return 0;
        for (int r = 0; r < 8; r++) {
            const int64_t at = (int64_t)i * codec->block_length + t + r;
            put_metadata(scales, at, codec->value_metadata, g[r].scale_bits);
            put_metadata(offsets, at, codec->value_metadata, g[r].offset_bits);
            s->raised += g[r].raised;
            *largest = g[r].scale > *largest ? g[r].scale : *largest;
        }
        put_codes((uint32_t *)(void *)(record + l->values) + c, dim, places, x, 8, n, g);
    }
    return 1;
}

static int pack_values(block_source *s, const mkvq_layout *l, uint8_t *record, float *largest)
{
    const mkvq_view *v = &s->args->v;
    const int dim = l->head.head_dim, size = mkvq_dtype_bytes(v->dtype);
    float x[8][MKVQ_MAX_HEAD_DIM];
    const float *rows[8];
    for (int t = 0; t < l->head.tokens; t += 8) {
        for (int r = 0; r < 8; r++) {
            const uint8_t *p = mkvq_at(v, s->row, s->head, s->token + t + r);
            rows[r] = x[r];
            load_row(x[r], p, v->dtype, v->stride[3], dim);
            if (l->head.flags & MKVQ_FLAG_ROTATION)
                hadamard(x[r], dim);
            vf lost = vf_set1(0.0f); /* 0 * x is 0 or NaN, also where the rotation overflowed */
            for (int c = 0; c < dim; c += 8)
                lost = vf_fma(vf_load(x[r] + c), vf_set1(0.0f), lost);
            if (!vf_finite(lost))
                return 0;
            if (!l->head.value_bits)
                copy_row(record + l->values + (int64_t)(t + r) * dim * size, p, v->dtype,
                         v->stride[3], dim);
        }
        if (l->head.value_bits && !pack_tokens(s, l, t, rows, record, largest))
            return 0;
    }
    return 1;
}

/* Statistics of all channels; 0 if a key is not finite. */
static int measure_block(block_source *s, float *panel, channel_stats *stats)
{
    const mkvq_codec *codec = s->args->codec;
    for (int c = 0; c < codec->head_dim; c += 8) {
        float *x = keeps_panels(codec) ? panel + c * codec->block_length : panel;
        if (!load_panel(s, c, s->mu, x))
            return 0;
        for (int i = 0; i < 8; i++)
            measure_channel(codec, x + i * codec->block_length, c + i, stats);
    }
    s->kept = keeps_panels(codec);
    return 1;
}

/* The coded record of a block with these tiers; 0 if the block must become an exact one. */
static int64_t pack_coded(block_source *s, const uint8_t *tiers, float *panel, uint8_t *record)
{
    const mkvq_codec *codec = s->args->codec;
    mkvq_layout l;
    float largest[MKVQ_TIERS] = {0}, largest_value = 0.0f;
    uint8_t map[3 * MKVQ_MAX_HEAD_DIM / 8];
    memset(&l, 0, sizeof l);
    mkvq_header *h = &l.head;
    h->magic = MKVQ_MAGIC, h->version = MKVQ_FORMAT_VERSION, h->kind = MKVQ_KIND_CODED;
    h->dtype = (uint8_t)codec->dtype, h->value_bits = (uint8_t)codec->value_bits;
    h->head_dim = (uint16_t)codec->head_dim, h->tokens = (uint16_t)codec->block_length;
    h->key_group = (uint16_t)codec->key_group;
    h->metadata = (uint8_t)codec->key_metadata;
    h->flags = codec->key_reference ? MKVQ_FLAG_REFERENCE : 0;
    if (codec->value_bits) {
        h->value_group = (uint16_t)codec->value_group;
        h->metadata = (uint8_t)(h->metadata | codec->value_metadata << 4);
        h->flags = (uint8_t)(h->flags | (codec->value_rotation ? MKVQ_FLAG_ROTATION : 0));
    }
    mkvq_map_write(map, codec->head_dim, tiers);
    mkvq_layout_order(&l, map);
    mkvq_layout_sections(&l);
    memset(record, 0, (size_t)l.nbytes);
    if (!pack_keys(s, &l, tiers, panel, record, largest) ||
        !pack_values(s, &l, record, &largest_value))
        return 0;
    for (int tier = MKVQ_TIER_4, i = 0; tier >= 0; tier--, i++)
        h->key_fold[i] = mkvq_fold_bound(largest[tier]);
    h->value_fold = mkvq_fold_bound(largest_value);
    h->nbytes = (uint32_t)l.nbytes;
    memcpy(record, h, sizeof *h);
    memcpy(record + MKVQ_HEADER_BYTES, map, (size_t)(3 * codec->head_dim / 8));
    return l.nbytes;
}

static int64_t pack_exact(const block_source *s, uint8_t *record)
{
    const mkvq_pack_args *a = s->args;
    const mkvq_codec *codec = a->codec;
    const int dim = codec->head_dim, size = mkvq_dtype_bytes(codec->dtype);
    mkvq_layout l;
    memset(&l.head, 0, sizeof l.head);
    l.head.magic = MKVQ_MAGIC, l.head.version = MKVQ_FORMAT_VERSION, l.head.kind = MKVQ_KIND_EXACT;
    l.head.dtype = (uint8_t)codec->dtype;
    l.head.head_dim = (uint16_t)dim, l.head.tokens = (uint16_t)codec->block_length;
    mkvq_layout_sections(&l);
    l.head.nbytes = (uint32_t)l.nbytes;
    memset(record, 0, 64);
    memset(record + l.nbytes - 64, 0, 64);
    memcpy(record, &l.head, sizeof l.head);
    for (int t = 0; t < codec->block_length; t++) {
        const int64_t at = (int64_t)t * dim * size;
        copy_row(record + l.exact_keys + at, mkvq_at(&a->k, s->row, s->head, s->token + t),
                 a->k.dtype, a->k.stride[3], dim);
        copy_row(record + l.values + at, mkvq_at(&a->v, s->row, s->head, s->token + t), a->v.dtype,
                 a->v.stride[3], dim);
    }
    return l.nbytes;
}
