"""Max margins and reach: against linear models, where both are known, and on real digits."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from digits import digit_case
from tacext import InputError
from tacext.heads import find_head
from tacext.max_margin import DifferentiableModel, InputBox, class_margin, max_margin, unit_gradient
from tacext.reach import Job, reach

SHAPE = (1, 6, 6)


def linear_model(seed: int = 0, classes: int = 4) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Flatten(), nn.Linear(36, classes)).requires_grad_(True)


def with_gradients(model: nn.Module, shape: tuple[int, ...] = SHAPE) -> DifferentiableModel:
    return DifferentiableModel(model, find_head(model, torch.rand(4, *shape)), "scan")


def test_the_margin_is_the_lead_over_the_best_other_class() -> None:
    logits = torch.tensor([[1.0, 4.0, 2.0], [3.0, 0.0, 5.0]])
    assert class_margin(logits, torch.tensor([1, 0])).tolist() == [2.0, -2.0]


def test_two_classes_of_a_linear_model_are_driven_to_the_corner_of_the_box() -> None:
    model = linear_model(classes=2)
    weight, bias = (p.detach() for p in model[1].parameters())  # type: ignore[index]
    found = max_margin(with_gradients(model), InputBox.unit(SHAPE), steps=200, progress=False)
    for k in (0, 1):
        lead = weight[k] - weight[1 - k]
        best = lead.clamp(min=0).sum() + bias[k] - bias[1 - k]
        torch.testing.assert_close(
            found.margin[k], best.double().expand(8), rtol=0.02, atol=0.02
        )  # bfloat16 in the logits


def test_more_steps_never_end_far_below_and_the_marks_are_on_the_way() -> None:
    model = with_gradients(linear_model())
    found = max_margin(model, InputBox.unit(SHAPE), steps=60, marks=(0, 10, 30), progress=False)
    assert found.marks == (0, 10, 30, 60)
    assert found.history.shape == (4, 4, 8)
    assert torch.equal(found.history[-1], found.margin)
    means = found.history.mean((1, 2))
    assert bool((means[1:] > means[:-1] - 0.05).all())
    start = class_margin(
        model.logits(InputBox.unit(SHAPE).noise(32, 0)), torch.arange(4).repeat_interleave(8)
    )
    torch.testing.assert_close(
        found.history[0].flatten(), start.double().detach(), rtol=0.02, atol=0.02
    )


def test_the_same_seed_gives_the_same_bits_and_the_model_is_left_alone() -> None:
    model = linear_model().train()
    model[1].bias.requires_grad_(False)  # type: ignore[index, union-attr]
    before = {name: value.clone() for name, value in model.state_dict().items()}
    box = InputBox.unit(SHAPE)
    first = max_margin(with_gradients(model), box, seed=3, progress=False)
    again = max_margin(with_gradients(model), box, seed=3, batch_size=128, progress=False)
    assert torch.equal(first.margin, again.margin)
    assert not torch.equal(
        first.margin, max_margin(with_gradients(model), box, seed=4, progress=False).margin
    )
    assert model.training
    assert [p.requires_grad for p in model.parameters()] == [True, False]
    assert all(p.grad is None for p in model.parameters())
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


def test_the_box_follows_the_data() -> None:
    inside = InputBox.around(torch.tensor([[[[0.2]], [[0.9]]]]))
    assert (float(inside.low), float(inside.high)) == (0, 1)
    data = torch.tensor([[[[-2.0, 3.0]], [[0.5, 0.5]]], [[[0.0, 0.0]], [[0.1, 4.0]]]])
    box = InputBox.around(data)
    assert box.low.flatten().tolist() == pytest.approx([-2, 0.1])
    assert box.high.flatten().tolist() == pytest.approx([3, 4])
    assert box.diagonal == pytest.approx((2 * 5**2 + 2 * 3.9**2) ** 0.5)
    noise = box.noise(50, 1)
    assert torch.equal(box.clamp(noise), noise)
    assert float(noise[:, 0].min()) < -1
    assert torch.equal(box.clamp(100 + noise), box.high.expand(50, 2, 1, 2))


def test_gradients_have_length_one_whatever_they_were() -> None:
    gradient = torch.tensor([[3.0, 4.0], [0.0, 0.0], [1e-30, 0.0], [torch.nan, 1.0]])
    assert unit_gradient(gradient)[0].tolist() == pytest.approx([0.6, 0.8])
    assert bool(torch.isfinite(unit_gradient(gradient)).all())


def test_a_model_without_gradients_is_refused() -> None:
    class Detached(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.head = nn.Linear(36, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(x.detach().round().flatten(1))  # type: ignore[no-any-return]

    with pytest.raises(InputError, match=r'scan: model: .* gradients .*use depth="fast"'):
        max_margin(with_gradients(Detached()), InputBox.unit(SHAPE), progress=False)


def test_the_target_of_a_real_backdoor_leads_further_than_without_it() -> None:
    case = digit_case()
    leads = {}
    for name, network in (("backdoored", case.backdoored), ("clean", case.clean)):
        model = with_gradients(network, (1, 8, 8))
        margin = max_margin(model, InputBox.unit((1, 8, 8)), progress=False).margin.mean(1)
        leads[name] = float(margin[0] / margin[1:].max())
        assert bool((margin > 0).all())
    assert leads["backdoored"] > 1.2 * leads["clean"]


# ---- reach ---------------------------------------------------------------------------------------


BUDGET = 4.0  # a trigger of four of 64 pixels takes more of the diagonal than one of 32x32


def _reach_of(network: nn.Module, jobs: list[Job], steps: int = 20):  # type: ignore[no-untyped-def]
    images, labels = digit_case().data.defender
    return reach(
        with_gradients(network, (1, 8, 8)),
        InputBox.unit((1, 8, 8)),
        (images[:300], labels[:300]),
        (images[300:], labels[300:]),
        jobs,
        budget=BUDGET,
        steps=steps,
        marks=(5,),
        progress=False,
    )


def test_a_small_change_reaches_the_target_from_every_class() -> None:
    found = _reach_of(digit_case().backdoored, [Job(k) for k in range(10)])
    assert int(found.margin.argmax()) == 0
    assert int(found.rate.argmax()) == 0
    torch.testing.assert_close(found.moved.sum(2), torch.ones(10, 10, dtype=torch.float64))
    length = found.change.flatten(1).norm(dim=1)
    budget = BUDGET * 1.5 * (64 / 3072) ** 0.5
    torch.testing.assert_close(length, torch.full((10,), budget), rtol=0.02, atol=0)
    assert bool((found.history[1] > found.history[0] - 0.5).all())


def test_a_change_grows_step_by_step_up_to_its_budget() -> None:
    first = _reach_of(digit_case().clean, [Job(1)], steps=1).change
    budget = BUDGET * 1.5 * (64 / 3072) ** 0.5
    assert float(first.norm()) == pytest.approx(budget / 6, rel=1e-4)


def test_a_job_from_one_class_is_measured_on_that_class() -> None:
    network = digit_case().backdoored
    found = _reach_of(network, [Job(3, source=7), Job(3)])
    images, labels = digit_case().data.defender
    images, labels = images[300:], labels[300:]
    with torch.no_grad():
        predicted = network((images[labels == 7] + found.change[0]).clamp(0, 1)).argmax(1)
    assert float(found.rate[0]) == pytest.approx(
        float((predicted == 3).double().mean()), abs=0.05
    )  # bfloat16
    assert float(found.moved[0, 7, 3]) == pytest.approx(float(found.rate[0]))
    assert float(found.margin[0]) != float(found.margin[1])


def test_jobs_do_not_depend_on_their_neighbours() -> None:
    network = digit_case().clean
    alone = _reach_of(network, [Job(2)], steps=5)
    among = _reach_of(network, [Job(1), Job(2), Job(5)], steps=5)
    torch.testing.assert_close(among.margin[1], alone.margin[0], rtol=0.05, atol=0.05)
