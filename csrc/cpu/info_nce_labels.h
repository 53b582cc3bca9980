// InfoNCE with labels: the pairs of one class, which are positives of each other.
#pragma once

#include "cpu/info_nce_layout.h"
#include "cpu/kernels.h"

namespace selfsup_kernels {

// From n, the log-sum-exp of each row's negatives ([column][row], the queue last), to the losses and the tables of the
// backward: logw (rows x columns) and coef (rows x 4): log-denominator, log-sum-exp of the positives, 1 / count of
// them, log-sum-exp of all negatives. A row without positives has loss 0 and pushes nothing away.
template <typename T>
void label_tables(
    const Layout& layout,
    T* z,
    int64_t dim,
    double scale,
    LabelObjective objective,
    const std::vector<double>& n,
    double* loss,
    double* logw,
    double* coef);

// dz += the positives' part of the gradient (before the factor `scale`).
template <typename T>
void label_gradient(
    const Layout& layout,
    T* z,
    int64_t dim,
    double scale,
    LabelObjective objective,
    const double* coef,
    const std::vector<double>& g,
    T* dz);

}  // namespace selfsup_kernels
