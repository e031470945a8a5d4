"""No operator mixes devices: neither its wrapper nor, where torch picks the fake kernel, that one."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from tacext import ops
from tacext.errors import InputError

# The wrapper, the bare operator, and arguments that fit together: the first sets the device.
Case = tuple[Callable[..., object], Callable[..., object], dict[str, Tensor]]
OPERATORS: dict[str, Case] = {
    "pairwise_margin_max": (
        ops.pairwise_margin_max,
        torch.ops.tacext.pairwise_margin_max_.default,
        {"logits": torch.zeros(5, 3), "out": torch.zeros(3, 3)},
    ),
    "pairwise_margin_largest": (
        ops.pairwise_margin_largest,
        torch.ops.tacext.pairwise_margin_largest_.default,
        {"logits": torch.zeros(5, 3), "out": torch.zeros(3, 3, 2)},
    ),
    "minimal_perturbation": (
        ops.minimal_perturbation,
        torch.ops.tacext.minimal_perturbation.default,
        {
            "weight": torch.eye(3, 4),
            "margins": torch.zeros(3, 3),
            "scale": torch.ones(4),
            "classes": torch.tensor([1]),
        },
    ),
    "neuron_scores": (
        ops.neuron_scores,
        torch.ops.tacext.neuron_scores.default,
        {"activation": torch.zeros(5, 3), "gradient": torch.zeros(5, 3)},
    ),
    "guard_score": (
        ops.guard_score,
        torch.ops.tacext.guard_score.default,
        {
            "latent": torch.zeros(5, 4),
            "logits": torch.zeros(5, 3),
            "mean": torch.zeros(3, 4),
            "inverse_spread": torch.ones(4),
            "basis": torch.eye(2, 4),
            "near_weight": torch.ones(3),
            "far_weight": torch.ones(3),
            "direction": torch.zeros(3, 4),
            "location": torch.zeros(3, 4),
            "inverse_deviation": torch.ones(3, 4),
            "knots": torch.arange(2.0),
            "exceeding": torch.arange(3.0).flip(0),
            "threshold": torch.tensor(1.0),
            "samples": torch.tensor(2),
        },
    ),
}
MIXED = [(name, other) for name, case in OPERATORS.items() for other in list(case[2])[1:]]


def bare_arguments(name: str, arguments: dict[str, Tensor]) -> list[Tensor]:
    """In the order of the operator's schema, which updates its first argument."""
    order = list(arguments.values())
    return order[::-1] if name.startswith("pairwise") else order


@pytest.mark.parametrize(("name", "other"), MIXED)
def test_the_wrapper_names_what_lies_elsewhere(name: str, other: str) -> None:
    wrapper, _, arguments = OPERATORS[name]
    first = next(iter(arguments))
    moved = {**arguments, other: arguments[other].to("meta")}
    with pytest.raises(
        InputError, match=rf"^{name}: {other}: expected cpu, the device of {first}, got meta; move"
    ):
        wrapper(**moved)


@pytest.mark.parametrize("name", OPERATORS)
def test_the_wrapper_names_what_stays_behind(name: str) -> None:
    wrapper, _, arguments = OPERATORS[name]
    first, other = list(arguments)[:2]
    with pytest.raises(InputError, match=rf"^{name}: {other}: expected meta, .*, got cpu"):
        wrapper(**{**arguments, first: arguments[first].to("meta")})


@pytest.mark.parametrize(("name", "other"), MIXED)
def test_the_fake_kernel_gives_no_result(name: str, other: str) -> None:
    _, operator, arguments = OPERATORS[name]
    moved = {**arguments, other: arguments[other].to("meta")}
    with pytest.raises(InputError, match=rf"^{name}: {other}: expected cpu"):
        operator(*bare_arguments(name, moved))


@pytest.mark.parametrize("name", OPERATORS)
def test_one_device_is_no_error(name: str) -> None:
    wrapper, operator, arguments = OPERATORS[name]
    for device in ("cpu", "meta"):
        there = {key: value.to(device, copy=True) for key, value in arguments.items()}
        wrapper(**there)
        operator(*bare_arguments(name, there))
