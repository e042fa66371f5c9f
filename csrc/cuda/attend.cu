// attend.cu - attention over packed blocks and the exact window.
//
// Grid: for each batch row, KV head and tile of query rows `splits` blocks, which share its packed
// blocks; the last one has the window. Whoever ends last merges their results. A record is copied to
// shared memory while the one before it is multiplied.
#include "attend_coded.cuh"
#include "attend_merge.cuh"
#include "mixkvq_cuda.h"

namespace
{
// A record and the words of its header that say whether it is staged.
struct record_source {
    const uint8_t *data;
    uint32_t kind, bytes;
};

MKVQ_DEVICE record_source find_source(const uint8_t *record)
{
    if (!record)
        return {nullptr, MKVQ_KIND_EXACT, 0};
    return {record, ((const mkvq_header *)record)->kind, ((const mkvq_header *)record)->nbytes};
}

MKVQ_DEVICE bool staged(const record_source &source, int stage_bytes)
{
    return source.kind == MKVQ_KIND_CODED && source.bytes <= (uint32_t)stage_bytes;
}

MKVQ_DEVICE void begin_copy(const record_source &source, uint8_t *stage, int stage_bytes)
{
    if (staged(source, stage_bytes))
        for (uint32_t i = 16 * (uint32_t)thread_index(); i < source.bytes;
             i += 16 * (uint32_t)thread_count())
            copy_async(stage + record_bytes::mixed(i, 3), source.data + i);
    end_copy_group();
}

// Packed block i of this block of threads; none behind the last.
template <int ROWS> MKVQ_DEVICE const uint8_t *find_record(const attend_tile<ROWS> &u, int i)
{
    const tile_facts &f = u.m.facts;
    return i < f.blocks ? (const uint8_t *)(uintptr_t)f.place[i] : nullptr;
}

// The packed blocks of this block of threads, in order. What is loaded of a record's header is needed
// when the record before it begins, so that nobody waits for it.
struct record_stream {
    bool here; // the present record is staged, or about to be
    record_source next;

    template <int ROWS> MKVQ_METHOD void start(const attend_tile<ROWS> &u)
    {
        next = find_source(find_record(u, 0));
        advance(u, 0);
    }

    // Makes record i the present one.
    template <int ROWS> MKVQ_METHOD void advance(const attend_tile<ROWS> &u, int i)
    {
        begin_copy(next, u.stage(i & 1), u.a.stage_bytes);
        here = staged(next, u.a.stage_bytes);
        next = find_source(find_record(u, i + 1));
    }

    // Record i, once the copies of all threads are there, which is when all have done with what was
    // before it.
    template <int ROWS> MKVQ_METHOD record_bytes take(const attend_tile<ROWS> &u, int i)
    {
        wait_copies<0>();
        sync_block();
        const record_bytes record = {here ? u.stage(i & 1) : find_record(u, i), here ? 3u : 0u};
        advance(u, i + 1);
        return record;
    }
};

// By one thread.
MKVQ_DEVICE void find_facts(tile_facts &f, const attend_job &a, int rows)
{
    f.index = (int)block_x() / a.splits, f.split = (int)block_x() % a.splits;
    const int of_row = f.index / a.tiles;
    f.head = of_row % a.kv_heads, f.row = of_row / a.kv_heads;
    const int first = f.index % a.tiles * rows, left = a.group * a.queries - first;
    f.rows = left < rows ? left : rows;
    for (int r = 0; r < f.rows; r++) {
        f.query[r] = (first + r) / a.group;
        f.query_head[r] = f.head * a.group + (first + r) % a.group;
    }
    const int blocks = a.place_stride ? (int)a.blocks[f.row] : 0;
    f.exact = (int)a.exact[f.row], f.packed = blocks * a.block_tokens;
    f.sinks = f.exact < a.sink_length ? f.exact : a.sink_length;
    // 64 exact tokens take about as long as a packed block
    const int64_t units = blocks + (f.exact + 63) / 64;
    const int from = (int)(units * f.split / a.splits),
              to = (int)(units * (f.split + 1) / a.splits), end = to < blocks ? to : blocks;
    f.begin = from < blocks ? from : blocks, f.blocks = end - f.begin;
    f.place = a.place + ((int64_t)f.row * a.kv_heads + f.head) * a.place_stride + f.begin;
    f.pieces = f.blocks + (f.split == a.splits - 1);
}

template <int ROWS> MKVQ_DEVICE void begin_tile(attend_tile<ROWS> &u)
{
    const attend_job &a = u.a;
    if (thread_index() == 0)
        find_facts(u.m.facts, a, ROWS), u.m.record.key_group = 0, u.m.any_rotated = 0;
    sync_block();
    const tile_facts &f = u.m.facts;
    u.warp = thread_index() / 32, u.lane = thread_index() % 32;
    for (int i = 0; i < 8; i++)
        u.plain[i] = u.rotated[i] = 0.0f;
    float *q = u.q(), *mu = u.mu();
    MKVQ_ROLLED
    for (int r = 0; r < ROWS; r++) {
        const int query = f.query[r], head = f.query_head[r];
        MKVQ_ROLLED
        for (int c = thread_index(); c < a.dim; c += thread_count())
            q[r * a.dim + c] =
                r < u.m.facts.rows
                    ? load_element(mkvq_at(&a.q, f.row, head, query) +
                                       c * a.q.stride[3] * mkvq_dtype_bytes(a.q.dtype),
                                   a.q.dtype) *
                          (a.scaling * MKVQ_LOG2E)
                    : 0.0f;
    }
    MKVQ_ROLLED
    for (int c = thread_index(); a.mu && c < a.dim; c += thread_count())
        mu[c] = f16_float(a.mu[((int64_t)f.row * a.kv_heads + f.head) * a.dim + c]);
    // entries that no channel has are multiplied, too: their weights must be numbers
    MKVQ_ROLLED
    for (int i = thread_index(); i < attend_tile<ROWS>::memory::steps(a.dim) * u.STEP / 8;
         i += thread_count())
        ((uint4 *)u.weights())[i] = {0, 0, 0, 0};
    if (thread_index() < 8)
        u.m.shrink[thread_index()] = 1.0f, u.m.largest[thread_index()] = -INFINITY;
    for (int i = thread_index(); i < 8 * 32; i += thread_count())
        u.m.sum[i / 32][i % 32] = 0.0f;
    // warps that are not there have nothing
    if (thread_index() < 16)
        ((uint32_t *)u.m.channels_of)[thread_index()] = 0;
    for (int i = thread_index(); i < MOST_SLOTS * ROWS * 8; i += thread_count())
        ((uint32_t *)u.m.tops)[i] = 0, ((float *)u.m.constants)[i] = 0.0f;
}

// Consecutive tokens: the sinks (index -1), a packed block, or the window (behind all blocks).
struct piece {
    int index;
    record_bytes record; // of a block

    MKVQ_METHOD const mkvq_header &header() const
    {
        return *(const mkvq_header *)record.at(0);
    }
    MKVQ_METHOD bool is_block(const tile_facts &f) const
    {
        return index >= 0 && index < f.blocks;
    }
    MKVQ_METHOD bool is_coded(const tile_facts &f) const
    {
        return is_block(f) && header().kind == MKVQ_KIND_CODED;
    }
    MKVQ_METHOD int tokens(const tile_facts &f) const
    {
        return is_block(f) ? header().tokens : index < 0 ? f.sinks : f.exact - f.sinks;
    }
    // Of the first token, in the row.
    MKVQ_METHOD int position(const attend_job &a, const tile_facts &f) const
    {
        return index < 0     ? 0
               : is_block(f) ? f.sinks + (f.begin + index) * a.block_tokens
                             : f.sinks + f.packed;
    }
};

// Exact keys (values) of a piece from token t on.
template <int ROWS>
MKVQ_DEVICE exact_rows find_rows(const attend_tile<ROWS> &u, const piece &x,
                                 const record_sections &s, bool values, int t)
{
    const attend_job &a = u.a;
    const tile_facts &f = u.m.facts;
    if (!x.is_block(f)) {
        const mkvq_view &v = values ? a.v : a.k;
        return {mkvq_at(&v, f.row, f.head, (x.index < 0 ? 0 : f.sinks) + t),
                v.stride[2] * mkvq_dtype_bytes(v.dtype), v.stride[3], v.dtype,
                values ? a.v_whole : a.k_whole};
    }
    const uint8_t *data = find_record(u, x.index);
    const int dtype = ((const mkvq_header *)data)->dtype, step = a.dim * mkvq_dtype_bytes(dtype);
    data += x.is_coded(f) ? (int64_t)s.values : 64 + (values ? (int64_t)x.tokens(f) * step : 0);
    return {data + (int64_t)t * step, step, 1, dtype, true};
}

template <int ROWS> MKVQ_DEVICE void attend_piece(attend_tile<ROWS> &u, const piece &x)
{
    const record_sections &s = u.m.record;
    const tile_facts &f = u.m.facts;
    const bool coded = x.is_coded(f);
    if (coded) {
        read_map(u, x.record);
        sync_block();
    }
    MKVQ_ROLLED
    for (int begin = 0; begin < x.tokens(f); begin += MKVQ_TILE_TOKENS) {
        u.lane = forgotten(u.lane) & 31, u.warp = forgotten(u.warp) & 7;
        const int rest = x.tokens(f) - begin, n = rest < MKVQ_TILE_TOKENS ? rest : MKVQ_TILE_TOKENS;
        if (begin)
            sync_block();
        if (coded) {
            score_keys(u, s, x.record, begin, n);
            if (s.exact) {
                sync_block();
                score_channels(u, s, x.record, begin, n);
            }
        } else
            score_exact(u, find_rows(u, x, s, false, begin), n);
        sync_block();
        soften(u, x.position(u.a, f) + begin, n);
        sync_block();
        shrink_outputs(u);
        if (coded && s.value_bits)
            weigh_values(u, s, x.record, begin, n);
        else
            add_values(u, find_rows(u, x, s, true, begin), n);
    }
}

template <int ROWS> MKVQ_DEVICE void attend(const attend_job &a)
{
    attend_tile<ROWS> u(a);
    begin_tile(u);
    const tile_facts &f = u.m.facts;
    record_stream records;
    records.start(u);
    // the sinks are piece -1 of the first split, the window is the last piece of the last one
    MKVQ_ROLLED
    for (int i = -(f.split == 0); i < f.pieces; i++) {
        piece x = {i, {}};
        if (x.is_block(f))
            x.record = records.take(u, i);
        else
            sync_block();
        attend_piece(u, x);
    }
    wait_copies<0>();
    end_tile(u);
}

MKVQ_KERNEL(256, 2) attend_4_rows(const attend_job a)
{
    attend<4>(a);
}
MKVQ_KERNEL(256, 2) attend_8_rows(const attend_job a)
{
    attend<8>(a);
}

// ---- host ----------------------------------------------------------------------------------------
enum {
    MOST_STAGE = 44 * 1024,   // longer records are read where they are
    BLOCKS_PER_PROCESSOR = 4, // of 128 threads
    BLOCK_OVERHEAD = 3        // what beginning, ending and merging cost, in packed blocks
};

struct attend_plan {
    int rows, threads; // query rows of a tile
    int64_t tiles, splits;
};

// How many blocks share a tile: the number with which the device is done first, as far as can be told
// from the sizes.
int64_t choose_splits(int64_t tiles, int64_t places, int64_t places_at_once)
{
    int64_t best = 1, least = INT64_MAX;
    for (int64_t waves = 0; waves <= 4; waves++) {
        int64_t splits = waves ? waves * places_at_once / tiles : 1;
        splits = splits < 1 ? 1 : splits > places ? (places > 1 ? places : 1) : splits;
        const int64_t rounds = (tiles * splits + places_at_once - 1) / places_at_once,
                      time = rounds * ((places + splits - 1) / splits + BLOCK_OVERHEAD);
        if (time < least)
            best = splits, least = time;
    }
    return best;
}

attend_plan plan_attend(const mkvq_attend_args *args)
{
    const mkvq_history *h = args->history;
    const int64_t rows = args->q.shape[1] / h->kv_heads * args->q.shape[2];
    attend_plan plan = {rows <= 4 ? 4 : 8, 128, 0, 1};
    plan.tiles = (rows + plan.rows - 1) / plan.rows;
    if (h->head_dim > 128)
        plan.threads = (h->head_dim + 31) / 32 * 32;
    const int64_t all = h->batch * h->kv_heads * plan.tiles;
    if (all > 0)
        plan.splits =
            choose_splits(all, h->place_stride,
                          (int64_t)processors() * BLOCKS_PER_PROCESSOR * 128 / plan.threads);
    return plan;
}

int64_t counter_bytes(const mkvq_attend_args *args, const attend_plan &plan)
{
    return (args->history->batch * args->history->kv_heads * plan.tiles * 4 + 15) / 16 * 16;
}

// Room for a record of at most record_bytes, of which there are two behind `begin`. Where an exact record
// sets the bound it is room for the coded ones: a byte and an eighth for a key and a value are enough for
// four bits with fine groups. Longer ones are read where they are.
int find_stage(int begin, const mkvq_history *h)
{
    const int half = (MOST_SHARED - begin) / 2 / 128 * 128,
              most = half < MOST_STAGE ? half : MOST_STAGE;
    const int64_t usual = (int64_t)h->block_tokens * h->head_dim * 9 / 8;
    int64_t bytes = h->place_stride ? h->record_bytes : 0;
    if (bytes > most && usual < most)
        bytes = usual;
    return bytes < most ? (int)((bytes + 127) / 128 * 128) : most;
}

// Whether the vectors of a view can be read four elements at a time.
bool whole(const mkvq_view &v)
{
    const int size = mkvq_dtype_bytes(v.dtype);
    bool ok = v.stride[3] == 1 && (uintptr_t)v.data % (4 * (unsigned)size) == 0;
    for (int i = 0; i < 3; i++)
        ok = ok && v.stride[i] % 4 == 0;
    return ok;
}
} // namespace

int64_t mkvq_cuda_attend_workspace(const mkvq_attend_args *args)
{
    const mkvq_history *h = args->history;
    if (h->kv_heads < 1 || args->q.shape[1] < h->kv_heads)
        return 0;
    const attend_plan plan = plan_attend(args);
    if (plan.splits == 1)
        return 0;
    return counter_bytes(args, plan) + h->batch * h->kv_heads * plan.tiles * plan.splits *
                                           plan.rows * (2 + h->head_dim) * (int64_t)sizeof(float);
}

mkvq_status mkvq_cuda_attend(const mkvq_attend_args *args, void *stream, mkvq_error *error)
{
    const mkvq_status status = mkvq_check_attend(args, MKVQ_ON_DEVICE, error);
    if (status != MKVQ_OK)
        return status;
    const mkvq_history *h = args->history;
    attend_plan plan = plan_attend(args);
    if (!args->workspace)
        plan.splits = 1;
    else if (args->workspace_bytes < mkvq_cuda_attend_workspace(args)) {
        if (error)
            *error = {"workspace", "mkvq_cuda_attend_workspace bytes, or NULL",
                      args->workspace_bytes};
        return MKVQ_E_SPACE;
    }
    const int64_t all = h->batch * h->kv_heads * plan.tiles;
    if (all == 0)
        return MKVQ_OK;
    attend_job job = {};
    job.q = args->q, job.out = args->out, job.k = args->k, job.v = args->v, job.mask = args->mask;
    job.place = h->place, job.blocks = h->blocks, job.exact = args->exact, job.start = args->start;
    job.mu = h->mu, job.sink_logits = args->sink_logits;
    job.arrived = (uint32_t *)args->workspace;
    if (plan.splits > 1)
        job.partials = (float *)((uint8_t *)args->workspace + counter_bytes(args, plan));
    job.place_stride = h->place_stride, job.tiles = (int)plan.tiles;
    job.splits = (int)plan.splits, job.queries = (int)args->q.shape[2];
    job.kv_heads = h->kv_heads, job.group = (int)(args->q.shape[1] / h->kv_heads);
    job.dim = h->head_dim, job.sink_length = args->sink_length, job.mask_kind = args->mask_kind;
    job.block_tokens = h->block_tokens;
    job.all_products = args->precision == MKVQ_PRECISION_EXACT;
    job.k_whole = whole(args->k), job.v_whole = whole(args->v);
    job.scaling = args->scaling, job.softcap = args->softcap;
    const int stages =
        plan.rows == 4 ? begin_of_stages<4>(h->head_dim) : begin_of_stages<8>(h->head_dim);
    job.stage_bytes = find_stage(stages, h);
    return launch(plan.rows == 4 ? attend_4_rows : attend_8_rows, {all * plan.splits}, plan.threads,
                  stages + 2 * job.stage_bytes, stream, job, error);
}
