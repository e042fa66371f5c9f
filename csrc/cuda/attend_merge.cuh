// attend_merge.cuh - the end of a block: rotation undone, partial results, and their merging by the
// last block of a tile.
#ifndef MKVQ_ATTEND_MERGE_CUH
#define MKVQ_ATTEND_MERGE_CUH
#include "attend_tile.cuh"

#include <math.h>

// The Hadamard transform of docs/format.md section 4, of row x, by a warp.
MKVQ_DEVICE void undo_rotation(float *x, int dim, int lane)
{
    const int run = dim & -dim;
    MKVQ_ROLLED
    for (int stride = 1; stride < run; stride *= 2) {
        MKVQ_ROLLED
        for (int i = lane; i < dim / 2; i += 32) {
            const int c = 2 * i - i % stride;
            const float a = x[c], b = x[c + stride];
            x[c] = a + b, x[c + stride] = a - b;
        }
        sync_lanes((uint32_t)ALL_LANES);
    }
    const float scale = 1.0f / sqrtf((float)run);
    MKVQ_ROLLED
    for (int c = lane; c < dim; c += 32)
        x[c] *= scale;
}

// Row r of the tile from its sums; by a warp.
template <int ROWS>
MKVQ_DEVICE void store_output(const attend_tile<ROWS> &u, int r, const float *x, float largest,
                              float sum)
{
    const attend_job &a = u.a;
    const int query = u.m.facts.query[r], head = u.m.facts.query_head[r];
    if (a.sink_logits && largest != -INFINITY)
        sum += exp2_float(a.sink_logits[head] * MKVQ_LOG2E - largest);
    const float inverse = sum == 0.0f ? 0.0f : 1.0f / sum; // nothing to see: zeros
    uint8_t *out = mkvq_at(&a.out, u.m.facts.row, head, query);
    const int64_t step = a.out.stride[3] * mkvq_dtype_bytes(a.out.dtype);
    MKVQ_ROLLED
    for (int c = u.lane; c < a.dim; c += 32)
        store_element(out + c * step, a.out.dtype, x[c] * inverse);
}

// Row r from the partial results of all splits; by a warp. `x`: room for the row.
template <int ROWS> MKVQ_DEVICE void merge_row(const attend_tile<ROWS> &u, int r, float *x)
{
    const int dim = u.a.dim;
    const int64_t splits = u.a.splits, size = (int64_t)ROWS * (2 + dim);
    const float *first = u.a.partials + u.m.facts.index * splits * size + r * (2 + dim);
    float largest = -INFINITY, sum = 0.0f, y[MKVQ_MAX_HEAD_DIM / 32] = {};
    MKVQ_ROLLED
    for (int64_t i = u.lane; i < splits; i += 32)
        largest = fmaxf(largest, first[i * size]);
    largest = warp_max(largest);
    const float base = largest == -INFINITY ? 0.0f : largest;
    MKVQ_ROLLED
    for (int64_t i = 0; i < splits; i++) {
        const float *part = first + i * size;
        const float weight = part[0] == largest ? 1.0f : exp2_float(part[0] - base);
        sum = fmaf(part[1], weight, sum);
        MKVQ_UNROLL_ALL
        for (int k = 0; k < MKVQ_MAX_HEAD_DIM / 32; k++)
            if (32 * k + u.lane < dim)
                y[k] = fmaf(part[2 + 32 * k + u.lane], weight, y[k]);
    }
    MKVQ_UNROLL_ALL
    for (int k = 0; k < MKVQ_MAX_HEAD_DIM / 32; k++)
        if (32 * k + u.lane < dim)
            x[32 * k + u.lane] = y[k];
    store_output(u, r, x, largest, sum);
}

template <int ROWS> MKVQ_DEVICE void end_tile(attend_tile<ROWS> &u)
{
    const attend_job &a = u.a;
    const int dim = a.dim;
    float *outputs = (float *)u.weights(), *mine = outputs + 32 * u.warp;
    const int mine_end = dim - 32 * u.warp;
    sync_block(); // nobody needs the weights any more
    if (u.m.any_rotated) {
        put_product(u, u.rotated, mine, dim, mine_end, false);
        sync_block();
        MKVQ_ROLLED
        for (int r = u.warp; r < u.m.facts.rows; r += u.warps())
            undo_rotation(outputs + r * dim, dim, u.lane);
        sync_block();
    }
    put_product(u, u.plain, mine, dim, mine_end, u.m.any_rotated);
    sync_block();
    float *part =
        a.partials + ((int64_t)u.m.facts.index * a.splits + u.m.facts.split) * ROWS * (2 + dim);
    MKVQ_ROLLED
    for (int r = u.warp; r < u.m.facts.rows; r += u.warps()) {
        const float largest = u.m.largest[r], sum = warp_sum(u.m.sum[r][u.lane]);
        if (a.splits == 1)
            store_output(u, r, outputs + r * dim, largest, sum);
        else {
            float *row = part + r * (2 + dim);
            if (u.lane == 0)
                row[0] = largest, row[1] = sum;
            MKVQ_ROLLED
            for (int c = u.lane; c < dim; c += 32)
                row[2 + c] = outputs[r * dim + c];
        }
    }
    if (a.splits == 1)
        return;
    sync_block();
    int last = 0;
    if (thread_index() == 0)
        last = add_ordered(a.arrived + u.m.facts.index, 1) == (uint32_t)a.splits - 1;
    if (!any_in_block(last))
        return;
    MKVQ_ROLLED
    for (int r = u.warp; r < u.m.facts.rows; r += u.warps())
        merge_row(u, r, outputs + r * dim);
    if (thread_index() == 0)
        a.arrived[u.m.facts.index] = 0;
}
#endif
