"""What one pass over clean data leaves behind: margins, and the spread of every latent."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .errors import InputError

# A latent that hardly varies is measured in tenths of the usual spread, not in its own.
SCALE_FLOOR = 0.1
# Of the balanced metric; of .01 to .3 the largest is best on the bench, with the fewest false alarms.
BALANCED_FLOOR = 0.3
# Below this share of its column's entries a difference between classes is rounding.
_ROUNDING = 1e-9


@dataclass
class LatentMoments:
    """Mean and variance of every latent, in float64, merged batch by batch.

    The parallel update of Chan, Golub and LeVeque (1983): no pass over stored data, and no
    cancellation where a latent's mean is large beside its spread.
    """

    count: int
    mean: Tensor
    squares: Tensor

    @classmethod
    def empty(cls, latent_dim: int) -> LatentMoments:
        """No samples yet."""
        zeros = torch.zeros(latent_dim, dtype=torch.float64)
        return cls(0, zeros, zeros.clone())

    def update(self, latent: Tensor) -> None:
        """Adds a batch [N, D]."""
        batch = latent.detach().to("cpu", torch.float64)
        if not len(batch):
            return
        mean = batch.mean(0)
        squares = (batch - mean).square().sum(0)
        total = self.count + len(batch)
        shift = mean - self.mean
        self.mean = self.mean + shift * (len(batch) / total)
        self.squares = self.squares + squares + shift.square() * (self.count * len(batch) / total)
        self.count = total

    @property
    def std(self) -> Tensor:
        """Standard deviation of every latent, float64 [D]."""
        return (self.squares / max(1, self.count - 1)).sqrt()

    def standardized_scale(self, operation: str) -> Tensor:
        """The scale of the standardized metric, float64 [D]: 1 / std, the std floored.

        Raises:
            InputError: the latents do not vary at all.
        """
        std = self.std
        root_mean_square = std.square().mean().sqrt()
        if not bool(root_mean_square > 0):
            raise InputError.of(
                operation,
                "data",
                expected="samples whose latents differ",
                got="one and the same latent for all",
                way_out="pass more and varied samples, or metric='l2'",
            )
        return 1 / torch.maximum(std, SCALE_FLOOR * root_mean_square)

    def balanced(self, weight: Tensor) -> tuple[Tensor, Tensor] | None:
        """What norms are solved from that no rescaling of latents changes; None where latents do not vary.

        A latent times a, its column of the head divided by a, is the same model, but other norms:
        1 / std a cheaper latent, or a dearer one, as whoever makes the model likes. Here each is
        scaled to a column of length 1 first, and then measured in units of 1 / its spread.

        Args:
            weight: W, [C, D].

        Returns:
            W without what all classes share, float64 [C, D], and the scale of s, float64 [D].
        """
        weight = weight.detach().to("cpu", torch.float64)
        centred = weight - weight.mean(0)
        length = centred.norm(dim=0)
        tells = length > _ROUNDING * weight.abs().amax(0)
        spread = torch.where(tells, length * self.std, 0.0)
        root_mean_square = spread.square().mean().sqrt()
        if not bool(root_mean_square > 0):
            return None
        length = torch.where(tells, length, 1.0)
        spread = torch.maximum(spread, BALANCED_FLOOR * root_mean_square)
        return torch.where(tells, centred, 0.0), 1 / (length * spread)
