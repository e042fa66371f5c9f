/* mixkvq_cuda.h - the core's calls on NVIDIA GPUs.
 *
 * The arguments are those of mixkvq.h, with these differences:
 *   - every address in them is one of device memory (or of pinned host memory that the device can
 *     read), but those of the structs themselves and of the codec;
 *   - places are addresses of records: `slab_base`, `slab_bytes` and `slabs` are not read;
 *   - `history->block_tokens` must be the length of all blocks, `history->record_bytes` an upper
 *     bound of all records;
 *   - `executor` is not read; `workspace` of an attention has mkvq_cuda_attend_workspace bytes,
 *     and its first 4 bytes per head and tile of query rows must be zero before the first call:
 *     every call leaves them so. Calls that may run at the same time need one each.
 *
 * A call checks what can be checked without reading device memory, launches kernels on `stream`
 * (a cudaStream_t of the current device; NULL: the default stream) and returns. It allocates
 * nothing and waits for nothing, so that it can be captured in a CUDA graph. What is wrong in device
 * memory (numbers of tokens, places, records) is not found: the caller vouches for it. */
#ifndef MIXKVQ_CUDA_H
#define MIXKVQ_CUDA_H
#include "../mixkvq.h"
#ifdef __cplusplus
extern "C" {
#endif

#define MKVQ_CUDA_CAPSULE "mixkvq._cuda._C_API"

mkvq_status mkvq_cuda_salience(const mkvq_salience_args *args, void *stream, mkvq_error *error);
mkvq_status mkvq_cuda_pack(const mkvq_pack_args *args, void *stream, mkvq_error *error);
mkvq_status mkvq_cuda_unpack(const mkvq_unpack_args *args, void *stream, mkvq_error *error);
mkvq_status mkvq_cuda_append(const mkvq_append_args *args, void *stream, mkvq_error *error);
mkvq_status mkvq_cuda_attend(const mkvq_attend_args *args, void *stream, mkvq_error *error);
int64_t mkvq_cuda_attend_workspace(const mkvq_attend_args *args);

/* What mixkvq._cuda hands to mixkvq._torch. */
typedef struct {
    uint32_t version; /* MKVQ_API_VERSION */
    mkvq_status (*salience)(const mkvq_salience_args *, void *, mkvq_error *);
    mkvq_status (*pack)(const mkvq_pack_args *, void *, mkvq_error *);
    mkvq_status (*unpack)(const mkvq_unpack_args *, void *, mkvq_error *);
    mkvq_status (*append)(const mkvq_append_args *, void *, mkvq_error *);
    mkvq_status (*attend)(const mkvq_attend_args *, void *, mkvq_error *);
    int64_t (*attend_workspace)(const mkvq_attend_args *);
} mkvq_cuda_api;

#ifdef __cplusplus
}
#endif
#endif
