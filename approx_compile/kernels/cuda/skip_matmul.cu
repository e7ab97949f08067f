// Products of matrices of which only chosen units of 16 (or a multiple of 16) contiguous entries take part. The loop steps over the chosen units only; it uses
// tensor cores (mma.sync) and operands that are copied asynchronously through STAGES buffers.
// m: rows, n: columns, k: contraction; A (m, k), B (k, n), Y (m, n).
//     INTO 0: Y = A[:, idx] diag(scale) B[idx, :] + bias
//     INTO 1: Y[:, idx] = (A B[:, idx]) scale, zeros elsewhere    INTO 2: Y[idx, :] = scale (A[idx, :] B), zeros elsewhere
// A block computes a tile of kept rows and columns and writes the zeros before its kept units (the last block also those after), so that every entry of Y is
// written once. scale multiplies fp32 sums: those of a unit's products (INTO 0), or those of the result (INTO 1, 2).
// Macros: ELEMENT (1, 2), UNIT, INTO, SCALED (INTO 0), A_K and B_K (1 where k is the operand's contiguous axis), TILE_M, TILE_N, WARPS_M, WARPS_N, STAGES,
// BLOCKS (that a multiprocessor should hold at once, which bounds the registers), RAGGED (1 if 8 does not divide the length of a contiguous axis).
#include "device.cuh"

#define STEP 32  // entries of k that a step reads: two halves of 16, the depth of a tensor core instruction
#define THREADS (32 * WARPS_M * WARPS_N)
#define FRAGMENTS_M (TILE_M / WARPS_M / 16)
#define PAIRS_N (TILE_N / WARPS_N / 16)
#define STAGE ((TILE_M + TILE_N) * STEP * (int)sizeof(Element))  // bytes of a buffer
#define BUFFERS (STAGES * (TILE_M + TILE_N) * STEP)
#define MEMORY (BUFFERS > TILE_M * TILE_N ? BUFFERS : TILE_M * TILE_N)  // elements
#define BAND 8  // rows of tiles that are computed together, so that they find the tiles of columns in the cache

// Returns where chunk `chunk` (8 elements) of row `row` lies in a tile whose rows have WIDTH elements; equal chunks of 8 rows lie in 8 different banks of 16
// bytes.
template <int WIDTH> __device__ __forceinline__ int swizzled(int row, int chunk) {
    int turn = WIDTH % 64 == 0 ? row & 7 : WIDTH % 32 == 0 ? (row >> 1) & 3 : (row >> 2) & 1;
    return row * WIDTH + (chunk ^ turn) * 8;
}

// Returns the position on the whole axis of position p on the kept axis.
template <bool KEPT> __device__ __forceinline__ int whole(const long long* idx, int p) {
    return KEPT ? (int)idx[(unsigned)p / UNIT] * UNIT + (unsigned)p % UNIT : p;
}

// Where the two halves of a step begin on the whole contraction axis. A half from k on may have any number, since nothing of it is read.
struct Starts {
    int first, second;
};

__device__ __forceinline__ Starts starts_of(int position, const long long* idx, int k) {
    if (INTO != 0) return {position, position + 16};
    return {position < k ? whole<true>(idx, position) : 0, position + 16 < k ? whole<true>(idx, position + 16) : 0};
}

// Copies tiles of an operand, OUTER of its rows (or columns) by STEP of k, to shared memory: as OUTER rows of STEP elements if k is contiguous, else as STEP
// rows of OUTER elements.
template <int OUTER, bool K_FAST, bool KEPT> struct Copier {
    static constexpr int CHUNKS = OUTER * STEP / 8, EACH = (CHUNKS + THREADS - 1) / THREADS, PER_ROW = (K_FAST ? STEP : OUTER) / 8;
    const Element* operand;
    int stride, length;  // length: of the contraction axis
    int at[EACH];        // offsets of this thread's chunks at k = 0; a chunk outside the operand reads the first one inside, and its result is not stored
    int wide[EACH];      // entries that a chunk has along the outer axis (RAGGED), 0..8

    __device__ __forceinline__ Copier(const Element* operand, int stride, const long long* idx, int first, int outers, int length)
        : operand(operand), stride(stride), length(length) {
#pragma unroll
        for (int i = 0; i < EACH; i++) {
            int c = threadIdx.x + i * THREADS, outer = first + (K_FAST ? c / PER_ROW : c % PER_ROW * 8);
            wide[i] = max(0, min(8, outers - outer));
            at[i] = (wide[i] ? whole<KEPT>(idx, outer) : 0) * (K_FAST ? stride : 1);
        }
    }

    __device__ __forceinline__ void copy(Shared tile, int position, Starts starts) const {
#pragma unroll
        for (int i = 0; i < EACH; i++) {
            int c = threadIdx.x + i * THREADS, row = c / PER_ROW, chunk = c % PER_ROW;
            if (CHUNKS % THREADS && c >= CHUNKS) break;
            int k = K_FAST ? chunk * 8 : row;
            int from = at[i] + ((k / 16 ? starts.second : starts.first) + k % 16) * (K_FAST ? 1 : stride);
            Shared to = tile + swizzled<PER_ROW * 8>(row, chunk) * (int)sizeof(Element);
            if (RAGGED) {
                int count = K_FAST ? max(0, min(8, length - position - k)) : position + k < length ? wide[i] : 0;
                copy_part_async(to, operand + (count ? from : 0), count * (int)sizeof(Element));
            } else {
                copy_async(to, operand + from, position + k < length);
            }
        }
    }
};

// Loads the 16 x 16 entries of a tile from `outer` on in half `half` of k. Matrices 0..3 lie at (outer + 8, k + 8) times (0, 0), (1, 0), (0, 1), (1, 1) with
// OUTER_FIRST, else (0, 0), (0, 1), (1, 0), (1, 1).
template <int OUTER, bool K_FAST, bool OUTER_FIRST> __device__ __forceinline__ void load_fragment(unsigned (&m)[4], Shared tile, int outer, int half) {
    int lane = threadIdx.x % 32, matrix = lane / 8, r = lane % 8;
    int outer_block = OUTER_FIRST ? matrix & 1 : matrix >> 1, k_block = OUTER_FIRST ? matrix >> 1 : matrix & 1;
    int row = K_FAST ? outer + outer_block * 8 + r : half * 16 + k_block * 8 + r;
    int chunk = K_FAST ? half * 2 + k_block : outer / 8 + outer_block;
    load_matrices<!K_FAST>(m, tile + swizzled<K_FAST ? STEP : OUTER>(row, chunk) * (int)sizeof(Element));
}

struct alignas(16) Chunk {
    Element e[8];
};

__device__ __forceinline__ void store_chunk(Element* y, const Chunk& c, int n, int row, int column) {
    Element* to = y + (long long)row * n + column;
    if (n % 8 == 0) {
        *(Chunk*)to = c;
    } else {
#pragma unroll
        for (int i = 0; i < 8; i++)
            if (column + i < n) to[i] = c.e[i];
    }
}

// Writes zeros to rows [top, bottom), columns [left, right). left is a multiple of 8, and right too unless it is n.
__device__ __forceinline__ void clear(Element* y, int n, int top, int bottom, int left, int right) {
    int across = (right - left + 7) / 8;
    if (across <= 0) return;
    for (int c = threadIdx.x; c < (bottom - top) * across; c += THREADS) store_chunk(y, Chunk{}, n, top + c / across, left + c % across * 8);
}

// Writes the zeros that belong to a tile of kept units: those before each unit that begins in kept positions [first, first + tile), and after the
// last unit.
__device__ __forceinline__ void clear_gaps(Element* y, const long long* idx, int count, int m, int n, int first_row, int first_column) {
    int first = INTO == 1 ? first_column : first_row, end = first + (INTO == 1 ? TILE_N : TILE_M);
    for (int u = (first + UNIT - 1) / UNIT; u <= count && (u == count ? end >= count * UNIT : u * UNIT < end); u++) {
        int before = u ? (int)idx[u - 1] * UNIT + UNIT : 0;
        int after = u < count ? (int)idx[u] * UNIT : (INTO == 1 ? n : m);
        if (INTO == 1)
            clear(y, n, first_row, min(first_row + TILE_M, m), before, after);
        else
            clear(y, n, before, after, first_column, min(first_column + TILE_N, n));
    }
}

typedef float Sums[FRAGMENTS_M][2 * PAIRS_N][4];

__device__ __forceinline__ void multiply_step(Sums& sums, Shared a_tile, Shared b_tile, int warp_row, int warp_column, const float* scale, int position, int k) {
    // With both halves at once, too many products would wait for their scale, and registers would be spilled.
    constexpr int at_once = SCALED ? 1 : 2;
#pragma unroll at_once
    for (int half = 0; half < 2; half++) {
        unsigned a[FRAGMENTS_M][4];
#pragma unroll
        for (int i = 0; i < FRAGMENTS_M; i++) load_fragment<TILE_M, A_K, true>(a[i], a_tile, warp_row + i * 16, half);
        float factor = SCALED && position + half * 16 < k ? scale[(position + half * 16) / UNIT] : 0;
#pragma unroll
        for (int j = 0; j < PAIRS_N; j++) {
            unsigned b[4];
            load_fragment<TILE_N, B_K, false>(b, b_tile, warp_column + j * 16, half);
#pragma unroll
            for (int i = 0; i < FRAGMENTS_M; i++) {
#pragma unroll
                for (int side = 0; side < 2; side++) {
                    float(&sum)[4] = sums[i][2 * j + side];
                    if (SCALED) {
                        float product[4] = {0, 0, 0, 0};
                        multiply(product, a[i], b[2 * side], b[2 * side + 1]);
#pragma unroll
                        for (int e = 0; e < 4; e++) sum[e] += factor * product[e];
                    } else {
                        multiply(sum, a[i], b[2 * side], b[2 * side + 1]);
                    }
                }
            }
        }
    }
}

// Writes the sums to shared memory in the operands' type, with bias or scale. An entry lies in row warp_row + 16 i + lane / 4 (+ 8), column warp_column + 8 j + 2 (lane % 4) (+ 1).
__device__ __forceinline__ void stage_result(Element* tile, const Sums& sums, int warp_row, int warp_column, int row0, int column0, int rows, int columns,
                                             const float* scale, const Element* bias) {
    int lane = threadIdx.x % 32;
#pragma unroll
    for (int i = 0; i < FRAGMENTS_M; i++) {
#pragma unroll
        for (int j = 0; j < 2 * PAIRS_N; j++) {
#pragma unroll
            for (int e = 0; e < 4; e++) {
                int row = warp_row + i * 16 + lane / 4 + e / 2 * 8, column = warp_column + j * 8 + lane % 4 * 2 + e % 2;
                float v = sums[i][j][e];
                if (INTO == 0 && bias && column0 + column < columns) v += widened(bias[column0 + column]);
                if (INTO == 1 && scale && column0 + column < columns) v *= scale[(column0 + column) / UNIT];
                if (INTO == 2 && scale && row0 + row < rows) v *= scale[(row0 + row) / UNIT];
                tile[swizzled<TILE_N>(row, column / 8) + column % 8] = rounded(v);
            }
        }
    }
}

// m, n: rows and columns of Y; k: kept length of the contraction axis. a_stride and b_stride are in elements and multiples of 8; addresses are multiples of 16
// bytes.
extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS)
skip_matmul(const Element* __restrict__ a, const Element* __restrict__ b, const long long* __restrict__ idx, const float* __restrict__ scale,
            const Element* __restrict__ bias, Element* __restrict__ y, int m, int n, int k, int count, int a_stride, int b_stride) {
    alignas(16) __shared__ Element memory[MEMORY];
    int rows = INTO == 2 ? count * UNIT : m, columns = INTO == 1 ? count * UNIT : n;  // rows and columns that are computed
    int tiles_m = (rows + TILE_M - 1) / TILE_M, tiles_n = (columns + TILE_N - 1) / TILE_N;
    int band = blockIdx.x / (BAND * tiles_n) * BAND, high = min(BAND, tiles_m - band), rest = blockIdx.x % (BAND * tiles_n);
    int row0 = (band + rest % high) * TILE_M, column0 = rest / high * TILE_N;
    int warp = threadIdx.x / 32, warp_row = warp % WARPS_M * FRAGMENTS_M * 16, warp_column = warp / WARPS_M * PAIRS_N * 16;

    Copier<TILE_M, A_K, INTO == 2> a_copier(a, a_stride, idx, row0, rows, k);
    Copier<TILE_N, B_K, INTO == 1> b_copier(b, b_stride, idx, column0, columns, k);
    Sums sums = {};
    Shared buffers = shared_at(memory), reading = buffers, filling = buffers;
    for (int s = 0; s < STAGES - 1; s++) {
        Starts starts = starts_of(s * STEP, idx, k);
        a_copier.copy(filling, s * STEP, starts);
        b_copier.copy(filling + TILE_M * STEP * (int)sizeof(Element), s * STEP, starts);
        copies_issued();
        filling += STAGE;
    }
    constexpr int AHEAD = (STAGES - 1) * STEP;
    Starts ahead = starts_of(AHEAD, idx, k);  // an index is read one step before its copies are issued
    for (int position = 0; position < k; position += STEP) {
        copies_arrived<STAGES - 2>();
        __syncthreads();  // this also makes sure that all threads have read the buffer that is filled next
        a_copier.copy(filling, position + AHEAD, ahead);
        b_copier.copy(filling + TILE_M * STEP * (int)sizeof(Element), position + AHEAD, ahead);
        copies_issued();
        ahead = starts_of(position + AHEAD + STEP, idx, k);
        multiply_step(sums, reading, reading + TILE_M * STEP * (int)sizeof(Element), warp_row, warp_column, scale, position, k);
        reading = reading == buffers + (STAGES - 1) * STAGE ? buffers : reading + STAGE;
        filling = filling == buffers + (STAGES - 1) * STAGE ? buffers : filling + STAGE;
    }
    copies_arrived<0>();
    __syncthreads();
    stage_result(memory, sums, warp_row, warp_column, row0, column0, rows, columns, scale, bias);
    if (INTO) clear_gaps(y, idx, count, m, n, row0, column0);
    __syncthreads();
    for (int c = threadIdx.x; c < TILE_M * TILE_N / 8; c += THREADS) {
        int row = c / (TILE_N / 8), chunk = c % (TILE_N / 8);
        if (row0 + row < rows && column0 + chunk * 8 < columns)
            store_chunk(y, *(const Chunk*)(memory + swizzled<TILE_N>(row, chunk)), n, whole<INTO == 2>(idx, row0 + row), whole<INTO == 1>(idx, column0 + chunk * 8));
    }
}
