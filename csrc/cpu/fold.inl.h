/* fold.inl.h - scales and offsets as floats, and operands for dot.inl.h.
 *
 * Scales are folded into what multiplies the codes, once per group of tokens or channels, so that a
 * dot product runs over bare codes: sum_i q_i (s_i c_i + o_i) = sum_i (q_i s_i) c_i + sum_i q_i o_i.
 * Here the lanes of a vector are the eight query rows of a tile, unused ones zero. */

/* n scales and offsets of codes of `bits` bits, from two metadata planes; up to seven elements
 * behind them are read and written too. */
static void read_metadata(const uint8_t *scales, const uint8_t *offsets, int64_t at, int metadata,
                          int bits, float *scale, float *offset, int n)
{
    const vf unit = vf_set1(mkvq_offset_unit(1.0f, bits));
    for (int i = 0; i < n; i += 8) {
        vf s, o;
        if (metadata == MKVQ_META_E5M3_INT8) {
            const vi biased = vi_add(vi_load_u8(scales + at + i), vi_set1(MKVQ_E5M3_BIAS));
            s = vf_of_bits(vi_shl(biased, 20));
            o = vf_mul(vf_from_vi(vi_load_i8(offsets + at + i)), vf_mul(s, unit));
        } else {
            s = vf_load_f16((const uint16_t *)(const void *)(scales + 2 * (at + i)));
            o = vf_load_f16((const uint16_t *)(const void *)(offsets + 2 * (at + i)));
        }
        vf_store(scale + i, s);
        vf_store(offset + i, o);
    }
}

static inline vf larger(vf top, vf x)
{
    return vf_max(vf_abs(x), top);
}

#ifdef MKVQ_SPLIT16
/* Pairs of a column of 2n entries, n / 2 apart: as their low bytes, then their high bytes. */
static void split_pairs(int32_t (*pairs)[8], int entries, int column)
{
    const int half = column / 4;
    vi p[8];
    for (int e = 0; e < entries; e += column, pairs += 2 * half) {
        for (int j = 0; j < 2 * half; j++)
            p[j] = vi_load((const uint32_t *)pairs[j]);
        for (int j = 0; j < half; j++) {
            vi_store((uint32_t *)pairs[2 * j], vi_low_bytes(p[j], p[j + half]));
            vi_store((uint32_t *)pairs[2 * j + 1], vi_high_bytes(p[j], p[j + half]));
        }
    }
}
#endif

/* Rounds operands x[e][row], at most `top` in size, to 16 bits: pairs of entries half a column
 * apart, and the factor that undoes it, so that the largest of every row is +-32767.
 *
 * Returns sum_e (x[e] - rounded x[e]) * middle[e], what rounding costs if every code is the middle
 * one: added to the result it leaves the rounding errors times codes around zero, half as large. */
static vf make_pairs(const float (*x)[8], const float *middle, int entries, int column, vf top,
                     int32_t (*pairs)[8], float *factor)
{
    const int steps = column / 2;
    const vf bound = vf_max(vf_set1(0x1p-100f), top); /* all zero: any factor will do */
    const vf up = vf_div(vf_set1(32767.0f), bound), down = vf_mul(bound, vf_set1(1.0f / 32767.0f));
    const vf magic = vf_set1(12582912.0f); /* 1.5 * 2^23: the sum's lowest bits are the integer */
    vf cost0 = vf_set1(0.0f), cost1 = cost0, cost2 = cost0, cost3 = cost0; /* short chains */
#define PAIR(j, low_cost, high_cost) \
    { \
        const vf a = vf_load(x[j]), b = vf_load(x[(j) + steps]); \
        const vf low = vf_fma(a, up, magic), high = vf_fma(b, up, magic); \
        const vf rest_a = vf_fma(a, up, vf_sub(magic, low)), \
                 rest_b = vf_fma(b, up, vf_sub(magic, high)); \
        low_cost = vf_fma(rest_a, vf_set1(middle[j]), low_cost); \
        high_cost = vf_fma(rest_b, vf_set1(middle[(j) + steps]), high_cost); \
        vi_store((uint32_t *)*pairs++, vi_pair16(vi_bits(low), vi_bits(high))); \
    }
    for (int e = 0; e < entries; e += column)
        for (int j = e; j < e + steps; j += 2) {
            PAIR(j, cost0, cost1)
            PAIR(j + 1, cost2, cost3)
        }
#undef PAIR
#ifdef MKVQ_SPLIT16
    if (SPLIT(column == 4 ? DOT_8 : DOT_4))
        split_pairs(pairs - entries / 2, entries, column);
#endif
    vf_store(factor, down);
    return vf_mul(vf_add(vf_add(cost0, cost1), vf_add(cost2, cost3)), down);
}

/* The middle code of `bits` bits, n times. */
static void fill_middle(float *middle, int bits, int n)
{
    for (int i = 0; i < n; i++)
        middle[i] = 0.5f * (float)((1 << bits) - 1);
}

/* The same for entries of two-bit codes, rounded to 8 bits, four of a column in a dword. */
static vf make_bytes(const float (*x)[8], int entries, vf top, int32_t (*bytes)[8], float *factor)
{
    const vf bound = vf_max(vf_set1(0x1p-100f), top), magic = vf_set1(12582912.0f);
    const vf up = vf_div(vf_set1(127.0f), bound), down = vf_mul(bound, vf_set1(1.0f / 127.0f));
    vf cost = vf_set1(0.0f);
    for (int e = 0; e < entries; e += 16)
        for (int j = e; j < e + 4; j++, bytes++) {
            vi four = vi_set1(0);
            for (int k = 0; k < 4; k++) {
                const vf a = vf_load(x[j + 4 * k]), whole = vf_fma(a, up, magic);
                cost = vf_add(cost, vf_fma(a, up, vf_sub(magic, whole)));
                four = vi_or(four, vi_shl(vi_and1(vi_bits(whole), 255), 8 * k));
            }
            vi_store((uint32_t *)*bytes, four);
        }
    vf_store(factor, down);
    return vf_mul(cost, vf_mul(down, vf_set1(1.5f)));
}
