"""The zoo of the detection bench: every kind of model that it lists can be trained."""

from __future__ import annotations

import logging
import sys
from pathlib import Path

import pytest
import torch

from tacext import ImageSet

sys.path[:0] = [
    str(Path(__file__).parents[1] / "benchmarks"),
    str(Path(__file__).parents[1] / "benchmarks" / "detection"),
]

import training
from images import Data
from specs import ATTACKS, Spec, zoo

COUNT = 320


def _data() -> Data:
    """Images of two classes, one dark and one bright, as many as two batches and a half."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(COUNT) % 2
    images = torch.randint(0, 100, (COUNT, 3, 32, 32), generator=generator) + 150 * labels.reshape(
        -1, 1, 1, 1
    )
    both = ImageSet(images.to(torch.uint8), labels)
    return Data("cifar10", both, both)


@pytest.mark.parametrize("attack", ["clean", *ATTACKS])
def test_models_of_every_attack_can_be_trained(
    attack: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(training, "EPOCHS", {"cifar10": 1})
    with caplog.at_level(logging.WARNING, logger="tacext"):
        trained = training.train(Spec("cifar10", "vgg", attack, 0.1, 1), _data())
    assert not trained.model.training
    assert 0 <= trained.acc <= 1
    assert 0 <= trained.asr <= 1
    clean = attack == "clean"
    assert bool(trained.targets) != clean
    assert len(trained.attacks) == (0 if clean else 2 if attack == "two_targets" else 1)
    if clean:
        assert trained.asr == 0
        assert not caplog.records


def test_the_zoo_has_clean_models_of_every_network_on_all_data_and_all_attacks() -> None:
    specs = zoo()
    assert len({spec.name for spec in specs}) == len(specs)
    clean = {(spec.dataset, spec.network) for spec in specs if spec.attack == "clean"}
    assert len(clean) == 15
    assert {spec.attack for spec in specs} == {"clean", *ATTACKS}
