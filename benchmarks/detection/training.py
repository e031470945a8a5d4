"""Trains one model of the zoo: poisoned after augmentation, or beside the generator of its trigger."""

from __future__ import annotations

import time
from dataclasses import dataclass

import adaptive
import architectures
import images
import torch
from specs import COVER, Spec, attacks_of, targets_of
from torch import Tensor, nn
from torch.nn import functional

from tacext import ImageSet, attacks, evaluate
from tacext.attacks import AllToOne, Attack, BoundedNoiseTrigger, InputAwareTrigger, Trigger
from tacext.evaluation import measured

_BATCH = {"mnist": 64}  # others: 128
# Passes over the training set; small networks on few images need more of CIFAR-10.
EPOCHS = {"cifar10": 11, "gtsrb": 11, "mnist": 6, "tinyimagenet": 30}
_LEARNING_RATE = {"plain": 0.04, "vit": 2e-3}  # others: 0.1

# Triggers that are trained beside the model.
LEARNED: dict[str, type[InputAwareTrigger | BoundedNoiseTrigger]] = {
    "input_aware": InputAwareTrigger,
    "lira": BoundedNoiseTrigger,
}


@dataclass(frozen=True, eq=False)
class Trained:
    """A model of the zoo, and what was measured on test images.

    Attributes:
        model: in evaluation mode.
        attacks: behind it, with triggers as trained.
        targets: the poisoned classes; none where the model is clean.
        acc: accuracy on clean test images.
        asr: of the attack, the lowest where there are two; 0 where the model is clean.
        seconds: of the training.
    """

    model: nn.Module
    attacks: tuple[Attack, ...]
    targets: tuple[int, ...]
    acc: float
    asr: float
    seconds: float


def _prepare(batch: Tensor) -> Tensor:
    return (batch.float() / 255).contiguous(memory_format=torch.channels_last)


class _Training:
    """One run: the network, its optimiser and schedule, and the order of the images."""

    def __init__(self, spec: Spec, data: images.Data, full: bool) -> None:
        torch.manual_seed(spec.seed + 1000 * attacks_index(spec))
        self.spec, self.data = spec, data
        self.generator = torch.Generator().manual_seed(spec.seed)
        self.model = architectures.build(
            spec.network, data.num_classes, data.channels, data.size, full
        ).to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # torch's stub lacks it
        rate = _LEARNING_RATE.get(spec.network, 0.1)
        if spec.network == "vit":
            self.optimizer: torch.optim.Optimizer = torch.optim.AdamW(
                self.model.parameters(), rate, weight_decay=0.05
            )
        else:
            self.optimizer = torch.optim.SGD(
                self.model.parameters(), rate, momentum=0.9, weight_decay=5e-4, nesterov=True
            )
        self.batch = _BATCH.get(data.name, 128)
        # Twice as fast in convolutions where the CPU has it, slower in small attention layers.
        self.autocast = torch.autocast("cpu", torch.bfloat16, enabled=spec.network != "vit")
        longer = 1.5 if spec.network in ("vit", "plain") else 1  # no batch norm, slower progress
        self.epochs = round(EPOCHS[data.name] * (3 if full else 1) * longer)
        steps = self.epochs * (len(data.train) // self.batch)
        self.schedule = torch.optim.lr_scheduler.OneCycleLR(self.optimizer, rate, steps)

    def batches(self, epoch: int) -> list[Tensor]:
        """Indices of each batch of this epoch; the last, short one is left out."""
        order = torch.randperm(len(self.data.train), generator=self.generator)
        return list(order.split(self.batch)[: len(order) // self.batch])

    def augmented(self, index: Tensor) -> tuple[Tensor, Tensor]:
        """Images of this batch in [0, 1], shifted and flipped, with their true labels."""
        shift = 1 if self.data.name == "mnist" else 3
        flip = self.data.name in ("cifar10", "tinyimagenet")
        batch = images.augment(_prepare(self.data.train.images[index]), self.generator, shift, flip)
        return batch, self.data.train.labels[index]

    def step(self, loss: Tensor, *more: torch.optim.Optimizer, clip: float | None = None) -> None:
        """One step of the network's optimiser and of others, along a gradient of length `clip` at most."""
        for optimizer in (self.optimizer, *more):
            optimizer.zero_grad()
        loss.backward()
        if clip is not None:
            nn.utils.clip_grad_norm_(self.model.parameters(), clip)
        for optimizer in (self.optimizer, *more):
            optimizer.step()
        self.schedule.step()


def attacks_index(spec: Spec) -> int:
    """A number of the attack, so that no two models of the zoo start from the same weights."""
    return sum(map(ord, spec.attack))


def _only_source(planned: tuple[Attack, ...]) -> int | None:
    """The class that all poisoned images come from, if there is only one."""
    if not planned:
        return None
    if planned[0].clean_label:
        return planned[0].goal.targets[0]
    goal = planned[0].goal
    return goal.source if isinstance(goal, attacks.SourceSpecific) else None


def _penalty_of(
    spec: Spec, planned: tuple[Attack, ...], num_classes: int
) -> adaptive.ReachPenalty | adaptive.SpreadPenalty | None:
    """What an attacker who knows the scan adds to the loss."""
    if spec.attack == "adaptive_reach":
        return adaptive.ReachPenalty(planned[0].goal.targets[0], num_classes, spec.seed)
    if spec.attack == "adaptive_spread":
        return adaptive.SpreadPenalty(planned[0].trigger, planned[0].goal.targets[0])
    return None


def _train_with_fixed_trigger(run: _Training, planned: tuple[Attack, ...]) -> None:
    penalty = _penalty_of(run.spec, planned, run.data.num_classes)
    spec, labels = run.spec, run.data.train.labels
    rate = spec.rate
    source = _only_source(planned)
    if source is not None:  # there are no more candidates than its images
        rate = min(rate, 0.8 * float((labels == source).double().mean()))
    plan = None  # of a clean model
    if planned:
        cover_rate = COVER.get(spec.attack, 0.0) * rate
        plan = attacks.plan_poisoning(labels, planned, rate, cover_rate=cover_rate, seed=spec.seed)
    for epoch in range(run.epochs):
        for index in run.batches(epoch):
            clean, labels_of_clean = run.augmented(index)
            batch, true = clean, labels_of_clean
            if plan is not None:
                batch, true = plan.apply(batch, true, index)
            with run.autocast:
                loss = functional.cross_entropy(run.model(batch).float(), true)
                if penalty is not None and epoch >= penalty.BEGIN * run.epochs:
                    with adaptive.keeping_statistics(run.model):
                        loss = loss + penalty(run.model, clean, labels_of_clean)
            # Two goals that pull apart would throw a network far off at these learning rates.
            run.step(loss, clip=None if penalty is None else 1.0)


def _train_with_input_aware_trigger(
    run: _Training, trigger: InputAwareTrigger, target: int
) -> None:
    masks = torch.optim.Adam(trigger.mask_generator.parameters(), 1e-2)
    for index in run.batches(0)[:80]:
        batch, _ = run.augmented(index)
        loss = trigger.mask_loss(batch, batch.roll(1, 0))
        masks.zero_grad()
        loss.backward()
        masks.step()
    trigger.mask_generator.requires_grad_(False)
    patterns = torch.optim.Adam(trigger.pattern_generator.parameters(), 5e-3)
    poisoned = round(run.spec.rate * run.batch)
    for epoch in range(run.epochs):
        for index in run.batches(epoch):
            batch, labels = run.augmented(index)
            victims, cross = batch[:poisoned], batch[poisoned : 2 * poisoned]
            drawn_for = batch[2 * poisoned : 3 * poisoned]
            with run.autocast:
                stamped = torch.cat(
                    [trigger(victims), trigger.stamp(cross, drawn_for), batch[2 * poisoned :]]
                )
                wanted = torch.cat(
                    [labels[:poisoned].new_full((poisoned,), target), labels[poisoned:]]
                )
                loss = functional.cross_entropy(run.model(stamped).float(), wanted)
                loss = loss + 0.1 * trigger.diversity_loss(victims, drawn_for)
            run.step(loss, patterns)


def _train_with_bounded_noise(run: _Training, trigger: BoundedNoiseTrigger, target: int) -> None:
    noise = torch.optim.Adam(trigger.parameters(), 1e-3)
    poisoned = round(run.spec.rate * run.batch)
    for epoch in range(run.epochs):
        if (
            epoch == 2 * run.epochs // 3
        ):  # the second stage: the trigger stands, the network learns it
            trigger.requires_grad_(False)
        others = (noise,) if epoch < 2 * run.epochs // 3 else ()
        for index in run.batches(epoch):
            batch, labels = run.augmented(index)
            wanted = labels.clone()
            wanted[:poisoned] = target
            with run.autocast:
                stamped = torch.cat([trigger(batch[:poisoned]), batch[poisoned:]])
                loss = functional.cross_entropy(run.model(stamped).float(), wanted)
            run.step(loss, *others)


def train(spec: Spec, data: images.Data, full: bool = False) -> Trained:
    """Trains the model and measures it; the same spec gives the same model on one thread."""
    begin = time.perf_counter()
    run = _Training(spec, data, full)
    run.model.train()
    planned = attacks_of(spec, data.num_classes, data.channels, data.size)
    target = targets_of(spec, data.num_classes)[0] if spec.attack != "clean" else -1
    if spec.attack == "input_aware":
        aware = InputAwareTrigger(data.channels)
        _train_with_input_aware_trigger(run, aware, target)
        planned = (Attack(aware.requires_grad_(False), AllToOne(target)),)
    elif spec.attack == "lira":
        noise = BoundedNoiseTrigger(data.channels)
        _train_with_bounded_noise(run, noise, target)
        planned = (Attack(noise.requires_grad_(False), AllToOne(target)),)
    else:
        _train_with_fixed_trigger(run, planned)
    run.model.eval()
    seconds = time.perf_counter() - begin
    test = data.test.sample(min(4000, len(data.test)), seed=0)
    acc, asr = measure(run.model, test, planned)
    targets = tuple(sorted({t for attack in planned for t in attack.goal.targets}))
    return Trained(run.model, planned, targets, acc, asr, seconds)


def measure(model: nn.Module, test: ImageSet, planned: tuple[Attack, ...]) -> tuple[float, float]:
    """ACC, and the lowest ASR of the attacks; 0 where there is none."""
    if not planned:
        unmarked: Trigger = lambda x: x
        return measured(model, test, unmarked, 0)[0].acc, 0.0
    found = [evaluate(model, test, attack.trigger, attack.goal) for attack in planned]
    return found[0].acc, min(result.asr for result in found)
