// The op ema_update_.cpu: one call for any list of tensors, one pass over their memory, no temporaries (except for
// pairs in different memory layouts).
#include "common/layouts.h"
#include "cpu/rows.h"

namespace selfsup_kernels {

namespace {

// A range of a target and its source, short enough that threads share the work evenly.
struct Span {
  char* target;
  const char* source;
  int64_t count;
  uint32_t stream;
  uint64_t offset;  // index of the first element in its tensor
  EmaSpan update;
};

constexpr int64_t span_length = 1 << 15;

void copy(Tensor to, const Tensor& from) { torch::stable::copy_(to, from); }

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
  std::vector<Tensor> keep;                           // the sources, or their packed copies, until the work is done
  std::vector<std::pair<Tensor, Tensor>> write_back;  // (target, its packed copy)
  for (size_t i = 0; i < targets.size(); ++i) {
    Tensor t = targets[i], s = sources[i];
    STD_TORCH_CHECK(t.is_cpu() && s.is_cpu() && same_shape(t, s), "ema_update_: expected CPU tensors of one shape");
    if (t.numel() == 0 || (t.data_ptr() == s.data_ptr() && t.scalar_type() == s.scalar_type())) continue;
    if (!is_floating(t.scalar_type()) || !is_floating(s.scalar_type())) {
      copy(t, s);
      continue;
    }
    if (!same_dense_layout(t, s)) {
      // Rare (channels_last against contiguous, a column of a matrix): use packed copies of both.
      s = torch::stable::contiguous(s);
      if (!t.is_contiguous()) {
        t = torch::stable::contiguous(t);
        write_back.push_back({targets[i], t});
      }
    }
    const Storage to = storage_of(t.scalar_type()), from = storage_of(s.scalar_type());
    keep.push_back(s);
    for (int64_t k = 0; k < t.numel(); k += span_length)
      spans.push_back(
          {static_cast<char*>(t.mutable_data_ptr()) + k * item_size(to),
           static_cast<const char*>(s.const_data_ptr()) + k * item_size(from),
           std::min(span_length, t.numel() - k),
           static_cast<uint32_t>(i),
           static_cast<uint64_t>(k),
           table.ema[static_cast<int>(to)][static_cast<int>(from)]});
  }

  // Each thread takes consecutive spans, of about equal total length.
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
  for (const auto& [target, values] : write_back) copy(target, values);
}

}  // namespace selfsup_kernels

STABLE_TORCH_LIBRARY_IMPL(selfsup_kernels, CPU, m) {
  m.impl("ema_update_.cpu", TORCH_BOX(&selfsup_kernels::ema_update_));
}
