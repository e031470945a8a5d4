"""Fitting early exits: linear discriminants on a few inner layers, from clean and spoiled inputs.

No training and no gradients. What an exit has to answer for are inputs that carry a trigger nobody has
seen; so beside clean inputs it is fitted on ones that carry what the adversary found, and on ones that
are mixed with another image, lie behind a square, or under smooth noise. All keep their labels.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator

import torch
from torch import Tensor, nn
from torch.nn import functional

from .differentiable import InputBox
from .early_exits import EarlyExit, EarlyExits, LayerNote, pooled
from .heads import Head, evaluating, run_model
from .latent_patch_fit import shifts_between_logits

# Layers looked at, evenly spaced: with three the right class came back less often, with all no more often.
MOST_EXITS = 5
# Inputs of each kind that they are fitted on.
MOST_INPUTS = 2000
# The covariance within classes is shrunk by this share towards a sphere, in units of the features' spread.
SHRINKAGE = 0.1
# Inputs that tell which layers can be looked at.
_EXAMPLES = 3
# Scores of a class without samples.
_NEVER = -1e9


def fit_early_exits(
    model: nn.Module,
    head: Head,
    samples: tuple[Tensor, Tensor],
    attacked: Iterable[tuple[Tensor, Tensor]],
    *,
    batch_size: int,
    seed: int,
) -> EarlyExits | None:
    """Fits exits on inner layers of a model.

    Args:
        model: as it is, without a patch.
        head: of it.
        samples: clean inputs [N, ...] and labels [N], of which the first are used.
        attacked: batches of inputs that carry what leads into a target, and their own labels.
        batch_size: inputs in a pass, at most.
        seed: of what the inputs are spoiled with.

    Returns:
        EarlyExits, to be attached to a copy of the model; None where no layer can be looked at.
    """
    inputs, labels = (part[:MOST_INPUTS] for part in samples)
    names = layers_to_look_at(model, head, inputs[:_EXAMPLES])
    if not names:
        return None
    statistics = [_ClassStatistics(head.num_classes) for _ in names]
    spoil = _spoilers(InputBox.around(inputs), torch.Generator().manual_seed(seed))

    def batches() -> Iterator[tuple[Tensor, Tensor]]:
        for x, y in zip(inputs.split(batch_size), labels.split(batch_size), strict=True):
            yield x, y
            for spoiled in spoil:
                yield spoiled(x), y
        yield from attacked

    with evaluating(model), torch.no_grad(), _taking_notes(model, names) as notes:
        for x, y in batches():
            run_model(model, x, "repair")
            for note, known in zip(notes, statistics, strict=True):
                features = note.take()
                assert features is not None  # the layer was chosen for it
                known.add(features, y)
    exits = {name: known.discriminant() for name, known in zip(names, statistics, strict=True)}
    raising = shifts_between_logits(head.weight.detach(), range(head.num_classes))
    found = EarlyExits(exits, raising.nan_to_num(nan=0.0).to(head.weight))
    return found.to(head.weight.device)


def layers_to_look_at(model: nn.Module, head: Head, example: Tensor) -> tuple[str, ...]:
    """Names of convolutions and linear layers before the head, in the order of a pass.

    Each is called once, once for every input, and to look at it changes no bit of the output. (Torch's
    own transformer layers, for one, leave their fused kernels where a hook is.)
    """
    outputs: list[tuple[str, object]] = []

    def noting(name: str) -> Callable[[nn.Module, object, object], None]:
        return lambda _module, _inputs, output: outputs.append((name, output))

    candidates = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.Conv2d | nn.Linear)
        and module is not head.module
        and not isinstance(module, torch.jit.ScriptModule)
        and "/" not in name
        and not hasattr(nn.ModuleDict(), name)  # the names that it keeps for itself
    }
    with evaluating(model), torch.no_grad():
        expected = run_model(model, example, "repair")
        handles = [m.register_forward_hook(noting(name)) for name, m in candidates.items()]
        try:
            run_model(model, example, "repair")
        finally:
            for handle in handles:
                handle.remove()
        called = [name for name, _ in outputs]
        usable = [
            name
            for name, output in outputs
            if called.count(name) == 1
            and isinstance(output, Tensor)
            and output.is_floating_point()
            and len(output) == len(example)
            and pooled(output) is not None
        ]

        def unseen(names: Iterable[str]) -> bool:
            with _taking_notes(model, names):
                return torch.equal(run_model(model, example, "repair"), expected)

        if not unseen(usable):
            usable = [name for name in usable if unseen([name])]
    if len(usable) > MOST_EXITS:
        usable = [usable[i] for i in torch.linspace(0, len(usable) - 1, MOST_EXITS).round().int()]
    return tuple(usable)


@contextlib.contextmanager
def _taking_notes(model: nn.Module, names: Iterable[str]) -> Iterator[list[LayerNote]]:
    notes, handles = [], []
    try:
        for name in names:
            notes.append(LayerNote())
            handles.append(model.get_submodule(name).register_forward_hook(notes[-1]))
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

    def add(self, features: Tensor, labels: Tensor) -> None:
        """Of features [N, F] of inputs with these labels [N]."""
        rows = features.double().cpu()
        if self._origin is None:
            self._origin = rows.mean(0)
            self._sum = rows.new_zeros(self._classes, rows.shape[1])
            self._squares = rows.new_zeros(rows.shape[1], rows.shape[1])
        rows = rows - self._origin
        own = functional.one_hot(labels.cpu(), self._classes).double()
        self._count += own.sum(0)
        self._sum += own.T @ rows
        self._squares += rows.T @ rows

    def discriminant(self) -> EarlyExit:
        """Fisher's linear one, all classes as likely: what it scores are log-likelihoods."""
        assert self._origin is not None
        total, known = self._count.sum(), self._count > 0
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
        bias = torch.where(known, bias, _NEVER)
        return EarlyExit((weight * known[:, None]).float(), bias.float())


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
