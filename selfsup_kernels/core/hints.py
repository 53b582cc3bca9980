"""What other libraries call our arguments and functions: remedies for the message of a call that Python refuses."""

import difflib
import functools
import inspect
from collections.abc import Callable
from typing import TypeVar

import torch

Function = TypeVar("Function", bound=Callable)

ARGUMENTS = {
    "backend": ["impl="],
    "criterion": ["loss="],
    "decay": ["momentum="],
    "distributed": ["group='world'"],
    "ema_decay": ["momentum="],
    "epsilon": ["eps="],
    "gather_distributed": ["group='world'"],
    "ids": ["duplicates=", "labels="],
    "label": ["labels="],
    "learnable": ["learnable_temperature="],
    "learnable_temperature": ["learnable="],
    "logit_bias": ["bias="],
    "logit_scale": ["scale=", "temperature=1 / logit_scale"],
    "loss_fn": ["loss="],
    "m": ["momentum="],
    "memory_bank": ["queue="],
    "memory_bank_size": ["queue_size=", "queue="],
    "method": ["objective="],
    "mode": ["objective="],
    "model": ["encoder="],
    "negatives": ["queue="],
    "process_group": ["group="],
    "t": ["temperature="],
    "target": ["labels=", "targets="],
    "targets": ["labels="],
    "temp": ["temperature="],
    "temperature": ["scale=1 / temperature"],
    "tau": ["temperature=", "momentum="],
    "total_steps": ["max_steps="],
    "use_buffers": ["buffers="],
    "y": ["labels="],
}
"""What stands here for an argument of another name, in lower case; a function takes those of its own arguments."""


def explained(usage: str) -> Callable[[Function], Function]:
    """Decorate a function: Python's message about a call that does not fit its signature ends with the argument that
    was meant, or with ``usage``, an example of a call."""

    def decorate(function):
        names = [name for name in inspect.signature(function).parameters if name != "self"]

        @functools.wraps(function)
        def call(*args, **kwargs):
            if torch.compiler.is_compiling():
                return function(*args, **kwargs)
            try:
                return function(*args, **kwargs)
            except TypeError as error:
                if error.__traceback__.tb_next is not None:  # raised by the function, not by the call
                    raise
                unknown = next((name for name in kwargs if name not in names), None)
                remedy = f"call it like {usage}" if unknown is None else _meant(unknown, names)
                said = str(error).partition(". Did you mean")[0]  # Python 3.13 suggests a name itself
                raise TypeError(f"{said}; {remedy}") from None

        return call

    return decorate


def _meant(unknown, names):
    """Return the arguments that ``unknown`` may mean, or all."""
    known = [text for text in ARGUMENTS.get(unknown.lower(), ()) if text.partition("=")[0] in names]
    known = known or [f"{name}=" for name in difflib.get_close_matches(unknown, names, n=1, cutoff=0.7)]
    return f"here it is {' or '.join(known)}" if known else f"the arguments are {', '.join(names)}"


def plain(name):
    """Return a name in lower case, without punctuation and without "loss" at its end."""
    return "".join(filter(str.isalnum, name.lower())).removesuffix("loss")
