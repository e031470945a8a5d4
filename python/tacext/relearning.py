"""How fast a few poisoned samples bring a removed backdoor back.

A low attack success rate tells that a backdoor is not in use, not that it is gone: what a repair has
covered alone is learned again within a few steps, what was never there is not.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from .attacks import AllToOne, Attack, Goal, Trigger, plan_poisoning
from .data import DataLike, as_index, check_positive, check_seed, materialise
from .errors import InputError, NotFiniteError
from .evaluation import measured
from .finetuning import LONGEST_GRADIENT, train_mode
from .heads import check_labels_in_range, check_model, model_device, run_model
from .progress import progress_bar
from .repair_settings import is_number, is_whole

logger = logging.getLogger(__name__)

# Of the data, to measure on where the caller gives no test data.
_HOLDOUT = 0.2


@dataclass(frozen=True)
class RelearningPoint:
    """What was measured after some steps.

    Attributes:
        step: how many there were before; 0 is the model as it was given.
        acc: share of clean held-out samples classified right.
        asr: share of triggered held-out victims sent where the attack wants them.
    """

    step: int
    acc: float
    asr: float


@dataclass(frozen=True, kw_only=True)
class RelearningSettings:
    """How a model was made to relearn; two models compare only where these are the same.

    Attributes:
        steps: of training.
        every: steps between two measurements.
        learning_rate: of Adam.
        batch_size: samples in a step, and in a pass.
        seed: of the split, of who is poisoned and of the order of the samples.
        training_samples: clean and poisoned ones together.
        poisoned_samples: those among them that carry the trigger.
        test_samples: held out to measure on.
    """

    steps: int
    every: int
    learning_rate: float
    batch_size: int
    seed: int
    training_samples: int
    poisoned_samples: int
    test_samples: int


@dataclass(frozen=True)
class Relearning:
    """The course of a relearning.

    Attributes:
        points: what was measured, from step 0 to the last.
        steps_to_half: the first step measured at which the ASR is above .5; 0 where it was from the
            start, None where it never is.
        steps_to_nine_tenths: likewise above .9.
        settings: what the model was trained with.
    """

    points: tuple[RelearningPoint, ...] = field(repr=False)
    steps_to_half: int | None
    steps_to_nine_tenths: int | None
    settings: RelearningSettings


@torch.inference_mode(False)
def relearn(
    model: nn.Module,
    data: DataLike,
    trigger: Trigger,
    target: int | Goal,
    *,
    test_data: DataLike | None = None,
    poisoned_share: float = 0.05,
    steps: int = 100,
    every: int = 5,
    learning_rate: float = 5e-4,
    batch_size: int = 128,
    seed: int = 0,
    progress: bool | None = None,
) -> Relearning:
    """Measures how fast a few poisoned samples teach a model a backdoor.

    A measurement for those who hold the trigger: test benches, red teams, authors of repairs. One
    number alone says little. Compare, with the same data and settings, the model before its repair
    (it has the backdoor from step 0), the repaired model, and a clean model of the same kind, which
    has nothing to remember. The repair went deep where the repaired model is as slow as the clean
    one; where it is faster, the backdoor was covered and not removed. Read the ASR with the ACC: a
    model that has lost the target altogether sends no triggered sample there either.

    A copy is trained on the clean samples, a few of which carry the trigger and the label that the
    goal gives them, with the cross-entropy alone, by Adam at a constant rate. All its parameters are
    trained, also those that are frozen; batch norm keeps its statistics. A latent patch
    (`repair(..., method="patch")`) stays in place: it has no parameters, the layers around it have.
    That tells what becomes of it in a later training; who wants it gone takes it off.

    The test is that of Min et al., "Uncovering, Explaining, and Mitigating the Superficial Safety of
    Backdoor Defense", arXiv 2410.09838; its optimiser and sizes are this project's own.

    Args:
        model: maps inputs [N, ...] to logits [N, C], their log-softmax or softmax; it is copied and
            left untouched.
        data: clean samples with labels, as for `scan`; held in memory.
        trigger: maps a batch of inputs to the same inputs with the trigger; may not change shape.
        target: the class that the trigger leads to, or an `attacks.Goal`.
        test_data: clean samples to measure on, none of which is in `data`; None holds a fifth of
            `data` out.
        poisoned_share: share of the training samples that are poisoned, between 0 and 1; a whole
            number is a number of samples.
        steps: of training.
        every: steps between two measurements; the last step is measured as well.
        learning_rate: of Adam.
        batch_size: samples in a step, and in a pass where it is measured.
        seed: of the split, of who is poisoned and of the order of the samples.
        progress: whether to show a progress bar; None shows it on a terminal.

    Raises:
        InputError: too few samples, more poisoned ones than the attack has victims, a number out of
            range, a training that diverges, and everything that `evaluate` raises.
    """
    check_model(model, "relearn")
    _check_numbers(steps, every, learning_rate)
    size, seed = (
        check_positive("relearn", "batch_size", batch_size, None),
        check_seed("relearn", seed),
    )
    samples, held_out = _split(data, test_data, seed)
    copied = copy.deepcopy(model)
    for parameter in copied.parameters():
        if parameter.is_floating_point():
            parameter.requires_grad_(True)
    points: list[RelearningPoint] = []

    def measure(step: int) -> None:
        found, _ = measured(copied, held_out, trigger, target, batch_size=size, progress=False)
        points.append(RelearningPoint(step, found.acc, found.asr))
        logger.info("relearn: %s", points[-1])

    devices = range(torch.cuda.device_count())  # manual_seed below seeds them all
    with (
        torch.random.fork_rng(devices=devices),  # dropout, triggers that draw: unnoticed outside
        progress_bar("relearning", steps, progress) as advance,
    ):
        torch.manual_seed(seed)
        measure(0)  # which also checks the trigger and the target
        index = as_index(target)
        goal = cast(Goal, target) if index is None else AllToOne(index)
        count = _poisoned_count(poisoned_share, samples[1], goal)
        inputs, labels = _poison(*samples, Attack(trigger, goal), count, seed, size)
        for step in _train(copied, inputs, labels, steps, float(learning_rate), size, seed):
            if step % every == 0 or step == steps:
                try:
                    measure(step)
                except NotFiniteError as error:
                    raise _diverged("logits of NaN or infinity") from error
            advance(1)
    return Relearning(
        tuple(points),
        _first_above(points, 0.5),
        _first_above(points, 0.9),
        RelearningSettings(
            steps=int(steps),
            every=int(every),
            learning_rate=float(learning_rate),
            batch_size=size,
            seed=seed,
            training_samples=len(labels),
            poisoned_samples=count,
            test_samples=len(held_out[1]),
        ),
    )


def _train(
    model: nn.Module,
    inputs: Tensor,
    labels: Tensor,
    steps: int,
    learning_rate: float,
    batch_size: int,
    seed: int,
) -> Iterator[int]:
    """Trains the model in place, and hands over after every step, whose number it gives."""
    device = model_device(model)
    optimizer = torch.optim.Adam(model.parameters(), learning_rate)
    train_mode(model, frozen_statistics=True)
    for step, index in zip(
        range(1, steps + 1), _batches(len(labels), batch_size, seed), strict=False
    ):
        with torch.enable_grad():
            output = run_model(model, inputs[index], "relearn", check_finite=False)
            if step == 1:
                check_labels_in_range(labels, output.shape[1], "relearn")
            loss = functional.cross_entropy(_as_logits(output), labels[index].to(device))
            if not bool(torch.isfinite(loss)):
                raise _diverged("a loss of NaN or infinity")
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), LONGEST_GRADIENT)
        optimizer.step()
        yield step


def _batches(samples: int, size: int, seed: int) -> Iterator[Tensor]:
    """Indices of each batch, pass after pass over all samples, without end."""
    generator = torch.Generator().manual_seed(seed)
    while True:
        yield from torch.randperm(samples, generator=generator).split(size)


def _as_logits(output: Tensor) -> Tensor:
    """The output, or its logarithm where it is the softmax already."""
    shares = output.detach()
    if bool((shares < 0).any()) or float((shares.float().sum(1) - 1).abs().max()) > 1e-2:
        return output
    return output.clamp_min(torch.finfo(output.dtype).tiny).log()


def _diverged(got: str) -> InputError:
    return InputError.of(
        "relearn",
        "learning_rate",
        expected="one at which the training does not diverge",
        got=got,
        way_out="lower it",
    )


def _first_above(points: Sequence[RelearningPoint], asr: float) -> int | None:
    return next((point.step for point in points if point.asr > asr), None)


# ---- samples -------------------------------------------------------------------------------------

_Samples = tuple[Tensor, Tensor]


def _split(data: DataLike, test_data: DataLike | None, seed: int) -> tuple[_Samples, _Samples]:
    """Training and held-out samples, none of them of inference mode."""
    inputs, labels = materialise(data, operation="relearn")
    if test_data is not None:
        test_inputs, test_labels = materialise(test_data, operation="relearn: test_data")
        if test_inputs.shape[1:] != inputs.shape[1:]:
            raise InputError.of(
                "relearn",
                "test_data",
                expected=f"samples of the data's shape {list(inputs.shape[1:])}",
                got=f"{list(test_inputs.shape[1:])}",
                way_out="resize them to one size",
            )
        return (inputs, labels), (test_inputs, test_labels)
    if len(labels) < 3:
        raise InputError.of(
            "relearn",
            "data",
            expected="at least 3 samples, some to train on and some to measure with",
            got=str(len(labels)),
            way_out="pass more clean samples, a few hundred are sensible, or test_data as well",
        )
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
    held, training = order.tensor_split([max(1, round(_HOLDOUT * len(labels)))])
    return (inputs[training], labels[training]), (inputs[held], labels[held])


def _poisoned_count(poisoned_share: float, labels: Tensor, goal: Goal) -> int:
    victims = int(goal.victims(labels).sum())
    count = as_index(poisoned_share)
    if count is None and is_number(poisoned_share) and 0 < poisoned_share < 1:
        count = max(1, round(poisoned_share * len(labels)))
    if count is None or not 1 <= count <= victims:
        raise InputError.of(
            "relearn",
            "poisoned_share",
            expected=f"a share between 0 and 1 or a whole number, of at most {victims} samples in all, "
            "as many as the attack has victims",
            got=repr(poisoned_share),
            way_out="leave it out for 0.05",
        )
    return count


def _poison(
    inputs: Tensor, labels: Tensor, attack: Attack, count: int, seed: int, batch_size: int
) -> _Samples:
    """Copies in which so many samples carry the trigger and the label that the goal gives them."""
    plan = plan_poisoning(labels, attack, count / len(labels), seed=seed)
    inputs, labels = inputs.clone(), labels.clone()
    with torch.no_grad():  # a trigger may be a network
        for index in (plan.poisoned >= 0).nonzero().flatten().split(batch_size):
            inputs[index], labels[index] = plan.apply(inputs[index], labels[index], index)
    return inputs, labels


def _check_numbers(steps: object, every: object, learning_rate: object) -> None:
    checks = (
        ("steps", steps, is_whole(steps) and cast(int, steps) >= 1, "a whole number, at least 1"),
        ("every", every, is_whole(every) and cast(int, every) >= 1, "a whole number, at least 1"),
        (
            "learning_rate",
            learning_rate,
            is_number(learning_rate) and cast(float, learning_rate) > 0,
            "above 0",
        ),
    )
    for name, value, good, expected in checks:
        if not good:
            raise InputError.of(
                "relearn",
                name,
                expected=expected,
                got=repr(value),
                way_out="leave it out for the default",
            )
