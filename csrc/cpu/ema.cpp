// The op ema_update_.cpu: one call for any list of tensors, one pass over their memory, no temporaries.
#include "cpu/rows.h"

namespace selfsup_kernels {

namespace {

// One stretch of memory of a target and its source, at most so long that threads share the work evenly.
struct Span {
  char* target;
  const char* source;
  int64_t count;
  uint32_t stream;
  uint64_t offset;  // of the first element in its tensor
  EmaSpan update;   // null: copy the bytes
  int64_t item;
};

constexpr int64_t span_length = 1 << 15;

void check_overlap_free(const Tensor& t) {
  for (int64_t d = 0; d < t.dim(); ++d)
    STD_TORCH_CHECK(t.size(d) <= 1 || t.stride(d) != 0, "ema_update_: expanded destination");
}

// Whether both lie in memory in the same order without holes, so that they can be read as vectors.
bool same_dense_layout(const Tensor& a, const Tensor& b) {
  if (a.is_contiguous() && b.is_contiguous()) return true;
  std::vector<std::pair<int64_t, int64_t>> dims;  // (stride, size)
  for (int64_t d = 0; d < a.dim(); ++d) {
    if (a.size(d) == 1) continue;
    if (a.stride(d) != b.stride(d)) return false;
    dims.push_back({a.stride(d), a.size(d)});
  }
  std::sort(dims.begin(), dims.end());
  int64_t expected = 1;
  for (auto [stride, size] : dims) {
    if (stride != expected) return false;
    expected *= size;
  }
  return true;
}

void add_strided(
    std::vector<Span>& spans, Span first, const Tensor& t, const Tensor& s, int64_t t_item, int64_t s_item) {
  // The innermost dimension in one span if both are packed there, else element by element.
  const int64_t dims = t.dim();
  const bool packed = t.stride(dims - 1) == 1 && s.stride(dims - 1) == 1;
  const int64_t inner = packed ? t.size(dims - 1) : 1, outer = t.numel() / inner;
  const int64_t walked = packed ? dims - 1 : dims;
  std::vector<int64_t> index(dims, 0);
  for (int64_t k = 0; k < outer; ++k) {
    Span span = first;
    int64_t at_target = 0, at_source = 0;
    for (int64_t d = 0; d < walked; ++d) {
      at_target += index[d] * t.stride(d);
      at_source += index[d] * s.stride(d);
    }
    span.target += at_target * t_item;
    span.source += at_source * s_item;
    span.count = inner;
    span.offset = static_cast<uint64_t>(k) * inner;
    spans.push_back(span);
    for (int64_t d = walked - 1; d >= 0 && ++index[d] == t.size(d); --d) index[d] = 0;
  }
}

bool is_floating(ScalarType t) {
  return t == ScalarType::Float || t == ScalarType::Double || t == ScalarType::BFloat16 || t == ScalarType::Half;
}

void copy_any(const Tensor& target, const Tensor& source) {
  Tensor to = target;
  torch::stable::copy_(to, source);
}

}  // namespace

void ema_update_(
    std::vector<Tensor> targets,
    std::vector<Tensor> sources,
    std::optional<Tensor> momentum_tensor,
    double momentum,
    std::optional<Tensor> seed_tensor) {
  STD_TORCH_CHECK(targets.size() == sources.size(), "ema_update_: expected lists of one length");
  const double weight = 1 - (momentum_tensor ? read_number(*momentum_tensor) : momentum);
  const int64_t* seed = seed_tensor ? static_cast<const int64_t*>(seed_tensor->data_ptr()) : nullptr;
  const KernelTable& table = kernel_table();

  std::vector<Span> spans;
  for (size_t i = 0; i < targets.size(); ++i) {
    const Tensor &t = targets[i], &s = sources[i];
    STD_TORCH_CHECK(
        t.is_cpu() && s.is_cpu() && t.numel() == s.numel() && t.dim() == s.dim(), "ema_update_: shapes differ");
    if (t.numel() == 0 || (t.data_ptr() == s.data_ptr() && t.scalar_type() == s.scalar_type())) continue;
    if (!is_floating(t.scalar_type()) || !is_floating(s.scalar_type())) {
      copy_any(t, s);
      continue;
    }
    check_overlap_free(t);
    const Storage to = storage_of(t.scalar_type()), from = storage_of(s.scalar_type());
    const int64_t t_item = item_size(to), s_item = item_size(from);
    Span span{
        static_cast<char*>(t.mutable_data_ptr()),
        static_cast<const char*>(s.const_data_ptr()),
        t.numel(),
        static_cast<uint32_t>(i),
        0,
        table.ema[static_cast<int>(to)][static_cast<int>(from)],
        t_item};
    if (!same_dense_layout(t, s)) {
      add_strided(spans, span, t, s, t_item, s_item);
      continue;
    }
    for (int64_t k = 0; k < t.numel(); k += span_length) {
      Span piece = span;
      piece.target += k * t_item;
      piece.source += k * s_item;
      piece.count = std::min(span_length, t.numel() - k);
      piece.offset = k;
      spans.push_back(piece);
    }
  }

  // Threads take runs of spans of about equal total length.
  std::vector<int64_t> before(spans.size() + 1, 0);
  for (size_t k = 0; k < spans.size(); ++k) before[k + 1] = before[k] + spans[k].count;
  const int64_t total = before.back();
  torch::stable::parallel_for(0, total, span_length, [&](int64_t begin, int64_t end) {
    size_t k = std::lower_bound(before.begin(), before.end(), begin) - before.begin();
    for (; k < spans.size() && before[k] < end; ++k) {
      const Span& span = spans[k];
      span.update(span.target, span.source, span.count, weight, seed, span.stream, span.offset);
    }
  });
}

}  // namespace selfsup_kernels

STABLE_TORCH_LIBRARY_IMPL(selfsup_kernels, CPU, m) {
  m.impl("ema_update_.cpu", TORCH_BOX(&selfsup_kernels::ema_update_));
}
