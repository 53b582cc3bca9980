"""MoCo: momentum contrast."""

from collections import OrderedDict

import torch
import torch.nn.functional as F
from torch import nn

from selfsup_kernels.core import backends
from selfsup_kernels.core import validate as check
from selfsup_kernels.core.hints import explained
from selfsup_kernels.core.processes import SharesGroup, check_kind, gather_rows, global_mean, resolve, shown
from selfsup_kernels.ema.module import EMA
from selfsup_kernels.info_nce.queue import queue_log_sums
from selfsup_kernels.methods._views import collect_views, require_modules


class MoCo(SharesGroup, nn.Module):
    r"""Momentum contrast (arXiv:1911.05722; version 2, arXiv:2003.04297) with a queue of any size.

    The online network encodes one view as the query :math:`q`; the target network, its moving average (eq. 2 of the
    paper), encodes the other view as the key :math:`k`. Both are normalised. The query's only positive is its key, and
    its only negatives are the queue of earlier batches' keys (eq. 1):

    .. math:: L = \operatorname{mean}_a -\log \frac{\exp(\langle q_a, k_a \rangle / \tau)}
        {\exp(\langle q_a, k_a \rangle / \tau) + \sum_j \exp(\langle q_a, \mathrm{queue}_j \rangle / \tau)}

    The ``(B, K)`` queue scores are never stored; the loss works on one normalised copy of the queue in its own
    layout. In training mode each forward then overwrites the oldest keys with its own. Batches may have any size: keys
    past the end of the queue wrap around to its start, and a batch larger than the queue leaves its last keys.

    A training step::

        loss = method(query_view, key_view)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        method.update_target()

    ``queue`` and ``queue_ptr`` (the position of the oldest key) are buffers: part of the ``state_dict``, loaded
    strictly. The queue starts with random unit rows, the same in every process.

    Departures: BatchNorm batches are not shuffled over the devices (section 3.3 of the paper). If the target's
    BatchNorm layers see the same samples as the query's, they can leak the positive's identity, so use
    ``nn.SyncBatchNorm`` or a network without BatchNorm. The target is updated after the optimizer's step instead of
    before the keys are computed; only the place of the call differs. ``symmetric`` and ``predictor`` are not in these
    papers; :class:`MoCo` with both is close to version 3 (arXiv:2104.02057), which has no queue.

    Args:
        encoder, projector: modules; the projector's output is ``(B, D)``.
        queue_size: :math:`K`.
        momentum: the default momentum of :meth:`update_target`.
        temperature: :math:`\tau`; 0.07 in version 1, 0.2 in version 2.
        predictor: a module after the projector, in the online network only; None for none.
        dim: :math:`D`; None for the width of the last linear layer of the projector.
        symmetric: compute queries and keys for every view and average over the ordered pairs of views; allows more than
            two views.
        buffers, stochastic_rounding: for the target, as in :class:`selfsup_kernels.EMA`.
        eps: the floor of the norms.
        group: a process group or ``"world"``: the keys of all its processes enter every queue (batches may differ in
            size), and the loss is the mean over all their samples. ``"local"`` or None: only this process's samples.
        impl: for the loss, as in :func:`selfsup_kernels.info_nce_loss`; the average uses ``"auto"`` if it lacks it.

    Attributes:
        online: encoder and projector.
        predictor: the predictor, or None.
        target: the :class:`selfsup_kernels.EMA` of ``online``.
        queue: ``(K, D)`` unit rows.

    Raises:
        ValueError, TypeError: an argument does not fit; the message says which and why.

    Example:
        >>> method = sk.methods.MoCo(nn.Linear(64, 32), nn.Linear(32, 16), queue_size=1024)
        >>> query, key = torch.randn(2, 256, 64)
        >>> method(query, key).backward()
        >>> method.update_target()                        # after the optimizer's step
    """

    @explained("MoCo(encoder, projector)")
    def __init__(
        self,
        encoder,
        projector,
        queue_size=65536,
        momentum=0.999,
        temperature=0.07,
        predictor=None,
        *,
        dim=None,
        symmetric=False,
        buffers="copy",
        stochastic_rounding=False,
        eps=1e-12,
        group=None,
        impl="auto",
    ):
        super().__init__()
        require_modules(encoder=encoder, projector=projector)
        if predictor is not None:
            require_modules(predictor=predictor)
        queue_size = check.integer("queue_size", queue_size, 1)
        check_kind(group)
        self.online = nn.Sequential(OrderedDict(encoder=encoder, projector=projector))
        self.predictor = predictor
        self.target = EMA(
            self.online,
            momentum,
            buffers=buffers,
            stochastic_rounding=stochastic_rounding,
            impl=backends.or_auto(impl, "ema_update_"),
        )
        self.temperature = check.positive_number("temperature", temperature)
        self.eps = check.positive_number("eps", eps)
        self.symmetric = bool(symmetric)
        self.group = group
        self.impl = impl
        # A separate generator: the same rows in every process, and the user's random state does not change.
        rows = torch.randn(queue_size, _width(projector, dim), generator=torch.Generator().manual_seed(0))
        device = next((p.device for p in self.online.parameters()), None)
        self.register_buffer("queue", F.normalize(rows, dim=-1).to(device))
        self.register_buffer("queue_ptr", torch.zeros((), dtype=torch.int64, device=device))

    @property
    def encoder(self) -> nn.Module:
        """The online encoder, which is kept after training."""
        return self.online.encoder

    @property
    def projector(self) -> nn.Module:
        return self.online.projector

    def forward(self, *views):
        """Return the loss of two views of a batch: ``forward(query_view, key_view)`` or a sequence of the two.

        Raises:
            ValueError: there are not two views (with ``symmetric``: at least two), or the embeddings do not fit the
                queue.
        """
        views = collect_views(views)
        if not self.symmetric and len(views) != 2:
            raise ValueError(f"views: expected 2, a query's and a key's, without symmetric=True, got {len(views)}")
        queries = [self.online(x) for x in (views if self.symmetric else views[:1])]
        if self.predictor is not None:
            queries = [self.predictor(q) for q in queries]
        queries = [self._unit("queries", q) for q in queries]
        with torch.no_grad():
            keys = [self._unit("keys", self.target(x)) for x in (views if self.symmetric else views[1:])]
        loss = self.contrast(queries, keys)
        if self.training:
            self.enqueue(torch.cat(keys))
        return loss

    def contrast(self, queries, keys):
        """Return the loss of unit rows: the ``(B, D)`` queries and keys of each view; keys receive no gradient.

        Without ``symmetric`` both lists have one element, from different views.
        """
        pairs = [(u, v) for u in range(len(queries)) for v in range(len(keys)) if u != v or not self.symmetric]
        for u, v in pairs:
            if queries[u].shape != keys[v].shape:
                raise ValueError(f"views: expected as many samples in each, got {len(queries[u])} and {len(keys[v])}")
        negatives = queue_log_sums(torch.cat(queries), self.queue, self.temperature, self.eps, self.impl)
        negatives = negatives.view(len(queries), -1)
        # log(1 + exp(x)), accurate above softplus' default threshold too
        terms = [
            F.softplus(negatives[u] - (queries[u] * keys[v]).sum(-1) / self.temperature, threshold=700)
            for u, v in pairs
        ]
        return global_mean(torch.cat(terms), resolve(self.group))

    def _unit(self, name, rows):
        """Normalise the rows, in float32 or float64."""
        if rows.dim() != 2 or rows.shape[1] != self.queue.shape[1]:
            raise ValueError(f"{name}: expected (B, {self.queue.shape[1]}), as the queue has, got {tuple(rows.shape)}")
        dtype = torch.promote_types(self.queue.dtype, torch.float32)
        return F.normalize(rows.to(dtype), dim=-1, eps=self.eps)

    @torch.no_grad()
    def enqueue(self, keys):
        """Overwrite the oldest rows of the queue with ``(N, D)`` unit rows; with ``group``, those of all processes.

        ``forward`` calls this in training mode. It does not affect a loss computed before.
        """
        keys = gather_rows(keys, resolve(self.group))
        size = len(self.queue)
        kept = keys[-size:]
        first = self.queue_ptr + (len(keys) - len(kept))
        index = (first + torch.arange(len(kept), device=kept.device)) % size
        self.queue.index_copy_(0, index, kept.to(self.queue.dtype))
        self.queue_ptr.add_(len(keys)).remainder_(size)

    def update_target(self, momentum=None):
        """Move the target towards the online network; call this after the optimizer's step.

        Args:
            momentum: a number in [0, 1] or a 0-dim tensor; None for the one given at construction.
        """
        self.target.update(momentum)

    def extra_repr(self):
        symmetric = ", symmetric=True" if self.symmetric else ""
        group = shown(self.group)
        return f"queue={tuple(self.queue.shape)}, temperature={self.temperature:g}{symmetric}, group={group}"


def _width(projector, dim) -> int:
    if dim is None:
        layers = [m for m in projector.modules() if isinstance(m, nn.Linear)]
        if not layers:
            raise ValueError("dim: expected the width of the embeddings, since the projector has no nn.Linear")
        return layers[-1].out_features
    return check.integer("dim", dim, 1, expected="None or an integer")
