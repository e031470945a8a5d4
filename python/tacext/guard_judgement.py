"""A guard's word on a whole set of images."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import cast

import torch
from torch import Tensor

from .data import DataLike, as_batches, sample_count
from .guard import Guard, labelled
from .guard_monitor import GuardMonitor
from .guard_scoring import GuardOutput
from .heads import call_model, evaluating
from .progress import progress_bar

# Beyond this, more is flagged than the calibration's chance explains.
SUSPICIOUS = 0.01


@dataclass(frozen=True, eq=False)
class Judgement:
    """What a guard says of a set of images.

    Attributes:
        output: of every image, on the CPU.
        monitor: the counts of it.
    """

    output: GuardOutput = field(repr=False)
    monitor: GuardMonitor

    @property
    def suspicious(self) -> bool:
        """Whether more images are flagged than clean ones explain, at a false-alarm rate of 1 %."""
        return self.monitor.excess_p_value < SUSPICIOUS


def judge(
    guard: Guard, data: DataLike | Tensor, *, batch_size: int = 256, progress: bool | None = None
) -> Judgement:
    """Runs a guarded model on images, and counts what looks like a trigger.

    Args:
        guard: fitted or loaded.
        data: as for `scan`, of which labels are not used; or the inputs alone, as one tensor.
        batch_size: of the passes.
        progress: whether to show a progress bar; None shows it on a terminal.

    Raises:
        InputError: images that the model does not take, and what `as_batches` raises of data.
    """
    operation = "judge"
    data = labelled(data)
    monitor = GuardMonitor(guard.info.false_positive_rate, guard.info.samples)
    found: list[GuardOutput] = []
    bar = progress_bar("images", sample_count(data), progress)
    with evaluating(guard), torch.no_grad(), bar as advance:
        for inputs, _ in as_batches(data, operation=operation, batch_size=batch_size):
            output = cast(GuardOutput, call_model(guard, inputs, operation))
            found.append(GuardOutput(*(part.cpu() for part in output)))
            monitor.update(found[-1])
            advance(len(inputs))
    joined = (torch.cat(parts) for parts in zip(*found, strict=True))
    return Judgement(GuardOutput(*joined), monitor)
