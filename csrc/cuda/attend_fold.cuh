// attend_fold.cuh - weights of a group of tokens or channels, for attend_planes.cuh.
//
// Scales are folded into what multiplies the codes: sum_i q_i (s_i c_i + o_i) = sum_i (q_i s_i) c_i +
// sum_i q_i o_i, the last sum being the constant of a row and group. Weights of a row and group are
// scaled by a power of two to less than 2^15, and the product is scaled back by the factor.
//
// A thread has a channel, or a token. A slot is a group whose weights, factors and constants are in
// shared memory.
#ifndef MKVQ_ATTEND_FOLD_CUH
#define MKVQ_ATTEND_FOLD_CUH
#include "attend_map.cuh"

// Scale and offset `at` of two metadata planes; `unit` as in attend_map.cuh.
MKVQ_DEVICE void load_metadata(const record_bytes &record, uint32_t scales, uint32_t offsets,
                               int at, int metadata, int unit, float *scale, float *offset)
{
    if (metadata == MKVQ_META_E5M3_INT8) {
        *scale = mkvq_e5m3_value(*record.at(scales + (uint32_t)at));
        *offset = (float)*(const int8_t *)record.at(offsets + (uint32_t)at) *
                  (*scale * mkvq_float((uint32_t)(124 + unit) << 23));
    } else {
        *scale = f16_float(*(const uint16_t *)record.at(scales + 2 * (uint32_t)at));
        *offset = f16_float(*(const uint16_t *)record.at(offsets + 2 * (uint32_t)at));
    }
}

// The power of two that takes `top` into [2^12, 2^13), so that four times as much fits float16; and what
// takes products back.
struct weight_scale {
    float up, down;
};
MKVQ_DEVICE weight_scale find_scale(float top)
{
    uint32_t exponent = mkvq_bits(top) >> 23;
    exponent = exponent < 16 ? 16 : exponent > 220 ? 220 : exponent;
    return {mkvq_float((266 - exponent) << 23),
            mkvq_float((exponent - 12 + OPERAND_EXPONENT) << 23)};
}

template <int ROWS> MKVQ_DEVICE void store_weight(uint16_t *to, float x, bool low)
{
    const uint16_t high = (uint16_t)pack_f16(x, 0.0f);
    *to = high;
    if (low)
        to[ROWS == 4 ? 64 : 128] = (uint16_t)pack_f16(x - f16_float(high), 0.0f);
}

// 2^-power, of entry_place.
MKVQ_DEVICE float undo_power(int power)
{
    return mkvq_float((uint32_t)(127 - power) << 23);
}

// The largest of what the warps have found.
template <int ROWS> MKVQ_DEVICE uint32_t find_top(const attend_tile<ROWS> &u, int slot, int r)
{
    const uint4 *x = (const uint4 *)u.m.tops[slot][r];
    const auto larger = [](uint32_t a, uint32_t b) { return a > b ? a : b; };
    uint32_t top = larger(larger(x->x, x->y), larger(x->z, x->w));
    if (u.warps() > 4)
        top = larger(top, larger(larger(x[1].x, x[1].y), larger(x[1].z, x[1].w)));
    return top;
}

// Weights of key groups group ... group + n. Ends before a sync_block.
template <int ROWS>
MKVQ_DEVICE void fold_keys(const attend_tile<ROWS> &u, const record_sections &s,
                           const record_bytes &record, int group, int n)
{
    const int i = thread_index(), coded = s.coded, dim = u.a.dim;
    const uint32_t offsets =
        s.key_meta + (uint32_t)(mkvq_meta_bytes(s.key_metadata) * s.key_groups * coded);
    const bool has = i < coded;
    const uint2 info = has ? u.channels()[i] : uint2{0, NO_THIRD};
    const float *q = u.q() + (info.x & 255);
    float scale = 0.0f, offset = 0.0f;
    MKVQ_ROLLED
    for (int slot = 0; slot < n; slot++) {
        if (has) {
            load_metadata(record, s.key_meta, offsets, (group + slot) * coded + i, s.key_metadata,
                          (int)(info.x >> 8 & 7), &scale, &offset);
            if (s.flags & MKVQ_FLAG_REFERENCE)
                offset += u.mu()[info.x & 255];
        }
        MKVQ_ROLLED
        for (int r = 0; r < ROWS; r += 4) {
            float constant[4];
            uint32_t top = 0;
            MKVQ_UNROLL_ALL
            for (int k = 0; k < 4; k++) {
                const float x = has ? q[(r + k) * dim] : 0.0f;
                const uint32_t largest =
                    largest_of((uint32_t)ALL_LANES, mkvq_bits(fabsf(x * scale)));
                constant[k] = x * offset;
                top = u.lane % 4 == k ? largest : top;
            }
            const float sum = warp_sums(constant, u.lane);
            if (u.lane < 4) {
                u.m.tops[slot][r + u.lane][u.warp] = top;
                u.m.constants[slot][r + u.lane][u.warp] = sum;
            }
        }
    }
    sync_block();
    MKVQ_ROLLED
    for (int slot = n - 1; slot >= 0; slot--) { // the scale of the last one is still there
        if (slot < n - 1 && has)
            load_metadata(record, s.key_meta, offsets, (group + slot) * coded + i, s.key_metadata,
                          (int)(info.x >> 8 & 7), &scale, &offset);
        uint16_t *to = u.weights() + slot * s.steps * u.STEP;
        // a lane looks up one row
        const weight_scale by = find_scale(mkvq_float(find_top(u, slot, u.lane % ROWS)));
        if (i < ROWS)
            u.m.factors[slot][i] = by.down;
        const float third = scale * 4.0f * undo_power((int)(info.y >> 12 & 15));
        scale *= undo_power((int)(info.x >> 12 & 15));
        MKVQ_UNROLL(4)
        for (int r = 0; r < ROWS; r++, to += 16) {
            const float x = q[r * dim] * shuffle((uint32_t)ALL_LANES, by.up, r);
            if (has)
                store_weight<ROWS>(to + (info.x >> 16), x * scale, true);
            if (info.y != NO_THIRD)
                store_weight<ROWS>(to + (info.y >> 16), x * third, true);
        }
    }
}

// Steps of the value rows of n tokens.
MKVQ_DEVICE int value_steps(unsigned bits, unsigned n)
{
    return bits == 3 ? plane_steps(2, n / 16) + plane_steps(1, n / 32)
                     : plane_steps(bits, n * bits / 32);
}

// Weights of value groups group ... group + groups, of n tokens from `begin` on. Probabilities are at most
// 1, so that the record's bound of its scales bounds the weights. Ends before a sync_block.
template <int ROWS>
MKVQ_DEVICE void fold_values(const attend_tile<ROWS> &u, const record_sections &s,
                             const record_bytes &record, int group, int groups, int begin, int n)
{
    const int t = thread_index(), bits = s.value_bits,
              steps = value_steps((unsigned)bits, (unsigned)n);
    const uint32_t offsets =
        s.value_meta + (uint32_t)(mkvq_meta_bytes(s.value_metadata) * s.value_groups * s.tokens);
    const bool low = ROWS == 4 || u.a.all_products, has = t < n;
    const entry_place e = find_entry(bits == 3 ? 2 : (unsigned)bits, (unsigned)t, u.STEP);
    entry_place third = find_entry(1, (unsigned)t, u.STEP);
    third.at += plane_steps(2, (unsigned)n / 16) * u.STEP;
    const weight_scale by = find_scale(s.value_bound);
    MKVQ_ROLLED
    for (int slot = 0; slot < groups; slot++) {
        float scale = 0.0f, offset = 0.0f;
        if (has)
            load_metadata(record, s.value_meta, offsets, (group + slot) * s.tokens + begin + t,
                          s.value_metadata, bits == 8 ? 5 : bits - 1, &scale, &offset);
        const float third_scale = scale * by.up * 4.0f * undo_power(third.power);
        scale *= by.up * undo_power(e.power);
        uint16_t *to = u.weights() + slot * steps * u.STEP;
        if (t < ROWS)
            u.m.factors[slot][t] = by.down;
        MKVQ_ROLLED
        for (int r = 0; r < ROWS; r += 4) {
            float constant[4];
            MKVQ_UNROLL_ALL
            for (int k = 0; k < 4; k++, to += 16) {
                const float p = has ? u.m.scores[r + k][t] : 0.0f;
                constant[k] = p * offset;
                if (!has)
                    continue;
                store_weight<ROWS>(to + e.at, p * scale, low);
                if (bits == 3)
                    store_weight<ROWS>(to + third.at, p * third_scale, low);
            }
            const float sum = warp_sums(constant, u.lane);
            if (u.lane < 4)
                u.m.constants[slot][r + u.lane][u.warp] = sum;
        }
    }
}
#endif
