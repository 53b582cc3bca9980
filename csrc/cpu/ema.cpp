// The moving average of lists of tensors: the op ema_update_.cpu, and two ops that check lists for their callers, so
// that Python does not have to look at each tensor. An update takes one pass over memory, without temporaries (except
// for pairs in different memory layouts).
#include <Python.h>

#include "common/layouts.h"
#include "cpu/rows.h"

namespace selfsup_kernels {

namespace {

using torch::stable::detail::from;
using torch::stable::detail::to;

enum class Kind : uint8_t { Other, Integer, Complex, Floating };
struct Dtype {
  Kind kind = Kind::Other;
  Storage storage = Storage::Float;  // of a floating dtype
};

// Dtypes by the codes that aoti_torch_get_dtype returns.
Dtype dtype_of(int32_t code) {
  static const std::array<Dtype, 256> table = [] {
    std::array<Dtype, 256> dtypes{};
    for (int32_t integer :
         {aoti_torch_dtype_bool(),
          aoti_torch_dtype_uint8(),
          aoti_torch_dtype_int8(),
          aoti_torch_dtype_uint16(),
          aoti_torch_dtype_int16(),
          aoti_torch_dtype_uint32(),
          aoti_torch_dtype_int32(),
          aoti_torch_dtype_uint64(),
          aoti_torch_dtype_int64()})
      dtypes[integer] = {Kind::Integer};
    for (int32_t pair : {aoti_torch_dtype_complex32(), aoti_torch_dtype_complex64(), aoti_torch_dtype_complex128()})
      dtypes[pair] = {Kind::Complex};
    dtypes[aoti_torch_dtype_float32()] = {Kind::Floating, Storage::Float};
    dtypes[aoti_torch_dtype_float64()] = {Kind::Floating, Storage::Double};
    dtypes[aoti_torch_dtype_bfloat16()] = {Kind::Floating, Storage::BFloat16};
    dtypes[aoti_torch_dtype_float16()] = {Kind::Floating, Storage::Float16};
    return dtypes;
  }();
  return code >= 0 && code < 256 ? table[code] : Dtype{};
}

// What checks and kernels need to know of a strided tensor, which it does not own.
struct View {
  AtenTensorHandle handle;
  int32_t code;  // of the dtype
  Dtype dtype;
  int64_t dims, count;
  int64_t *sizes, *strides;
  bool contiguous;
  void* address;

  explicit View(AtenTensorHandle tensor) : handle(tensor), count(1), contiguous(true) {
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(handle, &code));
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_dim(handle, &dims));
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_sizes(handle, &sizes));
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_strides(handle, &strides));
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_data_ptr(handle, &address));
    dtype = dtype_of(code);
    for (int64_t d = dims; d-- > 0;) {
      contiguous = contiguous && (sizes[d] == 1 || strides[d] == count);
      count *= sizes[d];
    }
    contiguous = contiguous || count == 0;
  }

  int64_t dim() const { return dims; }
  int64_t size(int64_t d) const { return sizes[d]; }
  int64_t stride(int64_t d) const { return strides[d]; }
  bool is_contiguous() const { return contiguous; }
  int64_t item_size() const { return static_cast<int64_t>(aoti_torch_dtype_element_size(code)); }

  Tensor tensor() const {
    AtenTensorHandle own;
    TORCH_ERROR_CODE_CHECK(aoti_torch_new_tensor_handle(handle, &own));
    return Tensor(own);
  }
};

// ---- the update ----

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

void copy_bytes(void* target, const void* source, int64_t n, double, const int64_t*, uint32_t, uint64_t) {
  std::memcpy(target, source, n);
}

// The work of an update. Nothing is written before run().
class Work {
 public:
  explicit Work(size_t pairs) { spans_.reserve(pairs); }

  // Averages a pair of floating tensors if `average`; copies other pairs. `stream` identifies the target.
  void add(const View& t, const View& s, uint32_t stream, bool average) {
    if (t.count == 0 || (t.address == s.address && t.code == s.code)) return;
    average = average && t.dtype.kind == Kind::Floating && s.dtype.kind == Kind::Floating;
    const bool flat = same_dense_layout(t, s);
    if (!average) {
      if (flat && t.code == s.code && t.dtype.kind != Kind::Other)
        add_spans(t.address, s.address, t.count * t.item_size(), 1, 1, stream, copy_bytes);
      else
        write_back_.push_back({t.tensor(), s.tensor()});
      return;
    }
    const Storage to = t.dtype.storage, from = s.dtype.storage;
    const EmaSpan kernel = kernel_table().ema[static_cast<int>(to)][static_cast<int>(from)];
    void *target = t.address, *source = s.address;
    if (!flat) {
      // Rare (channels_last against contiguous, a column of a matrix): use packed copies of both.
      keep_.push_back(torch::stable::contiguous(s.tensor()));
      source = keep_.back().data_ptr();
      if (!t.contiguous) {
        write_back_.push_back({t.tensor(), torch::stable::contiguous(t.tensor())});
        target = write_back_.back().second.data_ptr();
      }
    }
    add_spans(target, source, t.count, item_size(to), item_size(from), stream, kernel);
  }

  void run(double weight, const int64_t* seed) {
    // Each thread takes consecutive spans, of about equal total length.
    std::vector<int64_t> before(spans_.size() + 1, 0);
    for (size_t k = 0; k < spans_.size(); ++k) before[k + 1] = before[k] + spans_[k].count;
    const int64_t total = before.back();
    torch::stable::parallel_for(0, total, span_length, [&](int64_t begin, int64_t end) {
      size_t k = std::lower_bound(before.begin(), before.end(), begin) - before.begin();
      for (; k < spans_.size() && before[k] < end; ++k) {
        const Span& span = spans_[k];
        span.update(span.target, span.source, span.count, weight, seed, span.stream, span.offset);
      }
    });
    for (auto& [target, values] : write_back_) torch::stable::copy_(target, values);
  }

 private:
  void add_spans(
      void* target, const void* source, int64_t count, int64_t to, int64_t from, uint32_t stream, EmaSpan kernel) {
    for (int64_t k = 0; k < count; k += span_length)
      spans_.push_back(
          {static_cast<char*>(target) + k * to,
           static_cast<const char*>(source) + k * from,
           std::min(span_length, count - k),
           stream,
           static_cast<uint64_t>(k),
           kernel});
  }

  std::vector<Span> spans_;
  std::vector<Tensor> keep_;                           // packed copies
  std::vector<std::pair<Tensor, Tensor>> write_back_;  // (target, its packed copy or its source)
};

// ---- the checks ----

// The list arguments of an op, taken from its stack.
class Lists {
 public:
  std::vector<AtenTensorHandle> targets, sources;

  explicit Lists(const StableIValue* stack) {
    take(stack[0], targets);
    take(stack[1], sources);
  }
  Lists(const Lists&) = delete;
  ~Lists() {
    // The last handle of a tensor lets go of its Python object. This would take the lock for every tensor.
    const PyGILState_STATE lock = PyGILState_Ensure();
    for (const auto* list : {&targets, &sources})
      for (AtenTensorHandle tensor : *list) aoti_torch_delete_tensor_object(tensor);
    PyGILState_Release(lock);
  }

 private:
  static void take(StableIValue argument, std::vector<AtenTensorHandle>& tensors) {
    const auto list = to<StableListHandle>(argument);
    size_t size = 0;
    TORCH_ERROR_CODE_CHECK(torch_list_size(list, &size));
    tensors.resize(size);
    for (size_t i = 0; i < size; ++i) {
      StableIValue item;
      TORCH_ERROR_CODE_CHECK(torch_list_get_item(list, i, &item));
      tensors[i] = to<AtenTensorHandle>(item);
    }
    TORCH_ERROR_CODE_CHECK(torch_delete_list(list));
  }
};

// Bytes [first, last).
struct Range {
  uintptr_t first;
  uintptr_t last : 63;
  uintptr_t written : 1;
};

// The number of the device of a tensor that has plain addresses: dense, on the CPU (-1) or on a GPU. Else nothing.
std::optional<int32_t> device_of(AtenTensorHandle tensor) {
  int32_t layout, type, index = -1;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_layout(tensor, &layout));
  if (layout != aoti_torch_layout_strided()) return {};
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(tensor, &type));
  if (type == aoti_torch_device_type_cpu()) return index;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_index(tensor, &index));
  return type == aoti_torch_device_type_cuda() ? std::optional(index) : std::nullopt;
}

// The address range of a tensor, which may have gaps.
Range range_of(const View& t, bool written) {
  int64_t count = t.count;
  if (!t.contiguous) {
    count = 1;
    for (int64_t d = 0; d < t.dims; ++d) count += (t.sizes[d] - 1) * t.strides[d];
  }
  const auto first = reinterpret_cast<uintptr_t>(t.address);
  return {first, first + count * t.item_size(), written};
}

// False if two elements may share memory: true if every dimension steps over all smaller ones.
bool has_nested_strides(const View& t) {
  std::vector<std::pair<int64_t, int64_t>> dims;  // (stride, last index)
  for (int64_t d = 0; d < t.dims; ++d)
    if (t.sizes[d] > 1) dims.push_back({t.strides[d], t.sizes[d] - 1});
  std::sort(dims.begin(), dims.end());
  int64_t extent = 0;
  for (auto [stride, last] : dims) {
    if (stride <= extent) return false;
    extent += stride * last;
  }
  return true;
}

// Checks an update of pairs in any order, the first `averaged` of which are averaged and the others copied, and adds
// the pairs to `work`. Returns the number of pairs without elements; nothing if a pair may be invalid, or needs
// operators of its own: Python then looks at each tensor.
std::optional<int64_t> check(const Lists& lists, size_t averaged, Work* work) {
  // Freed memory leaves an address which is an offset, lower than any allocator's addresses.
  constexpr uintptr_t lowest = uintptr_t{1} << 32;
  const size_t n = lists.targets.size();
  if (n != lists.sources.size()) return {};
  int64_t empty = 0;
  std::vector<Range> ranges;
  ranges.reserve(2 * n);
  const auto device = n > 0 ? device_of(lists.targets[0]) : std::nullopt;
  if (work && device != -1) return {};  // the kernels take CPU tensors
  for (size_t i = 0; i < n; ++i) {
    for (AtenTensorHandle tensor : {lists.targets[i], lists.sources[i]})
      if (!device || device_of(tensor) != device) return {};
    const View t(lists.targets[i]), s(lists.sources[i]);
    const Kind kind = t.dtype.kind;
    const bool one_kind = kind == Kind::Floating ? s.dtype.kind == kind : t.code == s.code;
    if (!one_kind || kind == Kind::Other || (kind == Kind::Complex && i < averaged) || !same_shape(t, s)) return {};
    if (t.count == 0) {
      ++empty;
      continue;
    }
    if (!t.contiguous && !has_nested_strides(t)) return {};
    if (work && !same_dense_layout(t, s)) return {};  // PyTorch copies these, and may refuse after other writes
    ranges.push_back(range_of(t, true));
    ranges.push_back(range_of(s, false));
    if (work) work->add(t, s, static_cast<uint32_t>(i), i < averaged);
  }
  std::sort(ranges.begin(), ranges.end(), [](const Range& a, const Range& b) { return a.first < b.first; });
  uintptr_t written = lowest, used = lowest;  // the ends of the ranges so far
  for (const Range& range : ranges) {
    if (range.first < (range.written ? used : written)) return {};
    used = std::max<uintptr_t>(used, range.last);
    if (range.written) written = std::max<uintptr_t>(written, range.last);
  }
  return empty;
}

// Boxed kernels by hand: a vector of Tensors would take an allocation for each tensor.
void ema_check_pairs(StableIValue* stack, uint64_t, uint64_t) {
  const Lists lists(stack);
  stack[0] = from(check(lists, to<bool>(stack[2]) ? lists.targets.size() : 0, nullptr).value_or(-1));
}

void ema_update_pairs_(StableIValue* stack, uint64_t, uint64_t) {
  const Lists lists(stack);
  const auto averaged = static_cast<size_t>(to<int64_t>(stack[2]));
  const double momentum = to<double>(stack[3]);
  Work work(lists.targets.size());
  const bool fine = check(lists, averaged, &work).has_value();
  if (fine) work.run(1 - momentum, nullptr);
  stack[0] = from(fine);
}

// Tensors whose memory holds other numbers than theirs.
void refuse_check(StableIValue* stack, uint64_t, uint64_t) {
  {
    const Lists lists(stack);
  }
  stack[0] = from(int64_t{-1});
}
void refuse_update(StableIValue* stack, uint64_t, uint64_t) {
  {
    const Lists lists(stack);
  }
  stack[0] = from(false);
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
  Work work(targets.size());
  for (size_t i = 0; i < targets.size(); ++i) {
    const Tensor &t = targets[i], &s = sources[i];
    STD_TORCH_CHECK(t.is_cpu() && s.is_cpu() && same_shape(t, s), "ema_update_: expected CPU tensors of one shape");
    work.add(View(t.get()), View(s.get()), static_cast<uint32_t>(i), true);
  }
  work.run(weight, seed);
}

}  // namespace selfsup_kernels

STABLE_TORCH_LIBRARY_IMPL(selfsup_kernels, CPU, m) {
  m.impl("ema_update_.cpu", TORCH_BOX(&selfsup_kernels::ema_update_));
}
STABLE_TORCH_LIBRARY_IMPL(selfsup_kernels, CompositeExplicitAutograd, m) {
  m.impl("ema_check_pairs", &selfsup_kernels::ema_check_pairs);
  m.impl("ema_update_pairs_", &selfsup_kernels::ema_update_pairs_);
}
STABLE_TORCH_LIBRARY_IMPL(selfsup_kernels, Conjugate, m) {
  m.impl("ema_check_pairs", &selfsup_kernels::refuse_check);
  m.impl("ema_update_pairs_", &selfsup_kernels::refuse_update);
}
STABLE_TORCH_LIBRARY_IMPL(selfsup_kernels, Negative, m) {
  m.impl("ema_check_pairs", &selfsup_kernels::refuse_check);
  m.impl("ema_update_pairs_", &selfsup_kernels::refuse_update);
}
STABLE_TORCH_LIBRARY_IMPL(selfsup_kernels, ZeroTensor, m) {
  m.impl("ema_check_pairs", &selfsup_kernels::refuse_check);
  m.impl("ema_update_pairs_", &selfsup_kernels::refuse_update);
}
