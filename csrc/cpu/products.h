// Matrix products of tiles, through the libraries that torch ships.
//
// Two are used. `mm` is torch's BLAS. oneDNN, reached through the fused linear op, was measured about twice as fast in
// float32 on an AMD CPU with AVX-512 (Zen 5, torch 2.13's wheel, tiles of 256 x 256 x 128: 206 against 105 GFLOP/s on
// one core). CPUs of other vendors were not measured and use `mm`. The choice depends only on the CPU and the shape, so
// results are reproducible.
#pragma once

#include <cstdlib>
#include <cstring>

#include "cpu/kernels.h"
#include "cpu/tiles.h"

// Weak, since a torch built without oneDNN does not have this symbol; `mm` is used then.
extern "C" __attribute__((weak)) AOTITorchError aoti_torch_cpu__linear_pointwise(
    AtenTensorHandle x,
    AtenTensorHandle weight,
    AtenTensorHandle* bias,
    const char* attr,
    const double** scalars,
    int64_t scalars_len,
    const char** algorithm,
    AtenTensorHandle* result);

namespace selfsup_kernels {

// SELFSUP_KERNELS_MATMUL = blas | onednn overrides the choice.
inline bool prefers_onednn() {
  static const bool answer = [] {
    if (aoti_torch_cpu__linear_pointwise == nullptr) return false;
    const char* asked = std::getenv("SELFSUP_KERNELS_MATMUL");
    if (asked != nullptr && asked[0] != 0) return std::strcmp(asked, "onednn") == 0;
#if defined(__x86_64__)
    __builtin_cpu_init();
    return __builtin_cpu_is("amd") && __builtin_cpu_supports("avx512f");
#else
    return false;
#endif
  }();
  return answer;
}

// For small products the call of oneDNN's op costs more than the product.
template <typename T>
bool use_onednn(int64_t m, int64_t n, int64_t k) {
  return sizeof(T) == sizeof(float) && 2 * m * n * k >= 3'000'000 && prefers_onednn();
}

// a w^T; both are contiguous, or transposed views of contiguous matrices.
inline Tensor onednn_product(const Tensor& a, const Tensor& w) {
  AtenTensorHandle result;
  TORCH_ERROR_CODE_CHECK(
      aoti_torch_cpu__linear_pointwise(a.get(), w.get(), nullptr, "none", nullptr, 0, nullptr, &result));
  return Tensor(result);
}

// True if plain loops multiply rows x width with width x cols faster than the call of a library, as was measured. A
// short inner product takes as long as one of 64 features.
inline bool tiny_product(int64_t rows, int64_t cols, int64_t width) {
  return rows * cols * std::max<int64_t>(width, 64) <= 1 << 13;
}

// A scratch tile: rows x cols, and room for its transpose.
template <typename T>
struct Tile {
  int64_t rows, cols;
  T *values, *turned_values;
  std::optional<Tensor> plain, turned;  // rows x cols, cols x rows, both contiguous
  T* own = nullptr;
  std::optional<Tensor> own_plain;
};

// One scratch tile for each thread, with cached tensors over it for the shapes in use.
template <typename T>
class Tiles {
 public:
  Tiles(int64_t rows, int64_t cols, bool loops)
      : plain_(rows * cols), turned_(rows * cols), tiles_(std::max(threads(), thread_index() + 1)), loops_(loops) {}

  Tile<T>& get(int64_t thread, int64_t rows, int64_t cols) {
    std::vector<Tile<T>>& mine = tiles_[thread];
    for (Tile<T>& tile : mine)
      if (tile.rows == rows && tile.cols == cols) return tile;
    const Matrix<T> plain(plain_.at(thread), rows, cols, loops_), turned(turned_.at(thread), cols, rows, loops_);
    mine.push_back({rows, cols, plain.values, turned.values, plain.plain, turned.plain, plain.values, plain.plain});
    return mine.back();
  }

 private:
  Scratch<T> plain_, turned_;
  std::vector<std::vector<Tile<T>>> tiles_;
  bool loops_;
};

// tile <- a b^T, for rows a and rows b.
template <typename T>
void multiply(Tile<T>& tile, const Matrix<T>& a, const Matrix<T>& b) {
  const int64_t width = a.cols;
  if (!a.plain) {
    for (int64_t r = 0; r < a.rows; ++r)
      for (int64_t c = 0; c < b.rows; ++c)
        tile.values[r * b.rows + c] = kernels<T>().dot(a.values + r * width, b.values + c * width, width);
  } else if (use_onednn<T>(tile.rows, tile.cols, width)) {
    tile.plain = onednn_product(*a.plain, *b.plain);
    tile.values = data<T>(*tile.plain);
  } else {
    tile.plain = tile.own_plain;
    tile.values = tile.own;
    TORCH_ERROR_CODE_CHECK(aoti_torch_cpu_mm_out(tile.plain->get(), a.plain->get(), b.turned->get()));
  }
}

// out <- out + a b, for a contiguous a (out.rows x b.rows), as a tensor unless out and b are without.
template <typename T>
void multiply_add(const Matrix<T>& out, const T* values, const std::optional<Tensor>& a, const Matrix<T>& b) {
  const int64_t width = out.cols;
  if (!out.plain) {
    for (int64_t r = 0; r < out.rows; ++r)
      for (int64_t k = 0; k < b.rows; ++k)
        kernels<T>().add_scaled(out.values + r * width, b.values + k * width, values[r * b.rows + k], width);
  } else if (use_onednn<T>(out.rows, b.rows, width)) {
    Tensor product = onednn_product(*a, *b.turned);
    kernels<T>().add_scaled(out.values, data<T>(product), T(1), out.rows * width);
  } else {
    TORCH_ERROR_CODE_CHECK(
        aoti_torch_cpu_addmm_out(out.plain->get(), out.plain->get(), a->get(), b.plain->get(), 1, 1));
  }
}

}  // namespace selfsup_kernels
