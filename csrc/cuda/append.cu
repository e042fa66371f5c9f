// append.cu - new tokens behind the exact window. One thread copies 16 bytes, or one element where
// strides or addresses do not allow it.
#include "device.h"
#include "mixkvq_cuda.h"

#include "../core.h"

namespace
{
struct append_job {
    mkvq_view to[2], from[2];
    int64_t *exact;
    int64_t pieces; // of a token
    int bytes;      // of a piece
};

// Block: one token of a row and head, of keys or of values.
MKVQ_KERNEL(64, 16) append_kernel(const append_job a)
{
    const int64_t token = block_x(), heads = a.from[0].shape[1];
    const int64_t row = block_y() / heads, head = block_y() % heads;
    const mkvq_view &from = a.from[block_z()], &to = a.to[block_z()];
    const int size = mkvq_dtype_bytes(from.dtype);
    const uint8_t *p = mkvq_at(&from, row, head, token);
    uint8_t *q = mkvq_at(&to, row, head, a.exact[row] + token);
    for (int64_t i = thread_index(); i < a.pieces; i += thread_count())
        if (a.bytes == 16)
            *(uint4 *)(q + 16 * i) = *(const uint4 *)(p + 16 * i);
        else
            for (int k = 0; k < size; k++)
                q[i * to.stride[3] * size + k] = p[i * from.stride[3] * size + k];
}

struct count_job {
    int64_t *exact;
    int64_t rows, tokens;
};

MKVQ_KERNEL(128, 8) count_kernel(const count_job a)
{
    const int64_t row = block_x() * thread_count() + thread_index();
    if (row < a.rows)
        a.exact[row] += a.tokens;
}

bool whole(const mkvq_view &v, int size)
{
    bool ok = v.stride[3] == 1 && (uintptr_t)v.data % 16 == 0;
    for (int i = 0; i < 3; i++)
        ok = ok && v.stride[i] * size % 16 == 0;
    return ok;
}
} // namespace

mkvq_status mkvq_cuda_append(const mkvq_append_args *args, void *stream, mkvq_error *error)
{
    const mkvq_status status = mkvq_check_append(args, MKVQ_ON_DEVICE, error);
    if (status != MKVQ_OK)
        return status;
    const int64_t *shape = args->k_new.shape;
    const int size = mkvq_dtype_bytes(args->k.dtype);
    if (shape[0] == 0 || shape[2] == 0)
        return MKVQ_OK;
    append_job job = {{args->k, args->v}, {args->k_new, args->v_new}, args->exact, shape[3], size};
    if (whole(job.to[0], size) && whole(job.to[1], size) && whole(job.from[0], size) &&
        whole(job.from[1], size) && shape[3] * size % 16 == 0)
        job.pieces = shape[3] * size / 16, job.bytes = 16;
    const mkvq_status copied =
        launch(append_kernel, {shape[2], shape[0] * shape[1], 2}, 64, 0, stream, job, error);
    if (copied != MKVQ_OK)
        return copied;
    return launch(count_kernel, {(shape[0] + 127) / 128}, 128, 0, stream,
                  count_job{args->exact, shape[0], shape[2]}, error);
}
