// The table of one instruction set. Included once by each kernels_<capability>.cpp; see simd.h for the rules.
#pragma once

#include "cpu/kernels_ema.h"
#include "cpu/kernels_info_nce.h"
#include "cpu/kernels_rows.h"
#include "cpu/kernels_siglip.h"

namespace selfsup_kernels::SK_ARCH {

template <typename T>
constexpr Kernels<T> make_kernels() {
  return {
      exp_sums<T>,
      exp_gradient<T>,
      exp_rows<T>,
      row_max<T>,
      label_sums<T>,
      label_softplus<T>,
      label_gradient<T>,
      sigmoid_pairs<T>,
      unit_row<T>,
      dot<T>,
      add_scaled<T>,
      finish_row<T>,
      byol_forward<T>,
      byol_backward<T>,
      widen<T>,
      narrow<T>};
}

#define SK_EMA_ROW(Target) \
  {ema_span<Target, float>, ema_span<Target, double>, ema_span<Target, BFloat16>, ema_span<Target, Float16>}

}  // namespace selfsup_kernels::SK_ARCH

namespace selfsup_kernels {

using namespace SK_ARCH;

const KernelTable SK_TABLE = {
    SK_NAME,
    make_kernels<float>(),
    make_kernels<double>(),
    {SK_EMA_ROW(float), SK_EMA_ROW(double), SK_EMA_ROW(BFloat16), SK_EMA_ROW(Float16)}};

}  // namespace selfsup_kernels
