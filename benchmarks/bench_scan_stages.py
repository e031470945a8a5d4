"""What a whole scan costs beyond the forward passes of the network.

The forward is timed on some images and scaled to all; the rest is a scan of a head of the same shape
on given latents, which needs no images: margins and moments, solve, test, and what is between them.
"""

from __future__ import annotations

import logging
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

import problems
from networks import ResNet, VisionTransformer
from tacext import ScanReport, scan
from timing import Row, seconds_of


@dataclass(frozen=True)
class _Network:
    """A network, its images' size, and how many batches of how many are timed on a CPU."""

    build: Callable[[], nn.Module]
    size: int
    batch: int
    batches: int

    def batch_on(self, device: str) -> int:
        """A GPU needs more at once to show what it can do."""
        return self.batch if device == "cpu" else max(self.batch, 128)


@dataclass(frozen=True)
class _Case:
    network: _Network
    images: int
    classes: int
    latents: int


_RESNET = _Network(lambda: ResNet(10), 32, 250, 2)
_VIT = _Network(lambda: VisionTransformer(1000), 224, 4, 2)
_SHORT = _Network(lambda: ResNet(10), 32, 25, 1)
_TABLE = {
    "ResNet-18 at 32x32, 10 classes, 2500 images": _Case(_RESNET, 2500, 10, 512),
    "ResNet-18 at 32x32, 200 classes, 2500 images": _Case(_RESNET, 2500, 200, 512),
    "ViT-B/16 at 224x224, 1000 classes, 2500 images": _Case(_VIT, 2500, 1000, 768),
    "ViT-B/16 at 224x224, 1000 classes, 10000 images": _Case(_VIT, 10_000, 1000, 768),
}
_QUICK = {"ResNet-18 at 32x32, 10 classes, 500 images": _Case(_SHORT, 500, 10, 512)}
CASES = tuple(_TABLE)
QUICK_CASES = tuple(_QUICK)
_MOST_REPEATS = 20


@torch.inference_mode()
def _seconds_an_image(network: _Network, device: str) -> float:
    torch.manual_seed(0)
    model = network.build().eval().to(device)
    count = network.batch_on(device)
    batch = torch.rand(count, 3, network.size, network.size, device=device)
    seconds_of(lambda: model(batch), device)
    times = [seconds_of(lambda: model(batch), device)[0] for _ in range(network.batches)]
    return statistics.median(times) / count


class _Given(nn.Module):
    """A head alone, whose inputs are latents."""

    def __init__(self, weight: Tensor, bias: Tensor) -> None:
        super().__init__()
        self.head = nn.Linear(weight.shape[1], weight.shape[0])
        self.head.weight.data.copy_(weight)
        self.head.bias.data.copy_(bias)

    def forward(self, latents: Tensor) -> Tensor:
        """Logits."""
        return self.head(latents)  # type: ignore[no-any-return]


def _scan_given(case: _Case, device: str) -> Callable[[], tuple[float, ScanReport]]:
    """A scan of a head, with its wall time less the time in the head."""
    problem = problems.random(case.classes, case.latents, case.images)
    assert problem.samples is not None
    model = _Given(problem.weight, problem.samples.bias).to(device)
    data = problem.samples.latents.float().to(device), problem.samples.labels

    def call() -> tuple[float, ScanReport]:
        begin = time.perf_counter()
        report = scan(model, data, depth="norms", progress=False)
        return time.perf_counter() - begin - report.timings.forward, report

    return call


def _repeat(call: Callable[[], tuple[float, ScanReport]], budget: float) -> list[dict[str, float]]:
    """Seconds by stage, of as many scans as the budget allows."""
    call()
    stages: list[dict[str, float]] = []
    spent = 0.0
    while len(stages) < 3 or (spent < budget and len(stages) < _MOST_REPEATS):
        beyond, report = call()
        timings = report.timings
        spent += beyond + timings.forward
        known = timings.margins + timings.solve + timings.test
        stages.append(
            {
                "margins, moments": timings.margins,
                "solve": timings.solve,
                "test": timings.test,
                "all between": beyond - known,
                "beyond the forward": beyond,
            }
        )
    return stages


def run(case: str, device: str, budget: float) -> list[Row]:
    """Measures one case; `ratio` is a stage's share of the forward."""
    found = (_TABLE | _QUICK)[case]
    # A head of random numbers gives no verdict worth a warning.
    logging.getLogger("tacext").setLevel(logging.ERROR)
    forward = _seconds_an_image(found.network, device) * found.images
    timed = found.network.batch_on(device) * found.network.batches
    rows = [
        Row(
            "scan_stages", case, "forward pass", forward, forward, 1.0, None, 1,
            f"share; scaled from {timed} images",
        )
    ]  # fmt: skip
    stages = _repeat(_scan_given(found, device), budget)
    for name in stages[0]:
        seconds = [stage[name] for stage in stages]
        median = statistics.median(seconds)
        rows.append(
            Row(
                "scan_stages", case, name, median, min(seconds), median / forward, None,
                len(seconds), "share",
            )
        )  # fmt: skip
    return rows
