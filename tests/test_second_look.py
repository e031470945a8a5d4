"""The second look: which samples and classes it takes, and what it makes of them."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from digits import digit_case
from tacext import InputError, sample_keeper, second_look
from tacext.heads import find_head
from tacext.reach import BUDGETS
from tacext.sample_keeper import MOST_SAMPLES, SampleKeeper
from tacext.second_look import (
    MOST_CLASSES,
    SecondLook,
    classes_to_look_at,
    evidence_of,
    look_again,
    norm_evidence,
    reach_evidence,
    shuffle_budgets,
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
    monkeypatch.setattr(sample_keeper, "MOST_BYTES", 4000)
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
    values = reach_evidence(np.stack([numbers, 2 * numbers]))
    assert values[0] == values[1] == pytest.approx(np.log(0.01))
    assert values[2:] == pytest.approx(np.log(numbers[2:]) + np.log(2) / 2)


def _look(classes: tuple[int, ...], samples: tuple[Tensor, Tensor]) -> SecondLook:
    network = digit_case().backdoored
    head = find_head(network, digit_case().data.defender[0][:4])
    return look_again(network, head, samples, classes, progress=False)


def test_what_was_not_looked_at_is_no_number() -> None:
    look = _look((0, 3, 8), digit_case().data.defender)
    evidence = evidence_of(np.linspace(1, 2, 10), look)
    assert set(evidence) == {"norm", "reach"}
    assert np.flatnonzero(np.isfinite(evidence["reach"])).tolist() == [0, 3, 8]
    assert np.isfinite(evidence["norm"]).all()
    assert look.shuffle is not None  # whatever the choice of classes


def test_too_few_samples_are_refused_and_sparse_ones_not_shuffled() -> None:
    images, labels = digit_case().data.defender
    classes = tuple(range(10))
    with pytest.raises(InputError, match="data: expected 40 samples"):
        _look(classes, (images[:39], labels[:39]))
    with pytest.raises(InputError, match="of several classes"):
        _look(classes, (images[labels == 3].repeat(3, 1, 1, 1), labels[labels == 3].repeat(3)))
    assert _look(classes, (images[:100], labels[:100])).shuffle is None  # 25 held out, ten classes


def test_the_batch_size_bounds_every_pass() -> None:
    network = digit_case().clean
    images, labels = digit_case().data.defender
    sizes: list[int] = []
    hook = network.register_forward_pre_hook(lambda _module, inputs: sizes.append(len(inputs[0])))
    head = find_head(network, images[:4])
    look_again(network, head, (images, labels), (0, 1, 2), batch_size=24, progress=False)
    hook.remove()
    assert max(sizes) == 24


def test_samples_of_another_shape_are_noticed() -> None:
    keeper = SampleKeeper()
    keeper.add(torch.zeros(3, 1, 8, 8), torch.zeros(3, dtype=torch.int64))
    assert keeper.one_shape
    keeper.add(torch.zeros(2, 1, 9, 9), torch.zeros(2, dtype=torch.int64))
    assert not keeper.one_shape
    assert len(keeper.samples()[1]) == 3


@pytest.mark.parametrize(
    ("reached", "tried"),
    [((1.0,), (1.0, 2.0)), ((1.0, 2.0), (1.0, 2.0, 4.0)), ((1.0, 2.0, 4.0, 8.0), BUDGETS)],
)
def test_a_shuffle_is_at_most_twice_as_long_as_the_changes(
    reached: tuple[float, ...], tried: tuple[float, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert shuffle_budgets(reached) == tried
    given: list[tuple[float, ...]] = []
    search = second_look.shuffle

    def noting(*arguments: object, budgets: tuple[float, ...], **options: object) -> object:
        given.append(budgets)
        return search(*arguments, budgets=budgets[:1], **options)  # type: ignore[arg-type]

    monkeypatch.setattr(second_look, "shuffle", noting)
    images, labels = digit_case().data.defender
    network = digit_case().clean
    head = find_head(network, images[:4])
    look = look_again(network, head, (images, labels), tuple(range(10)), progress=False)
    assert given == [shuffle_budgets(look.reach.budgets)]
