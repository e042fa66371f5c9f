// device.h - what kernels use of the GPU: PTX here, functions of the same names in emulate.h on the
// host. Kernels use nothing else, so that the same source runs in both.
//
// A kernel takes one struct by value:
//
//     MKVQ_KERNEL(256, 2) salience_kernel(const salience_job a) { ... }
//     launch(salience_kernel, {x, y, z}, 256, shared_bytes, stream, job, error);
//
// Its shared memory is what the launch asked for, at shared_memory().
#ifndef MKVQ_DEVICE_H
#define MKVQ_DEVICE_H
#include "../numeric.h"

#include "../mixkvq.h"
#include <stddef.h>
#include <stdint.h>

struct grid_size {
    int64_t x, y = 1, z = 1;
};

// Bytes of shared memory that a block can have on every architecture from sm_80 on.
constexpr int MOST_SHARED = 99 * 1024;

// Whether every device takes a launch of this size; an error if not.
static inline bool is_launchable(const grid_size &grid, int threads, int shared_bytes,
                                 mkvq_error *error)
{
    const bool ok = grid.x >= 1 && grid.y >= 1 && grid.z >= 1 && grid.x <= INT32_MAX &&
                    grid.y <= 65535 && grid.z <= 65535 && threads >= 1 && threads <= 1024 &&
                    threads % 32 == 0 && shared_bytes <= MOST_SHARED;
    if (!ok && error)
        *error = {"launch", "of a size that devices allow: use a smaller batch or fewer tokens",
                  grid.y > 65535 ? grid.y : grid.x};
    return ok;
}

#ifdef MKVQ_EMULATE
#include "emulate.h"
#else
#include <cuda_runtime_api.h>

#define MKVQ_KERNEL(threads, blocks) static __global__ void __launch_bounds__(threads, blocks)
#define MKVQ_DEVICE static __device__ __forceinline__
#define MKVQ_PHASE static __device__ __noinline__ // has registers of its own
#define MKVQ_METHOD __device__ __forceinline__    // of a struct
#define MKVQ_PRAGMA(text) _Pragma(#text)
#define MKVQ_UNROLL_ALL _Pragma("unroll")
#define MKVQ_ROLLED _Pragma("unroll 1")
#define MKVQ_UNROLL(n) MKVQ_PRAGMA(unroll n) // of a loop: n iterations in one

// ---- where a thread is ---------------------------------------------------------------------------
MKVQ_DEVICE int thread_index()
{
    return (int)threadIdx.x;
}
MKVQ_DEVICE int thread_count()
{
    return (int)blockDim.x;
}
MKVQ_DEVICE int64_t block_x()
{
    return blockIdx.x;
}
MKVQ_DEVICE int64_t block_y()
{
    return blockIdx.y;
}
MKVQ_DEVICE int64_t block_z()
{
    return blockIdx.z;
}
MKVQ_DEVICE int64_t blocks_x()
{
    return gridDim.x;
}

MKVQ_DEVICE uint8_t *shared_memory()
{
    extern __shared__ __align__(128) uint8_t mkvq_shared_memory[];
    return mkvq_shared_memory;
}

// ---- together with other threads -----------------------------------------------------------------
// `mask`: the lanes of the warp that take part, which all must come here with the same mask.
MKVQ_DEVICE void sync_block()
{
    __syncthreads();
}
MKVQ_DEVICE void sync_lanes(uint32_t mask)
{
    __syncwarp(mask);
}
// The value of lane `lane` (of lane ^ `flip`), which takes part.
MKVQ_DEVICE uint32_t shuffle(uint32_t mask, uint32_t x, int lane)
{
    return __shfl_sync(mask, x, lane);
}
MKVQ_DEVICE float shuffle(uint32_t mask, float x, int lane)
{
    return __shfl_sync(mask, x, lane);
}
MKVQ_DEVICE uint32_t shuffle_xor(uint32_t mask, uint32_t x, int flip)
{
    return __shfl_xor_sync(mask, x, flip);
}
MKVQ_DEVICE float shuffle_xor(uint32_t mask, float x, int flip)
{
    return __shfl_xor_sync(mask, x, flip);
}
// Bit i: whether `x` of lane i is not 0.
MKVQ_DEVICE uint32_t ballot(uint32_t mask, int x)
{
    return __ballot_sync(mask, x);
}
// Whether x is not 0 in any thread of the block; a sync_block.
MKVQ_DEVICE int any_in_block(int x)
{
    return __syncthreads_or(x);
}
// Adds to device memory, and orders what this thread and, after a sync_block, its block has written
// before it and what others read after theirs.
MKVQ_DEVICE uint32_t add_ordered(uint32_t *p, uint32_t x)
{
    __threadfence();
    const uint32_t old = atomicAdd(p, x);
    __threadfence();
    return old;
}
MKVQ_DEVICE void add_shared(uint32_t *p, uint32_t x)
{
    atomicAdd(p, x);
}
MKVQ_DEVICE void max_shared(uint32_t *p, uint32_t x)
{
    atomicMax(p, x);
}

// ---- matrix products -----------------------------------------------------------------------------
// d += a b, a [16, 16] float16 by rows, b [16, 8] float16 by columns, d [16, 8] float32. Lane 4g + j
// has a[g][2j, 2j + 1], a[g + 8][...], a[g][2j + 8, 2j + 9], a[g + 8][...], b[2j, 2j + 1][g],
// b[2j + 8, 2j + 9][g], and d[g][2j, 2j + 1], d[g + 8][...].
MKVQ_DEVICE void multiply_f16(float d[4], const uint32_t a[4], const uint32_t b[2])
{
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, "
                 "{%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
                 : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

// ---- numbers -------------------------------------------------------------------------------------
// The largest x of the lanes.
MKVQ_DEVICE uint32_t largest_of(uint32_t mask, uint32_t x)
{
    return __reduce_max_sync(mask, x);
}
MKVQ_DEVICE int count_bits(uint32_t x)
{
    return __popc(x);
}
// x, of which the compiler knows nothing more: what follows from it is not kept in registers from one
// turn of a loop to the next.
MKVQ_DEVICE int forgotten(int x)
{
    asm volatile("" : "+r"(x));
    return x;
}
// Two float16 differences.
MKVQ_DEVICE uint32_t subtract_f16(uint32_t a, uint32_t b)
{
    uint32_t x;
    asm("sub.rn.f16x2 %0, %1, %2;" : "=r"(x) : "r"(a), "r"(b));
    return x;
}
// Two floats, rounded to float16, the first in the lower half; and back.
MKVQ_DEVICE uint32_t pack_f16(float low, float high)
{
    uint32_t x;
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(x) : "f"(high), "f"(low));
    return x;
}
MKVQ_DEVICE float f16_float(uint16_t half)
{
    float x;
    asm("cvt.f32.f16 %0, %1;" : "=f"(x) : "h"(half));
    return x;
}
// 2^x, relative error below 2^-22; 0 for -inf.
MKVQ_DEVICE float exp2_float(float x)
{
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

// ---- copies to shared memory that go on meanwhile ------------------------------------------------
// 16 bytes, both addresses multiples of 16. They are there after wait_copies<n>, which waits for all
// but the last n groups of this thread; what other threads copied, after a sync_block that follows.
MKVQ_DEVICE void copy_async(void *shared, const void *global)
{
    const uint32_t to = (uint32_t)__cvta_generic_to_shared(shared);
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(to), "l"(global) : "memory");
}
MKVQ_DEVICE void end_copy_group()
{
    asm volatile("cp.async.commit_group;" ::: "memory");
}
template <int n> MKVQ_DEVICE void wait_copies()
{
    asm volatile("cp.async.wait_group %0;" ::"n"(n) : "memory");
}

// ---- launching -----------------------------------------------------------------------------------
// Multiprocessors of the current device; 1 without a device.
static inline int processors()
{
    int device = 0, n = 0;
    if (cudaGetDevice(&device) != cudaSuccess ||
        cudaDeviceGetAttribute(&n, cudaDevAttrMultiProcessorCount, device) != cudaSuccess)
        return 1;
    return n;
}

template <typename Job>
static mkvq_status launch(void (*kernel)(Job), grid_size grid, int threads, int shared_bytes,
                          void *stream, const Job &job, mkvq_error *error)
{
    if (!is_launchable(grid, threads, shared_bytes, error))
        return MKVQ_E_SHAPE;
    const void *function = reinterpret_cast<const void *>(kernel);
    void *arguments[] = {const_cast<Job *>(&job)};
    cudaError_t rc = cudaSuccess;
    if (shared_bytes > 48 * 1024) // the same limit always: other threads launch the kernel, too
        rc = cudaFuncSetAttribute(function, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                  MOST_SHARED);
    if (rc == cudaSuccess)
        rc = cudaLaunchKernel(function, dim3((unsigned)grid.x, (unsigned)grid.y, (unsigned)grid.z),
                              dim3((unsigned)threads), arguments, (size_t)shared_bytes,
                              static_cast<cudaStream_t>(stream));
    if (rc == cudaSuccess)
        return MKVQ_OK;
    if (error)
        *error = {"CUDA error",
                  rc == cudaErrorNoKernelImageForDevice
                      ? "mixkvq._cuda has no code for this GPU (mixkvq info tells for which): "
                        "build it with MIXKVQ_CUDA_ARCHS"
                      : cudaGetErrorString(rc),
                  (int64_t)rc};
    return MKVQ_E_DEVICE;
}
#endif
#endif
