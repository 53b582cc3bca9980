"""Drop-ins for losses of other libraries: their signatures, defaults, values and gradients, computed by our kernels.

``selfsup_kernels.compat.<library>`` holds the classes and functions of one library under their own names: change only
the import. :func:`patch` changes an installed library in place instead, and :func:`report` counts which calls our
kernels computed. Nothing here imports another library: a drop-in works without the original. ``docs/migrate`` has the
conventions of each.
"""

import importlib

__all__ = [
    "lightly",
    "open_clip",
    "patch",
    "pytorch_metric_learning",
    "report",
    "sentence_transformers",
    "simcse",
    "solo",
    "supcontrast",
    "swa_utils",
    "timm",
]


def __getattr__(name):
    if name == "patch":
        return importlib.import_module("selfsup_kernels.compat._patch").patch
    if name == "report":
        return importlib.import_module("selfsup_kernels.compat._calls").report
    if name in __all__:
        return importlib.import_module(f"selfsup_kernels.compat.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__():
    return sorted([*globals(), *__all__])
