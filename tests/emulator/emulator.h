// Runs CUDA kernels on the CPU, to test them: the threads of a block are fibers, blocks run one after the other.
//
// A fiber runs until a barrier or a warp-wide instruction. The next fiber and the order of the blocks are drawn at
// random from a seed. Shared memory starts as NaN in every block. So, in some order, a missing barrier gives a wrong
// number.
// Libraries that run such kernels on a CPU (HIP-CPU, hipCPU, chipStar) support HIP only, and run threads in one order.
//
// Not modelled: races on global memory (one thread runs at a time), time, concurrent blocks, warp-wide instructions in
// which only some threads take part.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>

struct dim3 {
  unsigned x, y, z;
  dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

namespace sk_emulator {

struct Index {
  unsigned x = 0, y = 0, z = 0;
};
struct Thread {
  Index thread, block;
  dim3 threads, blocks;
  unsigned char* shared = nullptr;
};
// The running thread.
extern Thread here;

// The number of SMs that the emulated device reports.
extern int processors;

// Runs `body` once for every thread of the grid. Throws if threads deadlock or wait at different barriers.
void run(dim3 grid, unsigned threads, size_t shared, const std::function<void()>& body);

// Waits for all threads of the block that have not ended. File and line name the barrier (see `sk_emulator_skip`).
void sync_threads(const char* file, int line);

// Waits for the 32 threads of the warp; the last one calls `finish` with everyone's `mine`, in lane order.
using Finish = void (*)(void* const* lanes);
void warp_meet(Finish finish, void* mine, const char* what);

}  // namespace sk_emulator
