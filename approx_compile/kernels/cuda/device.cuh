// Device functions that CUDA C++ does not have without headers (NVRTC finds no cuda_fp16.h): conversion of elements, asynchronous copies, tensor cores.
// ELEMENT: 0 fp32, 1 fp16, 2 bf16. The tests have a second version of this file, with which a block runs on the CPU.
#pragma once

#if ELEMENT == 0
typedef float Element;
#else
typedef unsigned short Element;
#endif

__device__ __forceinline__ float widened(Element e) {
#if ELEMENT == 0
    return e;
#elif ELEMENT == 1
    float f;
    asm("cvt.f32.f16 %0, %1;" : "=f"(f) : "h"(e));
    return f;
#else
    return __uint_as_float((unsigned)e << 16);
#endif
}

__device__ __forceinline__ Element rounded(float f) {
#if ELEMENT == 0
    return f;
#else
    Element e;
#if ELEMENT == 1
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(e) : "f"(f));
#else
    asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(e) : "f"(f));
#endif
    return e;
#endif
}

__device__ __forceinline__ unsigned bits(float f) { return __float_as_uint(f); }

#if ELEMENT != 0
typedef unsigned Shared;  // an address in shared memory, in bytes

__device__ __forceinline__ Shared shared_at(const void* p) { return (unsigned)__cvta_generic_to_shared(p); }

// Copies 16 bytes from global to shared memory, asynchronously. If `there` is false, nothing is read and zeros are written.
__device__ __forceinline__ void copy_async(Shared to, const void* from, bool there) {
    asm volatile("{ .reg .pred absent; setp.eq.s32 absent, %2, 0; cp.async.cg.shared.global [%0], [%1], 16, absent; }" ::"r"(to),
                 "l"(__cvta_generic_to_global(from)), "r"((int)there) : "memory");
}

// The same, but only `bytes` are read and the others are zeros.
__device__ __forceinline__ void copy_part_async(Shared to, const void* from, int bytes) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(__cvta_generic_to_global(from)), "r"(bytes) : "memory");
}

__device__ __forceinline__ void copies_issued() { asm volatile("cp.async.commit_group;" ::: "memory"); }

// Waits until all but the last PENDING groups of this thread's copies have arrived.
template <int PENDING> __device__ __forceinline__ void copies_arrived() { asm volatile("cp.async.wait_group %0;" ::"n"(PENDING) : "memory"); }

// Loads four 8 x 8 matrices; row r of matrix i lies at the address that lane 8 i + r gives. TRANSPOSED: each matrix is read by columns.
template <bool TRANSPOSED> __device__ __forceinline__ void load_matrices(unsigned (&m)[4], Shared row) {
    if (TRANSPOSED)
        asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                     : "=r"(m[0]), "=r"(m[1]), "=r"(m[2]), "=r"(m[3]) : "r"(row) : "memory");
    else
        asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                     : "=r"(m[0]), "=r"(m[1]), "=r"(m[2]), "=r"(m[3]) : "r"(row) : "memory");
}

#if ELEMENT == 1
#define KIND "f16"
#else
#define KIND "bf16"
#endif
// Computes c += a b in one warp: a is 16 x 16 by rows, b 16 x 8 by columns, c 16 x 8 in fp32.
__device__ __forceinline__ void multiply(float (&c)[4], const unsigned (&a)[4], unsigned b0, unsigned b1) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32." KIND "." KIND ".f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3]) : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}
#undef KIND
#endif
