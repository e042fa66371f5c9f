// pack_record.h - the record of one block, coded with the tiers that were chosen or exact: header,
// channel map, padding, and its length.
#ifndef MKVQ_PACK_RECORD_H
#define MKVQ_PACK_RECORD_H
#include "pack_keys.h"
#include "pack_values.h"

// Fields of the header and sections of a coded record with these tiers.
MKVQ_DEVICE void lay_out(pack_room *s)
{
    const mkvq_codec &codec = s->job.codec;
    const int i = thread_index();
    if (i == 0) {
        mkvq_header h = {};
        h.magic = MKVQ_MAGIC, h.version = MKVQ_FORMAT_VERSION, h.kind = MKVQ_KIND_CODED;
        h.dtype = (uint8_t)codec.dtype, h.value_bits = (uint8_t)codec.value_bits;
        h.head_dim = (uint16_t)codec.head_dim, h.tokens = (uint16_t)codec.block_length;
        h.key_group = (uint16_t)codec.key_group, h.metadata = (uint8_t)codec.key_metadata;
        h.flags = codec.key_reference ? MKVQ_FLAG_REFERENCE : 0;
        if (codec.value_bits) {
            h.value_group = (uint16_t)codec.value_group;
            h.metadata = (uint8_t)(h.metadata | codec.value_metadata << 4);
            h.flags = (uint8_t)(h.flags | (codec.value_rotation ? MKVQ_FLAG_ROTATION : 0));
        }
        s->layout.head = h;
        s->raised = s->largest_value = 0;
    }
    if (i < MKVQ_TIERS)
        s->largest[i] = 0;
    order_channels(s->tier, codec.head_dim, &s->order, &s->layout, s->stored);
    if (i == 0)
        mkvq_layout_sections(&s->layout);
    sync_block();
}

MKVQ_DEVICE void write_zeros(uint8_t *record, int64_t begin, int64_t end)
{
    for (int64_t i = begin + thread_index(); i < end; i += PACK_THREADS)
        record[i] = 0;
}

// Header, channel map, and the padding between sections.
MKVQ_DEVICE void write_frame(pack_room *s, uint8_t *record)
{
    const mkvq_codec &codec = s->job.codec;
    const mkvq_layout &l = s->layout;
    const int dim = codec.head_dim, map = MKVQ_HEADER_BYTES + 3 * dim / 8;
    if (thread_index() == 0) {
        mkvq_header *h = &s->layout.head;
        for (int i = 0; i < 4; i++)
            h->key_fold[i] = mkvq_fold_bound(mkvq_float(s->largest[MKVQ_TIER_4 - i]));
        h->value_fold = mkvq_fold_bound(mkvq_float(s->largest_value));
        h->nbytes = (uint32_t)l.nbytes;
        memcpy(record, h, sizeof *h);
    }
    for (int i = thread_index(); i < dim / 8; i += PACK_THREADS)
        mkvq_map_write(record + MKVQ_HEADER_BYTES + 3 * i, 8, s->tier + 8 * i);
    write_zeros(record, map, l.key_meta);
    write_zeros(record,
                l.value_meta + 2 * mkvq_meta_bytes(codec.value_metadata) *
                                   (int64_t)codec.block_length * l.value_groups,
                l.key_columns);
    const int64_t values = codec.value_bits
                               ? 4 * mkvq_value_rows(codec.value_bits, codec.block_length)
                               : codec.block_length * mkvq_dtype_bytes(codec.dtype);
    write_zeros(record, l.values + dim * values, l.nbytes);
}

// Length of the coded record of a block with the tiers in s; 0 if it must become an exact one.
MKVQ_DEVICE int64_t pack_coded(pack_room *s)
{
    lay_out(s);
    if (!pack_keys(s) || !pack_values(s))
        return 0;
    write_frame(s, s->block.record);
    return s->layout.nbytes;
}

MKVQ_PHASE int64_t pack_exact()
{
    pack_room *s = room();
    const mkvq_codec &codec = s->job.codec;
    mkvq_layout &l = s->layout;
    const int64_t tokens = codec.block_length,
                  bytes = tokens * codec.head_dim * mkvq_dtype_bytes(codec.dtype);
    sync_block(); // nobody reads a layout any more
    if (thread_index() == 0) {
        mkvq_header h = {};
        h.magic = MKVQ_MAGIC, h.version = MKVQ_FORMAT_VERSION, h.kind = MKVQ_KIND_EXACT;
        h.dtype = (uint8_t)codec.dtype;
        h.head_dim = (uint16_t)codec.head_dim, h.tokens = (uint16_t)tokens;
        l.head = h;
        mkvq_layout_sections(&l);
        l.head.nbytes = (uint32_t)l.nbytes;
        memcpy(s->block.record, &l.head, sizeof l.head);
    }
    sync_block();
    write_zeros(s->block.record, MKVQ_HEADER_BYTES, l.exact_keys);
    copy_tokens<true>(s->job.args.k, s->block.k, (int)tokens, s->block.record + l.exact_keys);
    copy_tokens<true>(s->job.args.v, s->block.v, (int)tokens, s->block.record + l.values);
    write_zeros(s->block.record, l.values + bytes, l.nbytes);
    return l.nbytes;
}

// Writes the record, and the reference if it is the first coded one. Ends with a sync_block.
MKVQ_DEVICE void finish_block(bool coded, pack_room *s)
{
    const int dim = s->job.codec.head_dim, c = thread_index();
    int64_t nbytes = coded ? pack_coded(s) : 0;
    const int64_t raised = nbytes ? s->raised : 0;
    if (nbytes && mkvq_has_reference(&s->job.codec) && !s->block.known) {
        if (c < dim)
            s->job.args.mu[s->block.unit * dim + c] = s->half[c];
        if (c == 0)
            s->job.args.has_mu[s->block.unit] = 1;
    }
    if (!nbytes)
        nbytes = pack_exact();
    if (c == 0) {
        s->job.args.sizes[s->block.index] = nbytes;
        if (s->job.args.raised)
            s->job.args.raised[s->block.index] = raised;
    }
    sync_block();
}
#endif
