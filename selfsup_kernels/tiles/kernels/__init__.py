"""The kernels in Triton, of InfoNCE and of the sigmoid loss. The functions that launch them, in
:mod:`selfsup_kernels.tiles`, know their names only: machine code that was compiled ahead of time needs no Triton, and
this package is imported for any other."""

from selfsup_kernels.tiles.kernels.classes import class_tables_kernel, sort_kernel
from selfsup_kernels.tiles.kernels.gradient import gradient_kernel
from selfsup_kernels.tiles.kernels.rows import (
    clear_kernel,
    finish_rows_kernel,
    load_rows_kernel,
    sum_kernel,
    upstream_kernel,
)
from selfsup_kernels.tiles.kernels.siglip import (
    siglip_finish_kernel,
    siglip_row_sums_kernel,
    siglip_scalars_kernel,
    siglip_wave_kernel,
)
from selfsup_kernels.tiles.kernels.sums import sums_kernel
from selfsup_kernels.tiles.kernels.tables import view_tables_kernel
from selfsup_kernels.tiles.kernels.waves import product_kernel, wave_kernel

__all__ = [
    "class_tables_kernel",
    "clear_kernel",
    "finish_rows_kernel",
    "gradient_kernel",
    "load_rows_kernel",
    "product_kernel",
    "siglip_finish_kernel",
    "siglip_row_sums_kernel",
    "siglip_scalars_kernel",
    "siglip_wave_kernel",
    "sort_kernel",
    "sum_kernel",
    "sums_kernel",
    "upstream_kernel",
    "view_tables_kernel",
    "wave_kernel",
]
