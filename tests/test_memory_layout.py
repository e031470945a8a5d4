"""The layout in which images pass through a model: as fast as can be, and to the same end."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from tacext import Guard, scan
from tacext.memory_layout import fastest_layout, placed
from tacext.observation import observe

SIDE, CLASSES = 12, 5
Middle = Callable[[Tensor], Tensor]


def by_reshape(x: Tensor) -> Tensor:
    return x.reshape(len(x), -1)


def by_view(x: Tensor) -> Tensor:
    return x.view(len(x), -1)


def of_every_channel(x: Tensor) -> Tensor:
    """Filters that all channels share: the batch becomes one of channels, which one row allows."""
    n, c, h, w = x.shape
    blurred = nn.functional.avg_pool2d(x.view(n * c, 1, h, w), 3, 1, 1)
    return blurred.reshape(n, -1)


def by_strides(x: Tensor) -> Tensor:
    """Runs on any layout, and is right on one."""
    size = x[0].numel()
    return x.as_strided((len(x), size), (size, 1))


class Network(nn.Module):
    """A convolution, something that is made of it, and a head."""

    def __init__(self, middle: Middle, channels: int = 3) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.convolution = nn.Conv2d(channels, 4, 3, padding=1)
        self.head = nn.Linear(4 * SIDE * SIDE, CLASSES)
        self.middle = middle

    def forward(self, x: Tensor) -> Tensor:
        assert not self.training
        return self.head(self.middle(self.convolution(x).relu()))  # type: ignore[no-any-return]


def images(count: int = 300, channels: int = 3) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    inputs = torch.rand(count, channels, SIDE, SIDE, generator=generator)
    with torch.no_grad():
        return inputs, Network(by_reshape, channels).eval()(inputs).argmax(1)


@pytest.mark.parametrize("rows", [1, 2, 300])
@pytest.mark.parametrize(
    ("middle", "expected"),
    [
        (by_reshape, torch.channels_last),
        (by_view, torch.contiguous_format),
        (of_every_channel, torch.contiguous_format),
        (by_strides, torch.contiguous_format),
    ],
)
def test_channels_last_is_for_models_that_take_it(
    middle: Middle, expected: torch.memory_format, rows: int
) -> None:
    model = Network(middle).train()
    model.convolution.register_forward_hook(lambda *_: _no_gradients())
    assert fastest_layout(model, images()[0][:rows], "scan") == expected
    assert model.training


def _no_gradients() -> None:
    assert not torch.is_grad_enabled()


def test_what_is_no_image_is_left_alone() -> None:
    model = nn.Linear(3, 2)
    for inputs in (torch.zeros(4, 3), torch.zeros(0, 3, 5, 5)):
        assert fastest_layout(model, inputs, "scan") == torch.contiguous_format
        for layout in (torch.contiguous_format, torch.channels_last):
            assert placed(inputs, layout) is inputs


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_strides_are_those_of_the_layout(channels: int, layout: torch.memory_format) -> None:
    inputs = torch.rand(6, SIDE, SIDE, channels).permute(0, 3, 1, 2)
    found = placed(inputs, layout)
    assert torch.equal(found, inputs)
    expected = torch.empty(found.shape).to(memory_format=layout)
    if channels > 1 or layout == torch.contiguous_format:
        assert found.stride() == expected.stride()


@pytest.mark.parametrize("middle", [by_reshape, by_view, of_every_channel, by_strides])
@pytest.mark.parametrize("as_stored", [True, False])
def test_scans_and_guards_are_those_of_plain_passes(
    middle: Middle, as_stored: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    inputs, labels = images()
    if as_stored:  # as many files have them: channels last
        inputs = inputs.contiguous(memory_format=torch.channels_last)
    model = Network(middle)
    report = scan(model, (inputs, labels), depth="fast")
    guard = Guard.fit(model, (inputs, labels), 0.05)
    assert report.accuracy == 1 or middle is of_every_channel  # the labels are of the others
    monkeypatch.setattr("tacext.observation.fastest_layout", lambda *_: torch.contiguous_format)
    plain = scan(Network(middle), images(), depth="fast")
    torch.testing.assert_close(report.norm, plain.norm, rtol=1e-4, atol=1e-5)
    expected = Guard.fit(Network(middle), images(), 0.05)
    with torch.no_grad():
        found = guard(inputs.contiguous()).score
        torch.testing.assert_close(found, expected(images()[0]).score, rtol=1e-3, atol=1e-4)


def test_clean_data_passes_in_the_layout_that_was_found() -> None:
    seen = []
    for middle in (by_reshape, by_view):
        model = Network(middle)
        model.convolution.register_forward_pre_hook(
            lambda _, given: seen.append(given[0].is_contiguous(memory_format=torch.channels_last))
        )
        observe(model, images(), head=None, batch_size=100, progress=False, operation="scan")
        assert seen[-3:] == [middle is by_reshape] * 3
