"""Calls of the loss, and the comparison of their launches: code shared by the scripts of this folder."""

import itertools

import stub_driver
import torch

import selfsup_kernels as sk
from selfsup_kernels import _C
from selfsup_kernels.tiles import tape


class Watched(tape.Recorder):
    """A recorder that stays, and with it all tensors of its call: no address means two tensors."""

    all: list = []  # noqa: RUF012

    def __init__(self, inputs):
        super().__init__(inputs)
        self.all.append(self)


tape.Recorder = Watched


class Case:
    """A call and its tensors, which every run of it takes."""

    def __init__(self, batch=100, dim=64, dtype=torch.bfloat16, views=2, queue=0, reduce=None, **options):
        shape = (views, batch, dim)
        self.views = options.pop("given", None) or [torch.randn(shape[1:], dtype=dtype) for _ in range(views)]
        self.options = options | ({"queue": torch.randn(queue, dim, dtype=dtype)} if queue else {})
        self.reduce = reduce or torch.Tensor.sum
        temperature = options.get("temperature")
        given = [*self.views, self.options.get("queue"), options.get("labels"), options.get("duplicates"), temperature]
        self.inputs = [x for x in given if isinstance(x, torch.Tensor)]

    def run(self):
        """Make the call, forward and backward, and return its launches."""
        before = len(stub_driver.stub.launches)
        views = [v.detach().requires_grad_() for v in self.views]
        self.reduce(sk.info_nce_loss(views, impl="triton", **self.options)).backward()
        return stub_driver.stub.launches[before:]

    def by_python(self):
        """Forget all tapes, and return the launches of a call that goes through Python, and what each op of it made."""
        _C.tape.clear()
        del Watched.all[:]
        launches = self.run()
        assert not any(launch.replayed for launch in launches)
        return launches, [recorder.made for recorder in Watched.all]


def differences(case, expected, made, launches):
    """Yield what is wrong with the ``launches`` of a case, of which Python makes those that are ``expected``."""
    if [x.kernel for x in launches] != [x.kernel for x in expected]:
        yield f"expected the kernels {[x.kernel for x in expected]}, got {[x.kernel for x in launches]}"
        return
    known = [*itertools.chain(*made), *case.inputs]
    bases = {id(x): x.data_ptr() for x in case.inputs}  # the tensors of the call are the same in both

    def moved(address, there):
        """Return True if ``there`` is the place of ``address`` in the memory of the other call."""
        if address == 0 or there == 0:
            return address == there
        for tensor in known:
            offset = address - tensor.data_ptr()
            if tensor.numel() and 0 <= offset < tensor.nbytes:
                return bases.setdefault(id(tensor), there - offset) == there - offset
        return bases.setdefault(address, there) == there  # the upstream gradient, which autograd makes

    for one, other in zip(expected, launches, strict=True):
        for name in ("variant", "grid", "threads", "shared"):
            if getattr(one, name) != getattr(other, name):
                yield f"{one.kernel}: {name}: expected {getattr(one, name)}, got {getattr(other, name)}"
        if len(one.raw) != len(other.raw):
            yield f"{one.kernel}: expected {len(one.raw)} parameters, got {len(other.raw)}"
            continue
        for number, (a, b) in enumerate(zip(one.raw, other.raw, strict=True)):
            if isinstance(a, stub_driver.TensorMap):
                same = isinstance(b, stub_driver.TensorMap) and a[1:] == b[1:] and moved(a.address, b.address)
            elif number in one.pointers:
                same = moved(*(int.from_bytes(x, "little") for x in (a, b)))
            else:
                same = a == b
            if not same:
                yield f"{one.kernel}: parameter {number}: expected {a}, got {b}"
    for tensors in made:  # the backward may take the memory that the forward has freed
        ends = sorted((bases[id(x)], bases[id(x)] + x.nbytes) for x in tensors if id(x) in bases)
        if any(end > start for (_, end), (start, _) in itertools.pairwise(ends)):
            yield "tensors of the call share memory"
