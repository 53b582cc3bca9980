// The ops siglip_value.cpu and siglip_value_and_grad.cpu. `selfsup_kernels/siglip/ops.py` documents their arguments.
//
// A tile of scores is computed once. It gives its part of the losses, and, turned into derivatives in place, its part
// of the gradients of its rows and of its columns.
#include <cmath>
#include <numeric>

#include "cpu/kernels.h"
#include "cpu/products.h"
#include "cpu/rows.h"
#include "cpu/tournament.h"
#include "generated/call.h"

namespace selfsup_kernels {

namespace {

// The order of rows and columns, and which pairs are no negatives. With duplicates both are sorted by id, so that the
// columns that a row leaves out are one run; without, a row leaves out its positive.
struct Pairing {
  std::vector<int64_t> row_at, column_at;  // the user's row of each place; empty: the same
  std::vector<int64_t> positive;           // the place of each row's positive among the columns
  std::vector<int64_t> begin, end;         // the columns that each row leaves out; both ascend

  Pairing(const SiglipCall& call, const std::optional<Tensor>& duplicates)
      : positive(call.rows), begin(call.rows), end(call.rows) {
    if (!duplicates) {
      std::iota(positive.begin(), positive.end(), call.first);
      begin = positive;
      for (int64_t i = 0; i < call.rows; ++i) end[i] = begin[i] + 1;
      return;
    }
    const int64_t* ids = data<int64_t>(*duplicates);
    const int64_t stride = duplicates->stride(0);
    auto id = [=](int64_t j) { return ids[j * stride]; };
    column_at.resize(call.columns);
    std::iota(column_at.begin(), column_at.end(), 0);
    std::stable_sort(column_at.begin(), column_at.end(), [&](int64_t a, int64_t b) { return id(a) < id(b); });
    // In the order of the columns, the rows are sorted too.
    for (int64_t place = 0, run = 0; place < call.columns; ++place) {
      if (place == 0 || id(column_at[place]) != id(column_at[place - 1])) run = place;
      const int64_t row = column_at[place] - call.first;
      if (row < 0 || row >= call.rows) continue;
      const int64_t i = row_at.size();
      row_at.push_back(row);
      positive[i] = place;
      begin[i] = run;
    }
    for (int64_t i = 0; i < call.rows; ++i) {
      end[i] = i > 0 && begin[i] == begin[i - 1] ? end[i - 1] : begin[i];
      while (end[i] < call.columns && id(column_at[end[i]]) == id(column_at[begin[i]])) ++end[i];
    }
  }

  int64_t row(int64_t place) const { return row_at.empty() ? place : row_at[place]; }
  int64_t column(int64_t place) const { return column_at.empty() ? place : column_at[place]; }
};

// Rows as the arithmetic type in the order of the places, unit rows if `normalize`, and their gradient.
template <typename T>
struct Side {
  int64_t rows, dim;
  Tensor z, norms, gradient;

  template <typename Place>
  Side(const SiglipCall& call, const Tensor& given, int64_t rows, const Place& place, bool needed)
      : rows(rows),
        dim(call.dim),
        z(cpu_empty({rows, dim}, scalar_type<T>)),
        norms(cpu_empty({rows}, scalar_type<T>)),
        gradient(cpu_empty({needed ? rows : 0, dim}, scalar_type<T>)) {
    auto from = [&](int64_t i) { return std::pair<int64_t, int64_t>(0, place(i)); };
    load_rows<T>(RowReader<T>({given}), rows, from, call.normalize, call.eps, data<T>(z), data<T>(norms));
    if (needed) {
      T* zeros = data<T>(gradient);
      parallel(rows, std::max<int64_t>(1, 16384 / dim), [&](int64_t i) { std::fill_n(zeros + i * dim, dim, T(0)); });
    }
  }

  const T* row(int64_t i) const { return data<T>(z) + i * dim; }

  // Returns the gradient of the user's rows: `factor` times the sums, back through the norm.
  template <typename Place>
  Tensor finish(const SiglipCall& call, T factor, const Place& place, bool in_order) {
    if (gradient.size(0) == 0) return gradient;
    Tensor result = in_order ? gradient : cpu_empty({rows, dim}, scalar_type<T>);
    parallel(rows, std::max<int64_t>(1, 16384 / dim), [&](int64_t i) {
      T* dz = data<T>(gradient) + i * dim;
      kernels<T>().finish_row(row(i), dz, dim, factor, call.normalize ? data<T>(norms)[i] : T(0));
      if (!in_order) std::copy_n(dz, dim, data<T>(result) + place(i) * dim);
    });
    return result;
  }
};

// What a row's pairs add up to: its loss, the sum of the derivatives by its scores, and of their products with the
// inner products.
struct RowSums {
  double loss, slope, along;
};

// sums[i] <- over the negatives of row i. With `weight`, x.gradient and y.gradient += the weighted derivatives times
// the other side's rows, where they are needed.
template <typename T>
void visit_pairs(
    const Pairing& pairing, Side<T>& x, Side<T>& y, T scale, T bias, const T* weight, std::vector<RowSums>& sums) {
  const int64_t limit = block_limit(std::max(x.rows, y.rows));
  const Blocks rows = cut(x.rows, limit), columns = cut(y.rows, limit);
  const bool loops = tiny_product(x.rows, y.rows, x.dim);
  const auto zx = block_rows(data<T>(x.z), x.dim, rows, loops), zy = block_rows(data<T>(y.z), y.dim, columns, loops);
  const bool to_x = x.gradient.size(0) > 0, to_y = y.gradient.size(0) > 0;
  std::vector<Matrix<T>> dx, dy;
  if (to_x) dx = block_rows(data<T>(x.gradient), x.dim, rows, loops);
  if (to_y) dy = block_rows(data<T>(y.gradient), y.dim, columns, loops);
  Tiles<T> tiles(rows.longest(), columns.longest(), loops);

  auto visit = [&](int64_t i, int64_t j, int64_t thread) {
    Tile<T>& tile = tiles.get(thread, rows.rows(i), columns.rows(j));
    multiply(tile, zx[i], zy[j]);
    bool masked = false;
    for (int64_t r = 0; r < tile.rows; ++r) {
      const int64_t row = rows.begin[i] + r;
      const int64_t from = std::max(pairing.begin[row], columns.begin[j]) - columns.begin[j];
      const int64_t to = std::min(pairing.end[row], columns.begin[j + 1]) - columns.begin[j];
      if (from >= to) continue;
      std::fill(tile.values + r * tile.cols + from, tile.values + r * tile.cols + to, -INFINITY);
      masked = true;
    }
    kernels<T>().sigmoid_pairs(
        tile.values,
        tile.rows,
        tile.cols,
        scale,
        bias,
        masked,
        weight ? weight + rows.begin[i] : nullptr,
        to_y ? tile.turned_values : nullptr,
        &sums[rows.begin[i]].loss);
    if (to_x) multiply_add<T>(dx[i], tile.values, tile.plain, zy[j]);
    if (to_y) multiply_add<T>(dy[j], tile.turned_values, tile.turned, zx[i]);
  };
  if (loops && rows.count() == 1 && columns.count() == 1)
    visit(0, 0, thread_index());
  else
    rounds(rows.count(), columns.count(), visit);
}

struct Result {
  Tensor loss, grad_x, grad_y, grad_scalars;
};

template <typename T>
Result compute(
    const SiglipCall& call,
    const Tensor& x_rows,
    const Tensor& y_rows,
    const std::optional<Tensor>& duplicates,
    double scale,
    double bias,
    const std::optional<Tensor>& upstream,
    bool with_gradient,
    bool need_x,
    bool need_y) {
  if (sizeof(T) == sizeof(float)) {  // all parts use the same numbers
    scale = static_cast<float>(scale);
    bias = static_cast<float>(bias);
  }
  const Pairing pairing(call, duplicates);
  auto row = [&](int64_t i) { return pairing.row(i); };
  auto column = [&](int64_t i) { return pairing.column(i); };
  Side<T> x(call, x_rows, call.rows, row, need_x), y(call, y_rows, call.columns, column, need_y);

  // The gradients of the losses of the rows, relative to the largest: small ones would underflow in T.
  std::vector<T> weight(with_gradient ? call.rows : 0, T(1));
  double unit = call.reduction == 1 ? 1.0 / static_cast<double>(call.rows) : 1.0;
  if (with_gradient && upstream) {
    double largest = 0;
    for (int64_t i = 0; i < call.rows; ++i) {
      const double w = read_number(*upstream, row(i) * upstream->stride(0));
      if (std::isfinite(w)) largest = std::max(largest, std::abs(w));
    }
    unit = largest > 0 ? largest : 1;
    for (int64_t i = 0; i < call.rows; ++i)
      weight[i] = static_cast<T>(read_number(*upstream, row(i) * upstream->stride(0)) / unit);
  }

  std::vector<RowSums> sums(call.rows, RowSums{0, 0, 0});
  visit_pairs<T>(
      pairing, x, y, static_cast<T>(scale), static_cast<T>(bias), with_gradient ? weight.data() : nullptr, sums);

  // The positives, whose gradient would cancel against that of the negatives if it were rounded with them. Each row
  // has one and each column at most one, so that threads add to different rows.
  parallel(call.rows, std::max<int64_t>(1, 4096 / call.dim), [&](int64_t i) {
    const T *xi = x.row(i), *yi = y.row(pairing.positive[i]);
    const double product = kernels<T>().dot(xi, yi, call.dim), score = scale * product + bias;
    const double small = std::exp(-std::abs(score));
    const double slope = -(score > 0 ? small : 1.0) / (1 + small);  // -sigmoid(-score)
    sums[i].loss += std::max(-score, 0.0) + std::log1p(small);
    sums[i].slope += slope;
    sums[i].along += slope * product;
    if (!with_gradient) return;
    const T c = static_cast<T>(weight[i] * slope);
    if (need_x) kernels<T>().add_scaled(data<T>(x.gradient) + i * call.dim, yi, c, call.dim);
    if (need_y) kernels<T>().add_scaled(data<T>(y.gradient) + pairing.positive[i] * call.dim, xi, c, call.dim);
  });

  const bool each = call.reduction == 0;
  Tensor loss = each ? cpu_empty({call.rows}, scalar_type<T>) : cpu_empty({}, scalar_type<T>);
  double total = 0, slope = 0, along = 0;
  for (int64_t i = 0; i < call.rows; ++i) {
    total += sums[i].loss;
    if (each) data<T>(loss)[row(i)] = static_cast<T>(sums[i].loss);
    if (!with_gradient) continue;
    slope += weight[i] * sums[i].slope;
    along += weight[i] * sums[i].along;
  }
  if (!each) *data<T>(loss) = static_cast<T>(call.reduction == 1 ? total / static_cast<double>(call.rows) : total);
  if (!with_gradient) return {loss, loss, loss, loss};

  const T factor = static_cast<T>(scale * unit);
  Tensor scalars = cpu_empty({2}, ScalarType::Double);
  data<double>(scalars)[0] = unit * along;
  data<double>(scalars)[1] = unit * slope;
  const bool in_order = !duplicates;
  return {loss, x.finish(call, factor, row, in_order), y.finish(call, factor, column, in_order), scalars};
}

using torch::stable::detail::from;
using torch::stable::detail::to;

// Runs either op on its arguments: x, y, duplicates, scale_tensor, bias_tensor, for the gradient upstream, then the
// fields of the call, for the gradient need_x and need_y.
Result run(StableIValue* stack, bool with_gradient) {
  const auto x = to<Tensor>(stack[0]), y = to<Tensor>(stack[1]);
  const auto duplicates = to<std::optional<Tensor>>(stack[2]);
  const auto scale = to<std::optional<Tensor>>(stack[3]), bias = to<std::optional<Tensor>>(stack[4]);
  std::optional<Tensor> upstream;
  if (with_gradient) upstream = to<std::optional<Tensor>>(stack[5]);
  StableIValue* at = stack + (with_gradient ? 6 : 5);
  const SiglipCall call(at);
  bool need_x = false, need_y = false;
  if (with_gradient) {
    need_x = to<bool>(at[SiglipCall::fields]);
    need_y = to<bool>(at[SiglipCall::fields + 1]);
  }
  STD_TORCH_CHECK(
      x.dim() == 2 && y.dim() == 2 && x.size(0) == call.rows && y.size(0) == call.columns && x.size(1) == call.dim &&
          y.size(1) == call.dim && call.rows > 0 && call.dim > 0 && call.first >= 0 &&
          call.first + call.rows <= call.columns &&
          (!duplicates || (duplicates->dim() == 1 && duplicates->size(0) == call.columns &&
                           duplicates->scalar_type() == ScalarType::Long)) &&
          (!upstream || (upstream->dim() == 1 && upstream->size(0) == call.rows)) && x.scalar_type() == y.scalar_type(),
      "siglip: expected tensors of the sizes of the call");
  auto work = x.scalar_type() == ScalarType::Double ? compute<double> : compute<float>;
  return work(
      call,
      x,
      y,
      duplicates,
      scale ? read_number(*scale) : call.scale,
      bias ? read_number(*bias) : call.bias,
      upstream,
      with_gradient,
      need_x,
      need_y);
}

void value_op(StableIValue* stack, uint64_t, uint64_t) { stack[0] = from(run(stack, false).loss); }

void value_and_grad_op(StableIValue* stack, uint64_t, uint64_t) {
  const Result result = run(stack, true);
  StableIValue* out = stack;
  for (const Tensor& t : {result.loss, result.grad_x, result.grad_y, result.grad_scalars}) *out++ = from(t);
}

}  // namespace

}  // namespace selfsup_kernels

STABLE_TORCH_LIBRARY_IMPL(selfsup_kernels, CPU, m) {
  m.impl("siglip_value.cpu", &selfsup_kernels::value_op);
  m.impl("siglip_value_and_grad.cpu", &selfsup_kernels::value_and_grad_op);
}
