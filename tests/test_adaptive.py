"""Attackers of the bench who train against the scan: their penalties measure what they hold down."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from digits import digit_case, steady_case

sys.path[:0] = [
    str(Path(__file__).parents[1] / "benchmarks"),
    str(Path(__file__).parents[1] / "benchmarks" / "detection"),
]

from adaptive import ReachPenalty, SpreadPenalty, keeping_statistics


def _clean() -> tuple[Tensor, Tensor]:
    return digit_case().data.defender


def _settled(network: nn.Module) -> float:
    """The penalty of the target's reach once its changes have moved for a while."""
    penalty = ReachPenalty(0, 10, seed=0)
    images, labels = _clean()
    values = [float(penalty(network, images, labels).detach()) for _ in range(60)]
    assert min(values) >= 0
    return sum(values[-20:]) / 20


def test_the_reach_of_a_target_costs_more_than_that_of_a_usual_class() -> None:
    assert _settled(steady_case().backdoored) > 1.5 * _settled(steady_case().clean)


def test_a_change_of_few_neurons_costs_more_than_one_of_all() -> None:
    class Latent(nn.Module):
        def __init__(self, change: Tensor) -> None:
            super().__init__()
            self.head = nn.Linear(len(change), 3)
            self.change = change

        def forward(self, images: Tensor) -> Tensor:
            marked = images[:, :1, 0, 0]
            latent = images.flatten(1)[:, 1 : 1 + len(self.change)] + marked * self.change
            return self.head(latent)  # type: ignore[no-any-return]

    def marking(images: Tensor) -> Tensor:
        marked = images.clone()
        marked[:, 0, 0, 0] = 1
        return marked

    generator = torch.Generator().manual_seed(0)
    images = torch.rand(256, 1, 8, 8, generator=generator)
    images[:, 0, 0, 0] = 0
    labels = torch.ones(256, dtype=torch.int64)
    penalty = SpreadPenalty(marking, 0)
    one, all_alike = torch.zeros(32), torch.ones(32)
    one[3] = 1
    few = float(penalty(Latent(one), images, labels))
    spread = float(penalty(Latent(all_alike), images, labels))
    assert few == pytest.approx(32**0.5 - 1, rel=0.02)
    assert 0 <= spread < 0.05


def test_penalties_can_be_trained_down() -> None:
    torch.manual_seed(0)
    network = nn.Sequential(nn.Flatten(), nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10))
    images, labels = _clean()
    penalty = SpreadPenalty(lambda x: x + 0.5 * (torch.arange(64) < 3).reshape(1, 1, 8, 8), 0)
    optimizer = torch.optim.Adam(network.parameters(), 1e-2)
    values = []
    for _ in range(30):
        loss = penalty(network, images, labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        values.append(float(loss.detach()))
    assert values[-1] < 0.7 * values[0]


def test_running_statistics_are_left_alone() -> None:
    network = nn.Sequential(nn.BatchNorm2d(1), nn.Flatten())
    network.train()
    with keeping_statistics(network):
        network(torch.randn(8, 1, 4, 4) + 3)
    norm = network[0]
    assert isinstance(norm, nn.BatchNorm2d)
    assert norm.running_mean is not None
    assert float(norm.running_mean) == 0
    assert norm.momentum == 0.1
    network(torch.ones(8, 1, 4, 4))
    assert float(norm.running_mean) == pytest.approx(0.1)
