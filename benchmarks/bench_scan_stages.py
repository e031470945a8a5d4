"""Where the time of a scan goes: forward pass, margins, solve."""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Callable

import torch
from torch import Tensor, nn

import timing
import problems
from tacext import ops
from timing import Row

_IMAGES = "10 classes, 2500 images 32x32, small conv net"
_LATENTS = "1000 classes, 10000 given latents of 2048"
CASES = (_IMAGES, _LATENTS)
QUICK_CASES = (_IMAGES,)
_BATCH = 250

Stages = dict[str, Callable[[], object]]


class _SmallNet(nn.Module):
    """Four convolutions, 128 latents."""

    def __init__(self, classes: int) -> None:
        super().__init__()
        widths = (3, 32, 64, 128, 128)
        layers: list[nn.Module] = []
        for inside, outside in itertools.pairwise(widths):
            layers += [nn.Conv2d(inside, outside, 3, stride=2, padding=1), nn.ReLU()]
        self.features = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten())
        self.head = nn.Linear(widths[-1], classes)

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.features(images))  # type: ignore[no-any-return]


def _stream_margins(batches: list[Tensor]) -> Tensor:
    out = ops.pairwise_margin_max(batches[0])
    for batch in batches[1:]:
        ops.pairwise_margin_max(batch, out=out)
    return out


def _stages_of(weight: Tensor, forward: Callable[[], list[Tensor]], what: str) -> Stages:
    batches = forward()
    margins = _stream_margins(batches)
    return {
        what: forward,
        "margins": lambda: _stream_margins(batches),
        "solve": lambda: ops.minimal_perturbation(weight, margins),
    }


def _image_stages(device: str) -> Stages:
    torch.manual_seed(0)
    model = _SmallNet(10).to(device).eval()
    images = torch.rand(2500, 3, 32, 32, device=device)

    @torch.no_grad()
    def forward() -> list[Tensor]:
        return [model(batch) for batch in torch.split(images, _BATCH)]

    return _stages_of(model.head.weight.detach(), forward, "forward pass")


def _latent_stages(device: str) -> Stages:
    weight = problems.random(1000, 2048, samples=1).weight.float().to(device)
    generator = torch.Generator().manual_seed(1)
    latents = torch.randn(10_000, 2048, generator=generator).relu().to(device)

    def forward() -> list[Tensor]:
        return [batch @ weight.t() for batch in torch.split(latents, _BATCH)]

    return _stages_of(weight, forward, "head only")


def run(case: str, device: str, budget: float) -> list[Row]:
    """Measures one case; `ratio` is a stage's share of the sum."""
    stages = _image_stages(device) if case == _IMAGES else _latent_stages(device)
    times, _ = timing.interleave(list(stages.values()), device, budget)
    medians = [statistics.median(t) for t in times]
    rows = [
        Row(
            "scan_stages",
            case,
            name,
            seconds,
            min(t),
            seconds / sum(medians),
            None,
            len(t),
            "share",
        )
        for name, seconds, t in zip(stages, medians, times, strict=True)
    ]
    best = sum(row.best for row in rows)
    return [*rows, Row("scan_stages", case, "sum", sum(medians), best, 1.0, None, 0, "share")]
