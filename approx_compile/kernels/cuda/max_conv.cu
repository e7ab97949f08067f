// The weight gradient of a convolution from the J largest entries of every output gradient's channel (Wang and Nelaturu 2019, Algorithm 1):
//     df[o, t, c] = sum over samples n and entries j of value[o, n, j] x[n, pixel(place[o, n, j], tap t), group of o, c]
// Three kernels: `largest` reads dy once and finds places and values, `accumulate` adds up patches of x, `finish` adds up slices of the batch.
// The order of every sum is fixed, so results repeat. The channels of a pixel of x are contiguous, and df is written likewise: (O, kh, kw, C).
// Macros: ELEMENT (device.cuh), J, CHANNELS_FAST (of dy: 1 if channels are contiguous, 0 if places are), VECTOR (channels of x loaded at once).
#include "device.cuh"

typedef unsigned long long Key;

// Makes a key that orders entries: the larger magnitude is larger (all NaN are equal and largest); of equal magnitudes the lower place is. 0 is below all keys.
__device__ __forceinline__ Key key_of(float v, int place) {
    unsigned size = bits(v) & 0x7fffffffu;
    size = size > 0x7f800000u ? 0x7fffffffu : size;
    return (Key)size << 32 | (0xffffffffu - (unsigned)place);
}

__device__ __forceinline__ int place_of(Key k) { return (int)(0xffffffffu - (unsigned)k); }

// Inserts a key into best[0] > best[1] > .., the J largest keys so far.
__device__ __forceinline__ void keep(Key (&best)[J], Key k) {
#pragma unroll
    for (int i = 0; i < J; i++) {
        Key less = k < best[i] ? k : best[i];
        best[i] = k < best[i] ? best[i] : k;
        k = less;
    }
}

#define THREADS 256
#define AT_ONCE 4  // patches whose pixels are loaded at once
#if CHANNELS_FAST
#define LANES 8
#else
#define LANES 32
#endif
#define ROWS (THREADS / LANES)

// A row is one output channel o of one sample n, row n * outputs + o; LANES threads share its places. Its entry at place p is
// dy[n sample_stride + o channel_stride + p place_stride]. value = (own + (S - sum of the J own) / J) scale, where own is the entry itself and S the sum of
// the row. place and value are (outputs, samples, J).
extern "C" __global__ void __launch_bounds__(THREADS)
largest(const Element* __restrict__ dy, int* __restrict__ place, float* __restrict__ value, int samples, int outputs, int places,
        long long sample_stride, long long channel_stride, long long place_stride, float scale) {
    __shared__ Key keys[J][THREADS];
    __shared__ float sums[THREADS];
    int me = threadIdx.x;
    int mine = CHANNELS_FAST ? me % ROWS : me / LANES, lane = CHANNELS_FAST ? me / ROWS : me % LANES;
    int further = CHANNELS_FAST ? ROWS : 1;  // distance in threads from one lane of a row to the next
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

// Block (v, o, s) computes a run of taps x channels of output channel o over the samples of slice s. With one slice the result is written to df, else to
// partial (slices, outputs, taps, inputs). `inputs`: input channels of a group; strides: of x, in elements, over samples, rows, columns; `slice`: samples of
// a slice.
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
        __syncthreads();  // all threads have read the entries of the previous run
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
            Vector pixels[AT_ONCE];  // all loads are issued before the first value is used
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

// Computes df, the sum of the slices, in order.
extern "C" __global__ void __launch_bounds__(THREADS)
finish(const float* __restrict__ partial, Element* __restrict__ df, int slices, long long size) {
    long long i = (long long)blockIdx.x * blockDim.x + threadIdx.x;
    if (i >= size) return;
    float sum = 0;
#pragma unroll 4
    for (int s = 0; s < slices; s++) sum += partial[s * size + i];
    df[i] = rounded(sum);
}
