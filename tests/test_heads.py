"""Finding the head and its latents, on networks of many shapes."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from digits import digit_case
from tacext import Guard, HeadNotFoundError, InputError, scan
from tacext.heads import Head, find_head, recording_latents


def images(n: int = 4, channels: int = 3, size: int = 8) -> torch.Tensor:
    return torch.rand(n, channels, size, size, generator=torch.Generator().manual_seed(0))


class Body(nn.Module):
    """A small convolutional body, then whatever `tail` does with [N, 16, 4, 4]."""

    def __init__(self, *tail: nn.Module) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(3, 16, 3, stride=2, padding=1), nn.ReLU())
        self.tail = nn.Sequential(*tail)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.tail(self.body(x))


class ReversedDefinition(nn.Module):
    """The head is defined first and used last, and a larger auxiliary layer is used in between."""

    def __init__(self) -> None:
        super().__init__()
        self.out = nn.Linear(12, 5)
        self.first = nn.Linear(192, 12)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.out(self.first(x.flatten(1)).relu())


class AuxiliaryAfterHead(nn.Module):
    """A second linear layer of the same width runs after the head, but does not decide."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(192, 5)
        self.auxiliary = nn.Linear(192, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        logits = self.head(x.flatten(1))
        self.auxiliary(x.flatten(1))
        return logits


class Wrapped(nn.Module):
    """Something after the logits."""

    def __init__(self, after: nn.Module | None, functional: bool = False) -> None:
        super().__init__()
        self.linear = nn.Linear(192, 5)
        self.after = after
        self.functional = functional

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.functional:
            return torch.nn.functional.linear(x.flatten(1), self.linear.weight)
        return self.after(self.linear(x.flatten(1)))


pool = (nn.AdaptiveAvgPool2d(1), nn.Flatten())
FOUND = {
    "linear": (Body(*pool, nn.Linear(16, 5)), "tail.2", 16),
    "dropout after": (Body(*pool, nn.Linear(16, 5), nn.Dropout()), "tail.2", 16),
    "no bias": (Body(*pool, nn.Linear(16, 5, bias=False)), "tail.2", 16),
    "hidden linear": (
        Body(nn.Flatten(), nn.Linear(256, 7), nn.ReLU(), nn.Linear(7, 5)),
        "tail.3",
        7,
    ),
    "1x1 convolution after pooling": (
        Body(nn.AdaptiveAvgPool2d(1), nn.Conv2d(16, 5, 1), nn.Flatten()),
        "tail.1",
        16,
    ),
    "1x1 convolution before pooling": (Body(nn.Conv2d(16, 5, 1), *pool), "tail.0", 16),
    "defined first": (ReversedDefinition(), "out", 12),
    "auxiliary": (AuxiliaryAfterHead(), "head", 192),
    "log-softmax": (Wrapped(nn.LogSoftmax(1)), "linear", 192),
    "softmax": (Wrapped(nn.Softmax(1)), "linear", 192),
    "bfloat16": (Body(*pool, nn.Linear(16, 5)).bfloat16(), "tail.2", 16),
    "the model itself": (nn.Sequential(nn.Flatten(), nn.Linear(192, 5)), "1", 192),
}


@pytest.mark.parametrize("case", FOUND)
def test_finds_the_head_and_its_latents(case: str) -> None:
    model, name, latent_dim = FOUND[case]
    head = find_head(model, images())
    assert (head.name, head.num_classes, head.latent_dim) == (name, 5, latent_dim)
    with torch.no_grad(), recording_latents(head) as recorder:
        model.eval()
        output = model(images().to(head.weight.dtype))
        latent = recorder.take()
    assert latent.shape == (4, latent_dim)
    logits = head.logits(latent)
    difference = (logits.softmax(1) - output).abs().max() if case == "softmax" else None
    if difference is not None:
        assert difference < 1e-5
    else:
        shift = (output - logits).double()
        assert (shift - shift.mean(1, keepdim=True)).abs().max() < 2e-2


def test_a_bare_linear_layer_is_its_own_head() -> None:
    head = find_head(nn.Linear(6, 3), torch.rand(4, 6))
    assert (head.name, head.num_classes) == ("", 3)


def test_modes_are_restored_one_by_one() -> None:
    model = Body(*pool, nn.BatchNorm1d(16), nn.Linear(16, 5))
    model.train()
    model.body.eval()
    before = [module.training for module in model.modules()]
    mean = model.tail[2].running_mean.clone()
    find_head(model, images())
    assert [module.training for module in model.modules()] == before
    assert torch.equal(model.tail[2].running_mean, mean)


def test_hooks_are_removed_also_after_an_error() -> None:
    model = Wrapped(None, functional=True)
    with pytest.raises(HeadNotFoundError):
        find_head(model, images())
    assert not model.linear._forward_pre_hooks


def test_an_output_that_no_layer_makes_is_an_error_that_lists_the_layers() -> None:
    with pytest.raises(HeadNotFoundError, match=r"candidates: 'linear'.*wrap the model"):
        find_head(Wrapped(None, functional=True), images())


@pytest.mark.parametrize("name", [None, "0"])
def test_a_model_without_a_linear_layer_has_none_to_name(name: str | None) -> None:
    with pytest.raises(
        HeadNotFoundError, match=r", got [^;]*; the model has no linear layer; wrap"
    ):
        find_head(nn.Sequential(nn.Flatten()), images(), name)


@pytest.mark.filterwarnings("ignore")  # torch deprecates both
def test_layers_that_cannot_be_seen_are_told_from_none() -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(192, 5)).eval()
    traced = torch.jit.trace(model, images())
    with pytest.raises(HeadNotFoundError, match=r"pass the nn\.Module that it was made from"):
        find_head(traced, images())
    quantised = torch.ao.quantization.quantize_dynamic(model, {nn.Linear})
    for name in (None, "1"):
        with pytest.raises(HeadNotFoundError, match=r"quantised layers.*pass the model as it was"):
            find_head(quantised, images(), name)


def test_a_nonlinear_output_needs_a_name_and_gets_it() -> None:
    model = Wrapped(nn.Sigmoid())
    with pytest.raises(HeadNotFoundError, match="head="):
        find_head(model, images())
    assert find_head(model, images(), "linear").name == "linear"


@pytest.mark.parametrize("name", ["nowhere", "body.0", "body"])
def test_a_name_that_is_no_linear_layer_is_refused(name: str) -> None:
    with pytest.raises(HeadNotFoundError, match=r"head: expected the name of .*'tail.2'"):
        find_head(Body(*pool, nn.Linear(16, 5)), images(), name)


def test_a_named_layer_that_does_not_decide_is_refused() -> None:
    with pytest.raises(HeadNotFoundError, match="differs from the model's"):
        find_head(AuxiliaryAfterHead(), images(), "auxiliary")


def test_one_output_is_no_classifier() -> None:
    with pytest.raises(InputError, match="at least 2 classes"):
        find_head(nn.Linear(6, 1), torch.rand(4, 6))


def test_inputs_that_the_model_rejects_are_explained() -> None:
    with pytest.raises(InputError, match=r"data: expected inputs that the model takes.*channels"):
        find_head(Body(*pool, nn.Linear(16, 5)), images(channels=1))


def test_nan_in_the_weights_is_named() -> None:
    model = Body(*pool, nn.Linear(16, 5))
    with torch.no_grad():
        model.tail[2].weight[0, 0] = torch.nan
    with pytest.raises(InputError, match="model: expected finite logits"):
        find_head(model, images())


@pytest.mark.parametrize("error", [ValueError(), AssertionError("Wrong image size"), KeyError("x")])
def test_any_error_of_the_model_is_explained(error: Exception) -> None:
    class Fails(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            raise error

    with pytest.raises(InputError, match=f"which it rejects .{type(error).__name__}"):
        find_head(Fails(), images())


def test_a_shared_layer_can_be_named_by_either_name() -> None:
    model = Wrapped(nn.Sigmoid())
    model.other = model.linear
    assert find_head(model, images(), "other").num_classes == 5


def test_a_token_layer_is_no_head() -> None:
    class Tokens(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.p = nn.Linear(64, 6)
            self.out = nn.Linear(6, 5)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.out(self.p(x.flatten(2)).mean(1))

    with pytest.raises(HeadNotFoundError, match="head"):
        find_head(Tokens(), images(), "p")
    assert find_head(Tokens(), images()).name == "out"


def test_an_output_object_with_logits_is_understood() -> None:
    class Output:
        def __init__(self, logits: torch.Tensor) -> None:
            self.logits = logits

    class Transformer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.classifier = nn.Linear(192, 5)

        def forward(self, x: torch.Tensor) -> Output:
            return Output(self.classifier(x.flatten(1)))

    assert find_head(Transformer(), images()).name == "classifier"


def test_a_tuple_output_is_refused_with_the_way_out() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(192, 5)

        def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            return self.linear(x.flatten(1)), x

    with pytest.raises(InputError, match=r"got tuple; wrap the model"):
        find_head(Two(), images())


def test_head_is_frozen() -> None:
    head = Head("x", nn.Linear(2, 2))
    with pytest.raises(AttributeError):
        head.name = "y"  # type: ignore[misc]


@pytest.mark.parametrize("make", [dict, OrderedDict, lambda **parts: SimpleNamespace(**parts)])
def test_logits_may_come_in_a_dictionary_or_an_object(make: Callable[..., object]) -> None:
    class Wrapped(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = digit_case().clean

        def forward(self, x: torch.Tensor) -> object:
            return make(logits=self.model(x), loss=None)

    inputs, labels = digit_case().data.defender
    report = scan(Wrapped(), (inputs, labels), depth="fast")
    plain = scan(digit_case().clean, (inputs, labels), depth="fast")
    assert torch.equal(report.norm, plain.norm)
    with torch.no_grad():
        said = Guard.fit(Wrapped(), (inputs, labels), 0.05)(inputs[:8])
        expected = Guard.fit(digit_case().clean, (inputs, labels), 0.05)(inputs[:8])
    assert torch.equal(said.score, expected.score)


def test_a_model_without_an_evaluation_mode_is_refused() -> None:
    inputs, labels = digit_case().data.defender
    exported = torch.export.export(digit_case().clean, (inputs[:4],)).module()
    with pytest.raises(InputError, match=r"an nn\.Module that has an evaluation mode"):
        scan(exported, (inputs, labels))
