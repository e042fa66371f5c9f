// attend_tile.cuh - what the threads of a block know: the job, their tile of query rows, and where
// things lie in shared memory.
//
// A block takes up to ROWS (4 or 8) query rows of one batch row and KV head, a row being a pair (query
// position, query head of the group), over a run of packed blocks. Each warp owns 32 channels of the
// outputs and the softmax of rows warp, warp + warps ...; scores are made 128 tokens at a time, in units
// of ln 2, so that probabilities are powers of two.
#ifndef MKVQ_ATTEND_TILE_CUH
#define MKVQ_ATTEND_TILE_CUH
#include "elements.h"

#include <math.h>

constexpr float MKVQ_LOG2E = 1.44269504088896341f;

enum {
    ALL_LANES = -1,
    SCORE_STRIDE = MKVQ_TILE_TOKENS + 8, // rows two apart use other banks
    MOST_SLOTS = 8                       // groups whose weights are in shared memory at once
};

struct attend_job {
    mkvq_view q, out, k, v, mask;
    const int64_t *place, *blocks, *exact, *start;
    const uint16_t *mu;
    const float *sink_logits;
    uint32_t *arrived; // blocks that are done, of each tile
    float *partials;   // [tiles of all heads][splits][ROWS][2 + dim]; of one split none
    int64_t place_stride;
    int tiles, splits, queries, kv_heads, group, dim, sink_length, mask_kind, block_tokens,
        all_products;
    bool k_whole, v_whole; // vectors of the window can be read as such
    float scaling, softcap;
    int stage_bytes; // room for a record, twice
};

// What is the same for all threads and seldom needed: in shared memory, not in registers.
struct tile_facts {
    const int64_t *place;        // of the first packed block
    int index, split;            // index: of all tiles of all heads
    int row, head, rows;         // query rows
    int query[8], query_head[8]; // of each: position and head
    int exact, sinks;            // exact tokens, of which sinks
    int begin, blocks;           // packed blocks of this block of threads
    int packed;                  // tokens in all packed blocks of the row
    int pieces; // packed blocks, and the window where it belongs to this block of threads
};

// Of the coded record that is read; filled by attend_map.cuh. Offsets are those of docs/format.md,
// section 3.
struct record_sections {
    int tokens, key_group, key_groups, value_group, value_groups, value_bits, dtype, flags;
    int key_metadata, value_metadata; // mkvq_metadata
    int coded, exact;                 // channels
    int columns[4], step[4], steps;   // of 8, 4, 2 and 1 bit: columns, and where their steps begin
    uint32_t key_meta, value_meta, key_columns, exact_keys, values;
    float value_bound; // of scales
};

// Shared memory, but for what has as many elements as the head_dim.
template <int ROWS> struct tile_memory {
    tile_facts facts;
    record_sections record;
    float largest[8], sum[8][32]; // of a row: score, and shares of the sum of probabilities
    alignas(16) float shrink[8];  // how outputs so far follow a new maximum
    int any_rotated;              // values so far
    alignas(16) uint8_t channels_of[8][8]; // by tier and warp: of the 32 channels of its lanes
    // of weights of a slot: what takes a row's products back; by warp, the largest of a row, as bits,
    // and the share of what is added to its products
    alignas(16) float factors[MOST_SLOTS][ROWS];
    alignas(16) uint32_t tops[MOST_SLOTS][ROWS][8];
    alignas(16) float constants[MOST_SLOTS][ROWS][8];
    alignas(16) float scores[ROWS][SCORE_STRIDE]; // then probabilities

    // behind it: by stored index (attend_map.cuh), key reference, queries times scaling / ln 2 [ROWS][dim],
    // weights (attend_planes.cuh), which at the end make room for the outputs [ROWS][dim], two stages
    static constexpr int CHANNELS = 0, MU = 8, Q = 12, WEIGHTS = 12 + 4 * ROWS;
    static constexpr int STEP = ROWS == 4 ? 128 : 256; // float16 of a step of weights

    // A record takes at most dim / 8 + 15.
    MKVQ_FN int steps(int dim)
    {
        return dim / 8 + 32;
    }
};

template <int ROWS> MKVQ_FN int begin_of(int dim, int what)
{
    return (int)(sizeof(tile_memory<ROWS>) + 127) / 128 * 128 + dim * what;
}
template <int ROWS> MKVQ_FN int begin_of_stages(int dim)
{
    using memory = tile_memory<ROWS>;
    return (begin_of<ROWS>(dim, memory::WEIGHTS) + 2 * memory::STEP * memory::steps(dim) + 127) /
           128 * 128;
}

template <int ROWS> struct attend_tile {
    using memory = tile_memory<ROWS>;
    static constexpr int STEP = memory::STEP;

    const attend_job &a;
    memory &m;
    int warp, lane;
    // The outputs of 32 channels: plain[4t + 2i + c] belongs to channel 4g + 2t + i and column 2j + c of
    // the product, for lane 4g + j. Column n is row n; with four rows column n + 4 is row n, too, and
    // the two are added at the end. `rotated`: those of rotated values.
    float plain[8], rotated[8];

    MKVQ_METHOD explicit attend_tile(const attend_job &job) : a(job), m(*(memory *)shared_memory())
    {
    }
    MKVQ_METHOD int warps() const
    {
        return thread_count() / 32;
    }
    template <typename T> MKVQ_METHOD T *at(int what) const
    {
        return (T *)(shared_memory() + begin_of<ROWS>(a.dim, what));
    }
    MKVQ_METHOD uint2 *channels() const
    {
        return at<uint2>(memory::CHANNELS);
    }
    MKVQ_METHOD float *mu() const
    {
        return at<float>(memory::MU);
    }
    MKVQ_METHOD float *q() const
    {
        return at<float>(memory::Q);
    }
    MKVQ_METHOD uint16_t *weights() const
    {
        return at<uint16_t>(memory::WEIGHTS);
    }
    MKVQ_METHOD uint8_t *stage(int odd) const
    {
        return shared_memory() + begin_of_stages<ROWS>(a.dim) + (odd ? a.stage_bytes : 0);
    }
};

MKVQ_DEVICE void load_pair(float *x, uint32_t word, int dtype)
{
    if (dtype == MKVQ_F16)
        x[0] = f16_float((uint16_t)word), x[1] = f16_float((uint16_t)(word >> 16));
    else
        x[0] = mkvq_float(word << 16), x[1] = mkvq_float(word & 0xffff0000u);
}

// Four elements, `stride` elements apart, or side by side on a multiple of their length (`whole`).
MKVQ_DEVICE void load_four(float x[4], const uint8_t *p, int dtype, int64_t stride, bool whole)
{
    if (!whole) {
        const int64_t step = stride * mkvq_dtype_bytes(dtype);
        for (int i = 0; i < 4; i++)
            x[i] = load_element(p + i * step, dtype);
    } else if (dtype == MKVQ_F32) {
        const float4 y = *(const float4 *)p;
        x[0] = y.x, x[1] = y.y, x[2] = y.z, x[3] = y.w;
    } else {
        const uint2 y = *(const uint2 *)p;
        load_pair(x, y.x, dtype), load_pair(x + 2, y.y, dtype);
    }
}

MKVQ_DEVICE float warp_sum(float x)
{
    for (int flip = 16; flip; flip /= 2)
        x += shuffle_xor((uint32_t)ALL_LANES, x, flip);
    return x;
}

// Sums of four numbers; lane i has that of x[i % 4].
MKVQ_DEVICE float warp_sums(const float x[4], int lane)
{
    const uint32_t all = (uint32_t)ALL_LANES;
    const bool odd = lane & 1, upper = lane & 2;
    const float a = (odd ? x[1] : x[0]) + shuffle_xor(all, odd ? x[0] : x[1], 1),
                b = (odd ? x[3] : x[2]) + shuffle_xor(all, odd ? x[2] : x[3], 1);
    float sum = (upper ? b : a) + shuffle_xor(all, upper ? a : b, 2);
    for (int flip = 4; flip < 32; flip *= 2)
        sum += shuffle_xor(all, sum, flip);
    return sum;
}

// Ignores NaN.
MKVQ_DEVICE float warp_max(float x)
{
    for (int flip = 16; flip; flip /= 2)
        x = fmaxf(x, shuffle_xor((uint32_t)ALL_LANES, x, flip));
    return x;
}

// Stores a product d, of the columns of attend_tile::plain, at to[row * stride + m], or adds it
// (`add`): m = 0 ... 31 counts tokens or channels, those from `end` on are left out. Both columns of a row
// are added.
template <int ROWS>
MKVQ_DEVICE void put_product(const attend_tile<ROWS> &u, const float d[8], float *to, int stride,
                             int end, bool add)
{
    const int j = u.lane % 4, m = 4 * (u.lane / 4);
    if (ROWS == 4) {
        // lanes j and j ^ 2 have the columns of the same rows: each takes two of the four m
        const int second = j / 2;
        float x[4];
        MKVQ_UNROLL_ALL
        for (int i = 0; i < 4; i++)
            x[i] = (second ? d[4 + i] : d[i]) +
                   shuffle_xor((uint32_t)ALL_LANES, second ? d[i] : d[4 + i], 2);
        to += 2 * (j % 2) * stride + m + 2 * second;
        MKVQ_UNROLL_ALL
        for (int c = 0; c < 2 && m < end; c++) {
            float2 *p = (float2 *)(to + c * stride);
            *p = add ? float2{p->x + x[c], p->y + x[2 + c]} : float2{x[c], x[2 + c]};
        }
    } else {
        to += 2 * j * stride + m;
        MKVQ_UNROLL_ALL
        for (int c = 0; c < 2 && m < end; c++) {
            float4 *p = (float4 *)(to + c * stride);
            const float4 x = {d[c], d[2 + c], d[4 + c], d[6 + c]};
            *p = add ? float4{p->x + x.x, p->y + x.y, p->z + x.z, p->w + x.w} : x;
        }
    }
}
#endif
