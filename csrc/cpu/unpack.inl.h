/* unpack.inl.h - records back to tokens: value = float32(code * scale) + offset, plus mu, or
 * rotated back; then rounded to the caller's dtype. */
/* x[i] = code * scale + offset of n elements; `words`, `length`, `at` as in put_codes. */
static inline void get_values(const uint32_t *words, int64_t length, int at, mkvq_code_place place,
                              float *x, int n, float scale, float offset)
{
    const uint32_t *low = words + place.words * length + at,
                   *third = words + place.third * length + at;
    for (int i = 0; i < n; i += 8) {
        vi code = vi_and1(vi_shr(vi_load(low + i), place.shift), place.mask);
        if (place.third >= 0)
            code =
                vi_or(code, vi_shl(vi_and1(vi_shr(vi_load(third + i), place.third_shift), 1), 2));
        vf_store(x + i, vf_add(vf_mul(vf_from_vi(code), vf_set1(scale)), vf_set1(offset)));
    }
}

/* x[T] of the coded channel at index `stored`. */
static void unpack_channel(const uint8_t *record, const mkvq_layout *l, int stored, float *x)
{
    const int metadata = l->head.metadata & 15, group = l->head.key_group;
    const int bits = mkvq_tier_bits(mkvq_stored_tier(l, stored));
    const uint8_t *scales = record + l->key_meta;
    const uint8_t *offsets = scales + (int64_t)mkvq_meta_bytes(metadata) * l->key_groups * l->coded;
    for (int i = 0; i < l->key_groups; i++) {
        const int64_t at = (int64_t)i * l->coded + stored;
        const float scale = get_metadata(scales, at, metadata);
        get_values((const uint32_t *)(const void *)(record + l->key_columns), l->head.tokens,
                   i * group, mkvq_key_place(l, stored), x + i * group, group, scale,
                   get_offset(offsets, at, metadata, scale, bits));
    }
}

/* x[D] of token t, still rotated if the record says so. */
static void unpack_value_token(const uint8_t *record, const mkvq_layout *l, int t, float *x)
{
    const int dim = l->head.head_dim, tokens = l->head.tokens, metadata = l->head.metadata >> 4;
    const uint8_t *scales = record + l->value_meta;
    const uint8_t *offsets = scales + (int64_t)mkvq_meta_bytes(metadata) * l->value_groups * tokens;
    for (int i = 0, c = 0; i < l->value_groups; i++, c += l->head.value_group) {
        const int n = c + l->head.value_group < dim ? l->head.value_group : dim - c;
        const int64_t at = (int64_t)i * tokens + t;
        const float scale = get_metadata(scales, at, metadata);
        get_values((const uint32_t *)(const void *)(record + l->values), dim, c,
                   mkvq_value_place(l, t), x + c, n, scale,
                   get_offset(offsets, at, metadata, scale, l->head.value_bits));
    }
}

/* Rows of exact values: verbatim where the dtypes agree, so that NaN payloads survive. */
static void copy_exact(const mkvq_view *out, int64_t row, int64_t head, int64_t token,
                       const uint8_t *p, const mkvq_layout *l)
{
    const int dim = l->head.head_dim, size = mkvq_dtype_bytes(l->head.dtype);
    float x[MKVQ_MAX_HEAD_DIM];
    for (int t = 0; t < l->head.tokens; t++, p += dim * size) {
        uint8_t *to = mkvq_at(out, row, head, token + t);
        if (out->dtype == l->head.dtype) {
            for (int c = 0; c < dim; c++)
                memcpy(to + c * out->stride[3] * size, p + c * size, (size_t)size);
            continue;
        }
        load_row(x, p, l->head.dtype, 1, dim);
        store_row(to, out->dtype, out->stride[3], x, dim);
    }
}

static void unpack_keys(const mkvq_unpack_args *a, int64_t row, int64_t head, int64_t token,
                        const uint8_t *record, const mkvq_layout *l, float *panel)
{
    const mkvq_history *h = a->history;
    const int dim = l->head.head_dim, tokens = l->head.tokens,
              size = mkvq_dtype_bytes(l->head.dtype);
    const int out_size = mkvq_dtype_bytes(a->k.dtype);
    const uint16_t *mu =
        l->head.flags & MKVQ_FLAG_REFERENCE ? h->mu + (row * h->kv_heads + head) * dim : NULL;
    int stored_of[MKVQ_MAX_HEAD_DIM];
    for (int i = 0; i < dim; i++)
        stored_of[l->order[i]] = i;
    for (int c = 0; c < dim; c += 8) {
        for (int i = 0; i < 8; i++) {
            float *x = panel + i * tokens;
            if (stored_of[c + i] >= l->coded) { /* exact */
                const int64_t exact = stored_of[c + i] - l->coded;
                load_row(x, record + l->exact_keys + exact * tokens * size, l->head.dtype, 1,
                         tokens);
                continue;
            }
            unpack_channel(record, l, stored_of[c + i], x);
            if (mu)
                for (int t = 0; t < tokens; t += 8)
                    vf_store(x + t, vf_add(vf_load(x + t), vf_set1(mkvq_f16_to_f32(mu[c + i]))));
        }
        for (int t = 0; t < tokens; t += 8) {
            vf r[8];
            float lanes[8];
            for (int i = 0; i < 8; i++)
                r[i] = vf_load(panel + i * tokens + t);
            vf_transpose(r);
            for (int i = 0; i < 8; i++) {
                vf_store(lanes, r[i]);
                store_row(mkvq_at(&a->k, row, head, token + t + i) + c * a->k.stride[3] * out_size,
                          a->k.dtype, a->k.stride[3], lanes, 8);
            }
        }
    }
}

static void unpack_unit(const mkvq_unpack_args *a, int64_t row, int64_t head)
{
    float panel[8 * MKVQ_MAX_BLOCK], x[MKVQ_MAX_HEAD_DIM];
    int64_t token = a->first[row];
    for (int64_t j = 0; j < a->history->blocks[row]; j++) {
        const uint8_t *record = mkvq_record_at(a->history, row, head, j);
        mkvq_layout l;
        mkvq_layout_read(&l, record);
        if (l.head.kind == MKVQ_KIND_EXACT)
            copy_exact(&a->k, row, head, token, record + l.exact_keys, &l);
        else
            unpack_keys(a, row, head, token, record, &l, panel);
        if (l.head.kind == MKVQ_KIND_EXACT || !l.head.value_bits)
            copy_exact(&a->v, row, head, token, record + l.values, &l);
        for (int t = 0; l.head.kind == MKVQ_KIND_CODED && l.head.value_bits && t < l.head.tokens;
             t++) {
            unpack_value_token(record, &l, t, x);
            if (l.head.flags & MKVQ_FLAG_ROTATION)
                hadamard(x, l.head.head_dim);
            store_row(mkvq_at(&a->v, row, head, token + t), a->v.dtype, a->v.stride[3], x,
                      l.head.head_dim);
        }
        token += l.head.tokens;
    }
}
