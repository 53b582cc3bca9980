#include "cpu/info_nce_labels.h"

#include "cpu/products.h"

namespace selfsup_kernels {

namespace {

// For classes of at most this many rows, plain loops are faster than calls of a matrix library.
constexpr int64_t small_class = 16;

// Calls visit(first row, first column, tile) for the tiles (owned rows of a class) x (all rows of the class). One
// thread visits all tiles of a piece of rows, in order.
template <typename T, typename Visit>
void class_tiles(const Layout& layout, T* z, int64_t dim, const Visit& visit) {
  constexpr int64_t limit = 256;
  struct Piece {
    int64_t begin, end;
    const Layout::Class& all;
  };
  std::vector<Piece> pieces;
  for (int64_t first = 0; first < layout.owned_rows();) {
    const Layout::Class& all = layout.class_of[first];
    const int64_t own = all.runs[0].size();
    Blocks blocks = cut(all.size() < 2 ? 0 : own, limit);
    for (int64_t k = 0; k < blocks.count(); ++k)
      pieces.push_back({first + blocks.begin[k], first + blocks.begin[k + 1], all});
    first += own;
  }
  // Each thread takes a run of classes. At least two tasks: see parallel_products.
  const int64_t count = pieces.size();
  Tiles<T> tiles(limit, limit, false);
  parallel(count == 0 ? 0 : std::max<int64_t>(count, 2), std::max<int64_t>(1, count / (8 * threads())), [&](int64_t k) {
    if (k >= count) return;
    const Piece& piece = pieces[k];
    const int64_t rows = piece.end - piece.begin;
    for (const Layout::Run& run : piece.all.runs) {
      if (piece.all.size() <= small_class) {
        if (run.size() == 0) continue;
        T values[small_class * small_class];
        for (int64_t i = 0; i < rows; ++i)
          for (int64_t j = 0; j < run.size(); ++j)
            values[i * run.size() + j] = kernels<T>().dot(z + (piece.begin + i) * dim, z + (run.begin + j) * dim, dim);
        Tile<T> tile{rows, run.size(), values, nullptr};
        visit(piece.begin, run.begin, tile);
        continue;
      }
      const Matrix<T> anchors(z + piece.begin * dim, rows, dim, false);
      for (int64_t from = run.begin; from < run.end; from += limit) {
        const int64_t cols = std::min(limit, run.end - from);
        Tile<T>& tile = tiles.get(thread_index(), rows, cols);
        multiply(tile, anchors, Matrix<T>(z + from * dim, cols, dim, false));
        visit(piece.begin, from, tile);
      }
    }
  });
}

// Calls part(begin, count) for the tile's columns except the row's own: at most two runs.
template <typename Part>
void but_itself(int64_t row, int64_t from, int64_t cols, const Part& part) {
  int64_t own = row - from;
  if (own < 0 || own >= cols) return part(0, cols);
  if (own > 0) part(0, own);
  if (own + 1 < cols) part(own + 1, cols - own - 1);
}

LabelForm form_of(const Call& call) {
  if (call.numerator == static_cast<int64_t>(Numerator::LOG_SUM)) return LabelForm::Exponential;
  if (call.inside == static_cast<int64_t>(Positives::ALL)) return LabelForm::Difference;
  return call.inside == static_cast<int64_t>(Positives::ITSELF) ? LabelForm::Sigmoid : LabelForm::Constant;
}

}  // namespace

template <typename T>
void label_tables(
    const Call& call,
    const Layout& layout,
    T* z,
    const T* logq,
    double scale,
    const std::vector<double>& n,
    double* loss,
    double* log_weights,
    double* positives) {
  const int64_t rows = layout.rows, dim = call.dim, columns = layout.rule.column_count();
  const bool softplus = form_of(call) == LabelForm::Sigmoid;
  const Kernels<T>& kernel = kernels<T>();
  const T s = static_cast<T>(scale);
  std::vector<ClassSums> sums(rows);
  auto negatives = [&](int64_t i) {
    double total = n[i];
    for (int64_t c = 1; c < columns; ++c) total = log_add(total, n[c * rows + i]);
    return total;
  };
  class_tiles<T>(layout, z, dim, [&](int64_t begin, int64_t from, const Tile<T>& tile) {
    for (int64_t r = 0; r < tile.rows; ++r) {
      ClassSums& sum = sums[begin + r];
      T rest = static_cast<T>(negatives(begin + r));
      for (int64_t j = 0; logq && j < tile.cols; ++j) tile.values[r * tile.cols + j] -= logq[from + j] / s;
      but_itself(begin + r, from, tile.cols, [&](int64_t first, int64_t length) {
        const T* row = tile.values + r * tile.cols + first;
        if (softplus) {
          double part[2] = {0, 0};
          kernel.label_softplus(row, length, s, rest, part);
          sum.linear += part[0];
          sum.share += part[1];
          return;
        }
        double high = kernel.row_max(row, length) * s;  // rounded to T, as the reference of the exponentials is
        if (high > sum.top) {
          sum.exponential *= std::exp(sum.top - high);
          sum.top = high;
        }
        double part[2] = {0, 0};
        // If all are -Inf there is nothing to add, except for a NaN, which the sum propagates.
        kernel.label_sums(row, length, s, sum.top == -INFINITY ? T(0) : static_cast<T>(sum.top), part);
        sum.linear += part[0];
        sum.exponential += part[1];
      });
    }
  });

  parallel(layout.owned_rows(), 1024, [&](int64_t i) {
    const double count = static_cast<double>(layout.class_of[i].size() - 1);
    const ClassAnchor anchor = class_anchor(call, negatives(i), sums[i], count);
    loss[i] = anchor.loss;
    for (int64_t c = 0; c < columns; ++c) log_weights[c * rows + i] = anchor.log_weight;
    positives[i] = anchor.pivot;
    positives[rows + i] = anchor.share;
    positives[2 * rows + i] = anchor.factor;
  });
}

template <typename T>
void label_gradient(
    const Call& call,
    const Layout& layout,
    T* z,
    const T* logq,
    double scale,
    const double* positives,
    const std::vector<double>& g,
    T* dz) {
  const int64_t rows = layout.rows, dim = call.dim;
  const LabelForm form = form_of(call);
  const Kernels<T>& kernel = kernels<T>();
  std::vector<T> weight(rows), share(rows), ref(rows);
  for (int64_t i = 0; i < rows; ++i) {
    share[i] = static_cast<T>(g[i] * positives[rows + i]);
    std::tie(ref[i], weight[i]) = split_reference<T>(positives[i], g[i] * positives[2 * rows + i]);
  }
  const std::vector<T> nothing(logq ? 0 : rows, T(0));
  const T* less = logq ? logq : nothing.data();
  auto at = [&](int64_t i) { return LabelRow<T>{&weight[i], &share[i], &ref[i], less + i}; };
  class_tiles<T>(layout, z, dim, [&](int64_t begin, int64_t from, const Tile<T>& tile) {
    const int64_t count = tile.rows, cols = tile.cols;
    T* values = tile.values;
    kernel.label_gradient(values, cols, count, cols, static_cast<T>(scale), form, at(begin), at(from));
    for (int64_t i = std::max(begin, from); i < std::min(begin + count, from + cols); ++i)
      values[(i - begin) * cols + (i - from)] = 0;
    T *out = dz + begin * dim, *p = z + from * dim;
    if (!tile.plain) {
      for (int64_t i = 0; i < count; ++i)
        for (int64_t j = 0; j < cols; ++j) kernel.add_scaled(out + i * dim, p + j * dim, values[i * cols + j], dim);
      return;
    }
    multiply_add<T>(Matrix<T>(out, count, dim, false), values, tile.plain, Matrix<T>(p, cols, dim, false));
  });
}

#define SK_INSTANTIATE(T)                                                                                       \
  template void label_tables<T>(                                                                                \
      const Call&, const Layout&, T*, const T*, double, const std::vector<double>&, double*, double*, double*); \
  template void label_gradient<T>(                                                                              \
      const Call&, const Layout&, T*, const T*, double, const double*, const std::vector<double>&, T*);
SK_INSTANTIATE(float)
SK_INSTANTIATE(double)

}  // namespace selfsup_kernels
