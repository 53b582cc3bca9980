// Reads the user's rows, of any stride and floating dtype, as the arithmetic type.
#pragma once

#include <cmath>

#include "cpu/kernels.h"
#include "cpu/tiles.h"

namespace selfsup_kernels {

inline Storage storage_of(ScalarType dtype) {
  switch (dtype) {
    case ScalarType::Float:
      return Storage::Float;
    case ScalarType::Double:
      return Storage::Double;
    case ScalarType::BFloat16:
      return Storage::BFloat16;
    case ScalarType::Half:
      return Storage::Float16;
    default:
      STD_TORCH_CHECK(false, "expected a float64, float32, bfloat16 or float16 tensor");
  }
}

inline int64_t item_size(Storage storage) { return storage == Storage::Double ? 8 : storage == Storage::Float ? 4 : 2; }

template <typename T>
struct RowReader {
  struct Source {
    const char* base;
    int64_t row_stride, col_stride;  // bytes
  };
  std::vector<Source> sources;
  Storage storage;
  int64_t width;

  explicit RowReader(const std::vector<Tensor>& matrices)
      : storage(storage_of(matrices[0].scalar_type())), width(matrices[0].size(1)) {
    int64_t item = item_size(storage);
    for (const Tensor& m : matrices) {
      STD_TORCH_CHECK(m.is_cpu() && m.dim() == 2 && m.size(1) == width, "expected CPU matrices of one width");
      STD_TORCH_CHECK(m.scalar_type() == matrices[0].scalar_type(), "expected matrices of one dtype");
      sources.push_back({static_cast<const char*>(m.data_ptr()), m.stride(0) * item, m.stride(1) * item});
    }
  }

  // True if rows can be used in place.
  bool direct(int64_t source) const {
    return item_size(storage) == sizeof(T) && (sources[source].col_stride == sizeof(T) || width == 1);
  }

  // Returns the row as T, in place if possible, else in `scratch` (2 * width numbers).
  const T* read(int64_t source, int64_t row, T* scratch) const {
    const Source& from = sources[source];
    const char* p = from.base + row * from.row_stride;
    if (direct(source)) return reinterpret_cast<const T*>(p);
    int64_t item = item_size(storage);
    if (from.col_stride != item) {
      char* packed = reinterpret_cast<char*>(scratch + width);
      for (int64_t k = 0; k < width; ++k) std::memcpy(packed + k * item, p + k * from.col_stride, item);
      p = packed;
    }
    kernels<T>().widen(p, storage, width, scratch);
    return scratch;
  }

  // Prefetches a row that will soon be read, up to 4 KB of it, for reads that alternate between several sources.
  void prefetch(int64_t source, int64_t row) const {
    const Source& from = sources[source];
    const int64_t item = item_size(storage);
    if (from.col_stride != item) return;
    const char* p = from.base + row * from.row_stride;
    for (int64_t k = 0; k < std::min<int64_t>(width * item, 4096); k += 64) __builtin_prefetch(p + k);
  }
};

// z <- the rows (unit rows if `normalize`); row i is that of `place(i)`, a pair of a source and its row. `rnorm` <- 1 /
// max(|row|, eps), negated below eps; 1 without `normalize`.
template <typename T, typename Place>
void load_rows(
    const RowReader<T>& reader, int64_t rows, const Place& place, bool normalize, double eps, T* z, T* rnorm) {
  const int64_t dim = reader.width;
  parallel_ranges(0, rows, std::max<int64_t>(1, 16384 / dim), [&](int64_t begin, int64_t end) {
    std::vector<T> scratch(2 * dim);
    for (int64_t i = begin; i < end; ++i) {
      const auto [source, row] = place(i);
      const T* h = reader.read(source, row, scratch.data());
      if (normalize) {
        rnorm[i] = kernels<T>().unit_row(h, dim, eps, z + i * dim);
      } else {
        std::copy_n(h, dim, z + i * dim);
        rnorm[i] = 1;
      }
    }
  });
}

// Reads one number of a tensor, `offset` elements from its start.
inline double read_number(const Tensor& t, int64_t offset = 0) {
  Storage storage = storage_of(t.scalar_type());
  const char* p = static_cast<const char*>(t.data_ptr()) + offset * item_size(storage);
  if (storage == Storage::Double) return *reinterpret_cast<const double*>(p);
  float value;
  kernels<float>().widen(p, storage, 1, &value);
  return value;
}

// The upstream gradient of each of rows * cols losses; `grad` is () for a reduced loss, else (rows, cols).
struct Upstream {
  std::vector<double> values;
  int64_t row_stride = 0, col_stride = 0;

  Upstream(const Tensor& grad, int64_t reduction, int64_t rows, int64_t cols) {
    const double factor = reduction == 1 ? 1.0 / static_cast<double>(rows * cols) : 1.0;
    if (grad.dim() == 0) {
      values = {factor * read_number(grad)};
      return;
    }
    row_stride = cols;
    col_stride = 1;
    values.resize(rows * cols);
    const int64_t from_row = grad.stride(0), from_col = grad.stride(1);
    for (int64_t i = 0; i < rows; ++i)
      for (int64_t j = 0; j < cols; ++j) values[i * cols + j] = factor * read_number(grad, i * from_row + j * from_col);
  }
  double at(int64_t row, int64_t col) const { return values[row * row_stride + col * col_stride]; }
};

}  // namespace selfsup_kernels
