// The schedule of symmetric work: every pair of blocks once, on many threads, without locks on the data.
#pragma once

#include <atomic>
#include <exception>
#include <mutex>
#include <thread>

#include "cpu/tiles.h"

namespace selfsup_kernels {

// Calls visit(i, j, thread) for every pair of blocks i <= j, in parallel. Concurrent calls never share a block, and the
// order of the calls on a block does not depend on the number of threads: first each block with itself, then the rounds
// of a round-robin tournament, in which each block plays at most once per round.
//
// Threads take the games in one global order and start a game when both of its blocks have finished all earlier games.
// There is no barrier between rounds, where one late thread would delay all. There is no deadlock: a game waits only
// for games that were taken before it.
template <typename Visit>
void tournament(int64_t blocks, const Visit& visit) {
  const int64_t players = blocks + blocks % 2;  // with an odd number, one block pauses each round
  const int64_t games = players / 2, turn = players - 1;
  const int64_t tasks = blocks + games * std::max<int64_t>(turn, 0);
  std::vector<std::atomic<int64_t>> played(players);
  std::atomic<int64_t> next{0};
  std::atomic<bool> failed{false};
  std::exception_ptr failure;
  std::mutex failure_mutex;

  auto wait_for = [&](int64_t block, int64_t before) {
    for (int spin = 0; played[block].load(std::memory_order_acquire) != before && !failed; ++spin)
      if (spin > 64) std::this_thread::yield();
  };
  auto play = [&](int64_t task, int64_t thread) {
    int64_t i = task, j = task, before = 0;
    if (task >= blocks) {
      // The circle method: the last player stays in place, the rest rotate.
      int64_t round = (task - blocks) / games, game = (task - blocks) % games;
      i = game == 0 ? turn : (round + game) % turn;
      j = (round + turn - game) % turn;
      before = round + 1;
      if (i > j) std::swap(i, j);
    }
    wait_for(i, before);
    if (j < blocks) {
      wait_for(j, before);
      if (failed) return;
      visit(i, j, thread);
    }
    if (i != j && j < blocks) played[j].store(before + 1, std::memory_order_release);
    played[i].store(before + 1, std::memory_order_release);
  };

  // At least two workers, as in parallel_products; one too many finds no task and returns.
  const int64_t workers = std::max<int64_t>(std::min(threads(), games), 2);
  torch::stable::parallel_for(0, workers, 1, [&](int64_t, int64_t) {
    try {
      for (int64_t task; (task = next.fetch_add(1)) < tasks && !failed;) play(task, thread_index());
    } catch (...) {
      std::lock_guard<std::mutex> lock(failure_mutex);
      if (!failed.exchange(true)) failure = std::current_exception();
    }
  });
  if (failure) std::rethrow_exception(failure);
}

}  // namespace selfsup_kernels
