"""Max margins: against linear models, where they are known, and on real digits."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from digits import digit_case
from tacext.errors import NoGradientError
from tacext.heads import find_head
from tacext.max_margin import DifferentiableModel, InputBox, class_margin, max_margin, unit_gradient

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


def test_a_choice_of_classes_is_driven_as_among_all() -> None:
    model = with_gradients(linear_model())
    some = max_margin(model, InputBox.unit(SHAPE), classes=(3, 1), steps=60, progress=False)
    everything = max_margin(model, InputBox.unit(SHAPE), steps=60, progress=False)
    assert some.classes == (3, 1)
    assert some.margin.shape == (2, 8)
    torch.testing.assert_close(
        some.margin.mean(1), everything.margin.mean(1)[[3, 1]], rtol=0.1, atol=0.1
    )


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

    with pytest.raises(NoGradientError, match=r'scan: model: .* gradients .*depth="fast"'):
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
