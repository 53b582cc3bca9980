// InfoNCE with labels: the pairs of one class, which are positives of each other.
#pragma once

#include "cpu/info_nce_layout.h"
#include "cpu/kernels.h"

namespace selfsup_kernels {

// Computes the losses and the backward's tables, log_weights (columns x rows) and positives (3 x rows) of `Saved`, from
// n, the log-sum-exp of each row's negatives (columns x rows, the queue last). An anchor without positives has loss 0
// and no gradient. `logq` (rows; or null) is subtracted from the scores of the rows as positives.
template <typename T>
void label_tables(
    const Call& call,
    const Layout& layout,
    T* z,
    const T* logq,
    double scale,
    const std::vector<double>& n,
    double* loss,
    double* log_weights,
    double* positives);

// dz += the positives' part of the gradient (before the factor `scale`).
template <typename T>
void label_gradient(
    const Call& call,
    const Layout& layout,
    T* z,
    const T* logq,
    double scale,
    const double* positives,
    const std::vector<double>& g,
    T* dz);

}  // namespace selfsup_kernels
