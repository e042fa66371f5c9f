// attend_coded.cuh - a coded record: scores of its keys, sums of its values.
#ifndef MKVQ_ATTEND_CODED_CUH
#define MKVQ_ATTEND_CODED_CUH
#include "attend_exact.cuh"
#include "attend_fold.cuh"

// total += the product d of the slot, scaled back, and its constant, in the lanes that have the group.
template <int ROWS>
MKVQ_DEVICE void add_product(const attend_tile<ROWS> &u, float total[8], const float d[8], int slot,
                             bool active)
{
    const int row = 2 * (u.lane % 4) % ROWS;
    const bool first = 2 * (u.lane % 4) < ROWS; // of the columns of a row
    float factor[2], constant[2];
    MKVQ_UNROLL_ALL
    for (int c = 0; c < 2; c++) {
        const float4 x = *(const float4 *)u.m.constants[slot][row + c];
        constant[c] = (x.x + x.y) + (x.z + x.w);
        if (u.warps() > 4) {
            const float4 y = *(const float4 *)&u.m.constants[slot][row + c][4];
            constant[c] += (y.x + y.y) + (y.z + y.w);
        }
        constant[c] = first ? constant[c] : 0.0f, factor[c] = u.m.factors[slot][row + c];
    }
    if (!active)
        return;
    MKVQ_UNROLL_ALL
    for (int i = 0; i < 8; i++)
        total[i] += fmaf(d[i], factor[i % 2], constant[i % 2]);
}

// Slots for `groups` groups of `steps` steps each, as far as there is room.
template <int ROWS> MKVQ_DEVICE int slots_of(int dim, int steps, int groups)
{
    const int room = attend_tile<ROWS>::memory::steps(dim),
              slots = groups < MOST_SLOTS ? groups : MOST_SLOTS;
    return slots * steps <= room ? slots : room / steps;
}

// Scores of the tokens begin ... begin + n of a record, multiples of 32: 32 of a warp. Groups that are
// not multiples of 32 tokens are multiplied one after the other, the other lanes' codes being zeros.
template <int ROWS>
MKVQ_DEVICE void score_keys(const attend_tile<ROWS> &u, const record_sections &s,
                            const record_bytes &record, int begin, int n)
{
    const int size = s.key_group, first = begin ? begin / size : 0,
              last = n == s.tokens ? s.key_groups - 1 : (begin + n - 1) / size,
              slots = slots_of<ROWS>(u.a.dim, s.steps, last + 1 - first);
    const int token = begin + 32 * u.warp, lane_token = token + 4 * (u.lane / 4);
    const uint32_t column_bytes = 4 * (uint32_t)s.tokens;
    float total[8] = {};
    MKVQ_ROLLED
    for (int group = first; group <= last; group += slots) {
        const int count = last + 1 - group < slots ? last + 1 - group : slots;
        if (group != first)
            sync_block();
        fold_keys(u, s, record, group, count);
        sync_block();
        if (32 * u.warp >= n)
            continue;
        MKVQ_ROLLED
        for (int slot = 0; slot < count; slot++) {
            if (token + 31 < (group + slot) * size || token >= (group + slot + 1) * size)
                continue;
            const bool active =
                lane_token >= (group + slot) * size && lane_token < (group + slot + 1) * size;
            const uint16_t *weights = u.weights() + slot * s.steps * u.STEP;
            uint32_t at = s.key_columns + 4 * (uint32_t)lane_token;
            float d[8] = {};
#define PLANE(i, bits) \
    if (s.columns[i]) { \
        multiply_plane<bits, ROWS, true>(u, d, record, at, column_bytes, s.columns[i], active, \
                                         weights + s.step[i] * u.STEP); \
        at += column_bytes * (uint32_t)s.columns[i]; \
    }
            PLANE(0, 8)
            PLANE(1, 4)
            PLANE(2, 2)
            PLANE(3, 1)
#undef PLANE
            add_product(u, total, d, slot, active);
        }
    }
    if (32 * u.warp < n)
        put_product(u, total, u.m.scores[0] + 32 * u.warp, SCORE_STRIDE, 32, false);
}

// d += product of the value rows of n tokens from `begin` on.
template <int ROWS, bool LOW>
MKVQ_DEVICE void multiply_values(const attend_tile<ROWS> &u, float d[8], const record_sections &s,
                                 const record_bytes &record, int begin, int n, int channel,
                                 bool active, const uint16_t *weights)
{
    const int bits = s.value_bits;
    const uint32_t row_bytes = 4 * (uint32_t)u.a.dim, at = s.values + 4 * (uint32_t)channel;
#define PLANE(bits, first, rows, to) \
    multiply_plane<bits, ROWS, LOW>(u, d, record, at + row_bytes * (uint32_t)(first), row_bytes, \
                                    rows, active, to)
    if (bits == 2 || bits == 3)
        PLANE(2, begin / 16, n / 16, weights);
    if (bits == 3)
        PLANE(1, s.tokens / 16 + begin / 32, n / 32,
              weights + plane_steps(2, (unsigned)n / 16) * u.STEP);
    else if (bits == 1)
        PLANE(1, begin / 32, n / 32, weights);
    else if (bits == 4)
        PLANE(4, begin / 8, n / 8, weights);
    else if (bits == 8)
        PLANE(8, begin / 4, n / 4, weights);
#undef PLANE
}

// Adds the values of the tokens begin ... begin + n, weighted by the probabilities.
template <int ROWS>
MKVQ_DEVICE void weigh_values(attend_tile<ROWS> &u, const record_sections &s,
                              const record_bytes &record, int begin, int n)
{
    const int size = s.value_group, steps = value_steps((unsigned)s.value_bits, (unsigned)n),
              slots = slots_of<ROWS>(u.a.dim, steps, s.value_groups);
    const int channel = 32 * u.warp, lane_channel = channel + 4 * (u.lane / 4);
    float total[8] = {};
    MKVQ_ROLLED
    for (int group = 0; group < s.value_groups; group += slots) {
        const int count = s.value_groups - group < slots ? s.value_groups - group : slots;
        if (group)
            sync_block();
        fold_values(u, s, record, group, count, begin, n);
        sync_block();
        if (channel >= u.a.dim)
            continue;
        MKVQ_ROLLED
        for (int slot = 0; slot < count; slot++) {
            if (channel + 31 < (group + slot) * size || channel >= (group + slot + 1) * size)
                continue;
            const bool active = lane_channel < u.a.dim && lane_channel >= (group + slot) * size &&
                                lane_channel < (group + slot + 1) * size;
            const uint16_t *weights = u.weights() + slot * steps * u.STEP;
            float d[8] = {};
            if (ROWS == 4 || u.a.all_products)
                multiply_values<ROWS, true>(u, d, s, record, begin, n, lane_channel, active,
                                            weights);
            else
                multiply_values<ROWS, false>(u, d, s, record, begin, n, lane_channel, active,
                                             weights);
            add_product(u, total, d, slot, active);
        }
    }
    const bool is_rotated = s.flags & MKVQ_FLAG_ROTATION;
    if (is_rotated && thread_index() == 0)
        u.m.any_rotated = 1;
    MKVQ_UNROLL_ALL
    for (int i = 0; i < 8; i++)
        if (is_rotated)
            u.rotated[i] += total[i];
        else
            u.plain[i] += total[i];
}

#endif
