"""What makes a scan doubtful is said, and what would help: other data, more samples."""

from __future__ import annotations

import dataclasses
import io

import pytest
import torch
from rich.console import Console
from torch import nn

from digits import Cropped, digit_case, padded
from tacext import scan
from tacext.detection import Verdict
from tacext.doubts import ENOUGH_SAMPLES, LARGEST_CONFIDENCE_GAP, Doubt, doubted
from tacext.tables import scan_table
from tacext.verdict import Finding

DEPTHS = pytest.mark.parametrize("depth", ["fast", "thorough"])


@DEPTHS
def test_a_model_that_is_surer_than_right_is_not_cleared(depth: str) -> None:
    images, labels = digit_case().data.defender
    wrong = labels.clone()
    wrong[::3] = (wrong[::3] + 1) % 10  # a third: the accuracy alone would still pass
    report = scan(digit_case().clean, (images, wrong), depth=depth)  # type: ignore[arg-type]
    assert report.accuracy > 0.6
    assert report.confidence - report.accuracy > LARGEST_CONFIDENCE_GAP
    assert report.verdict == "inconclusive"
    assert any("of another kind than it was trained on" in w for w in report.warnings)


def test_classes_in_doubt_are_told_beside_the_suspects() -> None:
    report = scan(digit_case().clean, digit_case().data.defender, depth="fast")
    report = dataclasses.replace(report, suspects=(3,), doubtful=(7, 1))
    console = Console(file=io.StringIO(), width=100)
    console.print(scan_table(report))
    text = console.file.getvalue()  # type: ignore[attr-defined]
    assert "suspects: 3   in doubt: 7, 1   p = " in text
    first = [int(line.split()[0]) for line in text.splitlines()[1:11]]
    assert first[:3] == [3, 7, 1]  # the others by their norms
    assert sorted(first) == list(range(10))
    rest = [float(report.norm[k]) for k in first[3:]]
    assert rest == sorted(rest)


@pytest.mark.parametrize("images", [99, 100])
def test_patches_that_do_not_count_have_no_column(images: int) -> None:
    report = scan(Cropped(digit_case().clean), padded(digit_case().data.defender))
    assert report.evidence is not None
    assert report.evidence.look is not None
    look = report.evidence.look
    assert look.patch is not None
    look = dataclasses.replace(look, patch=dataclasses.replace(look.patch, images=images))
    report = dataclasses.replace(report, evidence=dataclasses.replace(report.evidence, look=look))
    console = Console(file=io.StringIO(), width=120)
    console.print(scan_table(report))
    heading = console.file.getvalue().splitlines()[0]  # type: ignore[attr-defined]
    assert heading.count("patch") == (2 if images == 100 else 1)  # "p patch" was computed before


@pytest.mark.parametrize("verdict", ["backdoored", "clean", "inconclusive"])
def test_beside_a_severe_doubt_no_class_is_named(verdict: Verdict) -> None:
    suspects = (3,) if verdict == "backdoored" else ()
    finding = Finding(verdict, suspects, 0.05, "said", (5,))
    found = doubted(finding, (Doubt("too few", severe=True),))
    assert (found.verdict, found.suspects, found.doubtful) == ("inconclusive", (), ())
    mild = doubted(finding, (Doubt("some", severe=False),))
    assert (mild.suspects, mild.doubtful) == (suspects, (5,))


def test_the_confidence_is_the_mean_largest_probability() -> None:
    images, labels = digit_case().data.defender
    report = scan(digit_case().clean, (images, labels), depth="fast", batch_size=64)
    with torch.no_grad():
        expected = digit_case().clean(images).softmax(1).amax(1).mean()
    assert report.confidence == pytest.approx(float(expected), abs=1e-5)
    assert report.confidence - report.accuracy < 0.05
    assert not report.warnings


def test_probabilities_are_the_models_own() -> None:
    class Cooler(nn.Module):
        def __init__(self, as_softmax: bool) -> None:
            super().__init__()
            self.model = digit_case().clean
            self.as_softmax = as_softmax

        def forward(self, images: torch.Tensor) -> torch.Tensor:
            logits: torch.Tensor = self.model(images) / 5
            return logits.softmax(1) if self.as_softmax else logits

    images, labels = digit_case().data.defender
    with torch.no_grad():
        expected = float((digit_case().clean(images) / 5).softmax(1).amax(1).mean())
    for as_softmax in (True, False):
        network = Cooler(as_softmax)
        report = scan(network, (images, labels), head="model.19", depth="fast")
        assert report.confidence == pytest.approx(expected, abs=1e-4)


def test_more_samples_are_advised_where_they_may_help() -> None:
    images, labels = digit_case().data.defender
    few = scan(digit_case().clean, (images[:100], labels[:100]), depth="fast")
    assert (few.verdict, few.samples_advised) == ("inconclusive", ENOUGH_SAMPLES)
    console = Console(width=200, record=True, file=io.StringIO())
    console.print(scan_table(few))
    assert f"{ENOUGH_SAMPLES} clean samples may tell more" in console.export_text()
    crooked = (labels + 1) % 10, (labels * torch.tensor([1, 0, 1]).repeat(134)[:400])
    for wrong in crooked:  # more samples would not mend wrong labels
        assert scan(digit_case().clean, (images, wrong), depth="fast").samples_advised is None
        few_and_wrong = scan(digit_case().clean, (images[:100], wrong[:100]), depth="fast")
        assert (few_and_wrong.verdict, few_and_wrong.samples_advised) == ("inconclusive", None)
    clear = scan(digit_case().backdoored, (images, labels), depth="fast")
    assert (clear.verdict, clear.samples_advised) == ("backdoored", None)
    repeated = images[:100].repeat(25, 1, 1, 1), labels[:100].repeat(25)
    many = scan(digit_case().clean, repeated, depth="fast", alpha=0.3)
    assert many.samples == ENOUGH_SAMPLES
    assert many.samples_advised is None


def test_the_classes_without_samples_are_named() -> None:
    case = digit_case()
    images, labels = case.data.defender
    kept = (labels != 4) & (labels != 7)
    report = scan(case.clean, (images[kept], labels[kept]), depth="norms")
    assert report.warnings[0].startswith("the data covers 8 of 10 classes (none of 4, 7)")
