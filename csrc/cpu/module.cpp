// The Python module selfsup_kernels._C. Importing it registers the CPU kernels of the ops. It binds only functions
// without a tensor schema.
#include <pybind11/pybind11.h>

#include "cpu/kernels.h"
#include "cpu/module_tree.h"
#include "launch/bind.h"

#define SK_STRING_(x) #x
#define SK_STRING(x) SK_STRING_(x)

PYBIND11_MODULE(_C, m) {
  m.doc() = "CPU kernels of selfsup_kernels.";
  m.def(
      "cpu_capability",
      [] { return std::string(selfsup_kernels::kernel_table().name); },
      "The instruction set that the CPU kernels use here: default, avx2 or avx512.");
  auto tape = m.def_submodule("tape");
  selfsup_kernels::launch::bind(tape);
  m.def(
      "build_info",
      [] {
        pybind11::dict info;
#if defined(__clang__)
        info["compiler"] = "clang " __clang_version__;
#elif defined(__GNUC__)
        info["compiler"] = "gcc " __VERSION__;
#else
        info["compiler"] = "unknown";
#endif
        info["torch_target"] = SK_STRING(TORCH_TARGET_VERSION);
        info["cplusplus"] = static_cast<long>(__cplusplus);
        return info;
      },
      "How this library was compiled.");
  pybind11::class_<selfsup_kernels::ModuleTree>(
      m, "ModuleTree", "The tensors of a tree of modules, found again without a walk while the tree is the same.")
      .def(
          pybind11::init<const pybind11::list&, const pybind11::dict&, const pybind11::tuple&>(),
          pybind11::arg("modules"),
          pybind11::arg("positions"),
          pybind11::arg("classes"))
      .def(
          "tensors",
          &selfsup_kernels::ModuleTree::tensors,
          pybind11::arg("root"),
          "Return the tensors by position, or None if anything has changed.");
}
