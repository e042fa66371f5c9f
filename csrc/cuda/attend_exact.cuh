// attend_exact.cuh - exact tokens and channels, multiplied in float32: sinks, window, exact records,
// exact channels and values of coded ones.
#ifndef MKVQ_ATTEND_EXACT_CUH
#define MKVQ_ATTEND_EXACT_CUH
#include "attend_map.cuh"
#include "attend_softmax.cuh"

// Vectors of tokens, `step` bytes apart, elements `stride` apart; `whole`: four elements can be read as
// one.
struct exact_rows {
    const uint8_t *data;
    int64_t step, stride;
    int dtype;
    bool whole;
};

// Scores of n tokens of exact keys: a thread has a token.
template <int ROWS> MKVQ_DEVICE void score_exact(const attend_tile<ROWS> &u, exact_rows k, int n)
{
    const int t = thread_index(), dim = u.a.dim;
    if (t >= n)
        return;
    const uint8_t *p = k.data + t * k.step;
    const int64_t chunk = 4 * k.stride * mkvq_dtype_bytes(k.dtype);
    float s[ROWS];
    MKVQ_UNROLL_ALL
    for (int r = 0; r < ROWS; r++)
        s[r] = 0.0f;
    MKVQ_ROLLED
    for (int c = 0; c < dim; c += 8, p += 2 * chunk) {
        float x[8];
        load_four(x, p, k.dtype, k.stride, k.whole);
        load_four(x + 4, p + chunk, k.dtype, k.stride, k.whole);
        MKVQ_UNROLL_ALL
        for (int r = 0; r < ROWS; r++) {
            const float4 a = *(const float4 *)(u.q() + r * dim + c),
                         b = *(const float4 *)(u.q() + r * dim + c + 4);
            float y = fmaf(x[0], a.x, s[r]);
            y = fmaf(x[1], a.y, y), y = fmaf(x[2], a.z, y), y = fmaf(x[3], a.w, y);
            y = fmaf(x[4], b.x, y), y = fmaf(x[5], b.y, y), y = fmaf(x[6], b.z, y);
            s[r] = fmaf(x[7], b.w, y);
        }
    }
    MKVQ_UNROLL_ALL
    for (int r = 0; r < ROWS; r++)
        u.m.scores[r][t] = s[r];
}

// Adds the exact channels of n tokens of a coded record from `begin` on to their scores.
template <int ROWS>
MKVQ_DEVICE void score_channels(const attend_tile<ROWS> &u, const record_sections &s,
                                const record_bytes &record, int begin, int n)
{
    const int t = thread_index(), size = mkvq_dtype_bytes(s.dtype);
    if (t >= n)
        return;
    float x[ROWS];
    MKVQ_UNROLL_ALL
    for (int r = 0; r < ROWS; r++)
        x[r] = u.m.scores[r][t];
    uint32_t at = s.exact_keys + (uint32_t)((begin + t) * size);
    MKVQ_ROLLED
    for (int i = 0; i < s.exact; i++, at += (uint32_t)(s.tokens * size)) {
        const float key = load_element(record.at(at), s.dtype);
        const float *q = u.q() + (u.channels()[s.coded + i].x & 255);
        MKVQ_UNROLL_ALL
        for (int r = 0; r < ROWS; r++)
            x[r] = fmaf(key, q[r * u.a.dim], x[r]);
    }
    MKVQ_UNROLL_ALL
    for (int r = 0; r < ROWS; r++)
        u.m.scores[r][t] = x[r];
}

// Adds n tokens of exact values, weighted by what the scores now are, in the order of
// attend_tile::plain. With four rows the lanes of both columns of a row share its tokens.
template <int ROWS> MKVQ_DEVICE void add_values(attend_tile<ROWS> &u, exact_rows v, int n)
{
    const int j = u.lane % 4, channel = 32 * u.warp + 4 * (u.lane / 4);
    if (channel >= u.a.dim)
        return;
    constexpr int N = ROWS == 4 ? 4 : 2; // tokens at once
    const int first = ROWS == 4 ? j / 2 * N : 0, stride = ROWS == 4 ? 2 * N : N;
    const float *p = u.m.scores[2 * j % ROWS];
    const uint8_t *data = v.data + channel * v.stride * mkvq_dtype_bytes(v.dtype) + first * v.step;
    MKVQ_ROLLED
    for (int t = first; t < n; t += stride, data += stride * v.step) {
        float x[N][4];
        MKVQ_UNROLL_ALL
        for (int i = 0; i < N; i++)
            if (t + i < n)
                load_four(x[i], data + i * v.step, v.dtype, v.stride, v.whole);
        MKVQ_UNROLL_ALL
        for (int i = 0; i < N; i++) {
            const float row0 = p[t + i], row1 = p[SCORE_STRIDE + t + i];
            MKVQ_UNROLL_ALL
            for (int c = 0; c < 4 && t + i < n; c++) {
                u.plain[2 * c] = fmaf(row0, x[i][c], u.plain[2 * c]);
                u.plain[2 * c + 1] = fmaf(row1, x[i][c], u.plain[2 * c + 1]);
            }
        }
    }
}
#endif
