"""Launches of the backward's quadratic part (:mod:`selfsup_kernels.tiles.kernels.gradient`). Rows too long for the
accumulator go in waves (:mod:`selfsup_kernels.tiles.waves`)."""

from selfsup_kernels.tiles import configs, launcher
from selfsup_kernels.tiles.arguments import GradientWork, only
from selfsup_kernels.tiles.waves import in_waves

MOST_COLUMNS = 65536
"""The columns of one launch, at most. Tensor cores truncate when they add: a sum of numbers of one sign loses 4e-9 of
itself per column (tests/test_accumulators.py simulates it). So several launches sum over more columns, and their sums
are added in float32."""


def gradient(layout, saved, ids, upstream, factor, precision):
    """Return (partial, how many of its slots hold pairs of the batch; the other slots hold pairs with the queue)."""
    stored = saved.rows
    key = launcher.arch_of(stored), stored.dtype, layout.stride
    clean, masked = (configs.lookup(kernel, *key) for kernel in ("gradient", "masked_gradient"))
    queue = int(layout.call.queue_rows > 0)
    tables = only(saved, "log_weights", "weights", "positives", "scalars", "classes", "logq")
    if clean is None or clean.block_k < layout.stride:
        return in_waves(layout, stored, tables, ids, upstream, factor, precision), 1
    if masked is None or {clean.block_k, masked.block_k} != {layout.stride}:
        raise ValueError(
            f"{configs.ENVIRONMENT}: gradient and masked_gradient must hold all {layout.stride} numbers of a row, got"
            f" {clean}, {masked}"
        )

    def blocks(config):
        return layout.views * layout.own_blocks(config.block_m)[1]

    def shares(config):
        """Return how many programs share the columns of a block: several if few rows would leave SMs idle."""
        programs = config.programs * launcher.sms_of(stored)
        return max(1, min(launcher.cdiv(layout.batch, config.block_n), programs // blocks(config)))

    tiles = blocks(clean) * layout.views * launcher.cdiv(layout.batch, clean.block_n)
    if tiles < launcher.MANY_TILES * clean.programs * launcher.sms_of(stored):
        # Few tiles take one launch with masks. Of many tiles only a small share needs masks.
        splits = shares(masked)
        parts = (("all", masked, splits, 0, splits),)
    else:
        splits = shares(clean) + 1
        parts = (("clean", clean, splits - 1, 0, splits), ("masked", masked, 1, splits - 1, splits + 1))
    partial = launcher.partial_sums(layout, splits, queue * len(parts), stored)
    for part, config, count, slot, queue_slot in parts:
        spans = config if part == "all" else clean
        configs.check_divides("gradient", spans, config)
        x, y = launcher.tile_sources(stored, config)
        tile = configs.tile(config, layout.stride, precision, spans, factor)
        longest = launcher.cdiv(launcher.cdiv(layout.batch, config.block_n), count)
        longest = max(longest, launcher.cdiv(layout.call.queue_rows, config.block_n))
        # Three TF32 products of a tile are added to the sum in float32, outside of the tensor cores.
        most = longest if precision == "tf32x3" else max(1, MOST_COLUMNS // (config.block_n * layout.views))
        for begin in range(0, longest, most):
            launcher.launch(
                "gradient_kernel",
                (blocks(config), count + queue),
                x,
                y,
                tables,
                ids,
                upstream,
                partial,
                *layout.sizes,
                *GradientWork(
                    count, slot, queue_slot, *layout.own_blocks(config.block_m), *layout.part, begin, begin + most
                ),
                PART=part,
                rules=layout.pair_rules,
                tile=tile,
                **config.options,
            )
    return partial, splits
