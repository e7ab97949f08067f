// The weight gradient of a convolution from the J largest entries of every output gradient's channel (Wang and Nelaturu 2019, Algorithm 1):
//     df[o, t, c] = sum over samples n and entries j of value[o, n, j] x[n, pixel(place[o, n, j], tap t), group of o, c]
// in three kernels: `largest` reads dy once and finds places and values, `accumulate` adds up patches of x, `finish` adds up slices of the batch.
// Every sum has one order, whatever the device does. x has a pixel's channels side by side; df is written so: (O, kh, kw, C).
// Macros: ELEMENT (device.cuh), J, CHANNELS_FAST (of dy: 1 if channels are contiguous, 0 if places are), VECTOR (channels of x loaded at once).
#include "device.cuh"

typedef unsigned long long Key;

// Orders entries: the larger magnitude first (NaN largest, all alike), of equal ones the lower place. 0 is less than every key.
__device__ __forceinline__ Key key_of(float v, int place) {
    unsigned size = bits(v) & 0x7fffffffu;
    size = size > 0x7f800000u ? 0x7fffffffu : size;
    return (Key)size << 32 | (0xffffffffu - (unsigned)place);
}

__device__ __forceinline__ int place_of(Key k) { return (int)(0xffffffffu - (unsigned)k); }

// best[0] > best[1] > ..: the J largest keys so far and one more.
__device__ __forceinline__ void keep(Key (&best)[J], Key k) {
#pragma unroll
    for (int i = 0; i < J; i++) {
        Key less = k < best[i] ? k : best[i];
        best[i] = k < best[i] ? best[i] : k;
        k = less;
    }
}

#define THREADS 256
#define AT_ONCE 4  // patches whose pixels are on their way at once
#if CHANNELS_FAST
#define LANES 8
#else
#define LANES 32
#endif
#define ROWS (THREADS / LANES)

// One row = one output channel of one sample, n * outputs + o; LANES threads share its places. dy[n sample_stride + o channel_stride + p place_stride].
// value = (own + (S - sum of the J own) / J) scale, S the row's sum; place and value are (outputs, samples, J).
extern "C" __global__ void __launch_bounds__(THREADS)
largest(const Element* __restrict__ dy, int* __restrict__ place, float* __restrict__ value, int samples, int outputs, int places,
        long long sample_stride, long long channel_stride, long long place_stride, float scale) {
    __shared__ Key keys[J][THREADS];
    __shared__ float sums[THREADS];
    int me = threadIdx.x;
    int mine = CHANNELS_FAST ? me % ROWS : me / LANES, lane = CHANNELS_FAST ? me / ROWS : me % LANES;
    int further = CHANNELS_FAST ? ROWS : 1;  // threads from one lane of a row to the next
    long long row = (long long)blockIdx.x * ROWS + mine;
    bool real = row < (long long)samples * outputs;
    long long n = row / outputs, o = row % outputs;
    const Element* from = dy + n * sample_stride + o * channel_stride;

    Key best[J];
#pragma unroll
    for (int i = 0; i < J; i++) best[i] = 0;
    float sum = 0;
    if (real) {
#pragma unroll 4
        for (int p = lane; p < places; p += LANES) {
            float v = widened(from[p * place_stride]);
            sum += v;
            keep(best, key_of(v, p));
        }
    }
    for (int half = LANES / 2; half > 0; half /= 2) {
#pragma unroll
        for (int i = 0; i < J; i++) keys[i][me] = best[i];
        sums[me] = sum;
        __syncthreads();
        if (lane < half) {
            int other = me + half * further;
            sum += sums[other];
#pragma unroll
            for (int i = 0; i < J; i++) keep(best, keys[i][other]);
        }
        __syncthreads();
    }
    if (!real || lane != 0) return;
    long long to = (o * samples + n) * J;
    float own[J], rest = sum;
#pragma unroll
    for (int i = 0; i < J; i++) {
        own[i] = J > 1 ? widened(from[place_of(best[i]) * place_stride]) : sum;
        rest -= own[i];
    }
    rest = J > 1 ? rest / J : 0;
#pragma unroll
    for (int i = 0; i < J; i++) {
        place[to + i] = place_of(best[i]);
        value[to + i] = (own[i] + rest) * scale;
    }
}

struct alignas(sizeof(Element) * VECTOR) Vector {
    Element e[VECTOR];
};
struct alignas(VECTOR > 1 ? 16 : 4) Sums {
    float f[VECTOR];
};

// Block (v, o, s): a run of taps x channels of output channel o, the samples of slice s. With one slice the result goes to df, else to
// partial (slices, outputs, taps, inputs). `inputs` are those of a group; strides in elements of x's samples, rows, columns; slice = samples in one.
extern "C" __global__ void __launch_bounds__(THREADS, 4)
accumulate(const Element* __restrict__ x, const int* __restrict__ place, const float* __restrict__ value, Element* __restrict__ df,
           float* __restrict__ partial, int samples, int slice, int inputs, int outputs_per_group, int height, int width, int out_width, int taps, int kernel_width,
           int stride_h, int stride_w, int padding_h, int padding_w, int dilation_h, int dilation_w,
           long long sample_stride, long long row_stride, long long column_stride) {
    __shared__ int top[THREADS], left[THREADS];
    __shared__ float weight[THREADS];
    __shared__ long long sample_at[THREADS];
    int vectors = inputs / VECTOR, v = blockIdx.x * blockDim.x + threadIdx.x, o = blockIdx.y;
    bool real = v < taps * vectors;
    int tap = v / vectors, channel = v % vectors * VECTOR;
    int down = tap / kernel_width * dilation_h, right = tap % kernel_width * dilation_w;
    const Element* from = x + (long long)(o / outputs_per_group) * inputs + channel;

    float sum[VECTOR];
#pragma unroll
    for (int i = 0; i < VECTOR; i++) sum[i] = 0;
    int first = blockIdx.z * slice * J, last = min(first + slice * J, samples * J);
    for (int start = first; start < last; start += blockDim.x) {
        int e = start + threadIdx.x;
        __syncthreads();  // the entries of the run before have been read
        if (e < last) {
            long long at = (long long)o * samples * J + e;
            int p = place[at];
            top[threadIdx.x] = p / out_width * stride_h - padding_h;
            left[threadIdx.x] = p % out_width * stride_w - padding_w;
            weight[threadIdx.x] = value[at];
            sample_at[threadIdx.x] = (e / J) * sample_stride;
        }
        __syncthreads();
        int here = min((int)blockDim.x, last - start);
        if (!real) continue;
        for (int i = 0; i < here; i += AT_ONCE) {
            Vector pixels[AT_ONCE];  // all asked for before the first is used
            float weights[AT_ONCE];
#pragma unroll
            for (int u = 0; u < AT_ONCE; u++) {
                int e = i + u < here ? i + u : i, row = top[e] + down, column = left[e] + right;
                bool inside = i + u < here && (unsigned)row < (unsigned)height && (unsigned)column < (unsigned)width;
                const Element* at = from + sample_at[e] + row * row_stride + column * column_stride;
                weights[u] = inside ? weight[e] : 0;
                pixels[u] = inside ? *(const Vector*)at : Vector{};
            }
#pragma unroll
            for (int u = 0; u < AT_ONCE; u++)
#pragma unroll
                for (int c = 0; c < VECTOR; c++) sum[c] += weights[u] * widened(pixels[u].e[c]);
        }
    }
    if (!real) return;
    long long to = (long long)o * taps * inputs + (long long)v * VECTOR;
    if (gridDim.z == 1) {
        Vector y;
#pragma unroll
        for (int c = 0; c < VECTOR; c++) y.e[c] = rounded(sum[c]);
        *(Vector*)(df + to) = y;
    } else {
        Sums y;
#pragma unroll
        for (int c = 0; c < VECTOR; c++) y.f[c] = sum[c];
        *(Sums*)(partial + blockIdx.z * ((long long)gridDim.y * taps * inputs) + to) = y;
    }
}

// df = the sum of the slices, in their order.
extern "C" __global__ void __launch_bounds__(THREADS)
finish(const float* __restrict__ partial, Element* __restrict__ df, int slices, long long size) {
    long long i = (long long)blockIdx.x * blockDim.x + threadIdx.x;
    if (i >= size) return;
    float sum = 0;
#pragma unroll 4
    for (int s = 0; s < slices; s++) sum += partial[s * size + i];
    df[i] = rounded(sum);
}
