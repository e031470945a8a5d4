"""The exact operators, on tensors. The only module that touches the native library.

Every operator goes through torch's dispatcher as `torch.ops.tacext.*`, so it runs on the tensor's
device, releases the GIL, and works under torch.compile and from C++ alike.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from numbers import Real
from typing import Any

import torch  # first: the native library resolves its symbols in torch's
from torch import Tensor

from .errors import DependencyError, InputError, printable
from .tensor_checks import check_same_device, check_tensor

OLDEST_TORCH = (2, 11)  # whose stable interface the native library was built for
_SUPPORTED = "torch>=2.11,<2.15"  # what it was tested with


def _check_torch(version: str) -> None:
    """Raises DependencyError for a torch that the native library does not load with."""
    found = tuple(int(part) for part in re.findall(r"\d+", version)[:2])
    if found < OLDEST_TORCH:
        raise DependencyError.of(
            "tacext",
            "torch",
            expected=f"version {OLDEST_TORCH[0]}.{OLDEST_TORCH[1]} or newer",
            got=version,
            way_out=f"pip install --upgrade '{_SUPPORTED}'",
        )


_check_torch(str(torch.__version__))
try:
    from . import _core
    from ._core import Status
except ImportError as error:
    raise DependencyError.of(
        "tacext",
        "torch",
        expected="one that tacext's native library loads with",
        got=f"{torch.__version__} ({printable(str(error))})",
        way_out=f"install {_SUPPORTED}, or build tacext against this one: in a copy of its source, "
        "pip install --force-reinstall --no-deps .",
    ) from error

__all__ = [
    "BuildInfo",
    "MinimalPerturbation",
    "SolverSettings",
    "Status",
    "build_info",
    "cmake_prefix_path",
    "guard_score",
    "has_guard_kernel",
    "minimal_perturbation",
    "neuron_scores",
    "pairwise_margin_largest",
    "pairwise_margin_max",
    "pairwise_margin_quantile",
]


class SolverSettings(_core.SolverSettings):
    """Settings of the exact solver; immutable, compared by value.

    Attributes:
        tolerance: the largest relative KKT residual at which a class counts as solved, in (0, 1).
        max_iterations: of the active-set method for a class, at most; 0 leaves it to the solver.
        closed_form: whether the closed form, in which all constraints are active, is tried first.

    Raises:
        InputError: a tolerance out of its range, fewer than 0 iterations, or what is no number.
    """

    __slots__ = ()

    def __init__(
        self, *, tolerance: float = 1e-9, max_iterations: int = 0, closed_form: bool = True
    ) -> None:
        try:
            super().__init__(
                tolerance=tolerance, max_iterations=max_iterations, closed_form=closed_form
            )
        except ValueError as error:
            raise InputError(str(error)) from None
        except TypeError:
            raise InputError.of(
                "SolverSettings",
                "arguments",
                expected="a number, an integer and a truth value",
                got=f"tolerance={tolerance!r}, max_iterations={max_iterations!r}, "
                f"closed_form={closed_form!r}",
                way_out="leave out those whose defaults will do",
            ) from None


DEFAULT_SETTINGS = SolverSettings()

# Of CMAKE_CUDA_ARCHITECTURES in CMakeLists.txt, and TACEXT_CUDA_GUARD_MOST_RANKS.
_OLDEST_GPU = (8, 0)
_MOST_RANKS_ON_A_GPU = 256


# Where CMake's find_package(tacext) finds tacext::core; its lib/ and include/ serve others, too.
cmake_prefix_path = os.path.dirname(os.path.abspath(_core.__file__))


@dataclass(frozen=True)
class BuildInfo:
    """What the native library was built with and what it finds on this machine."""

    version: str
    built_with_torch: str
    torch: str
    simd: str
    cuda_kernels: bool
    cuda_devices: int


def build_info() -> BuildInfo:
    """Describes the native library and this machine."""
    return BuildInfo(
        version=_core.version(),
        built_with_torch=_core.torch_version,
        torch=str(torch.__version__),
        simd=_core.simd_level(),
        cuda_kernels=_core.has_cuda(),
        cuda_devices=_core.cuda_device_count(),
    )


@dataclass(frozen=True, eq=False)
class MinimalPerturbation:
    """The minimal latent perturbations of R classes, each with the certificate that proves it.

    Attributes:
        classes: int64 [R], the classes k that were solved.
        perturbation: float64 [R, D], s_k; NaN where unreachable. With `Status.ITERATION_LIMIT`
            what was reached, not proven minimal; NaN where that was nothing that float64 can hold.
        norm: float64 [R], |s_k / scale|; infinite where unreachable, NaN where nothing was reached.
        multipliers: float64 [R, C], l >= 0 with s_k = scale^2 * sum_j l_j (w_k - w_j); where
            unreachable a Farkas ray: sum_j l_j (w_k - w_j) = 0 to rounding although
            sum_j l_j M[k, j] > 0.
        status: int32 [R], values of `Status`. UNREACHABLE: no perturbation up to some 1e13 natural
            units |M[k, j]| / |a_j| does it, as the ray proves; beyond, float64 cannot tell.
            ITERATION_LIMIT: not proven, for want of steps, of digits or of range.
        iterations: int64 [R], active-set steps, all told; 0 where the closed form held. On a GPU
            those of the CPU come on top where it settles a class, within a limit of its own.
        active: int64 [R], constraints with a positive multiplier.
        primal_residual: float64 [R], the worst violation
            (M[k, j] - a_j.s)+ / (|M[k, j]| + |a_j| |s|), a_j = w_k - w_j in the metric of `scale`;
            where the active constraints nearly cancel, the stricter one against
            |M[k, j]| + sum_d |a_jd s_d|.
        dual_residual: float64 [R], |s - sum_j l_j a_j| / (|s| + sum_j l_j |a_j|); where
            unreachable |sum_j l_j a_j| / sum_j l_j |a_j|.
        gap: float64 [R], |s.s - b| / max(s.s, |b|) with b = 2 m.l - |sum_j l_j a_j|^2, which bounds
            the square of the smallest norm from below (where the active constraints nearly cancel,
            with l before it was rounded to float64); where unreachable -m.l, below zero.
    """

    classes: Tensor
    perturbation: Tensor
    norm: Tensor
    multipliers: Tensor
    status: Tensor
    iterations: Tensor
    active: Tensor
    primal_residual: Tensor
    dual_residual: Tensor
    gap: Tensor

    @property
    def certificate(self) -> float:
        """The largest residual of any optimal class; NaN where no class is optimal."""
        residuals = torch.stack([self.primal_residual, self.dual_residual, self.gap])
        optimal = residuals[:, self.status == Status.OPTIMAL]
        return float(optimal.max()) if optimal.numel() else math.nan


def _call(operation: str, operator: Callable[..., Any], *arguments: Any) -> Any:
    """Calls a native operator; its own messages come back as InputError, without C++ locations."""
    try:
        return operator(*arguments)
    except RuntimeError as error:
        _, found, message = str(error).partition(f"{operation}: ")
        if not found:
            raise
        raise InputError(found + message.split("\n")[0]) from None


def check_settings(settings: object, operation: str) -> None:
    """Raises InputError unless these are settings of the solver."""
    if not isinstance(settings, SolverSettings):
        raise InputError.of(
            operation,
            "settings",
            expected="SolverSettings",
            got=type(settings).__name__,
            way_out="pass tacext.SolverSettings(...), or leave it out for the defaults",
        )


def pairwise_margin_max(logits: Tensor, out: Tensor | None = None) -> Tensor:
    """The pairwise margin maximum M[k, j] = max_i (logits[i, j] - logits[i, k]).

    Row k holds the right-hand sides of class k's problem: pushing every sample into k takes
    (w_k - w_j).s >= M[k, j] for all j. Merging batches, shards or machines is an elementwise
    maximum. Time O(N C^2), memory O(C^2) however many samples (arXiv 2511.08944, the constraints of
    its optimisation problem).

    Args:
        logits: [N, C], float64, float32, float16 or bfloat16, finite, N >= 1 (N >= 0 with `out`).
            On a GPU a NaN is not an error here: it turns its row and column of M into NaN, which
            `minimal_perturbation` rejects.
        out: [C, C], contiguous, of the dtype that the result has; updated in place with the
            maximum of itself and this batch. Start from the first batch's result, or from -inf.

    Returns:
        [C, C], float64 for float64 logits and float32 for the rest; `out` where it is given.

    Raises:
        InputError: wrong shape, dtype or device, no samples, NaN or infinity.
    """
    check_tensor("pairwise_margin_max", "logits", logits)
    if out is None:
        operator = torch.ops.tacext.pairwise_margin_max.default
        result: Tensor = _call("pairwise_margin_max", operator, logits.detach())
        return result
    check_tensor("pairwise_margin_max", "out", out)
    check_same_device("pairwise_margin_max", "out", out, "logits", logits)
    _call(
        "pairwise_margin_max", torch.ops.tacext.pairwise_margin_max_.default, out, logits.detach()
    )
    return out


def is_number(value: object) -> bool:
    """Whether this is one finite real number, of Python or numpy."""
    return isinstance(value, Real) and math.isfinite(value)


def check_quantile(quantile: float, operation: str) -> None:
    """Raises InputError unless 0 < quantile <= 1."""
    if not is_number(quantile) or not 0 < quantile <= 1:
        raise InputError.of(
            operation,
            "quantile",
            expected="above 0 and at most 1",
            got=repr(quantile),
            way_out="pass a float: 1 is the maximum, 0.99 leaves out one sample in a hundred",
        )


def differences_above(samples: int, quantile: float) -> int:
    """How many of a pair's differences lie at or above its quantile, itself included."""
    at_or_below = max(1, math.ceil(round(quantile * samples, 6)))  # 0.07 * 100 is just above 7
    return samples - at_or_below + 1


def pairwise_margin_quantile(logits: Tensor, quantile: float) -> Tensor:
    """A quantile in place of the maximum: M[k, j] of logits[i, j] - logits[i, k] over i.

    The smallest difference with at least that share of the samples at or below it; exact, and one
    of the differences, not between two. With it the perturbation need not carry the few samples
    that are hardest to move. `MarginQuantile` streams it.

    Args:
        logits: [N, C], N >= 1, float64, float32, float16 or bfloat16, finite (on a GPU unchecked).
        quantile: above 0 and at most 1, which is `pairwise_margin_max`.

    Returns:
        [C, C], float64 for float64 logits and float32 for the rest. Time O(N C^2); memory beside
        the result: a copy of the logits.

    Raises:
        InputError: wrong shape or dtype, no samples, NaN or infinity, a quantile out of range.
    """
    operation = "pairwise_margin_quantile"
    check_tensor(operation, "logits", logits)
    check_quantile(quantile, operation)
    samples = logits.shape[0] if logits.dim() else 0
    keep = differences_above(max(1, samples), quantile)
    result: Tensor = _call(
        operation, torch.ops.tacext.pairwise_margin_quantile.default, logits.detach(), keep
    )
    return result


def pairwise_margin_largest(logits: Tensor, out: Tensor) -> Tensor:
    """The largest differences of every pair: what a quantile needs of a stream of batches.

    Args:
        logits: [N, C], as for `pairwise_margin_max`.
        out: [C, C, m], contiguous, float64 for float64 logits and float32 for the rest: the m
            largest logits[i, j] - logits[i, k] so far at [k, j], in no order; updated in place.
            Start from one full of -inf; NaN is refused on the CPU and kept on a GPU. Shards merge
            by keeping the m largest of both.

    Returns:
        `out`.

    Raises:
        InputError: wrong shape, dtype or device, NaN or infinity.
    """
    operation = "pairwise_margin_largest"
    check_tensor(operation, "logits", logits)
    check_tensor(operation, "out", out)
    check_same_device(operation, "out", out, "logits", logits)
    _call(operation, torch.ops.tacext.pairwise_margin_largest_.default, out, logits.detach())
    return out


def minimal_perturbation(
    weight: Tensor,
    margins: Tensor,
    scale: Tensor | None = None,
    classes: Tensor | Sequence[int] | None = None,
    settings: SolverSettings = DEFAULT_SETTINGS,
) -> MinimalPerturbation:
    """The smallest latent perturbation that sends every sample to class k, exactly, for each k.

    Solves s_k = argmin 1/2 |s / scale|^2 subject to (w_k - w_j).s >= M[k, j] for all j != k
    (arXiv 2511.08944, its optimisation problem): in closed form where every constraint is active,
    else by a dual active-set method; in float64, from one Gram matrix of all classes where that
    pays. A class that no perturbation can reach, or only one beyond some 1e13 times the scale of its
    constraints, is `Status.UNREACHABLE`, with a proof, and not an error.

    Args:
        weight: W, [C, D] with C >= 2, the head's weight; any floating dtype, finite.
        margins: M, [C, C], from `pairwise_margin_max`; the diagonal is not used, but must be
            finite.
        scale: [D], positive. The metric: latents are measured in units of scale. None means 1.
        classes: the classes to solve for; None means all.
        settings: tolerance of the certificate, iteration limit, use of the closed form.

    Returns:
        MinimalPerturbation with one row for each requested class.

    Raises:
        InputError: wrong shape, dtype or device, fewer than 2 classes, NaN or infinity, a scale
            that is not positive, a class out of range.
    """
    operation = "minimal_perturbation"
    check_tensor(operation, "weight", weight)
    check_tensor(operation, "margins", margins)
    check_settings(settings, operation)
    check_same_device(operation, "margins", margins, "weight", weight)
    if scale is not None:
        check_tensor(operation, "scale", scale)
        check_same_device(operation, "scale", scale, "weight", weight)
    if classes is None:
        listed = None
    else:
        if isinstance(classes, Tensor) and classes.device.type == "meta":
            check_same_device(operation, "classes", classes, "weight", weight)
        try:
            listed = torch.as_tensor(classes, device=weight.device)
        except (TypeError, ValueError, RuntimeError) as error:
            raise InputError.of(
                operation,
                "classes",
                expected="class indices",
                got=repr(classes),
                way_out="pass a list of integers, or None for all classes",
            ) from error
        if listed.numel() == 0:
            listed = listed.long()
    values = _call(
        operation,
        torch.ops.tacext.minimal_perturbation.default,
        weight.detach(),
        margins.detach(),
        None if scale is None else scale.detach(),
        listed,
        settings.tolerance,
        settings.max_iterations,
        settings.closed_form,
    )
    if listed is None:
        listed = torch.arange(weight.shape[0], device=weight.device)
    return MinimalPerturbation(listed, *values)


def neuron_scores(activation: Tensor, gradient: Tensor) -> Tensor:
    """TAC-weighted scores: how strongly each channel's activation pushes the latent along s.

    With gradient = d<s, phi(x)> / d activation, the score of channel c is the mean over samples of
    sum_p activation[i, c, p] * gradient[i, c, p]: to first order, what zeroing the channel takes
    away from <s, phi(x)>. One pass, sums in float64, the same bits for any number of threads.

    Args:
        activation: [N, channels, ...], N >= 1, float64, float32, float16 or bfloat16.
        gradient: like `activation`, in shape, dtype and device.

    Returns:
        float64 [channels]. NaN or infinity in a channel shows as such in its score.

    Raises:
        InputError: shapes, dtypes or devices that differ, no samples, fewer than 2 dimensions.
    """
    check_tensor("neuron_scores", "activation", activation)
    check_tensor("neuron_scores", "gradient", gradient)
    check_same_device("neuron_scores", "gradient", gradient, "activation", activation)
    scores: Tensor = _call(
        "neuron_scores",
        torch.ops.tacext.neuron_scores.default,
        activation.detach(),
        gradient.detach(),
    )
    return scores


def has_guard_kernel(device: torch.device, ranks: int) -> bool:
    """Whether `guard_score` judges latents on a device along so many directions.

    It does so on the CPU, and in a build with the CUDA kernels on GPUs of the generations that these
    are compiled for.
    """
    if device.type == "cuda" and _core.has_cuda():
        newer = torch.cuda.get_device_capability(device) >= _OLDEST_GPU
        return newer and ranks <= _MOST_RANKS_ON_A_GPU
    return device.type == "cpu"


def guard_score(
    latent: Tensor,
    logits: Tensor,
    mean: Tensor,
    inverse_spread: Tensor,
    basis: Tensor,
    near_weight: Tensor,
    far_weight: Tensor,
    direction: Tensor,
    location: Tensor,
    inverse_deviation: Tensor,
    knots: Tensor,
    exceeding: Tensor,
    threshold: Tensor,
    samples: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """Judges latents as a `GuardScorer` with these buffers does, in one pass over them.

    Computed in float32 on the CPU, where the bits depend neither on the number of threads nor on what
    else is in the batch, and are those of the C++ and the C interface. On a GPU, in a build with the
    CUDA kernels, sums are made in double and the answers are the same up to rounding; nothing waits
    for the device.

    Args:
        latent: [N, D], float64, float32, float16 or bfloat16.
        logits: [N, C], likewise.
        mean: float32 [C, D]; this and the rest contiguous, on latent's device, as `GuardScorer` has them.
        inverse_spread: float32 [D].
        basis: float32 [R, D].
        near_weight: float32 [R + 1].
        far_weight: float32 [R + 1].
        direction: float32 [C, D].
        location: float32 [C, 4].
        inverse_deviation: float32 [C, 4].
        knots: float32 [K].
        exceeding: float32 [K + 1].
        threshold: float32 [].
        samples: int64 [], how many are behind the p-values; on a GPU it is not checked to be 1 or more.

    Returns:
        score and p_value, float32 [N], and flagged, bool [N].

    Raises:
        InputError: another shape, dtype or device.
    """
    table = {
        "mean": mean,
        "inverse_spread": inverse_spread,
        "basis": basis,
        "near_weight": near_weight,
        "far_weight": far_weight,
        "direction": direction,
        "location": location,
        "inverse_deviation": inverse_deviation,
        "knots": knots,
        "exceeding": exceeding,
        "threshold": threshold,
        "samples": samples,
    }
    check_tensor("guard_score", "latent", latent)
    for name, value in {"logits": logits, **table}.items():
        check_tensor("guard_score", name, value)
        check_same_device("guard_score", name, value, "latent", latent)
    found: tuple[Tensor, Tensor, Tensor] = _call(
        "guard_score",
        torch.ops.tacext.guard_score.default,
        latent.detach(),
        logits.detach(),
        *table.values(),
    )
    return found


# ---- CUDA, made of torch's own operators ---------------------------------------------------------


def _differences(logits: Tensor, k: int) -> Tensor:
    """logits[:, j] - logits[:, k] for all j, [C, N], with +0 for -0."""
    values = logits if logits.dtype == torch.float64 else logits.float()
    return (values - values[:, k : k + 1]).t() + 0.0


def _cuda_pairwise_margin_quantile(logits: Tensor, keep: int) -> Tensor:
    _check_composite("pairwise_margin_quantile", logits)
    rank = logits.shape[0] - keep + 1
    classes = range(logits.shape[1])
    return torch.stack([_differences(logits, k).kthvalue(rank, dim=1).values for k in classes])


def _cuda_pairwise_margin_largest_(largest: Tensor, logits: Tensor) -> None:
    _check_composite("pairwise_margin_largest", logits)
    for k in range(logits.shape[1]):
        both = torch.cat([largest[k], _differences(logits, k)], dim=1)
        largest[k] = both.topk(largest.shape[2], dim=1, sorted=False).values


torch.library.impl("tacext::pairwise_margin_quantile", "CUDA", _cuda_pairwise_margin_quantile)
torch.library.impl("tacext::pairwise_margin_largest_", "CUDA", _cuda_pairwise_margin_largest_)


def _check_composite(operation: str, logits: Tensor) -> None:
    if logits.dim() != 2 or logits.shape[0] == 0 or not logits.is_floating_point():
        raise InputError.of(
            operation,
            "logits",
            expected="floating-point [N, C] with at least 1 sample",
            got=f"{logits.dtype} {list(logits.shape)}",
            way_out="pass the logits of a batch",
        )


from . import fake_kernels  # noqa: F401 - which need the operators
