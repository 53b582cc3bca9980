"""Make random bad calls: each raises the expected error, which names the argument, and changes nothing."""

import math

import torch
from bounds import Wrong
from torch import nn

import selfsup_kernels as sk


def loss_calls(draw, place):
    """Return a list of (argument, bad value, error)."""
    v, b, d = draw.randint(2, 4), draw.randint(2, 9), draw.randint(1, 9)
    x = draw.normal(v, b, d).float().to(place.device)
    good = list(x)
    views = [
        (x[0], ValueError),
        (x[0, 0], ValueError),
        (x[None], ValueError),
        ([], ValueError),
        (x[:0], ValueError),
        ([x[0]], ValueError),
        (x[:, :0], ValueError),
        (x[:, :, :0], ValueError),
        (x[:, :1], ValueError),
        ([*good[:-1], x[0, 1:]], ValueError),
        ([*good, torch.cat([x[0], x[0]], 1)], ValueError),
        ([*good, x], ValueError),
        (None, TypeError),
        (draw.randint(-3, 3), TypeError),
        ("views", TypeError),
        (x.tolist(), TypeError),
        ([*good, None], TypeError),
        (x.long(), TypeError),
        (x > 0, TypeError),
        (x.to(torch.complex64), TypeError),
        ([*good, x[0].double()], TypeError),
        ([*good, x[0].half()], TypeError),
        ([x[0].to_sparse(), *good], TypeError),
        ([*good, x[0].to("meta")], ValueError),
    ]
    labels = torch.randint(3, (b,), generator=draw.generator).to(place.device)
    numbers = [(0.0, ValueError), (-draw.random(), ValueError), (math.nan, ValueError), (math.inf, ValueError)]
    numbers += [("0.1", TypeError), ([0.1], TypeError), (True, TypeError), (1j, TypeError)]
    arguments = {
        "temperature": [
            *numbers,
            (None, TypeError),
            (torch.tensor([0.1, 0.1]), ValueError),
            (torch.tensor(-1.0), ValueError),
            (torch.tensor(math.nan), ValueError),
            (torch.tensor(0.1, device="meta"), ValueError),
            (torch.tensor(1), TypeError),
        ],
        "objective": [("supcon", ValueError), (None, ValueError), (draw.randint(0, 6), ValueError)],
        "reduction": [("avg", ValueError), (None, ValueError), (1, ValueError)],
        "impl": [("gpu", ValueError), (None, ValueError)],
        "eps": [(0, ValueError), *numbers],
        "labels": [
            (labels[1:], ValueError),
            (torch.cat([labels, labels]), ValueError),
            (labels[None], ValueError),
            (labels.to("meta"), ValueError),
            (labels.float(), TypeError),
            (labels > 0, TypeError),
            (labels.tolist(), TypeError),
        ],
        "queue": [
            (torch.cat([x[0], x[0]], 1), ValueError),
            (x[0, 0], ValueError),
            (x, ValueError),
            (x[0, :0], ValueError),
            (x[0].to("meta"), ValueError),
            (x[0].double(), TypeError),
            (x[0].long(), TypeError),
            (x[0].tolist(), TypeError),
        ],
        "core_view": [(v, ValueError), (-1, ValueError), (0.5, ValueError), (True, ValueError), ("0", ValueError)],
    }
    return x, views, arguments


def info_nce(draw, place):
    x, views, arguments = loss_calls(draw, place)
    name = draw.choice(["views", *arguments])
    value, error = draw.choice(views if name == "views" else arguments[name])
    given = {} if name == "views" else {name: value}
    if name != "impl":
        given["impl"] = place.impl
    if name in ("labels", "core_view") and draw.chance(0.2):  # arguments that exclude each other
        labels = torch.zeros(x.shape[1], dtype=torch.int64, device=place.device)
        given.update(
            {"labels": labels, "core_view": 0} if draw.chance(0.5) else {"labels": labels, "objective": "pairwise"}
        )
        name, error = ("core_view" if given.get("core_view") == 0 else "labels"), ValueError
    refused(name, error, lambda: sk.info_nce_loss(value if name == "views" else x, **given))
    return name, "refused", ""


def byol(draw, place):
    x, views, arguments = loss_calls(draw, place)
    p, t = x, draw.normal(*x.shape).float().to(place.device)
    name = draw.choice(["predictions", "targets", "eps", "reduction", "impl"])
    given = {"impl": place.impl}
    if name == "predictions":
        # BYOL accepts pairs, one sample, and lists of one dtype.
        p, error = draw.choice([c for c in views if not fine_for_byol(c[0])])
        if isinstance(p, list) and p and isinstance(p[-1], torch.Tensor) and p[-1].shape == x[0].shape and len(p) > 1:
            t = draw.normal(len(p), *x.shape[1:]).float().to(place.device)
    elif name == "targets":
        options = [
            (t[:, 1:], ValueError),
            (t[1:], ValueError),
            (t[:, :, :0], ValueError),
            (t[0], (ValueError, TypeError)),
        ]
        options += [(None, TypeError), (t.long(), TypeError), (t.double(), TypeError), (t.to("meta"), ValueError)]
        options += [([*t, None], TypeError), (t.tolist(), TypeError)]
        t, error = draw.choice(options)
    else:
        value, error = draw.choice(arguments[name])
        given[name] = value
    refused(name, error, lambda: sk.byol_loss(p, t, **given))
    return name, "refused", ""


def fine_for_byol(value):
    """Return whether BYOL accepts the value: pairs and one sample are fine."""
    return isinstance(value, torch.Tensor) and (value.dim() == 2 or (value.dim() == 3 and value.shape[1] == 1))


def ema_update(draw, place):
    n = draw.randint(2, 9)
    t, s = ([draw.normal(n).float().to(place.device) for _ in range(3)] for _ in range(2))
    memory = draw.normal(n + 1).float().to(place.device)
    number = draw.choice([-0.1, 1.5, math.nan, math.inf, -math.inf])
    momentum, cases = (
        0.5,
        [
            ("sources", ValueError, t, s[1:]),
            ("sources", ValueError, t, [*s[:-1], s[0][1:]]),
            ("sources", ValueError, t, [*s[:-1], s[0][:1]]),
            ("sources", ValueError, t, [*s[:-1], s[0].to("meta")]),
            ("targets", ValueError, [*t[:-1], t[0]], s),
            ("targets", TypeError, t[0], s[0]),
            ("targets", TypeError, 3, s),
            ("targets", TypeError, [*t[:-1], None], s),
            ("sources", TypeError, t, [*s[:-1], 1.0]),
            ("sources", TypeError, t, [*s[:-1], s[0].long()]),
            ("sources", TypeError, t, [*s[:-1], s[0].to_sparse()]),
            ("targets", RuntimeError, [*t[:-1], memory[:1].expand(n)], s),
            ("targets", RuntimeError, [*t[:-1], memory[1:]], [*s[:-1], memory[:-1]]),
            ("targets", RuntimeError, [memory[:-1], memory[1:]], s[:2]),
            ("targets", TypeError, nn.Linear(2, 2), s),
            ("targets", ValueError, nn.Linear(2, 2), nn.Linear(2, 2, bias=False)),
            ("momentum", ValueError, t, s),
            ("momentum", TypeError, t, s),
            ("impl", ValueError, t, s),
        ],
    )
    name, error, targets, sources = draw.choice(cases)
    given = {"impl": "gpu" if name == "impl" else place.impl}
    if name == "momentum":
        momentum = (
            draw.choice([number, torch.tensor(number)])
            if error is ValueError
            else draw.choice([None, "0.5", torch.tensor(1)])
        )
    held = [x for x in (targets if isinstance(targets, list) else []) if isinstance(x, torch.Tensor)]
    before = [x.clone() for x in held]
    names = ("targets", "sources") if name in ("targets", "sources") else (name,)
    refused(names, error, lambda: sk.ema_update_(targets, sources, momentum, **given))
    if not all(map(torch.equal, held, before)):
        raise Wrong("a refused update has changed a target")
    return name, "refused", ""


def refused(name, error, call):
    names = (name,) if isinstance(name, str) else name
    try:
        call()
    except error as raised:
        if not any(n in str(raised) for n in names):
            raise Wrong(f"{type(raised).__name__} does not name {' or '.join(names)}: {raised}") from raised
    except Exception as raised:
        kind = error.__name__ if isinstance(error, type) else error
        raise Wrong(f"{' or '.join(names)}: expected {kind}, got {type(raised).__name__}: {raised}") from raised
    else:
        raise Wrong(f"{' or '.join(names)}: accepted")
