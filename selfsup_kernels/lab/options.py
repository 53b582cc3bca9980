"""What the options of the commands have in common: the error of one that cannot be used, devices, and paths."""

import os


class Wrong(ValueError):
    """An argument that cannot be used: which, what was expected, and what came."""

    def __init__(self, argument, expected, got):
        super().__init__(f"--{argument}: expected {expected}, got {got!r}")


def device(argument, text) -> str:
    """The device that is meant: a GPU where there is one, unless another is asked for."""
    import torch

    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if text is None:
        return "cuda" if count else "cpu"
    known = ["cpu", *(["cuda"] if count else []), *(f"cuda:{i}" for i in range(count))]
    if text not in known:
        raise Wrong(argument, f"one of {', '.join(known)} on this machine", text)
    return text


def writable_file(argument, path):
    """Said before anything is measured, not after minutes of it."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if not path.is_dir() and os.access(path if path.exists() else path.parent, os.W_OK):
            return
    except OSError:
        pass
    raise Wrong(argument, "a file that can be written", str(path))


def writable_folder(argument, path):
    try:
        path.mkdir(parents=True, exist_ok=True)
        if os.access(path, os.W_OK):
            return
    except OSError:
        pass
    raise Wrong(argument, "a folder that can be written", str(path))
