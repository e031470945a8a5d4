"""Scores of every layer of a real classifier."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from digits import digit_case, scan_of
from tacext import InputError, demo, score_neurons


def test_scores_every_conv_and_linear_layer_but_the_head() -> None:
    case = digit_case()
    report = scan_of("backdoored")
    scores = score_neurons(case.backdoored, case.data.defender, report.perturbation[demo.TARGET])
    convolutions = [n for n, m in case.backdoored.named_modules() if isinstance(m, nn.Conv2d)]
    assert list(scores) == convolutions
    assert [len(scores[name]) for name in convolutions] == [16, 16, 32, 32, 128]
    assert scores.samples == 400
    assert all(bool(s.isfinite().all()) for s in scores.values())
    ranking = scores.ranking()
    assert len(ranking) == 16 + 16 + 32 + 32 + 128
    assert ranking[0][2] == max(float(s.max()) for s in scores.values())


def test_scores_are_activation_times_gradient() -> None:
    case = digit_case()
    images, _ = case.data.defender
    s = torch.randn(128, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    scores = score_neurons(case.backdoored, case.data.defender, s, batch_size=90)
    activation = case.backdoored[:3](images)  # conv, batch norm, ReLU ...
    conv_output = case.backdoored[:4](images).detach().requires_grad_()  # ... and the next conv
    latent = case.backdoored[4:-1](conv_output)
    (gradient,) = torch.autograd.grad((latent.double() @ s).sum(), conv_output)
    expected = (conv_output * gradient).sum((0, 2, 3)) / len(images)
    assert activation.shape == conv_output.shape
    assert torch.allclose(scores["3"].float(), expected.detach(), rtol=1e-3, atol=1e-4)


def test_frozen_parameters_and_tokens_are_scored_too() -> None:
    class Tokens(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed = nn.Linear(3, 6)
            self.head = nn.Linear(6, 4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.head(self.embed(x).relu().mean(1))

    model = Tokens().requires_grad_(False)
    tokens = torch.rand(5, 7, 3)
    s = torch.arange(6.0)
    scores = score_neurons(model, (tokens, torch.arange(5) % 4), s)
    latent = model.embed(tokens).relu().mean(1)
    # The latent is linear in the active units: the scores are its exact shares of <s, phi>.
    assert torch.allclose(scores["embed"].float(), (latent * s).mean(0), atol=1e-5)
    assert all(p.grad is None and not p.requires_grad for p in model.parameters())


class Residual(nn.Module):
    """A convolution that runs twice, followed by layers that may overwrite its output."""

    def __init__(self, inplace: bool) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 3, padding=1)
        self.act = nn.SiLU(inplace=inplace)
        self.head = nn.Linear(3, 4)
        self.inplace = inplace

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out = self.act(self.conv(x))
        again = self.conv(out)
        if self.inplace:
            again += out
        else:
            again = again + out
        return self.head(again.mean((2, 3)))


def test_layers_that_work_in_place_or_run_twice_change_nothing() -> None:
    plain, inplace = Residual(inplace=False), Residual(inplace=True)
    inplace.load_state_dict(plain.state_dict())
    images, s = torch.rand(5, 3, 6, 6), torch.tensor([1.0, -2.0, 0.5])
    data = images, torch.arange(5) % 4
    scores = score_neurons(plain, data, s)
    assert torch.allclose(scores["conv"], score_neurons(inplace, data, s)["conv"], rtol=1e-5)
    # By hand: both calls push, each by activation times gradient.
    first = plain.conv(images).detach().requires_grad_()
    second = plain.conv(plain.act(first))
    latent = (second + plain.act(first)).mean((2, 3))
    gradients = torch.autograd.grad((latent @ s).sum(), [first, second])
    pushes = zip((first, second), gradients, strict=True)
    expected = sum((a * g).sum((0, 2, 3)) for a, g in pushes) / 5
    assert torch.allclose(scores["conv"].float(), expected, rtol=1e-4, atol=1e-6)


def test_a_lone_head_has_no_scores() -> None:
    scores = score_neurons(nn.Linear(4, 3), (torch.rand(6, 4), torch.arange(6) % 3), torch.ones(4))
    assert len(scores) == 0
    assert scores.ranking() == []


def test_other_types_are_refused() -> None:
    case = digit_case()
    images, labels = case.data.test
    with pytest.raises(InputError, match=r"perturbation: expected a torch.Tensor, got list"):
        score_neurons(case.clean, (images, labels), [0.0] * 128)  # type: ignore[arg-type]
    with pytest.raises(InputError, match=r"score_neurons: model: expected an nn.Module, got 'm'"):
        score_neurons("m", (images, labels), torch.zeros(128))  # type: ignore[arg-type]


def test_bad_perturbations_are_refused() -> None:
    case = digit_case()
    with pytest.raises(InputError, match=r"perturbation: expected shape \[128\]"):
        score_neurons(case.clean, case.data.defender, torch.zeros(10))
    with pytest.raises(InputError, match="perturbation: expected finite values"):
        score_neurons(case.clean, case.data.defender, torch.full((128,), torch.nan))
