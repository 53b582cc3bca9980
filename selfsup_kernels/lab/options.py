"""Check options that several commands have: numbers, devices and paths."""

import contextlib
import os


class Wrong(ValueError):
    """An option that cannot be used: which, what was expected, and what came."""

    def __init__(self, argument, expected, got):
        super().__init__(f"--{argument}: expected {expected}, got {got!r}")


def plain(word) -> str:
    """Return a name without case and punctuation: NT-Xent and ntxent, BYOLContrast and byol_contrast are the same."""
    return "".join(filter(str.isalnum, word.lower()))


def number(argument, text, kind, least):
    with contextlib.suppress(ValueError):
        if least <= kind(text) < float("inf"):
            return kind(text)
    raise Wrong(argument, f"a{' whole' if kind is int else ''} number >= {least}", text)


def whole_numbers(argument, text, least) -> list[int]:
    """Return different whole numbers, which are comma-separated."""
    try:
        return list(dict.fromkeys(number(argument, word, int, least) for word in text.split(",")))
    except Wrong:
        raise Wrong(argument, f"comma-separated whole numbers >= {least}", text) from None


def device(argument, text) -> str:
    """Return the device that is meant: a GPU where there is one, unless another is asked for."""
    import torch

    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    known = ["cpu", *(["cuda"] if count else []), *(f"cuda:{i}" for i in range(count))]
    if text is not None and text not in known:
        raise Wrong(argument, f"one of {', '.join(known)} on this machine", text)
    return text or ("cuda" if count else "cpu")


def writable_file(argument, path):
    """Raise :class:`Wrong` before anything is measured, not after minutes of it."""
    if path.is_dir() or not _writable(path.parent) or (path.exists() and not os.access(path, os.W_OK)):
        raise Wrong(argument, "a file that can be written", str(path))


def writable_folder(argument, path):
    if not _writable(path):
        raise Wrong(argument, "a folder that can be written", str(path))


def _writable(folder) -> bool:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        return os.access(folder, os.W_OK)
    except OSError:
        return False
