/* parallel.c - who runs the core's loops: torch's intra-op pool once mixkvq.torch_module has found
 * it, else the calling thread.
 *
 * The pool is reached through a C function of libtorch, torch_parallel_for, given by address: no
 * torch header, no C++, and no second pool in the process. MIXKVQ_NUM_THREADS caps the number of
 * ranges that a loop is cut into. A forked process has the pool but not its threads, for which the
 * pool would wait for ever: loops run in the calling thread there, also where none has run in the
 * pool before the fork, as torch's own operators may have started it, which cannot be asked. */
#include <limits.h>
#include <pthread.h>
#include <stdatomic.h>
#include <stdlib.h>

#include "bind.h"

typedef int32_t (*torch_pool)(int64_t begin, int64_t end, int64_t grain, mkvq_body body, void *ctx);

static _Atomic(mkvq_executor) installed;
static _Atomic(torch_pool) pool;
static _Atomic(int) forked; /* since the executor was installed */
static _Atomic(int) forks;
static int64_t threads = INT64_MAX; /* set once, at import */

static void capped(int64_t n, int64_t grain, mkvq_body body, void *ctx)
{
    const mkvq_executor executor = atomic_load_explicit(&installed, memory_order_acquire);
    const int64_t least = n / threads + (n % threads != 0);
    if (threads == 1 || !executor) /* taken out since the call began */
        body(0, n, ctx);
    else
        executor(n, grain > least ? grain : least, body, ctx);
}

mkvq_executor mkvq_py_executor(void)
{
    const mkvq_executor executor = atomic_load_explicit(&installed, memory_order_acquire);
    if (atomic_load_explicit(&forked, memory_order_relaxed))
        return NULL;
    return executor && threads != INT64_MAX ? capped : executor;
}

void mkvq_py_set_executor(mkvq_executor executor)
{
    atomic_store_explicit(&installed, executor, memory_order_release);
    atomic_store_explicit(&forked, 0, memory_order_relaxed);
}

static void in_child(void)
{
    atomic_store_explicit(&forked, 1, memory_order_relaxed);
    atomic_fetch_add_explicit(&forks, 1, memory_order_relaxed);
}

int mkvq_py_forks(void)
{
    return atomic_load_explicit(&forks, memory_order_relaxed);
}

int mkvq_py_watch_forks(void)
{
    static int watching;
    if (!watching && pthread_atfork(NULL, NULL, in_child) != 0) {
        PyErr_NoMemory();
        return -1;
    }
    watching = 1;
    return 0;
}

static void run_in_torch(int64_t n, int64_t grain, mkvq_body body, void *ctx)
{
    const torch_pool parallel_for = atomic_load_explicit(&pool, memory_order_acquire);
    /* The bodies are C and raise nothing: a failure means that the pool never started, so nothing
     * has run yet. */
    if (parallel_for(0, n, grain, body, ctx) != 0)
        body(0, n, ctx);
}

void mkvq_py_set_torch_pool(uintptr_t address)
{
    if (address) /* otherwise the old pool stays for calls under way */
        atomic_store_explicit(&pool, (torch_pool)address, memory_order_release);
    mkvq_py_set_executor(address ? run_in_torch : NULL);
}

int mkvq_py_read_threads(void)
{
    const char *text = getenv("MIXKVQ_NUM_THREADS");
    if (!text || !*text)
        return 0;
    char *end;
    const long value = strtol(text, &end, 10);
    if (*end || value < 1 || value == LONG_MAX) {
        PyErr_Format(PyExc_ImportError, "MIXKVQ_NUM_THREADS is '%s', must be a positive integer",
                     text);
        return -1;
    }
    threads = value;
    return 0;
}
