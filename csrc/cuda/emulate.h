// emulate.h - device.h on the host: the threads of a block are fibers of one thread, and every
// function by which threads work together switches between them (emulate.cpp).
//
// Fibers run in an order that changes with MKVQ_EMULATE_SEED. What a GPU leaves undefined stops the
// process with a message: a barrier that not all threads reach, lanes that disagree about who takes
// part, a copy that is read before it was waited for. Under ThreadSanitizer fibers are threads that only
// barriers and ordered additions order, so that it finds the races that a GPU would have.
#ifndef MKVQ_EMULATE_H
#define MKVQ_EMULATE_H
#include <functional>
#include <string.h>

struct alignas(8) uint2 {
    uint32_t x, y;
};
struct alignas(16) uint4 {
    uint32_t x, y, z, w;
};
struct alignas(8) float2 {
    float x, y;
};
struct alignas(16) float4 {
    float x, y, z, w;
};

#define MKVQ_KERNEL(threads, blocks) static void
#define MKVQ_DEVICE static inline
#define MKVQ_PHASE static
#define MKVQ_METHOD inline
#define MKVQ_UNROLL_ALL
#define MKVQ_ROLLED
#define MKVQ_UNROLL(n)

namespace emulate
{
struct place {
    int thread, threads;
    int64_t x, y, z, blocks_x;
    uint8_t *shared;
};
extern place here; // of the fiber that runs

void block_barrier();
void lane_barrier(uint32_t mask);
int block_or(int x);
// Leaves x[n] where the other lanes of the mask see it, as lanes[lane]; returns the slots of the warp.
// They stay until all of them have called `leave`. Orders nothing else, as shuffles do not.
struct slot {
    uint32_t word[12];
};
const slot *meet(uint32_t mask, const uint32_t *x, int n);
void leave(uint32_t mask);
void copy_later(void *shared, const void *global);
void close_copies();
void finish_copies(int but);
void release(void *p); // of an ordered addition, for ThreadSanitizer
void acquire(void *p);
mkvq_status run(grid_size grid, int threads, int shared_bytes, const std::function<void()> &kernel,
                mkvq_error *error);
} // namespace emulate

MKVQ_DEVICE int thread_index()
{
    return emulate::here.thread;
}
MKVQ_DEVICE int thread_count()
{
    return emulate::here.threads;
}
MKVQ_DEVICE int64_t block_x()
{
    return emulate::here.x;
}
MKVQ_DEVICE int64_t block_y()
{
    return emulate::here.y;
}
MKVQ_DEVICE int64_t block_z()
{
    return emulate::here.z;
}
MKVQ_DEVICE int64_t blocks_x()
{
    return emulate::here.blocks_x;
}
MKVQ_DEVICE uint8_t *shared_memory()
{
    return emulate::here.shared;
}

// ---- together with other threads -----------------------------------------------------------------
MKVQ_DEVICE void sync_block()
{
    emulate::block_barrier();
}
MKVQ_DEVICE int any_in_block(int x)
{
    return emulate::block_or(x);
}
MKVQ_DEVICE void sync_lanes(uint32_t mask)
{
    emulate::lane_barrier(mask);
}
MKVQ_DEVICE uint32_t shuffle(uint32_t mask, uint32_t x, int lane)
{
    const uint32_t y = emulate::meet(mask, &x, 1)[lane & 31].word[0];
    emulate::leave(mask);
    return y;
}
MKVQ_DEVICE float shuffle(uint32_t mask, float x, int lane)
{
    return mkvq_float(shuffle(mask, mkvq_bits(x), lane));
}
MKVQ_DEVICE uint32_t shuffle_xor(uint32_t mask, uint32_t x, int flip)
{
    return shuffle(mask, x, (thread_index() & 31) ^ flip);
}
MKVQ_DEVICE float shuffle_xor(uint32_t mask, float x, int flip)
{
    return shuffle(mask, x, (thread_index() & 31) ^ flip);
}
MKVQ_DEVICE uint32_t ballot(uint32_t mask, int x)
{
    const uint32_t bit = x != 0;
    const emulate::slot *lanes = emulate::meet(mask, &bit, 1);
    uint32_t all = 0;
    for (int i = 0; i < 32; i++)
        if (mask >> i & 1)
            all |= lanes[i].word[0] << i;
    emulate::leave(mask);
    return all;
}
MKVQ_DEVICE uint32_t add_ordered(uint32_t *p, uint32_t x)
{
    emulate::release(p);
    const uint32_t old = __atomic_fetch_add(p, x, __ATOMIC_ACQ_REL);
    emulate::acquire(p);
    return old;
}
MKVQ_DEVICE void add_shared(uint32_t *p, uint32_t x)
{
    __atomic_fetch_add(p, x, __ATOMIC_RELAXED);
}
MKVQ_DEVICE void max_shared(uint32_t *p, uint32_t x)
{
    uint32_t old = __atomic_load_n(p, __ATOMIC_RELAXED);
    while (old < x &&
           !__atomic_compare_exchange_n(p, &old, x, 1, __ATOMIC_RELAXED, __ATOMIC_RELAXED)) {
    }
}

// ---- numbers -------------------------------------------------------------------------------------
MKVQ_DEVICE uint32_t pack_f16(float low, float high)
{
    return mkvq_f32_to_f16(low) | (uint32_t)mkvq_f32_to_f16(high) << 16;
}
MKVQ_DEVICE float f16_float(uint16_t half)
{
    return mkvq_f16_to_f32(half);
}
MKVQ_DEVICE float exp2_float(float x)
{
    return x < -126.0f ? 0.0f : __builtin_exp2f(x);
}

MKVQ_DEVICE uint32_t largest_of(uint32_t mask, uint32_t x)
{
    const emulate::slot *lanes = emulate::meet(mask, &x, 1);
    for (int i = 0; i < 32; i++)
        if (mask >> i & 1 && lanes[i].word[0] > x)
            x = lanes[i].word[0];
    emulate::leave(mask);
    return x;
}
MKVQ_DEVICE int count_bits(uint32_t x)
{
    return __builtin_popcount(x);
}
MKVQ_DEVICE int forgotten(int x)
{
    return x;
}
MKVQ_DEVICE uint32_t subtract_f16(uint32_t a, uint32_t b)
{
    return pack_f16(f16_float((uint16_t)a) - f16_float((uint16_t)b),
                    f16_float((uint16_t)(a >> 16)) - f16_float((uint16_t)(b >> 16)));
}

// ---- matrix products -----------------------------------------------------------------------------
MKVQ_DEVICE void multiply_f16(float d[4], const uint32_t a[4], const uint32_t b[2])
{
    uint32_t mine[6] = {a[0], a[1], a[2], a[3], b[0], b[1]};
    const uint32_t all = 0xffffffffu;
    const emulate::slot *lanes = emulate::meet(all, mine, 6);
    const int g = (thread_index() & 31) / 4, j = thread_index() % 4;
    for (int r = 0; r < 2; r++) // rows g, g + 8
        for (int c = 0; c < 2; c++)
            for (int k = 0; k < 16; k++) {
                // columns 2j, 2j + 1, 2j + 8, 2j + 9 of a, likewise rows of b, lie in lane j of four
                const int lane = k % 8 / 2, half = k / 8, shift = 16 * (k % 2);
                const uint32_t x = lanes[4 * g + lane].word[2 * half + r] >> shift;
                const uint32_t y = lanes[4 * (2 * j + c) + lane].word[4 + half] >> shift;
                d[2 * r + c] += f16_float((uint16_t)x) * f16_float((uint16_t)y);
            }
    emulate::leave(all);
}

// ---- copies --------------------------------------------------------------------------------------
MKVQ_DEVICE void copy_async(void *shared, const void *global)
{
    emulate::copy_later(shared, global);
}
MKVQ_DEVICE void end_copy_group()
{
    emulate::close_copies();
}
template <int n> MKVQ_DEVICE void wait_copies()
{
    emulate::finish_copies(n);
}

// ---- launching -----------------------------------------------------------------------------------
static inline int processors()
{
    return 8;
}

template <typename Job>
static mkvq_status launch(void (*kernel)(Job), grid_size grid, int threads, int shared_bytes,
                          void *stream, const Job &job, mkvq_error *error)
{
    (void)stream;
    return emulate::run(grid, threads, shared_bytes, [&] { kernel(job); }, error);
}
#endif
