"""The second look: which samples and classes it takes, and what it makes of them."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from digits import digit_case
from tacext import second_look
from tacext.heads import find_head
from tacext.max_margin import InputBox
from tacext.second_look import (
    MOST_CLASSES,
    MOST_SAMPLES,
    SampleKeeper,
    SecondLook,
    classes_to_look_at,
    evidence_of,
    look_again,
    margin_evidence,
    norm_evidence,
    reach_evidence,
)


def keep(inputs: Tensor, labels: Tensor, batch: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    keeper = SampleKeeper(seed)
    for x, y in zip(inputs.split(batch), labels.split(batch), strict=True):
        keeper.add(x, y)
    return keeper.samples()


def test_the_choice_does_not_depend_on_the_batches() -> None:
    inputs, labels = torch.arange(3000.0)[:, None], torch.arange(3000) % 7
    whole = keep(inputs, labels, 3000)
    for batch in (1000, 37, 1):
        kept = keep(inputs, labels, batch)
        assert torch.equal(kept[0], whole[0])
        assert torch.equal(kept[1], whole[1])
    assert len(whole[1]) == MOST_SAMPLES == len(whole[0].unique())
    assert torch.equal(whole[1], whole[0][:, 0].long() % 7)  # labels stay with their inputs
    assert not torch.equal(keep(inputs, labels, 3000, seed=1)[0], whole[0])


def test_a_stream_sorted_by_class_is_kept_in_its_proportions() -> None:
    labels = torch.arange(10).repeat_interleave(1000)
    _, kept = keep(torch.zeros(10_000, 1), labels, 256)
    counts = kept.bincount(minlength=10)
    assert int(counts.min()) > 50  # of 80; five standard deviations are 42
    assert int((kept[:200]).bincount(minlength=10).min()) > 5  # held-out ones, too


def test_few_samples_are_all_kept_and_large_ones_within_the_memory(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    few, _ = keep(torch.arange(5.0)[:, None], torch.arange(5), 2)
    assert sorted(few.flatten().tolist()) == [0, 1, 2, 3, 4]
    monkeypatch.setattr(second_look, "MOST_BYTES", 4000)
    some, _ = keep(torch.zeros(500, 100), torch.zeros(500, dtype=torch.int64), 50)
    assert len(some) == 10
    assert len(SampleKeeper().samples()[1]) == 0


def test_of_many_classes_the_smallest_norms_and_others_are_looked_at() -> None:
    norm = np.random.default_rng(0).permutation(1000).astype(float)
    norm[norm == 999] = np.inf
    chosen = classes_to_look_at(norm)
    assert len(chosen) == MOST_CLASSES
    assert list(chosen) == sorted(set(chosen))
    ranks = np.sort(norm[list(chosen)])
    assert list(ranks[: MOST_CLASSES // 2]) == list(range(MOST_CLASSES // 2))
    assert np.diff(ranks[MOST_CLASSES // 2 : -1]).max() < 40  # evenly from all the others
    assert np.isinf(ranks[-1])
    assert classes_to_look_at(norm[:64]) == tuple(range(64))


def test_evidence_is_larger_where_a_class_is_more_suspicious() -> None:
    assert norm_evidence(np.array([1.0, 2.0]))[0] > norm_evidence(np.array([1.0, 2.0]))[1]
    assert np.isnan(norm_evidence(np.array([np.inf, np.nan, 0.0]))).all()
    numbers = np.array([-5.0, 0.0, 0.3, 2.0])
    for values in (margin_evidence(numbers), reach_evidence(np.stack([numbers, 2 * numbers]))):
        assert np.isfinite(values).all()
        assert values[0] == values[1] < values[2] < values[3]


def _look(classes: tuple[int, ...], samples: tuple[Tensor, Tensor] | None) -> SecondLook:
    network = digit_case().backdoored
    head = find_head(network, digit_case().data.defender[0][:4])
    box = InputBox.unit((1, 8, 8))
    return look_again(network, head, samples, box, classes, progress=False)


def test_what_was_not_looked_at_is_no_number() -> None:
    images, labels = digit_case().data.defender
    look = _look((0, 3, 8), (images, labels))
    evidence = evidence_of(np.linspace(1, 2, 10), look, 10)
    assert set(evidence) == {"norm", "noise_margin", "reach"}
    for kind in ("noise_margin", "reach"):
        assert np.flatnonzero(np.isfinite(evidence[kind])).tolist() == [0, 3, 8]
    assert np.isfinite(evidence["norm"]).all()
    assert look.shuffle is not None  # whatever the choice of classes


def test_with_too_few_samples_or_none_only_noise_is_driven() -> None:
    images, labels = digit_case().data.defender
    classes = tuple(range(10))
    for samples in (None, (images[:30], labels[:30])):
        look = _look(classes, samples)
        assert look.reach is None
        assert look.shuffle is None
        assert set(evidence_of(None, look, 10)) == {"noise_margin"}
    sparse = _look(classes, (images[:100], labels[:100]))  # 25 held out, of ten classes
    assert sparse.reach is not None
    assert sparse.shuffle is None
