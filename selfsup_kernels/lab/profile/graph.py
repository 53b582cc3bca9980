"""Which part of a backward belongs to the loss.

Every node of the autograd graph has a number, higher the later it was made, and the engine runs what is ready from the
highest number down: the loss' nodes before those that made the loss' inputs. So the first node of those that the loss
did not make ends the loss' part when it runs. Where losses read layers in the middle of a network, parts alternate.
"""

from bisect import bisect_right
from itertools import pairwise

import torch

from selfsup_kernels.lab.profile import parts

LEAF = 2**63
"""Nodes that add to ``.grad`` have the highest number of all, and run as soon as they can."""


class Walk:
    """The nodes of one backward that were made after the first loss began, hooked wherever the part changes."""

    def __init__(self, recorder, roots):
        self.recorder = recorder
        self.handles = []
        self.numbers = [number for number, _ in recorder.created]
        losses = [number for number, part in recorder.created if part == parts.LOSS_FORWARD]
        self.first = min(losses, default=None)
        self.hit = set()
        nodes = [node for node in (getattr(root, "grad_fn", None) for root in roots) if node is not None]
        self.start = parts.ENCODER_BACKWARD
        if self.first is not None and nodes:
            self._walk(nodes)
            if not self.hit:  # a backward of something else
                self.remove()
                self.start = parts.ENCODER_BACKWARD

    def _made_in(self, node):
        """Index into ``created`` of the part that made a node; None before the step."""
        place = bisect_right(self.numbers, node._sequence_nr()) - 1
        return place if place >= 0 else None

    def _part(self, node):
        place = self._made_in(node)
        made = None if place is None else self.recorder.created[place][1]
        if made == parts.LOSS_FORWARD:
            self.hit.add(place)
            return parts.LOSS_BACKWARD
        # What was made after a loss and outside of any module weighs, scales or adds up losses.
        outside = made == parts.OTHER and node._sequence_nr() >= self.first
        return parts.LOSS_BACKWARD if outside else parts.ENCODER_BACKWARD

    def _walk(self, nodes):
        """Hook every node that runs after one of another part. They run in the order of their numbers, exactly: what
        a node waits for was made after it."""
        found = {node: self._part(node) for node in nodes}
        todo = list(found)
        while todo:
            node = todo.pop()
            if node._sequence_nr() < self.first:
                continue
            for child, _ in node.next_functions:
                if child is not None and child not in found and child._sequence_nr() < LEAF:
                    found[child] = self._part(child)
                    todo.append(child)
        order = sorted(found, key=lambda node: -node._sequence_nr())
        self.start = found[order[0]]
        if self.recorder.other_threads:
            self.handles.append(order[0].register_prehook(lambda gradients: self.recorder.arrived()))
        for before, node in pairwise(order):
            if found[node] != found[before]:
                self.handles.append(node.register_prehook(self._hook(found[node])))

    def _hook(self, part):
        def hook(gradients):
            self.recorder.replace(part)

        return hook

    def remove(self):
        for handle in self.handles:
            handle.remove()
        self.handles = []

    def forget(self):
        """Losses that went backward are done with: later walks need not reach back to them."""
        for place in self.hit:
            number, _ = self.recorder.created[place]
            self.recorder.created[place] = (number, None)


def watched(recorder, backward):
    """``torch.autograd.backward`` that tells the recorder its parts."""

    def wrapper(tensors, *args, **kwargs):
        if recorder.backwards:  # one inside another, as of re-entrant checkpointing, is part of it
            return backward(tensors, *args, **kwargs)
        roots = [tensors] if isinstance(tensors, torch.Tensor) else list(tensors)
        if not isinstance(tensors, torch.Tensor):
            tensors = roots
        walk = Walk(recorder, roots)
        if not recorder.enter(walk.start):
            return backward(tensors, *args, **kwargs)
        recorder.backwards += 1
        try:
            return backward(tensors, *args, **kwargs)
        finally:
            recorder.backwards = max(0, recorder.backwards - 1)
            recorder.leave()
            walk.remove()
            if not kwargs.get("retain_graph"):
                walk.forget()

    return wrapper
