/* failing_malloc.c - a malloc that fails when it is told to, for LD_PRELOAD: allocations are counted in the thread that
 * arms it, and the n-th one of the wanted kind fails. Where it was asked for is kept as an offset in the module named. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <execinfo.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

extern void *__libc_malloc(size_t);
extern void *__libc_calloc(size_t, size_t);
extern void *__libc_realloc(void *, size_t);
extern void *__libc_memalign(size_t, size_t);

enum { PLAIN = 1, ALIGNED = 2 };

static __thread int armed; /* kinds that are counted */
static __thread long left, failed;
static __thread int onward, looking;
static __thread uintptr_t site;
static __thread const char *module;

/* Where the innermost frame inside the module is; 0 if there is none. */
static uintptr_t found(void)
{
    void *frames[64];
    const int n = backtrace(frames, 64);
    for (int i = 0; i < n; i++) {
        Dl_info info;
        if (dladdr(frames[i], &info) && info.dli_fname && strstr(info.dli_fname, module))
            return (uintptr_t)frames[i] - (uintptr_t)info.dli_fbase;
    }
    return 0;
}

static int fails(int kind)
{
    if (!(armed & kind) || looking)
        return 0;
    if (module && *module) {
        looking = 1; /* what looks may allocate */
        const uintptr_t here = found();
        looking = 0;
        if (!here)
            return 0;
        if (left == 1)
            site = here;
    }
    if (left > 1) {
        left--;
        return 0;
    }
    if (left < 1 && !onward)
        return 0;
    left = 0, failed++;
    errno = ENOMEM;
    return 1;
}

void *malloc(size_t n)
{
    return fails(PLAIN) ? NULL : __libc_malloc(n);
}

void *calloc(size_t n, size_t size)
{
    return fails(PLAIN) ? NULL : __libc_calloc(n, size);
}

void *realloc(void *old, size_t n)
{
    return fails(PLAIN) ? NULL : __libc_realloc(old, n);
}

int posix_memalign(void **out, size_t alignment, size_t n)
{
    if (fails(ALIGNED))
        return ENOMEM;
    *out = __libc_memalign(alignment, n);
    return *out ? 0 : ENOMEM;
}

void *aligned_alloc(size_t alignment, size_t n)
{
    return fails(ALIGNED) ? NULL : __libc_memalign(alignment, n);
}

void *memalign(size_t alignment, size_t n)
{
    return fails(ALIGNED) ? NULL : __libc_memalign(alignment, n);
}

/* From now on the n-th allocation of these kinds fails, or that and all after it; with a module name, of those asked for
 * by a function of that module, however deep below it. */
void failing_arm(int kinds, long n, int all_after, const char *in_module)
{
    void *frame[1];
    backtrace(frame, 1); /* loads what it needs at its first call */
    site = 0, failed = 0, left = n, onward = all_after, module = in_module;
    armed = kinds;
}

/* How many failed. */
long failing_disarm(void)
{
    armed = 0;
    return failed;
}

long failing_site(void)
{
    return (long)site;
}
