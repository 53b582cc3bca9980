"""Launches of the quadratic part of the forward (:mod:`selfsup_kernels.tiles.kernels.sums`)."""

from selfsup_kernels.info_nce.objectives import Columns
from selfsup_kernels.tiles import configs, launcher
from selfsup_kernels.tiles.arguments import SumsWork


def pair_sums(layout, saved, ids, sums, precision):
    """Launch :func:`sums_kernel` over all tiles."""
    call, stored = layout.call, saved.rows
    rules = layout.pair_rules._replace(inside=None, numerator=None)  # sums do not depend on them
    clean, masked = (
        configs.lookup(k, launcher.arch_of(stored), stored.dtype, layout.stride) for k in ("sums", "masked_sums")
    )
    if (ids is not None or saved.logq is not None) and clean.registers < 255:
        # Their numbers take registers in every tile. A program less on an SM leaves enough of them.
        clean = clean._replace(registers=255, programs=max(1, clean.programs - 1))
    sms = launcher.sms_of(stored)
    deterministic = launcher.deterministic()
    symmetric = not (deterministic or layout.partial)
    pairs = layout.views * (layout.views - 1) // 2 if call.core_view < 0 else layout.views - 1
    own = 0 if call.columns == Columns.OTHER else layout.views

    def blocks(config):
        return launcher.cdiv(layout.batch, config.block_n), launcher.cdiv(layout.call.queue_rows, config.block_n)

    def tiles(config):
        n, q = blocks(config)
        if not symmetric:
            return layout.own_blocks(config.block_n)[1] * layout.views * (layout.views * n + q)
        return n * (own * (n // 2 + 1) + pairs * n + layout.views * q)

    # Few tiles take one launch with masks. Of many tiles only a small share needs masks.
    many = not deterministic and tiles(clean) >= launcher.MANY_TILES * sms * clean.programs
    for part, config in (("clean", clean), ("masked", masked)) if many else (("all", masked),):
        circle = clean if many else config  # both launches divide the work along the same blocks
        configs.check_divides("sums", circle, config)
        n, q = blocks(circle)
        first_block, own_blocks = layout.own_blocks(circle.block_n)
        programs = sms * config.programs
        # Long enough to load a block of rows once for many tiles, short enough for eight rounds of work per program. In
        # the masked part nearly all items are empty, and finding that out takes loads and divisions: so fewer items,
        # but enough that several programs share the last block's row, which is masked throughout.
        chunk = max(4, min(64, n // 8)) if part == "masked" else max(1, min(64, tiles(circle) // (8 * programs)))
        if symmetric:
            rounds = (own * launcher.cdiv(n // 2 + 1, chunk), pairs * launcher.cdiv(n, chunk))
            items = n * (sum(rounds) + layout.views * launcher.cdiv(q, chunk))
        else:
            chunk = max(n, q) if deterministic else chunk
            items = own_blocks * layout.views * (layout.views + (q > 0)) * launcher.cdiv(max(n, q), chunk)
        items *= circle.block_n // config.block_n
        launcher.launch(
            "sums_kernel",
            (min(items, programs),),
            *launcher.tile_sources(stored, config),
            sums,
            saved.scalars,
            saved.classes,
            ids,
            saved.logq,
            *layout.sizes,
            *SumsWork(items, chunk, first_block, own_blocks),
            layout.stride,
            PART=part,
            PAIRED=launcher.arch_of(stored) // 10 != 10,
            SYMMETRIC=symmetric,
            rules=rules,
            tile=configs.tile(config, layout.stride, precision, circle),
            **config.options,
        )
