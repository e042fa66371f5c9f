// emulate.cpp - blocks of fibers for emulate.h. Compiled without any sanitizer's instrumentation: what
// it does stands for the hardware.
//
// One block runs after the other. A fiber runs until it waits; it waits for a barrier of its block or of
// lanes of its warp. When all wait, the barrier that is missing somebody is the error.
//
// ThreadSanitizer is told of every thread of every block as a thread of its own, and of the order that
// barriers make. Each block gets fresh memory for what hardware gives to each of them (stacks, shared
// memory), so that blocks are compared by what they do to device memory only.
#include "device.h"
#include "emulate_stack.h"

#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <vector>

#if defined(MKVQ_THREAD_SANITIZER)
extern "C" {
void *__tsan_get_current_fiber(void);
void *__tsan_create_fiber(unsigned flags);
void __tsan_destroy_fiber(void *fiber);
void __tsan_set_fiber_name(void *fiber, const char *name);
void __tsan_switch_to_fiber(void *fiber, unsigned flags);
void __tsan_acquire(void *p);
void __tsan_release(void *p);
void __tsan_read16(void *p);
void __tsan_write16(void *p);
}
#define TSAN(call) call
#define FRESH_STACKS true // of every block, since what was written to the old ones is remembered
#else
#define TSAN(call) ((void)0)
#define FRESH_STACKS false
#endif

namespace emulate
{
namespace
{
constexpr size_t STACK = 256 * 1024;
constexpr int MOST_THREADS = 1024;

struct copy {
    uint8_t *to;
    const uint8_t *from;
};

struct fiber {
    void *stack; // where it goes on
    bool done;
    const uint32_t *waits_for; // until this differs from `seen`
    uint32_t seen;
    const char *where;
    std::vector<copy> copies;
    std::vector<size_t> closed; // ends of groups in `copies`
    void *tsan;
};

// Lanes of a warp that meet under one mask; kept at its lowest lane.
struct meeting {
    uint32_t mask, arrived, turn;
    char order[2]; // by turn: who is at the next meeting orders nobody at this one
};

struct warp {
    slot slots[32];
    meeting meetings[32];
};

fiber fibers[MOST_THREADS];
warp warps[MOST_THREADS / 32];
uint8_t *stacks;
void *scheduler;
const std::function<void()> *body;
int running, threads, arrived, alive;
uint32_t barrier_turn, random_state;
int any[2];
[[maybe_unused]] char barrier_order[2]; // by turn, as in a meeting
[[maybe_unused]] char launch_order, end_order;
[[maybe_unused]] void *main_fiber;

[[noreturn]] void stop(const char *what)
{
    std::fprintf(stderr, "emulator: block (%lld, %lld, %lld), thread %d: %s\n", (long long)here.x,
                 (long long)here.y, (long long)here.z, here.thread, what);
    for (int i = 0; i < threads; i++)
        if (!fibers[i].done && fibers[i].where)
            std::fprintf(stderr, "  thread %d waits at %s\n", i, fibers[i].where);
    std::abort();
}

void leave_fiber()
{
    TSAN(__tsan_switch_to_fiber(main_fiber, 1));
    mkvq_switch_stack(&fibers[running].stack, scheduler);
}

void wait(const uint32_t *turn, uint32_t seen, const char *where)
{
    fiber &f = fibers[running];
    f.waits_for = turn, f.seen = seen, f.where = where;
    leave_fiber();
    f.waits_for = nullptr, f.where = nullptr;
}

void start()
{
    TSAN(__tsan_acquire(&launch_order));
    (*body)();
    fiber &f = fibers[running];
    if (!f.copies.empty())
        stop("ends with copies that nobody waited for");
    f.done = true;
    alive--;
    if (arrived)
        stop("ends while others wait in sync_block");
    TSAN(__tsan_release(&end_order));
    leave_fiber();
    std::abort(); // nobody comes back to it
}

uint32_t next_random()
{
    random_state = random_state * 1664525u + 1013904223u;
    return random_state >> 8;
}

// ThreadSanitizer's fiber for the next thread, another one than those of this block and the two before:
// making them anew for every block takes longer than all else.
[[maybe_unused]] void *next_tsan_fiber(int thread)
{
    static void *pool[3 * MOST_THREADS];
    static int next;
    next = (next + 1) % (3 * threads);
    if (!pool[next])
        TSAN(pool[next] = __tsan_create_fiber(0));
    char name[96];
    std::snprintf(name, sizeof name, "block (%lld, %lld, %lld), thread %d", (long long)here.x,
                  (long long)here.y, (long long)here.z, thread);
    TSAN(__tsan_set_fiber_name(pool[next], name));
    return pool[next];
}

void run_block(int n)
{
    threads = alive = n;
    arrived = 0;
    for (int i = 0; i < n; i++) {
        fiber &f = fibers[i];
        f.stack = new_stack(stack_of(stacks, i, STACK), start);
        f.done = false, f.waits_for = nullptr, f.where = nullptr;
        f.closed.clear();
        TSAN(f.tsan = next_tsan_fiber(i));
    }
    while (alive > 0) {
        const int first = (int)(next_random() % (uint32_t)n), step = next_random() & 1 ? 1 : n - 1;
        bool moved = false;
        for (int k = 0, i = first; k < n; k++, i = (i + step) % n) {
            fiber &f = fibers[i];
            if (f.done || (f.waits_for && *f.waits_for == f.seen))
                continue;
            moved = true;
            running = i, here.thread = i;
            TSAN(__tsan_switch_to_fiber(f.tsan, 1));
            mkvq_switch_stack(&scheduler, f.stack);
        }
        if (!moved)
            stop("all threads wait: not all of them have come to the same barrier");
    }
}

// Memory of which ThreadSanitizer has forgotten who used it before; for AddressSanitizer exactly as long
// as asked for.
uint8_t *take_shared(size_t bytes)
{
    void *p = nullptr;
#if defined(MKVQ_THREAD_SANITIZER)
    p = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    const bool failed = p == MAP_FAILED;
#else
    const bool failed = posix_memalign(&p, 128, bytes) != 0;
#endif
    if (failed)
        std::abort();
    std::memset(p, 0xff, bytes); // NaN
    return static_cast<uint8_t *>(p);
}

void give_shared(uint8_t *p, [[maybe_unused]] size_t bytes)
{
#if defined(MKVQ_THREAD_SANITIZER)
    munmap(p, bytes);
#else
    std::free(p);
#endif
}
} // namespace

place here;

void block_barrier()
{
    block_or(0);
}

int block_or(int x)
{
    if (alive != threads)
        stop("waits in sync_block, but threads have ended");
    const uint32_t turn = barrier_turn;
    TSAN(__tsan_release(&barrier_order[turn & 1]));
    any[turn & 1] |= x != 0;
    if (++arrived == threads) {
        arrived = 0;
        any[~turn & 1] = 0;
        barrier_turn++;
    } else
        wait(&barrier_turn, turn, "sync_block");
    TSAN(__tsan_acquire(&barrier_order[turn & 1]));
    return any[turn & 1];
}

static void meet_lanes(uint32_t mask, [[maybe_unused]] bool ordered, const char *where)
{
    warp &w = warps[here.thread / 32];
    const int lane = here.thread % 32;
    if (!(mask >> lane & 1))
        stop("is not in its own mask of lanes");
    meeting &m = w.meetings[__builtin_ctz(mask)];
    if (m.arrived && m.mask != mask)
        stop("lanes disagree about who takes part");
    const uint32_t turn = m.turn;
    if (ordered)
        TSAN(__tsan_release(&m.order[turn & 1]));
    m.mask = mask;
    m.arrived |= 1u << lane;
    if (m.arrived == mask) {
        m.arrived = 0;
        m.turn++;
    } else
        wait(&m.turn, turn, where);
    if (ordered)
        TSAN(__tsan_acquire(&m.order[turn & 1]));
}

const slot *meet(uint32_t mask, const uint32_t *x, int n)
{
    warp &w = warps[here.thread / 32];
    for (int i = 0; i < n; i++)
        w.slots[here.thread % 32].word[i] = x[i];
    meet_lanes(mask, false, "a meeting of lanes");
    return w.slots;
}

void leave(uint32_t mask)
{
    meet_lanes(mask, false, "the end of a meeting of lanes");
}

void lane_barrier(uint32_t mask)
{
    meet_lanes(mask, true, "sync_lanes");
}

void copy_later(void *shared, const void *global)
{
    if ((uintptr_t)shared % 16 || (uintptr_t)global % 16)
        stop("copies to or from an address that is no multiple of 16");
    fibers[running].copies.push_back(
        {static_cast<uint8_t *>(shared), static_cast<const uint8_t *>(global)});
    TSAN(__tsan_read16(const_cast<void *>(global)));
    TSAN(__tsan_write16(shared));
    std::memset(shared, 0xff, 16); // whoever reads it too early reads this
}

void close_copies()
{
    fibers[running].closed.push_back(fibers[running].copies.size());
}

void finish_copies(int but)
{
    fiber &f = fibers[running];
    if (f.closed.size() <= (size_t)but)
        return;
    const size_t groups = f.closed.size() - (size_t)but, end = f.closed[groups - 1];
    for (size_t i = 0; i < end; i++) {
        TSAN(__tsan_read16(const_cast<uint8_t *>(f.copies[i].from)));
        TSAN(__tsan_write16(f.copies[i].to));
        std::memcpy(f.copies[i].to, f.copies[i].from, 16);
    }
    f.copies.erase(f.copies.begin(), f.copies.begin() + (std::ptrdiff_t)end);
    f.closed.erase(f.closed.begin(), f.closed.begin() + (std::ptrdiff_t)groups);
    for (size_t &later : f.closed)
        later -= end;
}

void release(void *p)
{
    (void)p;
    TSAN(__tsan_release(p));
}

void acquire(void *p)
{
    (void)p;
    TSAN(__tsan_acquire(p));
}

mkvq_status run(grid_size grid, int n, int shared_bytes, const std::function<void()> &kernel,
                mkvq_error *error)
{
    if (!is_launchable(grid, n, shared_bytes, error))
        return MKVQ_E_SHAPE;
    const char *seed = std::getenv("MKVQ_EMULATE_SEED");
    random_state = seed ? (uint32_t)std::strtoul(seed, nullptr, 10) : 1;
    body = &kernel;
    TSAN(main_fiber = __tsan_get_current_fiber());
    TSAN(__tsan_release(&launch_order)); // all threads come after what the host has done
    here.threads = n, here.blocks_x = grid.x;
    for (int64_t z = 0; z < grid.z; z++)
        for (int64_t y = 0; y < grid.y; y++)
            for (int64_t x = 0; x < grid.x; x++) {
                if (!stacks)
                    stacks = take_stacks(FRESH_STACKS ? n : MOST_THREADS, STACK, !FRESH_STACKS);
                here.shared = shared_bytes ? take_shared((size_t)shared_bytes) : nullptr;
                here.x = x, here.y = y, here.z = z;
                run_block(n);
                if (shared_bytes)
                    give_shared(here.shared, (size_t)shared_bytes);
                if (FRESH_STACKS)
                    give_stacks(stacks, n, STACK), stacks = nullptr;
            }
    TSAN(__tsan_acquire(&end_order)); // the next launch comes after this one
    return MKVQ_OK;
}
} // namespace emulate
