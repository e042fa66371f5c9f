// planted.cu - one mistake of every kind that compute-sanitizer looks for, to see whether it can
// find anything on this machine: planted memcheck | racecheck | initcheck | synccheck.
#include <cstdio>
#include <cstring>
#include <cuda_runtime_api.h>

namespace
{
__global__ void write_behind_the_end(int *x, int n)
{
    x[n + threadIdx.x] = 1;
}

__global__ void read_what_others_write(int *x)
{
    __shared__ int shared[64];
    shared[threadIdx.x] = (int)threadIdx.x; // no barrier, and the neighbour is in another warp
    x[threadIdx.x] = shared[(threadIdx.x + 32) % 64];
}

__global__ void read_what_nobody_wrote(int *x, const int *y)
{
    x[threadIdx.x] = y[threadIdx.x] + 1;
}

__global__ void wait_with_a_part_of_the_block(int *x)
{
    if (threadIdx.x < 16)
        __syncthreads();
    x[threadIdx.x] = 1;
}

__global__ void meet_lanes_that_do_not_know(int *x)
{
    __syncwarp(0x0000ffffu); // the other lanes are not in it
    x[threadIdx.x] = 1;
}
} // namespace

int main(int count, char **arguments)
{
    const char *kind = count > 1 ? arguments[1] : "";
    int *x, *y;
    if (cudaMalloc((void **)&x, 256) != cudaSuccess ||
        cudaMalloc((void **)&y, 256) != cudaSuccess) {
        std::fprintf(stderr, "no device: %s\n", cudaGetErrorString(cudaGetLastError()));
        return 1;
    }
    if (!std::strcmp(kind, "memcheck"))
        write_behind_the_end<<<1, 32>>>(x, 64);
    else if (!std::strcmp(kind, "racecheck"))
        read_what_others_write<<<1, 64>>>(x);
    else if (!std::strcmp(kind, "initcheck"))
        read_what_nobody_wrote<<<1, 64>>>(x, y);
    else {
        wait_with_a_part_of_the_block<<<1, 64>>>(x);
        meet_lanes_that_do_not_know<<<1, 32>>>(x);
    }
    const cudaError_t rc = cudaDeviceSynchronize();
    std::printf("%s: %s\n", kind, cudaGetErrorString(rc));
    return 0;
}
