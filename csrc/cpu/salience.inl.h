/* salience.inl.h - sums of |q|^power per key/value head and channel in float64, tokens outer,
 * query heads of the group inner. */
static void salience_unit(const mkvq_salience_args *a, int64_t row, int64_t head)
{
    const int64_t group = a->q.shape[1] / a->kv_heads, dim = a->q.shape[3];
    double *sum = a->sum + (row * a->kv_heads + head) * dim;
    const int64_t step = 8 * a->q.stride[3] * mkvq_dtype_bytes(a->q.dtype);
    for (int64_t t = a->first ? a->first[row] : 0; t < a->q.shape[2]; t++)
        for (int64_t g = 0; g < group; g++) {
            const uint8_t *p = mkvq_at(&a->q, row, head * group + g, t);
            for (int64_t c = 0; c < dim; c += 8, p += step)
                vd_accumulate(sum + c, load8(p, a->q.dtype, a->q.stride[3]), a->power);
        }
}
