// subnormals.cu - do tensor cores multiply subnormal float16 operands exactly and at full rate?
//
// The attention kernels put codes where a float16 has its lowest bits: code * 2^-24, a subnormal.
// That costs one AND per pair of codes, if the hardware neither flushes such operands to zero nor
// takes longer for them. This program multiplies known codes and compares every sum with integer
// arithmetic, then times the same products with subnormal and with normal operands, by turns. It
// prints one line of JSON.
#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cuda_runtime_api.h>
#include <vector>

namespace
{
constexpr int kRounds = 21, kWarps = 8, kLoops = 4096, kProducts = 8;

void require(cudaError_t rc, const char *what)
{
    if (rc == cudaSuccess)
        return;
    std::fprintf(stderr, "%s: %s\n", what, cudaGetErrorString(rc));
    std::exit(1);
}

__device__ __forceinline__ void multiply(float d[4], const uint32_t a[4], const uint32_t b[2])
{
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, "
                 "{%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
                 : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

// One warp: d [16, 8] = a [16, 16] b [16, 8], a by rows, b by columns (b[n * 16 + k]), float16 bits.
__global__ void one_product(const uint16_t *a, const uint16_t *b, float *d)
{
    const int lane = (int)threadIdx.x, row = lane / 4, pair = lane % 4 * 2;
    uint32_t x[4], y[2];
    float sum[4] = {0, 0, 0, 0};
    for (int i = 0; i < 4; i++) {
        const uint16_t *p = a + (row + i % 2 * 8) * 16 + pair + i / 2 * 8;
        x[i] = p[0] | (uint32_t)p[1] << 16;
    }
    for (int i = 0; i < 2; i++) {
        const uint16_t *p = b + row * 16 + pair + i * 8;
        y[i] = p[0] | (uint32_t)p[1] << 16;
    }
    multiply(sum, x, y);
    for (int i = 0; i < 4; i++)
        d[(row + i / 2 * 8) * 8 + pair + i % 2] = sum[i];
}

// Every warp: kLoops times kProducts independent products of the same operands.
__global__ void __launch_bounds__(32 * kWarps)
    many_products(uint32_t a_bits, uint32_t b_bits, float *out)
{
    const uint32_t spread = threadIdx.x * 0x00010001u & 0x00070007u;
    const uint32_t a[4] = {a_bits ^ spread, a_bits ^ spread << 1, a_bits ^ spread << 2, a_bits};
    const uint32_t b[2] = {b_bits ^ spread, b_bits};
    float sum[kProducts][4] = {};
    for (int i = 0; i < kLoops; i++)
#pragma unroll
        for (int j = 0; j < kProducts; j++)
            multiply(sum[j], a, b);
    float total = 0;
    for (int j = 0; j < kProducts; j++)
        for (int k = 0; k < 4; k++)
            total += sum[j][k];
    out[blockIdx.x * blockDim.x + threadIdx.x] = total;
}

uint16_t half_of(int n) // a whole number from 1 to 15 as float16
{
    int exponent = 0;
    while (n >> (exponent + 1))
        exponent++;
    return (uint16_t)((exponent + 15) << 10 | (n << (10 - exponent) & 1023));
}

// Sums that differ from integer arithmetic, of 16 x 8.
int wrong_sums()
{
    std::vector<uint16_t> a(256), b(128);
    for (int i = 0; i < 256; i++)
        a[(size_t)i] = (uint16_t)(1 + i * 37 % 1023); // all below the least normal float16
    for (int i = 0; i < 128; i++)
        b[(size_t)i] = half_of(1 + i * 7 % 15);
    uint16_t *x, *y;
    float *z, d[128];
    require(cudaMalloc((void **)&x, 512), "cudaMalloc");
    require(cudaMalloc((void **)&y, 256), "cudaMalloc");
    require(cudaMalloc((void **)&z, 512), "cudaMalloc");
    require(cudaMemcpy(x, a.data(), 512, cudaMemcpyHostToDevice), "cudaMemcpy");
    require(cudaMemcpy(y, b.data(), 256, cudaMemcpyHostToDevice), "cudaMemcpy");
    one_product<<<1, 32>>>(x, y, z);
    require(cudaGetLastError(), "one_product");
    require(cudaMemcpy(d, z, 512, cudaMemcpyDeviceToHost), "cudaMemcpy");
    int wrong = 0;
    for (int m = 0; m < 16; m++)
        for (int n = 0; n < 8; n++) {
            int sum = 0;
            for (int k = 0; k < 16; k++)
                sum += a[(size_t)(m * 16 + k)] * (1 + (n * 16 + k) * 7 % 15);
            wrong += d[m * 8 + n] != (float)sum * 0x1p-24f;
        }
    return wrong;
}

float milliseconds(int blocks, uint32_t a, uint32_t b, float *out, cudaEvent_t begin,
                   cudaEvent_t end)
{
    float taken = 0;
    require(cudaEventRecord(begin), "cudaEventRecord");
    many_products<<<(unsigned)blocks, 32 * kWarps>>>(a, b, out);
    require(cudaGetLastError(), "many_products");
    require(cudaEventRecord(end), "cudaEventRecord");
    require(cudaEventSynchronize(end), "many_products");
    require(cudaEventElapsedTime(&taken, begin, end), "cudaEventElapsedTime");
    return taken;
}

double median(std::vector<float> times)
{
    std::nth_element(times.begin(), times.begin() + (long)times.size() / 2, times.end());
    return times[times.size() / 2];
}
} // namespace

int main()
{
    const int wrong = wrong_sums();
    int processors = 0;
    require(cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, 0),
            "cudaDeviceGetAttribute");
    const int blocks = processors * 4;
    float *out;
    cudaEvent_t begin, end;
    require(cudaMalloc((void **)&out, (size_t)blocks * 32 * kWarps * sizeof(float)), "cudaMalloc");
    require(cudaEventCreate(&begin), "cudaEventCreate");
    require(cudaEventCreate(&end), "cudaEventCreate");
    // the same fraction bits, without and with an exponent (2^0)
    const uint32_t fraction = 0x02550155, exponent = 0x3c003c00, other = 0x2c012c02;
    std::vector<float> subnormal, normal;
    for (int i = -3; i < kRounds; i++) {
        const float s = milliseconds(blocks, fraction, other, out, begin, end);
        const float n = milliseconds(blocks, fraction | exponent, other, out, begin, end);
        if (i >= 0) {
            subnormal.push_back(s);
            normal.push_back(n);
        }
    }
    const double work = 2.0 * 16 * 8 * 16 * kProducts * kLoops * kWarps * blocks;
    const double s = median(subnormal), n = median(normal);
    std::printf(
        "{\"wrong\": %d, \"subnormal_tflops\": %.1f, \"normal_tflops\": %.1f, \"ratio\": %.4f}\n",
        wrong, work / s / 1e9, work / n / 1e9, n / s);
    return wrong != 0;
}
