/* core.h - inside of the core: the kernel table that an instruction set fills, and the units of
 * work that kernels take.
 *
 * A unit is what one thread does on its own: one block of a head (or of a row) of a pack, one tile
 * of query rows of an attention. Arguments have been checked. */
#ifndef MKVQ_CORE_H
#define MKVQ_CORE_H
#include "layout.h"
#ifdef __cplusplus
extern "C" {
#endif

#define MKVQ_INLINE inline __attribute__((always_inline))

#define MKVQ_TILE_ROWS 8     /* query rows that share one reading of the codes */
#define MKVQ_TILE_TOKENS 128 /* tokens scored before their values are added */

/* How an attention is cut into units of work: it depends on the sizes of the call, never on the
 * number of threads. */
typedef struct {
    int64_t tiles, rows; /* tiles of a head, query rows of a tile */
    int64_t runs;        /* runs of blocks of a head, merged at the end */
} mkvq_attend_plan;

mkvq_attend_plan mkvq_plan_attend(const mkvq_attend_args *args);
int64_t mkvq_partial_floats(const mkvq_attend_args *args, const mkvq_attend_plan *plan);

typedef struct {
    const char *name;
    void (*salience)(const mkvq_salience_args *, int64_t row, int64_t head);
    /* With a reference all units of pack_reference come before the first of pack; with
     * ALLOCATE_LAYER a unit has all heads of its row. */
    void (*pack_reference)(const mkvq_pack_args *, int64_t row, int64_t head);
    void (*pack)(const mkvq_pack_args *, int64_t row, int64_t head, int64_t block);
    void (*unpack)(const mkvq_unpack_args *, int64_t row, int64_t head);
    void (*attend)(const mkvq_attend_args *, const mkvq_attend_plan *, int64_t row, int64_t head,
                   int64_t tile, int64_t run, float *partial);
    void (*merge)(const mkvq_attend_args *, const mkvq_attend_plan *, int64_t row, int64_t head,
                  int64_t tile, const float *partials);
} mkvq_kernels;

extern const mkvq_kernels mkvq_kernels_scalar;
#if defined(__x86_64__)
extern const mkvq_kernels mkvq_kernels_avx2, mkvq_kernels_avx512;
#elif defined(__aarch64__)
extern const mkvq_kernels mkvq_kernels_neon, mkvq_kernels_neon_dot;
#endif

const mkvq_kernels *mkvq_kernel_table(void);

/* Where the arrays of a call lie: what is in device memory cannot be read here, its numbers are not
 * checked. */
enum { MKVQ_ON_HOST, MKVQ_ON_DEVICE };

/* Sizes and strides of an array, with room in 64 bits for every product of them. */
mkvq_status mkvq_check_extent(const mkvq_view *view, const char *name, mkvq_error *error);
mkvq_status mkvq_check_salience(const mkvq_salience_args *args, int place, mkvq_error *error);
mkvq_status mkvq_check_pack(const mkvq_pack_args *args, int place, mkvq_error *error);
mkvq_status mkvq_check_unpack(const mkvq_unpack_args *args, int place, mkvq_error *error);
mkvq_status mkvq_check_append(const mkvq_append_args *args, int place, mkvq_error *error);
mkvq_status mkvq_check_attend(const mkvq_attend_args *args, int place, mkvq_error *error);

#ifdef __cplusplus
}
#endif

MKVQ_FN int mkvq_has_budget(const mkvq_codec *codec)
{
    return codec->allocate == MKVQ_ALLOCATE_BUDGET || codec->allocate == MKVQ_ALLOCATE_LAYER;
}

MKVQ_FN int mkvq_has_reference(const mkvq_codec *codec)
{
    return codec->key_reference && codec->allocate != MKVQ_ALLOCATE_EXACT;
}

MKVQ_FN const uint8_t *mkvq_record_at(const mkvq_history *h, int64_t row, int64_t head,
                                      int64_t block)
{
    const int64_t place = h->place[(row * h->kv_heads + head) * h->place_stride + block];
    return (const uint8_t *)(uintptr_t)h->slab_base[place >> MKVQ_SLAB_SHIFT] +
           (place & ((INT64_C(1) << MKVQ_SLAB_SHIFT) - 1));
}

/* Tokens of the first `blocks` blocks of a row, which all its heads have alike. */
MKVQ_FN int64_t mkvq_tokens_before(const mkvq_history *h, int64_t row, int64_t blocks)
{
    int64_t tokens = 0;
    if (h->checked && h->block_tokens)
        return blocks * h->block_tokens;
    for (int64_t j = 0; j < blocks; j++)
        tokens += ((const mkvq_header *)(const void *)mkvq_record_at(h, row, 0, j))->tokens;
    return tokens;
}

/* Address of element [a, b, c, 0]. */
MKVQ_FN uint8_t *mkvq_at(const mkvq_view *v, int64_t a, int64_t b, int64_t c)
{
    return (uint8_t *)v->data +
           (a * v->stride[0] + b * v->stride[1] + c * v->stride[2]) * mkvq_dtype_bytes(v->dtype);
}
#endif
