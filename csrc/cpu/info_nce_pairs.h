// The quadratic work of InfoNCE, for any objective: sums of exponentials over the negatives, and their gradient.
//
// One exponential serves both directions of a pair: e = exp(S - ref), with one reference point for all rows, chosen so
// that nothing overflows. A row whose sum is too small to be accurate (very low temperatures, all negatives far away)
// is recomputed with its own reference point.
#pragma once

#include "cpu/info_nce_layout.h"
#include "cpu/kernels.h"
#include "cpu/products.h"
#include "cpu/tournament.h"

namespace selfsup_kernels {

template <typename T>
struct Limits;
template <>
struct Limits<float> {
  static constexpr double headroom = 70;              // exp(70) times 1e8 terms is below float's limit
  static constexpr double smallest_sum = 1e-30;       // terms below float's range are then below 1e-8 of the sum
  static constexpr double largest_log_weight = 69.1;  // -log(smallest_sum)
};
template <>
struct Limits<double> {
  static constexpr double headroom = 600;
  static constexpr double smallest_sum = 1e-250;
  static constexpr double largest_log_weight = 575.7;
};

template <typename T>
class Pairs {
 public:
  // z: layout.rows x dim; zq: queue x dim. `bound` is an upper bound of |S|. `logq` (rows, at least 0; or null, and
  // null with a queue) is subtracted from the scores of the rows as columns.
  Pairs(const Layout& layout, T* z, int64_t dim, T* zq, int64_t queue, const T* logq, double scale, double bound)
      : layout_(layout),
        kernel_(kernels<T>()),
        dim_(dim),
        queue_(queue),
        scale_(static_cast<T>(scale)),
        ref_(static_cast<T>(std::clamp(bound - Limits<T>::headroom, 0.0, double(std::numeric_limits<T>::max())))),
        blocks_(layout.blocks),
        queue_blocks_(cut(queue, 256)),
        loops_(tiny_product(layout.rows, std::max(layout.rows, queue), dim)),
        logq_(logq),
        rows_(z),
        z_(block_rows(z, dim, blocks_, loops_)),
        zq_(block_rows(zq, dim, queue_blocks_, loops_)),
        tiles_(blocks_.longest(), std::max(blocks_.longest(), queue_blocks_.longest()), loops_) {
    for (int64_t i = 0; i < blocks_.count(); ++i) {
      segments_.push_back(layout.segments(blocks_.begin[i], blocks_.begin[i + 1]));
      owned_.push_back(layout.owns(blocks_.begin[i]));  // a block is owned as a whole
    }
    if (!logq) return;
    factor_.resize(layout.rows);
    for (int64_t i = 0; i < layout.rows; ++i) factor_[i] = std::exp(-logq[i] / 2);
  }

  // Returns N[c * rows + i] for the owned rows i: the log-sum-exp of row i's negatives in column c (a view, or the
  // queue last), -Inf if there are none.
  std::vector<double> log_sums() {
    const int64_t rows = layout_.rows, columns = layout_.rule.column_count();
    std::vector<double> n(columns * rows, 0.0);
    Scratch<T> column_sums(blocks_.longest());
    each_pair([&](int64_t i, int64_t j, int64_t thread) {
      if (!wanted(i, j)) return;
      auto& tile = scores(thread, i, j);
      for (const auto& a : segments_[i]) {
        for (const auto& b : segments_[j]) {
          if (!layout_.meets(a.column, b.column)) continue;
          const T* s = tile.values + (a.begin - blocks_.begin[i]) * tile.cols + (b.begin - blocks_.begin[j]);
          // The tile of a block with itself holds both triangles, so its row sums are complete.
          T* sums = i == j || !owned_[j] ? nullptr : column_sums.at(thread);
          if (sums) std::fill(sums, sums + (b.end - b.begin), T(0));
          kernel_.exp_sums(
              s,
              tile.cols,
              a.end - a.begin,
              b.end - b.begin,
              scale_,
              ref_,
              factor(a.begin),
              factor(b.begin),
              &n[b.column * rows + a.begin],
              sums);
          if (sums)
            for (int64_t k = 0; k < b.end - b.begin; ++k) n[a.column * rows + b.begin + k] += sums[k];
        }
      }
    });
    if (queue_ > 0) {
      parallel_products(blocks_.count(), [&](int64_t i) {
        if (!owned_[i]) return;
        for (int64_t q = 0; q < queue_blocks_.count(); ++q) {
          auto& tile = tiles_.get(thread_index(), blocks_.rows(i), queue_blocks_.rows(q));
          multiply(tile, z_[i], zq_[q]);
          kernel_.exp_sums(
              tile.values,
              tile.cols,
              tile.rows,
              tile.cols,
              scale_,
              ref_,
              nullptr,
              nullptr,
              &n[layout_.queue_column() * rows + blocks_.begin[i]],
              nullptr);
        }
      });
    }

    std::vector<int64_t> again;
    for (int64_t i = 0; i < rows; ++i)
      if (layout_.owns(i) && has_small_sum(n, i)) again.push_back(i);
    parallel(
        rows * columns, 4096, [&](int64_t k) { n[k] = n[k] > 0 || n[k] != n[k] ? ref_ + std::log(n[k]) : -INFINITY; });
    exact_log_sums(again, n);
    return n;
  }

  // dz_i += sum_j G_ij z_j over the negatives of the owned rows i, G_ij = e^S (g_i w_ij + g_j w_ji) with w =
  // exp(log_weights). log_weights is columns x rows, g the upstream gradient of each row. If the call is crossed,
  // `share` (rows) is part of G for pairs of one class: less g_i share_i + g_j share_j, as one number, since the two
  // cancel. Returns sum <z_i, the queue's part of dz_i>.
  double gradient(const double* log_weights, const double* share, const std::vector<double>& g, T* dz) {
    double from_queue = queue_ > 0 ? queue_gradient(log_weights, g, dz) : 0;

    const int64_t rows = layout_.rows, views = layout_.rule.views;
    std::vector<T> weight(views * rows);
    std::vector<char> apart(rows, 0);
    parallel(rows, 1024, [&](int64_t i) {
      for (int64_t c = 0; c < views; ++c) apart[i] |= log_weights[c * rows + i] + ref_ > Limits<T>::largest_log_weight;
      for (int64_t c = 0; c < views; ++c)
        weight[c * rows + i] = apart[i] ? T(0) : static_cast<T>(g[i] * std::exp(log_weights[c * rows + i] + ref_));
    });
    std::vector<T> together(layout_.crossed ? rows : 0);
    for (size_t i = 0; i < together.size(); ++i) together[i] = apart[i] ? T(0) : static_cast<T>(g[i] * share[i]);

    const auto out = block_rows(dz, dim_, blocks_, loops_);
    each_pair([&](int64_t i, int64_t j, int64_t thread) {
      if (!wanted(i, j)) return;
      auto& tile = scores(thread, i, j);
      for (const auto& a : segments_[i]) {
        for (const auto& b : segments_[j]) {
          const int64_t top = a.begin - blocks_.begin[i], left = b.begin - blocks_.begin[j];
          T* s = tile.values + top * tile.cols + left;
          T* turned = i == j || !owned_[j] ? nullptr : tile.turned_values + left * tile.rows + top;
          if (!layout_.meets(a.column, b.column)) {
            for (int64_t r = 0; r < a.end - a.begin; ++r) std::fill_n(s + r * tile.cols, b.end - b.begin, T(0));
            for (int64_t c = 0; turned && c < b.end - b.begin; ++c)
              std::fill_n(turned + c * tile.rows, a.end - a.begin, T(0));
            continue;
          }
          kernel_.exp_gradient(
              s,
              tile.cols,
              turned,
              tile.rows,
              a.end - a.begin,
              b.end - b.begin,
              scale_,
              ref_,
              &weight[b.column * rows + a.begin],
              &weight[a.column * rows + b.begin],
              factor(a.begin),
              factor(b.begin));
        }
      }
      if (layout_.crossed) {
        of_several(i, j, [&](int64_t r, int64_t c) {
          const T both = together[blocks_.begin[i] + r] + together[blocks_.begin[j] + c];
          tile.values[r * tile.cols + c] -= both;
          if (i != j && owned_[j]) tile.turned_values[c * tile.rows + r] -= both;
        });
      }
      if (owned_[i]) multiply_add<T>(out[i], tile.values, tile.plain, z_[j]);
      if (i != j && owned_[j]) multiply_add<T>(out[j], tile.turned_values, tile.turned, z_[i]);
    });

    std::vector<int64_t> again;
    for (int64_t i = 0; i < rows; ++i)
      if (apart[i]) again.push_back(i);
    exact_gradient(again, log_weights, share, g, dz);
    return from_queue;
  }

 private:
  // Calls visit(i, j, thread) for every pair of blocks i <= j.
  template <typename Visit>
  void each_pair(const Visit& visit) {
    if (loops_ && blocks_.count() == 1)
      visit(0, 0, thread_index());
    else
      tournament(blocks_.count(), visit);
  }

  const T* factor(int64_t row) const { return logq_ ? &factor_[row] : nullptr; }

  // Calls visit(row, column) of the tile of two blocks for the pairs of one class in views that meet.
  template <typename Visit>
  void of_several(int64_t i, int64_t j, const Visit& visit) const {
    for (int64_t r = 0; r < blocks_.rows(i); ++r) {
      const int64_t row = blocks_.begin[i] + r;
      if (!layout_.several(row)) continue;
      layout_.sharing_id(row, segments_[j], [&](int64_t c) {
        if (layout_.meets(column_of(row), column_of(blocks_.begin[j] + c))) visit(r, c);
      });
    }
  }

  // True if owned rows have negatives in the tile of two blocks.
  bool wanted(int64_t i, int64_t j) const {
    return (owned_[i] || owned_[j]) && layout_.wanted(segments_[i], segments_[j]);
  }

  // The inner products of two blocks, -Inf for pairs that are not negatives.
  Tile<T>& scores(int64_t thread, int64_t i, int64_t j) {
    Tile<T>& tile = tiles_.get(thread, blocks_.rows(i), blocks_.rows(j));
    multiply(tile, z_[i], z_[j]);
    exclude(tile, segments_[j], [&](int64_t r) { return blocks_.begin[i] + r; });
    return tile;
  }

  static void turn(Tile<T>& tile) {
    for (int64_t r = 0; r < tile.rows; ++r)
      for (int64_t c = 0; c < tile.cols; ++c) tile.turned_values[c * tile.rows + r] = tile.values[r * tile.cols + c];
  }

  template <typename RowOf>
  void exclude(Tile<T>& tile, const std::vector<Layout::Segment>& columns, RowOf row_of) const {
    for (int64_t r = 0; r < tile.rows; ++r)
      layout_.excluded(row_of(r), columns, [&](int64_t c) { tile.values[r * tile.cols + c] = -INFINITY; });
  }

  // As `exclude`, and subtracts what `logq` takes from the scores of the columns.
  template <typename RowOf>
  void exclude_and_subtract(Tile<T>& tile, int64_t j, RowOf row_of) const {
    exclude(tile, segments_[j], row_of);
    for (int64_t r = 0; logq_ && r < tile.rows; ++r)
      for (int64_t c = 0; c < tile.cols; ++c) tile.values[r * tile.cols + c] -= logq_[blocks_.begin[j] + c] / scale_;
  }

  int column_of(int64_t row) const { return layout_.labels ? 0 : static_cast<int>(row / layout_.batch); }

  bool has_small_sum(const std::vector<double>& sums, int64_t row) const {
    const int64_t rows = layout_.rows;
    int u = column_of(row);
    for (int c = 0; layout_.has_negatives(row) && c < layout_.rule.views; ++c)
      if (layout_.meets(u, c) && sums[c * rows + row] < Limits<T>::smallest_sum) return true;
    return queue_ > 0 && sums[layout_.queue_column() * rows + row] < Limits<T>::smallest_sum;
  }

  // Gathers the rows `which` in pieces and calls visit(rows of the piece, their z, thread).
  template <typename Visit>
  void gather(const std::vector<int64_t>& which, const Visit& visit) {
    int64_t limit = blocks_.longest(), pieces = (static_cast<int64_t>(which.size()) + limit - 1) / limit;
    Scratch<T> memory(limit * dim_);
    parallel_products(pieces, [&](int64_t piece) {
      int64_t thread = thread_index();
      std::vector<int64_t> rows(
          which.begin() + piece * limit,
          which.begin() + std::min<int64_t>((piece + 1) * limit, static_cast<int64_t>(which.size())));
      T* packed = memory.at(thread);
      for (size_t r = 0; r < rows.size(); ++r) std::copy_n(rows_ + rows[r] * dim_, dim_, packed + r * dim_);
      visit(rows, Matrix<T>(packed, rows.size(), dim_, loops_), thread);
    });
  }

  // Computes N of the given rows, each with its own running maximum.
  void exact_log_sums(const std::vector<int64_t>& which, std::vector<double>& n) {
    if (which.empty()) return;
    const int64_t all = layout_.rows, columns = layout_.rule.column_count();
    gather(which, [&](const std::vector<int64_t>& rows, const Matrix<T>& z, int64_t thread) {
      std::vector<double> top(rows.size() * columns, -INFINITY), total(rows.size() * columns, 0.0);
      auto take = [&](const T* s, int64_t count, int64_t slot) {
        double high = kernel_.row_max(s, count) * scale_;  // rounded to T, as the reference of the exponentials is
        if (high > top[slot]) {
          total[slot] *= std::exp(top[slot] - high);
          top[slot] = high;
        }
        // If all are -Inf there is nothing to add, except for a NaN, which the sum below propagates.
        T ref = std::isinf(top[slot]) ? T(0) : static_cast<T>(top[slot]);
        double sum = 0;
        kernel_.exp_sums(s, count, 1, count, scale_, ref, nullptr, nullptr, &sum, nullptr);
        total[slot] += sum;
      };
      for (int64_t j = 0; j < blocks_.count(); ++j) {
        Tile<T>& tile = tiles_.get(thread, rows.size(), blocks_.rows(j));
        multiply(tile, z, z_[j]);
        exclude_and_subtract(tile, j, [&](int64_t r) { return rows[r]; });
        for (size_t r = 0; r < rows.size(); ++r)
          for (const auto& b : segments_[j])
            take(tile.values + r * tile.cols + (b.begin - blocks_.begin[j]), b.end - b.begin, r * columns + b.column);
      }
      for (int64_t q = 0; q < queue_blocks_.count(); ++q) {
        Tile<T>& tile = tiles_.get(thread, rows.size(), queue_blocks_.rows(q));
        multiply(tile, z, zq_[q]);
        for (size_t r = 0; r < rows.size(); ++r)
          take(tile.values + r * tile.cols, tile.cols, r * columns + layout_.queue_column());
      }
      for (size_t r = 0; r < rows.size(); ++r)
        for (int64_t c = 0; c < columns; ++c) {
          int64_t slot = r * columns + c;
          n[c * all + rows[r]] = top[slot] == -INFINITY && total[slot] == 0
                                     ? -INFINITY
                                     : (std::isinf(top[slot]) ? 0 : top[slot]) + std::log(total[slot]);
        }
    });
  }

  // As `gradient`, with only the given rows as anchors: first their own gradient, then what they add to the owned rows.
  // Each exponent is S + log_weights <= 0, so nothing overflows.
  void exact_gradient(
      const std::vector<int64_t>& which,
      const double* log_weights,
      const double* share,
      const std::vector<double>& g,
      T* dz) {
    if (which.empty()) return;
    auto weigh = [&](Tile<T>& tile, const std::vector<int64_t>& rows, int64_t j) {
      exclude_and_subtract(tile, j, [&](int64_t r) { return rows[r]; });
      for (size_t r = 0; r < rows.size(); ++r) {
        for (const auto& b : segments_[j]) {
          auto [ref, weight] = split_reference<T>(-log_weights[b.column * layout_.rows + rows[r]], g[rows[r]]);
          T* s = tile.values + r * tile.cols + (b.begin - blocks_.begin[j]);
          kernel_.exp_rows(s, tile.cols, 1, b.end - b.begin, scale_, &ref, &weight);
        }
        if (!layout_.several(rows[r])) continue;
        layout_.sharing_id(rows[r], segments_[j], [&](int64_t c) {
          if (layout_.meets(column_of(rows[r]), column_of(blocks_.begin[j] + c)))
            tile.values[r * tile.cols + c] -= static_cast<T>(g[rows[r]] * share[rows[r]]);
        });
      }
    };
    std::vector<int64_t> own;
    for (int64_t i : which)
      if (layout_.owns(i)) own.push_back(i);
    gather(own, [&](const std::vector<int64_t>& rows, const Matrix<T>& z, int64_t thread) {
      std::vector<T> memory(rows.size() * dim_, T(0));
      const Matrix<T> sum(memory.data(), rows.size(), dim_, loops_);
      for (int64_t j = 0; j < blocks_.count(); ++j) {
        Tile<T>& tile = tiles_.get(thread, rows.size(), blocks_.rows(j));
        multiply(tile, z, z_[j]);
        weigh(tile, rows, j);
        multiply_add<T>(sum, tile.values, tile.plain, z_[j]);
      }
      for (size_t r = 0; r < rows.size(); ++r)
        kernel_.add_scaled(dz + rows[r] * dim_, sum.values + r * dim_, T(1), dim_);
    });

    // Now by blocks of columns, so that each thread again adds to its own rows only.
    const int64_t count = which.size(), limit = blocks_.longest();
    Tensor packed = cpu_empty({count, dim_}, scalar_type<T>);
    for (int64_t r = 0; r < count; ++r) std::copy_n(rows_ + which[r] * dim_, dim_, data<T>(packed) + r * dim_);
    Blocks pieces = cut(count, limit);
    const auto anchors = block_rows(data<T>(packed), dim_, pieces, loops_);
    const auto out = block_rows(dz, dim_, blocks_, loops_);
    parallel_products(blocks_.count(), [&](int64_t j) {
      if (!owned_[j]) return;
      for (int64_t k = 0; k < pieces.count(); ++k) {
        std::vector<int64_t> rows(which.begin() + pieces.begin[k], which.begin() + pieces.begin[k + 1]);
        Tile<T>& tile = tiles_.get(thread_index(), rows.size(), blocks_.rows(j));
        multiply(tile, anchors[k], z_[j]);
        weigh(tile, rows, j);
        turn(tile);
        multiply_add<T>(out[j], tile.turned_values, tile.turned, anchors[k]);
      }
    });
  }

  // dz, which holds zeros, += the queue's part. The queue gets no gradient, so each row uses only its own weight and
  // reference point.
  double queue_gradient(const double* log_weights, const std::vector<double>& g, T* dz) {
    const auto out = block_rows(dz, dim_, blocks_, loops_);
    std::vector<double> along(blocks_.count(), 0.0);
    parallel_products(blocks_.count(), [&](int64_t i) {
      if (!owned_[i]) return;
      const int64_t first = blocks_.begin[i], rows = blocks_.rows(i);
      std::vector<T> ref(rows), weight(rows);
      for (int64_t r = 0; r < rows; ++r) {
        std::tie(ref[r], weight[r]) =
            split_reference<T>(-log_weights[layout_.queue_column() * layout_.rows + first + r], g[first + r]);
      }
      for (int64_t q = 0; q < queue_blocks_.count(); ++q) {
        Tile<T>& tile = tiles_.get(thread_index(), rows, queue_blocks_.rows(q));
        multiply(tile, z_[i], zq_[q]);
        kernel_.exp_rows(tile.values, tile.cols, rows, tile.cols, scale_, ref.data(), weight.data());
        multiply_add<T>(out[i], tile.values, tile.plain, zq_[q]);
      }
      for (int64_t r = first; r < first + rows; ++r) along[i] += kernel_.dot(rows_ + r * dim_, dz + r * dim_, dim_);
    });
    double total = 0;
    for (double a : along) total += a;
    return total;
  }

  const Layout& layout_;
  const Kernels<T>& kernel_;
  const int64_t dim_, queue_;
  const T scale_, ref_;
  const Blocks& blocks_;
  const Blocks queue_blocks_;
  const bool loops_;
  const T* const logq_;
  std::vector<T> factor_;  // exp(-logq / 2)
  T* const rows_;
  const std::vector<Matrix<T>> z_, zq_;
  Tiles<T> tiles_;
  std::vector<std::vector<Layout::Segment>> segments_;
  std::vector<char> owned_;
};

}  // namespace selfsup_kernels
