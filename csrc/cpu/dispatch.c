/* dispatch.c - which instruction set runs, and handing units of work to the executor. The chosen
 * table is the core's only global. */
#include "../core.h"
#include <stdatomic.h>
#include <stddef.h>

typedef struct {
    const mkvq_kernels *kernels;
    int (*supported)(void); /* by this CPU, and by the system: registers are saved */
} isa_level;

static int always(void)
{
    return 1;
}

#if defined(__x86_64__)
static int has_avx2(void)
{
    return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
           __builtin_cpu_supports("f16c") && __builtin_cpu_supports("bmi2");
}

static int has_avx512(void)
{
#ifdef MKVQ_SIMDE /* the same source over SIMDe: see kernels_avx512.c */
    return has_avx2();
#else
    return has_avx2() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") &&
           __builtin_cpu_supports("avx512vnni");
#endif
}
#endif

/* Best last. */
static const isa_level levels[] = {
    {&mkvq_kernels_scalar, always},
#if defined(__x86_64__)
    {&mkvq_kernels_avx2, has_avx2},
    {&mkvq_kernels_avx512, has_avx512},
#elif defined(__aarch64__)
    {&mkvq_kernels_neon, always}, /* part of the architecture */
#endif
};

#define N_LEVELS ((int)(sizeof levels / sizeof levels[0]))

static _Atomic(const mkvq_kernels *) chosen;

int mkvq_isa_count(void)
{
    return N_LEVELS;
}

const char *mkvq_isa_name(int level)
{
    return level >= 0 && level < N_LEVELS ? levels[level].kernels->name : NULL;
}

int mkvq_isa_supported(int level)
{
    return level >= 0 && level < N_LEVELS && levels[level].supported();
}

mkvq_status mkvq_set_isa(const char *name)
{
    for (int i = N_LEVELS - 1; i >= 0; i--)
        if (mkvq_isa_supported(i) && (!name || strcmp(name, levels[i].kernels->name) == 0)) {
            atomic_store_explicit(&chosen, levels[i].kernels, memory_order_release);
            return MKVQ_OK;
        }
    return MKVQ_E_ISA;
}

const mkvq_kernels *mkvq_kernel_table(void)
{
    const mkvq_kernels *table = atomic_load_explicit(&chosen, memory_order_acquire);
    if (table)
        return table;
    mkvq_set_isa(NULL);
    return atomic_load_explicit(&chosen, memory_order_acquire);
}

const char *mkvq_isa(void)
{
    return mkvq_kernel_table()->name;
}

/* ---- units of work --------------------------------------------------------------------------- */
typedef struct {
    const mkvq_kernels *kernels;
    const void *args;
    int64_t heads, tiles;
} job;

static void run(mkvq_executor executor, int64_t units, mkvq_body body, job *j)
{
    j->kernels = mkvq_kernel_table();
    if (units <= 0)
        return;
    if (executor && units > 1)
        executor(units, 1, body, j);
    else
        body(0, units, j);
}

static void salience_body(int64_t begin, int64_t end, void *ctx)
{
    const job *j = ctx;
    for (int64_t u = begin; u < end; u++)
        j->kernels->salience(j->args, u / j->heads, u % j->heads);
}

mkvq_status mkvq_salience(const mkvq_salience_args *args, mkvq_error *error)
{
    const mkvq_status status = mkvq_check_salience(args, error);
    if (status != MKVQ_OK)
        return status;
    job j = {NULL, args, args->kv_heads, 1};
    run(args->executor, args->q.shape[0] * j.heads, salience_body, &j);
    return MKVQ_OK;
}

static void pack_body(int64_t begin, int64_t end, void *ctx)
{
    const job *j = ctx;
    for (int64_t u = begin; u < end; u++)
        j->kernels->pack(j->args, u / j->heads, u % j->heads);
}

static void pack_layer_body(int64_t begin, int64_t end, void *ctx)
{
    const job *j = ctx;
    for (int64_t u = begin; u < end; u++)
        j->kernels->pack_layer(j->args, u);
}

mkvq_status mkvq_pack(const mkvq_pack_args *args, mkvq_error *error)
{
    const mkvq_status status = mkvq_check_pack(args, error);
    if (status != MKVQ_OK)
        return status;
    job j = {NULL, args, args->k.shape[1], 1};
    if (args->codec->allocate == MKVQ_ALLOCATE_LAYER && j.heads > 0)
        run(args->executor, args->k.shape[0], pack_layer_body, &j);
    else
        run(args->executor, args->k.shape[0] * j.heads, pack_body, &j);
    return MKVQ_OK;
}

static void unpack_body(int64_t begin, int64_t end, void *ctx)
{
    const job *j = ctx;
    for (int64_t u = begin; u < end; u++)
        j->kernels->unpack(j->args, u / j->heads, u % j->heads);
}

mkvq_status mkvq_unpack(const mkvq_unpack_args *args, mkvq_error *error)
{
    const mkvq_status status = mkvq_check_unpack(args, error);
    if (status != MKVQ_OK)
        return status;
    job j = {NULL, args, args->history->kv_heads, 1};
    run(args->executor, args->history->batch * j.heads, unpack_body, &j);
    return MKVQ_OK;
}

static void attend_body(int64_t begin, int64_t end, void *ctx)
{
    const job *j = ctx;
    for (int64_t u = begin; u < end; u++)
        j->kernels->attend(j->args, u / (j->heads * j->tiles), u / j->tiles % j->heads,
                           u % j->tiles);
}

mkvq_status mkvq_attend(const mkvq_attend_args *args, mkvq_error *error)
{
    const mkvq_status status = mkvq_check_attend(args, error);
    if (status != MKVQ_OK)
        return status;
    const int64_t rows = args->q.shape[1] / args->history->kv_heads * args->q.shape[2];
    job j = {NULL, args, args->history->kv_heads, (rows + MKVQ_TILE_ROWS - 1) / MKVQ_TILE_ROWS};
    run(args->executor, args->history->batch * j.heads * j.tiles, attend_body, &j);
    return MKVQ_OK;
}

mkvq_status mkvq_append(const mkvq_append_args *args, mkvq_error *error)
{
    const mkvq_status status = mkvq_check_append(args, error);
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
