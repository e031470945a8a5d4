"""Copies among samples: one that is judged by itself looks more usual than it is, so copies count once."""

from __future__ import annotations

import hashlib

import numpy as np
import torch
from torch import Tensor


def different_rows(rows: Tensor) -> Tensor:
    """Indices of the first of all equal rows [N, D] on the CPU, in order."""
    content = rows.contiguous().numpy()
    whole = content.view(np.dtype((np.void, content.shape[1] * content.itemsize)))[:, 0]
    return torch.from_numpy(np.sort(np.unique(whole, return_index=True)[1]))


def different_inputs(inputs: Tensor) -> Tensor:
    """Indices of the first of all equal inputs [N, ...] on any device, in order.

    Inputs may be large and many: they are known by their hash, and never copied as a whole.
    """
    first: dict[bytes, int] = {}
    for start in range(0, len(inputs), 64):
        part = inputs[start : start + 64].cpu()
        part = part.reshape(len(part), -1).contiguous().view(torch.uint8)
        for number, content in enumerate(part.numpy(), start):
            first.setdefault(hashlib.blake2b(content, digest_size=16).digest(), number)
    return torch.tensor(list(first.values()), dtype=torch.int64)
