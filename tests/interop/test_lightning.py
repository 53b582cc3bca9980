"""Test the Lightning modules of ``examples/`` under a Trainer: training, accumulation, checkpoints, precision."""

import copy
import sys
from pathlib import Path

import lightning
import pytest
import torch

import selfsup_kernels as sk

ROOT = Path(__file__).resolve().parents[2]
NAMES = ["simclr", "moco", "byol", "cmc", "byol_contrast", "chunked"]
WITH_TARGET = ["moco", "byol", "byol_contrast"]


@pytest.fixture
def examples(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "examples"))
    import digits
    import lightning_modules

    yield lightning_modules
    for module in (digits, lightning_modules):
        sys.modules.pop(module.__name__, None)


class Record(lightning.Callback):
    def __init__(self):
        self.losses, self.queue_moved, self.target_moved, self.steps = [], [], [], []

    def on_train_batch_start(self, trainer, module, *_):
        self.before = copy.deepcopy(module.state_dict())

    def on_train_batch_end(self, trainer, module, outputs, *_):
        self.losses.append(trainer.callback_metrics["loss"].item())
        after = module.state_dict()
        moved = {k for k, v in after.items() if not torch.equal(v, self.before[k])}
        self.target_moved.append(any(".target." in k and k.endswith("weight") for k in moved))
        self.queue_moved.append(any("queue" in k for k in moved))
        self.steps.append(trainer.global_step)


def fit(module, data, steps, *, callbacks=(), path=None, **arguments):
    trainer = lightning.Trainer(
        max_steps=steps,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=any(isinstance(c, lightning.pytorch.callbacks.ModelCheckpoint) for c in callbacks),
        enable_model_summary=False,
        enable_progress_bar=False,
        callbacks=list(callbacks),
        **arguments,
    )
    trainer.fit(module, data, ckpt_path=path)
    return trainer


def fixed(count=12, batch=64):
    """Return views that are made before training, in a fixed order, so that runs can be compared batch by batch."""
    import digits

    torch.manual_seed(3)
    images = digits.load()[0]
    batches = [[digits.augment(images[i * batch :][:batch]) for _ in range(2)] for i in range(count)]
    return torch.utils.data.DataLoader(batches, batch_size=None)


@pytest.mark.parametrize("name", NAMES)
def test_the_loss_falls(examples, name):
    lightning.seed_everything(0, verbose=False)
    record = Record()
    fit(examples.build(name), fixed(5, 256) if name == "moco" else fixed(20), 60, callbacks=[record])
    losses = torch.tensor(record.losses)
    assert len(losses) == 60
    assert losses.isfinite().all()
    early = losses[15:20] if name == "moco" else losses[:5]  # MoCo's queue first fills with similar keys
    assert losses[-5:].mean() < 0.97 * early.mean()
    if name in WITH_TARGET:
        assert all(record.target_moved)
    if name == "moco":
        assert all(record.queue_moved)


@pytest.mark.parametrize("name", NAMES)
def test_training_equals_a_plain_loop(examples, name):
    """Training with Lightning equals the loop of the method's docstring, including the momentum's schedule."""
    lightning.seed_everything(0, verbose=False)
    module, steps = examples.build(name), 8
    method, data = copy.deepcopy(module.method), fixed(steps)
    fit(module, data, steps)
    optimizer = torch.optim.AdamW([p for p in method.parameters() if p.requires_grad], lr=1e-3)
    for step, views in enumerate(data):
        loss = method(views)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if name == "moco":
            method.update_target()
        elif name in WITH_TARGET:
            method.update_target(sk.cosine_momentum(step, steps, base=0.98))
    for (key, got), want in zip(module.method.state_dict().items(), method.state_dict().values(), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-3, atol=1e-5, msg=lambda m, key=key: f"{key}: {m}")


@pytest.mark.parametrize("name", WITH_TARGET)
def test_the_target_moves_when_the_optimizer_steps(examples, name):
    lightning.seed_everything(0, verbose=False)
    record = Record()
    fit(examples.build(name), fixed(12), 4, callbacks=[record], accumulate_grad_batches=3)
    assert record.steps == [0, 0, 1, 1, 1, 2, 2, 2, 3, 3, 3, 4]
    assert record.target_moved == [False, False, True] * 4
    if name == "moco":
        assert all(record.queue_moved)  # every batch has keys


@pytest.mark.parametrize("name", NAMES)
def test_training_resumes_exactly_from_a_checkpoint(examples, name, tmp_path):
    lightning.seed_everything(0, verbose=False)
    start = examples.build(name)
    half = fixed(4).dataset
    data = torch.utils.data.DataLoader(half + half, batch_size=None)  # a resumed run reads the data from the beginning
    straight = copy.deepcopy(start)
    saver = lightning.pytorch.callbacks.ModelCheckpoint(
        dirpath=tmp_path, filename="{step}", every_n_train_steps=4, save_top_k=-1
    )
    fit(straight, data, 8, callbacks=[saver])
    path = tmp_path / "step=4.ckpt"
    saved = torch.load(path, weights_only=False)["state_dict"]

    lightning.seed_everything(1, verbose=False)
    resumed, start_of_second_half = examples.build(name), {}

    class Look(lightning.Callback):
        def on_train_start(self, trainer, module):
            start_of_second_half.update(copy.deepcopy(module.state_dict()))

    fit(resumed, data, 8, callbacks=[Look()], path=str(path))
    assert start_of_second_half.keys() == saved.keys()
    for key, value in saved.items():
        assert torch.equal(start_of_second_half[key], value), key
    if name == "moco":
        assert saved["method.queue_ptr"] == 4 * 64
        assert resumed.method.queue_ptr == 8 * 64
    for key, value in straight.state_dict().items():
        torch.testing.assert_close(
            resumed.state_dict()[key], value, rtol=0, atol=0, msg=lambda m, key=key: f"{key} {m}"
        )
    # The encoder can be exported from the checkpoint as a plain state_dict.
    view = {"view": 0} if name == "cmc" else {}
    state = sk.methods.export_encoder(torch.load(path, weights_only=False), **view)
    network = resumed.method.encoder
    (network[0] if name == "cmc" else network).load_state_dict(state, strict=True)


@pytest.mark.parametrize("name", NAMES)
def test_mixed_precision(examples, name):
    lightning.seed_everything(0, verbose=False)
    module = examples.build(name)
    before = copy.deepcopy(module.state_dict())
    record = Record()
    fit(module, fixed(4), 4, callbacks=[record], precision="bf16-mixed")
    assert all(torch.isfinite(torch.tensor(record.losses)))
    for key, value in module.state_dict().items():
        assert value.isfinite().all(), key
        assert value.dtype == before[key].dtype, key


def test_the_script(examples, capsys):
    examples.main(["moco", "--steps", "3"])
    assert "k-NN accuracy" in capsys.readouterr().out
