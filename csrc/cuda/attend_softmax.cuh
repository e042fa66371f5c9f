// attend_softmax.cuh - from scores to probabilities: softcap, mask, online softmax. A warp has a query
// row, a lane tokens lane, lane + 32 ...
#ifndef MKVQ_ATTEND_SOFTMAX_CUH
#define MKVQ_ATTEND_SOFTMAX_CUH
#include "attend_tile.cuh"

#include <float.h>
#include <math.h>

// Softcap and mask of scores s[k] of tokens 32 k + lane, n of them, the first being token `position` of
// the row; -inf behind them and where the mask hides, even of NaN.
template <int ROWS>
MKVQ_DEVICE void mask_scores(const attend_tile<ROWS> &u, float s[4], int r, int position, int n)
{
    const attend_job &a = u.a;
    const tile_facts &f = u.m.facts;
    const int query = f.query[r], head = f.query_head[r];
    // newest token that the query may see
    const int last =
        a.mask_kind == MKVQ_MASK_CAUSAL ? f.exact + f.packed - a.queries + query - position : n;
    const uint8_t *mask = nullptr;
    const int64_t step = a.mask.stride[3] * mkvq_dtype_bytes(a.mask.dtype);
    if (a.mask_kind == MKVQ_MASK_ARRAY)
        mask = mkvq_at(&a.mask, f.row, head, query) +
               ((a.start ? a.start[f.row] : 0) + position + u.lane) * step;
    MKVQ_UNROLL_ALL
    for (int k = 0; k < 4; k++) {
        const int t = 32 * k + u.lane;
        bool seen = t < n && t <= last;
        if (a.softcap != 0.0f) {
            const float cap = a.softcap * MKVQ_LOG2E;
            s[k] = cap * tanhf(s[k] / cap);
        }
        if (mask && seen) {
            if (a.mask.dtype == MKVQ_BOOL)
                seen = mask[32 * k * step] != 0;
            else {
                const float x = load_element(mask + 32 * k * step, a.mask.dtype);
                seen = !(x < -FLT_MAX);
                s[k] += x < -FLT_MAX / MKVQ_LOG2E ? -FLT_MAX : x * MKVQ_LOG2E;
            }
        }
        if (!seen)
            s[k] = -INFINITY;
    }
}

// Turns the scores of n tokens into probabilities relative to the running maximum, for each of the warp's
// rows; leaves in shrink[row] how sums so far follow it.
template <int ROWS> MKVQ_DEVICE void soften(const attend_tile<ROWS> &u, int position, int n)
{
    MKVQ_ROLLED
    for (int r = u.warp; r < u.m.facts.rows; r += u.warps()) {
        float p[4], *scores = u.m.scores[r] + u.lane, sum = u.m.sum[r][u.lane];
        const float old = u.m.largest[r];
        MKVQ_UNROLL_ALL
        for (int k = 0; k < 4; k++)
            p[k] = scores[32 * k];
        mask_scores(u, p, r, position, n);
        const float top = warp_max(fmaxf(fmaxf(fmaxf(p[0], p[1]), fmaxf(p[2], p[3])), old));
        const float shrink = top > old ? exp2_float(old - top) : 1.0f;
        const float base = top == -INFINITY ? 0.0f : top;
        sum *= shrink;
        MKVQ_UNROLL_ALL
        for (int k = 0; k < 4; k++) {
            p[k] = exp2_float(p[k] - base);
            sum += p[k], scores[32 * k] = p[k];
        }
        u.m.sum[r][u.lane] = sum;
        sync_lanes((uint32_t)ALL_LANES); // all have read the old maximum
        if (u.lane == 0)
            u.m.largest[r] = top, u.m.shrink[r] = shrink;
    }
}

// After a sync_block: what was added so far follows the new maximum.
template <int ROWS> MKVQ_DEVICE void shrink_outputs(attend_tile<ROWS> &u)
{
    MKVQ_UNROLL_ALL
    for (int c = 0; c < 2; c++) {
        const float shrink = u.m.shrink[(2 * (u.lane % 4) + c) % ROWS];
        MKVQ_UNROLL_ALL
        for (int i = 0; i < 8; i += 2)
            u.plain[i + c] *= shrink, u.rotated[i + c] *= shrink;
    }
}
#endif
