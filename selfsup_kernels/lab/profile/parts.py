"""The parts of a step, in the order in which they run."""

DATA = "data"
ENCODER_FORWARD = "encoder forward"
LOSS_FORWARD = "loss forward"
LOSS_BACKWARD = "loss backward"
ENCODER_BACKWARD = "encoder backward"
OPTIMIZER = "optimizer"
EMA = "EMA"
OTHER = "other"

PARTS = (DATA, ENCODER_FORWARD, LOSS_FORWARD, LOSS_BACKWARD, ENCODER_BACKWARD, OPTIMIZER, EMA, OTHER)
NAMED = PARTS[:-1]
LOSS = (LOSS_FORWARD, LOSS_BACKWARD)

PREFIX = "selfsup_kernels: "
"""Begins the names of the ranges in a profiler, as in ``selfsup_kernels: loss forward``."""

OWN_NAMES = {"loss": LOSS_FORWARD, "encoder": ENCODER_FORWARD, "data": DATA, "optimizer": OPTIMIZER, "ema": EMA}
"""Short names of the parts for ``run.part(name)``."""
