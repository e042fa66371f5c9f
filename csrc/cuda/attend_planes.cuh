// attend_planes.cuh - products of query rows with planes of codes, by matrix instructions.
//
// A plane has columns of 32-bit words that hold entries of 1, 2, 4 or 8 bits: channels, in key columns
// word[column][token], or tokens, in value rows word[row][channel]. A 3-bit code is an entry of a
// two-bit plane and, with four times the weight, one of a one-bit plane. The product sums entries times
// their weights, for 32 tokens (channels) m and all query rows n at once.
//
// Lane 4g + j loads word[4p + j][4g ... 4g + 3]. One AND takes field i of both halves of a word: as a
// float16 the bits are a subnormal, code * 2^(bits * i - 24), exact; fields above bit 9 are shifted down
// first. Nothing is converted or scaled: the power of two goes into the entry's weight. A step is the 16
// entries of fields 2f and 2f + 1 of four columns; rows g and g + 8 of the first matrix are m = 4g and
// 4g + 1, those of the second 4g + 2 and 4g + 3.
//
// Weights of a step are in the order in which lanes read them: float16 [lane][4], column n of lane
// 4n + j. They are pairs, a float16 and what it lost of the number, so that products are those of
// float32. With up to four query rows the second halves are columns 4 ... 7, at no cost; with more they
// are a second block of the step, and may be left out (`LOW`).
#ifndef MKVQ_ATTEND_PLANES_CUH
#define MKVQ_ATTEND_PLANES_CUH
#include "attend_tile.cuh"

// A record in global memory, or staged in shared memory, where the 16-byte pieces of every other 512
// bytes change places, for the banks: columns of 128 words can be read four at a time.
struct record_bytes {
    const uint8_t *base;
    uint32_t mix; // 3 or 0

    MKVQ_METHOD const uint8_t *at(uint32_t offset) const
    {
        return base + mixed(offset, mix);
    }
    MKVQ_METHOD static uint32_t mixed(uint32_t offset, uint32_t mix)
    {
        return offset ^ (offset >> 9 & mix) << 5;
    }
};

// Codes as float16 numbers: subnormals, or, where a device flushes those or is slow with them
// (-DMKVQ_NORMAL_OPERANDS), numbers above 1024 from which it is subtracted again, one instruction more.
#ifdef MKVQ_NORMAL_OPERANDS
enum { OPERAND_EXPONENT = 0 };
MKVQ_DEVICE uint32_t operand(uint32_t fields)
{
    return subtract_f16(fields | 0x64006400u, 0x64006400u);
}
#else
enum { OPERAND_EXPONENT = 24 };
MKVQ_DEVICE uint32_t operand(uint32_t fields)
{
    return fields;
}
#endif

// 0 ... 3 for 1, 2, 4 and 8 bits. (Numbers here are unsigned: divisions are shifts then.)
MKVQ_DEVICE unsigned log_of(unsigned bits)
{
    return bits == 8 ? 3 : bits >> 1;
}

// Steps that `columns` columns take.
MKVQ_DEVICE int plane_steps(unsigned bits, unsigned columns)
{
    return (int)((columns + 3) / 4 << (3 - log_of(bits)));
}

// Bits from which a word is shifted down by as many.
MKVQ_DEVICE unsigned upper_fields(unsigned bits)
{
    return bits < 4 ? 10 : 8;
}

// Where the weight of an entry lies, from the beginning of row 0; and the power of two by which its codes
// come too large.
struct entry_place {
    int at, power;
};

// Of entry `entry` of a plane.
MKVQ_DEVICE entry_place find_entry(unsigned bits, unsigned entry, unsigned step_size)
{
    const unsigned log = log_of(bits), upper = upper_fields(bits);
    const unsigned column = entry >> (5 - log), i = entry & (31 >> log);
    // docs/format.md section 3.2
    const unsigned bit = bits == 1 ? (i & 12) << 1 | (i & 16) >> 2 | (i & 3) : i << log;
    const unsigned b = bit % 16, field = b >> log;
    return {(int)(((column / 4 << (3 - log)) + field / 2) * step_size + column % 4 * 4 +
                  field % 2 * 2 + bit / 16),
            (int)(b < upper ? b : b - upper)};
}

template <int bits> MKVQ_DEVICE uint32_t field_pair(uint32_t word, int field)
{
    const unsigned bit = bits * (unsigned)field, upper = upper_fields(bits);
    const uint32_t mask = ((1u << bits) - 1) * 0x10001u;
    return operand(bit < upper ? word & mask << bit : word >> upper & mask << (bit - upper));
}

// d += product of a plane. `offset`: of word[0][4g] of the record, column_bytes between columns.
// Lanes that are not `active` have zeros instead of their codes.
template <int bits, int ROWS, bool LOW>
MKVQ_DEVICE void multiply_plane(const attend_tile<ROWS> &u, float d[8], const record_bytes &record,
                                uint32_t offset, uint32_t column_bytes, int columns, bool active,
                                const uint16_t *weights)
{
    constexpr int STEP = attend_tile<ROWS>::STEP;
    const int j = u.lane % 4;
    offset += (uint32_t)j * column_bytes;
    weights += 4 * u.lane;
    MKVQ_ROLLED
    for (int p = 0; p < columns; p += 4, offset += 4 * column_bytes) {
        uint4 w = {0, 0, 0, 0};
        if (active && p + j < columns)
            w = *(const uint4 *)record.at(offset);
        MKVQ_UNROLL_ALL
        for (int f = 0; f < 8 / bits; f++, weights += STEP) {
            const uint2 b = *(const uint2 *)weights;
            const uint32_t high[2] = {b.x, b.y};
            const uint32_t first[4] = {field_pair<bits>(w.x, 2 * f), field_pair<bits>(w.y, 2 * f),
                                       field_pair<bits>(w.x, 2 * f + 1),
                                       field_pair<bits>(w.y, 2 * f + 1)};
            const uint32_t second[4] = {field_pair<bits>(w.z, 2 * f), field_pair<bits>(w.w, 2 * f),
                                        field_pair<bits>(w.z, 2 * f + 1),
                                        field_pair<bits>(w.w, 2 * f + 1)};
            multiply_f16(d, first, high);
            multiply_f16(d + 4, second, high);
            if (ROWS == 8 && LOW) {
                const uint2 c = *(const uint2 *)(weights + 128);
                const uint32_t low[2] = {c.x, c.y};
                multiply_f16(d, first, low);
                multiply_f16(d + 4, second, low);
            }
        }
    }
}
#endif
