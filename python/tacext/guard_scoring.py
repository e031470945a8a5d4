"""How a guard judges an input: from its latent and its logits, in plain tensor operations.

The latent is compared with clean ones of the class that the model predicts, and the score joins
four numbers, each in units of what clean samples rarely exceed:

    near, far    the distance from the mean of the class, where the clean spread along a few, or
                 along many, principal directions is known and the rest is taken as even,
    aligned      how far along the class's minimal perturbation s_k the latent lies, by the linear
                 filter that tells a shift along s_k from clean spread best,
    margin       how far the predicted logit is ahead of the next.

A trigger that the last layer is sure of shows in the last two, one that the network never saw
elsewhere in the first two. A p-value is the rank of the score among those of clean samples.
"""

import math
from typing import TYPE_CHECKING, NamedTuple, cast

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from . import ops
from .errors import InputError, counted
from .single_precision import SinglePrecision

PARTS = ("near", "far", "aligned", "margin")


class GuardOutput(NamedTuple):
    """What a guard says of N inputs; a tuple, as exported and scripted models return no dataclass.

    Attributes:
        logits: [N, C], the model's own output, untouched.
        score: float32 [N], 0 where nothing is unusual; infinite where latent or logits are not
            finite.
        p_value: float32 [N], the share of clean inputs with a score at least as high, at least
            1 / (n + 1) for n calibration samples; never understated.
        flagged: bool [N], where the score is above the threshold.
    """

    logits: Tensor
    score: Tensor
    p_value: Tensor
    flagged: Tensor


# So that torch.export.save can name it; torch has no public way for named tuples yet.
pytree._register_namedtuple(GuardOutput, serialized_type_name="tacext.GuardOutput")


class LatentScorer(SinglePrecision):
    """Scores latents against clean ones of the class that they are taken for; knows no model.

    The buffers stay float32 whatever the module is converted to, and all is computed in float32.

    Attributes:
        mean: [C, D], mu_k, the mean clean latent of every predicted class.
        inverse_spread: [D], 1 / spread of the latents around the means.
        basis: [R, D], orthonormal principal directions of (phi - mu_k) / spread.
        near_weight, far_weight: [R + 1], what |y|^2 and the squares along the basis count for in
            the two squared distances; y = (phi - mu_k) / spread.
        direction: [C, D], the filter along s_k, applied to y.
        location, inverse_deviation: [C, 4], which make the four numbers comparable.
    """

    mean: Tensor
    inverse_spread: Tensor
    basis: Tensor
    near_weight: Tensor
    far_weight: Tensor
    direction: Tensor
    location: Tensor
    inverse_deviation: Tensor

    def __init__(
        self,
        mean: Tensor,
        inverse_spread: Tensor,
        basis: Tensor,
        near_weight: Tensor,
        far_weight: Tensor,
        direction: Tensor,
        location: Tensor,
        inverse_deviation: Tensor,
    ) -> None:
        super().__init__()
        self.register_buffer("mean", mean)
        self.register_buffer("inverse_spread", inverse_spread)
        self.register_buffer("basis", basis)
        self.register_buffer("near_weight", near_weight)
        self.register_buffer("far_weight", far_weight)
        self.register_buffer("direction", direction)
        self.register_buffer("location", location)
        self.register_buffer("inverse_deviation", inverse_deviation)

    def score(self, latent: Tensor, logits: Tensor) -> Tensor:
        """The score [N] of latents [N, D] with logits [N, C], in torch's own operators.

        Infinite where the latent or its logits are not finite.
        """
        parts, predicted = guard_parts(
            latent,
            logits,
            self.mean,
            self.inverse_spread,
            self.basis,
            self.near_weight,
            self.far_weight,
            self.direction,
        )
        score = join_parts(parts, self.location[predicted], self.inverse_deviation[predicted])
        # What is not a number is no clean input.
        finite = torch.isfinite(score) & torch.isfinite(logits).all(1)
        return torch.where(finite, score, torch.inf)


class GuardScorer(LatentScorer):
    """Scores, their ranks among those of clean samples, and what is flagged.

    Attributes:
        knots: [K], rising scores of clean samples.
        exceeding: [K + 1], how many of n clean samples score more than each knot, n first.
        threshold: [], the score above which inputs are flagged.
        samples: int64 [], n.
    """

    knots: Tensor
    exceeding: Tensor
    threshold: Tensor
    samples: Tensor

    def __init__(
        self,
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
    ) -> None:
        super().__init__(
            mean,
            inverse_spread,
            basis,
            near_weight,
            far_weight,
            direction,
            location,
            inverse_deviation,
        )
        self.register_buffer("knots", knots)
        self.register_buffer("exceeding", exceeding)
        self.register_buffer("threshold", threshold)
        self.register_buffer("samples", samples)

    if TYPE_CHECKING:  # nn.Module's takes and gives anything

        def __call__(self, latent: Tensor, logits: Tensor) -> GuardOutput: ...  # noqa: D102

    def forward(self, latent: Tensor, logits: Tensor) -> GuardOutput:
        """Scores latents [N, D] and the head's logits [N, C] of any floating dtype."""
        if (
            not torch.jit.is_scripting()  # type: ignore[attr-defined]
            and not torch.compiler.is_compiling()
            and self._is_native(latent)
        ):
            return GuardOutput(logits, *self._native(latent, logits))
        return self.plain(latent, logits)

    def plain(self, latent: Tensor, logits: Tensor) -> GuardOutput:
        """The same in torch's own operators, up to rounding: compiled or exported, or without a kernel."""
        latent, logits_in = latent.detach(), logits
        logits = logits.detach()
        score = self.score(latent, logits)
        below = (self.knots < score[:, None]).sum(1)
        p_value = (1 + self.exceeding[below]) / (1 + self.samples)
        return GuardOutput(logits_in, score, p_value, score > self.threshold)

    @torch.jit.unused
    def _is_native(self, latent: Tensor) -> bool:
        # Tensors that only stand for others, as a tracer's, take the plain way.
        traced = torch.jit.is_tracing()  # type: ignore[attr-defined, no-untyped-call]
        if type(latent) is not Tensor or traced:
            return False
        return ops.has_guard_kernel(latent.device, len(self.basis))

    @torch.jit.unused
    def _native(self, latent: Tensor, logits: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return ops.guard_score(latent, logits, **cast(dict[str, Tensor], self._buffers))


def guard_parts(
    latent: Tensor,
    logits: Tensor,
    mean: Tensor,
    inverse_spread: Tensor,
    basis: Tensor,
    near_weight: Tensor,
    far_weight: Tensor,
    direction: Tensor,
) -> tuple[Tensor, Tensor]:
    """The four numbers [N, 4] of each latent, and the predicted classes [N]; see `GuardScorer`."""
    z = logits.to(torch.float32)
    predicted = z.argmax(1)
    others = z.scatter(1, predicted[:, None], -math.inf)
    margin = z.gather(1, predicted[:, None])[:, 0] - others.amax(1)
    y = (latent.to(torch.float32) - mean[predicted]) * inverse_spread
    # In double: |y|^2 less these squares nearly cancels, and autocast and TF32 would round them.
    along = torch.matmul(y.double(), basis.t().double()).float()
    squares = torch.cat([(y * y).sum(1, keepdim=True), along * along], 1)
    # Rounding may leave a little less than nothing of |y|^2 beside the basis.
    near = (squares * near_weight).sum(1).clamp(min=0).sqrt()
    far = (squares * far_weight).sum(1).clamp(min=0).sqrt()
    aligned = (y * direction[predicted]).sum(1)
    return torch.stack([near, far, aligned, margin], 1), predicted


def join_parts(parts: Tensor, location: Tensor, inverse_deviation: Tensor) -> Tensor:
    """The score [N]: the length of what each part exceeds the usual by, in units of its own."""
    excess = ((parts - location) * inverse_deviation).clamp(min=0)
    return (excess * excess).sum(1).sqrt()


def calibration_table(scores: Tensor, exact: int) -> tuple[Tensor, Tensor]:
    """Knots [K] and how many scores lie above each, all of them first: [K + 1].

    All scores are knots where there are at most twice `exact`; of more the `exact` highest are, and
    as many of the rest, evenly spaced. Between knots a p-value is rounded up.
    """
    ordered = scores.sort().values
    count = len(ordered)
    if count > 2 * exact:
        lower = torch.linspace(0, count - exact - 1, exact, dtype=torch.float64).long()
        ordered_knots = torch.cat([ordered[lower], ordered[count - exact :]])
    else:
        ordered_knots = ordered
    above = count - torch.searchsorted(ordered, ordered_knots, right=True)
    exceeding = torch.cat([torch.tensor([count]), above])
    return ordered_knots.float(), exceeding.float()


def threshold_at(
    knots: Tensor, exceeding: Tensor, samples: int, rate: float, operation: str
) -> Tensor:
    """The lowest knot beyond which a p-value is at most `rate`.

    Raises:
        InputError: so few samples that none is.
    """
    p_values = (1 + exceeding.double()) / (1 + samples)
    enough = (p_values <= rate * (1 + 1e-12)).nonzero().flatten()
    if not len(enough) or int(enough[0]) == 0:
        raise InputError.of(
            operation,
            "false_positive_rate",
            expected=f"{1 / (samples + 1):.4g} or more, as there are {counted(samples, 'sample')}",
            got=f"{rate:g}",
            way_out=f"fit a guard on {math.ceil(1 / rate) - 1} samples or more, or allow more false alarms",
        )
    return knots[int(enough[0]) - 1].clone()
