#pragma once

#include <pybind11/pybind11.h>

namespace selfsup_kernels::launch {

// Binds the functions of selfsup_kernels._C.tape, with which Python records.
void bind(pybind11::module_& module);

}  // namespace selfsup_kernels::launch
