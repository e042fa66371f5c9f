// salience.cu - sums of |q|^power per key/value head and channel in float64.
//
// The sum of a channel has one order, tokens outer, query heads of the group inner, so one thread
// makes it. What that costs is the latency of a float64 addition per query; a batch of loads is under way
// while the batch before it is added up.
#include "device.h"
#include "mixkvq_cuda.h"

#include "../core.h"

namespace
{
constexpr int CHANNELS = 32; // of a block: small, so that few heads fill many processors
constexpr int BATCH = 32;

struct salience_job {
    mkvq_view q;
    const int64_t *first;
    double *sum;
    int32_t kv_heads, power;
};

// The queries that one channel meets, in order.
struct query_walk {
    const uint8_t *p;
    int64_t head_step, token_step; // in bytes; the latter from the last head of a token
    int64_t left;
    int group, head;
};

template <typename Word> MKVQ_DEVICE void load_batch(query_walk &w, Word *x)
{
    MKVQ_UNROLL(BATCH)
    for (int i = 0; i < BATCH; i++) {
        x[i] = 0;
        if (i >= w.left)
            continue;
        x[i] = *(const Word *)w.p;
        const bool last = ++w.head == w.group;
        w.p += last ? w.token_step : w.head_step;
        w.head = last ? 0 : w.head;
    }
    w.left -= BATCH;
}

MKVQ_DEVICE double query_power(uint32_t bits, int dtype, int power)
{
    const float x = dtype == MKVQ_F32   ? mkvq_float(bits)
                    : dtype == MKVQ_F16 ? f16_float((uint16_t)bits)
                                        : mkvq_bf16_to_f32((uint16_t)bits);
    const double a = x;
    return power == 2 ? a * a : a < 0.0 ? -a : a;
}

// Block: CHANNELS channels of a row and head.
template <typename Word> MKVQ_KERNEL(CHANNELS, 16) salience_kernel(const salience_job a)
{
    const int64_t dim = a.q.shape[3], chunks = (dim + CHANNELS - 1) / CHANNELS;
    const int64_t unit = block_x() / chunks, row = unit / a.kv_heads, head = unit % a.kv_heads;
    const int64_t channel = block_x() % chunks * CHANNELS + thread_index();
    if (channel >= dim)
        return;
    const int64_t group = a.q.shape[1] / a.kv_heads, size = sizeof(Word),
                  first = a.first ? a.first[row] : 0;
    query_walk walk = {};
    walk.p = mkvq_at(&a.q, row, head * group, first) + channel * a.q.stride[3] * size;
    walk.head_step = a.q.stride[1] * size;
    walk.token_step = (a.q.stride[2] - (group - 1) * a.q.stride[1]) * size;
    walk.left = (a.q.shape[2] - first) * group, walk.group = (int)group;
    double sum = a.sum[unit * dim + channel];
    Word next[BATCH];
    int64_t left = walk.left;
    load_batch(walk, next);
    for (; left > 0; left -= BATCH) {
        Word now[BATCH];
        MKVQ_UNROLL(BATCH)
        for (int i = 0; i < BATCH; i++)
            now[i] = next[i];
        load_batch(walk, next);
        MKVQ_UNROLL(BATCH)
        for (int i = 0; i < BATCH; i++)
            if (i < left)
                sum += query_power(now[i], a.q.dtype, a.power);
    }
    a.sum[unit * dim + channel] = sum;
}
} // namespace

mkvq_status mkvq_cuda_salience(const mkvq_salience_args *args, void *stream, mkvq_error *error)
{
    const mkvq_status status = mkvq_check_salience(args, MKVQ_ON_DEVICE, error);
    if (status != MKVQ_OK)
        return status;
    const mkvq_view &q = args->q;
    const int64_t blocks = q.shape[0] * args->kv_heads * ((q.shape[3] + CHANNELS - 1) / CHANNELS);
    if (blocks == 0 || q.shape[1] == 0 || q.shape[2] == 0)
        return MKVQ_OK;
    const salience_job job = {q, args->first, args->sum, args->kv_heads, args->power};
    return launch(q.dtype == MKVQ_F32 ? salience_kernel<uint32_t> : salience_kernel<uint16_t>,
                  {blocks}, CHANNELS, 0, stream, job, error);
}
