"""A guard beside the model: in production, is this input a trigger?"""

from __future__ import annotations

import copy
import logging
from dataclasses import replace
from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor, nn

from . import ops
from .copies import different_rows
from .data import DataLike, check_seed
from .errors import InputError, counted, listed
from .files import StrPath
from .guard_file import GuardInfo, read_guard, write_guard
from .guard_fit import fit_scorer
from .guard_scoring import GuardOutput, GuardScorer, threshold_at
from .heads import check_model, model_dtype
from .identity import lengths_of, same_lengths
from .latent_tap import TappedModel, unwrapped
from .memory_layout import placed
from .observation import observe, solve
from .sample_keeper import SampleKeeper
from .tensor_checks import check_same_device, check_tensor

__all__ = ["Guard", "GuardInfo", "GuardOutput", "GuardScorer"]

logger = logging.getLogger(__name__)

# Of more clean samples so many are chosen; ranks beyond say nothing more.
MOST_SAMPLES, MOST_BYTES = 10_000, 128 << 20


class Guard(nn.Module):
    """Runs a model and says of every input whether it looks like one with a trigger.

    It knows neither trigger nor target. `guard(inputs)` costs one pass of the model and some 40
    products of the length of a latent; the model's own output is untouched. It is an nn.Module: move
    it, compile it, export it; what can be scripted is `scorer`. It is always in evaluation mode. Its
    copy of the model has modules of its own and shares the memory of the parameters; moving or
    converting the guard leaves the model given where it is. The guard's own numbers stay float32.

    Attributes:
        model: the model, with its latents handed out.
        scorer: what judges latents and logits, without the model.
        info: what it was fitted on.
    """

    def __init__(self, model: TappedModel, scorer: GuardScorer, info: GuardInfo) -> None:
        super().__init__()
        self.model = model
        self.scorer = scorer
        self.info = info
        self.eval()

    if TYPE_CHECKING:  # nn.Module's takes and gives anything

        def __call__(self, inputs: Tensor) -> GuardOutput: ...  # noqa: D102

    def extra_repr(self) -> str:
        """What it was fitted on, for print."""
        return f"{self.info.samples} samples, false_positive_rate={self.info.false_positive_rate:g}"

    def train(self, mode: bool = True) -> Guard:
        """Stays in evaluation mode: batch norm would mix the samples."""
        del mode
        return super().train(False)

    @classmethod
    @torch.inference_mode(False)
    def fit(
        cls,
        model: nn.Module,
        data: DataLike | Tensor,
        false_positive_rate: float = 0.01,
        *,
        head: str | None = None,
        batch_size: int = 256,
        seed: int = 0,
        progress: bool | None = None,
    ) -> Guard:
        """Learns from clean samples what is usual for the model.

        Args:
            model: the classifier, as for `scan`; left as it is.
            data: clean samples with labels, as for `scan`, like those that production will see, and
                new to the model; or the inputs alone, as one tensor. Of equal latents one is used.
                Labels only serve to warn where the model is wrong on most of the samples.
            false_positive_rate: the share of clean inputs that may be flagged, 0 < rate < 1, on
                average over all of them and over guards fitted on samples like these. Of one guard
                the share differs from it by chance, less with more samples; inputs of rare classes
                are flagged more often than others.
            head: the name of the last linear layer, where the model is too unusual to tell.
            batch_size: of the passes.
            seed: which samples judge which.
            progress: whether to show a progress bar; None shows it on a terminal.

        Raises:
            InputError: a rate that so few samples cannot promise, and all that `scan` raises of model
                and data.
        """
        operation = "Guard.fit"
        check_model(model, operation)
        rate = _check_rate(false_positive_rate, operation)
        check_seed(operation, seed)
        model = unwrapped(model)
        latents = SampleKeeper(seed, MOST_SAMPLES, MOST_BYTES)
        examples = SampleKeeper(seed, 4)
        observation = observe(
            model,
            labelled(data),
            head=head,
            batch_size=batch_size,
            progress=progress,
            operation=operation,
            keeper=examples,
            latent_keeper=latents,
        )
        perturbations, _ = solve(observation, "standardized", operation=operation)
        dim, classes = observation.head.latent_dim, observation.head.num_classes
        rows = latents.samples()[0]
        different = different_rows(rows)
        if len(different) < len(rows):
            again = counted(len(rows) - len(different), "sample")
            logger.warning("Guard.fit: %s came more than once and count only once", again)
        latent, logits = rows[different].split([dim, classes], 1)
        scorer = fit_scorer(
            latent, logits, perturbations.perturbation.cpu(), rate, seed, operation
        ).to(observation.head.weight.device)
        counts = torch.bincount(logits.argmax(1), minlength=classes)
        example = placed(examples.samples()[0], torch.contiguous_format)
        tapped = TappedModel.of(model, observation.head, example, operation)
        info = GuardInfo(
            samples=len(latent),
            false_positive_rate=rate,
            head=observation.head.name,
            ends_in_head=tapped.ends_in_head,
            class_counts=tuple(counts.tolist()),
            head_norms=tuple(observation.head.weight.detach().float().norm(dim=1).tolist()),
            model_norms=lengths_of(model),
            created_with=ops.build_info().version,
        )
        accuracy = observation.correct / observation.samples
        if not isinstance(data, Tensor) and accuracy < 0.5:
            logger.warning(
                "Guard.fit: the model is right on %.0f %% of the samples alone; check their "
                "normalisation and labels",
                100 * accuracy,
            )
        if unseen := info.unseen_classes:
            logger.warning(
                "Guard.fit: no sample was taken for %s (%s); inputs taken for them will mostly be "
                "flagged; pass samples of them",
                counted(len(unseen), "class", "classes"),
                listed(unseen),
            )
        return cls(tapped, scorer, info)

    def forward(self, inputs: Tensor) -> GuardOutput:
        """Runs the model on inputs as it takes them, and judges them.

        Inputs whose latents are not finite are flagged: one of them must not stop the batch. So are
        inputs for which the model's output names another class than its head does.

        Args:
            inputs: [N, ...], N >= 1.

        Raises:
            InputError: no tensor or an empty batch, or uint8 where the model does not take that; not
                asked in a compiled or exported pass.
        """
        if torch.compiler.is_compiling():
            return self._judged(inputs)
        _check_batch(inputs)
        try:
            return self._judged(inputs)
        except RuntimeError as error:
            if inputs.dtype != torch.uint8:
                raise
            raise InputError.of(
                "Guard",
                "inputs",
                expected="inputs as the model takes them",
                got="uint8",
                way_out="pass floats, such as images.float() / 255",
            ) from error

    def _judged(self, inputs: Tensor) -> GuardOutput:
        output, latent, logits = self.model(inputs)
        if not self.model.ends_in_head:
            # What overrides the head is nothing that clean samples did.
            agrees = _same_class(output, logits)
            logits = torch.where(agrees[:, None], logits, torch.nan)
        judged = self.scorer(latent, logits)
        return GuardOutput(output, judged.score, judged.p_value, judged.flagged)

    def check(self, latent: Tensor, logits: Tensor | None = None) -> GuardOutput:
        """Judges latents that the caller has already.

        Args:
            latent: [N, D], what flows into the head, of any floating dtype.
            logits: [N, C], what the head makes of them; None computes that.

        Raises:
            InputError: no tensor, no sample, another size or device, NaN or infinity.
        """
        operation = "Guard.check"
        _check_rows(operation, "latent", latent, self.scorer.mean.shape[1], self.scorer.mean)
        if logits is None:
            head = self.model.head
            weight = head.weight.flatten(1)
            logits = nn.functional.linear(latent.to(weight.dtype), weight, head.bias)
        _check_rows(operation, "logits", logits, self.scorer.mean.shape[0], self.scorer.mean)
        if len(logits) != len(latent):
            raise InputError.of(
                operation,
                "logits",
                expected=f"{len(latent)} rows, as many as latents",
                got=f"{len(logits)}",
                way_out="pass the logits of the same batch",
            )
        judged: GuardOutput = self.scorer(latent, logits.detach())
        return judged

    def at_rate(self, false_positive_rate: float) -> Guard:
        """The same guard with another threshold; model and calibration are shared.

        Raises:
            InputError: a rate that the calibration samples cannot promise.
        """
        operation = "Guard.at_rate"
        rate = _check_rate(false_positive_rate, operation)
        scorer = copy.copy(self.scorer)
        scorer._buffers = dict(self.scorer._buffers)
        known = self.scorer.knots.cpu(), self.scorer.exceeding.cpu()
        threshold = threshold_at(*known, self.info.samples, rate, operation)
        scorer._buffers["threshold"] = threshold.to(self.scorer.knots.device)
        info = replace(self.info, false_positive_rate=rate)
        return Guard(self.model, scorer, info)

    def save(self, path: StrPath) -> None:
        """Writes the guard, without the model, to one safetensors file, whole or not at all.

        Raises:
            InputError: another ending than .safetensors.
            FileError: the folder is missing or not writable, or the disk is full.
        """
        write_guard(self.scorer, self.info, path)

    @classmethod
    def load(cls, path: StrPath, model: nn.Module) -> Guard:
        """Reads a guard, and puts it beside the model that it was fitted on.

        Args:
            path: a file that `save` wrote.
            model: with the same weights, on any device, perhaps in half precision, or behind
                DataParallel; on several devices only if its output is that of the head itself.

        Raises:
            FileError: a file that is missing, damaged, or none of a guard.
            InputError: another model, or one on several devices whose head is looked at within.
        """
        operation = "Guard.load"
        check_model(model, operation)
        scorer, info = read_guard(path, operation)
        model = unwrapped(model)
        name = _head_here(model, info, scorer.mean.shape)
        if name is None or not same_lengths(
            lengths_of(model), info.model_norms, model_dtype(model)
        ):
            raise InputError.of(
                operation,
                "model",
                expected=f"the model that the guard in {path} was fitted on, with the head {info.head!r}",
                got=f"a {type(model).__name__} with other weights or another normalisation",
                way_out="load that model, with the same normalisation around it, or fit a guard for this",
            )
        if (
            isinstance(model, nn.DataParallel)
            and len(model.device_ids) > 1
            and not info.ends_in_head
        ):
            raise InputError.of(
                operation,
                "model",
                expected="one that runs on one device, as its head is looked at within",
                got=f"DataParallel on {len(model.device_ids)} devices",
                way_out="pass model.module",
            )
        tapped = TappedModel(model, name, info.ends_in_head)
        return cls(tapped, scorer.to(tapped.head.weight.device), replace(info, head=name))


def _head_here(model: nn.Module, info: GuardInfo, shape: torch.Size) -> str | None:
    """The head's name in this model, where one of the two stands behind DataParallel."""
    modules = dict(model.named_modules(remove_duplicate=False))
    for name in (info.head, f"module.{info.head}", info.head.removeprefix("module.")):
        module = modules.get(name)
        if isinstance(module, nn.Linear | nn.Conv2d) and module.weight.flatten(1).shape == shape:
            norms = module.weight.detach().flatten(1).float().norm(dim=1).tolist()
            # These were added up in float32, in an order that depends on the device.
            if same_lengths(norms, info.head_norms, module.weight.dtype, tolerance=1e-4):
                return name
    return None


def labelled(data: DataLike | Tensor) -> DataLike:
    """The data, inputs alone with a label that nobody reads."""
    if isinstance(data, Tensor) and data.dim():
        return data, torch.zeros(len(data), dtype=torch.int64)
    return cast(DataLike, data)


def _check_batch(inputs: object) -> None:
    if isinstance(inputs, Tensor) and inputs.dim() and len(inputs):
        return
    raise InputError.of(
        "Guard",
        "inputs",
        expected="a tensor [N, ...] with at least one sample",
        got=f"shape {list(inputs.shape)}" if isinstance(inputs, Tensor) else type(inputs).__name__,
        way_out="skip empty batches",
    )


def _same_class(output: Tensor, logits: Tensor) -> Tensor:
    """Whether the output is highest, ties and rounding aside, where the logits are: bool [N]."""
    output = output.detach().float()
    best, worst = output.amax(1), output.amin(1)
    behind = best - output.gather(1, logits.detach().argmax(1)[:, None])[:, 0]
    return behind <= 1e-2 * (best - worst)


def _check_rate(rate: object, operation: str) -> float:
    if isinstance(rate, bool) or not isinstance(rate, int | float) or not 0 < rate < 1:
        raise InputError.of(
            operation,
            "false_positive_rate",
            expected="a number between 0 and 1",
            got=repr(rate),
            way_out="use 0.01 for one false alarm in a hundred inputs",
        )
    return float(rate)


def _check_rows(operation: str, argument: str, value: object, width: int, like: Tensor) -> None:
    check_tensor(operation, argument, value)
    assert isinstance(value, Tensor)
    if value.dim() != 2 or value.shape[1] != width or not len(value):
        raise InputError.of(
            operation,
            argument,
            expected=f"[N, {width}] with N >= 1",
            got=str(list(value.shape)),
            way_out="pass what flows into, or out of, the head of the model that was guarded",
        )
    if not value.is_floating_point():
        raise InputError.of(
            operation,
            argument,
            expected="a floating dtype",
            got=str(value.dtype),
            way_out="pass it as the model computes it",
        )
    check_same_device(operation, argument, value, "the guard", like)
    bad = (~torch.isfinite(value)).any(1).nonzero()
    if len(bad):
        raise InputError.of(
            operation,
            argument,
            expected="finite numbers",
            got=f"NaN or infinity in row {int(bad[0])}",
            way_out="reject that input",
        )
