"""Check random calls of the in-place functions: `ema_update_`, `EMA.update` and the optimizers with an average."""

import copy
import math
import warnings

import torch
from bounds import Wrong
from draw import FLOATING
from torch import nn

import selfsup_kernels as sk

INTEGERS = [torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64]
VALUES = [0.0, -0.0, math.inf, -math.inf, math.nan, 1e-45, 1e30, -3e38, 6e4, 1e-7]


def shape_of(draw):
    return tuple(draw.choice([0, 1, 2, draw.randint(1, 30)]) for _ in range(draw.choice([0, 1, 1, 2, 2, 3])))


def numbers(draw, shape, dtype):
    if not dtype.is_floating_point:
        return torch.randint(-100, 100, shape, generator=draw.generator).to(dtype)
    x = draw.normal(*shape) * draw.choice([1.0, 1.0, draw.power(-4, 4), draw.power(-45, 38)])
    if draw.chance(0.15) and x.numel():
        x.view(-1)[draw.randrange(x.numel())] = draw.choice(VALUES)
    return x.to(dtype)


def momentum_of(draw, device):
    """Return (argument, its value)."""
    value = draw.choice([0.0, 1.0, 0.5, 0.9, 0.996, 0.9999, draw.random()])
    if draw.chance(0.4):
        tensor = torch.tensor(
            value, dtype=draw.choice([torch.float32, torch.float64]), device=draw.choice(["cpu", device])
        )
        return tensor, tensor.item()
    return value, value


def averaged(target, source, momentum):
    """Return m t + (1 - m) s in float64. It is NaN only if one of them is NaN or two infinities have opposite signs; an
    infinity of weight 0 is ignored."""

    def share(x, weight):
        return torch.where(x.isinf() & (weight == 0), 0.0, weight * x)

    return share(target.double(), momentum) + share(source.double(), 1 - momentum)


def check_average(name, got, old, source, momentum, at_random=False):
    """Check an average: a few roundings in the arithmetic's dtype, then one to the target's, nearest or at random."""
    got, old, source = got.detach().cpu(), old.detach().cpu(), source.detach().cpu()
    if not got.is_floating_point():
        if not torch.equal(got, source):
            raise Wrong(f"{name}: integers are not copied")
        return
    want = averaged(old, source, momentum)
    narrow = torch.finfo(got.dtype)
    wide = torch.finfo(torch.float64 if got.dtype == torch.float64 else torch.float32)
    g = got.double()
    # The kernel computes t + (1 - m)(s - t): it rounds the weight, the difference, the product and the sum.
    allowed = 2 * wide.eps * (old.double().abs() + source.double().abs()) + 2 * wide.tiny * wide.eps
    allowed = allowed + narrow.eps * (1 if at_random else 0.5) * 1.01 * want.abs() + narrow.tiny * narrow.eps
    infinite = want.abs() + allowed >= narrow.max  # beyond the dtype's range, or nearly
    right = torch.where(want.isnan(), g.isnan(), (g - want).abs() <= allowed)
    right |= infinite & (g.sign() == want.sign()) & (g.isinf() | (g.abs() >= 0.99 * narrow.max))
    if not right.all():
        i = int((~right).flatten().nonzero()[0])
        t, s, w, r = (x.flatten()[i].item() for x in (old, source, want, got))
        raise Wrong(f"{name}[{i}]: {r!r}, expected {w!r} of target {t!r}, source {s!r}, momentum {momentum!r}")


def ema_update(draw, place):
    count = draw.choice([1, 1, 2, draw.randint(0, 8)])
    targets, sources, memories, at_random = [], [], [], draw.chance(0.25)
    for _ in range(count):
        shape = shape_of(draw)
        if draw.chance(0.02):
            shape = (draw.choice([4095, 4096, 4097, draw.randint(1000, 20000)]),)
        t, s = (draw.choice(FLOATING), draw.choice(FLOATING)) if draw.chance(0.85) else (draw.choice(INTEGERS),) * 2
        s = t if draw.chance(0.5) else s
        x, y = numbers(draw, shape, t), numbers(draw, shape, s)
        if draw.chance(0.1):
            y = x.to(s)
        target, memory = draw.placed(x, place.device)
        source = draw.placed(y, place.device)[0]
        if draw.chance(0.03):
            source = target
        targets.append(target)
        sources.append(source)
        memories.append(memory)
    momentum, value = momentum_of(draw, place.device)
    before = [t.clone() for t in targets]
    kept = [s.clone() for s in sources]
    around = [m.clone() for m in memories]
    kind = targets[0].dtype if count == 1 else "list"
    pairs = [f"{t.dtype} {s.dtype} {tuple(t.shape)}" for t, s in zip(targets, sources, strict=True)]
    place.say(kind, pairs=pairs, momentum=repr(momentum), random=at_random)
    generator = None
    if at_random:
        generator = torch.Generator(place.device).manual_seed(draw.getrandbits(30))
    sk.ema_update_(targets, sources, momentum, stochastic_rounding=at_random, generator=generator, impl=place.impl)
    for i, (got, old, source, left) in enumerate(zip(targets, before, sources, kept, strict=True)):
        if source is got:
            if not same_bits(got, old):
                raise Wrong(f"targets[{i}]: its own source, and changed")
            continue
        if not same_bits(source, left):
            raise Wrong(f"sources[{i}]: changed")
        check_average(f"targets[{i}] {got.dtype}", got, old, left, value, at_random and got.dtype.itemsize == 2)
    for i, (memory, was, target, old) in enumerate(zip(memories, around, targets, before, strict=True)):
        target.copy_(old)
        if not same_bits(memory, was):
            raise Wrong(f"targets[{i}]: memory around it changed")
    return f"{kind}", "right", ""


def same_bits(x, y):
    kind = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[x.dtype.itemsize]
    return torch.equal(x.view(kind), y.view(kind))


class Model(nn.Module):
    """A model with parameters of random shapes, sometimes one tensor under two names, and buffers like BatchNorm's."""

    def __init__(self, draw, dtype):
        super().__init__()
        self.weights = nn.ParameterList()
        for _ in range(draw.randint(1, 5)):
            x = draw.placed(draw.normal(*shape_of(draw)).to(dtype), "cpu")[0]
            self.weights.append(nn.Parameter(x))
        if draw.chance(0.3):
            self.tied = self.weights[0]
        self.register_buffer("running", draw.normal(3).to(dtype))
        self.register_buffer("count", torch.tensor(draw.randint(0, 99)))

    def move(self, draw):
        with torch.no_grad():
            for p in self.parameters():
                p.copy_(draw.normal(*p.shape))
            self.running.copy_(draw.normal(3))
            self.count += 1


def ema_module(draw, place):
    dtype = draw.choice(FLOATING)
    model = Model(draw, dtype).to(place.device)
    policy = draw.choice(["copy", "average", "ignore"])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # copies of low precision
        ema = sk.EMA(model, draw.random(), buffers=policy, dtype=draw.choice([None, torch.float32]), impl=place.impl)
    place.say(dtype, buffers=policy)
    for _ in range(draw.randint(1, 3)):
        model.move(draw)
        momentum, value = (None, ema.momentum) if draw.chance(0.3) else momentum_of(draw, place.device)
        old = {name: x.clone() for name, x in ema.module.state_dict().items()}
        ema.update(momentum)
        parameters = dict(model.named_parameters(remove_duplicate=False))
        for name, got in ema.module.state_dict().items():
            source = model.state_dict()[name]
            if name in parameters or (policy == "average" and name == "running"):
                check_average(name, got, old[name], source, value)
            elif not torch.equal(got, (source if policy != "ignore" else old[name]).to(got.dtype)):
                raise Wrong(f"{name}: buffers={policy!r}")
    return f"{dtype}", "right", ""


def optimizer_case(draw):
    name = draw.choice(["SGD", "AdamW"])
    options = {"lr": draw.choice([0.0, 0.1, draw.power(-4, 0)]), "maximize": draw.chance(0.2)}
    options["weight_decay"] = draw.choice([0.0, draw.power(-4, -1)])
    if name == "SGD":
        options["momentum"] = draw.choice([0.0, 0.9, draw.random()])
        if options["momentum"] and draw.chance(0.3):
            options["nesterov"] = True
        elif options["momentum"]:
            options["dampening"] = draw.choice([0.0, 0.0, draw.random()])
    else:
        options["betas"] = (draw.choice([0.9, draw.random()]), draw.choice([0.999, 0.5 + draw.random() / 2.01]))
        options["eps"] = draw.choice([1e-8, 1e-3])
    return name, options


def optimizers(draw, place):
    """Check that a step equals torch.optim's within torch's own error, and that the average equals `ema_update_`'s."""
    name, options = optimizer_case(draw)
    dtype = draw.choice(FLOATING)
    model = Model(draw, dtype).to(place.device)
    eager, wide = copy.deepcopy(model), copy.deepcopy(model).double()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        ema = sk.EMA(model, draw.random(), dtype=draw.choice([None, torch.float32]), impl=place.impl)
    theirs = getattr(torch.optim, name)
    optimizer = getattr(sk.optim, name)(model.parameters(), ema=ema, impl=place.impl, **options)
    yardstick, truth = theirs(eager.parameters(), foreach=False, **options), theirs(wide.parameters(), **options)
    place.say(dtype, optimizer=name, **options)
    largest = [r.detach().norm().item() for r in wide.parameters()]  # a result near zero keeps the earlier rounding
    for _ in range(draw.randint(1, 3)):
        for p, q, r in zip(model.parameters(), eager.parameters(), wide.parameters(), strict=True):
            p.grad = None if draw.chance(0.1) else draw.normal(*p.shape).to(dtype).to(place.device)
            q.grad = None if p.grad is None else p.grad.clone()
            r.grad = None if p.grad is None else p.grad.double().clone()  # torch's foreach steps modify gradients
        before = [t.clone() for t in ema.module.parameters()]
        for o in (truth, yardstick, optimizer):
            o.step()
        for i, (p, q, r) in enumerate(zip(model.parameters(), eager.parameters(), wide.parameters(), strict=True)):
            off, own = ((x.detach().double() - r.detach()).norm().item() for x in (p, q))
            size = largest[i] = max(largest[i], r.detach().norm().item())
            allowed = 1e-12 * (size + 1)
            if dtype != torch.float64:  # torch's own step is NaN where its eps is 0 in float16
                allowed = 2 * (own if math.isfinite(own) else 0) + 4 * torch.finfo(dtype).eps * (size + 1e-3)
            if not off <= allowed:
                raise Wrong(
                    f"params[{i}]: error {off:.3e} > {allowed:.3e} (norm {size:.3e}; torch's own error {own:.3e})"
                )
        for old, got, source in zip(before, ema.module.parameters(), model.parameters(), strict=True):
            check_average(name, got, old, source, ema.momentum)
    return f"{dtype}", "right", ""
