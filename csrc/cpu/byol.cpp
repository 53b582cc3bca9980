// The ops byol_forward.cpu and byol_backward.cpu: one pass over the rows in each direction, linear in the views.
#include "common/byol.h"

#include "cpu/rows.h"

namespace selfsup_kernels {

namespace {

// Reads the rows of one sample in all views, and prefetches those of the next sample before `end`.
template <typename T>
struct SampleReader {
  const RowReader<T>& reader;
  int64_t end;
  std::vector<T> scratch;
  std::vector<const T*> rows;

  SampleReader(const RowReader<T>& reader, int64_t end)
      : reader(reader), end(end), scratch(2 * reader.width * reader.sources.size()), rows(reader.sources.size()) {}
  const T* const* read(int64_t sample) {
    for (size_t v = 0; v < rows.size(); ++v) {
      if (sample + 1 < end) reader.prefetch(v, sample + 1);
      rows[v] = reader.read(v, sample, scratch.data() + 2 * v * reader.width);
    }
    return rows.data();
  }
};

int64_t grain(int64_t views, int64_t dim) { return std::max<int64_t>(1, 16384 / (views * dim)); }

template <typename T>
std::tuple<Tensor, Tensor> forward(
    const std::vector<Tensor>& predictions, const std::vector<Tensor>& targets, double eps, int64_t reduction) {
  const int64_t views = predictions.size(), batch = predictions[0].size(0), dim = predictions[0].size(1);
  const RowReader<T> p(predictions), t(targets);
  Tensor stats = cpu_empty({3, views, batch}, scalar_type<T>);
  T* rp = data<T>(stats);
  T* rt = rp + views * batch;
  T* cosines = rt + views * batch;
  parallel_ranges(0, batch, grain(views, dim), [&](int64_t begin, int64_t end) {
    SampleReader<T> ps(p, end), ts(t, end);
    std::vector<T> sum(dim), local(3 * views);
    for (int64_t a = begin; a < end; ++a) {
      kernels<T>().byol_forward(
          ps.read(a), ts.read(a), views, dim, eps, sum.data(), &local[0], &local[views], &local[2 * views]);
      for (int64_t v = 0; v < views; ++v) {
        rp[v * batch + a] = local[v];
        rt[v * batch + a] = local[views + v];
        cosines[v * batch + a] = local[2 * views + v];
      }
    }
  });

  const int64_t rows = views * batch;
  const double others = static_cast<double>(std::max<int64_t>(views - 1, 1));
  Tensor loss = reduction == 0 ? cpu_empty({views, batch}, scalar_type<T>) : cpu_empty({}, scalar_type<T>);
  if (reduction == 0) {
    for (int64_t i = 0; i < rows; ++i) data<T>(loss)[i] = static_cast<T>(byol_loss(cosines[i], others));
  } else {
    double total = 0;
    for (int64_t i = 0; i < rows; ++i) total += byol_loss(cosines[i], others);
    *data<T>(loss) = static_cast<T>(reduction == 1 ? total / static_cast<double>(rows) : total);
  }
  return {loss, stats};
}

template <typename T>
Tensor backward(
    const Tensor& grad,
    const std::vector<Tensor>& predictions,
    const std::vector<Tensor>& targets,
    const Tensor& stats,
    int64_t reduction) {
  const int64_t views = predictions.size(), batch = predictions[0].size(0), dim = predictions[0].size(1);
  const RowReader<T> p(predictions), t(targets);
  const T* rp = data<T>(stats);
  const T* rt = rp + views * batch;
  const T* cosines = rt + views * batch;
  const Upstream upstream(grad, reduction, views, batch);
  const double factor = byol_slope(static_cast<double>(std::max<int64_t>(views - 1, 1)));

  const ScalarType dtype = predictions[0].scalar_type();
  const Storage storage = storage_of(dtype);
  const bool direct = dtype == scalar_type<T>;
  Tensor result = cpu_empty({views, batch, dim}, dtype);
  char* to = static_cast<char*>(result.data_ptr());
  parallel_ranges(0, batch, grain(views, dim), [&](int64_t begin, int64_t end) {
    SampleReader<T> ps(p, end), ts(t, end);
    std::vector<T> sum(dim), local(4 * views), wide(direct ? 0 : views * dim);
    std::vector<T*> out(views);
    for (int64_t a = begin; a < end; ++a) {
      for (int64_t v = 0; v < views; ++v) {
        const int64_t i = v * batch + a;
        local[v] = rp[i];
        local[views + v] = rt[i];
        local[2 * views + v] = cosines[i];
        local[3 * views + v] = static_cast<T>(factor * upstream.at(v, a));
        out[v] = direct ? reinterpret_cast<T*>(to) + i * dim : &wide[v * dim];
      }
      kernels<T>().byol_backward(
          ps.read(a),
          ts.read(a),
          views,
          dim,
          &local[0],
          &local[views],
          &local[2 * views],
          &local[3 * views],
          sum.data(),
          out.data());
      for (int64_t v = 0; v < views && !direct; ++v)
        kernels<T>().narrow(out[v], dim, local[v] < 0, to + (v * batch + a) * dim * item_size(storage), storage);
    }
  });
  return result;
}

}  // namespace

std::tuple<Tensor, Tensor> byol_forward(
    std::vector<Tensor> predictions, std::vector<Tensor> targets, double eps, int64_t reduction) {
  STD_TORCH_CHECK(
      !predictions.empty() && predictions.size() == targets.size(), "byol_forward: expected two equal lists");
  auto run = predictions[0].scalar_type() == ScalarType::Double ? forward<double> : forward<float>;
  return run(predictions, targets, eps, reduction);
}

Tensor byol_backward(
    Tensor grad, std::vector<Tensor> predictions, std::vector<Tensor> targets, Tensor stats, int64_t reduction) {
  auto run = predictions[0].scalar_type() == ScalarType::Double ? backward<double> : backward<float>;
  return run(grad, predictions, targets, stats, reduction);
}

}  // namespace selfsup_kernels

STABLE_TORCH_LIBRARY_IMPL(selfsup_kernels, CPU, m) {
  m.impl("byol_forward.cpu", TORCH_BOX(&selfsup_kernels::byol_forward));
  m.impl("byol_backward.cpu", TORCH_BOX(&selfsup_kernels::byol_backward));
}
