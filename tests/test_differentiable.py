"""Gradients at the inputs: against linear models, where they are known, and where there are none."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from tacext import differentiable
from tacext.differentiable import DifferentiableModel, InputBox, class_margin, unit_gradient
from tacext.errors import InputError, NoGradientError, NotFiniteError
from tacext.heads import find_head

SHAPE = (1, 6, 6)


def linear_model(seed: int = 0, classes: int = 4) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Flatten(), nn.Linear(36, classes)).requires_grad_(True)


class Rounded(nn.Module):
    """What a model does that takes 8-bit images: its gradient is zero everywhere."""

    def forward(self, x: Tensor) -> Tensor:
        return (255 * x).round() / 255


def with_gradients(model: nn.Module, shape: tuple[int, ...] = SHAPE) -> DifferentiableModel:
    return DifferentiableModel(model, find_head(model, torch.rand(4, *shape)), "scan")


def test_the_margin_is_the_lead_over_the_best_other_class() -> None:
    logits = torch.tensor([[1.0, 4.0, 2.0], [3.0, 0.0, 5.0]])
    assert class_margin(logits, torch.tensor([1, 0])).tolist() == [2.0, -2.0]


def test_the_box_follows_the_data() -> None:
    inside = InputBox.around(torch.tensor([[[[0.2]], [[0.9]]]]))
    assert (float(inside.low), float(inside.high)) == (0, 1)
    data = torch.tensor([[[[-2.0, 3.0]], [[0.5, 0.5]]], [[[0.0, 0.0]], [[0.1, 4.0]]]])
    box = InputBox.around(data)
    assert box.low.flatten().tolist() == pytest.approx([-2, 0.1])
    assert box.high.flatten().tolist() == pytest.approx([3, 4])
    assert box.diagonal == pytest.approx((2 * 5**2 + 2 * 3.9**2) ** 0.5)
    assert torch.equal(box.clamp(data), data)
    assert torch.equal(box.clamp(100 + data), box.high.expand(2, 2, 1, 2))


def test_gradients_have_length_one_whatever_they_were() -> None:
    gradient = torch.tensor(
        [[3.0, 4.0], [0.0, 0.0], [3e-30, 4e-30], [3e30, 4e30], [torch.nan, 2.0]]
    )
    unit = unit_gradient(gradient)
    for row in (0, 2, 3):
        assert unit[row].tolist() == pytest.approx([0.6, 0.8])
    assert unit[1].tolist() == [0, 0]
    assert unit[4].tolist() == [0, 1]


@pytest.mark.parametrize("scale", [1e-30, 1e-10, 1e10, 1e30])
def test_gradients_do_not_depend_on_the_scale_of_the_logits(scale: float) -> None:
    """Weights alone could hide a backdoor otherwise: argmax, ACC and ASR stay as they are."""
    network = linear_model()
    inputs, classes = torch.rand(3, *SHAPE), torch.tensor([0, 1, 2])
    _, expected = with_gradients(network).margin_gradient(inputs, classes)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.mul_(scale)
    _, gradient = with_gradients(network).margin_gradient(inputs, classes)
    torch.testing.assert_close(gradient, expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("offset", [0.0, 1024.0])
def test_a_model_that_bfloat16_makes_another_of_runs_in_float32(
    monkeypatch: pytest.MonkeyPatch, offset: float
) -> None:
    monkeypatch.setattr(differentiable, "has_fast_bfloat16", lambda: True)
    there, back = nn.Conv2d(1, 1, 1), nn.Conv2d(1, 1, 1)
    with torch.no_grad():
        for layer, bias in ((there, offset), (back, -offset)):
            layer.weight.fill_(1)
            layer.bias.fill_(bias)  # type: ignore[union-attr]
    network = nn.Sequential(there, nn.ReLU(), back, *linear_model())
    inputs = torch.rand(64, *SHAPE)
    logits = with_gradients(network).logits(inputs)
    apart = float((logits - network(inputs)).abs().max().detach())
    assert (apart > 1e-4) == (offset == 0)  # rounded where that tells the same, exact where not


def test_a_model_without_gradients_is_refused() -> None:
    class Detached(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.head = nn.Linear(36, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(x.detach().round().flatten(1))  # type: ignore[no-any-return]

    model = with_gradients(Detached())
    with (
        model.open(),
        pytest.raises(NoGradientError, match=r'scan: model: .* gradients .*depth="fast"'),
    ):
        model.margin_gradient(torch.rand(2, *SHAPE), torch.tensor([0, 1]))


def test_gradients_of_zero_everywhere_are_none() -> None:
    network = nn.Sequential(Rounded(), *linear_model())
    model = with_gradients(network)
    labels = torch.tensor([0, 1])
    with model.open(), pytest.raises(NoGradientError, match="gradients of zero everywhere"):
        model.check_gradient(torch.rand(2, *SHAPE), labels)
    with_gradients(linear_model()).check_gradient(torch.rand(2, *SHAPE), labels)


def test_the_gradient_is_that_of_the_lead_and_ends_at_the_cap() -> None:
    network = linear_model()
    model, inputs = with_gradients(network), torch.rand(3, *SHAPE)
    classes = torch.tensor([0, 1, 2])
    weight = network[1].weight.detach()  # type: ignore[index]
    with torch.no_grad():
        rivals = network(inputs).scatter(1, classes[:, None], -torch.inf).argmax(1)
    margin, gradient = model.margin_gradient(inputs, classes)
    expected = (weight[classes] - weight[rivals]).reshape(gradient.shape)
    largest = float(margin.abs().max())
    torch.testing.assert_close(gradient * largest, expected, rtol=0.02, atol=0.02)  # bfloat16
    _, capped = model.margin_gradient(inputs, classes, float(margin.median()) - 1e-3)
    assert int((capped.flatten(1).abs().sum(1) == 0).sum()) == 2


def test_the_model_is_left_alone_and_gradients_are_there_in_inference_mode() -> None:
    network = linear_model().train()
    network[1].bias.requires_grad_(False)  # type: ignore[index, union-attr]
    model = with_gradients(network)
    with torch.inference_mode(), model.open():
        _, gradient = model.margin_gradient(torch.rand(2, *SHAPE), torch.tensor([0, 1]))
    assert bool((gradient != 0).any())
    assert network.training
    assert [p.requires_grad for p in network.parameters()] == [True, False]
    assert all(p.grad is None for p in network.parameters())


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_logits_that_are_no_numbers_are_an_error(value: float) -> None:
    network = linear_model()
    model = with_gradients(network)
    with torch.no_grad():
        network[1].bias[0] = value  # type: ignore[index]
    with pytest.raises(NotFiniteError, match="changed or synthetic inputs"):
        model.logits(torch.rand(2, *SHAPE))


def test_too_little_memory_is_not_taken_for_a_lack_of_gradients() -> None:
    class Hungry(torch.autograd.Function):
        @staticmethod
        def forward(_context: object, x: Tensor) -> Tensor:
            return x.clone()

        @staticmethod
        def backward(_context: object, *_gradients: Tensor) -> Tensor:
            return torch.empty(10**15)  # what the CPU's allocator says of it

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.head = nn.Linear(36, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(Hungry.apply(x).flatten(1))  # type: ignore[no-any-return, no-untyped-call]

    with pytest.raises(InputError, match=r"batch_size: .*use a smaller batch_size"):
        with_gradients(Net()).margin_gradient(torch.rand(2, *SHAPE), torch.tensor([0, 1]))


class Flattened(nn.Module):
    """Flattens a map of several pixels, by `view` as many published models do or by `reshape`."""

    def __init__(self, by_view: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.convolution, self.head = nn.Conv2d(3, 2, 3), nn.Linear(32, 4)
        self.by_view = by_view

    def forward(self, x: Tensor) -> Tensor:
        x = self.convolution(x)
        return self.head(x.view(len(x), -1) if self.by_view else x.reshape(len(x), -1))  # type: ignore[no-any-return]


def test_a_model_that_flattens_by_view_is_looked_at_like_any_other() -> None:
    inputs, found = torch.rand(3, 3, 6, 6), []
    for by_view in (True, False):
        model = with_gradients(Flattened(by_view), (3, 6, 6))
        with model.open():
            placed = model.place(inputs)
            found.append(model.margin_gradient(placed, torch.arange(3)))
            found.append((model.logits(placed), placed))
    with pytest.raises(RuntimeError, match="view size"):  # or this test would show nothing
        Flattened(by_view=True)(inputs.contiguous(memory_format=torch.channels_last))
    for of_view, of_reshape in zip(found[:2], found[2:], strict=True):
        for a, b in zip(of_view, of_reshape, strict=True):
            torch.testing.assert_close(a, b)


def test_other_errors_than_those_of_the_layout_are_told() -> None:
    model = with_gradients(Flattened(by_view=True), (3, 6, 6))
    with model.open(), pytest.raises(InputError, match="which it rejects"):
        model.logits(model.place(torch.rand(2, 3, 9, 9)))
