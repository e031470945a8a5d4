"""Reach: how far one small change of the input, the same for all images, drives them into a class.

A trigger is such a change. For every job, a target class and the images that it starts from, the
change is found by projected gradient ascent on the mean margin of the target; what it does to
images that it was not made on is the evidence. Jobs from a single source class show attacks that
only work on that class, or that send every class elsewhere.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from .max_margin import DifferentiableModel, InputBox, class_margin, unit_gradient
from .progress import progress_bar

# Length of the change, as a share of the diagonal of the box of all inputs: 1.5 on 32x32 images of
# three channels in [0, 1].
_BUDGET = 1.5 / 3072**0.5
_MOMENTUM = 0.8
# Images that are driven far already give way to those that are not.
_MARGIN_CAP = 30.0


@dataclass(frozen=True)
class Job:
    """One change to look for: into `target`, from images of class `source`, or of all others."""

    target: int
    source: int | None = None


@dataclass(frozen=True, eq=False)
class Reach:
    """What the changes do to held-out images.

    Attributes:
        jobs: one for each row of what follows.
        margin: float64 [J], mean margin of the target over the job's own sources.
        rate: float64 [J], share of them that are predicted as the target.
        moved: float64 [J, C, C], share of class a's images that the change sends to class b.
        change: float32 [J, ...], the changes.
        marks: the steps after which margins were noted; history: float64 [marks, J].
        seconds: of the search.
    """

    jobs: tuple[Job, ...]
    margin: Tensor
    rate: Tensor
    moved: Tensor = field(repr=False)
    change: Tensor = field(repr=False)
    marks: tuple[int, ...]
    history: Tensor = field(repr=False)
    seconds: float


class _Sources:
    """The images a job starts from, in turns."""

    def __init__(self, labels: Tensor, job: Job, seed: int) -> None:
        mine = labels != job.target if job.source is None else labels == job.source
        index = mine.nonzero().flatten()
        generator = torch.Generator().manual_seed(seed)
        self.index = index[torch.randperm(len(index), generator=generator)]
        self._next = 0

    def take(self, count: int) -> Tensor:
        """The next images, beginning again after the last."""
        positions = torch.arange(self._next, self._next + count) % len(self.index)
        self._next += count
        return self.index[positions]


def reach(
    model: DifferentiableModel,
    box: InputBox,
    fit: tuple[Tensor, Tensor],
    held_out: tuple[Tensor, Tensor],
    jobs: Sequence[Job],
    *,
    budget: float = 1.0,
    steps: int = 20,
    images: int = 20,
    marks: Sequence[int] = (),
    jobs_at_once: int = 8,
    seed: int = 0,
    progress: bool | None = None,
) -> Reach:
    """Finds the change of every job and measures it on held-out images.

    Args:
        model: the classifier.
        box: the inputs that it may be given.
        fit: clean inputs [N, ...] and labels [N] to make the changes on.
        held_out: others to measure them on.
        jobs: the changes to look for; each needs an image of its source in both sets.
        budget: of the change's length, as a multiple of the usual one.
        steps: of normalised-gradient ascent with momentum.
        images: of a job's sources in each step.
        marks: steps after which to note the mean margins, besides the last.
        jobs_at_once: how many share a forward pass.
        seed: of the order of the images.
        progress: whether to show a progress bar; None shows it on a terminal.

    Raises:
        InputError: the model has no gradients.
    """
    begin = time.perf_counter()
    length = budget * _BUDGET * box.diagonal
    step = length / 6
    noted = sorted({mark for mark in marks if mark < steps} | {steps})
    changes: list[Tensor] = []
    history: list[Tensor] = []
    measured: list[tuple[Tensor, Tensor, Tensor]] = []
    with model.open(), progress_bar("reach", len(jobs) * steps, progress) as advance:
        for first in range(0, len(jobs), jobs_at_once):
            group = jobs[first : first + jobs_at_once]
            sources = [_Sources(fit[1], job, seed) for job in group]
            goal = torch.tensor([job.target for job in group]).repeat_interleave(images)
            goal = goal.to(model.device)
            change = torch.zeros(len(group), *box.shape, device=model.device)
            velocity = torch.zeros_like(change)
            reached: list[Tensor] = []
            for number in range(1, steps + 1):
                batch = torch.cat([fit[0][source.take(images)] for source in sources]).float()
                at = model.place(batch) + change.repeat_interleave(images, 0)
                _, gradient = model.margin_gradient(box.clamp(at), goal, _MARGIN_CAP)
                mean = gradient.unflatten(0, (len(group), images)).float().mean(1)
                velocity = _MOMENTUM * velocity + unit_gradient(mean)
                change = change + step * velocity
                norm = change.flatten(1).norm(dim=1).reshape((-1,) + (1,) * len(box.shape))
                change = change * (length / norm.clamp_min(1e-20)).clamp(max=1)
                if number in noted:
                    found = [
                        _measure(model, box, held_out, job, change[i])
                        for i, job in enumerate(group)
                    ]
                    reached.append(torch.stack([margin for margin, _, _ in found]))
                advance(len(group))
            history.append(torch.stack(reached))
            measured += found
            changes.append(change.cpu())
    all_marks = torch.cat(history, 1)
    return Reach(
        tuple(jobs),
        all_marks[-1],
        torch.stack([rate for _, rate, _ in measured]),
        torch.stack([moved for _, _, moved in measured]),
        torch.cat(changes),
        tuple(noted),
        all_marks,
        time.perf_counter() - begin,
    )


def _measure(
    model: DifferentiableModel,
    box: InputBox,
    held_out: tuple[Tensor, Tensor],
    job: Job,
    change: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """Mean margin and rate over the job's sources, and what becomes of every class, [C, C]."""
    inputs, labels = held_out
    num_classes = model.head.num_classes
    margins, predictions = [], []
    with torch.no_grad():
        for batch in inputs.split(256):
            logits = model.logits(box.clamp(model.place(batch.float()) + change))
            goal = torch.full((len(batch),), job.target, device=logits.device)
            margins.append(class_margin(logits, goal).double().cpu())
            predictions.append(logits.argmax(1).cpu())
    margin, predicted = torch.cat(margins), torch.cat(predictions)
    mine = labels != job.target if job.source is None else labels == job.source
    moved = torch.zeros(num_classes, num_classes, dtype=torch.float64)
    moved.index_put_((labels, predicted), torch.ones(len(labels), dtype=torch.float64), True)
    moved /= moved.sum(1, keepdim=True).clamp_min(1)
    own = margin[mine].clamp(max=_MARGIN_CAP)
    return own.mean(), (predicted[mine] == job.target).double().mean(), moved
