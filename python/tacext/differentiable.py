"""A model seen from its inputs: logits with gradients, and the box of inputs that it may be given.

Models run in bfloat16 where the processor multiplies matrices of it, so that results of one seed are the
same on one kind of machine, not on all.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from .errors import InputError, NoGradientError, NotFiniteError
from .files import explain
from .heads import (
    Head,
    evaluating,
    is_out_of_memory,
    model_device,
    model_dtype,
    recording_latents,
    run_model,
)
from .memory_layout import fastest_layout, placed


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


def margins_of_all(logits: Tensor) -> Tensor:
    """z_k - max_{j != k} z_j for every class, float64 [N, C] from logits [N, C].

    In double, in which logits that are just finite have differences that are.
    """
    logits = logits.double()
    value, index = logits.topk(2, dim=1)
    is_first = torch.arange(logits.shape[1], device=logits.device) == index[:, :1]
    return logits - torch.where(is_first, value[:, 1:], value[:, :1])


def class_margin(logits: Tensor, classes: Tensor) -> Tensor:
    """z_k - max_{j != k} z_j for each row's class k, float64 [N]; in double as `margins_of_all`."""
    logits = logits.double()
    own = logits.gather(1, classes[:, None])[:, 0]
    others = logits.scatter(1, classes[:, None], -torch.inf).amax(1)
    return own - others


class DifferentiableModel:
    """A model's logits with gradients with respect to its inputs and to nothing else.

    Convolutions run in channels-last, if the model takes that, and, where the processor has tiles for
    it, all runs in bfloat16: the evidence is about differences of whole logits, and it takes half the
    time or less.
    """

    def __init__(
        self,
        model: nn.Module,
        head: Head,
        operation: str,
        *,
        without_gradients: str = 'or scan with depth="fast", which needs none',
        gradients: bool = True,
    ) -> None:
        self._without = without_gradients  # the way out of having none
        self.head = head
        self.operation = operation
        self.device = model_device(model)
        self._model = model
        made = (*model.parameters(), *model.buffers())
        if gradients and any(tensor.is_inference() for tensor in made):
            raise NoGradientError.of(
                operation,
                "model",
                expected="weights that gradients pass by",
                got="weights made in inference mode",
                way_out=f"build or copy the model outside torch.inference_mode(), {without_gradients}",
            )
        kind = self.device.type
        fast = kind == "cuda" or (kind == "cpu" and has_fast_bfloat16())
        self._half = fast and model_dtype(model) == torch.float32
        self._half_checked = False
        self._layout: torch.memory_format | None = None  # not known yet

    @contextlib.contextmanager
    def open(self) -> Iterator[None]:
        """Evaluation mode within the block, and gradients even where the caller switched them off."""
        with torch.inference_mode(False), evaluating(self._model):
            yield

    def place(self, inputs: Tensor) -> Tensor:
        """Inputs as the model takes them fastest."""
        inputs = inputs.to(self.device)
        if self._layout is None and len(inputs):
            self._layout = fastest_layout(self._model, inputs, self.operation)
        return inputs if self._layout is None else placed(inputs, self._layout)

    def logits(self, inputs: Tensor) -> Tensor:
        """float32 [N, C], of the head, also where the model returns something made of them.

        The first inputs are looked at in float32 as well; a model that bfloat16 makes another of, by
        accident or on purpose, is run in float32 from there on.

        Raises:
            InputError: the model rejects the inputs, or they do not fit into memory.
            NotFiniteError: the logits are NaN or infinite.
        """
        if self._half and not self._half_checked:
            self._half_checked = True
            with torch.no_grad():
                exact, rounded = self._logits(inputs, half=False), self._logits(inputs, half=True)
            self._half = _tell_the_same(exact, rounded)
        return self._logits(inputs, self._half)

    def _logits(self, inputs: Tensor, half: bool) -> Tensor:
        with (
            recording_latents(self.head) as recorder,
            torch.autocast(self.device.type, torch.bfloat16, enabled=half),
        ):
            run_model(self._model, inputs, self.operation, check_finite=False)
            latent = recorder.take()
        weight, bias = self.head.weight, self.head.module.bias
        logits = latent.float() @ weight.detach().float().t()
        logits = logits if bias is None else logits + bias.detach().float()
        if not bool(torch.isfinite(logits).all()):
            raise NotFiniteError.of(
                self.operation,
                "model",
                expected="finite logits for changed or synthetic inputs",
                got="NaN or infinity",
                way_out="look for an overflow in the model, or try it in float32",
            )
        return logits.to(self.device)

    def margin_gradient(
        self, inputs: Tensor, classes: Tensor, cap: float | None = None
    ) -> tuple[Tensor, Tensor]:
        """The margins [N] of each input's class and their gradients, of the inputs' shape.

        Capped margins have no gradient. Scaled and raising as `value_gradient`.
        """

        def capped(logits: Tensor) -> tuple[Tensor, Tensor]:
            margin = class_margin(logits, classes)
            return margin, margin if cap is None else margin.clamp(max=cap)

        return self.value_gradient(inputs, capped)

    def value_gradient(
        self, inputs: Tensor, value: Callable[[Tensor], tuple[Tensor, Tensor]]
    ) -> tuple[Tensor, Tensor]:
        """What is made of each input's logits, and the gradient of it, of the inputs' shape.

        Gradients are those of the values divided by the largest of them, so that a model whose
        logits are scaled to anything that float32 holds has the same ones.

        Args:
            inputs: [N, ...].
            value: of logits [N, C] the values [N], and what the gradient is taken of, [N].

        Raises:
            NoGradientError: the model has no gradient.
            InputError: as `logits`.
        """
        inputs = inputs.detach().clone().requires_grad_(True)
        with torch.enable_grad():
            try:
                found, goal = value(self.logits(inputs))
                unit = found.detach().abs().amax().clamp_min(torch.finfo(torch.float32).tiny)
                (gradient,) = torch.autograd.grad((goal / unit).sum(), inputs)
            except (MemoryError, RuntimeError) as error:
                if is_out_of_memory(error):
                    raise InputError.of(
                        self.operation,
                        "batch_size",
                        expected="batches whose gradients fit into memory",
                        got=f"{len(inputs)} inputs at once ({explain(error)})",
                        way_out="use a smaller batch_size",
                    ) from error
                raise self._without_gradient(f"none ({explain(error)})") from error
        return found.detach(), gradient

    def check_gradient(self, inputs: Tensor, classes: Tensor) -> None:
        """Raises NoGradientError where the gradients are there but say nothing, as of rounded inputs."""
        _, gradient = self.margin_gradient(self.place(inputs.float()), classes.to(self.device))
        if not bool((gradient.isfinite() & (gradient != 0)).any()):
            raise self._without_gradient("gradients of zero everywhere")

    def _without_gradient(self, got: str) -> NoGradientError:
        return NoGradientError.of(
            self.operation,
            "model",
            expected="a model with gradients with respect to its inputs",
            got=got,
            way_out=f"pass the model before it was exported or quantised, {self._without}",
        )


def has_fast_bfloat16() -> bool:
    """Whether this CPU multiplies matrices of bfloat16 (AMX).

    Vector instructions for it are not enough: on a Xeon without tiles a small transformer took three
    and a half times as long as in float32, and convolutional networks as long.
    """
    return bool(torch.cpu._is_amx_tile_supported())


def unit_gradient(gradient: Tensor) -> Tensor:
    """Each sample's gradient at length 1; what is not finite counts as zero."""
    gradient = largest_one(gradient)
    length = gradient.flatten(1).norm(dim=1).clamp_min(1.0)  # zero, or at least its largest entry
    unit: Tensor = gradient / length.reshape((-1,) + (1,) * (gradient.dim() - 1))
    return unit


def largest_one(gradient: Tensor) -> Tensor:
    """Each sample's gradient with its largest entry at 1 or -1; what is not finite counts as zero."""
    gradient = torch.nan_to_num(gradient.float(), nan=0.0, posinf=0.0, neginf=0.0)
    largest = gradient.flatten(1).abs().amax(1)
    largest = torch.where(largest > 0, largest, torch.ones_like(largest))
    scaled: Tensor = gradient / largest.reshape((-1,) + (1,) * (gradient.dim() - 1))
    return scaled


# Rounded logits tell the same where nearly all predictions and half of the margins are as they were.
_SAME_PREDICTIONS = 0.95
_SAME_MARGIN = 0.1


def _tell_the_same(exact: Tensor, rounded: Tensor) -> bool:
    predicted = exact.argmax(1)
    same = float((rounded.argmax(1) == predicted).double().mean())
    margin = class_margin(exact, predicted)
    apart = (class_margin(rounded, predicted) - margin).abs()
    return same >= _SAME_PREDICTIONS and float(apart.median()) <= _SAME_MARGIN * float(
        margin.median()
    )
