// pack_room.h - what the threads of a block that packs share, and the block of tokens that they pack.
//
// Keys and values pass through a tile of shared memory, float32: keys channel by channel, so that a
// channel's tokens lie side by side (the whole block of some channels, or some tokens of all), values
// token by token. Rows are apart by what keeps the four octets of a warp, and a warp that reads one
// column, in different banks. Keys are read again in every phase, from a cache: a tile stays so small that
// any head_dim and block length fit every GPU, several blocks to a processor.
#ifndef MKVQ_PACK_ROOM_H
#define MKVQ_PACK_ROOM_H
#include "elements.h"
#include "octet.h"
#include "order.h"

#include "../cpu/group.inl.h"
#include "../cpu/hadamard.inl.h"
#include "../cpu/measure.inl.h"
#include "../cpu/metadata.inl.h"

constexpr int PACK_THREADS = 256, PACK_WARPS = 8, PACK_OCTETS = 32;
// Of a tile of values: one per octet, and whole words of every width.
constexpr int VALUE_TOKENS = 32;

struct pack_job {
    mkvq_pack_args args; // whose codec is not in device memory
    mkvq_codec codec;
    int round; // pack.cu
};

// One block of one head.
struct pack_block {
    int64_t unit, index; // of the head, of the record
    uint8_t *k, *v;      // its first token
    const float *importance;
    uint8_t *record;
    bool known; // the reference, before this block
};

struct pack_room {
    pack_job job;
    pack_block block;
    mkvq_layout layout;
    channel_stats stats;
    float score[MKVQ_MAX_HEAD_DIM], mu[MKVQ_MAX_HEAD_DIM];
    uint16_t half[MKVQ_MAX_HEAD_DIM]; // mu
    uint8_t tier[MKVQ_MAX_HEAD_DIM], rank[MKVQ_MAX_HEAD_DIM], stored[MKVQ_MAX_HEAD_DIM];
    order_room order;
    float cost[MKVQ_MAX_PATTERNS];
    int chosen;
    uint32_t largest[MKVQ_TIERS], largest_value; // bits of the largest scale
    uint32_t raised;
    alignas(16) float tile[1]; // and more
};

// The phases of a pack are functions of their own; each finds the room anew, so that the compiler knows
// that it is shared memory.
MKVQ_DEVICE pack_room *room()
{
    return (pack_room *)shared_memory();
}

// What all threads know of a block after this. Begins and ends with a sync_block.
MKVQ_DEVICE void find_block(int64_t row, int64_t head, int64_t block, pack_room *s)
{
    sync_block();
    if (thread_index() == 0) {
        const int64_t token = s->job.args.first[row] + block * s->job.codec.block_length;
        pack_block *b = &s->block;
        b->unit = row * s->job.args.k.shape[1] + head;
        b->index = b->unit * s->job.args.max_blocks + block;
        b->k = mkvq_at(&s->job.args.k, row, head, token),
        b->v = mkvq_at(&s->job.args.v, row, head, token);
        b->importance = s->job.args.importance
                            ? s->job.args.importance + b->unit * s->job.codec.head_dim
                            : NULL;
        b->record = s->job.args.out + b->index * s->job.args.out_stride;
        b->known = mkvq_has_reference(&s->job.codec) && s->job.args.has_mu[b->unit];
    }
    sync_block();
}

// The reference, where keys have one.
MKVQ_DEVICE const float *mu_of(const pack_room *s)
{
    return mkvq_has_reference(&s->job.codec) ? s->mu : NULL;
}

// ---- tiles -----------------------------------------------------------------------------------------
// Channels whose whole block lies in a tile; an even part of the octets.
MKVQ_FN int tile_channels(int tokens)
{
    return tokens <= 256 ? 32 : tokens <= 512 ? 16 : 8;
}

// Tokens of which all channels lie in a tile.
MKVQ_FN int tile_tokens(int dim, int tokens)
{
    const int most = dim <= 64 ? 128 : dim <= 128 ? 64 : 32;
    return most < tokens ? most : tokens;
}

MKVQ_FN int tile_floats(int dim, int tokens)
{
    const int a = tile_channels(tokens) * (tokens + 1), b = dim * (tile_tokens(dim, tokens) + 1),
              c = VALUE_TOKENS * octet_pitch(dim);
    return a > b ? (a > c ? a : c) : (b > c ? b : c);
}

// Which of 32 rows of a tile an octet takes, so that those of a warp lie in different banks.
MKVQ_DEVICE int key_row()
{
    return thread_index() % 32 / 8 * PACK_WARPS + thread_index() / 32;
}
MKVQ_DEVICE int value_row()
{
    return thread_index() / 8;
}

// Keys of some channels and a multiple of 32 tokens, the first at p, minus mu, to
// tile[channels][pitch]; whether one was not finite.
MKVQ_DEVICE bool load_keys(const mkvq_view &k, const uint8_t *p, int channels, int tokens,
                           const float *mu, float *tile, int pitch)
{
    const int lane = thread_index() % 32, warp = thread_index() / 32,
              size = mkvq_dtype_bytes(k.dtype);
    bool bad = false;
    MKVQ_UNROLL(1)
    for (int c = lane; c < channels; c += 32) {
        const uint8_t *q = p + c * k.stride[3] * size;
        const float m = mu ? mu[c] : 0.0f;
        MKVQ_UNROLL(1)
        for (int t = warp; t < tokens; t += 32) {
            float x[4];
            MKVQ_UNROLL(4)
            for (int i = 0; i < 4; i++)
                x[i] = load_element(q + (t + i * PACK_WARPS) * k.stride[2] * size, k.dtype);
            MKVQ_UNROLL(4)
            for (int i = 0; i < 4; i++) {
                bad = bad || !is_finite(x[i]);
                tile[c * pitch + t + i * PACK_WARPS] = mu ? x[i] - m : x[i];
            }
        }
    }
    return bad;
}

// Keys of the channels from `channel` on of the whole block.
MKVQ_DEVICE bool load_channels(int channel, int channels, const float *mu, pack_room *s)
{
    const mkvq_view &k = s->job.args.k;
    const int tokens = s->job.codec.block_length;
    return load_keys(k, s->block.k + channel * k.stride[3] * mkvq_dtype_bytes(k.dtype), channels,
                     tokens, mu ? mu + channel : NULL, s->tile, tokens + 1);
}

// Channels of the tile that begins at `channel`.
MKVQ_DEVICE int channels_from(int channel, const pack_room *s)
{
    const int width = tile_channels(s->job.codec.block_length),
              rest = s->job.codec.head_dim - channel;
    return width < rest ? width : rest;
}
#endif
