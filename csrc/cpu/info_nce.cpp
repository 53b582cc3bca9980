// The ops info_nce_forward.cpu and info_nce_backward.cpu. `selfsup_kernels/info_nce/ops.py` documents their arguments.
#include "cpu/info_nce_labels.h"
#include "cpu/info_nce_pairs.h"
#include "cpu/rows.h"

namespace selfsup_kernels {

namespace {

// 1 / temperature, or NaN (which makes the loss NaN) if the temperature is not positive and finite. Rounded to the
// arithmetic type, because some scores are computed in double, and all must use the same temperature.
double scale_of(const std::optional<Tensor>& tensor, double temperature, ScalarType dtype) {
  double t = tensor ? read_number(*tensor) : temperature;
  double scale = t > 0 && std::isfinite(t) ? 1 / t : NAN;
  return dtype == ScalarType::Double ? scale : static_cast<float>(scale);
}

// Maps a row to its view and its sample.
struct RowMap {
  const int64_t* order;  // null without labels
  int64_t views, batch;

  int64_t view(int64_t row) const { return order ? row % views : row / batch; }
  int64_t sample(int64_t row) const { return order ? order[row / views] : row % batch; }
  std::pair<int64_t, int64_t> operator()(int64_t row) const { return {view(row), sample(row)}; }
  // The index of an owned row in the user's result, (view, owned sample).
  int64_t owned_place(const Layout& layout, int64_t row) const {
    return view(row) * layout.count + sample(row) - layout.first;
  }
};

// An upper bound of |S|: `scale` for unit rows, else computed from the longest finite rows.
template <typename T>
double score_bound(const T* z, int64_t rows, const T* zq, int64_t queue, int64_t dim, double scale, bool normalize) {
  if (normalize) return scale;
  auto longest = [dim](const T* p, int64_t count) {
    std::vector<double> square(count);
    parallel(count, 1024, [&](int64_t i) {
      square[i] = kernels<T>().dot(p + i * dim, p + i * dim, dim);
      if (std::isfinite(square[i])) return;
      square[i] = 0;  // overflow in T, or a row that is not finite
      for (const T* x = p + i * dim; x < p + (i + 1) * dim; ++x) square[i] += static_cast<double>(*x) * *x;
    });
    double top = 0;
    for (double s : square)
      if (std::isfinite(s)) top = std::max(top, s);
    return top;
  };
  double own = longest(z, rows);
  return scale * std::max(own, std::sqrt(own * longest(zq, queue)));
}

// means[v * rows + i] <- the mean score of row i of view u != v with the rows of its class in view v, for the owned
// rows i of classes of several samples: the product of the row with the sum of these rows.
template <typename T>
void class_means(
    const Layout& layout, const T* z, int64_t dim, const T* logq, double scale, std::vector<double>& means) {
  const int64_t batch = layout.batch, rows = layout.rows, views = layout.rule.views;
  std::vector<Layout::Run> classes;
  for (int64_t at = 0; at < batch; at = classes.back().end) classes.push_back(layout.sharing[layout.by_id[at]]);
  parallel(classes.size(), std::max<int64_t>(1, 4096 / dim), [&](int64_t c) {
    const Layout::Run& members = classes[c];
    if (members.size() < 2) return;
    const double size = static_cast<double>(members.size());
    std::vector<double> sum(dim);
    for (int64_t v = 0; v < views; ++v) {
      std::fill(sum.begin(), sum.end(), 0.0);
      double less = 0;
      for (int64_t k = members.begin; k < members.end; ++k) {
        const int64_t j = v * batch + layout.by_id[k];
        for (int64_t d = 0; d < dim; ++d) sum[d] += z[j * dim + d];
        if (logq) less += logq[j];
      }
      for (int64_t u = 0; u < views; ++u) {
        for (int64_t k = members.begin; k < members.end; ++k) {
          const int64_t i = u * batch + layout.by_id[k];
          if (u == v || !layout.owns(i)) continue;
          double product = 0;
          for (int64_t d = 0; d < dim; ++d) product += sum[d] * z[i * dim + d];
          means[v * rows + i] = (scale * product - less) / size;
        }
      }
    }
  });
}

// The losses and coefficient tables by views, for the rows of the owned samples.
template <typename T>
void view_tables(
    const Layout& layout,
    const T* z,
    int64_t dim,
    const T* logq,
    double scale,
    const std::vector<double>& n,
    double* loss,
    double* log_weights,
    double* positives) {
  const int64_t batch = layout.batch, rows = layout.rows;
  const int views = layout.rule.views, columns = layout.rule.column_count();
  std::vector<double> means(layout.crossed ? views * rows : 0);
  if (layout.crossed) class_means<T>(layout, z, dim, logq, scale, means);
  parallel_ranges(layout.first, layout.first + layout.count, 64, [&](int64_t begin, int64_t end) {
    std::vector<double> negatives(columns), weights(columns), p(static_cast<size_t>(views) * views), by_view(views);
    for (int64_t a = begin; a < end; ++a) {
      for (int u = 0; u < views; ++u)
        for (int v = 0; v < u; ++v)
          p[u * views + v] = p[v * views + u] =
              scale * kernels<T>().dot(z + (u * batch + a) * dim, z + (v * batch + a) * dim, dim);
      const bool several = layout.several(a);
      for (int u = 0; u < views; ++u) {
        int64_t i = u * batch + a;
        for (int v = 0; v < views; ++v) {
          if (several)
            p[u * views + v] = means[v * rows + i];
          else if (logq)
            p[u * views + v] -= logq[v * batch + a];
        }
        for (int c = 0; c < columns; ++c) negatives[c] = n[c * rows + i];
        loss[i] = anchor_loss(layout.rule, u, several, negatives.data(), &p[u * views], weights.data(), by_view.data());
        for (int c = 0; c < columns; ++c) log_weights[c * rows + i] = weights[c];
        for (int v = 0; v < views; ++v) positives[v * rows + i] = by_view[v];
        if (layout.crossed)
          positives[views * rows + i] =
              several ? 1 / (static_cast<double>(layout.rule.positives(u)) * layout.sharing[a].size()) : 0;
      }
    }
  });
}

// dz += the positives' part: each row with its sample's rows in the other views, as anchor and as positive.
template <typename T>
void view_positives(
    const Layout& layout, const T* z, int64_t dim, const double* positives, const std::vector<double>& g, T* dz) {
  const int64_t batch = layout.batch, rows = layout.rows;
  const int views = layout.rule.views;
  parallel(layout.count, std::max<int64_t>(1, 4096 / dim), [&](int64_t k) {
    const int64_t a = layout.first + k;
    for (int u = 0; u < views; ++u) {
      for (int v = 0; v < views; ++v) {
        int64_t i = u * batch + a, j = v * batch + a;
        if (i == j) continue;
        double c = g[i] * positives[v * rows + i] + g[j] * positives[u * rows + j];
        kernels<T>().add_scaled(dz + i * dim, z + j * dim, static_cast<T>(c), dim);
      }
    }
  });
}

// The tensors saved for the backward: the fields of `Saved` in selfsup_kernels/info_nce/call.py, in the same order.
struct Saved {
  Tensor rows, inverse_norms, log_weights, weights, positives, scalars, order, classes, logq;
};

template <typename T>
std::pair<Tensor, Saved> forward(
    const Call& call,
    const std::vector<Tensor>& views,
    const std::optional<Tensor>& ids,
    const std::optional<Tensor>& logq,
    const std::optional<Tensor>& queue,
    double scale) {
  const int64_t count = call.num_views, batch = call.batch, dim = call.dim, rows = count * batch;
  const int64_t queued = call.queue_rows;
  const ScalarType f64 = ScalarType::Double;

  const bool labels = labelled(call);
  Tensor order = cpu_empty({labels ? batch : 0}, ScalarType::Long);
  const Layout layout = labels ? label_layout(call, *ids, data<int64_t>(order), true) : view_layout(call, ids);
  const RowMap map{labels ? data<int64_t>(order) : nullptr, count, batch};

  Saved out{
      cpu_empty({rows + queued, dim}, scalar_type<T>),
      cpu_empty({rows + queued}, scalar_type<T>),
      cpu_empty({layout.rule.column_count(), rows}, f64),
      cpu_empty({0, rows}, f64),
      cpu_empty({labels ? 3 : count + layout.crossed, rows}, f64),
      cpu_empty({4}, f64),
      order,
      cpu_empty({2, 0}, ScalarType::Int),
      cpu_empty({logq ? rows : 0}, scalar_type<T>)};
  std::fill_n(data<double>(out.scalars), 4, 0.0);
  data<double>(out.scalars)[0] = scale;
  T *z = data<T>(out.rows), *zq = z + rows * dim, *norms = data<T>(out.inverse_norms);
  load_rows<T>(RowReader<T>(views), rows, map, call.normalize, call.eps, z, norms);
  if (queue)
    load_rows<T>(
        RowReader<T>({*queue}), queued, RowMap{nullptr, 1, queued}, call.normalize, call.eps, zq, norms + rows);

  T* less = logq ? data<T>(out.logq) : nullptr;
  for (int64_t i = 0; less && i < rows; ++i) less[i] = data<T>(*logq)[map.view(i) * batch + map.sample(i)];

  const double bound = score_bound(z, rows, zq, queued, dim, scale, call.normalize);
  std::vector<double> n = Pairs<T>(layout, z, dim, zq, queued, less, scale, bound).log_sums();

  std::vector<double> loss(rows);
  double *log_weights = data<double>(out.log_weights), *positives = data<double>(out.positives);
  if (labels)
    label_tables<T>(call, layout, z, less, scale, n, loss.data(), log_weights, positives);
  else
    view_tables<T>(layout, z, dim, less, scale, n, loss.data(), log_weights, positives);

  const bool each = call.reduction == 0;
  Tensor result = each ? cpu_empty({count, layout.count}, scalar_type<T>) : cpu_empty({}, scalar_type<T>);
  double total = 0;
  for (int64_t i = 0; i < rows; ++i) {
    if (!layout.owns(i)) continue;
    total += loss[i];
    if (each) data<T>(result)[map.owned_place(layout, i)] = static_cast<T>(loss[i]);
  }
  if (!each) *data<T>(result) = static_cast<T>(call.reduction == 1 ? total / layout.owned_rows() : total);
  return {result, out};
}

template <typename T>
std::tuple<Tensor, Tensor> backward(
    const Call& call, const Tensor& grad, const Saved& saved, const std::optional<Tensor>& ids, ScalarType dtype) {
  const int64_t count = call.num_views, batch = call.batch, dim = call.dim, rows = count * batch;
  const int64_t queued = call.queue_rows;
  const double scale = data<double>(saved.scalars)[0];
  T *z = data<T>(saved.rows), *zq = z + rows * dim;
  const T* less = saved.logq.size(0) > 0 ? data<T>(saved.logq) : nullptr;
  const bool labels = labelled(call);
  const Layout layout = labels ? label_layout(call, *ids, data<int64_t>(saved.order), false) : view_layout(call, ids);
  const RowMap map{labels ? data<int64_t>(saved.order) : nullptr, count, batch};

  std::vector<double> g(rows);
  const Upstream upstream(grad, call.reduction, count, batch);
  double largest = 0;
  for (int64_t i = 0; i < rows; ++i) {
    g[i] = upstream.at(map.view(i), map.sample(i));
    if (std::isfinite(g[i])) largest = std::max(largest, std::abs(g[i]));
  }
  // With a mean over many rows g is small, and its products with small weights would underflow in T. So g is multiplied
  // by `boost` here, and the last step divides by it.
  const double boost = largest > 0 ? 0x1p20 / largest : 1;
  for (double& value : g) value *= boost;

  // In row order and the arithmetic type. It is also the result if the user's rows have that order and type.
  Tensor dz_tensor = cpu_empty({count, batch, dim}, scalar_type<T>);
  T* dz = data<T>(dz_tensor);
  parallel(rows, std::max<int64_t>(1, 16384 / dim), [&](int64_t i) { std::fill_n(dz + i * dim, dim, T(0)); });

  const double bound = score_bound(z, rows, zq, queued, dim, scale, call.normalize);
  const double* share = layout.crossed ? data<double>(saved.positives) + count * rows : nullptr;
  const double from_queue =
      Pairs<T>(layout, z, dim, zq, queued, less, scale, bound).gradient(data<double>(saved.log_weights), share, g, dz) /
      boost;
  if (labels)
    label_gradient<T>(call, layout, z, less, scale, data<double>(saved.positives), g, dz);
  else
    view_positives<T>(layout, z, dim, data<double>(saved.positives), g, dz);

  const Storage storage = storage_of(dtype);
  const bool in_place = !labels && layout.whole() && dtype == scalar_type<T>;
  Tensor result = in_place ? dz_tensor : cpu_empty({count, layout.count, dim}, dtype);
  char* to = static_cast<char*>(result.data_ptr());
  std::vector<double> along(rows, 0.0);
  parallel(rows, std::max<int64_t>(1, 16384 / dim), [&](int64_t i) {
    if (!layout.owns(i)) return;
    T r = call.normalize ? data<T>(saved.inverse_norms)[i] : T(0);
    along[i] = kernels<T>().finish_row(z + i * dim, dz + i * dim, dim, static_cast<T>(scale / boost), r);
    if (in_place) return;
    const int64_t place = map.owned_place(layout, i) * dim;
    kernels<T>().narrow(dz + i * dim, dim, r < 0, to + place * item_size(storage), storage);
  });

  // d loss / d scale = sum <z_i, dz_i> / scale, from inner products that are needed anyway. The sum counts a pair of
  // the batch twice, for both of its rows, and a pair with the queue once.
  double total = 0;
  for (double a : along) total += a;
  double grad_scale = 0.5 * (total / scale - from_queue) + from_queue;
  Tensor grad_temperature = cpu_empty({}, ScalarType::Double);
  *data<double>(grad_temperature) = -scale * scale * grad_scale;
  return {result, grad_temperature};
}

using torch::stable::detail::from;
using torch::stable::detail::to;

// (views, ids, logq, queue, temperature_tensor, the fields of Call) -> (loss, the fields of Saved)
void forward_op(StableIValue* stack, uint64_t, uint64_t) {
  auto views = to<std::vector<Tensor>>(stack[0]);
  auto ids = to<std::optional<Tensor>>(stack[1]), logq = to<std::optional<Tensor>>(stack[2]);
  auto queue = to<std::optional<Tensor>>(stack[3]), temperature = to<std::optional<Tensor>>(stack[4]);
  const Call call(stack + 5);
  const ScalarType dtype = views.empty() ? ScalarType::Float : views[0].scalar_type();
  const ScalarType wide = dtype == ScalarType::Double ? dtype : ScalarType::Float;
  STD_TORCH_CHECK(
      static_cast<int64_t>(views.size()) == call.num_views && views[0].dim() == 2 && views[0].size(0) == call.batch &&
          views[0].size(1) == call.dim && call.dim > 0 && (queue ? queue->size(0) : 0) == call.queue_rows &&
          ids.has_value() == (call.ids != 0) &&
          (!logq || (logq->scalar_type() == wide && logq->is_contiguous() && logq->dim() == 2 &&
                     logq->size(0) == call.num_views && logq->size(1) == call.batch)),
      "info_nce_forward: expected tensors of the sizes of the call");
  auto run = dtype == ScalarType::Double ? forward<double> : forward<float>;
  auto [loss, saved] = run(call, views, ids, logq, queue, scale_of(temperature, call.temperature, dtype));
  StableIValue* out = stack;
  for (const Tensor& t :
       {loss,
        saved.rows,
        saved.inverse_norms,
        saved.log_weights,
        saved.weights,
        saved.positives,
        saved.scalars,
        saved.order,
        saved.classes,
        saved.logq})
    *out++ = from(t);
}

// (grad, the fields of Saved, ids, the fields of Call, need_temperature, dtype) -> (grad_views, grad_temperature)
void backward_op(StableIValue* stack, uint64_t, uint64_t) {
  auto grad = to<Tensor>(stack[0]);
  Tensor t[saved_fields];
  for (int i = 0; i < saved_fields; ++i) t[i] = to<Tensor>(stack[1 + i]);
  const Saved saved{t[0], t[1], t[2], t[3], t[4], t[5], t[6], t[7], t[8]};
  auto ids = to<std::optional<Tensor>>(stack[1 + saved_fields]);
  const Call call(stack + 2 + saved_fields);
  auto dtype = to<ScalarType>(stack[3 + saved_fields + Call::fields]);
  STD_TORCH_CHECK(
      saved.rows.size(0) == call.num_views * call.batch + call.queue_rows && saved.rows.size(1) == call.dim &&
          ids.has_value() == (call.ids != 0) &&
          (grad.dim() == 0 || (grad.size(0) == call.num_views && grad.size(1) == call.batch)),
      "info_nce_backward: expected tensors of the sizes of the call");
  auto run = saved.rows.scalar_type() == ScalarType::Double ? backward<double> : backward<float>;
  auto [grad_views, grad_temperature] = run(call, grad, saved, ids, dtype);
  stack[0] = from(grad_views);
  stack[1] = from(grad_temperature);
}

}  // namespace

}  // namespace selfsup_kernels

STABLE_TORCH_LIBRARY_IMPL(selfsup_kernels, CPU, m) {
  m.impl("info_nce_forward.cpu", &selfsup_kernels::forward_op);
  m.impl("info_nce_backward.cpu", &selfsup_kernels::backward_op);
}
