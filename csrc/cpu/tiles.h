// The basis for tiles of inner products: tensors and scratch memory, blocks of rows, parallel loops.
#pragma once

#include <torch/csrc/inductor/aoti_torch/generated/c_shim_cpu.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#if defined(__linux__)
#include <sys/mman.h>
#endif

#include <algorithm>
#include <array>
#include <cstdint>
#include <optional>
#include <vector>

namespace selfsup_kernels {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

template <typename T>
constexpr ScalarType scalar_type = sizeof(T) == 8 ? ScalarType::Double : ScalarType::Float;

// Requests large pages for a large new tensor. The first write to each page costs a page fault, which for 4 KB pages
// takes several times as long as the writing. Only whole large pages inside the tensor are requested, and all of them
// will be written, so no more memory is used.
inline void use_large_pages(void* p, int64_t bytes) {
#if defined(__linux__)
  constexpr uintptr_t page = 2 << 20;
  uintptr_t begin = (reinterpret_cast<uintptr_t>(p) + page - 1) / page * page;
  uintptr_t end = (reinterpret_cast<uintptr_t>(p) + bytes) / page * page;
  if (begin < end) madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);  // only advice: may fail
#endif
}

// A new contiguous tensor. Not `torch::stable::empty`, whose arguments the dispatcher boxes and unboxes: for small
// tensors that takes several times as long as the allocation.
inline Tensor cpu_empty(std::initializer_list<int64_t> sizes, ScalarType dtype) {
  std::array<int64_t, 4> strides;
  STD_TORCH_CHECK(sizes.size() <= strides.size(), "cpu_empty: expected at most 4 dimensions");
  int64_t stride = 1, count = 1;
  for (size_t d = sizes.size(); d-- > 0;) {
    const int64_t size = sizes.begin()[d];
    strides[d] = stride;
    stride *= std::max<int64_t>(size, 1);
    count *= size;
  }
  const auto type = torch::stable::detail::to<int32_t>(torch::stable::detail::from(dtype));
  AtenTensorHandle handle;
  TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(
      static_cast<int64_t>(sizes.size()),
      sizes.begin(),
      strides.data(),
      type,
      aoti_torch_device_type_cpu(),
      0,
      &handle));
  Tensor t(handle);
  if (count >= 1 << 20)
    use_large_pages(
        t.data_ptr(),
        count * (dtype == ScalarType::Double || dtype == ScalarType::Long ? 8
                 : dtype == ScalarType::Float                             ? 4
                                                                          : 2));
  return t;
}

template <typename T>
T* data(const Tensor& t) {
  return static_cast<T*>(t.data_ptr());
}

// A contiguous matrix over memory that it does not own. The matrix libraries take it as a tensor, or as a transposed
// one. These are created once, since creating one costs as much as multiplying a small tile; without them, `multiply`
// and `multiply_add` are plain loops.
template <typename T>
struct Matrix {
  T* values;
  int64_t rows, cols;
  std::optional<Tensor> plain, turned;

  Matrix(T* values, int64_t rows, int64_t cols, bool loops) : values(values), rows(rows), cols(cols) {
    if (loops) return;
    plain = tensor(rows, cols, cols, 1);
    turned = tensor(cols, rows, 1, cols);
  }

 private:
  Tensor tensor(int64_t height, int64_t width, int64_t row_stride, int64_t col_stride) const {
    int64_t sizes[] = {height, width}, strides[] = {row_stride, col_stride};
    return torch::stable::from_blob(
        values,
        torch::headeronly::IntHeaderOnlyArrayRef(sizes, 2),
        torch::headeronly::IntHeaderOnlyArrayRef(strides, 2),
        torch::stable::Device(torch::headeronly::DeviceType::CPU),
        scalar_type<T>);
  }
};

inline int64_t threads() { return torch::stable::get_num_threads(); }
inline int64_t thread_index() {
  uint32_t index;
  TORCH_ERROR_CODE_CHECK(torch_get_thread_idx(&index));
  return index;
}

// Rows 0..size cut into ranges: begin[i] .. begin[i + 1].
struct Blocks {
  std::vector<int64_t> begin{0};

  int64_t count() const { return static_cast<int64_t>(begin.size()) - 1; }
  int64_t rows(int64_t i) const { return begin[i + 1] - begin[i]; }
  int64_t longest() const {
    int64_t n = 0;
    for (int64_t i = 0; i < count(); ++i) n = std::max(n, rows(i));
    return n;
  }
  // Adds size more rows in pieces of nearly equal length, none over `limit`.
  void add_even(int64_t size, int64_t limit) {
    int64_t pieces = (size + limit - 1) / limit, start = begin.back();
    for (int64_t k = 1; k <= pieces; ++k) begin.push_back(start + size * k / pieces);
  }
};

// The maximum block length for a number of rows. Large tiles multiply at full rate and fit in the L2 cache; with few
// rows, smaller tiles give work to every thread. It depends on `rows` only, so that results do too.
inline int64_t block_limit(int64_t rows) { return rows >= 2048 ? 256 : rows >= 512 ? 128 : 64; }

inline Blocks cut(int64_t size, int64_t limit) {
  Blocks blocks;
  blocks.add_even(size, limit);
  return blocks;
}

// As torch::stable::parallel_for, which even for one piece of work asks about threads.
template <typename Ranges>
void parallel_ranges(int64_t begin, int64_t end, int64_t grain, const Ranges& ranges) {
  if (end - begin > grain)
    torch::stable::parallel_for(begin, end, grain, ranges);
  else if (end > begin)
    ranges(begin, end);
}

template <typename Visit>
void parallel(int64_t count, int64_t grain, const Visit& visit) {
  parallel_ranges(0, count, grain, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) visit(i);
  });
}

// Calls visit(task) for tasks that multiply matrices. Opens a parallel region even for one task, so that the matrix
// library inside runs on one thread and sums in the same order for any number of threads.
template <typename Visit>
void parallel_products(int64_t tasks, const Visit& visit) {
  if (tasks == 0) return;
  parallel(std::max<int64_t>(tasks, 2), 1, [&](int64_t task) {
    if (task < tasks) visit(task);
  });
}

// Returns the blocks of rows of a matrix.
template <typename T>
std::vector<Matrix<T>> block_rows(T* rows, int64_t width, const Blocks& blocks, bool loops) {
  std::vector<Matrix<T>> all;
  all.reserve(blocks.count());
  for (int64_t i = 0; i < blocks.count(); ++i)
    all.emplace_back(rows + blocks.begin[i] * width, blocks.rows(i), width, loops);
  return all;
}

// Scratch memory, `size` numbers for each thread.
template <typename T>
class Scratch {
 public:
  explicit Scratch(int64_t size)
      : size_((size + 63) / 64 * 64),
        // Inside a caller's parallel region everything here runs on the calling thread, whose index must fit too.
        memory_(cpu_empty({std::max(threads(), thread_index() + 1), size_}, scalar_type<T>)) {}
  T* at(int64_t thread) const { return data<T>(memory_) + thread * size_; }

 private:
  int64_t size_;
  Tensor memory_;
};

}  // namespace selfsup_kernels
