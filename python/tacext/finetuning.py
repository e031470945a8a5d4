"""Fine-tuning that unlearns a backdoor and keeps what the model knew.

Three losses pull on the same copy. Clean samples hold it where it was: their true classes, and the
original model's own answers (distillation). Shifted latents, phi(x) + s_t, and images that carry what
an `InputAdversary` finds, are taught that they do not lead to the target any more.
"""

from __future__ import annotations

import contextlib
import logging
import math
from collections.abc import Iterator
from dataclasses import astuple, dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.modules.batchnorm import _BatchNorm

from . import ops
from .errors import InputError
from .finetune_checkpoint import FinetuneCheckpoint, FinetuneState
from .heads import Head, evaluating, model_device, recording_latents
from .heads import run_model as run
from .input_adversary import InputAdversary, divergence
from .margins import MarginMax, MarginQuantile
from .ops import Status
from .progress import progress_bar
from .repair_settings import RepairSettings, check_settings, is_number, is_whole

logger = logging.getLogger(__name__)

# Gradients are cut to this length: where two losses pull apart they are long and say little.
LONGEST_GRADIENT = 1.0

_EPOCHS = 6
_FEWEST_STEPS = 100


@dataclass(frozen=True, kw_only=True)
class FinetuneSettings(RepairSettings):
    """Settings of `repair(..., method="finetune")`.

    Attributes:
        epochs: passes over the training part of the clean data; None takes six, or as many as make
            a hundred steps of few samples.
        learning_rate: peak of a cosine schedule with a short linear warm-up.
        beta: weight of the loss on shifted latents.
        gamma: weight of the loss on images that the suspects' changes and patches are on; 0 does
            without gradients of the inputs. With beta and gamma of 0 it is plain fine-tuning.
        distillation: weight of the divergence from the original model's answers on clean samples.
        optimizer: "adamw", or "sgd" with momentum .9.
        weight_decay: of the optimiser.
        frozen_statistics: whether batch norm keeps the means and variances that it has; those of a
            few hundred samples are worse.
        solve_again: whether s_t follows the model, solved anew after every epoch.
    """

    epochs: int | None = None
    learning_rate: float = 5e-4
    beta: float = 0.1
    gamma: float = 1.0
    distillation: float = 1.0
    optimizer: Literal["adamw", "sgd"] = "adamw"
    weight_decay: float = 0.01
    frozen_statistics: bool = True
    solve_again: bool = True

    @classmethod
    def of_the_paper(cls) -> FinetuneSettings:
        """The removal step of arXiv 2511.08944 as published: shifted latents alone."""
        return cls(
            epochs=10,
            learning_rate=0.05,
            beta=1.0,
            gamma=0.0,
            distillation=0.0,
            optimizer="sgd",
            weight_decay=5e-4,
            frozen_statistics=False,
            solve_again=False,
        )

    def __post_init__(self) -> None:
        def not_negative(name: str) -> tuple[str, bool, str]:
            value = getattr(self, name)
            return name, is_number(value) and value >= 0, "0 or more"

        check_settings(
            self,
            (
                (
                    "epochs",
                    self.epochs is None or (is_whole(self.epochs) and self.epochs >= 1),
                    "a whole number, at least 1, or None",
                ),
                (
                    "learning_rate",
                    is_number(self.learning_rate) and self.learning_rate > 0,
                    "above 0",
                ),
                not_negative("beta"),
                not_negative("gamma"),
                not_negative("distillation"),
                ("optimizer", self.optimizer in ("adamw", "sgd"), "'adamw' or 'sgd'"),
                not_negative("weight_decay"),
                (
                    "frozen_statistics",
                    isinstance(self.frozen_statistics, bool),
                    "True or False",
                ),
                ("solve_again", isinstance(self.solve_again, bool), "True or False"),
            ),
        )


@dataclass(frozen=True)
class EpochLosses:
    """Mean losses of one epoch, each before its weight.

    Attributes:
        clean: cross-entropy on clean samples.
        distilled: divergence from the original model's answers on them.
        shifted: of latents shifted by s_t.
        attacked: of images with changes and patches; NaN without.
    """

    clean: float
    distilled: float
    shifted: float
    attacked: float


def batches(samples: int, settings: FinetuneSettings, epoch: int) -> Iterator[Tensor]:
    """Indices of each batch of an epoch, in an order that the seed gives."""
    generator = torch.Generator().manual_seed(settings.seed * 1_000_003 + epoch)
    found = list(torch.randperm(samples, generator=generator).split(settings.batch_size))
    if len(found) > 1 and len(found[-1]) < 2:  # batch norm cannot train on one sample
        found.pop()
    yield from found


def epochs_of(samples: int, settings: FinetuneSettings) -> int:
    """How many there are for so many training samples."""
    if settings.epochs is not None:
        return settings.epochs
    steps = sum(1 for _ in batches(samples, settings, 0))
    return max(_EPOCHS, -(-_FEWEST_STEPS // steps))


def _learning_rate(step: int, steps: int, settings: FinetuneSettings) -> float:
    warm_up = max(1, steps // 20)
    if step < warm_up:
        return settings.learning_rate * (step + 1) / warm_up
    left = math.pi * (step - warm_up) / (steps - warm_up)
    return settings.learning_rate * 0.5 * (1 + math.cos(left))


def _optimizer(model: nn.Module, settings: FinetuneSettings) -> torch.optim.Optimizer:
    rate, decay = settings.learning_rate, settings.weight_decay
    if settings.optimizer == "sgd":
        return torch.optim.SGD(model.parameters(), rate, momentum=0.9, weight_decay=decay)
    return torch.optim.AdamW(model.parameters(), rate, weight_decay=decay)


def _memory(optimizer: torch.optim.Optimizer) -> dict[int, dict[str, Tensor]]:
    """What the optimiser remembers, by the number of the parameter."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    return {
        i: {k: torch.as_tensor(v) for k, v in optimizer.state[p].items() if v is not None}
        for i, p in enumerate(parameters)
        if optimizer.state.get(p)
    }


def _resume(
    state: FinetuneState,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    shifts: _Shifts,
    attacks: InputAdversary | None,
) -> None:
    """Puts all back to where a checkpoint was written.

    Raises:
        ValueError: the state is not that of these.
    """
    model.load_state_dict(state.model)
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    for i, values in state.optimizer.items():
        parameter = parameters[i]
        for name, value in values.items():
            if value.shape not in (parameter.shape, ()):
                raise ValueError(f"optimizer.{i}.{name}: {list(value.shape)}")
        optimizer.state[parameter] = {
            k: v if k == "step" else v.to(parameter) for k, v in values.items()
        }
    if state.shifts.shape != shifts.now.shape:
        raise ValueError(f"shifts: {list(state.shifts.shape)}")
    shifts.now = state.shifts
    if attacks is not None:
        attacks.load_state(state.adversary)


def train_mode(model: nn.Module, frozen_statistics: bool) -> None:
    """Training mode, in which batch norm may keep the statistics that it has."""
    model.train()
    if frozen_statistics:
        for module in model.modules():
            if isinstance(module, _BatchNorm):
                module.eval()


@contextlib.contextmanager
def _frozen_statistics(model: nn.Module) -> Iterator[None]:
    training = [m for m in model.modules() if isinstance(m, _BatchNorm) and m.training]
    for module in training:
        module.eval()
    try:
        yield
    finally:
        for module in training:
            module.train()


def diverged(got: str) -> InputError:
    """The error of a training that ran away."""
    return InputError.of(
        "repair",
        "settings",
        expected="a learning_rate at which the loss falls",
        got=got,
        way_out="lower the learning_rate",
    )


class _Shifts:
    """s_t of every target, solved again after each epoch, as the model moves away from them."""

    def __init__(
        self, shifts: Tensor, targets: tuple[int, ...], head: Head, quantile: float
    ) -> None:
        self._shifts, self._targets, self._head, self._quantile = shifts, targets, head, quantile
        self._length = shifts.norm(dim=1, keepdim=True)
        self._margins = self._no_margins()

    def _no_margins(self) -> MarginMax | MarginQuantile:
        return MarginMax() if self._quantile == 1 else MarginQuantile(self._quantile)

    def loss(self, latent: Tensor, labels: Tensor) -> Tensor:
        """CE(W (phi(x) + s_t) + b, y), a mean over the targets (arXiv 2511.08944, removal step)."""
        shifts = self._shifts.to(latent)
        losses = [functional.cross_entropy(self._head.logits(latent + s), labels) for s in shifts]
        return torch.stack(losses).mean()

    @property
    def now(self) -> Tensor:
        """s_t as they are, float64 [T, D]."""
        return self._shifts

    @now.setter
    def now(self, shifts: Tensor) -> None:
        self._shifts = shifts.to(self._shifts)

    def see(self, logits: Tensor) -> None:
        """Clean logits of this epoch, from which the next perturbations are solved."""
        self._margins.update(logits.detach())

    def follow(self) -> None:
        """Solves again; a target that nothing leads to any more keeps its perturbation.

        The direction is new, the length at most what it was: that classes are reached by changes as
        long as those between clean classes is no backdoor.
        """
        weight = self._head.weight.detach()
        margins = self._margins.result().to(weight.device)
        solved = ops.minimal_perturbation(weight, margins, classes=self._targets)
        found = (solved.status == Status.OPTIMAL)[:, None]
        shorter = (self._length / solved.norm[:, None]).clamp(max=1)
        self._shifts = torch.where(found, solved.perturbation * shorter, self._shifts)
        self._margins = self._no_margins()


def finetune(
    model: nn.Module,
    head: Head,
    inputs: Tensor,
    labels: Tensor,
    shifts: Tensor,
    targets: tuple[int, ...],
    adversary: InputAdversary | None,
    settings: FinetuneSettings,
    *,
    quantile: float = 1.0,
    progress: bool | None = None,
    checkpoint: FinetuneCheckpoint | None = None,
) -> tuple[EpochLosses, ...]:
    """Trains the model in place and leaves it in training mode.

    Args:
        model: a copy that may be changed; all parameters are trained, those that are frozen as well.
        head: of this copy.
        inputs: training samples [N, ...].
        labels: their classes [N].
        shifts: s_t, float64 [T, D], in the l2 metric.
        targets: the T classes that they lead to.
        adversary: what drives inputs into the targets; None where the model has no gradients.
        settings: see `FinetuneSettings`.
        quantile: of the margins that the shifts were solved from.
        progress: whether to show a progress bar; None shows it on a terminal.
        checkpoint: where the state is kept after every epoch, and gone on from. The outcome is the
            same to the bit as that of a training that was never interrupted, on the same machine
            with as many threads.

    Raises:
        InputError: a loss or a weight that is not finite any more; a checkpoint of something else.
        FileError: a checkpoint that cannot be read or written.
    """
    device = model_device(model)
    attacks = adversary if settings.gamma else None
    frozen = [p for p in model.parameters() if p.is_floating_point() and not p.requires_grad]
    for parameter in frozen:
        parameter.requires_grad_(True)
    original = _answers(model, head, inputs, settings.batch_size)
    following = _Shifts(shifts, targets, head, quantile)
    follows = settings.solve_again and settings.beta > 0
    optimizer = _optimizer(model, settings)
    steps_per_epoch = sum(1 for _ in batches(len(labels), settings, 0))
    epochs = epochs_of(len(labels), settings)
    steps, step = epochs * steps_per_epoch, 0
    history: list[EpochLosses] = []
    begin, state = 0, None if checkpoint is None else checkpoint.load()
    if checkpoint is not None and state is not None:
        try:
            if state.epoch > epochs:
                raise ValueError(f"{state.epoch} epochs of {epochs}")
            _resume(state, model, optimizer, following, attacks)
        except (KeyError, IndexError, ValueError, RuntimeError) as error:
            raise checkpoint.unusable(error) from error
        history += [EpochLosses(*row) for row in state.history.tolist()]
        begin, step = state.epoch, state.epoch * steps_per_epoch
        logger.info("repair: going on after epoch %d", begin)
    devices = range(torch.cuda.device_count())  # manual_seed below seeds them all
    with (
        torch.random.fork_rng(devices=devices),  # dropout: seeded here, unnoticed outside
        torch.enable_grad(),
        recording_latents(head) as recorder,
        progress_bar("fine-tuning", steps, progress) as advance,
    ):
        train_mode(model, settings.frozen_statistics)
        advance(step)
        for epoch in range(begin, epochs):
            torch.manual_seed(settings.seed * 1_000_003 + epoch)
            sums = torch.zeros(4, dtype=torch.float64)
            for index in batches(len(labels), settings, epoch):
                for group in optimizer.param_groups:
                    group["lr"] = _learning_rate(step, steps, settings)
                x, y, before = inputs[index], labels[index].to(device), original[index].to(device)
                run(model, x, "repair", check_finite=False)
                latent = recorder.take()
                logits = head.logits(latent)
                losses = [
                    functional.cross_entropy(logits, y),
                    divergence(logits, before),
                    following.loss(latent, y),
                ]
                if attacks is not None:
                    with _frozen_statistics(model):  # of attacked inputs there are none in use
                        run(model, attacks.attack(x, step), "repair", check_finite=False)
                    losses.append(attacks.loss(head.logits(recorder.take()), before))
                weights = (1.0, settings.distillation, settings.beta, settings.gamma)
                if not all(bool(torch.isfinite(loss)) for loss in losses):
                    raise diverged("a loss of NaN or infinity")
                if follows:
                    following.see(logits)
                optimizer.zero_grad(set_to_none=True)
                weighted = [w * loss for w, loss in zip(weights, losses, strict=False) if w]
                torch.stack(weighted).sum().backward()
                nn.utils.clip_grad_norm_(model.parameters(), LONGEST_GRADIENT)
                optimizer.step()
                if attacks is not None:
                    attacks.follow()
                sums += torch.tensor([float(loss.detach()) for loss in losses] + [math.nan])[:4]
                step += 1
                advance(1)
            if follows:
                following.follow()
            history.append(EpochLosses(*(sums / steps_per_epoch).tolist()))
            logger.info("repair: epoch %d of %d: %s", epoch + 1, epochs, history[-1])
            if checkpoint is not None:
                checkpoint.save(
                    FinetuneState(
                        epoch + 1,
                        model.state_dict(),
                        _memory(optimizer),
                        {} if attacks is None else attacks.state(),
                        following.now,
                        torch.tensor([astuple(e) for e in history], dtype=torch.float64),
                    )
                )
    for parameter in frozen:
        parameter.requires_grad_(False)
    optimizer.zero_grad(set_to_none=True)
    return tuple(history)


@torch.no_grad()
def _answers(model: nn.Module, head: Head, inputs: Tensor, batch_size: int) -> Tensor:
    """Logits before the training, on the CPU, also of a model that returns probabilities."""
    found = []
    with evaluating(model), recording_latents(head) as recorder:
        for x in inputs.split(batch_size):
            run(model, x, "repair")
            found.append(head.logits(recorder.take()).cpu())
    return torch.cat(found)
