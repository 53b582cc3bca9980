// Schedules of work on pairs of blocks: every pair once, on many threads, without locks on the data.
#pragma once

#include <atomic>
#include <exception>
#include <mutex>
#include <thread>

#include "cpu/tiles.h"

namespace selfsup_kernels {

// A game of two players, or of one with itself, that starts when both have finished `before` games.
struct Game {
  int64_t first, second, before;
};

// Calls visit(game, thread) for all games in parallel. Concurrent games never share a player, and the order of a
// player's games does not depend on the number of threads.
//
// Threads take the games in one global order and start a game when both of its players have finished all earlier ones.
// There is no barrier between rounds, where one late thread would delay all. There is no deadlock: a game waits only
// for games that were taken before it.
template <typename GameOf, typename Visit>
void play(int64_t players, int64_t games, int64_t at_once, const GameOf& game_of, const Visit& visit) {
  std::vector<std::atomic<int64_t>> played(players);
  std::atomic<int64_t> next{0};
  std::atomic<bool> failed{false};
  std::exception_ptr failure;
  std::mutex failure_mutex;

  auto wait_for = [&](int64_t player, int64_t before) {
    for (int spin = 0; played[player].load(std::memory_order_acquire) != before && !failed; ++spin)
      if (spin > 64) std::this_thread::yield();
  };
  auto one = [&](const Game& game, int64_t thread) {
    wait_for(game.first, game.before);
    wait_for(game.second, game.before);
    if (failed) return;
    visit(game, thread);
    played[game.first].store(game.before + 1, std::memory_order_release);
    played[game.second].store(game.before + 1, std::memory_order_release);
  };

  // At least two workers, as in parallel_products; one too many finds no task and returns.
  const int64_t workers = std::max<int64_t>(std::min(threads(), at_once), 2);
  torch::stable::parallel_for(0, workers, 1, [&](int64_t, int64_t) {
    try {
      for (int64_t game; (game = next.fetch_add(1)) < games && !failed;) one(game_of(game), thread_index());
    } catch (...) {
      std::lock_guard<std::mutex> lock(failure_mutex);
      if (!failed.exchange(true)) failure = std::current_exception();
    }
  });
  if (failure) std::rethrow_exception(failure);
}

// Calls visit(i, j, thread) for every pair of blocks i <= j: first each block with itself, then the rounds of a
// round-robin tournament, in which each block plays at most once per round.
template <typename Visit>
void tournament(int64_t blocks, const Visit& visit) {
  const int64_t players = blocks + blocks % 2;  // with an odd number, one block pauses each round
  const int64_t games = players / 2, turn = players - 1;
  auto game_of = [&](int64_t game) -> Game {
    if (game < players) return {game, game, 0};
    // The circle method: the last player stays in place, the rest rotate.
    const int64_t round = (game - players) / games, k = (game - players) % games;
    const int64_t i = k == 0 ? turn : (round + k) % turn, j = (round + turn - k) % turn;
    return {std::min(i, j), std::max(i, j), round + 1};
  };
  play(players, players + games * turn, games, game_of, [&](const Game& game, int64_t thread) {
    if (game.second < blocks) visit(game.first, game.second, thread);
  });
}

// Calls visit(i, j, thread) for every pair of a block of rows and a block of columns: in each round every block plays
// at most once, and in the next against the block after.
template <typename Visit>
void rounds(int64_t rows, int64_t columns, const Visit& visit) {
  const int64_t n = std::max(rows, columns);
  auto game_of = [&](int64_t game) -> Game {
    const int64_t round = game / n, i = game % n;
    return {i, n + (i + round) % n, round};
  };
  play(2 * n, n * n, std::min(rows, columns), game_of, [&](const Game& game, int64_t thread) {
    if (game.first < rows && game.second - n < columns) visit(game.first, game.second - n, thread);
  });
}

}  // namespace selfsup_kernels
