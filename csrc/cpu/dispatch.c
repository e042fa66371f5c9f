/* dispatch.c - which instruction set runs, and handing units of work to the executor. The chosen
 * table is the core's only global. */
#include "../core.h"
#include <stdatomic.h>
#include <stddef.h>
#if defined(__aarch64__)
#include <asm/hwcap.h>
#include <sys/auxv.h>
#elif defined(__x86_64__)
#include <cpuid.h>
#endif

typedef struct {
    const mkvq_kernels *kernels;
    int (*supported)(void); /* by this CPU, and by the system: registers are saved */
} isa_level;

static int always(void)
{
    return 1;
}

#if defined(__x86_64__)
/* clang up to 14 has no __builtin_cpu_supports("f16c"). */
static int has_f16c(void)
{
    unsigned a, b, c, d;
    return __get_cpuid(1, &a, &b, &c, &d) && (c & bit_F16C);
}

static int has_avx2(void)
{
    return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && has_f16c() &&
           __builtin_cpu_supports("bmi2");
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

#if defined(__aarch64__)
static int has_dot_products(void)
{
    return (getauxval(AT_HWCAP) & HWCAP_ASIMDDP) != 0;
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
    {&mkvq_kernels_neon_dot, has_dot_products},
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
    int64_t heads;
    const mkvq_attend_plan *plan;
} job;

/* Waking a pool takes about 5 us if its threads have gone to sleep, 0.6 us if they still spin: work
 * below this many element-operations, about 20 us of one thread, stays on the calling thread. An
 * element-operation is a multiplication and addition of one lane, 0.02 to 0.05 ns with avx2. */
#define SMALL_WORK 0x1p19

enum { SALIENCE_OPERATIONS = 4, PACK_OPERATIONS = 32, UNPACK_OPERATIONS = 8 }; /* per element */

/* Runs body on `units` units that take `work` element-operations in all: a double, as a product of
 * sizes may be beyond 64 bits. */
static void run(mkvq_executor executor, int64_t units, double work, mkvq_body body, job *j)
{
    j->kernels = mkvq_kernel_table();
    if (units <= 0)
        return;
    if (executor && units > 1 && work >= SMALL_WORK)
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
    const mkvq_status status = mkvq_check_salience(args, MKVQ_ON_HOST, error);
    if (status != MKVQ_OK)
        return status;
    job j = {NULL, args, args->kv_heads, NULL};
    const int64_t *shape = args->q.shape;
    run(args->executor, shape[0] * j.heads,
        (double)(shape[0] * shape[1] * shape[2] * shape[3]) * SALIENCE_OPERATIONS, salience_body,
        &j);
    return MKVQ_OK;
}

static void pack_reference_body(int64_t begin, int64_t end, void *ctx)
{
    const job *j = ctx;
    for (int64_t u = begin; u < end; u++)
        j->kernels->pack_reference(j->args, u / j->heads, u % j->heads);
}

static void pack_body(int64_t begin, int64_t end, void *ctx)
{
    const job *j = ctx;
    const mkvq_pack_args *a = j->args;
    for (int64_t u = begin; u < end; u++) {
        const int64_t head = u / a->max_blocks;
        j->kernels->pack(a, head / j->heads, head % j->heads, u % a->max_blocks);
    }
}

mkvq_status mkvq_pack(const mkvq_pack_args *args, mkvq_error *error)
{
    const mkvq_status status = mkvq_check_pack(args, MKVQ_ON_HOST, error);
    if (status != MKVQ_OK)
        return status;
    const int64_t rows = args->k.shape[0], heads = args->k.shape[1];
    if (rows == 0 || heads == 0 || args->max_blocks == 0)
        return MKVQ_OK;
    const double block = (double)args->codec->block_length * args->codec->head_dim *
                         (2 * PACK_OPERATIONS); /* work */
    const int layer = args->codec->allocate == MKVQ_ALLOCATE_LAYER;
    job j = {NULL, args, layer ? 1 : heads, NULL};
    if (mkvq_has_reference(args->codec)) {
        int64_t unknown = 0;
        for (int64_t i = 0; i < rows * heads; i++)
            unknown += !args->has_mu[i] && args->blocks[i / heads] > 0;
        run(args->executor, rows * j.heads, (double)unknown * block, pack_reference_body, &j);
    }
    int64_t blocks = 0;
    for (int64_t b = 0; b < rows; b++)
        blocks += args->blocks[b] * heads;
    run(args->executor, rows * j.heads * args->max_blocks, (double)blocks * block, pack_body, &j);
    return MKVQ_OK;
}

/* Tokens of all rows: exact ones, and packed ones as if all blocks had the length of the first. */
static int64_t count_tokens(const mkvq_history *h, const int64_t *exact)
{
    int64_t tokens = 0;
    for (int64_t b = 0; b < h->batch; b++) {
        tokens += exact ? exact[b] : 0;
        if (h->blocks[b] > 0 && h->kv_heads > 0)
            tokens += h->blocks[b] *
                      ((const mkvq_header *)(const void *)mkvq_record_at(h, b, 0, 0))->tokens;
    }
    return tokens;
}

static void unpack_body(int64_t begin, int64_t end, void *ctx)
{
    const job *j = ctx;
    for (int64_t u = begin; u < end; u++)
        j->kernels->unpack(j->args, u / j->heads, u % j->heads);
}

mkvq_status mkvq_unpack(const mkvq_unpack_args *args, mkvq_error *error)
{
    const mkvq_status status = mkvq_check_unpack(args, MKVQ_ON_HOST, error);
    if (status != MKVQ_OK)
        return status;
    const mkvq_history *h = args->history;
    job j = {NULL, args, h->kv_heads, NULL};
    run(args->executor, h->batch * j.heads,
        (double)count_tokens(h, NULL) * h->kv_heads * h->head_dim * (2 * UNPACK_OPERATIONS),
        unpack_body, &j);
    return MKVQ_OK;
}

static void attend_body(int64_t begin, int64_t end, void *ctx)
{
    const job *j = ctx;
    const mkvq_attend_args *a = j->args;
    const mkvq_attend_plan *plan = j->plan;
    for (int64_t u = begin; u < end; u++) {
        const int64_t tile = u / plan->runs, head = tile / plan->tiles;
        j->kernels->attend(
            a, plan, head / j->heads, head % j->heads, tile % plan->tiles, u % plan->runs,
            plan->runs > 1 ? (float *)a->workspace + u * mkvq_partial_floats(a, plan) : NULL);
    }
}

mkvq_status mkvq_attend(const mkvq_attend_args *args, mkvq_error *error)
{
    const mkvq_status status = mkvq_check_attend(args, MKVQ_ON_HOST, error);
    if (status != MKVQ_OK)
        return status;
    mkvq_attend_plan plan = mkvq_plan_attend(args);
    if (!args->workspace)
        plan.runs = 1;
    job j = {NULL, args, args->history->kv_heads, &plan};
    const int64_t tiles = args->history->batch * j.heads * plan.tiles;
    run(args->executor, tiles * plan.runs,
        (double)count_tokens(args->history, args->exact) *
            (double)(args->q.shape[1] * args->q.shape[2]) * (double)(2 * args->q.shape[3]),
        attend_body, &j);
    for (int64_t t = 0; plan.runs > 1 && t < tiles; t++) {
        const int64_t head = t / plan.tiles;
        j.kernels->merge(args, &plan, head / j.heads, head % j.heads, t % plan.tiles,
                         (const float *)args->workspace +
                             t * plan.runs * mkvq_partial_floats(args, &plan));
    }
    return MKVQ_OK;
}
