/* salience.inl.h - sums of |q|^power per key/value head and channel in float64, tokens outer,
 * query heads of the group inner. Sums of up to 32 channels stay in registers over a run of tokens,
 * which is so short that its queries stay in the first cache for the next 32 channels. */
#define RUN_ELEMENTS 1024

/* Tokens begin ... end, channels from `channel` on. */
static MKVQ_INLINE void add_queries(const mkvq_salience_args *a, int64_t row, int64_t head,
                                    int64_t begin, int64_t end, int64_t channel, double *sum,
                                    const int octets, const int dtype, const int64_t stride)
{
    const int64_t group = a->q.shape[1] / a->kv_heads, size = mkvq_dtype_bytes(dtype);
    vd s[4];
    for (int i = 0; i < octets; i++)
        s[i] = vd_load(sum + 8 * i);
    for (int64_t t = begin; t < end; t++) {
        const uint8_t *p = mkvq_at(&a->q, row, head * group, t) + channel * stride * size;
        for (int64_t g = 0; g < group; g++, p += a->q.stride[1] * size) {
            MKVQ_UNROLL(4)
            for (int i = 0; i < octets; i++)
                s[i] =
                    vd_add_power(s[i], load8(p + 8 * i * stride * size, dtype, stride), a->power);
        }
    }
    for (int i = 0; i < octets; i++)
        vd_store(sum + 8 * i, s[i]);
}

static void salience_unit(const mkvq_salience_args *a, int64_t row, int64_t head)
{
    const int64_t dim = a->q.shape[3], stride = a->q.stride[3];
    const int64_t group = a->q.shape[1] / a->kv_heads;
    const int64_t run = 1 + RUN_ELEMENTS / (group * dim + 1);
    const int dtype = a->q.dtype;
    double *sum = a->sum + (row * a->kv_heads + head) * dim;
    for (int64_t t = a->first ? a->first[row] : 0; t < a->q.shape[2]; t += run) {
        const int64_t end = t + run < a->q.shape[2] ? t + run : a->q.shape[2];
        int64_t c = 0;
        for (; stride == 1 && c + 32 <= dim; c += 32)
            if (dtype == MKVQ_F32)
                add_queries(a, row, head, t, end, c, sum + c, 4, MKVQ_F32, 1);
            else if (dtype == MKVQ_F16)
                add_queries(a, row, head, t, end, c, sum + c, 4, MKVQ_F16, 1);
            else
                add_queries(a, row, head, t, end, c, sum + c, 4, MKVQ_BF16, 1);
        for (; c < dim; c += 8)
            add_queries(a, row, head, t, end, c, sum + c, 1, dtype, stride);
    }
}
