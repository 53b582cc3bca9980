// The ops info_nce_forward.cpu and info_nce_backward.cpu. `selfsup_kernels/core/ops.py` states what goes in and out.
#include "cpu/info_nce_labels.h"
#include "cpu/info_nce_pairs.h"
#include "cpu/rows.h"

namespace selfsup_kernels {

namespace {

// 1 / temperature; NaN, which no loss survives, where the temperature is not a positive number. Rounded to the
// arithmetic type: positives and negatives must see the same temperature, whichever type their scores are computed in.
double scale_of(const std::optional<Tensor>& tensor, double temperature, ScalarType dtype) {
  double t = tensor ? read_number(*tensor) : temperature;
  double scale = t > 0 && std::isfinite(t) ? 1 / t : NAN;
  return dtype == ScalarType::Double ? scale : static_cast<float>(scale);
}

LabelObjective label_objective(int64_t objective) {
  switch (static_cast<Objective>(objective)) {
    case Objective::SupconOut:
      return LabelObjective::SupconOut;
    case Objective::SupconIn:
      return LabelObjective::SupconIn;
    case Objective::PerPositive:
      return LabelObjective::PerPositive;
    case Objective::Decoupled:
      return LabelObjective::Decoupled;
    default:
      STD_TORCH_CHECK(false, "this objective takes no labels");
  }
}

// Where the row of (view, sample number in row order) lies, and which sample that is.
struct RowMap {
  const int64_t* order;  // null without labels
  int64_t views, batch;

  int64_t view(int64_t row) const { return order ? row % views : row / batch; }
  int64_t sample(int64_t row) const { return order ? order[row / views] : row % batch; }
  // Of an owned row in what is given to the user: (view, owned sample).
  int64_t owned_place(const Layout& layout, int64_t row) const {
    return view(row) * layout.count + sample(row) - layout.first;
  }
};

// The largest |S| that rows of these norms allow: scale for unit rows, else by the longest finite row.
template <typename T>
double score_bound(const T* z, int64_t rows, const T* zq, int64_t queue, int64_t dim, double scale, bool normalize) {
  if (normalize) return scale;
  auto longest = [dim](const T* p, int64_t count) {
    std::vector<double> square(count);
    parallel(count, 1024, [&](int64_t i) {
      square[i] = kernels<T>().dot(p + i * dim, p + i * dim, dim);
      if (std::isfinite(square[i])) return;
      square[i] = 0;  // too long for T, or not finite at all
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

// z <- the rows (unit rows if `normalize`) in the order of `map`.
template <typename T>
void load_rows(const RowReader<T>& reader, RowMap map, int64_t rows, bool normalize, double eps, T* z, T* rnorm) {
  const int64_t dim = reader.width;
  torch::stable::parallel_for(0, rows, std::max<int64_t>(1, 16384 / dim), [&](int64_t begin, int64_t end) {
    std::vector<T> scratch(2 * dim);
    for (int64_t i = begin; i < end; ++i) {
      const T* h = reader.read(map.view(i), map.sample(i), scratch.data());
      if (normalize) {
        T r = kernels<T>().unit_row(h, dim, eps, z + i * dim);
        if (rnorm) rnorm[i] = r;
      } else {
        std::copy_n(h, dim, z + i * dim);
        if (rnorm) rnorm[i] = 1;
      }
    }
  });
}

// The losses and tables of the objectives that tell views apart, for the owned samples. loss is by row, like logw and
// coef.
template <typename T>
void view_tables(
    const Layout& layout,
    const T* z,
    int64_t dim,
    double scale,
    const std::vector<double>& n,
    double* loss,
    double* logw,
    double* coef) {
  const int64_t batch = layout.batch, rows = layout.rows;
  const int views = layout.rule.views, columns = layout.rule.columns();
  torch::stable::parallel_for(layout.first, layout.first + layout.count, 64, [&](int64_t begin, int64_t end) {
    std::vector<double> negatives(columns), positives(static_cast<size_t>(views) * views);
    for (int64_t a = begin; a < end; ++a) {
      for (int u = 0; u < views; ++u)
        for (int v = 0; v < u; ++v)
          positives[u * views + v] = positives[v * views + u] =
              scale * kernels<T>().dot(z + (u * batch + a) * dim, z + (v * batch + a) * dim, dim);
      for (int u = 0; u < views; ++u) {
        int64_t i = u * batch + a;
        for (int c = 0; c < columns; ++c) negatives[c] = n[c * rows + i];
        loss[i] =
            anchor_loss(layout.rule, u, negatives.data(), &positives[u * views], logw + i * columns, coef + i * views);
      }
    }
  });
}

// dz += the positives' part: every row meets its sample's rows in the other views, as anchor and as positive.
template <typename T>
void view_positives(
    const Layout& layout, const T* z, int64_t dim, const double* coef, const std::vector<double>& g, T* dz) {
  const int64_t batch = layout.batch;
  const int views = layout.rule.views;
  parallel(layout.count, std::max<int64_t>(1, 4096 / dim), [&](int64_t k) {
    const int64_t a = layout.first + k;
    for (int u = 0; u < views; ++u) {
      for (int v = 0; v < views; ++v) {
        int64_t i = u * batch + a, j = v * batch + a;
        if (i == j) continue;
        double c = g[i] * coef[i * views + v] + g[j] * coef[j * views + u];
        kernels<T>().add_scaled(dz + i * dim, z + j * dim, static_cast<T>(c), dim);
      }
    }
  });
}

struct Tables {
  Tensor loss, z, rnorm, logw, coef, zq, order;
};

template <typename T>
Tables forward(
    const std::vector<Tensor>& views,
    const std::optional<Tensor>& labels,
    const std::optional<Tensor>& queue,
    double scale,
    int64_t objective,
    int64_t core,
    bool normalize,
    double eps,
    int64_t reduction,
    int64_t first,
    int64_t owned) {
  const int64_t count = views.size(), batch = views[0].size(0), dim = views[0].size(1), rows = count * batch;
  const int64_t queued = queue ? queue->size(0) : 0;
  const ScalarType f64 = ScalarType::Double;

  Tensor order = cpu_empty({labels ? batch : 0}, ScalarType::Long);
  const Layout layout = labels
                            ? label_layout(*labels, count, queue.has_value(), data<int64_t>(order), true, first, owned)
                            : view_layout(count, batch, objective, core, queue.has_value(), first, owned);
  const RowMap map{labels ? data<int64_t>(order) : nullptr, count, batch};
  const int64_t columns = layout.rule.columns();

  Tables out{
      reduction == 0 ? cpu_empty({count, layout.count}, scalar_type<T>) : cpu_empty({}, scalar_type<T>),
      cpu_empty({rows, dim}, scalar_type<T>),
      cpu_empty({rows}, scalar_type<T>),
      cpu_empty({rows, columns}, f64),
      cpu_empty({rows, labels ? 4 : count}, f64),
      cpu_empty({queued, dim}, scalar_type<T>),
      order};
  T *z = data<T>(out.z), *zq = data<T>(out.zq);
  load_rows<T>(RowReader<T>(views), map, rows, normalize, eps, z, data<T>(out.rnorm));
  if (queue) load_rows<T>(RowReader<T>({*queue}), RowMap{nullptr, 1, queued}, queued, normalize, eps, zq, nullptr);

  const double bound = score_bound(z, rows, zq, queued, dim, scale, normalize);
  std::vector<double> n = Pairs<T>(layout, z, dim, zq, queued, scale, bound).log_sums();

  std::vector<double> loss(rows);
  if (labels)
    label_tables<T>(
        layout,
        z,
        dim,
        scale,
        label_objective(objective),
        n,
        loss.data(),
        data<double>(out.logw),
        data<double>(out.coef));
  else
    view_tables<T>(layout, z, dim, scale, n, loss.data(), data<double>(out.logw), data<double>(out.coef));

  T* result = data<T>(out.loss);
  double total = 0;
  for (int64_t i = 0; i < rows; ++i) {
    if (!layout.owns(i)) continue;
    total += loss[i];
    if (reduction == 0) result[map.owned_place(layout, i)] = static_cast<T>(loss[i]);
  }
  if (reduction != 0) *result = static_cast<T>(reduction == 1 ? total / layout.owned_rows() : total);
  return out;
}

template <typename T>
std::tuple<Tensor, Tensor> backward(
    const Tensor& grad,
    const Tensor& z_tensor,
    const Tensor& rnorm,
    const Tensor& logw,
    const Tensor& coef,
    const Tensor& zq_tensor,
    const Tensor& order,
    const std::optional<Tensor>& labels,
    double scale,
    int64_t count,
    int64_t objective,
    int64_t core,
    bool normalize,
    int64_t reduction,
    ScalarType dtype,
    int64_t first,
    int64_t owned) {
  const int64_t rows = z_tensor.size(0), dim = z_tensor.size(1), batch = rows / count, queued = zq_tensor.size(0);
  T *z = data<T>(z_tensor), *zq = data<T>(zq_tensor);
  const bool queue = queued > 0;
  const Layout layout = labels ? label_layout(*labels, count, queue, data<int64_t>(order), false, first, owned)
                               : view_layout(count, batch, objective, core, queue, first, owned);
  const RowMap map{labels ? data<int64_t>(order) : nullptr, count, batch};

  std::vector<double> g(rows);
  const Upstream upstream(grad, reduction, count, batch);
  double largest = 0;
  for (int64_t i = 0; i < rows; ++i) {
    g[i] = upstream.at(map.view(i), map.sample(i));
    if (std::isfinite(g[i])) largest = std::max(largest, std::abs(g[i]));
  }
  // A mean over many rows makes g small, and its products with small weights would leave T's range. Everything below
  // runs on g times `boost`; the last step divides by it.
  const double boost = largest > 0 ? 0x1p20 / largest : 1;
  for (double& value : g) value *= boost;

  // In the order of the rows and the arithmetic type; this is the result itself where the user's rows are the same.
  Tensor dz_tensor = cpu_empty({count, batch, dim}, scalar_type<T>);
  T* dz = data<T>(dz_tensor);
  parallel(rows, std::max<int64_t>(1, 16384 / dim), [&](int64_t i) { std::fill_n(dz + i * dim, dim, T(0)); });

  const double bound = score_bound(z, rows, zq, queued, dim, scale, normalize);
  const double from_queue =
      1 / boost * Pairs<T>(layout, z, dim, zq, queued, scale, bound).gradient(data<double>(logw), g, dz);
  if (labels)
    label_gradient<T>(layout, z, dim, scale, label_objective(objective), data<double>(coef), g, dz);
  else
    view_positives<T>(layout, z, dim, data<double>(coef), g, dz);

  const Storage storage = storage_of(dtype);
  const bool in_place = !labels && layout.whole() && dtype == scalar_type<T>;
  Tensor result = in_place ? dz_tensor : cpu_empty({count, layout.count, dim}, dtype);
  char* to = static_cast<char*>(result.data_ptr());
  std::vector<double> along(rows, 0.0);
  parallel(rows, std::max<int64_t>(1, 16384 / dim), [&](int64_t i) {
    if (!layout.owns(i)) return;
    T r = normalize ? data<T>(rnorm)[i] : T(0);
    along[i] = kernels<T>().finish_row(z + i * dim, dz + i * dim, dim, static_cast<T>(scale / boost), r);
    if (in_place) return;
    const int64_t place = map.owned_place(layout, i) * dim;
    kernels<T>().narrow(dz + i * dim, dim, r < 0, to + place * item_size(storage), storage);
  });

  // d loss / d scale = sum <z_i, dz_i> / scale, a pair of the batch counted for both of its rows, one with the queue
  // once.
  double total = 0;
  for (double a : along) total += a;
  double grad_scale = 0.5 * (total / scale - from_queue) + from_queue;
  Tensor grad_temperature = cpu_empty({}, ScalarType::Double);
  *data<double>(grad_temperature) = -scale * scale * grad_scale;
  return {result, grad_temperature};
}

}  // namespace

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> info_nce_forward(
    std::vector<Tensor> views,
    std::optional<Tensor> labels,
    std::optional<Tensor> queue,
    std::optional<Tensor> temperature_tensor,
    double temperature,
    int64_t objective,
    int64_t core_view,
    bool normalize,
    double eps,
    int64_t reduction,
    int64_t first,
    int64_t count) {
  STD_TORCH_CHECK(!views.empty() && views[0].dim() == 2, "info_nce_forward: expected a list of matrices");
  auto run = views[0].scalar_type() == ScalarType::Double ? forward<double> : forward<float>;
  Tables t =
      run(views,
          labels,
          queue,
          scale_of(temperature_tensor, temperature, views[0].scalar_type()),
          objective,
          core_view,
          normalize,
          eps,
          reduction,
          first,
          count);
  return {t.loss, t.z, t.rnorm, t.logw, t.coef, t.zq, t.order};
}

std::tuple<Tensor, Tensor> info_nce_backward(
    Tensor grad,
    Tensor z,
    Tensor rnorm,
    Tensor logw,
    Tensor coef,
    Tensor zq,
    Tensor order,
    std::optional<Tensor> labels,
    std::optional<Tensor> temperature_tensor,
    double temperature,
    int64_t num_views,
    int64_t batch,
    int64_t dim,
    int64_t objective,
    int64_t core_view,
    bool normalize,
    int64_t reduction,
    bool need_temperature,
    ScalarType dtype,
    int64_t first,
    int64_t count) {
  (void)batch;  // z has these two sizes here
  (void)dim;
  (void)need_temperature;  // it falls out of products that are needed anyway
  auto run = z.scalar_type() == ScalarType::Double ? backward<double> : backward<float>;
  return run(
      grad,
      z,
      rnorm,
      logw,
      coef,
      zq,
      order,
      labels,
      scale_of(temperature_tensor, temperature, z.scalar_type()),
      num_views,
      objective,
      core_view,
      normalize,
      reduction,
      dtype,
      first,
      count);
}

}  // namespace selfsup_kernels

STABLE_TORCH_LIBRARY_IMPL(selfsup_kernels, CPU, m) {
  m.impl("info_nce_forward.cpu", TORCH_BOX(&selfsup_kernels::info_nce_forward));
  m.impl("info_nce_backward.cpu", TORCH_BOX(&selfsup_kernels::info_nce_backward));
}
