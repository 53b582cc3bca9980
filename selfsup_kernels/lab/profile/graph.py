"""Find the loss' part of a backward.

Every node of the autograd graph has a number, higher the later it was made, and the engine runs what is ready from the
highest number down: the loss' nodes before those that made the loss' inputs. So a node's backward belongs to the part
in which its forward was made, and a hook on the first node of each stretch tells where the next part begins.
"""

from bisect import bisect_right
from itertools import pairwise

import torch

from selfsup_kernels.lab.profile import parts

LEAF = 2**63
"""Nodes that add to ``.grad`` have the highest number of all, and run as soon as they can."""


def split(recorder, roots):
    """Hook a backward from ``roots`` wherever its part changes.

    Returns:
        The part that it begins with, the hooks' handles, and the places of its losses in ``recorder.created``.
    """
    created, losses = recorder.created, set()
    numbers = [number for number, _ in created]
    first = min((number for number, part in created if part == parts.LOSS_FORWARD), default=LEAF)

    def part_of(node):
        place = bisect_right(numbers, node._sequence_nr()) - 1
        made = created[place][1] if place >= 0 else None
        if made == parts.LOSS_FORWARD:
            losses.add(place)
        # What was made after a loss and outside of any module weighs, scales or adds up losses.
        outside = made == parts.OTHER and node._sequence_nr() >= first
        return parts.LOSS_BACKWARD if outside or made == parts.LOSS_FORWARD else parts.ENCODER_BACKWARD

    nodes, todo = set(), [getattr(root, "grad_fn", None) for root in roots]
    while todo:
        node = todo.pop()
        if node is not None and node not in nodes and node._sequence_nr() < LEAF:
            nodes.add(node)
            if node._sequence_nr() >= first:  # what was made before the first loss is all encoder
                todo += [child for child, _ in node.next_functions]
    order = [(node, part_of(node)) for node in sorted(nodes, key=lambda node: -node._sequence_nr())]
    if not losses:  # a backward of something else
        return parts.ENCODER_BACKWARD, [], losses
    changes = [(node, part) for (_, before), (node, part) in pairwise(order) if part != before]
    handles = [node.register_prehook(lambda _, part=part: recorder.replace(part)) for node, part in changes]
    return order[0][1], handles, losses


def watched(recorder, backward):
    """Return a ``torch.autograd.backward`` that tells the recorder its parts."""

    def wrapper(tensors, *args, **kwargs):
        if recorder.backwards:  # one inside another, as of re-entrant checkpointing, is part of it
            return backward(tensors, *args, **kwargs)
        tensors = (tensors,) if isinstance(tensors, torch.Tensor) else tuple(tensors)
        start, handles, losses = split(recorder, tensors)
        recorder.backwards = recorder.enter(start)
        try:
            return backward(tensors, *args, **kwargs)
        finally:
            if recorder.backwards:
                recorder.backwards = False
                recorder.leave()
            for handle in handles:
                handle.remove()
            retained = args[1] if len(args) > 1 else kwargs.get("retain_graph")
            for place in () if retained else losses:  # the next walk need not reach back to these losses
                recorder.created[place] = (recorder.created[place][0], None)

    return wrapper
