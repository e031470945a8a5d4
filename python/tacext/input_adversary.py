"""The attacker that a repair trains against: what drives inputs into the suspect classes.

A backdoor answers to more than its trigger, and a scan finds what it answers to: a small change of
the whole input and a small patch for every suspect, the same for all inputs. Taught that these lead
nowhere, a model forgets the trigger as well. They move on with the model, a step of gradient ascent
for every step of its descent, so that it cannot just learn a few by heart.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from .differentiable import DifferentiableModel, InputBox
from .heads import Head
from .patch_reach import PatchReach, Patterns, has_room, patch_reach
from .reach import BUDGET, Reach, UniversalChanges, reach
from .second_look import MOST_SAMPLES, split_samples

# Log of the largest probability that the loss tells from 1, at which it is infinite.
_SURE = -1e-4
# A pattern is worth half as much as a change: it is on half of the images and asks for more of them.
_WEIGHT_OF_PATCHES = 0.5


def divergence(logits: Tensor, wanted: Tensor) -> Tensor:
    """KL(softmax(wanted) || softmax(logits)), a mean over the samples [N, C]."""
    return functional.kl_div(
        logits.float().log_softmax(1),
        wanted.float().log_softmax(1),
        log_target=True,
        reduction="batchmean",
    )


class InputAdversary:
    """A universal change and, on images, a patch for every target; each takes its turn.

    Args:
        box: the inputs that the model may be given.
        found: the changes of `reach` into the targets.
        patched: the patches of `patch_reach` into them; None where there is no room for any.
        device: of the model.
    """

    def __init__(
        self, box: InputBox, found: Reach, patched: PatchReach | None, device: torch.device
    ) -> None:
        self.targets = found.classes
        self._box = box
        length = found.budgets[-1] * BUDGET * box.diagonal
        self._changes = [
            UniversalChanges(box, change[None].to(device), length) for change in found.change
        ]
        self._patterns: Patterns | None = None
        if patched is not None:
            self._patterns = Patterns(patched.corner, patched.pattern.to(device), box)
        self._turn = 0
        self._change = self._pattern = torch.zeros(0)
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
        batch_size: int = 128,
        seed: int = 0,
        progress: bool | None = None,
    ) -> InputAdversary:
        """Looks for what drives these clean samples [N, ...] into the targets.

        Raises:
            NoGradientError: the model has no gradients with respect to its inputs.
            InputError: too few samples, or of one class; changed inputs are rejected.
        """
        generator = torch.Generator().manual_seed(seed)
        chosen = torch.randperm(len(labels), generator=generator)[:MOST_SAMPLES]
        fit, held_out = split_samples((inputs[chosen], labels[chosen]), "repair")
        box = InputBox.around(inputs)
        differentiable = DifferentiableModel(
            model, head, "repair", without_gradients="or settings with gamma=0"
        )
        found = reach(
            differentiable,
            box,
            fit,
            held_out,
            targets,
            batch_size=batch_size,
            seed=seed,
            progress=progress,
        )
        patched = None
        if has_room(box.shape):
            patched = patch_reach(
                differentiable,
                box,
                fit,
                held_out,
                found,
                batch_size=batch_size,
                seed=seed,
                progress=progress,
            )
        return cls(box, found, patched, differentiable.device)

    def attack(self, inputs: Tensor, step: int) -> Tensor:
        """The inputs [N, ...], the first half with a change on, the others with a patch."""
        self._turn = step % len(self.targets)
        changes = self._changes[self._turn]
        inputs = inputs.to(changes.change.device).float()
        patterns = self._patterns
        self._changed = len(inputs) if patterns is None else -(-len(inputs) // 2)
        self._change = changes.change.detach().clone().requires_grad_(True)
        changed = self._box.clamp(inputs[: self._changed] + self._change)
        if patterns is None:
            return changed
        self._pattern = patterns.pattern[self._turn].detach().clone().requires_grad_(True)
        patched = patterns.paste(self._turn, inputs[self._changed :].clone(), self._pattern)
        return torch.cat([changed, patched])

    def loss(self, logits: Tensor, original: Tensor) -> Tensor:
        """What the attack achieves: large where changed inputs are taken for the target.

        Of changed inputs it asks that they are not the target, -log(1 - p_t), except of those that
        the original model took for it when they were clean: what else a change of the whole image
        makes of them is no backdoor. Under a patch the answer is to stay as it was.

        Args:
            logits: for the inputs of the last `attack`.
            original: the original model's, for the clean ones.
        """
        target = self.targets[self._turn]
        before = original[: self._changed]
        sure = logits[: self._changed].float().log_softmax(1)[:, target].clamp(max=_SURE)
        others = before.argmax(1) != target
        loss = -(torch.log1p(-sure.exp()) * others).sum() / len(logits)
        if self._changed < len(logits):
            patched = divergence(logits[self._changed :], original[self._changed :])
            loss = loss + _WEIGHT_OF_PATCHES * patched
        return loss

    def follow(self) -> None:
        """A step along the gradients that the backward pass of the loss has left."""
        if self._change.grad is not None:
            self._changes[self._turn].ascend(self._change.grad)
        if self._patterns is not None and self._pattern.grad is not None:
            part = slice(self._turn, self._turn + 1)
            self._patterns.ascend(part, self._pattern.grad[None])
