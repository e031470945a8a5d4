"""The head of a classifier: finding its last linear layer and capturing what flows into it.

Every claim is checked on numbers, not on names: a layer is the head when its own output, recomputed
from the captured latents, is what the model returns.
"""

from __future__ import annotations

import contextlib
import math
import threading
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from .errors import HeadNotFoundError, InputError, NotFiniteError, TacextError, counted
from .files import explain

HeadModule = nn.Linear | nn.Conv2d

# What DataParallel and torch.compile put in front of the names of what they wrap.
PREFIXES = ("module.", "_orig_mod.")


@dataclass(frozen=True)
class Head:
    """The last linear layer z = W phi + b of a model.

    Attributes:
        name: its name in `model.named_modules()`.
        module: the nn.Linear or 1x1 nn.Conv2d itself.
    """

    name: str
    module: HeadModule

    @property
    def weight(self) -> Tensor:
        """W, [C, D]."""
        return self.module.weight.flatten(1)

    @property
    def num_classes(self) -> int:
        """C, the number of classes."""
        return int(self.weight.shape[0])

    @property
    def latent_dim(self) -> int:
        """D, the number of latents."""
        return int(self.weight.shape[1])

    def logits(self, latent: Tensor) -> Tensor:
        """W phi + b, [N, C], for latents [N, D]."""
        return functional.linear(latent, self.weight, self.module.bias)


def latent_of(module_input: Tensor) -> Tensor:
    """The latent [N, D] behind a head's input: positions of a 1x1 convolution are averaged."""
    if module_input.dim() <= 2:
        return module_input
    return module_input.flatten(2).mean(2)


def _is_candidate(module: nn.Module) -> bool:
    if isinstance(module, nn.Linear):
        return True
    return (
        isinstance(module, nn.Conv2d)
        and module.kernel_size == (1, 1)
        and module.stride == (1, 1)
        and module.padding in ((0, 0), "valid", "same")
        and module.groups == 1
    )


def model_device(model: nn.Module) -> torch.device:
    """The device of the model's first parameter or buffer; the CPU where it has none."""
    for tensor in (*model.parameters(), *model.buffers()):
        return tensor.device
    return torch.device("cpu")


def model_dtype(model: nn.Module) -> torch.dtype:
    """The dtype of the model's first floating parameter; float32 where it has none."""
    for tensor in model.parameters():
        if tensor.is_floating_point():
            return tensor.dtype
    return torch.float32


def check_model(model: object, operation: str, argument: str = "model") -> None:
    """Raises InputError unless the model is an nn.Module."""
    if not isinstance(model, nn.Module):
        raise InputError.of(
            operation,
            argument,
            expected="an nn.Module",
            got=repr(model) if isinstance(model, str) else type(model).__name__,
            way_out="pass the model itself; tacext.load_model reads one from a file",
        )


@contextlib.contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode within the block; every submodule gets its own mode back."""
    modes = [(module, module.training) for module in model.modules()]
    try:
        model.eval()
    except NotImplementedError as error:  # as torch.export leaves its modules
        raise InputError.of(
            "heads",
            "model",
            expected="an nn.Module that has an evaluation mode",
            got=f"one that has none ({explain(error)})",
            way_out="pass the model before it was exported",
        ) from error
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode


def call_model(
    model: nn.Module, inputs: Tensor, operation: str, *, argument: str = "data"
) -> object:
    """What the model returns for inputs that may live elsewhere.

    Raises:
        InputError: the model rejects the inputs, or memory runs out.
    """
    placed = inputs.to(model_device(model), model_dtype(model))
    # A copy: some models change their inputs in place.
    placed = placed.clone() if placed.data_ptr() == inputs.data_ptr() else placed
    try:
        return model(placed)
    except TacextError:
        raise
    except Exception as error:
        if is_out_of_memory(error):
            few = counted(len(inputs), "sample")
            raise InputError.of(
                operation,
                "batch_size",
                expected="batches that fit into memory",
                got=f"{few}, for which there is none left ({explain(error)})",
                way_out="use a smaller batch_size",
            ) from error
        raise InputError.of(
            operation,
            argument,
            expected="inputs that the model takes",
            got=f"a batch of shape {list(inputs.shape)}, which it rejects ({explain(error)})",
            way_out="check the architecture, the image size and the number of channels",
        ) from error


def plain_output(output: Any) -> Any:
    """The logits of what a model returns: itself, or its entry or attribute of that name."""
    if isinstance(output, Mapping):
        return output.get("logits", output)
    return getattr(output, "logits", output)


def run_model(
    model: nn.Module,
    inputs: Tensor,
    operation: str,
    *,
    check_finite: bool = True,
    argument: str = "data",
) -> Tensor:
    """The model's logits [N, C] for inputs that may live elsewhere, with errors that help.

    Raises:
        InputError: as `call_model`, or the model returns something other than finite [N, C].
    """
    output = call_model(model, inputs, operation, argument=argument)
    output = plain_output(output)
    if not isinstance(output, Tensor) or output.dim() != 2 or output.shape[0] != len(inputs):
        got = f"shape {list(output.shape)}" if isinstance(output, Tensor) else type(output).__name__
        raise InputError.of(
            operation,
            "model",
            expected="an output of shape [samples, classes]",
            got=got,
            way_out="wrap the model so that it returns its logits alone",
        )
    if check_finite and not bool(torch.isfinite(output).all()):
        raise NotFiniteError.of(
            operation,
            "model",
            expected="finite logits",
            got="NaN or infinity",
            way_out="check its weights and the normalisation of its inputs",
        )
    return output


def is_out_of_memory(error: BaseException) -> bool:
    """Whether memory ran out; torch's allocator for the CPU raises a bare RuntimeError."""
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    # Or one of the stable interface, which tells the function that failed and no more.
    signs = ("DefaultCPUAllocator", '"aten::new_empty"', '"aten::empty')
    return isinstance(error, RuntimeError) and any(sign in str(error) for sign in signs)


def check_labels_in_range(labels: Tensor, num_classes: int, operation: str) -> None:
    """Raises InputError where a label is no class of the model."""
    low, high = int(labels.min()), int(labels.max())
    if low < 0 or high >= num_classes:
        raise InputError.of(
            operation,
            "data",
            expected=f"labels from 0 to {num_classes - 1}, as the model has {num_classes} classes",
            got=f"{low if low < 0 else high}",
            way_out="count classes from 0, and check that data and model belong together",
        )


# By which what compiled code has noted is known: what traces a pass cannot ask for the thread.
COMPILED = 0


def calling_thread() -> int:
    """By which what passes through a module is told from that of other threads."""
    return COMPILED if torch.compiler.is_compiling() else threading.get_ident()


class LatentRecorder:
    """Holds the input of the head of the model's last forward pass."""

    def __init__(self) -> None:
        self._latent: Tensor | None = None
        self.calls = 0

    def record(self, _module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        """A forward pre-hook."""
        self._latent = latent_of(inputs[0])
        self.calls += 1

    def take(self) -> Tensor:
        """The latents [N, D] of the last pass; each is handed out once."""
        if self._latent is None:
            raise InputError.of(
                "heads",
                "head",
                expected="a layer that every forward pass uses",
                got="one that this pass did not call",
                way_out="name the model's last linear layer with head=",
            )
        latent, self._latent = self._latent, None
        return latent


@contextlib.contextmanager
def recording_latents(head: Head | nn.Module) -> Iterator[LatentRecorder]:
    """Records the latents of every forward pass within the block: of a head, or what comes to a module."""
    recorder = LatentRecorder()
    module = head.module if isinstance(head, Head) else head
    handle = module.register_forward_pre_hook(recorder.record)
    try:
        yield recorder
    finally:
        handle.remove()


# ---- finding -------------------------------------------------------------------------------------


def _explains(logits: Tensor, output: Tensor) -> bool:
    """Whether `output` is these logits, up to a constant a sample, or their softmax."""
    if logits.shape != output.shape:
        return False
    # Without what all classes share, which a decoy could make so large that anything is near it.
    rounding = _rounding(output)
    half = output.dtype in _ROUNDING
    logits, output = logits.double(), output.double()
    centred = logits - logits.mean(1, keepdim=True)
    largest = float(centred.abs().max())
    apart = (centred - (output - output.mean(1, keepdim=True))).abs()
    if float(apart.max()) <= 2e-3 * largest + rounding + 1e-6:
        return True
    if bool((output < 0).any()) or float((output.sum(1) - 1).abs().max()) > 1e-2:
        return False
    # Of probabilities the logarithms: where most of them are 0 or 1, these tell a mixture from its
    # parts. What is smaller still is mostly rounding.
    log_share = logits.log_softmax(1)
    told = log_share > math.log(1e-2 if half else 1e-6)
    apart = (log_share - output.clamp_min(1e-30).log()).abs()
    tolerance = 0.05 + 4e-3 * largest if half else 0.01 + 1e-5 * largest
    return float(torch.where(told, apart, 0.0).max()) <= tolerance


# Half-precision models round their own output; recomputing it in double does not.
_ROUNDING = {torch.float16: 2.0**-10, torch.bfloat16: 2.0**-7}


def _rounding(output: Tensor) -> float:
    return _ROUNDING.get(output.dtype, 0.0) * float(output.abs().max())


def check_predictions(logits: Tensor, output: Tensor, operation: str) -> None:
    """Raises HeadNotFoundError where the head decides otherwise than the model, ties aside."""
    best, worst = output.amax(1), output.amin(1)
    behind = best - output.gather(1, logits.argmax(1)[:, None])[:, 0]
    differ = int((behind > 5e-3 * (best - worst) + _rounding(output)).sum())
    if differ:
        raise HeadNotFoundError.of(
            operation,
            "head",
            expected="the layer that decides the model's prediction",
            got=f"one whose own differs on {differ} of {len(output)} samples",
            way_out="name another layer with head=, or wrap the model to end in its logits",
        )


def _observe(model: nn.Module, example: Tensor, operation: str) -> tuple[Tensor, dict[str, Tensor]]:
    """The output for `example`, and the latents of every candidate in the order of execution."""
    seen: dict[str, Tensor] = {}
    handles = []
    for name, module in model.named_modules():
        if not _is_candidate(module):
            continue

        def note(_module: nn.Module, inputs: tuple[Tensor, ...], name: str = name) -> None:
            seen.pop(name, None)  # called again: it moves to the end
            if inputs and isinstance(inputs[0], Tensor) and inputs[0].dim() >= 2:
                seen[name] = latent_of(inputs[0])

        handles.append(module.register_forward_pre_hook(note))
    try:
        with evaluating(model), torch.no_grad():
            output = run_model(model, example, operation)
    finally:
        for handle in handles:
            handle.remove()
    return output, seen


def _head(model: nn.Module, name: str) -> Head:
    module = model.get_submodule(name)
    assert isinstance(module, nn.Linear | nn.Conv2d)
    return Head(name, module)


def _named_head(
    model: nn.Module, name: str, output: Tensor, seen: dict[str, Tensor], operation: str
) -> Head:
    known = dict(model.named_modules(remove_duplicate=False))  # a shared layer has two names
    if name not in known or not _is_candidate(known[name]):
        listing = _listing(model)
        got = f"{name!r}, which is " + (
            f"a {type(known[name]).__name__}" if name in known else "not in the model"
        )
        raise HeadNotFoundError.of(
            operation,
            "head",
            expected="the name of an nn.Linear or 1x1 nn.Conv2d",
            got=got,
            way_out=f"choose one of {listing}" if listing else _without_candidates(model),
        )
    head = _head(model, name)
    latent = next((seen[n] for n in seen if known[n] is known[name]), None)
    usable = latent is not None and latent.shape[1] == head.latent_dim
    logits = head.logits(latent) if latent is not None and usable else None
    # A named head may feed a monotone output (temperature, calibration): predictions must agree.
    if (
        logits is None
        or logits.shape != output.shape
        or not torch.equal(logits.argmax(1), output.argmax(1))
    ):
        raise HeadNotFoundError.of(
            operation,
            "head",
            expected="the layer that decides the model's prediction",
            got=f"{name!r}, whose own prediction differs from the model's",
            way_out=f"choose one of {_listing(model)}, or wrap the model to end in its logits",
        )
    return head


def _without_candidates(model: nn.Module) -> str:
    """The way out where no layer can be named."""
    if any(isinstance(m, torch.jit.ScriptModule) for m in model.modules()):
        return "layers of TorchScript cannot be seen; pass the nn.Module that it was made from"
    # Quantised layers have no class in common, and each way of quantising has classes of its own.
    if any("quantized" in type(m).__module__.split(".") for m in model.modules()):
        return "quantised layers give no latents in floating point; pass the model as it was before"
    return "the model has no linear layer; wrap it to end in one that gives the logits"


def _listing(model: nn.Module) -> str:
    names = [repr(name) for name, module in model.named_modules() if _is_candidate(module)]
    return ", ".join(names[-8:])


def find_head(
    model: nn.Module, example: Tensor, name: str | None = None, *, operation: str = "find_head"
) -> Head:
    """Finds the last nn.Linear, or 1x1 nn.Conv2d at a pooled latent, whose output is the logits.

    Args:
        model: any module that maps [N, ...] to logits [N, C], their log-softmax or softmax.
        example: inputs [N, ...] of a few samples, in any dtype, on any device.
        name: the layer's name where the model cannot tell by itself.
        operation: who asks, for the error messages.

    Raises:
        HeadNotFoundError: no layer reproduces the output; the message lists the candidates.
        InputError: the model rejects the example, or has fewer than 2 classes.
    """
    output, seen = _observe(model, example, operation)
    if output.shape[1] < 2:
        raise InputError.of(
            operation,
            "model",
            expected="at least 2 classes",
            got=f"{output.shape[1]}",
            way_out="a classifier with one output has no other class to be pushed into",
        )
    if name is not None:
        return _named_head(model, name, output, seen, operation)
    for candidate in reversed(list(seen)):
        head = _head(model, candidate)
        if head.latent_dim != seen[candidate].shape[1]:
            continue
        with torch.no_grad():
            if _explains(head.logits(seen[candidate]), output):
                return head
    listing = _listing(model)
    raise HeadNotFoundError.of(
        operation,
        "model",
        expected="logits that are the output of an nn.Linear or 1x1 nn.Conv2d",
        got="an output that no such layer reproduces",
        way_out=f"name the layer with head= (candidates: {listing}), "
        "or wrap the model to end in its logits"
        if listing
        else _without_candidates(model),
    )
