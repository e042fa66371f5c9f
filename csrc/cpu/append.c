/* append.c - new tokens behind the exact window: copies, the same for every instruction set. */
#include "../core.h"

mkvq_status mkvq_append(const mkvq_append_args *args, mkvq_error *error)
{
    const mkvq_status status = mkvq_check_append(args, MKVQ_ON_HOST, error);
    if (status != MKVQ_OK)
        return status;
    const mkvq_view *from[2] = {&args->k_new, &args->v_new}, *to[2] = {&args->k, &args->v};
    const int64_t *shape = args->k_new.shape;
    const int size = mkvq_dtype_bytes(args->k.dtype);
    for (int64_t b = 0; b < shape[0]; b++) {
        for (int i = 0; i < 2; i++)
            for (int64_t h = 0; h < shape[1]; h++)
                for (int64_t t = 0; t < shape[2]; t++) {
                    const uint8_t *p = mkvq_at(from[i], b, h, t);
                    uint8_t *q = mkvq_at(to[i], b, h, args->exact[b] + t);
                    if (from[i]->stride[3] == 1 && to[i]->stride[3] == 1) {
                        memcpy(q, p, (size_t)(shape[3] * size));
                        continue;
                    }
                    for (int64_t c = 0; c < shape[3]; c++)
                        memcpy(q + c * to[i]->stride[3] * size, p + c * from[i]->stride[3] * size,
                               (size_t)size);
                }
        args->exact[b] += shape[2];
    }
    return MKVQ_OK;
}
