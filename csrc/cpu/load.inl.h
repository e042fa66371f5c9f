/* load.inl.h - elements of any float dtype and stride as float vectors, and back. */

/* Elements p[0], p[stride], ... p[7 * stride], widened. */
static inline vf load8(const uint8_t *p, int dtype, int64_t stride)
{
    if (stride == 1) {
        if (dtype == MKVQ_F32)
            return vf_load((const float *)(const void *)p);
        const uint16_t *half = (const uint16_t *)(const void *)p;
        return dtype == MKVQ_F16 ? vf_load_f16(half) : vf_load_bf16(half);
    }
    float x[8];
    for (int i = 0; i < 8; i++) {
        if (dtype == MKVQ_F32) {
            memcpy(&x[i], p + 4 * i * stride, 4);
            continue;
        }
        uint16_t half;
        memcpy(&half, p + 2 * i * stride, 2);
        x[i] = dtype == MKVQ_F16 ? mkvq_f16_to_f32(half) : mkvq_bf16_to_f32(half);
    }
    return vf_load(x);
}

static MKVQ_INLINE void load_row_as(float *out, const uint8_t *p, const int dtype,
                                    const int64_t stride, int n)
{
    const int64_t step = 8 * stride * mkvq_dtype_bytes(dtype);
    for (int c = 0; c < n; c += 8, p += step)
        vf_store(out + c, load8(p, dtype, stride));
}

static inline void load_row(float *out, const uint8_t *p, int dtype, int64_t stride, int n)
{
    if (stride == 1 && dtype == MKVQ_F32)
        memcpy(out, p, (size_t)n * 4);
    else if (stride == 1 && dtype == MKVQ_F16)
        load_row_as(out, p, MKVQ_F16, 1, n);
    else if (stride == 1)
        load_row_as(out, p, MKVQ_BF16, 1, n);
    else
        load_row_as(out, p, dtype, stride, n);
}

/* Rounds n floats to dtype. */
static inline void store_row(uint8_t *p, int dtype, int64_t stride, const float *x, int n)
{
    if (dtype == MKVQ_F32 && stride == 1) {
        memcpy(p, x, (size_t)n * 4);
        return;
    }
    for (int c = 0; c < n; c++) {
        if (dtype == MKVQ_F32) {
            memcpy(p + 4 * c * stride, &x[c], 4);
            continue;
        }
        const uint16_t half = dtype == MKVQ_F16 ? mkvq_f32_to_f16(x[c]) : mkvq_f32_to_bf16(x[c]);
        memcpy(p + 2 * c * stride, &half, 2);
    }
}

/* n elements bit for bit from a strided row to a dense one. */
static inline void copy_row(uint8_t *out, const uint8_t *p, int dtype, int64_t stride, int n)
{
    const int size = mkvq_dtype_bytes(dtype);
    if (stride == 1) {
        memcpy(out, p, (size_t)(n * size));
        return;
    }
    for (int c = 0; c < n; c++)
        memcpy(out + c * size, p + c * stride * size, (size_t)size);
}
