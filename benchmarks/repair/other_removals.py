"""Seven published removals to compare with, compact but with the settings of their papers.

All take a model and clean images in [0, 1] with labels, leave the model alone and return a repaired
copy. None of them is told the target. Their authors had GPUs: `effort` is the share of the published
epochs or steps that is taken, so that none takes much longer than the others on one core. Batches
are of 128 where 256 were published, which makes up for some of the steps.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from clean_images import CleanImages
from pruning import anp, clp
from torch import nn
from tuning import fine_tuning, fst, ft_sam, nad
from unlearning import i_bau


@dataclass(frozen=True)
class Removal:
    """A removal, and how much of it is affordable.

    Attributes:
        run: from the model and clean images to a repaired copy.
        effort: share of the published epochs or steps, the same for all models.
    """

    run: Callable[[nn.Module, CleanImages], nn.Module]
    effort: float


REMOVALS = {
    "fine-tuning": Removal(fine_tuning, 0.2),
    "ft-sam": Removal(ft_sam, 0.15),
    "nad": Removal(nad, 0.5),
    "anp": Removal(anp, 0.1),
    "clp": Removal(clp, 1.0),
    "i-bau": Removal(i_bau, 0.6),
    "fst": Removal(fst, 1.0),
}


def remove(
    name: str, model: nn.Module, clean: CleanImages, share: float = 1.0
) -> tuple[nn.Module, float]:
    """A repaired copy, and the seconds of processor time that it took.

    Args:
        name: in `REMOVALS`.
        model: left as it is.
        clean: the defender's images; their `effort` is replaced.
        share: of the removal's usual effort.
    """
    removal = REMOVALS[name]
    begin = time.process_time()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(clean.seed)  # of dropout
        repaired = removal.run(model, replace(clean, effort=share * removal.effort))
    return repaired, time.process_time() - begin
