// emulator_kernels.cu - small kernels for test_emulator.py: one for everything that device.h offers, and
// some that are wrong in a way that the emulator or a sanitizer must see.
#include "device.h"

namespace
{
struct words_job {
    const uint32_t *in;
    uint32_t *out;
    int n;
};

MKVQ_KERNEL(32, 1) multiply_kernel(const words_job a)
{
    const int t = thread_index();
    float d[4];
    uint32_t x[4], y[2];
    for (int i = 0; i < 4; i++)
        x[i] = a.in[4 * t + i], d[i] = mkvq_float(a.out[4 * t + i]);
    for (int i = 0; i < 2; i++)
        y[i] = a.in[128 + 2 * t + i];
    multiply_f16(d, x, y);
    for (int i = 0; i < 4; i++)
        a.out[4 * t + i] = mkvq_bits(d[i]);
}

// Per thread: shuffle from the next lane, shuffle_xor by 5, ballot in both halves of a warp on their own,
// any_in_block.
MKVQ_KERNEL(96, 1) lanes_kernel(const words_job a)
{
    const int t = thread_index(), lane = t & 31;
    const uint32_t all = 0xffffffffu, half = lane < 16 ? 0xffffu : 0xffff0000u;
    uint32_t *out = a.out + 4 * t;
    out[0] = shuffle(all, a.in[t], (lane + 1) & 31);
    out[1] = mkvq_bits(shuffle_xor(all, mkvq_float(a.in[t]), 5));
    out[2] = ballot(half, (int)(a.in[t] & 1));
    out[3] = (uint32_t)any_in_block(a.in[t] == 7) | (uint32_t)any_in_block(a.in[t] == 8) << 1;
}

// Sums n groups of 16 bytes per thread through three stages of shared memory; the thread reads what its
// neighbour has copied.
MKVQ_KERNEL(64, 1) copies_kernel(const words_job a)
{
    const int t = thread_index(), threads = thread_count(), other = (t + 1) % threads;
    uint32_t *shared = (uint32_t *)shared_memory(), sum = 0;
    for (int i = 0; i < 2; i++) {
        copy_async(shared + 4 * (i * threads + t), a.in + 4 * (i * threads + t));
        end_copy_group();
    }
    for (int i = 0; i < a.n; i++) {
        wait_copies<1>();
        sync_block();
        const uint32_t *p = shared + 4 * (i % 3 * threads + other);
        sum += p[0] + p[1] + p[2] + p[3];
        if (i + 2 < a.n)
            copy_async(shared + 4 * ((i + 2) % 3 * threads + t),
                       a.in + 4 * ((i + 2) * threads + t));
        end_copy_group();
    }
    wait_copies<0>();
    a.out[t] = sum;
}

// Blocks add up what they were given; the last one to come writes the sum.
MKVQ_KERNEL(32, 1) last_kernel(const words_job a)
{
    uint32_t *partial = a.out + 2, *shared = (uint32_t *)shared_memory();
    const int64_t block = block_x(), blocks = blocks_x();
    if (thread_index() == 0) {
        partial[block] = a.in[block];
        shared[0] = add_ordered(&a.out[1], 1) == blocks - 1;
    }
    sync_block();
    if (shared[0] && thread_index() == 1)
        for (int64_t i = 0; i < blocks; i++)
            a.out[0] += partial[i];
}

// ---- wrong kernels -------------------------------------------------------------------------------
enum {
    RIGHT,
    NO_BARRIER,
    NO_LANE_BARRIER,
    NO_ORDER,
    BEYOND_SHARED,
    BEYOND_GLOBAL,
    EARLY_END,
    MISSED_BARRIER,
    FOREIGN_MASK,
    OTHER_MASKS,
    LEFT_COPIES,
    EARLY_READ,
    ODD_ADDRESS
};

// Reverses in[64] through shared memory, with the mistake a.n.
MKVQ_KERNEL(64, 1) mistake_kernel(const words_job a)
{
    const int t = thread_index(), lane = t & 31;
    uint32_t *shared = (uint32_t *)shared_memory();
    switch (a.n) {
    case BEYOND_SHARED: shared[t + 1] = 0; break;
    case BEYOND_GLOBAL: a.out[t + 1] = 0; break;
    case EARLY_END:
        if (t == 3)
            return;
        break;
    case MISSED_BARRIER:
        if (t < 32)
            sync_lanes(t == 3 ? 1u << 3 | 1u << 4 : 1u << lane);
        break;
    case FOREIGN_MASK: sync_lanes(1); break;
    case OTHER_MASKS: sync_lanes(lane == 31 || lane == 5 ? 0xffffffffu : 0x7fffffffu); break;
    case EARLY_READ:
    case LEFT_COPIES:
        if (t % 4 == 0)
            copy_async(shared + t, a.in + t);
        if (a.n == LEFT_COPIES)
            return;
        a.out[t] = shared[t];
        end_copy_group();
        wait_copies<0>();
        return;
    case ODD_ADDRESS: copy_async(shared + 1, a.in); break;
    }
    shared[t] = a.in[t];
    if (a.n == NO_LANE_BARRIER) {
        a.out[t] = shared[t ^ 1];
        return;
    }
    if (a.n != NO_BARRIER)
        sync_block();
    a.out[t] = shared[63 - t];
}

// Blocks that count together, in order or not.
MKVQ_KERNEL(32, 1) count_blocks_kernel(const words_job a)
{
    if (thread_index() == 0) {
        if (a.n == NO_ORDER)
            a.out[0]++;
        else
            add_ordered(&a.out[0], 1);
    }
}
} // namespace

extern "C" int run_kernel(int which, int64_t blocks, int threads, int shared_bytes,
                          const uint32_t *in, uint32_t *out, int n)
{
    static void (*const kernels[])(words_job) = {multiply_kernel, lanes_kernel,
                                                 copies_kernel,   last_kernel,
                                                 mistake_kernel,  count_blocks_kernel};
    return launch(kernels[which], {blocks}, threads, shared_bytes, nullptr, words_job{in, out, n},
                  nullptr);
}
