// The CPU's version of approx_compile/kernels/cuda/device.cuh, and enough of CUDA C++ to run a kernel: the threads of a block are fibers that take
// turns, switching at barriers and where a warp works together. Asynchronous copies happen when they are waited for, not before.
#pragma once
#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <tuple>
#include <utility>
#include <vector>

#define __global__
#define __device__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __shared__ static
using std::max;
using std::min;

#define REQUIRE(what) (what ? (void)0 : (fprintf(stderr, "%s:%d: %s\n", __FILE__, __LINE__, #what), abort()))

struct Three {
    int x, y, z;
};
static Three threadIdx, blockIdx, blockDim, gridDim;

enum State { RUNS, AT_BARRIER, AT_WARP, ENDED };
struct Copy {
    void* to;
    const void* from;
    int bytes;
};
struct Fiber {
    ucontext_t context;
    std::unique_ptr<char[]> stack{new char[1 << 16]};
    State state;
    std::vector<std::vector<Copy>> groups;
    int turn;
};
struct Exchange {
    const void* row[32];
    unsigned a[32][4], b[32][2];
};
static std::vector<Fiber> fibers;
static std::vector<Exchange> exchanges;  // two per warp, taken in turn: nobody writes what a slower lane still reads
static ucontext_t scheduler;
static int current;

static void pause_as(State s) {
    Fiber& me = fibers[current];
    me.state = s;
    swapcontext(&me.context, &scheduler);
}

static void __syncthreads() { pause_as(AT_BARRIER); }

static Exchange& exchange() { return exchanges[current / 32 * 2 + (fibers[current].turn++ & 1)]; }

// Releases every group of threads (the block, a warp) of which all that have not ended wait in the state.
static bool release(int first, int last, State s) {
    bool some = false;
    for (int i = first; i < last; i++) {
        if (fibers[i].state != s && fibers[i].state != ENDED) return false;
        some |= fibers[i].state == s;
    }
    for (int i = first; i < last; i++)
        if (fibers[i].state == s) fibers[i].state = RUNS;
    return some;
}

template <class Call> static void fiber_main() {
    (*Call::now)();
    fibers[current].state = ENDED;
    swapcontext(&fibers[current].context, &scheduler);
}

template <class F> struct Call {
    static inline F* now;
};

static void run_warp(int first, int last, bool backwards) {
    for (int i = first; i < last; i++) {
        current = backwards ? last - 1 - (i - first) : i;
        if (fibers[current].state != RUNS) continue;
        threadIdx = {current, 0, 0};
        swapcontext(&scheduler, &fibers[current].context);
    }
}

// A warp runs as far as it gets, to a barrier, before the next one does: the order in which a missing barrier does most harm.
template <class F> static void run_block(F& body, bool backwards) {
    int threads = blockDim.x;
    fibers.resize(threads);
    exchanges.assign((threads + 31) / 32 * 2, {});
    Call<F>::now = &body;
    for (Fiber& f : fibers) {
        getcontext(&f.context);
        f.context.uc_stack.ss_sp = f.stack.get();
        f.context.uc_stack.ss_size = 1 << 16;
        f.state = RUNS;
        f.groups.assign(1, {});
        f.turn = 0;
        makecontext(&f.context, fiber_main<Call<F>>, 0);
    }
    for (;;) {
        bool over = true;
        for (int n = 0; n < threads; n += 32) {
            int first = backwards ? (threads - 1 - n) / 32 * 32 : n, last = min(first + 32, threads);
            do run_warp(first, last, backwards);
            while (release(first, last, AT_WARP));
        }
        for (Fiber& f : fibers) over &= f.state == ENDED;
        if (over) return;
        REQUIRE(release(0, threads, AT_BARRIER));  // else some threads wait where others never come
    }
}

template <class... P, size_t... I> static void launch(void (*kernel)(P...), void** arguments, bool backwards, std::index_sequence<I...>) {
    auto body = [&] { kernel(*(std::remove_const_t<P>*)arguments[I]...); };
    for (blockIdx.z = 0; blockIdx.z < gridDim.z; blockIdx.z++)
        for (blockIdx.y = 0; blockIdx.y < gridDim.y; blockIdx.y++)
            for (blockIdx.x = 0; blockIdx.x < gridDim.x; blockIdx.x++) run_block(body, backwards);
}

template <class... P> static void launch(void (*kernel)(P...), void** arguments, const int* grid, int threads, bool backwards) {
    gridDim = {grid[0], grid[1], grid[2]};
    blockDim = {threads, 1, 1};
    launch(kernel, arguments, backwards, std::index_sequence_for<P...>{});
}

#define EXPORT(kernel) \
    extern "C" void run_##kernel(void** arguments, const int* grid, int threads, int backwards) { launch(kernel, arguments, grid, threads, backwards); }

// Elements

#if ELEMENT == 0
typedef float Element;
#else
typedef unsigned short Element;
#endif

static unsigned bits(float f) {
    unsigned u;
    memcpy(&u, &f, 4);
    return u;
}

static float widened(Element e) {
#if ELEMENT == 0
    return e;
#elif ELEMENT == 1
    _Float16 h;
    memcpy(&h, &e, 2);
    return (float)h;
#else
    unsigned u = (unsigned)e << 16;
    float f;
    memcpy(&f, &u, 4);
    return f;
#endif
}

static Element rounded(float f) {
#if ELEMENT == 0
    return f;
#elif ELEMENT == 1
    _Float16 h = (_Float16)f;
    Element e;
    memcpy(&e, &h, 2);
    return e;
#else
    unsigned u = bits(f);
    return f != f ? 0x7fff : (Element)((u + 0x7fff + ((u >> 16) & 1)) >> 16);
#endif
}

#if ELEMENT != 0
typedef char* Shared;

static Shared shared_at(void* p) { return (char*)p; }

static void copy_part_async(Shared to, const void* from, int bytes) {
    REQUIRE((uintptr_t)to % 16 == 0);
    REQUIRE(bytes >= 0 && bytes <= 16);
    REQUIRE((uintptr_t)from % 16 == 0 || bytes == 0);
    fibers[current].groups.back().push_back({to, from, bytes});
}

static void copy_async(Shared to, const void* from, bool there) { copy_part_async(to, from, there ? 16 : 0); }

static void copies_issued() { fibers[current].groups.emplace_back(); }

template <int PENDING> static void copies_arrived() {
    auto& groups = fibers[current].groups;  // the last one is not issued yet
    int done = max(0, (int)groups.size() - 1 - PENDING);
    for (int g = 0; g < done; g++)
        for (const Copy& c : groups[g]) {
            memset(c.to, 0, 16);
            memcpy(c.to, c.from, c.bytes);
        }
    groups.erase(groups.begin(), groups.begin() + done);
}

template <bool TRANSPOSED> static void load_matrices(unsigned (&m)[4], Shared row) {
    REQUIRE((uintptr_t)row % 16 == 0);
    int lane = current % 32;
    Exchange& shared = exchange();
    shared.row[lane] = row;
    pause_as(AT_WARP);
    for (int i = 0; i < 4; i++) {
        unsigned short pair[2];
        for (int e = 0; e < 2; e++) {
            int outer = lane / 4, inner = lane % 4 * 2 + e;
            pair[e] = ((const unsigned short*)shared.row[8 * i + (TRANSPOSED ? inner : outer)])[TRANSPOSED ? outer : inner];
        }
        memcpy(&m[i], pair, 4);
    }
}

static float half_of(unsigned pair, int which) { return widened((Element)(pair >> 16 * which)); }

static void multiply(float (&c)[4], const unsigned (&a)[4], unsigned b0, unsigned b1) {
    int lane = current % 32;
    Exchange& shared = exchange();
    memcpy(shared.a[lane], a, 16);
    shared.b[lane][0] = b0;
    shared.b[lane][1] = b1;
    pause_as(AT_WARP);
    for (int e = 0; e < 4; e++) {
        int row = lane / 4 + e / 2 * 8, column = lane % 4 * 2 + e % 2;
        for (int k = 0; k < 16; k++) {
            float x = half_of(shared.a[row % 8 * 4 + k % 8 / 2][row / 8 + k / 8 * 2], k % 2);
            c[e] += x * half_of(shared.b[column * 4 + k % 8 / 2][k / 8], k % 2);
        }
    }
}
#endif
