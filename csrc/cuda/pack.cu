// pack.cu - blocks of keys and values to records, one block of threads for each. What it computes
// is the text of the CPU core (octet.h), so that the bytes are the same.
//
// Where keys have a reference, a first launch packs the blocks of every head in order until one has set
// it, and marks the others, which the second launch packs side by side. Where the heads of a row share a
// budget, all are measured before it is spent and the first is coded: three launches, or three steps of
// one. What a head's plan needs lies in the slot of its record meanwhile.
#include "choose.h"
#include "device.h"
#include "mixkvq_cuda.h"
#include "pack_record.h"

namespace
{
constexpr int64_t NOT_PACKED = -1; // in sizes, between the two launches of a pack with a reference

// Rounds: the first one, and the second; of heads that share a budget, its steps.
enum { UNTIL_REFERENCE, MEASURE, SPEND, CODE = 4, ALL = 7 };

MKVQ_DEVICE void pack_head_block(int64_t row, int64_t head, int64_t block, pack_room *s)
{
    find_block(row, head, block, s);
    const bool coded =
        s->job.codec.allocate != MKVQ_ALLOCATE_EXACT && begin_block(s) && choose_block(s);
    finish_block(coded, s);
}

// ---- heads that share a budget ---------------------------------------------------------------------
MKVQ_DEVICE uint8_t *slots_of(int64_t row, int64_t block, const pack_room *s)
{
    return s->job.args.out +
           (row * s->job.args.k.shape[1] * s->job.args.max_blocks + block) * s->job.args.out_stride;
}

MKVQ_PHASE void plan_head()
{
    pack_room *s = room();
    start_plan(&s->job.codec, &s->stats, s->block.importance, plan_at(s->block.record, 0, 0));
}

MKVQ_DEVICE void measure_head(int64_t row, int64_t head, int64_t block, pack_room *s)
{
    find_block(row, head, block, s);
    const bool measured = begin_block(s) && measure_block();
    if (thread_index() == 0) {
        if (measured)
            plan_head();
        else
            plan_at(s->block.record, 0, 0)->columns = 0;
    }
    sync_block();
}

MKVQ_DEVICE void code_head(int64_t row, int64_t head, int64_t block, pack_room *s)
{
    find_block(row, head, block, s);
    const head_plan *plan = plan_at(s->block.record, 0, 0);
    const bool coded = plan->columns > 0;
    const int c = thread_index();
    if (coded && c < s->job.codec.head_dim)
        s->tier[c] = plan->hull[c].tier[plan->hull[c].done];
    begin_block(s);
    sync_block(); // the plan has been read
    finish_block(coded, s);
}

MKVQ_DEVICE void pack_layer_block(int64_t row, int64_t begin, int64_t end, int64_t block, int steps,
                                  pack_room *s)
{
    const int64_t heads = s->job.args.k.shape[1];
    for (int64_t h = begin; steps & MEASURE && h < end; h++)
        measure_head(row, h, block, s);
    if (steps & SPEND && thread_index() == 0)
        spend_budget(&s->job.codec, slots_of(row, block, s),
                     s->job.args.max_blocks * s->job.args.out_stride, heads);
    sync_block();
    for (int64_t h = begin; steps & CODE && h < end; h++)
        code_head(row, h, block, s);
}

// ---- kernels ---------------------------------------------------------------------------------------
MKVQ_DEVICE pack_room *enter(const pack_job &job)
{
    pack_room *s = room();
    for (int i = thread_index(); i < (int)(sizeof job / 4); i += thread_count())
        ((uint32_t *)&s->job)[i] = ((const uint32_t *)&job)[i];
    sync_block();
    return s;
}

// No record, one that the first launch has packed, or one for this launch: true.
MKVQ_DEVICE bool is_open(int64_t row, int64_t head, int64_t block, const pack_room *s)
{
    const int64_t at = (row * s->job.args.k.shape[1] + head) * s->job.args.max_blocks + block;
    if (block < s->job.args.blocks[row])
        return !mkvq_has_reference(&s->job.codec) || s->job.args.sizes[at] == NOT_PACKED;
    if (thread_index() == 0) {
        s->job.args.sizes[at] = 0;
        if (s->job.args.raised)
            s->job.args.raised[at] = 0;
    }
    return false;
}

// Whether all of these heads have a reference; marks what is left to the second launch if so.
MKVQ_DEVICE bool references_known(int64_t row, int64_t begin, int64_t end, int64_t block,
                                  const pack_room *s)
{
    const int64_t first = row * s->job.args.k.shape[1], blocks = s->job.args.blocks[row];
    for (int64_t h = begin; h < end; h++)
        if (!s->job.args.has_mu[first + h])
            return false;
    for (int64_t h = begin; h < end; h++)
        for (int64_t j = block + thread_index(); j < blocks; j += PACK_THREADS)
            s->job.args.sizes[(first + h) * s->job.args.max_blocks + j] = NOT_PACKED;
    return true;
}

// Block: of the first round a head, of the second one block of a head.
MKVQ_KERNEL(PACK_THREADS, 2) pack_kernel(const pack_job job)
{
    const int64_t heads = job.args.k.shape[1], per = job.round == ALL ? job.args.max_blocks : 1;
    const int64_t unit = block_x() / per, row = unit / heads, head = unit % heads;
    int64_t block = block_x() % per;
    pack_room *s = enter(job);
    if (job.round == ALL && !is_open(row, head, block, s))
        return;
    const int64_t end = job.round == ALL ? block + 1 : job.args.blocks[row];
    for (; block < end; block++) {
        if (job.round == UNTIL_REFERENCE && references_known(row, head, head + 1, block, s))
            return;
        pack_head_block(row, head, block, s);
    }
}

// Block: of the first round a row, of the second one block of a head, or of a row to spend its budget.
MKVQ_KERNEL(PACK_THREADS, 2) layer_kernel(const pack_job job)
{
    const bool all = job.round == UNTIL_REFERENCE, spends = job.round == SPEND;
    const int64_t heads = job.args.k.shape[1], per = all ? 1 : job.args.max_blocks;
    const int64_t unit = block_x() / per, row = all || spends ? unit : unit / heads;
    const int64_t begin = all || spends ? 0 : unit % heads, end = all ? heads : begin + 1;
    int64_t block = block_x() % per;
    pack_room *s = enter(job);
    if (!all && !is_open(row, begin, block, s))
        return;
    const int64_t last = all ? job.args.blocks[row] : block + 1;
    for (; block < last; block++) {
        if (all && references_known(row, begin, end, block, s))
            return;
        pack_layer_block(row, begin, end, block, all ? ALL : job.round, s);
    }
}
} // namespace

mkvq_status mkvq_cuda_pack(const mkvq_pack_args *args, void *stream, mkvq_error *error)
{
    mkvq_status status = mkvq_check_pack(args, MKVQ_ON_DEVICE, error);
    if (status != MKVQ_OK)
        return status;
    const int64_t rows = args->k.shape[0], heads = args->k.shape[1], blocks = args->max_blocks;
    if (rows == 0 || heads == 0 || blocks == 0)
        return MKVQ_OK;
    const mkvq_codec &codec = *args->codec;
    static_assert(offsetof(pack_room, tile) + 4 * MKVQ_MAX_HEAD_DIM * 33 <= 48 * 1024,
                  "what every device allows");
    const bool exact = codec.allocate == MKVQ_ALLOCATE_EXACT;
    const int floats = exact ? 1 : tile_floats(codec.head_dim, codec.block_length);
    const int shared = (int)offsetof(pack_room, tile) + 4 * floats;
    pack_job job = {*args, codec, 0};
    if (codec.allocate != MKVQ_ALLOCATE_LAYER) {
        job.round = UNTIL_REFERENCE;
        if (mkvq_has_reference(&codec))
            status = launch(pack_kernel, {rows * heads}, PACK_THREADS, shared, stream, job, error);
        job.round = ALL;
        return status == MKVQ_OK ? launch(pack_kernel, {rows * heads * blocks}, PACK_THREADS,
                                          shared, stream, job, error)
                                 : status;
    }
    if (mkvq_has_reference(&codec))
        status = launch(layer_kernel, {rows}, PACK_THREADS, shared, stream, job, error);
    for (int step = MEASURE; step <= CODE && status == MKVQ_OK; step *= 2) {
        job.round = step;
        status = launch(layer_kernel, {rows * blocks * (step == SPEND ? 1 : heads)}, PACK_THREADS,
                        shared, stream, job, error);
    }
    return status;
}
