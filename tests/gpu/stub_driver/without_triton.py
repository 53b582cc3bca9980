"""Call the loss in a process that cannot import Triton, on the stub driver of a folder. Prints as JSON what it took."""

import ctypes
import json
import sys
import time


def main(folder):
    sys.modules["triton"] = None
    library = ctypes.CDLL(f"{folder}/libcuda.so.1", ctypes.RTLD_GLOBAL)
    import torch

    import selfsup_kernels as sk
    from selfsup_kernels.core import backends
    from selfsup_kernels.tiles import launcher

    torch.set_num_threads(1)
    count = [0]

    def launched(*_):
        count[0] += 1
        return 0

    kind = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_void_p, ctypes.c_int, ctypes.c_void_p)
    callback = kind(launched)
    ctypes.c_void_p.in_dll(library, "stub_launch").value = ctypes.cast(callback, ctypes.c_void_p).value
    launcher.arch_of = lambda tensor: 90
    launcher.sms_of = lambda tensor: 132
    backends.select = lambda *_, **__: "triton"

    def call(dim):
        views = torch.randn(2, 100, dim, dtype=torch.bfloat16, requires_grad=True)
        before, began = count[0], time.perf_counter()
        sk.info_nce_loss(views, impl="triton").backward()
        return count[0] - before, 1e3 * (time.perf_counter() - began)

    (first, milliseconds), (second, _) = call(64), call(64)
    try:
        error = str(call(100))
    except RuntimeError as raised:
        error = str(raised)
    backends._capability = {0: (9, 0), 1: (8, 0)}.get
    refusals = [backends._gpu_refuses("triton", "cuda", index, torch.bfloat16, False) for index in (0, 1)]
    imported = [name for name in sys.modules if name.startswith("triton.")]
    found = {"launches": [first, second], "first ms": milliseconds, "error": error, "refusals": refusals}
    print(json.dumps(found | {"imported": imported}))


main(sys.argv[1])
