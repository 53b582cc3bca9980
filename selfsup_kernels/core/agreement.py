"""What the processes of a group must agree on before a loss over all their samples: the arguments of its call.

Each process sends a header, which describes its call as numbers. Arguments that must be equal and are not raise the
same error on every process, and a process that refuses its own arguments says so, since the others wait for it.
"""

from __future__ import annotations  # a torch that was built without torch.distributed lacks its names

import struct
from collections.abc import Callable

import torch
import torch.distributed as dist

from selfsup_kernels.core import ops, processes
from selfsup_kernels.core import validate as check

_NAMES = {
    "dtype": [str(d).removeprefix("torch.") for d in check.FLOATING],
    "reduction": ops.REDUCTIONS,
    "impl": ops.IMPLS,
}


class Agreement:
    """The header of one kind of call.

    Args:
        record: the ``NamedTuple`` of a call.
        own: its fields that may differ between processes.
        argument: field -> the name of the user's argument, where it is another one.
        given: further arguments that must be equal, whether they are given; they are compared first.
        shown: from a field and a header to the argument as the user wrote it, or None for the usual form.
    """

    def __init__(
        self,
        record: type,
        own: set[str],
        argument: dict[str, str],
        given: tuple[str, ...],
        shown: Callable[[str, dict], str | None],
    ):
        self.fields = ("refused", *given, "dtype", "gradient", "impl", *record._fields)
        self.floats = {name for name, kind in record.__annotations__.items() if kind is float}
        self.own, self.argument, self.given, self.shown = own, argument, given, shown

    def announced(self, group: dist.ProcessGroup, check: Callable, *args):
        """Return ``check(*args)``. If it raises, first send the header that the other processes are waiting for."""
        try:
            return check(*args)
        except Exception:
            self._exchange(group, [1] + [0] * (len(self.fields) - 1))
            raise

    def headers(
        self, group: dist.ProcessGroup, given: tuple[bool, ...], dtype: torch.dtype, gradient: int, impl: str, call
    ) -> list[dict]:
        """Return the headers of all processes.

        All fields except ``own`` must be equal: the inputs of the result, and which gradients will be needed, since a
        backward with its exchanges will follow (0: none; 2: the function itself returns them).

        Raises:
            RuntimeError: another process refused its arguments.
            ValueError: an argument differs between processes.
        """
        own = [0, *given, check.FLOATING.index(dtype), gradient, ops.IMPLS.index(impl), *call]
        headers = self._exchange(group, own)
        refused = [rank for rank, other in enumerate(headers) if other["refused"]]
        if refused:
            raise RuntimeError(f"group: the arguments were refused on rank {', '.join(map(str, refused))} of the group")
        for field in self.fields:
            for rank, other in enumerate(headers):
                ours, theirs = headers[0][field], other[field]
                if field not in self.own and ours != theirs and not (ours != ours and theirs != theirs):
                    raise ValueError(
                        f"group: {self.argument.get(field, field)} has to be the same on every rank, got"
                        f" {self._shown(field, headers[0])} on rank 0 and {self._shown(field, other)} on rank {rank}"
                    )
        return headers

    def _shown(self, field: str, header: dict) -> str:
        value, shown = header[field], self.shown(field, header)
        if shown is not None:
            return shown
        if field in _NAMES:
            return repr(_NAMES[field][value])
        if field in self.given:
            return "given" if value else "None"
        if field == "gradient":
            return ("not wanted", "wanted", "returned")[value]
        return str(bool(value)) if field == "normalize" else repr(value)

    def _exchange(self, group, header) -> list[dict]:
        words = [
            _bits(value) if field in self.floats else int(value)
            for field, value in zip(self.fields, header, strict=True)
        ]
        own = torch.tensor(words, dtype=torch.int64, device=processes.host_device(group))
        every = own.new_empty(dist.get_world_size(group) * len(words))
        processes.all_gather(every, own, group=group)
        return [
            {field: _number(w) if field in self.floats else w for field, w in zip(self.fields, row, strict=True)}
            for row in every.view(-1, len(words)).tolist()
        ]


def known(tensor: torch.Tensor | None, number: float) -> float:
    """Return the number that a header has of a scalar argument: NaN if its value is on a device."""
    if tensor is None:
        return number
    return tensor.item() if tensor.device.type == "cpu" else float("nan")


def _bits(number: float) -> int:
    return struct.unpack("<q", struct.pack("<d", number))[0]


def _number(bits: int) -> float:
    return struct.unpack("<d", struct.pack("<q", bits))[0]
