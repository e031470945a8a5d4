"""Fitting early exits: linear discriminants on a few inner layers, from clean and spoiled inputs.

No training and no gradients. What an exit has to answer for are inputs that carry a trigger nobody has
seen; so beside clean inputs it is fitted on ones that carry what the adversary found, and on ones that
are mixed with another image, lie behind a square, or under smooth noise. All keep their labels.
"""

from __future__ import annotations

import contextlib
import copy
import logging
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional

from .differentiable import InputBox, margins_of_all
from .early_exits import (
    EarlyExit,
    EarlyExits,
    ExitLimit,
    LayerHook,
    LayerNotes,
    pooled,
    wrapped_prefixes,
)
from .heads import Head, evaluating, run_model
from .latent_patch_fit import conformal, shifts_between_logits

logger = logging.getLogger(__name__)

# Layers looked at, evenly spaced: with three the right class came back less often, with all no more often.
MOST_EXITS = 5
# Inputs of each kind that they are fitted on.
MOST_INPUTS = 2000
# The covariance within classes is shrunk by this share towards a sphere, in units of the features' spread.
SHRINKAGE = 0.1
# Exits that have not seen a part of the clean inputs, one of so many, are compared with the model on it.
# Where they are right as often, up to this share, the head's logits have one vote beside them.
_FOLDS = 5
_AS_GOOD = 0.02
# Where they are worse by so much, as of few samples, the head answers alone: with exits the right class
# came back less often, on average.
_USELESS = 0.1
VOTES_OF_A_BETTER_HEAD = 4.0
# So many inputs tell which layers can be looked at; of one number it might be that of the channels.
_EXAMPLES = (3, 2)


def fit_early_exits(
    model: nn.Module,
    head: Head,
    samples: tuple[Tensor, Tensor],
    attacked: Iterable[tuple[Tensor, Tensor]],
    *,
    touched: Mapping[int, float] | None = None,
    batch_size: int,
    seed: int,
) -> EarlyExits | None:
    """Fits exits on inner layers of a model.

    Args:
        model: as it is, without a patch.
        head: of it.
        samples: clean inputs [N, ...] and labels [N], of which the first are used; no copies, which
            would be judged by themselves.
        attacked: batches of inputs that carry what leads into a target, and their own labels.
        touched: of each target the share of the clean inputs that the model takes for it of which the
            exits may say too little; None for no such limit.
        batch_size: inputs in a pass, at most.
        seed: of what the inputs are spoiled with.

    Returns:
        EarlyExits, to be attached to a copy of the model; None where no layer can be looked at, or
        where they read clean inputs much worse than the model does.
    """
    inputs, labels = (part[:MOST_INPUTS] for part in samples)
    statistics = {
        name: _ClassStatistics(head.num_classes) for name in layers_to_look_at(model, head, inputs)
    }
    names = list(statistics)
    if not names:
        return None
    spoil = _spoilers(InputBox.around(inputs), torch.Generator().manual_seed(seed))
    folds = torch.arange(len(labels)).tensor_split(min(_FOLDS, len(labels)))

    def spoiled(part: Tensor) -> Iterator[tuple[Tensor, Tensor, bool]]:
        for index in part.split(batch_size):
            yield inputs[index], labels[index], True
            for spoiler in spoil:
                yield spoiler(inputs[index]), labels[index], False

    answers, seen = [], []
    with evaluating(model), torch.no_grad(), _taking_notes(model, names) as notes:

        def see(x: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
            """The model's answers, and what the layers that are left compute."""
            predicted = run_model(model, x, "repair").argmax(1).cpu()
            found = notes.take()
            for number, name in enumerate(names):
                if number not in found or len(found[number]) != len(x):
                    statistics.pop(name, None)  # another way through the model, or other rows
            return predicted, {n: found[i].cpu() for i, n in enumerate(names) if n in statistics}

        for part in folds:
            fold = _Fold()
            for x, y, clean in spoiled(part):
                predicted, features = see(x)
                if clean:
                    answers.append(predicted)
                for name, rows in features.items():
                    statistics[name].add(rows, y)
                    fold.add(name, rows, y, clean)
            seen.append(fold)
        scores, layers = _out_of_fold(statistics, seen)
        answered = torch.cat(answers)
        votes = None if scores is None else _votes(scores, answered, labels)
        if votes is None:
            return None
        for x, y in attacked:
            for name, rows in see(x)[1].items():
                statistics[name].add(rows, y)
    solved = _solved(statistics)
    exits = {_bare(model, name): exit_ for name, exit_ in solved.items()}
    if not exits:
        return None
    known = next(iter(statistics.values())).seen
    limit = None
    if touched and scores is not None and layers == [*solved]:
        limit = ExitLimit(_least(scores, known, answered, touched))
    elif touched:  # a sum over other layers tells nothing of this one
        logger.info("repair: no limit on what inner layers say: %s are left", ", ".join(solved))
    raising = shifts_between_logits(head.weight.detach(), range(head.num_classes))
    raising = raising.nan_to_num(nan=0.0).to(head.weight)
    return EarlyExits(exits, known, torch.tensor(votes), raising, limit).to(head.weight.device)


class _Fold:
    """What exits see of a part of the clean inputs and of what they were spoiled with, layer by layer."""

    def __init__(self) -> None:
        self.all: dict[str, list[tuple[Tensor, Tensor]]] = {}
        self.clean: dict[str, list[Tensor]] = {}

    def add(self, layer: str, features: Tensor, labels: Tensor, clean: bool) -> None:
        """Of a batch."""
        self.all.setdefault(layer, []).append((features, labels))
        if clean:
            self.clean.setdefault(layer, []).append(features)


def _solved(statistics: Mapping[str, _ClassStatistics]) -> dict[str, EarlyExit]:
    found = {name: known.discriminant() for name, known in statistics.items()}
    return {name: exit_ for name, exit_ in found.items() if exit_ is not None}


def _out_of_fold(
    statistics: Mapping[str, _ClassStatistics], seen: Sequence[_Fold]
) -> tuple[Tensor | None, list[str]]:
    """Sums of the scores of clean inputs [N, C], by exits that saw neither them nor what was made of them.

    They are -inf for classes of which these exits saw nothing. With the layers that are summed, those
    that every fold has an exit on; None without any. What the folds keep of a layer is given up, as
    layers may be wide.
    """
    total: Tensor | None = None
    layers = []
    for name, known in statistics.items():
        scores: list[Tensor] = []
        for fold in seen:
            others = known.without(fold.all.pop(name))
            exit_ = others.discriminant()
            clean = torch.cat(fold.clean.pop(name))
            if exit_ is not None:
                scores.append(exit_(clean).masked_fill(~others.seen, -torch.inf))
        if len(scores) == len(seen):
            layers.append(name)
            total = torch.cat(scores) if total is None else total + torch.cat(scores)
    return total, layers


def _votes(scores: Tensor, answers: Tensor, labels: Tensor) -> float | None:
    """How much the head's logits count beside exits that have not seen these clean inputs.

    None where the exits are no help. Inputs of classes that they have not seen at all ask too much.

    The head is not to be trusted with an input that carries a trigger; but exits that read clean images
    worse than the model does are no better judges.
    """
    labels = labels.cpu()
    fair = torch.isfinite(scores.gather(1, labels[:, None])[:, 0])
    right_model, right_exits = (int((a == labels)[fair].sum()) for a in (answers, scores.argmax(1)))
    missed, asked = right_model - right_exits, int(fair.sum())
    if missed >= _USELESS * asked:
        return None
    return VOTES_OF_A_BETTER_HEAD if missed > _AS_GOOD * asked else 1.0


def _least(scores: Tensor, known: Tensor, answers: Tensor, touched: Mapping[int, float]) -> Tensor:
    """How far ahead of all others exits see a target in all but this share of the inputs taken for it.

    Inputs of all classes together say how far behind it may fall where a class has few.
    """
    lowest = torch.finfo(torch.float32).min
    behind = -margins_of_all(scores.masked_fill(~known, -torch.inf))
    behind = behind.gather(1, answers[:, None])[:, 0]
    # Neither of classes that exits have not seen, nor where there was no other to compare with.
    fair = torch.isfinite(behind)
    usual = behind[fair]
    least = torch.full((scores.shape[1],), lowest)
    for target, share in touched.items():
        taken = answers == target
        if not bool((known[target] & taken).any()):
            continue
        # All of a class that are in one fold have been seen by no exit of another.
        limits = [conformal(x, share) for x in (behind[fair & taken], usual) if len(x)]
        if limits:
            least[target] = (-torch.stack(limits).amax()).clamp(lowest, -lowest)
    return least


def _bare(model: nn.Module, name: str) -> str:
    """The name of a layer without what wrappers put in front of all names."""
    for prefix in wrapped_prefixes(model):
        if prefix and all(n.startswith(prefix) for n, _ in model.named_parameters()):
            return name.removeprefix(prefix)
    return name


def layers_to_look_at(model: nn.Module, head: Head, example: Tensor) -> tuple[str, ...]:
    """Names of convolutions and linear layers before the head, in the order of a pass.

    Each is called once, with a row for every input, and to look at it changes no bit of the output.
    (Torch's own transformer layers, for one, leave their fused kernels where a hook is.)
    """
    candidates = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.Conv2d | nn.Linear)
        and (module is head.module or not re.search("[/:]", name))
    }
    last = next(name for name, module in candidates.items() if module is head.module)
    usable = list(candidates)
    with evaluating(model), torch.no_grad():
        for rows in _EXAMPLES:
            x = example[:rows]
            expected = run_model(model, x, "repair")
            outputs = _outputs(model, x, candidates)
            called = [name for name, _ in outputs]
            before = outputs[: called.index(last)] if last in called else []
            good = {
                name
                for name, output in before
                if called.count(name) == 1
                and isinstance(output, Tensor)
                and output.is_floating_point()
                and output.dim() > 0
                and len(output) == len(x)
                and pooled(candidates[name], output) is not None
            }
            usable = [name for name in called if name in good and name in usable]
            if not _unnoticed(model, x, expected, usable):
                usable = [name for name in usable if _unnoticed(model, x, expected, [name])]
    if len(usable) > MOST_EXITS:
        usable = [usable[i] for i in torch.linspace(0, len(usable) - 1, MOST_EXITS).round().int()]
    return tuple(usable)


def _outputs(
    model: nn.Module, x: Tensor, modules: Mapping[str, nn.Module]
) -> list[tuple[str, object]]:
    """What each of these modules returns in a pass, in the order in which they are called."""
    found: list[tuple[str, object]] = []

    def noting(name: str) -> Callable[[nn.Module, object, object], None]:
        return lambda _module, _inputs, output: found.append((name, output))

    handles = [module.register_forward_hook(noting(name)) for name, module in modules.items()]
    try:
        run_model(model, x, "repair")
    finally:
        for handle in handles:
            handle.remove()
    return found


def _unnoticed(model: nn.Module, x: Tensor, expected: Tensor, names: Sequence[str]) -> bool:
    with _taking_notes(model, names):
        return torch.equal(run_model(model, x, "repair"), expected)


@contextlib.contextmanager
def _taking_notes(model: nn.Module, names: Iterable[str]) -> Iterator[LayerNotes]:
    notes, handles = LayerNotes(), []
    try:
        for number, name in enumerate(names):
            hook = LayerHook(notes, number)
            handles.append(model.get_submodule(name).register_forward_hook(hook))
        yield notes
    finally:
        for handle in handles:
            handle.remove()


class _ClassStatistics:
    """Means of classes and covariance within them, of features that come in batches, in float64."""

    def __init__(self, classes: int) -> None:
        self._classes = classes
        self._origin: Tensor | None = None  # squares of what is left lose fewer digits
        self._count = torch.zeros(classes, dtype=torch.float64)
        self._sum = self._squares = torch.zeros(0, dtype=torch.float64)

    def add(self, features: Tensor, labels: Tensor) -> None:
        """Of features [N, F] of inputs with these labels [N]."""
        rows = features.double().cpu()
        if self._origin is None:
            self._origin = rows.mean(0)
        if not len(self._squares):
            self._sum = rows.new_zeros(self._classes, rows.shape[1])
            self._squares = rows.new_zeros(rows.shape[1], rows.shape[1])
        rows = rows - self._origin
        own = functional.one_hot(labels.cpu(), self._classes).double()
        self._count += own.sum(0)
        self._sum += own.T @ rows
        self._squares += rows.T @ rows

    def without(self, batches: Iterable[tuple[Tensor, Tensor]]) -> _ClassStatistics:
        """Those of all other batches than these."""
        gone, rest = _ClassStatistics(self._classes), copy.copy(self)
        gone._origin = self._origin
        for features, labels in batches:
            gone.add(features, labels)
        rest._count = self._count - gone._count
        rest._sum, rest._squares = self._sum - gone._sum, self._squares - gone._squares
        return rest

    @property
    def seen(self) -> Tensor:
        """The classes that there were samples of, bool [C]."""
        return self._count > 0

    def discriminant(self) -> EarlyExit | None:
        """Fisher's linear one, all classes as likely: what it scores are log-likelihoods.

        Zero for classes without samples; None where features were not finite.
        """
        if self._origin is None or not bool(torch.isfinite(self._squares).all()):
            return None
        total, known = self._count.sum(), self.seen
        mean = self._sum.sum(0) / total
        means = self._sum / self._count.clamp(min=1)[:, None]
        spread = (self._squares.diagonal() / total - mean.square()).clamp(min=0).sqrt()
        spread = spread.clamp(min=1e-6 * max(float(spread.max()), 1e-30))
        within = (self._squares - means.T @ (self._count[:, None] * means)) / total
        within = within / spread / spread[:, None]
        shrunk = SHRINKAGE * within.diagonal().mean().clamp(min=1e-12)
        within.diagonal().add_(shrunk)
        away = (means - mean) / spread
        weight = torch.linalg.solve(within, away.T).T
        bias = -0.5 * (weight * away).sum(1)
        weight = weight / spread
        bias = bias - weight @ (mean + self._origin)
        found = EarlyExit((weight * known[:, None]).float(), (bias * known).float())
        return found if all(bool(torch.isfinite(b).all()) for b in found.buffers()) else None


def _spoilers(box: InputBox, generator: torch.Generator) -> list[Callable[[Tensor], Tensor]]:
    """What makes a batch of inputs harder to read and leaves their classes: images [N, C, H, W]."""
    if len(box.shape) != 3:
        return []
    channels, height, width = box.shape
    low, high = (edge.expand(channels, 1, 1) for edge in (box.low, box.high))

    def uniform(*shape: int) -> Tensor:
        return torch.rand(*shape, generator=generator)

    def mixed(images: Tensor) -> Tensor:
        """With a tenth to three tenths of another image."""
        x = images.float().cpu()
        other = x[torch.randperm(len(x), generator=generator)]
        return x + (0.1 + 0.2 * uniform(len(x), 1, 1, 1)) * (other - x)

    def covered(images: Tensor) -> Tensor:
        """By a square of a tenth to a quarter of the side: of one colour, or of black and white."""
        x = images.float().cpu()
        count = len(x)
        shorter = min(height, width)
        side = (shorter * (0.1 + 0.15 * uniform(count))).round().clamp(min=1)
        top, left = uniform(count) * (height - side + 1), uniform(count) * (width - side + 1)
        rows = torch.arange(height) - top.floor()[:, None]
        columns = torch.arange(width) - left.floor()[:, None]
        inside_rows = (rows >= 0) & (rows < side[:, None])
        inside_columns = (columns >= 0) & (columns < side[:, None])
        inside = inside_rows[:, None, :, None] & inside_columns[:, None, None, :]
        colour = uniform(count, channels, 1, 1)
        dots = (uniform(count, channels, height, width) > uniform(count, 1, 1, 1)).float()
        shade = torch.where(uniform(count, 1, 1, 1) < 0.5, colour, dots)
        return torch.where(inside, low + (high - low) * shade, x)

    def clouded(images: Tensor) -> Tensor:
        """By smooth noise in one of four grains."""
        x = images.float().cpu()
        noise = torch.cat(
            [
                functional.interpolate(
                    torch.randn(len(part), channels, grain, grain, generator=generator),
                    size=(height, width),
                    mode="bilinear",
                )
                for part, grain in zip(x.tensor_split(4), (2, 4, 8, 16), strict=True)
            ]
        )
        strength = 0.24 * uniform(len(x), 1, 1, 1) * (high - low)
        return box.clamp(x + strength * noise)

    return [mixed, covered, clouded]
