"""Fitting early exits: which layers are looked at, what they are fitted on, and what comes of it."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from blobs import blobs, trained
from digits import digit_case
from tacext.differentiable import InputBox
from tacext.early_exits_fit import (
    MOST_EXITS,
    _ClassStatistics,
    _Fold,
    _least,
    _out_of_fold,
    _spoilers,
    _votes,
    fit_early_exits,
    layers_to_look_at,
)
from tacext.heads import find_head


def test_the_discriminant_is_fishers() -> None:
    """Against one that is written out, on the same features."""

    class Flat(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Linear(6, 7)
            self.fc = nn.Linear(7, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.fc(self.inner(x).tanh())  # type: ignore[no-any-return]

    torch.manual_seed(0)
    model = Flat()
    labels = torch.arange(300) % 3  # of four classes one has no samples
    inputs = torch.randn(300, 6) + 3 * functional.one_hot(labels, 6)
    head = find_head(model, inputs[:4])
    exits = fit_early_exits(model, head, (inputs, labels), [], batch_size=37, seed=0)
    assert exits is not None
    assert exits.names == ("inner",)
    with torch.no_grad():
        x = model.inner(inputs).double().numpy()
        y = labels.numpy()
    spread = x.std(0)
    z = (x - x.mean(0)) / spread
    means = np.stack([z[y == k].mean(0) for k in range(3)])
    within = (z - means[y]).T @ (z - means[y]) / len(z)
    within += 0.1 * within.diagonal().mean() * np.eye(7)
    expected = np.linalg.solve(within, means.T).T
    scores = z @ expected.T - 0.5 * (expected * means).sum(1)
    exit_ = next(iter(exits.layers.values()))
    found = exit_(torch.from_numpy(x).float()).numpy()
    np.testing.assert_allclose(found[:, :3], scores, rtol=1e-3, atol=1e-3)
    assert exits.known.tolist() == [True, True, True, False]
    assert float((found[:, :3].argmax(1) == y).mean()) > 0.9


class Unusual(nn.Module):
    """With layers that an exit cannot look at, and some that it can."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(1, 4, 3, padding=1)
        self.twice = nn.Conv2d(4, 4, 3, padding=1)
        self.never = nn.Conv2d(4, 4, 1)
        self.values = nn.Conv2d(4, 4, 1)  # a name that nn.ModuleDict keeps for itself
        self.channels_last = nn.Linear(4, 4)
        self.add_module("with/slash", nn.Conv2d(4, 4, 1))
        self.across = nn.Linear(4, 4)
        self.fused = nn.Linear(4, 4)
        self.aux, self.planes = nn.Linear(4, 2), nn.Linear(25, 2)
        self.behind = nn.Linear(3, 3)
        self.last = nn.Linear(4, 6)
        self.fc = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.values(self.twice(self.twice(self.first(x)).relu()))
        x = self.get_submodule("with/slash")(x)
        x = self.channels_last(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        self.aux(x[: len(x) // 2].mean((2, 3)))  # of some inputs alone
        self.planes(x.transpose(0, 1).flatten(2))  # three channels are no three inputs
        tokens = x.flatten(2).transpose(1, 2)
        tokens = self.across(tokens.transpose(0, 1)).transpose(0, 1)  # positions first
        tokens = self.fused(tokens)
        if self.fused._forward_hooks:  # as where torch has a kernel for all of it, without hooks
            tokens = tokens * (1 + 1e-6)
        logits = self.fc(self.last(tokens.mean(1)))
        self.behind(logits)
        return logits  # type: ignore[no-any-return]


def test_layers_are_those_that_can_be_looked_at_unnoticed() -> None:
    torch.manual_seed(0)
    model, images = Unusual().eval(), torch.rand(40, 1, 5, 5)
    head = find_head(model, images[:4])
    names = layers_to_look_at(model, head, images)
    assert names == ("first", "values", "channels_last", "last")


def test_so_many_layers_are_looked_at_evenly() -> None:
    model = nn.Sequential(*[nn.Linear(5, 5) for _ in range(12)], nn.Linear(5, 3)).eval()
    inputs = torch.rand(9, 5)
    names = layers_to_look_at(model, find_head(model, inputs), inputs)
    assert names == ("0", "3", "6", "8", "11")
    assert len(names) == MOST_EXITS


def test_a_model_of_one_layer_has_none() -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 10))
    images, labels = digit_case().data.defender
    head = find_head(model, images[:4])
    assert fit_early_exits(model, head, (images, labels), [], batch_size=64, seed=0) is None


def test_the_same_seed_gives_the_same_exits() -> None:
    model, data = digit_case().backdoored, digit_case().data.defender
    head = find_head(model, data[0][:4])
    found = [fit_early_exits(model, head, data, [], batch_size=64, seed=s) for s in (0, 0, 1)]
    states = [exits.state_dict() for exits in found if exits is not None]
    assert all(torch.equal(v, states[1][n]) for n, v in states[0].items())
    assert not all(torch.equal(v, states[2][n]) for n, v in states[0].items())


def test_what_follows_a_layer_does_not_change_its_note() -> None:
    torch.manual_seed(2)
    inputs, labels = blobs()
    with torch.enable_grad():
        model = trained(nn.Sequential(nn.Linear(8, 8), nn.Sigmoid()), inputs, labels)
    in_place = copy.deepcopy(model)
    in_place[0][1] = InPlaceSigmoid()  # type: ignore[index,operator]
    found = []
    for each in (model, in_place):
        head = find_head(each, inputs[:4])
        found.append(fit_early_exits(each, head, (inputs, labels), [], batch_size=64, seed=0))
    states = [exits.state_dict() for exits in found if exits is not None]
    assert all(torch.equal(v, states[1][n]) for n, v in states[0].items())


class InPlaceSigmoid(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.sigmoid_()


def test_layers_that_some_passes_leave_out_or_that_overflow_are_dropped() -> None:
    class Router(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.always, self.seldom = nn.Linear(8, 8), nn.Linear(8, 8)
            self.huge = nn.Linear(8, 8)
            with torch.no_grad():
                self.huge.weight.fill_(torch.finfo(torch.float32).max)

        def forward(self, x: Tensor) -> Tensor:
            self.huge(x)
            if len(x) != 48:  # the last batch
                self.seldom(x)
            return self.always(x).tanh()  # type: ignore[no-any-return]

    torch.manual_seed(3)
    inputs, labels = blobs()
    with torch.enable_grad():
        model = trained(Router(), inputs, labels)
    head = find_head(model, inputs[:4])
    assert layers_to_look_at(model, head, inputs) == ("0.huge", "0.seldom", "0.always")
    exits = fit_early_exits(model, head, (inputs, labels), [], batch_size=64, seed=0)
    assert exits is not None
    assert exits.names == ("0.always",)


@pytest.mark.parametrize(
    ("missed", "votes"), [(-3, 1.0), (2, 1.0), (3, 4.0), (9, 4.0), (10, None), (60, None)]
)
def test_a_head_that_is_right_more_often_has_more_votes_or_all(
    missed: int, votes: float | None
) -> None:
    labels = torch.zeros(100, dtype=torch.int64)
    scores = torch.tensor([[1.0, 0.0]]).repeat(100, 1)
    scores[: 5 + missed] = torch.tensor([0.0, 1.0])
    answers = torch.zeros(100, dtype=torch.int64)
    answers[:5] = 1  # mistakes of the model
    assert _votes(scores, answers, labels) == votes


@pytest.mark.parametrize("classes", [(1, 3), (2,)])
def test_new_clean_inputs_are_doubted_as_often_as_asked_for(classes: tuple[int, ...]) -> None:
    torch.manual_seed(6)
    inputs, labels = (torch.cat(parts) for parts in zip(*map(blobs, range(8)), strict=True))
    order = torch.randperm(len(labels))
    inputs, labels = inputs[order], labels[order]
    with torch.enable_grad():
        model = trained(nn.Sequential(nn.Linear(8, 8), nn.Tanh()), inputs, labels)
    head = find_head(model, inputs[:4])
    touched = dict.fromkeys(classes, 0.1)
    exits = fit_early_exits(
        model, head, (inputs, labels), [], touched=touched, batch_size=64, seed=0
    )
    assert exits is not None
    assert exits.limit is not None
    assert [k for k, at in enumerate(exits.limit.least.tolist()) if at > -1e4] == sorted(classes)
    new = torch.cat([blobs(seed)[0] for seed in range(100, 130)])
    exits.attach(model)
    with torch.no_grad():
        answers = model(new).argmax(1)
        scores = exits.scores(len(new))
    assert scores is not None
    doubted = exits.doubts(scores)
    assert doubted is not None
    for k in range(4):
        share = float(doubted[answers == k, k].double().mean())
        assert (0.05 < share < 0.13) if k in classes else share == 0


def test_folds_are_judged_by_exits_of_all_others() -> None:
    """Of few samples with many features, which exits that had seen them would know by heart."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(60) % 3
    rows = torch.randn(60, 50, generator=generator) + 5
    of_folds = list(zip(rows.split(20), labels.split(20), strict=True))
    statistics, folds = {"a": _ClassStatistics(3)}, []
    expected = []
    for part, (features, own) in enumerate(of_folds):
        fold = _Fold()
        for half in (slice(10), slice(10, 20)):  # some of them clean
            fold.add("a", features[half], own[half], half.start is None)
            statistics["a"].add(features[half], own[half])
        folds.append(fold)
        alone = _ClassStatistics(3)
        for other, (others, theirs) in enumerate(of_folds):
            if other != part:
                alone.add(others, theirs)
        exit_ = alone.discriminant()
        assert exit_ is not None
        expected.append(exit_(features[:10]))
    whole = statistics["a"].discriminant()
    assert whole is not None
    scores, layers = _out_of_fold(statistics, folds)
    assert layers == ["a"]
    assert scores is not None
    torch.testing.assert_close(scores, torch.cat(expected), rtol=1e-4, atol=1e-4)
    clean = torch.cat([features[:10] for features, _ in of_folds])
    assert not torch.allclose(scores, whole(clean), atol=1.0)


def test_a_layer_without_an_exit_in_some_fold_is_no_part_of_the_sum() -> None:
    features, labels = torch.randn(12, 4), torch.arange(12) % 3
    statistics = {"good": _ClassStatistics(3), "wild": _ClassStatistics(3)}
    folds = []
    for part in range(2):
        fold = _Fold()
        wild = features.clone()
        wild[0, 0] = torch.inf if part else 0.0
        for name, rows in (("good", features), ("wild", wild)):
            statistics[name].add(rows, labels)
            fold.add(name, rows, labels, True)
        folds.append(fold)
    assert _out_of_fold(statistics, folds)[1] == ["good"]
    none = {"wild": statistics["wild"]}
    for fold in folds:
        fold.add("wild", features, labels, True)
    assert _out_of_fold(none, folds) == (None, [])


def test_exits_on_fewer_layers_than_were_tried_have_no_limit() -> None:
    """Where inputs that are led into a target overflow in one of them."""

    class Wide(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(8, 8), nn.Linear(8, 8)
            with torch.no_grad():
                self.a.weight.copy_(2 * torch.eye(8))

        def forward(self, x: Tensor) -> Tensor:
            x = self.a(x).tanh()
            return self.b(x).tanh()  # type: ignore[no-any-return]

    torch.manual_seed(7)
    inputs, labels = blobs()
    with torch.enable_grad():
        model = trained(Wide(), inputs, labels)
    head, touched = find_head(model, inputs[:4]), {0: 0.1}
    far = torch.full((4, 8), torch.finfo(torch.float32).max)
    for attacked, limited in (([], True), ([(far, labels[:4])], False)):
        exits = fit_early_exits(
            model, head, (inputs, labels), attacked, touched=touched, batch_size=64, seed=0
        )
        assert exits is not None
        assert (exits.limit is not None) == limited
        assert exits.names == (("0.a", "0.b") if limited else ("0.b",))


def test_how_far_ahead_a_class_has_to_be() -> None:
    ahead = torch.tensor([3.0, 1.0, 5.0, 4.0, 2.0, 9.0, 7.0, 8.0, 6.0, 0.5])
    scores = torch.stack([ahead, torch.zeros(10), -torch.ones(10), torch.full((10,), 99.0)], 1)
    known = torch.tensor([True, True, True, False])
    answers = torch.zeros(10, dtype=torch.int64)
    lowest = torch.finfo(torch.float32).min

    def least(share: float, answers: Tensor = answers) -> list[float]:
        touched = dict.fromkeys(range(4), share)
        return _least(scores, known, answers, touched).tolist()

    assert least(0.0) == least(0.05) == [0.5, lowest, lowest, lowest]  # nothing is taken for others
    assert least(0.1) == [0.5, lowest, lowest, lowest]  # one more of ten falls below with 1 in 11
    assert least(0.19) == [1.0, lowest, lowest, lowest]  # and an input just there passes
    # Of one input of class 1, 9 behind at most, all together know more.
    one = answers.clone()
    one[0] = 1  # 3 behind
    assert least(0.19, one)[1] == -3.0
    near = answers.clone()
    near[9] = 1  # .5 behind, where others of class 0 are 1 ahead at least
    assert least(0.0, near) == [-0.5, -0.5, lowest, lowest]
    alone = scores.clone()
    alone[0] = torch.tensor([1.0, -torch.inf, 0.0, 0.0])  # class 1 by exits that have not seen it
    assert _least(alone, known, one, {1: 0.19}).tolist()[1] == 0.5  # what is usual
    huge = scores.double() * 1e300
    assert bool(torch.isfinite(_least(huge, known, answers, dict.fromkeys(range(3), 0.1))).all())
    unseen = answers.clone()
    unseen[5:8] = 3  # a class without samples says nothing of the others
    assert least(0.3, unseen)[0] > 0


def test_folds_take_all_with_them_that_was_made_of_their_inputs(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """And no more inputs are looked at than so many."""
    images, labels = digit_case().data.defender
    model, sizes = digit_case().clean, []

    def noting(
        statistics: dict[str, _ClassStatistics], seen: list[_Fold]
    ) -> tuple[Tensor | None, list[str]]:
        for fold in seen:
            layer = next(iter(statistics))
            rows = sum(len(features) for features, _ in fold.all[layer])
            sizes.append((rows, sum(map(len, fold.clean[layer]))))
        return _out_of_fold(statistics, seen)

    monkeypatch.setattr("tacext.early_exits_fit._out_of_fold", noting)
    monkeypatch.setattr("tacext.early_exits_fit.MOST_INPUTS", 203)
    head = find_head(model, images[:4])
    assert fit_early_exits(model, head, (images, labels), [], batch_size=64, seed=0) is not None
    assert sizes == [(4 * n, n) for n in (41, 41, 41, 40, 40)]  # with three ways of spoiling each


def test_classes_that_a_fold_has_not_seen_are_not_asked_for() -> None:
    labels = torch.tensor([0, 0, 1, 2])
    scores = torch.tensor(
        [[-5.0, -9.0, -torch.inf], [-5.0, -4.0, -7.0], [-3.0, -2.0, -9.0], [-1.0, 0.0, -torch.inf]]
    )
    answers = torch.tensor([0, 1, 1, 2])
    assert _votes(scores, answers, labels) == 1.0  # as many right as the model, of the first three
    assert _votes(scores[3:], answers[3:], labels[3:]) is None
    known = torch.ones(3, dtype=torch.bool)
    least = _least(scores, known, answers, dict.fromkeys(range(3), 0.0)).tolist()
    assert least == [1.0, 1.0, 1.0]  # of the last what is usual


def test_a_class_in_one_fold_alone_does_not_win_where_it_was_not_seen() -> None:
    """Scores of classes that were seen are below 0 where inputs lie far from all means."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(40) % 2
    rows = 3 * functional.one_hot(labels, 30) + torch.randn(40, 30, generator=generator)
    labels[35] = 2  # of the last fold
    statistics, folds = {"a": _ClassStatistics(4)}, []
    for features, own in zip(rows.split(8), labels.split(8), strict=True):
        fold = _Fold()
        fold.add("a", features, own, True)
        statistics["a"].add(features, own)
        folds.append(fold)
    scores, _ = _out_of_fold(statistics, folds)
    assert scores is not None
    assert bool(torch.isneginf(scores[32:, 2:]).all())
    assert bool(torch.isneginf(scores[:32, 3]).all())
    assert bool(torch.isfinite(scores[:32, :3]).all())


@pytest.mark.parametrize(("blurred", "votes"), [(0, 1.0), (1, 4.0), (8, None)])
def test_exits_that_read_clean_inputs_much_worse_are_not_used(
    blurred: int, votes: float | None
) -> None:
    class Inner(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(8, 8)
            nn.init.eye_(self.layer.weight)
            with torch.no_grad():  # an exit sees less here, or nothing, that tells classes apart
                self.layer.weight[:blurred] *= 0.0

        def forward(self, x: Tensor) -> Tensor:
            return x + 0.01 * self.layer(x)  # type: ignore[no-any-return]

    torch.manual_seed(5)
    inputs, labels = blobs()
    with torch.enable_grad():
        model = trained(Inner(), inputs, labels)
    head = find_head(model, inputs[:4])
    exits = fit_early_exits(model, head, blobs(4), [], batch_size=64, seed=0)
    assert (None if exits is None else float(exits.votes)) == votes


@pytest.mark.parametrize("shape", [(3, 32, 32), (1, 9, 14)])
def test_spoiled_images_are_images_of_the_same_kind(shape: tuple[int, int, int]) -> None:
    generator = torch.Generator().manual_seed(0)
    images = 2 * torch.rand(50, *shape, generator=generator) - 1  # brighter and darker than [0, 1]
    box = InputBox.around(images)
    mixed, covered, clouded = (spoil(images) for spoil in _spoilers(box, generator))
    for spoiled in (mixed, covered, clouded):
        assert spoiled.shape == images.shape
        assert torch.equal(box.clamp(spoiled), spoiled)
        changed = (spoiled != images).flatten(1).any(1).double().mean()
        assert float(changed) > 0.9
    assert float((mixed - images).abs().max()) <= 0.3 * 2 + 1e-6
    touched = (covered != images).any(1)  # [N, H, W]
    side = round(0.25 * min(shape[1:]))
    for one in touched:
        rows, columns = one.any(1).nonzero().flatten(), one.any(0).nonzero().flatten()
        if len(rows):
            assert int(rows[-1] - rows[0]) < side
            assert int(columns[-1] - columns[0]) < side
    # Smooth noise: neighbours move alike.
    grain = (clouded - images)[: len(images) // 4]
    near = (grain[..., 1:] - grain[..., :-1]).abs().mean()
    assert float(near) < float(grain.abs().mean())


def test_inputs_that_are_no_images_are_not_spoiled() -> None:
    assert _spoilers(InputBox.unit((8,)), torch.Generator()) == []
