"""Classifiers that others trained, backdoored and published; they do not come with this project.

Set TACEXT_MODELS to a folder whose zoo.py has MODELS and load(name, n, clean), giving a model,
clean and triggered images and the target.
"""

from __future__ import annotations

import functools
import importlib.util
import os
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from tacext import ScanReport, Status, scan

FOLDER = os.environ.get("TACEXT_MODELS")
pytestmark = pytest.mark.skipif(
    FOLDER is None, reason="published models are not shipped: set TACEXT_MODELS to their folder"
)

BACKDOORED = (
    "ibau_cifar10_badnets",
    "ibau_cifar10_trojan_sq",
    "ibau_gtsrb_badnets",
    "ibau_gtsrb_trojan_sq",
    "kabu03_cifar10",
    "badnets_mnist",
)
CLEAN = ("clean_cifar10_resnet20", "clean_cifar10_resnet32")


@functools.cache
def zoo() -> ModuleType:
    assert FOLDER is not None
    spec = importlib.util.spec_from_file_location("zoo", Path(FOLDER) / "zoo.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["zoo"] = module
    spec.loader.exec_module(module)
    return module


@functools.cache
def scanned(name: str) -> tuple[Any, ScanReport]:
    case = zoo().load(name, n=10, clean=2500)
    return case, scan(case.model, (case.x_clean, case.y_clean))


@pytest.mark.parametrize("name", BACKDOORED + CLEAN)
def test_every_class_is_certified_and_cheap(name: str) -> None:
    _, report = scanned(name)
    assert bool((report.perturbations.status == Status.OPTIMAL).all())
    assert report.certificate <= 1e-8
    assert report.accuracy > 0.8
    assert report.timings.margins + report.timings.solve + report.timings.test < 3


def test_the_target_has_the_smallest_norm_in_most_backdoored_models() -> None:
    first = [int(report.norm.argmin()) == case.target for case, report in map(scanned, BACKDOORED)]
    assert sum(first) >= 4


@pytest.mark.parametrize("name", BACKDOORED)
def test_the_target_is_the_most_suspicious_class(name: str) -> None:
    case, report = scanned(name)
    assert report.evidence is not None
    assert report.evidence.joint.most_suspicious == case.target
    assert report.suspects in ((), (case.target,))


@pytest.mark.parametrize("name", BACKDOORED)
def test_backdoored_models_are_flagged_with_their_target_alone(name: str) -> None:
    case, report = scanned(name)
    assert report.verdict == "backdoored"
    assert report.suspects == (case.target,)


@pytest.mark.parametrize("name", CLEAN)
def test_clean_models_are_called_clean(name: str) -> None:
    _, report = scanned(name)
    assert report.verdict == "clean"
