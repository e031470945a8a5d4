"""The attacker that a repair trains against: what drives inputs into the suspect classes.

A backdoor answers to more than its trigger, and a scan finds what it answers to: a small change of
the whole input and a small patch for every suspect, the same for all inputs. Taught that these lead
nowhere, a model forgets the trigger as well. They move on with the model, a step of gradient ascent
for every step of its descent, so that it cannot just learn a few by heart.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from .differentiable import DifferentiableModel, InputBox
from .heads import Head, evaluating, run_model
from .patch_reach import PatchReach, Patterns
from .reach import BUDGET, Reach, UniversalChanges
from .sample_keeper import MOST_SAMPLES
from .second_look import changes_and_patches, split_samples
from .waves import Waves, class_by_wave, wave_pattern

# What leads fewer of the samples into a target tells little of the trigger.
FEWEST_LED = 0.3


def divergence(logits: Tensor, wanted: Tensor) -> Tensor:
    """KL(softmax(wanted) || softmax(logits)), a mean over the samples [N, C]."""
    return functional.kl_div(
        logits.float().log_softmax(1),
        wanted.float().log_softmax(1),
        log_target=True,
        reduction="batchmean",
    )


def _as(known: Tensor, stored: Tensor) -> Tensor:
    if stored.shape != known.shape:
        raise ValueError(f"{list(stored.shape)} in place of {list(known.shape)}")
    return stored.to(known)


@torch.no_grad()
def _led_by(
    model: DifferentiableModel,
    box: InputBox,
    samples: tuple[Tensor, Tensor],
    change: Tensor,
    target: int,
    batch_size: int,
) -> float:
    """The share of samples of other classes that are taken for the target with a change on."""
    others = samples[0][samples[1] != target]
    change = change.to(others.device)
    with model.open():
        hits = sum(
            int(
                (model.logits(model.place(box.clamp(x.float() + change))).argmax(1) == target).sum()
            )
            for x in others.split(batch_size)
        )
    return hits / max(1, len(others))


def not_the_target(logits: Tensor, target: int) -> Tensor:
    """-log(1 - p_t), [N], also where p_t is 1 to the last bit."""
    logits = logits.float()
    others = torch.cat([logits[:, :target], logits[:, target + 1 :]], 1)
    return logits.logsumexp(1) - others.logsumexp(1)


@dataclass(frozen=True, eq=False)
class Effects:
    """What changes and patches do to inputs of other classes that the model does not take for the target.

    Attributes:
        moved: shares that each target's change, and patch, leads there, float64 [T, 1 or 2].
        right: shares that are classified right with them on, [T, 1 or 2].
    """

    moved: Tensor
    right: Tensor


class InputAdversary:
    """A universal change and, on images, a patch for every target; each takes its turn.

    Args:
        box: the inputs that the model may be given.
        found: the changes of `reach` into the targets.
        patched: the patches of `patch_reach` into them; None where there is no room for any.
        device: of the model.
        waves: axis, periods and phase of those that take the place of the changes into some targets.

    Attributes:
        box, targets, found, patched, waves: as given.
    """

    def __init__(
        self,
        box: InputBox,
        found: Reach,
        patched: PatchReach | None,
        device: torch.device,
        waves: Mapping[int, tuple[int, int, int]] | None = None,
    ) -> None:
        self.targets = found.classes
        self.found, self.patched = found, patched
        self.waves = dict(waves or {})
        self.box = box
        length = found.budgets[-1] * BUDGET * box.diagonal
        self._first_changes = found.change.to(device, copy=True)
        for target, wave in self.waves.items():
            self._first_changes[self.targets.index(target)] = wave_pattern(box, *wave).to(device)
        self._changes = [
            UniversalChanges(box, change[None], max(length, float(change.norm())))
            for change in self._first_changes
        ]
        self._first_patterns = self._patterns = None
        if patched is not None:
            pattern = patched.pattern.to(device)
            self._first_patterns = Patterns(patched.corner, pattern, box)
            self._patterns = Patterns(patched.corner, pattern.clone(), box)
        self._turn = 0
        self._attack: list[Tensor] = []
        self._ascent: tuple[Tensor, ...] = ()
        self._changed = 0

    @classmethod
    def sought(
        cls,
        model: nn.Module,
        head: Head,
        inputs: Tensor,
        labels: Tensor,
        targets: tuple[int, ...],
        *,
        waves: Waves | None = None,
        batch_size: int = 128,
        seed: int = 0,
        progress: bool | None = None,
    ) -> InputAdversary:
        """Looks for what drives these clean samples [N, ...] into the targets.

        `waves` are those of a scan that held the most selective of them for a trigger: where it leads
        as many inputs into a target as the change that is found, it takes its place.

        Raises:
            NoGradientError: the model has no gradients with respect to its inputs.
            InputError: too few samples, or of one class; changed inputs are rejected.
        """
        generator = torch.Generator().manual_seed(seed)
        chosen = torch.randperm(len(labels), generator=generator)[:MOST_SAMPLES]
        fit, held_out = split_samples((inputs[chosen], labels[chosen]), "repair")
        box = InputBox.around(inputs)
        differentiable = DifferentiableModel(
            model, head, "repair", without_gradients="or accept the repair unseen"
        )
        found, patched = changes_and_patches(
            differentiable, box, fit, held_out, targets, batch_size, seed, progress
        )
        led_by: dict[int, tuple[int, int, int]] = {}
        if waves is not None and (k := class_by_wave(waves)) in targets:
            axis, periods, phase = waves.wave[k].tolist()
            wave = wave_pattern(box, axis, periods, phase)
            led = _led_by(differentiable, box, held_out, wave, k, batch_size)
            if led >= float(found.rate[-1, found.classes.index(k)]):
                led_by[k] = axis, periods, phase
        return cls(box, found, patched, differentiable.device, led_by)

    def attack(self, inputs: Tensor, step: int) -> Tensor:
        """The inputs [N, ...], the first half with a change on, the others with a patch."""
        self._turn = step % len(self.targets)
        changes, patterns = self._changes[self._turn], self._patterns
        inputs = inputs.to(changes.change.device).float()
        self._changed = len(inputs) if patterns is None else -(-len(inputs) // 2)
        change = changes.change.detach().clone().requires_grad_(True)
        attacked = self.box.clamp(inputs[: self._changed] + change)
        self._attack = [change]
        if patterns is None:
            return attacked
        pattern = patterns.pattern[self._turn].detach().clone().requires_grad_(True)
        self._attack.append(pattern)
        patched = patterns.paste(self._turn, inputs[self._changed :].clone(), pattern)
        return torch.cat([attacked, patched])

    def loss(self, logits: Tensor, original: Tensor) -> Tensor:
        """What the attack achieves: large where changed inputs are taken for the target.

        Of changed inputs it asks that they are not the target, -log(1 - p_t), except of those that
        the original model took for it when they were clean: what else a change of the whole image
        makes of them is no backdoor. Under a patch the answer is to stay as it was, in divergence.

        Args:
            logits: for the inputs of the last `attack`.
            original: the original model's, for the clean ones.
        """
        target, changed = self.targets[self._turn], self._changed
        others = original.argmax(1) != target
        reached = not_the_target(logits, target) * others
        # The attack climbs into the target, with the patch as well: the divergence that the model is
        # taught to lose under it would lead anywhere but home.
        self._ascent = torch.autograd.grad(
            reached.sum(), self._attack, retain_graph=True, allow_unused=True
        )
        loss = reached[:changed].sum() / len(logits)
        if changed < len(logits):
            share = (len(logits) - changed) / len(logits)
            loss = loss + share * divergence(logits[changed:], original[changed:])
        return loss

    def follow(self) -> None:
        """A step for the change and the patch of this turn, into the target."""
        change, *pattern = self._ascent
        if change is not None:
            self._changes[self._turn].ascend(change)
        if pattern and pattern[0] is not None and self._patterns is not None:
            self._patterns.ascend(slice(self._turn, self._turn + 1), pattern[0][None])

    def state(self) -> dict[str, Tensor]:
        """Where the changes and patches have moved to, and how fast they move."""
        found = {}
        for j, changes in enumerate(self._changes):
            found[f"change.{j}"], found[f"velocity.{j}"] = changes.change, changes.velocity
        if self._patterns is not None:
            found["pattern"] = self._patterns.pattern
            found["pattern_velocity"] = self._patterns.velocity
        return found

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """Puts them where they were.

        Raises:
            KeyError, ValueError: a part is missing, or of another shape.
        """
        for j, changes in enumerate(self._changes):
            changes.change = _as(changes.change, state[f"change.{j}"])
            changes.velocity = _as(changes.velocity, state[f"velocity.{j}"])
        if self._patterns is not None:
            self._patterns.pattern = _as(self._patterns.pattern, state["pattern"])
            self._patterns.velocity = _as(self._patterns.velocity, state["pattern_velocity"])

    def first_attacks(self, turn: int, inputs: Tensor) -> list[Tensor]:
        """The inputs [N, ...] with the change, and with the patch, that was found at first for a target."""
        placed = inputs.to(self._first_changes.device).float()
        attacked = [self.box.clamp(placed + self._first_changes[turn])]
        if self._first_patterns is not None:
            attacked.append(self._first_patterns.paste(turn, placed.clone()))
        return attacked

    def moved(self, model: nn.Module, inputs: Tensor, labels: Tensor, batch_size: int) -> Tensor:
        """`Effects.moved`, float64 [T, 1 or 2]."""
        return self.effects(model, inputs, labels, batch_size).moved

    @torch.no_grad()
    def effects(self, model: nn.Module, inputs: Tensor, labels: Tensor, batch_size: int) -> Effects:
        """What the changes and patches that were found at first do to a model.

        Args:
            model: the original or a repaired one.
            inputs: clean samples [N, ...].
            labels: their classes [N].
            batch_size: inputs in a pass, at most.
        """
        ways = 1 if self._first_patterns is None else 2
        moved, right = (torch.zeros(len(self.targets), ways, dtype=torch.float64) for _ in range(2))
        with evaluating(model):
            before = torch.cat(
                [run_model(model, x, "repair").argmax(1).cpu() for x in inputs.split(batch_size)]
            )
            for j, target in enumerate(self.targets):
                index = ((labels != target) & (before != target)).nonzero().flatten()
                for part in index.split(batch_size):
                    for kind, images in enumerate(self.first_attacks(j, inputs[part])):
                        predicted = run_model(model, images, "repair").argmax(1).cpu()
                        moved[j, kind] += int((predicted == target).sum())
                        right[j, kind] += int((predicted == labels[part]).sum())
                moved[j] /= max(1, len(index))
                right[j] /= max(1, len(index))
        return Effects(moved, right)
