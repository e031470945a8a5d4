"""Max margin: how far any input at all can drive each class ahead of the others.

A backdoor makes its target's margin grow beyond what natural features give (Wang et al., MM-BD,
arXiv 2205.06900): gradient ascent on z_k - max_{j != k} z_j from noise, without any data, finds that
the target overshoots the other classes. Twenty normalised steps tell what the paper's hundreds do.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from .differentiable import DifferentiableModel, InputBox, class_margin, unit_gradient
from .progress import progress_bar

# A step, as a share of the diagonal of the box of all inputs: 0.3 on 32x32 images of three channels
# in [0, 1].
_STEP = 0.3 / 3072**0.5
_MOMENTUM = 0.9


@dataclass(frozen=True, eq=False)
class MaxMargin:
    """What the ascent reached.

    Attributes:
        classes: one for each row of what follows, J of them.
        margin: float64 [J, S], for every class and start.
        seconds: of the ascent.
    """

    classes: tuple[int, ...]
    margin: Tensor
    seconds: float


@dataclass(frozen=True, eq=False)
class DrivenClasses:
    """Some classes that were driven together.

    Attributes:
        classes: J of them.
        margin: float64 [J, S], for every class and start.
        inputs: float32 [J, ...], for every class the input of its largest margin.
    """

    classes: tuple[int, ...]
    margin: Tensor
    inputs: Tensor = field(repr=False)


def drive_classes(
    model: DifferentiableModel,
    box: InputBox,
    classes: Sequence[int],
    *,
    starts: int = 8,
    steps: int = 20,
    batch_size: int = 128,
    seed: int = 0,
    progress: bool | None = None,
) -> Iterator[DrivenClasses]:
    """Drives every class, from noise, as far ahead of the others as inputs within the box allow.

    Args:
        model: the classifier.
        box: the inputs that it may be given.
        classes: to drive; as many at once as fit into a batch.
        starts: inputs to start from, for every class.
        steps: of normalised-gradient ascent with momentum.
        batch_size: inputs that are driven at once.
        seed: of the noise.
        progress: whether to show a progress bar; None shows it on a terminal.

    Raises:
        NoGradientError: the model has no gradients.
        InputError: the model rejects the inputs, or gives NaN or infinity for them.
    """
    classes = tuple(classes)
    starts = min(starts, batch_size)
    at_once = batch_size // starts
    step = _STEP * box.diagonal
    with progress_bar("max margin", len(classes) * starts * steps, progress) as advance:
        for first in range(0, len(classes), at_once):
            part = classes[first : first + at_once]
            # Each class has noise of its own, whatever the size of the groups.
            seeds = [(65537 * seed + k) % (1 << 62) for k in part]
            goal = torch.tensor(part, device=model.device).repeat_interleave(starts)
            with model.open():
                at = model.place(torch.cat([box.noise(starts, s) for s in seeds]))
                if not first:
                    model.check_gradient(at, goal)
                velocity = torch.zeros_like(at)
                for _ in range(steps):
                    _, gradient = model.margin_gradient(at, goal)
                    velocity = _MOMENTUM * velocity + unit_gradient(gradient)
                    at = box.clamp(at + step * velocity)
                    advance(len(goal))
                with torch.no_grad():
                    reached = class_margin(model.logits(at), goal)
            margin = reached.reshape(len(part), starts)
            furthest = torch.arange(len(part), device=model.device) * starts + margin.argmax(1)
            yield DrivenClasses(part, margin.cpu(), at[furthest].float().cpu())
