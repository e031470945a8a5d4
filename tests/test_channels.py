"""Channels that can be made constant, and what they contribute."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations

from digits import digit_case
from tacext import ops
from tacext.channels import channel_means, contributions, mask, maskable_layers
from tacext.differentiable import class_margin
from tacext.heads import find_head


def images(count: int = 64) -> Tensor:
    return digit_case().data.defender[0][:count]


def test_every_convolution_has_the_batch_norm_behind_it() -> None:
    model = digit_case().backdoored
    layers = maskable_layers(model, find_head(model, images(4)), images(2))
    assert [layer.channels for layer in layers] == [16, 16, 32, 32, 128]
    modules = list(model)
    for layer in layers:
        assert layer.norm is modules[int(layer.name) + 1]


@pytest.mark.parametrize("value", [0.0, 0.7])
def test_a_masked_channel_is_constant_and_comes_back(value: float) -> None:
    model = copy.deepcopy(digit_case().backdoored)
    layers = maskable_layers(model, find_head(model, images(4)), images(2))
    before = copy.deepcopy(model.state_dict())
    with torch.no_grad():
        logits = model(images())
        masked = mask(layers[1], 3, value)
        point = model[: list(model).index(layers[1].point) + 1]
        output = point(images())
        assert bool((output[:, 3] == value).all())
        assert float(output[:, 2].std()) > 0
        assert not torch.equal(model(images()), logits)
        assert not bool(layers[1].layer.weight[3].any())
    masked.undo()
    assert all(torch.equal(before[name], t) for name, t in model.state_dict().items())


def test_without_a_norm_the_bias_is_the_constant_and_without_a_bias_it_is_silent() -> None:
    for bias in (True, False):
        model = nn.Sequential(nn.Linear(5, 4, bias=bias), nn.ReLU(), nn.Linear(4, 3))
        inputs = torch.randn(20, 5)
        head = find_head(model, inputs)
        (layer,) = maskable_layers(model, head, inputs)
        means = channel_means(model, [layer], inputs, 8)
        with torch.no_grad():
            expected = model[0](inputs).mean(0) * bias
            torch.testing.assert_close(means, expected)
            mask(layer, 2, float(means[2]))
            output = model[0](inputs)[:, 2]
        assert torch.equal(output, expected[2].expand(20)) or torch.allclose(output, expected[2])


class Shared(nn.Module):
    """A layer that runs twice, one whose weight is another's too, one that computes its weight."""

    def __init__(self) -> None:
        super().__init__()
        self.twice, self.once = nn.Linear(6, 6), nn.Linear(6, 6)
        self.tied, self.other = nn.Linear(6, 6), nn.Linear(6, 6)
        self.other.weight = self.tied.weight
        self.normed = parametrizations.weight_norm(nn.Linear(6, 6))
        self.unused = nn.Linear(6, 6)
        self.head = nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.twice(self.twice(x).relu()).relu()
        x = self.other(self.tied(self.once(x).relu()).relu()).relu()
        return self.head(self.normed(x).relu())  # type: ignore[no-any-return]


def test_layers_whose_mask_would_reach_further_are_left_alone() -> None:
    model, inputs = Shared(), torch.randn(9, 6)
    layers = maskable_layers(model, find_head(model, inputs), inputs)
    assert [layer.name for layer in layers] == ["once"]


class SharedNorm(nn.Module):
    """Two convolutions that go through one batch norm."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(1, 4, 3), nn.Conv2d(4, 4, 3)
        self.norm = nn.BatchNorm2d(4)
        self.head = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.first(x)).relu()
        return self.head(self.norm(self.second(x)).relu().mean((2, 3)))  # type: ignore[no-any-return]


def test_a_norm_of_two_layers_is_not_touched() -> None:
    model, inputs = SharedNorm().eval(), torch.randn(9, 1, 8, 8)
    layers = maskable_layers(model, find_head(model, inputs), inputs)
    assert [(layer.name, layer.norm) for layer in layers] == [("first", None), ("second", None)]
    norm = copy.deepcopy(model.norm.state_dict())
    mask(layers[0], 1, 0.5)
    assert all(torch.equal(norm[name], t) for name, t in model.norm.state_dict().items())


def test_contributions_are_the_tac_weighted_scores_of_single_samples() -> None:
    model = digit_case().backdoored
    head = find_head(model, images(4))
    layers = maskable_layers(model, head, images(2))
    wanted = torch.zeros(64, dtype=torch.int64)
    found = contributions(
        model, layers, images(), lambda x, i: class_margin(model(x), wanted[i : i + len(x)]), 50
    )
    norm = list(model).index(layers[2].point)
    output = model[: norm + 1](images()).detach().requires_grad_()
    margin = class_margin(model[norm + 1 :](output), wanted)
    (gradient,) = torch.autograd.grad(margin.sum(), output)
    torch.testing.assert_close(found.objective, margin.detach().float(), rtol=1e-4, atol=1e-4)
    first = sum(layer.channels for layer in layers[:2])
    part = slice(first, first + layers[2].channels)
    expected = ops.neuron_scores(output, gradient)
    torch.testing.assert_close(
        found.pushed[:, part].mean(0).double(), expected, rtol=1e-3, atol=1e-4
    )
    value = torch.full((sum(layer.channels for layer in layers),), 0.3)
    torch.testing.assert_close(
        found.of_constant(value)[:, part],
        ((output - 0.3) * gradient).sum((2, 3)).detach(),
        rtol=1e-3,
        atol=1e-4,
    )


def test_tokens_have_their_channels_last() -> None:
    class Tokens(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.head = nn.Linear(3, 6), nn.Linear(6, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.embed(x).mean(1))  # type: ignore[no-any-return]

    model, tokens = Tokens().requires_grad_(False), torch.rand(5, 7, 3)
    layers = maskable_layers(model, find_head(model, tokens), tokens)
    found = contributions(model, layers, tokens, lambda x, _: model(x)[:, 1], 5)
    # The latent is linear in its channels: shares are exact.
    expected = model.embed(tokens).mean(1) * model.head.weight[1]
    torch.testing.assert_close(found.pushed, expected)
    mask(layers[0], 2, 0.0)
    lost = found.objective - model(tokens)[:, 1]
    torch.testing.assert_close(lost, found.of_constant(torch.zeros(6))[:, 2])
