"""Max margin: how far any input at all can drive each class ahead of the others.

A backdoor makes its target's margin grow beyond what natural features give (Wang et al., MM-BD,
arXiv 2205.06900): gradient ascent on z_k - max_{j != k} z_j from noise, without any data, finds that
the target overshoots the other classes. Twenty steps tell what the paper's hundreds do.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from .errors import NoGradientError
from .files import explain
from .heads import Head, evaluating, model_device, model_dtype, recording_latents
from .progress import progress_bar

# The usual step, in a unit that does not depend on the size of the images: a share of the diagonal
# of the box of all inputs. 0.3 on 32x32 images of three channels in [0, 1].
_STEP = 0.3 / 3072**0.5
_MOMENTUM = 0.9


@dataclass(frozen=True, eq=False)
class InputBox:
    """The inputs that a model may be given: shape and range.

    Attributes:
        shape: of one input, without the batch.
        low, high: float32, broadcastable to the shape.
    """

    shape: tuple[int, ...]
    low: Tensor = field(repr=False)
    high: Tensor = field(repr=False)

    @classmethod
    def unit(cls, shape: Sequence[int]) -> InputBox:
        """Inputs in [0, 1]."""
        return cls(tuple(shape), torch.zeros(()), torch.ones(()))

    @classmethod
    def around(cls, inputs: Tensor) -> InputBox:
        """The box that data [N, ...] spans, for each channel by itself; [0, 1] where it fits in."""
        low, high = inputs.detach().float().aminmax()
        if float(low) >= 0 and float(high) <= 1:
            return cls.unit(inputs.shape[1:])
        channels = inputs.detach().float().transpose(0, 1).flatten(1)
        shape = (-1,) + (1,) * (inputs.dim() - 2)
        return cls(
            tuple(inputs.shape[1:]),
            channels.amin(1).reshape(shape).cpu(),
            channels.amax(1).reshape(shape).cpu(),
        )

    @property
    def diagonal(self) -> float:
        """The distance of its opposite corners."""
        return float((self.high - self.low).expand(self.shape).square().sum().sqrt())

    def noise(self, count: int, seed: int) -> Tensor:
        """Uniform noise, float32 [count, ...]; the same for the same seed, on every device."""
        generator = torch.Generator().manual_seed(seed)
        unit = torch.rand(count, *self.shape, generator=generator)
        return self.low + unit * (self.high - self.low)

    def clamp(self, inputs: Tensor) -> Tensor:
        """The nearest inputs in the box."""
        return inputs.clamp(self.low.to(inputs), self.high.to(inputs))


def class_margin(logits: Tensor, classes: Tensor) -> Tensor:
    """z_k - max_{j != k} z_j for each row's class k, [N]."""
    own = logits.gather(1, classes[:, None])[:, 0]
    others = logits.scatter(1, classes[:, None], -torch.inf).amax(1)
    return own - others


class DifferentiableModel:
    """A model's logits with gradients with respect to its inputs and to nothing else.

    Convolutions run in channels-last and, where the processor has it, in bfloat16: the evidence is
    about differences of whole logits, and it takes half the time.
    """

    def __init__(self, model: nn.Module, head: Head, operation: str) -> None:
        self.head = head
        self.operation = operation
        self.device = model_device(model)
        self._model = model
        self._dtype = model_dtype(model)

    @contextlib.contextmanager
    def open(self) -> Iterator[None]:
        """Evaluation mode, and no gradients of parameters, within the block."""
        wanted = [(p, p.requires_grad) for p in self._model.parameters()]
        for parameter, _ in wanted:
            parameter.requires_grad_(False)
        try:
            with evaluating(self._model):
                yield
        finally:
            for parameter, value in wanted:
                parameter.requires_grad_(value)

    def place(self, inputs: Tensor) -> Tensor:
        """Inputs as the model takes them fastest."""
        inputs = inputs.to(self.device)
        return inputs.contiguous(memory_format=torch.channels_last) if inputs.dim() == 4 else inputs

    def logits(self, inputs: Tensor) -> Tensor:
        """float32 [N, C], of the head, also where the model returns something made of them."""
        fast = self.device.type == "cuda" or has_fast_bfloat16()
        half = self._dtype == torch.float32 and fast
        with (
            recording_latents(self.head) as recorder,
            torch.autocast(self.device.type, torch.bfloat16, enabled=half),
        ):
            self._model(inputs.to(self._dtype))
            latent = recorder.take()
        weight, bias = self.head.weight, self.head.module.bias
        logits = latent.float() @ weight.detach().float().t()
        return logits if bias is None else logits + bias.detach().float()

    def margin_gradient(
        self, inputs: Tensor, classes: Tensor, cap: float | None = None
    ) -> tuple[Tensor, Tensor]:
        """The margins [N] of each input's class and their gradients, of the inputs' shape.

        Raises:
            NoGradientError: the model has no gradient.
        """
        inputs = inputs.detach().requires_grad_(True)
        with torch.enable_grad():
            margin = class_margin(self.logits(inputs), classes)
            goal = margin if cap is None else margin.clamp(max=cap)
            try:
                (gradient,) = torch.autograd.grad(goal.sum(), inputs)
            except RuntimeError as error:
                raise NoGradientError.of(
                    self.operation,
                    "model",
                    expected="a model with gradients with respect to its inputs",
                    got=f"none ({explain(error)})",
                    way_out='pass the model before it was exported or quantised, or depth="fast"',
                ) from error
        return margin.detach(), gradient


def has_fast_bfloat16() -> bool:
    """Whether this CPU multiplies bfloat16 in hardware."""
    return bool(torch.cpu._is_avx512_bf16_supported())


def unit_gradient(gradient: Tensor) -> Tensor:
    """Each sample's gradient at length 1; what is not finite counts as zero."""
    gradient = torch.nan_to_num(gradient.float(), nan=0.0, posinf=0.0, neginf=0.0)
    length = gradient.flatten(1).norm(dim=1).clamp_min(1e-20)
    unit: Tensor = gradient / length.reshape((-1,) + (1,) * (gradient.dim() - 1))
    return unit


@dataclass(frozen=True, eq=False)
class MaxMargin:
    """What the ascent reached.

    Attributes:
        classes: one for each row of what follows.
        margin: float64 [J, S], for every class and start.
        marks: the steps after which margins were noted; history: float64 [marks, J, S].
        seconds: of the ascent.
    """

    classes: tuple[int, ...]
    margin: Tensor
    marks: tuple[int, ...]
    history: Tensor = field(repr=False)
    seconds: float


def max_margin(
    model: DifferentiableModel,
    box: InputBox,
    *,
    classes: Sequence[int] | None = None,
    starts: int = 8,
    steps: int = 20,
    marks: Sequence[int] = (),
    batch_size: int = 128,
    seed: int = 0,
    progress: bool | None = None,
) -> MaxMargin:
    """Drives every class, from noise, as far ahead of the others as inputs within the box allow.

    Args:
        model: the classifier.
        box: the inputs that it may be given.
        classes: to drive; all if left out.
        starts: inputs to start from, for every class.
        steps: of normalised-gradient ascent with momentum.
        marks: steps after which to note the margins, besides the last.
        batch_size: inputs that are driven at once.
        seed: of the noise.
        progress: whether to show a progress bar; None shows it on a terminal.

    Raises:
        NoGradientError: the model has no gradients.
    """
    begin = time.perf_counter()
    driven = tuple(range(model.head.num_classes)) if classes is None else tuple(classes)
    inputs = box.noise(starts * len(driven), seed)
    goals = torch.tensor(driven).repeat_interleave(starts)
    noted = sorted({mark for mark in marks if mark < steps} | {steps})
    step = _STEP * box.diagonal
    history: list[Tensor] = []
    with model.open(), progress_bar("max margin", len(goals) * steps, progress) as advance:
        for batch, wanted in zip(inputs.split(batch_size), goals.split(batch_size), strict=True):
            at, goal = model.place(batch), wanted.to(model.device)
            velocity = torch.zeros_like(at)
            reached: list[Tensor] = []
            for number in range(steps):
                margin, gradient = model.margin_gradient(at, goal)
                if number in noted:
                    reached.append(margin)
                velocity = _MOMENTUM * velocity + unit_gradient(gradient)
                at = box.clamp(at + step * velocity)
                advance(len(goal))
            with torch.no_grad():
                reached.append(class_margin(model.logits(at), goal))
            history.append(torch.stack(reached).double().cpu())
    all_marks = torch.cat(history, 1).reshape(len(noted), len(driven), starts)
    return MaxMargin(driven, all_marks[-1], tuple(noted), all_marks, time.perf_counter() - begin)
