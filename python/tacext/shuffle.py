"""Shuffle: whether one change of the input sends every class to another class of its own.

That is what an all-to-all backdoor does, and no class stands out in it. The change is found by
projected gradient ascent towards the assignment of classes to classes, one to one, that the images
are already nearest to; the assignment is drawn up again on the way. Clean models, too, have changes
that move most images, but to a few classes that attract all others.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
import scipy  # its parts load when they are first used
import torch
from torch import Tensor

from .differentiable import DifferentiableModel, InputBox
from .progress import progress_bar
from .reach import BUDGET, BUDGETS, ImagesInTurn, UniversalChanges, logits_of, margin_scale

STARTS = 2
# The assignment is drawn up on this many images, and again after so many steps.
_ASSIGNMENT_IMAGES = 200
_STEPS_AN_ASSIGNMENT = 3
_MARGIN_CAP = 1.0  # in units of the model's scale

# Fewer held-out images a class say little of where the class goes.
FEWEST_IMAGES_A_CLASS = 4


@dataclass(frozen=True, eq=False)
class Shuffle:
    """The best shuffle of the classes that one change was found for.

    Attributes:
        share: mean over the classes of how many of their held-out images it sends where the class
            is assigned, for the best of all budgets.
        destinations: the class that each class is assigned; -1 for one without images.
        shares: float64 [C], for each class; NaN for one without images.
        budget: of the change, as a multiple of the usual one.
        change: float32 [...].
        seconds: of the search.
    """

    share: float
    destinations: tuple[int, ...]
    shares: Tensor = field(repr=False)
    budget: float
    change: Tensor = field(repr=False)
    seconds: float


def _assign(value: npt.NDArray[np.float64]) -> npt.NDArray[np.intp]:
    """The one-to-one assignment of rows to columns, none to itself, with the largest sum."""
    value = value.copy()
    np.fill_diagonal(value, value.min() - 1e6)
    columns: npt.NDArray[np.intp] = scipy.optimize.linear_sum_assignment(value, maximize=True)[1]
    return columns


def _class_means(values: Tensor, labels: Tensor, classes: int) -> npt.NDArray[np.float64]:
    """Mean of the rows of each class, [C, C]; zero for a class without rows."""
    sums = torch.zeros(classes, classes, dtype=torch.float64)
    sums.index_add_(0, labels, values.double())
    return (sums / torch.bincount(labels, minlength=classes).clamp_min(1)[:, None]).numpy()


def shuffle(
    model: DifferentiableModel,
    box: InputBox,
    fit: tuple[Tensor, Tensor],
    held_out: tuple[Tensor, Tensor],
    *,
    budgets: Sequence[float] = BUDGETS,
    steps: int = 12,
    images: int = 64,
    batch_size: int = 128,
    seed: int = 0,
    progress: bool | None = None,
) -> Shuffle:
    """Looks for a change that shuffles the classes and measures it on held-out images.

    Args:
        model: the classifier.
        box: the inputs that it may be given.
        fit: clean inputs [N, ...] and labels [N] to make the change on.
        held_out: others to measure it on.
        budgets: of the change's length, ascending, as multiples of the usual one.
        steps: of normalised-gradient ascent with momentum, for each budget.
        images: in each step, for each start.
        batch_size: inputs in a pass, at most, or one for each start.
        seed: of the starts and of the order of the images.
        progress: whether to show a progress bar; None shows it on a terminal.

    Raises:
        NoGradientError: the model has no gradients.
        InputError: the model rejects changed inputs, or gives NaN or infinity for them.
    """
    begin = time.perf_counter()
    classes = model.head.num_classes
    images = max(1, min(images, batch_size // STARTS))
    generator = torch.Generator().manual_seed(seed)
    turn = ImagesInTurn(fit[1], None, seed)
    first = fit[0][:_ASSIGNMENT_IMAGES], fit[1][:_ASSIGNMENT_IMAGES]
    start = torch.randn(STARTS, *box.shape, generator=generator).to(model.device)
    start /= start.flatten(1).norm(dim=1).reshape((-1,) + (1,) * len(box.shape))
    usual = BUDGET * box.diagonal
    changes = UniversalChanges(box, start * 0.3 * usual, usual)
    best: tuple[float, npt.NDArray[np.intp], npt.NDArray[np.float64], float, Tensor] | None = None
    with (
        model.open(),
        progress_bar("shuffle", len(budgets) * steps, progress) as advance,
    ):
        nothing = torch.zeros(1, *box.shape, device=model.device)
        cap = _MARGIN_CAP * margin_scale(
            logits_of(model, box, first[0], nothing, batch_size), first[1]
        )
        goals = torch.zeros(STARTS, classes, dtype=torch.int64)
        for budget in budgets:
            changes.length = budget * usual
            for step in range(steps):
                if step % _STEPS_AN_ASSIGNMENT == 0:
                    for s, change in enumerate(changes.change):
                        near = (
                            logits_of(model, box, first[0], change, batch_size)
                            .log_softmax(1)
                            .clamp(-20)
                        )
                        goals[s] = torch.from_numpy(_assign(_class_means(near, first[1], classes)))
                taken = turn.take(images)
                batch = fit[0][taken].float().repeat(STARTS, *(1,) * len(box.shape))
                wanted = goals[:, fit[1][taken]].flatten().to(model.device)
                at = changes.apply(model.place(batch), images)
                changes.ascend(model.margin_gradient(at, wanted, cap)[1])
                advance(1)
            for change in changes.change:
                predicted = logits_of(model, box, held_out[0], change, batch_size).argmax(1)
                moved = torch.nn.functional.one_hot(predicted, classes)
                shares = _class_means(moved, held_out[1], classes)
                to = _assign(shares)
                present = torch.bincount(held_out[1], minlength=classes).numpy() > 0
                own = np.where(present, shares[np.arange(classes), to], np.nan)
                share = float(np.nanmean(own))
                if best is None or share > best[0]:
                    best = share, np.where(present, to, -1), own, budget, change.cpu()
    assert best is not None
    return Shuffle(
        best[0],
        tuple(best[1].tolist()),
        torch.from_numpy(best[2]),
        best[3],
        best[4],
        time.perf_counter() - begin,
    )
