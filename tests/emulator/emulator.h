// Runs CUDA kernels on the CPU, to test them: the threads of a block are fibers, blocks run one after the other.
//
// A fiber runs until it meets a barrier or an instruction of the whole warp; which one is next is drawn at random from
// a seed, as is the order of the blocks. Shared memory starts as NaN in every block. So a barrier that is missing shows
// as a wrong number, in some order.
// Why not a library: those that run such kernels on a CPU (HIP-CPU, hipCPU, chipStar) know HIP, and run threads in one
// order.
//
// What is not modelled: races on global memory (one thread runs at a time), time, several blocks at once, warps of
// which only some threads take part in an instruction.
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
// The thread that runs now.
extern Thread here;

// What the emulated device says of itself.
extern int processors;

// `body` once for every thread of the grid; throws where threads wait for each other for ever, or disagree.
void run(dim3 grid, unsigned threads, size_t shared, const std::function<void()>& body);

// Waits for all threads of the block that have not ended. The place names the barrier (see `skip_site`).
void sync_threads(const char* file, int line);

// Waits for the 32 threads of the warp; the last one calls `finish` with what each brought, in the order of lanes.
using Finish = void (*)(void* const* lanes);
void warp_meet(Finish finish, void* mine, const char* what);

}  // namespace sk_emulator
