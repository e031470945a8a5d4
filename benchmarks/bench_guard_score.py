"""`guard_score` against its form in torch's operators, and against the model that it guards."""

from __future__ import annotations

import functools

import torch

import networks
import timing
from tacext.guard_fit import fit_scorer
from tacext.guard_scoring import GuardScorer
from timing import Form, Row

CASES = (
    "64 x 512, 10 classes",
    "1 x 512, 10 classes",
    "4096 x 512, 10 classes",
    "64 x 2048, 10 classes",
    "64 x 2048, 1000 classes",
    "ResNet-18 on 64 x 3 x 32 x 32",
)
QUICK_CASES = ("64 x 512, 10 classes",)


@functools.cache
def fitted(dim: int, classes: int) -> GuardScorer:
    """A scorer for random latents in clusters."""
    generator = torch.Generator().manual_seed(0)
    centres = torch.randn(classes, dim, generator=generator)
    labels = torch.arange(max(2500, 5 * classes)) % classes
    latent = (centres[labels] + torch.randn(len(labels), dim, generator=generator)).relu()
    perturbation = torch.randn(classes, dim, generator=generator)
    return fit_scorer(latent, latent @ centres.T, perturbation, 0.01, 0, "bench_guard_score")


def forms(case: str, device: str) -> list[Form]:
    """The kernel and the plain form on random latents; or the model beside what guards it."""
    generator = torch.Generator().manual_seed(1)
    if case.startswith("ResNet-18"):
        model = networks.ResNet(10).eval().to(device)
        images = torch.rand(64, 3, 32, 32, generator=generator).to(device)
        rows, dim, classes = 64, 512, 10
    else:
        sizes, many = case.split(", ")
        rows, dim = map(int, sizes.split(" x "))
        classes = int(many.split()[0])
    scorer = fitted(dim, classes).to(device)
    latent = torch.randn(rows, dim, generator=generator).relu().to(device)
    logits = torch.randn(rows, classes, generator=generator).to(device)
    native = Form("tacext", lambda: scorer(latent, logits).score)
    if case.startswith("ResNet-18"):
        # Of the model the table is to show the time alone: it is answered for by the scores.
        model_too = Form(
            "the model itself",
            lambda: scorer(latent, logits + 0 * model(images)).score,
            memory=False,
            note="and the guard after it",
        )
        return [native, model_too]
    return [
        native,
        Form("torch's operators", lambda: scorer.plain(latent, logits).score, rtol=1e-3),
    ]


def run(case: str, device: str, budget: float) -> list[Row]:
    """Measures one case."""
    with torch.inference_mode():
        return timing.compare("bench_guard_score", case, forms(case, device), device, budget)
