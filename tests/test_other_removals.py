"""The removals that the bench compares with, on the real digit classifier."""

from __future__ import annotations

import copy
import functools
import json
import sys
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn import functional

from digits import digit_case, steady_case
from tacext import Evaluation, demo, evaluate

sys.path.append(str(Path(__file__).parents[1] / "benchmarks" / "repair"))

import pruning
import report_repairs
import tuning
import unlearning
from clean_images import CleanImages, DivergedError, accuracy, constant, descend, trainable_copy
from other_removals import REMOVALS, remove

# Shares of the published effort. The digits are few, so that an epoch has only a few steps.
EFFORT = {
    "fine-tuning": 0.05,
    "ft-sam": 0.1,
    "nad": 1.0,
    "anp": 0.03,
    "clp": 1.0,
    "i-bau": 0.8,
    "fst": 1.0,
}

# What each leaves of the backdoor (ASR 1 before), at least and at most, and of the accuracy (.99)
# here. Fine-tuning leaves all of it, and no channel of so small a network stands out for CLP.
EXPECTED = {
    "fine-tuning": (0.9, 1.0, 0.97),
    "ft-sam": (0.0, 0.1, 0.93),
    "nad": (0.0, 0.1, 0.85),
    "anp": (0.0, 0.1, 0.93),
    "clp": (0.9, 1.0, 0.97),
    "i-bau": (0.0, 0.1, 0.95),
    "fst": (0.0, 0.2, 0.97),
}


def _clean(effort: float = 1.0) -> CleanImages:
    return CleanImages(*digit_case().data.defender, effort=effort)


@functools.cache
def _double() -> nn.Module:
    """The model in float64: trained on in that, it becomes nearly the same on every processor."""
    return copy.deepcopy(steady_case().backdoored).double()


@functools.cache
def _repaired(name: str) -> nn.Module:
    images, labels = digit_case().data.defender
    clean = CleanImages(images.double(), labels)
    with demo.one_thread():
        return remove(name, _double(), clean, EFFORT[name] / REMOVALS[name].effort)[0]


def _measured(model: nn.Module) -> Evaluation:
    model = copy.deepcopy(model).float()
    return evaluate(model, digit_case().data.test, demo.white_corner, demo.TARGET)


@pytest.mark.parametrize("name", REMOVALS)
def test_a_removal_leaves_what_is_expected_of_it(name: str) -> None:
    model = _double()
    before = {n: v.clone() for n, v in model.state_dict().items()}
    repaired = _repaired(name)
    assert all(torch.equal(v, before[n]) for n, v in model.state_dict().items())
    assert not repaired.training
    least, most, acc = EXPECTED[name]
    found = _measured(repaired)
    assert least <= found.asr <= most
    assert found.acc >= acc


def test_a_removal_is_the_same_every_time() -> None:
    with demo.one_thread():
        first, second = (
            remove("fst", digit_case().backdoored, _clean(), 0.2)[0].state_dict() for _ in range(2)
        )
    assert all(torch.equal(v, second[n]) for n, v in first.items())


def test_the_held_out_images_are_not_trained_on() -> None:
    clean = _clean()
    training, held_out = clean.split()
    assert (len(training), len(held_out)) == (320, 80)
    both = torch.cat([training.images, held_out.images]).flatten(1)
    assert torch.equal(both.sort(0).values, clean.images.flatten(1).sort(0).values)


def test_an_epoch_shows_every_image_once() -> None:
    shown = torch.cat([labels for _, labels in _clean().batches(0, 64)])
    assert torch.equal(shown.sort().values, _clean().labels.sort().values)


def test_a_training_that_diverges_is_told() -> None:
    with pytest.raises(DivergedError, match="the loss is nan"):
        descend(trainable_copy(digit_case().backdoored), _clean(), 3, 1e6, schedule=constant)


def test_sam_takes_the_gradient_where_the_loss_is_higher() -> None:
    """At rho = 0 it is fine-tuning with smoothed labels, to the last bit."""
    model, clean = digit_case().backdoored, _clean(0.01)

    def smoothed(network: nn.Module, images: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        return functional.cross_entropy(network(images), labels, label_smoothing=0.1)

    plain = descend(trainable_copy(model), clean, 1, 0.01, smoothed)
    same, other = tuning._flat(model, clean, 0.0), tuning._flat(model, clean, 8.0)
    weights = (network.get_parameter("0.weight") for network in (plain, same, other))
    first, second, third = weights
    torch.testing.assert_close(first, second)
    assert not torch.allclose(first, third, atol=1e-4)


def test_attention_is_compared_at_the_ends_of_the_stages() -> None:
    layers = tuning.attention_layers(digit_case().backdoored, _clean().images[:2])
    assert layers == ["16", "12", "5"]  # 2x2, 4x4 and 8x8, each after the last ReLU


def test_a_masked_neuron_is_silent() -> None:
    model = digit_case().backdoored
    gone = torch.arange(16) == 3
    pruned = pruning.without_neurons(model, {"1": gone})
    with torch.no_grad():
        shown = pruned[:2](_clean().images[:8])  # type: ignore[index]
    assert torch.allclose(shown[:, 3], pruned.get_parameter("1.bias")[3])
    assert float(shown[:, 4].std()) > 0.1


def test_a_channel_that_stands_out_is_pruned() -> None:
    for norm in (nn.BatchNorm2d(12), nn.Identity()):
        convolution = nn.Conv2d(1, 12, 3)
        with torch.no_grad():
            convolution.weight[5] *= 50
        pruned = pruning.clp(nn.Sequential(convolution, norm), _clean())
        layer = pruned.get_submodule("1" if isinstance(norm, nn.BatchNorm2d) else "0")
        assert isinstance(layer.weight, torch.Tensor)
        silent = layer.weight.flatten(1 if layer.weight.dim() > 1 else 0)
        silent = (silent == 0).all(1) if silent.dim() > 1 else silent == 0
        assert silent.nonzero().flatten().tolist() == [5]


def test_one_change_of_bounded_length_fools_the_model_on_all_images() -> None:
    model, clean = digit_case().backdoored, _clean()
    change = unlearning.universal_change(model, clean)
    assert float(change.norm()) <= unlearning.RADIUS * 1.0001
    moved = CleanImages(clean.images + change, clean.labels)
    assert accuracy(model, moved) < 0.5 < accuracy(model, clean)


def test_the_hypergradient_is_that_of_the_loss_after_inner_steps() -> None:
    """Against differences, on a problem whose inner steps lead to a fixed point."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(4, 3)).double()
    weight = model.get_parameter("1.weight")
    images, labels = torch.rand(8, 1, 2, 2).double(), torch.arange(8) % 3

    class Inner(unlearning.Inner):
        def loss(self, change: torch.Tensor) -> torch.Tensor:
            return super().loss(change) + 4.5 * change.square().sum()

    inner = Inner(model, images, labels)

    def fixed_point() -> torch.Tensor:
        change = torch.zeros(1, 1, 2, 2).double()
        for _ in range(300):
            change.requires_grad_(True)
            (slope,) = torch.autograd.grad(inner.loss(change), change)
            change = (change - 0.1 * slope).detach()
        return change.requires_grad_(True)

    def outer(change: torch.Tensor) -> torch.Tensor:
        return functional.cross_entropy(model(images + change), labels)

    change = fixed_point()
    (found,) = unlearning.hypergradient(inner, outer(change), change, [weight])
    step = 1e-4
    with torch.no_grad():
        weight[1, 2] += step
    up = float(outer(fixed_point()).detach())
    with torch.no_grad():
        weight[1, 2] -= 2 * step
    down = float(outer(fixed_point()).detach())
    assert float(found[1, 2]) == pytest.approx((up - down) / (2 * step), rel=1e-2)


# ---- what is reported ----------------------------------------------------------------------------


def _keep(folder: Path, model: str, method: str, der: float, **more: object) -> None:
    before = {"acc": 0.9, "asr": 1.0, "asr_max": 1.0, "ra": 0.0, "ra_min": 0.0}
    after = {"acc": 0.89, "asr": 0.02, "asr_max": 0.03, "ra": 0.8, "ra_min": 0.8}
    fields = {
        "method": method, "detected": False, "share": 1, "attack": "blend", "samples": 2500,
        "seed": 0, "before": before, "after": after, "der": der, "seconds": 10.0,
    }  # fmt: skip
    file = folder / model / f"{method}.json"
    file.parent.mkdir(exist_ok=True)
    file.write_text(json.dumps(fields | more), encoding="utf-8")


def test_wins_are_counted_by_more_than_a_point_of_der(tmp_path: Path) -> None:
    for model, ours, theirs in (("a", 0.9, 0.85), ("b", 0.9, 0.895), ("c", 0.8, 0.9)):
        _keep(tmp_path, model, "tacext-auto", ours)
        _keep(tmp_path, model, "nad", theirs)
    _keep(tmp_path, "d", "nad", 0.5)  # tacext has not run
    _keep(tmp_path, "a", "fst", 0.5, failed="the loss is nan")
    rows = report_repairs.read(tmp_path, 2500, detected=False)
    table = report_repairs.wins(rows, "tacext-auto")
    assert [list(column.cells) for column in table.columns] == [
        ["blend", "all"],
        ["1 / 1 / 1"] * 2,
        ["-"] * 2,
    ]


def test_other_settings_are_not_mixed_in(tmp_path: Path) -> None:
    _keep(tmp_path, "a", "tacext-auto", 0.9, detected=True)
    _keep(tmp_path, "b", "tacext-auto", 0.9, samples=100)
    _keep(tmp_path, "c", "nad", 0.9, seed=1)
    _keep(tmp_path, "d", "nad", 0.9, share=0.5)
    assert report_repairs.read(tmp_path, 2500, detected=False) == []
    assert [row.model for row in report_repairs.read(tmp_path, 2500, detected=True)] == ["a"]


def test_a_row_that_misses_a_goal_is_listed(tmp_path: Path) -> None:
    _keep(tmp_path, "a", "nad", 0.9)
    (row,) = report_repairs.read(tmp_path, 2500, detected=False)
    assert (row.asr, row.drop, row.gap) == pytest.approx((0.03, 0.01, 0.09))
    assert report_repairs.misses([row], 0.03, 0.02, 0.1).row_count == 0
    for limits in ((0.02, 0.02, 0.1), (0.03, 0.005, 0.1), (0.03, 0.02, 0.05)):
        assert report_repairs.misses([row], *limits).row_count == 1
