"""Pairwise margins of a stream of batches: the largest, or a quantile, mergeable over shards."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from . import ops
from .errors import InputError
from .tensor_checks import check_tensor

# Logits gathered before they are folded into M: large batches are what the operator is fast at.
_BUFFERED_VALUES = 4 * 2**20
_DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


@dataclass(frozen=True)
class _Kind:
    """What all batches of one model have in common."""

    dtype: torch.dtype
    device: torch.device
    classes: int

    def __str__(self) -> str:
        return f"{self.dtype} [N, {self.classes}] on {self.device}"


class _Accumulator:
    """The kind of the first batch, which all others and all shards must share."""

    def __init__(self) -> None:
        self._kind: _Kind | None = None
        self._batches = 0

    def _checked(self, logits: Tensor, operation: str) -> Tensor:
        check_tensor(operation, "logits", logits)
        if logits.dim() != 2 or logits.dtype not in _DTYPES:
            raise InputError.of(
                operation,
                "logits",
                expected="[N, C] of float64, float32, float16 or bfloat16",
                got=f"{logits.dtype} {list(logits.shape)}",
                way_out="pass the logits of a batch",
            )
        kind = _Kind(logits.dtype, logits.device, logits.shape[1])
        self._check_kind(kind, operation, "logits", f"{logits.dtype} {list(logits.shape)}")
        batch = logits.detach()
        if not bool(torch.isfinite(batch).all()):
            row, column = (~torch.isfinite(batch)).nonzero()[0].tolist()
            raise InputError.of(
                operation,
                "logits",
                expected="finite values",
                got=f"NaN or infinity at [{row}, {column}] of batch {self._batches}",
                way_out="check the model and its inputs",
            )
        if len(batch):
            self._kind = kind
        self._batches += 1
        return batch

    def _check_kind(
        self, kind: _Kind | None, operation: str, argument: str, got: str | None = None
    ) -> None:
        if kind is not None and self._kind is not None and kind != self._kind:
            raise InputError.of(
                operation,
                argument,
                expected=f"{self._kind}, as at first",
                got=str(kind) if got is None else f"{got} on {kind.device}",
                way_out="pass the logits of one model, all of one dtype, on one device",
            )

    def _check_shard(self, other: object, operation: str) -> None:
        if not isinstance(other, type(self)):
            raise InputError.of(
                operation,
                "other",
                expected=f"a {type(self).__name__}",
                got=type(other).__name__,
                way_out="merge what the shards accumulated, not their results",
            )
        self._check_kind(other._kind, operation, "other")


class MarginMax(_Accumulator):
    """M[k, j] = max_i (logits[i, j] - logits[i, k]) of all batches so far.

    Memory: M, and up to 16 MiB (float32) of logits that wait for their turn.
    """

    def __init__(self) -> None:
        super().__init__()
        self._margins: Tensor | None = None
        self._waiting: list[Tensor] = []
        self._values = 0

    def update(self, logits: Tensor) -> None:
        """Adds a batch [N, C], of which nothing may change until it is folded in; N may be 0.

        Raises:
            InputError: no tensor, not finite, or not of the classes, dtype and device of the first
                batch.
        """
        batch = self._checked(logits, "MarginMax.update")
        if not len(batch):
            return
        self._waiting.append(batch)
        self._values += batch.numel()
        if self._values >= _BUFFERED_VALUES:
            self._fold()

    def merge(self, other: MarginMax) -> None:
        """Adds all that another shard has seen, which may be nothing.

        Raises:
            InputError: no MarginMax, or one of other classes, another dtype or device.
        """
        self._check_shard(other, "MarginMax.merge")
        other._fold()
        self._fold()
        if other._margins is None:
            return
        theirs = other._margins.clone()
        self._kind = other._kind
        self._margins = theirs if self._margins is None else torch.maximum(self._margins, theirs)

    def result(self) -> Tensor:
        """M, [C, C]; what `ops.pairwise_margin_max` gives for all batches at once.

        Raises:
            InputError: there was no batch.
        """
        self._fold()
        if self._margins is None:
            raise _no_samples("MarginMax.result")
        return self._margins.clone()

    def _fold(self) -> None:
        if not self._waiting:
            return
        logits = _joined(self._waiting)
        self._waiting, self._values = [], 0
        self._margins = ops.pairwise_margin_max(logits, out=self._margins)


class MarginQuantile(_Accumulator):
    """M[k, j] = the quantile over all samples i so far of logits[i, j] - logits[i, k].

    The quantile is a difference that occurs, the smallest with at least that share of the samples
    at or below it; 1 is the maximum. Exact, in whichever is smaller: the logits themselves, N x C,
    or, for few classes, the largest differences of every pair, as many as the quantile can need.

    Args:
        quantile: above 0 and at most 1.
        max_samples: no more samples than these will come; None keeps the logits.

    Raises:
        InputError: a quantile or max_samples out of range.
    """

    def __init__(self, quantile: float = 0.99, max_samples: int | None = None) -> None:
        super().__init__()
        ops.check_quantile(quantile, "MarginQuantile")
        if max_samples is not None and not (ops.is_number(max_samples) and max_samples >= 1):
            raise InputError.of(
                "MarginQuantile",
                "max_samples",
                expected="at least 1, or None",
                got=repr(max_samples),
                way_out="pass the number of clean samples, or leave it out",
            )
        self.quantile = quantile
        self.max_samples = max_samples
        self.samples = 0
        self._logits: list[Tensor] = []
        self._largest: Tensor | None = None

    def update(self, logits: Tensor) -> None:
        """Adds a batch [N, C], which may be kept as it is; N may be 0.

        Raises:
            InputError: no tensor, not finite, or not of the classes, dtype and device of the first
                batch; more samples than max_samples.
        """
        operation = "MarginQuantile.update"
        batch = self._checked(logits, operation)
        self._check_room(len(batch), operation)
        if not len(batch):
            return
        if self._largest is None and not self._logits:
            self._choose(batch)
        if self._largest is None:
            self._logits.append(batch)
        else:
            ops.pairwise_margin_largest(batch, out=self._largest)
        self.samples += len(batch)

    def merge(self, other: MarginQuantile) -> None:
        """Adds all that another shard has seen, which may be nothing.

        Raises:
            InputError: no MarginQuantile, or one of another quantile, max_samples, other classes,
                another dtype or device; more samples together than max_samples.
        """
        operation = "MarginQuantile.merge"
        self._check_shard(other, operation)
        if (other.quantile, other.max_samples) != (self.quantile, self.max_samples):
            raise InputError.of(
                operation,
                "other",
                expected=f"quantile {self.quantile} and max_samples {self.max_samples}",
                got=f"{other.quantile} and {other.max_samples}",
                way_out="make all shards with the same settings",
            )
        self._check_room(other.samples, operation)
        if other._largest is not None:
            if self._largest is None:
                self._largest = other._largest.clone()
            else:
                both = torch.cat([self._largest, other._largest], dim=2)
                self._largest = both.topk(self._largest.shape[2], dim=2, sorted=False).values
        self._kind = self._kind or other._kind
        self._logits += other._logits
        self.samples += other.samples

    def result(self) -> Tensor:
        """M, [C, C]; what `ops.pairwise_margin_quantile` gives for all batches at once.

        Raises:
            InputError: there was no sample.
        """
        operation = "MarginQuantile.result"
        if self.samples == 0:
            raise _no_samples(operation)
        if self._largest is None:
            return ops.pairwise_margin_quantile(_joined(self._logits), self.quantile)
        keep = ops.differences_above(self.samples, self.quantile)
        return self._largest.topk(keep, dim=2).values[:, :, -1].clone()

    def _choose(self, batch: Tensor) -> None:
        if self.max_samples is None:
            return
        classes = batch.shape[1]
        keep = ops.differences_above(self.max_samples, self.quantile)
        if classes * keep < self.max_samples:
            dtype = torch.float64 if batch.dtype == torch.float64 else torch.float32
            self._largest = batch.new_full((classes, classes, keep), -torch.inf, dtype=dtype)

    def _check_room(self, more: int, operation: str) -> None:
        if self.max_samples is not None and self.samples + more > self.max_samples:
            raise InputError.of(
                operation,
                "logits",
                expected=f"at most {self.max_samples} samples in all, as max_samples says",
                got=f"{self.samples + more}",
                way_out="make the MarginQuantile with a larger max_samples, or None",
            )


def _joined(batches: list[Tensor]) -> Tensor:
    return batches[0] if len(batches) == 1 else torch.cat(batches)


def _no_samples(operation: str) -> InputError:
    return InputError.of(
        operation,
        "logits",
        expected="at least 1 sample",
        got="none",
        way_out="pass a batch to update first",
    )
