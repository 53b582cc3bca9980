#include "cpu/info_nce_layout.h"

#include <numeric>

namespace selfsup_kernels {

namespace {

int64_t read_id(const Tensor& ids, int64_t i) {
  const char* p = static_cast<const char*>(ids.data_ptr());
  int64_t k = i * ids.stride(0);
  switch (ids.scalar_type()) {
    case ScalarType::Long:
      return reinterpret_cast<const int64_t*>(p)[k];
    case ScalarType::Int:
      return reinterpret_cast<const int32_t*>(p)[k];
    case ScalarType::Short:
      return reinterpret_cast<const int16_t*>(p)[k];
    case ScalarType::Char:
      return reinterpret_cast<const int8_t*>(p)[k];
    case ScalarType::Byte:
      return reinterpret_cast<const uint8_t*>(p)[k];
    default:
      STD_TORCH_CHECK(false, "ids: expected int64, int32, int16, int8 or uint8");
  }
}

std::vector<int64_t> read_ids(const Tensor& ids, int64_t batch) {
  STD_TORCH_CHECK(ids.dim() == 1 && ids.size(0) == batch, "ids: expected one for each sample");
  std::vector<int64_t> all(batch);
  for (int64_t i = 0; i < batch; ++i) all[i] = read_id(ids, i);
  return all;
}

Layout layout_of(const Call& call) {
  Layout layout;
  layout.views = call.num_views;
  layout.batch = call.batch;
  layout.rows = call.num_views * call.batch;
  layout.first = call.count < 0 ? 0 : call.first;
  layout.count = call.count < 0 ? call.batch : call.count;
  STD_TORCH_CHECK(
      layout.first >= 0 && layout.first + layout.count <= call.batch, "first, count: expected a part of the batch");
  layout.rule = {
      static_cast<Columns>(call.columns),
      static_cast<Positives>(call.inside),
      static_cast<Numerator>(call.numerator),
      static_cast<int>(call.num_views),
      static_cast<int>(call.core_view),
      call.queue_rows > 0 ? 1 : 0};
  return layout;
}

}  // namespace

Layout view_layout(const Call& call, const std::optional<Tensor>& ids) {
  Layout layout = layout_of(call);
  if (ids) {
    layout.crossed = call.ids == static_cast<int64_t>(Ids::LABELS);
    const std::vector<int64_t> id = read_ids(*ids, call.batch);
    layout.by_id.resize(call.batch);
    std::iota(layout.by_id.begin(), layout.by_id.end(), 0);
    std::stable_sort(layout.by_id.begin(), layout.by_id.end(), [&](int64_t a, int64_t b) { return id[a] < id[b]; });
    layout.sharing.resize(call.batch);
    for (int64_t begin = 0, end; begin < call.batch; begin = end) {
      for (end = begin; end < call.batch && id[layout.by_id[end]] == id[layout.by_id[begin]];) ++end;
      for (int64_t k = begin; k < end; ++k) layout.sharing[layout.by_id[k]] = {begin, end};
    }
  }
  layout.cut_blocks();
  return layout;
}

Layout label_layout(const Call& call, const Tensor& labels, int64_t* order, bool sort) {
  const int64_t batch = call.batch, views = call.num_views;
  const std::vector<int64_t> label = read_ids(labels, batch);
  Layout layout = layout_of(call);
  layout.rule.views = 1;
  layout.labels = true;
  int64_t* const others = order + layout.count;  // the samples that are not owned
  if (sort) {
    int64_t *own = order, *other = others;
    for (int64_t i = 0; i < batch; ++i) *(layout.first <= i && i < layout.first + layout.count ? own : other)++ = i;
    auto by_label = [&](int64_t a, int64_t b) { return label[a] < label[b]; };
    std::stable_sort(order, others, by_label);
    std::stable_sort(others, order + batch, by_label);
  }
  // Merge the classes of both parts in ascending order.
  layout.class_of.resize(layout.rows);
  const int64_t ends[2] = {layout.count, batch};
  for (int64_t at[2] = {0, layout.count}; at[0] < ends[0] || at[1] < ends[1];) {
    int64_t lowest = std::numeric_limits<int64_t>::max();
    for (int part : {0, 1})
      if (at[part] < ends[part]) lowest = std::min(lowest, label[order[at[part]]]);
    Layout::Class rows;
    for (int part : {0, 1}) {
      rows.runs[part].begin = at[part] * views;
      while (at[part] < ends[part] && label[order[at[part]]] == lowest) ++at[part];
      rows.runs[part].end = at[part] * views;
    }
    for (const Layout::Run& run : rows.runs)
      for (int64_t row = run.begin; row < run.end; ++row) layout.class_of[row] = rows;
  }
  layout.cut_blocks();
  return layout;
}

}  // namespace selfsup_kernels
