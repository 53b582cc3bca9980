#include "emulator.h"

#include <setjmp.h>
#include <sys/mman.h>
#include <ucontext.h>

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <map>
#include <memory>
#include <random>
#include <stdexcept>
#include <string>
#include <vector>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/common_interface_defs.h>
#define SK_SANITIZED 1
#else
#define SK_SANITIZED 0
#endif

namespace sk_emulator {

Thread here;
int processors = 3;

namespace {

constexpr size_t stack_size = 256 << 10;
constexpr int warp_size = 32;

enum class State { Ready, Barrier, Warp, Done };

struct Fiber {
  ucontext_t context;  // entry point; with the sanitizer also the resume point
  jmp_buf jump;        // resume point without the sanitizer
  bool started = false;
  unsigned char* stack = nullptr;
  void* fake_stack = nullptr;  // the sanitizer's
  State state = State::Done;
  unsigned thread = 0;

  ~Fiber() {
    if (stack) munmap(stack, stack_size);
  }
};

struct Meeting {
  Finish finish = nullptr;
  const char* what = nullptr;
  int arrived = 0;
  void* lanes[warp_size];
};

std::vector<std::unique_ptr<Fiber>> fibers;
std::vector<Meeting> meetings;
std::vector<std::vector<unsigned>> ready;  // threads of each warp
unsigned favoured = 0;                     // the warp that runs while it can
std::string barrier;                       // where threads of the block wait
unsigned waiting, live;
std::string failure;
ucontext_t scheduler;
jmp_buf scheduler_jump;
const void* scheduler_stack = nullptr;
size_t scheduler_stack_size = 0;
Fiber* current = nullptr;
const std::function<void()>* body = nullptr;
std::mt19937_64 randomness(0);
uint64_t launches = 0;
// The number of arrivals at each barrier, by site, and the barrier to skip.
std::map<std::string, uint64_t> sites;
std::string skipped;

void to_scheduler(bool ended = false) {
  Fiber* self = current;
#if SK_SANITIZED
  __sanitizer_start_switch_fiber(ended ? nullptr : &self->fake_stack, scheduler_stack, scheduler_stack_size);
#endif
  (void)ended;
#if SK_SANITIZED
  swapcontext(&self->context, &scheduler);
  __sanitizer_finish_switch_fiber(self->fake_stack, &scheduler_stack, &scheduler_stack_size);
#else
  // Not swapcontext, which makes a system call for the signal mask every time.
  if (_setjmp(self->jump) == 0) _longjmp(scheduler_jump, 1);
#endif
}

void start() {
#if SK_SANITIZED
  __sanitizer_finish_switch_fiber(nullptr, &scheduler_stack, &scheduler_stack_size);
#endif
  (*body)();
  Fiber* self = current;
  self->state = State::Done;
  --live;
  to_scheduler(true);
}

void fail(const std::string& what) {
  if (failure.empty()) failure = what;
  to_scheduler();  // never returns
  std::abort();
}

void resume(Fiber& fiber) {
  current = &fiber;
  here.thread = {fiber.thread % here.threads.x, fiber.thread / here.threads.x, 0};
#if SK_SANITIZED
  void* fake = nullptr;
  __sanitizer_start_switch_fiber(&fake, fiber.stack, stack_size);
  swapcontext(&scheduler, &fiber.context);
  __sanitizer_finish_switch_fiber(fake, nullptr, nullptr);
#else
  if (_setjmp(scheduler_jump) != 0) return;
  if (fiber.started) _longjmp(fiber.jump, 1);
  fiber.started = true;
  setcontext(&fiber.context);
#endif
}

void make_ready(unsigned thread) {
  fibers[thread]->state = State::Ready;
  ready[thread / warp_size].push_back(thread);
}

// Returns the next thread to run, or -1. One warp runs far ahead until, at random, another is favoured: if all threads
// advanced at one pace, a missing barrier would rarely matter.
int draw() {
  if (ready[favoured].empty() || randomness() % 256 == 0) {
    const unsigned start = randomness() % ready.size();
    unsigned k = 0;
    while (k < ready.size() && ready[(start + k) % ready.size()].empty()) ++k;
    if (k == ready.size()) return -1;
    favoured = (start + k) % ready.size();
  }
  std::vector<unsigned>& threads = ready[favoured];
  std::swap(threads[randomness() % threads.size()], threads.back());
  const int next = static_cast<int>(threads.back());
  threads.pop_back();
  return next;
}

void release_barrier() {
  for (unsigned k = 0; k < fibers.size(); ++k) {
    if (fibers[k]->state == State::Barrier) make_ready(k);
  }
  waiting = 0;
}

void run_block(unsigned threads, size_t shared) {
  while (fibers.size() < threads) {
    fibers.push_back(std::make_unique<Fiber>());
    void* memory = mmap(nullptr, stack_size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (memory == MAP_FAILED) throw std::runtime_error("emulator: no memory for a stack");
    fibers.back()->stack = static_cast<unsigned char*>(memory);
  }
  // The sanitizer finds writes past the end of the allocation; without it, the fence behind shared memory does.
  constexpr size_t fence = 64;
  auto release = [](unsigned char* p) { std::free(p); };
  const size_t bytes = (shared + 127) / 128 * 128 + (SK_SANITIZED ? 0 : fence * 2);
  std::unique_ptr<unsigned char, decltype(release)> memory(
      static_cast<unsigned char*>(std::aligned_alloc(128, std::max<size_t>(bytes, 128))), release);
  std::memset(memory.get(), 0xff, bytes);
  here.shared = memory.get();

  meetings.assign((threads + warp_size - 1) / warp_size, {});
  ready.assign(meetings.size(), {});
  favoured = 0;
  waiting = 0;
  live = threads;
  failure.clear();
  for (auto& fiber : fibers) fiber->state = State::Done;  // also those that a failed launch left waiting
  for (unsigned k = 0; k < threads; ++k) {
    Fiber& fiber = *fibers[k];
    fiber.thread = k;
    fiber.fake_stack = nullptr;
    fiber.started = false;
    getcontext(&fiber.context);
    fiber.context.uc_stack.ss_sp = fiber.stack;
    fiber.context.uc_stack.ss_size = stack_size;
    fiber.context.uc_link = nullptr;
    makecontext(&fiber.context, start, 0);
    make_ready(k);
  }
  while (live > 0 && failure.empty()) {
    const int next = draw();
    if (next < 0) {
      // A barrier does not wait for threads that have ended.
      if (waiting == live) {
        release_barrier();
        continue;
      }
      failure = "threads wait for ever: " + std::to_string(waiting) + " of " + std::to_string(live) + " at " + barrier;
      for (const Meeting& m : meetings)
        if (m.arrived) failure += ", " + std::to_string(m.arrived) + " lanes at " + m.what;
      break;
    }
    resume(*fibers[next]);
  }
  for (size_t k = shared; k < bytes; ++k)
    if (!SK_SANITIZED && memory.get()[k] != 0xff && failure.empty()) failure = "a write past the end of shared memory";
  if (!failure.empty()) throw std::runtime_error("emulator: " + failure);
}

}  // namespace

void run(dim3 grid, unsigned threads, size_t shared, const std::function<void()>& function) {
  ++launches;
  body = &function;
  here.threads = dim3(threads);
  here.blocks = grid;
  const uint64_t blocks = uint64_t(grid.x) * grid.y * grid.z;
  std::vector<uint64_t> order(blocks);
  for (uint64_t k = 0; k < blocks; ++k) order[k] = k;
  std::shuffle(order.begin(), order.end(), randomness);
  for (uint64_t k : order) {
    here.block = {
        static_cast<unsigned>(k % grid.x),
        static_cast<unsigned>(k / grid.x % grid.y),
        static_cast<unsigned>(k / grid.x / grid.y)};
    run_block(threads, shared);
  }
}

static bool skip(const char* file, int line) {
  const char* slash = std::strrchr(file, '/');
  std::string site = std::string(slash ? slash + 1 : file) + ":" + std::to_string(line);
  ++sites[site];
  return site == skipped;
}

void sync_threads(const char* file, int line) {
  if (skip(file, line)) return;
  const std::string site = std::string(file) + ":" + std::to_string(line);
  if (waiting > 0 && site != barrier)
    fail("threads of one block wait at different barriers: " + site + " and " + barrier);
  barrier = site;
  if (++waiting == live) {
    release_barrier();
    make_ready(current->thread);
  } else {
    current->state = State::Barrier;
  }
  to_scheduler();
}

void warp_meet(Finish finish, void* mine, const char* what) {
  Meeting& meeting = meetings[current->thread / warp_size];
  if (meeting.arrived && (meeting.finish != finish || std::strcmp(meeting.what, what) != 0))
    fail(std::string("threads of one warp meet at different instructions: ") + meeting.what + " and " + what);
  meeting.finish = finish;
  meeting.what = what;
  meeting.lanes[current->thread % warp_size] = mine;
  if (++meeting.arrived < warp_size) {
    current->state = State::Warp;
    to_scheduler();
    return;
  }
  finish(meeting.lanes);
  meeting.arrived = 0;
  const unsigned first = current->thread / warp_size * warp_size;
  for (unsigned k = first; k < first + warp_size; ++k) {
    if (k != current->thread) make_ready(k);
  }
}

}  // namespace sk_emulator

extern "C" {

void sk_emulator_seed(uint64_t seed) { sk_emulator::randomness.seed(seed); }
void sk_emulator_processors(int count) { sk_emulator::processors = count; }
uint64_t sk_emulator_launches() { return sk_emulator::launches; }
// Skips the barrier at "file:line"; "" skips none.
void sk_emulator_skip(const char* site) { sk_emulator::skipped = site; }
// The barriers reached so far, one per line.
const char* sk_emulator_sites() {
  static std::string text;
  text.clear();
  for (const auto& [site, count] : sk_emulator::sites) text += site + "\n";
  return text.c_str();
}
}
