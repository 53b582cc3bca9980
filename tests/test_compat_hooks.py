"""Subclasses of drop-ins: overrides of methods that the original calls are used, or raise with the method's name."""

import functools
import pickle

import pytest
import torch
import torch.nn.functional as F
from helpers import randn
from torch import nn

from selfsup_kernels.compat import lightly, open_clip, sentence_transformers, timm
from selfsup_kernels.compat import pytorch_metric_learning as pml
from selfsup_kernels.compat._common import unsupported

CLASSES = [lightly.DCLLoss, pml.NTXentLoss, pml.SupConLoss, timm.ModelEmaV3]
REFUSED = [(cls, name) for cls in CLASSES for name in cls.hooks + cls.constructor_hooks]


def clip_features(batch=6, dim=5):
    return [F.normalize(randn(batch, dim, dtype=torch.float64, seed=seed), dim=1) for seed in (0, 1)]


def cross_entropies(per_image, per_text):
    labels = torch.arange(len(per_image))
    return (F.cross_entropy(per_image, labels) + F.cross_entropy(per_text, labels)) / 2


@pytest.mark.parametrize(("cls", "name"), REFUSED, ids=lambda value: getattr(value, "__name__", value))
def test_a_hook_that_is_not_called_is_refused(cls, name):
    message = rf"{{}}\.{name}: the drop-in for {cls.original} does not support this"
    with pytest.raises(RuntimeError, match=message.format("Subclass")):
        type("Subclass", (cls,), {name: lambda self: None})
    mixin = type("Mixin", (), {name: lambda self: None})
    with pytest.raises(RuntimeError, match=message.format("Mixed")):
        type("Mixed", (mixin, cls), {})
    loss = cls(nn.Linear(2, 2)) if cls is timm.ModelEmaV3 else cls()
    with pytest.raises(RuntimeError, match=message.format(cls.__name__)):
        setattr(loss, name, lambda: None)


@pytest.mark.parametrize("cls", [*CLASSES, open_clip.ClipLoss])
def test_other_subclasses_are_fine(cls):
    class Subclass(cls):
        def helper(self):
            return 1

    class Further(Subclass):
        pass

    assert issubclass(Further, cls)


@pytest.mark.parametrize("bias", [None, -0.5])
def test_clip_logits_and_labels_for_a_subclass_that_calls_them(bias):
    """A subclass may call them, for example to add a margin."""

    class WithMargin(open_clip.ClipLoss):
        def forward(self, image_features, text_features, logit_scale):
            per_image, per_text = self.get_logits(image_features, text_features, logit_scale, logit_bias=bias)
            labels = self.get_ground_truth(image_features.device, per_image.shape[0])
            return (F.cross_entropy(per_image - 0.1 * labels, labels) + F.cross_entropy(per_text, labels)) / 2

    image, text = clip_features()
    scores = 9 * image @ text.T + (bias or 0)
    want = cross_entropies(scores - 0.1 * torch.arange(6), scores.T)
    torch.testing.assert_close(WithMargin()(image, text, 9.0), want)


def test_an_override_of_clips_logits_counts():
    class Harder(open_clip.ClipLoss):
        def get_logits(self, image_features, text_features, logit_scale, logit_bias=None):
            per_image, per_text = super().get_logits(image_features, text_features, logit_scale, logit_bias)
            return per_image + torch.eye(6), per_text

    class Shifted(open_clip.ClipLoss):
        def get_ground_truth(self, device, num_logits):
            return super().get_ground_truth(device, num_logits).roll(1)

    image, text = clip_features()
    scores, scale = 9 * image @ text.T, torch.tensor(9.0, dtype=torch.float64, requires_grad=True)
    loss = Harder()(image, text, scale, output_dict=True)["contrastive_loss"]
    torch.testing.assert_close(loss, cross_entropies(scores + torch.eye(6), scores.T), check_dtype=False)
    assert torch.autograd.grad(loss, scale)[0] != 0
    want = sum(F.cross_entropy(s, torch.arange(6).roll(1)) for s in (scores, scores.T)) / 2
    torch.testing.assert_close(Shifted()(image, text, 9.0), want)
    plain = open_clip.ClipLoss()
    plain.get_logits = lambda *args, **kwargs: (scores - 1, scores.T + torch.eye(6))
    torch.testing.assert_close(plain(image, text, 9.0), cross_entropies(scores - 1, scores.T + torch.eye(6)))


def test_default_distance_and_reducer_of_a_subclass():
    """A subclass may have other defaults, as in pytorch-metric-learning's documentation."""

    def library_class(name, **attributes):
        return type(name, (), {"__module__": "pytorch_metric_learning", **attributes})

    distance = library_class("DotProductSimilarity", p=2, power=1, normalize_embeddings=False)

    class Mine(pml.SupConLoss):
        def get_default_distance(self):
            return distance()

        def get_default_reducer(self):
            return library_class("SumReducer")()

    x, labels = randn(8, 5, dtype=torch.float64), torch.arange(8) // 2
    want = pml.SupConLoss(distance=distance(), reducer=library_class("SumReducer")())(x, labels)
    assert torch.equal(Mine()(x, labels), want)
    assert not torch.isclose(pml.SupConLoss()(x, labels), want)

    class Far(pml.NTXentLoss):
        def get_default_distance(self):
            return library_class("LpDistance", p=2, power=1, normalize_embeddings=True)()

    with pytest.raises(RuntimeError, match="distance=LpDistance"):
        Far()


def test_settings_that_change_after_construction_are_checked():
    x, labels = randn(8, 5), torch.arange(8) // 2
    for cls in (pml.NTXentLoss, pml.SupConLoss):
        for name, value in (("distance", nn.Identity()), ("reducer", nn.Identity()), ("collect_stats", True)):
            loss = cls()
            setattr(loss, name, value)
            with pytest.raises(RuntimeError, match=f"{name}.*{cls.original} does not support"):
                loss(x, labels)
    loss = lightly.NTXentLoss()
    loss.cross_entropy = nn.CrossEntropyLoss(label_smoothing=0.1)
    with pytest.raises(RuntimeError, match=r"cross_entropy=CrossEntropyLoss.*does not support"):
        loss(x, x)

    class Bank(lightly.MemoryBankModule):
        pass

    loss = lightly.NTXentLoss(memory_bank_size=(4, 5))
    loss.memory_bank = Bank((4, 5))
    with pytest.raises(RuntimeError, match=r"memory_bank=Bank.*does not support"):
        loss(x, x)


def test_changed_components_are_refused():
    """The drop-ins do not call a bank's forward or the cross entropy, so replacements there would be ignored."""
    x = randn(8, 5)
    for change in (
        lambda part: part.register_forward_hook(lambda *args: None),
        lambda part: part.register_full_backward_hook(lambda *args: None),
        lambda part: setattr(part, "forward", lambda *args: None),
    ):
        for name in ("cross_entropy", "memory_bank"):
            loss = lightly.NTXentLoss()
            assert loss(x, x).isfinite()
            change(getattr(loss, name))
            with pytest.raises(RuntimeError, match=rf"{name} with its own (hooks|forward).*does not support"):
                loss(x, x)


def test_a_subclass_initialises_its_own_bank():
    class Ones(lightly.MemoryBankModule):
        def _init_memory_bank(self, size):
            self.bank = torch.ones(size)

    assert torch.equal(Ones((3, 2)).bank, torch.ones(3, 2))


def test_another_similarity_with_the_same_name_is_refused():
    def cos_sim(a, b):
        return -a @ b.T

    for similarity in (cos_sim, functools.wraps(sentence_transformers.cos_sim)(cos_sim)):
        with pytest.raises(RuntimeError, match=r"similarity_fct=cos_sim.*does not support"):
            sentence_transformers.MultipleNegativesRankingLoss(nn.Identity(), similarity_fct=similarity)


def test_hooks_of_sentence_transformers_and_timm_that_are_called():
    class Doubled(sentence_transformers.MultipleNegativesRankingLoss):
        def compute_loss_from_embeddings(self, embeddings, labels=None):
            return 2 * super().compute_loss_from_embeddings(embeddings, labels)

    features = [{"sentence_embedding": randn(4, 3, seed=seed)} for seed in (0, 1)]
    plain = sentence_transformers.MultipleNegativesRankingLoss(nn.Identity())
    torch.testing.assert_close(Doubled(nn.Identity())(features), 2 * plain(features))

    class Half(timm.ModelEmaV3):
        def get_decay(self, step=None):
            return 0.5

    class Nothing(timm.ModelEmaV3):
        def apply_update_(self, model, decay):
            pass

    model = nn.Linear(2, 2)
    before = model.weight.detach().clone()
    averages = [cls(model) for cls in (Half, Nothing)]
    with torch.no_grad():
        model.weight += 1
    for average, change in zip(averages, (0.5, 0.0), strict=True):
        average.update(model)
        torch.testing.assert_close(average.module.weight, before + change)


def test_the_error_survives_a_pickle():
    error = pickle.loads(pickle.dumps(unsupported("library.Loss", "reducer=Other")))
    assert str(error) == (
        "reducer=Other: the drop-in for library.Loss does not support this; use library.Loss itself for it"
    )


def test_timms_average_of_a_model_without_parameters():
    average = timm.ModelEmaV3(nn.Sequential(nn.ReLU(), nn.BatchNorm1d(2, affine=False)), decay=0.5)
    model = nn.BatchNorm1d(2, affine=False)
    model.running_mean += 1
    average.update(nn.Sequential(nn.ReLU(), model))
    torch.testing.assert_close(average.module[1].running_mean, torch.full((2,), 0.5))
    timm.ModelEmaV3(nn.ReLU()).update(nn.ReLU())
