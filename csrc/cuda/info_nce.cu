// The ops info_nce_forward_stages.cuda and info_nce_backward_stages.cuda: what `selfsup_kernels/cuda/info_nce.py` does
// with the sorted classes and the global settings of PyTorch in hand. What is saved between them is private.
//
//   forward:  load rows -> sums over negatives (quadratic) -> losses and weights
//   backward: sums of weighted rows (quadratic) -> positives, normalisation, the user's dtype and order
#include "cuda/info_nce.h"

namespace selfsup_kernels::cuda {

namespace {

int round_up(int64_t x, int64_t multiple) { return static_cast<int>((x + multiple - 1) / multiple * multiple); }

Problem problem_of(
    int64_t views,
    int64_t samples,
    int64_t dim,
    int64_t queue,
    int64_t first,
    int64_t count,
    int64_t objective,
    int64_t core,
    bool labels,
    bool normalize) {
  Problem p{};
  p.user_views = static_cast<int>(views);
  p.samples = static_cast<int>(samples);
  p.dim = static_cast<int>(dim);
  p.first = static_cast<int>(first);
  p.count = static_cast<int>(count);
  p.views = labels ? 1 : p.user_views;
  p.batch = static_cast<int>(labels ? views * samples : samples);
  p.padded = round_up(p.batch, padding);
  p.queue = static_cast<int>(queue);
  p.queue_padded = round_up(queue, padding);
  p.stride = round_up(dim, 16);
  p.core = static_cast<int>(core);
  p.objective = static_cast<Objective>(objective);
  p.labels = labels;
  p.normalize = normalize;
  return p;
}

Classes classes_of(const std::optional<Tensor>& begin, const std::optional<Tensor>& end) {
  return begin ? Classes{pointer<const int>(*begin), pointer<const int>(*end)} : Classes{};
}

const int64_t* order_of(const Tensor& order) { return order.numel() ? pointer<const int64_t>(order) : nullptr; }

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> forward(
    std::vector<Tensor> views,
    std::optional<Tensor> queue,
    Tensor order,
    std::optional<Tensor> class_begin,
    std::optional<Tensor> class_end,
    std::optional<Tensor> temperature_tensor,
    double temperature,
    int64_t objective,
    int64_t core_view,
    bool normalize,
    double eps,
    int64_t first,
    int64_t count,
    bool deterministic,
    bool exact) {
  const Tensor& h = views[0];
  STD_TORCH_CHECK(
      on_this_device(h) && on_this_device(order) && (!queue || on_this_device(*queue)),
      "impl='cuda' takes CUDA tensors");
  const Device device(h);
  const Problem p = problem_of(
      views.size(),
      h.size(0),
      h.size(1),
      queue ? queue->size(0) : 0,
      first,
      count,
      objective,
      core_view,
      class_begin.has_value(),
      normalize);
  const Classes classes = classes_of(class_begin, class_end);
  const Stored stored = load_rows(
      device,
      p,
      views,
      queue,
      order_of(order),
      temperature_tensor ? Number(*temperature_tensor, h) : Number(temperature),
      eps);
  pair_sums(device, p, stored, classes, deterministic, exact);
  const Tables t =
      p.labels ? class_tables(device, p, stored, classes, order_of(order)) : view_tables(device, p, stored);
  return {t.loss, stored.rows, stored.rnorm, t.weights, t.coef, stored.state};
}

std::tuple<Tensor, Tensor> backward(
    Tensor grad,
    std::optional<Tensor> upstream,
    Tensor rows,
    Tensor rnorm,
    Tensor weights,
    Tensor coef,
    Tensor state,
    Tensor order,
    std::optional<Tensor> class_begin,
    std::optional<Tensor> class_end,
    double constant,
    int64_t views,
    int64_t samples,
    int64_t dim,
    int64_t queue,
    int64_t first,
    int64_t count,
    int64_t objective,
    int64_t core_view,
    bool normalize,
    bool need_temperature,
    double factor,
    bool exact) {
  const Device device(rows);
  const Problem p =
      problem_of(views, samples, dim, queue, first, count, objective, core_view, class_begin.has_value(), normalize);
  const Saved saved{rows, rnorm, weights, coef, state, upstream ? pointer<const float>(*upstream) : nullptr};
  const Partial partial =
      gradient(device, p, saved, classes_of(class_begin, class_end), static_cast<float>(factor), exact);
  Tensor out = new_tensor(rows, {views, count, dim}, rows.scalar_type());
  Tensor parts = new_tensor(rows, {need_temperature ? p.rows() : 0}, ScalarType::Double);
  finish_rows(
      device,
      p,
      saved,
      partial,
      order_of(order),
      Number(grad, rows),
      constant,
      static_cast<float>(factor),
      out,
      need_temperature ? pointer<double>(parts) : nullptr);
  return {out, parts};
}

}  // namespace

}  // namespace selfsup_kernels::cuda

SK_CUDA_LIBRARY(m) {
  m.impl("info_nce_forward_stages.cuda", TORCH_BOX(&selfsup_kernels::cuda::forward));
  m.impl("info_nce_backward_stages.cuda", TORCH_BOX(&selfsup_kernels::cuda::backward));
}
