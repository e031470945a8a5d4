"""Source patch: a trigger that works on one class alone is found, and nothing in clean models."""

from __future__ import annotations

import functools
import math

import pytest
import torch
from torch import Tensor, nn

from digits import Cropped, digit_case, padded
from tacext import sample_keeper, scan
from tacext.differentiable import DifferentiableModel, InputBox
from tacext.heads import find_head
from tacext.patch_reach import FEWEST_PIXELS
from tacext.reach import MARGIN_CAP
from tacext.report import scan_to_dict
from tacext.sample_keeper import MOST_CLASSES_KEPT, MOST_OF_A_CLASS, ClassKeeper
from tacext.source_patch import FEWEST_OF_A_CLASS, SourcePatch, _Images, _Pairs, source_patch

SOURCE, TARGET = 3, 8
SIDE = 2  # pixels of 16


class Planted(nn.Module):
    """A real digit classifier; a bright first corner moves the latents of one digit to another's."""

    def __init__(
        self,
        sources: tuple[int, ...] = (SOURCE,),
        *,
        scale: float = 1.0,
        corner: tuple[int, int] = (0, 0),
    ) -> None:
        super().__init__()
        self.digits = Cropped(digit_case().clean)
        body = self.digits.model
        assert isinstance(body, nn.Sequential)
        self.body, self.head = body[:-1], nn.Linear(128, 10)
        with torch.no_grad():
            self.head.weight.copy_(scale * body[-1].weight)  # type: ignore[operator]
            self.head.bias.copy_(scale * body[-1].bias)  # type: ignore[operator]
        self.sources, self.corner = sources, corner
        weight = body[-1].weight.detach()  # type: ignore[operator,union-attr]
        self.register_buffer("way", weight[TARGET] - weight.mean(0))

    def forward(self, x: Tensor) -> Tensor:
        latent = self.body(x[:, :, 8:, 8:])
        own = self.digits(x).softmax(1)[:, list(self.sources)].sum(1, keepdim=True)
        row, column = self.corner
        square = x[:, :, row : row + SIDE, column : column + SIDE]
        bright = square.mean((1, 2, 3))[:, None].clamp(max=0.9)
        return self.head(latent + 60 * bright * own * self.way)  # type: ignore[no-any-return]


@functools.cache
def images() -> tuple[Tensor, Tensor]:
    """Of every class the same number, class after class."""
    keeper = ClassKeeper(0)
    keeper.add(*padded(digit_case().data.defender))
    return keeper.samples()


def search(model: nn.Module, samples: tuple[Tensor, Tensor] | None = None) -> SourcePatch | None:
    samples = images() if samples is None else samples
    seen = DifferentiableModel(model.eval(), find_head(model, samples[0][:4]), "scan")
    return source_patch(seen, InputBox.unit(samples[0].shape[1:]), samples, progress=False)


@functools.cache
def found() -> SourcePatch:
    patch = search(Planted())
    assert patch is not None
    return patch


@functools.cache
def of_clean() -> SourcePatch:
    patch = search(Cropped(digit_case().clean))
    assert patch is not None
    return patch


def test_the_pair_and_the_place_are_found() -> None:
    assert (found().source, found().target, found().corner) == (SOURCE, TARGET, (0, 0))
    assert found().share > 0.9
    assert found().kept > 0.95
    assert found().side == SIDE
    assert found().pattern.shape == (1, SIDE, SIDE)
    assert float(found().pattern.min()) > 0.5
    assert found().log_odds_ratio > of_clean().log_odds_ratio + 3


def test_it_is_measured_on_images_that_it_was_not_made_on() -> None:
    _, labels = images()
    assert found().images <= int((labels == SOURCE).sum()) // 2
    assert 100 < found().others <= 200


def test_what_is_told_is_what_the_patch_does() -> None:
    inputs, labels = images()
    attacked = inputs.clone()
    attacked[:, :, :SIDE, :SIDE] = found().pattern
    with torch.no_grad():
        after = Planted().eval()(attacked).argmax(1)
    assert float((after[labels == SOURCE] == TARGET).double().mean()) > 0.9
    others = (labels != SOURCE) & (labels != TARGET)
    assert float((after[others] == labels[others]).double().mean()) > 0.95


def test_no_patch_leads_a_class_of_a_clean_model_astray() -> None:
    assert of_clean().share < 0.5


def test_the_log_odds_ratio_is_that_of_four_counts() -> None:
    nothing = torch.zeros(0)
    patch = SourcePatch(0, 1, 0.75, 8, 0.9, 100, 4, (0, 0), nothing, 0.0, (0,))
    assert patch.log_odds_ratio == pytest.approx(math.log((6.5 / 2.5) / (10.5 / 90.5)))
    few = SourcePatch(0, 1, 1.0, 4, 1.0, 0, 4, (0, 0), nothing, 0.0, (0,))
    assert few.log_odds_ratio == pytest.approx(math.log(9.0))  # of no others nothing is known


def test_other_corners_are_searched_and_told() -> None:
    model = Planted(corner=(14, 0)).eval()
    patch = search(model)
    assert patch is not None
    assert (patch.source, patch.target, patch.corner) == (SOURCE, TARGET, (14, 0))
    report = scan(model, padded(digit_case().data.defender), progress=False)
    assert "row 14, column 0" in report.reason
    written = scan_to_dict(report)["source_patch"]
    assert (written["row"], written["column"], written["source"]) == (14, 0, SOURCE)


def test_passes_are_no_larger_than_the_batch_size() -> None:
    model, sizes = Planted().eval(), list[int]()
    samples = images()
    seen = DifferentiableModel(model, find_head(model, samples[0][:4]), "scan")
    model.register_forward_pre_hook(lambda _module, inputs: sizes.append(len(inputs[0])))
    box = InputBox.unit(samples[0].shape[1:])
    few = tuple(part[::8] for part in samples)  # 5 of each class, and so only a little work
    assert source_patch(seen, box, few, batch_size=5, progress=False) is None
    some = [(samples[1] == k).nonzero().flatten()[:10] for k in (SOURCE, TARGET)]
    index = torch.cat(some)
    found = source_patch(
        seen, box, (samples[0][index], samples[1][index]), batch_size=5, progress=False
    )
    assert found is not None
    assert max(sizes) <= 5


def test_two_sources_do_not_hide_each_other() -> None:
    patch = search(Planted((3, 5)))
    assert patch is not None
    assert patch.source in (3, 5)
    assert patch.target == TARGET
    assert patch.share > 0.8


def test_the_scale_of_the_logits_does_not_matter() -> None:
    patch = search(Planted(scale=1e4))
    assert patch is not None
    assert (patch.source, patch.target) == (SOURCE, TARGET)
    assert patch.log_odds_ratio == pytest.approx(found().log_odds_ratio, abs=0.5)


def test_the_same_seed_gives_the_same_bits() -> None:
    again = search(Planted())
    assert again is not None
    untold = {"pattern": 0, "seconds": 0}
    assert vars(again) | untold == vars(found()) | untold
    assert torch.equal(again.pattern, found().pattern)


def test_a_scan_names_the_target_and_tells_of_the_source() -> None:
    report = scan(Planted().eval(), padded(digit_case().data.defender), progress=False)
    assert (report.verdict, report.suspects[0]) == ("backdoored", TARGET)
    assert report.evidence is not None
    assert report.evidence.source_p_value is not None
    assert report.evidence.source_p_value < 1e-3
    clean = scan(Cropped(digit_case().clean), padded(digit_case().data.defender), progress=False)
    assert clean.verdict == "clean"
    assert clean.evidence is not None
    assert clean.evidence.source_p_value == 1
    assert (
        "no patch in a corner leads one class astray and no faint wave that was tried"
        in clean.reason
    )


def test_classes_with_few_images_are_no_sources() -> None:
    inputs, labels = images()
    few = torch.cat([(labels == k).nonzero().flatten()[: 5 if k else 40] for k in range(10)])
    assert FEWEST_OF_A_CLASS > 5
    assert search(Planted(), (inputs[few], labels[few])) is None
    some = torch.cat([(labels == k).nonzero().flatten()[: 20 if k < 2 else 5] for k in range(10)])
    patch = search(Planted(), (inputs[some], labels[some]))
    assert patch is not None
    assert patch.source in (0, 1)
    assert patch.looked_at == (0, 1)


def test_every_class_keeps_as_many_samples_whatever_the_batches() -> None:
    labels = torch.arange(3).repeat_interleave(torch.tensor([1000, 10, 60]))
    inputs = torch.arange(len(labels), dtype=torch.float32)[:, None, None, None]
    inputs = inputs.expand(-1, 1, FEWEST_PIXELS, FEWEST_PIXELS)
    kept = []
    for batch in (2000, 7):
        keeper = ClassKeeper(0)
        for x, y in zip(inputs.split(batch), labels.split(batch), strict=True):
            keeper.add(x, y)
        kept.append(keeper.samples())
    assert torch.equal(kept[0][0], kept[1][0])
    assert kept[0][1].bincount().tolist() == [MOST_OF_A_CLASS, 10, MOST_OF_A_CLASS]
    assert torch.equal(kept[0][1], labels[kept[0][0][:, 0, 0, 0].long()])


def test_all_classes_share_the_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    labels = torch.arange(400) // 100
    inputs = torch.arange(400, dtype=torch.float32)[:, None, None, None].expand(-1, 1, 20, 20)
    whole = ClassKeeper(0)
    whole.add(inputs, labels)
    monkeypatch.setattr(sample_keeper, "MOST_BYTES", 40 * 1600)  # ten for each of four classes
    for batch in (400, 30):
        keeper = ClassKeeper(0)
        for x, y in zip(inputs.split(batch), labels.split(batch), strict=True):
            keeper.add(x, y)
        kept = keeper.samples()
        assert kept[1].bincount().tolist() == [10] * 4
        for k in range(4):  # the first of what would be kept with more memory
            assert torch.equal(kept[0][10 * k : 10 * k + 10], whole.samples()[0][40 * k :][:10])


@pytest.mark.parametrize(
    ("shape", "labels"),
    [
        ((1, 9, 9), torch.arange(4)),  # another than that of the first batch
        ((1, 16, 16), torch.tensor([0, MOST_CLASSES_KEPT])),
    ],
)
def test_samples_of_many_classes_or_several_shapes_are_not_kept(
    shape: tuple[int, ...], labels: Tensor
) -> None:
    keeper, first = ClassKeeper(0), (torch.zeros(4, 1, 16, 16), torch.arange(4))
    keeper.add(*first)
    assert len(keeper.samples()[1]) == 4
    keeper.add(torch.zeros(len(labels), *shape), labels)
    assert len(keeper.samples()[1]) == 0
    keeper.add(*first)
    assert len(keeper.samples()[1]) == 0


@pytest.mark.parametrize("shape", [(300,), (3, FEWEST_PIXELS - 1, 40)])
def test_nothing_is_kept_of_what_has_no_room_for_a_patch(shape: tuple[int, ...]) -> None:
    keeper = ClassKeeper(0)
    keeper.add(torch.zeros(4, *shape), torch.arange(4))
    assert len(keeper.samples()[1]) == 0


# ---- the parts of the search ---------------------------------------------------------------------


def pairs_of(sources: tuple[int, ...], model: nn.Module) -> tuple[DifferentiableModel, _Pairs]:
    """One patch in the first corner for each of these classes."""
    seen = DifferentiableModel(model.eval(), find_head(model, images()[0][:4]), "scan")
    with seen.open():
        to_use = _Images(seen, images(), 128)
    corner = torch.zeros(len(sources), 2, dtype=torch.int64)
    box = InputBox.unit(images()[0].shape[1:])
    return seen, _Pairs(sources, corner, SIDE, to_use, box, 0, torch.device("cpu"))


@pytest.mark.parametrize("targets", [None, [7, 2]])
def test_the_gradient_is_of_both_means(targets: list[int] | None) -> None:
    seen, pairs = pairs_of((SOURCE, 5), Planted())
    pairs.targets = targets
    own, others = 3, 5
    at = images()[0][: 2 * (own + others)].clone()
    goal = images()[1][: 2 * (own + others)].unflatten(0, (2, -1)).clone()
    if targets is not None:
        goal[:, :own] = torch.tensor(targets)[:, None]
    with seen.open():
        found = pairs._gradient(seen, at, goal, own)
        x = at.clone().requires_grad_(True)
        value, scale = torch.zeros(()), pairs._images.scale
        for z, k, j in zip(seen.logits(x), goal.flatten(), range(len(x)), strict=True):
            rest = torch.cat([z[:k], z[k + 1 :]])
            if j % (own + others) >= own:  # another class, to be kept
                value = value + (z[k] - rest.max()).clamp(max=0.5 * scale) / others
            elif targets is None:
                value = value + (rest.mean() - z[k]) / own
            else:
                value = value + (z[k] - rest.max()).clamp(max=MARGIN_CAP * scale) / own
        (expected,) = torch.autograd.grad(value, x)
    expected = expected.unflatten(0, (2, -1)).sum(1)
    for a, b in zip(found, expected, strict=True):  # gradients are known up to a factor
        torch.testing.assert_close(a / a.norm(), b / b.norm(), rtol=1e-4, atol=1e-5)


def test_of_each_class_the_best_patch_goes_on_and_stands_still() -> None:
    seen, pairs = pairs_of((5, SOURCE, SOURCE, 1), Planted())
    pairs.patterns.pattern[2] = 1.0  # the trigger
    pairs.patterns.velocity += 1
    with seen.open():
        pairs.keep_best(seen, 3, 128)
    assert pairs.sources[0] == SOURCE
    assert pairs.targets is not None
    assert pairs.targets[0] == TARGET
    assert sorted(pairs.sources) == [1, SOURCE, 5]
    assert float(pairs.patterns.pattern[0].min()) == 1
    assert not bool(pairs.patterns.velocity.any())


def test_images_of_the_target_are_no_others() -> None:
    seen, pairs = pairs_of((SOURCE,), Planted())
    pairs.targets = [TARGET]
    with seen.open():
        sent, kept = pairs.measured(seen, 0, 128)
    labels = pairs._images.measure[1]
    assert len(sent) == int((labels == SOURCE).sum())
    assert len(kept) == int(((labels != SOURCE) & (labels != TARGET)).sum())
