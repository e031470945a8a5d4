"""Four clusters of points, and small models that are trained on them while a test runs."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional


def trained(inner: nn.Module, inputs: Tensor, labels: Tensor) -> nn.Module:
    """Inner layers as they are, and a head of four classes that is trained."""
    model = nn.Sequential(inner, nn.Linear(8, 4))
    optimizer = torch.optim.Adam(model[1].parameters(), 0.1)
    for _ in range(60):
        optimizer.zero_grad()
        functional.cross_entropy(model(inputs), labels).backward()
        optimizer.step()
    return model.eval()


def blobs(seed: int = 3) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(240) % 4
    inputs = torch.randn(240, 8, generator=generator) + 2 * functional.one_hot(labels, 8)
    return inputs, labels
