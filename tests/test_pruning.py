"""Pruning of real classifiers."""

from __future__ import annotations

import copy
import dataclasses
import functools
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from digits import digit_case
from tacext import InputError, demo, load_state_dict, save_weights
from tacext.heads import find_head
from tacext.input_adversary import InputAdversary
from tacext.pruning import PruneHistory, PruneSettings, most_for_least, prune

SETTINGS = PruneSettings(rounds=3)


class PaintedCorner:
    """The trigger itself in the place of what a search finds: it neither moves nor misses."""

    targets = (demo.TARGET,)

    def attack(self, inputs: Tensor, step: int) -> Tensor:
        return demo.white_corner(inputs)

    def loss(self, logits: Tensor, original: Tensor) -> Tensor:
        return logits.sum()

    def follow(self) -> None:
        pass

    @torch.no_grad()
    def moved(self, model: nn.Module, inputs: Tensor, labels: Tensor, batch_size: int) -> Tensor:
        others = inputs[(labels != demo.TARGET) & (model(inputs).argmax(1) != demo.TARGET)]
        hits = model(demo.white_corner(others)).argmax(1) == demo.TARGET
        return hits.double().mean().reshape(1, 1)


def pruned(
    model: nn.Module,
    adversary: object,
    settings: PruneSettings = SETTINGS,
    *,
    targets: tuple[int, ...] = (demo.TARGET,),
    max_accuracy_drop: float = 0.02,
) -> tuple[nn.Module, PruneHistory]:
    model = copy.deepcopy(model)
    images, labels = digit_case().data.defender
    head = find_head(model, images[:4])
    shifts = torch.ones(len(targets), head.latent_dim, dtype=torch.float64)
    history = prune(
        model,
        head,
        images,
        labels,
        shifts,
        targets,
        adversary,  # type: ignore[arg-type]
        settings,
        max_accuracy_drop=max_accuracy_drop,
        progress=False,
    )
    return model, history


@functools.cache
def with_the_trigger() -> tuple[nn.Module, PruneHistory]:
    return pruned(digit_case().backdoored, PaintedCorner())


@torch.no_grad()
def asr(model: nn.Module) -> float:
    images, labels = digit_case().data.test
    triggered = demo.white_corner(images[labels != demo.TARGET])
    return float((model(triggered).argmax(1) == demo.TARGET).double().mean())


@torch.no_grad()
def accuracy(model: nn.Module) -> float:
    images, labels = digit_case().data.test
    return float((model(images).argmax(1) == labels).double().mean())


def test_who_knows_the_trigger_prunes_most_of_the_backdoor_with_few_channels() -> None:
    model, history = with_the_trigger()
    assert history.before.most_moved > 0.95
    assert history.after.most_moved <= 0.5
    assert asr(digit_case().backdoored) > 0.95
    assert asr(model) < 0.5
    assert accuracy(model) > accuracy(digit_case().backdoored) - 0.03
    assert 0 < len(history.channels) <= 20
    assert history.candidates == 224


def test_pruned_channels_are_constant_in_parameters_that_a_file_keeps(tmp_path: Path) -> None:
    model, history = with_the_trigger()
    modules = dict(model.named_modules())
    for channel in history.channels:
        assert not bool(modules[channel.layer].weight[channel.channel].any())  # type: ignore[index]
        assert modules[str(int(channel.layer) + 1)].weight[channel.channel] == 0  # type: ignore[index]
    names = [(c.layer, c.channel) for c in history.channels]
    assert len(set(names)) == len(names)
    changed = sum(
        not torch.equal(a, b)
        for a, b in zip(
            digit_case().backdoored.state_dict().values(), model.state_dict().values(), strict=True
        )
    )
    assert 0 < changed <= 4 * len({layer for layer, _ in names})
    save_weights(model, tmp_path / "pruned.safetensors")
    loaded = copy.deepcopy(digit_case().backdoored)
    loaded.load_state_dict(load_state_dict(tmp_path / "pruned.safetensors"))
    images, _ = digit_case().data.test
    assert torch.equal(loaded(images), model(images))


def test_history_is_what_the_model_does() -> None:
    model, history = with_the_trigger()
    images, labels = digit_case().data.defender
    with torch.no_grad():
        right = (model(images).argmax(1) == labels).double().mean()
    assert history.after.accuracy == pytest.approx(float(right))
    assert history.after.accuracy >= history.before.accuracy - 0.01
    assert history.before.channels == ()
    first = history.rounds[0].channels
    assert len(first) == round(SETTINGS.share * 224)
    assert first[0].score > 0
    assert all(norm > 0 for step in history.rounds for norm in step.norms)


def test_the_same_seed_prunes_the_same_channels() -> None:
    _, again = pruned(digit_case().backdoored, PaintedCorner())
    assert again.channels == with_the_trigger()[1].channels


def test_a_pruning_that_misses_is_taken_back() -> None:
    class Elsewhere(PaintedCorner):
        """Attacks that lead nowhere, and a count of images moved that nothing lowers."""

        def attack(self, inputs: Tensor, step: int) -> Tensor:
            return inputs.flip(3)

        def moved(self, *arguments: object) -> Tensor:
            return torch.ones(1, 1, dtype=torch.float64)

    model, history = pruned(digit_case().backdoored, Elsewhere())
    assert len(history.rounds) > 0
    assert history.after == history.before
    for name, value in digit_case().backdoored.state_dict().items():
        assert torch.equal(model.state_dict()[name], value)


def test_a_clean_model_wrongly_pruned_stays_nearly_as_good() -> None:
    case = digit_case()
    images, labels = case.data.defender
    head = find_head(case.clean, images[:4])
    targets = (3, 5)
    adversary = InputAdversary.sought(case.clean, head, images, labels, targets, progress=False)
    changes = [c.change.clone() for c in adversary._changes]
    model, _ = pruned(case.clean, adversary, targets=targets)
    assert accuracy(model) > accuracy(case.clean) - 0.04  # of 400 samples
    for before, after in zip(changes, adversary._changes, strict=True):
        assert torch.equal(before, after.change)  # the copy moves on, not the caller's


def test_without_an_adversary_shifted_latents_choose() -> None:
    _, history = pruned(digit_case().backdoored, None, PruneSettings(rounds=1))
    assert history.rounds[0].moved == ()
    assert len(history.rounds[0].channels) > 0


def test_zeros_take_the_place_of_means() -> None:
    settings = PruneSettings(rounds=1, replacement="zero")
    model, history = pruned(digit_case().backdoored, PaintedCorner(), settings, max_accuracy_drop=1)
    modules = dict(model.named_modules())
    for channel in history.channels:
        assert modules[str(int(channel.layer) + 1)].bias[channel.channel] == 0  # type: ignore[index]


def test_a_model_without_channels_is_an_error() -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 10))
    with pytest.raises(InputError, match="each used once"):
        pruned(model, PaintedCorner())


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("gamma", 0.0),
        ("rounds", 0),
        ("share", 1.5),
        ("samples", 1),
        ("replacement", "median"),
        ("holdout", 1.0),
    ],
)
def test_settings_say_what_is_wrong_with_them(name: str, value: object) -> None:
    with pytest.raises(InputError, match=f"PruneSettings: {name}"):
        dataclasses.replace(SETTINGS, **{name: value})


def test_channels_are_chosen_for_what_they_do_together() -> None:
    # Two channels each carry the whole backdoor, a third costs accuracy alone.
    clean = torch.ones(4), torch.tensor([[0.0, 0.1, 5.0]]).expand(4, 3)
    attacked = torch.full((4,), 3.0), torch.tensor([[6.0, 6.0, 0.0]]).expand(4, 3)
    free = torch.ones(3, dtype=torch.bool)
    chosen = most_for_least(clean, attacked, 1.0, free, 3)
    assert chosen[0] == 0
    assert 2 not in chosen
    assert most_for_least(clean, attacked, 0.01, free, 3) == [
        0
    ]  # the second is worth its cost no more
    assert sorted(most_for_least(clean, attacked, 0.01, free, 3, at_a_loss=True)) == [0, 1, 2]
    free[0] = False
    assert most_for_least(clean, attacked, 1.0, free, 3) == [1]
