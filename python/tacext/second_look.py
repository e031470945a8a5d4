"""The second look of a scan: evidence of changed inputs, from a few of the clean samples.

A thorough scan asks gradients as well, a fast one runs the model forward alone.

Of heads with very many classes only those with the smallest norms are looked at, beside others to
compare them with.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from .corner_patches import FEWEST_IMAGES, CornerPatches, corner_patches
from .differentiable import DifferentiableModel, InputBox
from .errors import InputError, counted
from .heads import Head
from .patch_reach import PatchReach, has_room, patch_reach
from .reach import BUDGETS, Reach, reach
from .sample_keeper import MOST_BYTES
from .shuffle import FEWEST_IMAGES_A_CLASS, Shuffle, shuffle
from .source_patch import SourcePatch, source_patch
from .waves import Waves, has_waves, waves

_FloatArray = npt.NDArray[np.float64]

HELD_OUT_SHARE = 0.25
# Fewer tell nothing of a change that is made on some and measured on others.
FEWEST_KEPT = 40

# Of more classes than this, the half with the smallest norms and as many others are looked at.
MOST_CLASSES = 64

# A shuffle may be this much longer than the longest change that single classes needed. Chosen on the
# bench: the four all-to-all models that it finds needed just that, longer ones only cost time.
_LONGER = 2.0

# Below these gains and margins are nothing to compare: one near zero has no logarithm. Margins as a
# share of the median class's, whatever the scale of the logits.
_SMALLEST_GAIN = 0.01
_SMALLEST_MARGIN = 0.05
# Of fewer held-out images a share is no more than a guess: of 21 all move by chance a third of the
# time where 94 % do.
FEWEST_IMAGES_OF_SHARES = 100


@dataclass(frozen=True, eq=False)
class SecondLook:
    """What changed inputs show.

    Attributes:
        classes: those that were looked at, ascending.
        reach: universal changes into each class; None where gradients were not asked, and then so are
            patch, shuffle and source.
        patch: universal patches into each class; None where inputs are no images with room for one.
        shuffle: the best shuffle of the classes; None without samples enough of every class.
        source: the patch that leads a single class astray; None without room for patches, or without
            samples enough of single classes.
        waves: what faint waves do; None without room for them, of few samples and of many classes.
        corners: random squares in the corners; None without room for them, and of few samples.
        seconds: altogether.
        notes: what could not be tried, though there was room for it, and why.
    """

    classes: tuple[int, ...]
    reach: Reach | None = field(repr=False)
    patch: PatchReach | None = field(repr=False)
    shuffle: Shuffle | None = field(repr=False)
    source: SourcePatch | None = field(repr=False)
    waves: Waves | None = field(repr=False)
    corners: CornerPatches | None = field(repr=False)
    seconds: float
    notes: tuple[str, ...] = ()


def classes_to_look_at(norm: _FloatArray, balanced: _FloatArray | None = None) -> tuple[int, ...]:
    """All classes; of more than `MOST_CLASSES` those with the smallest norms of either kind, and others."""
    count = len(norm)
    if count <= MOST_CLASSES:
        return tuple(range(count))
    ranks = np.full(count, count)
    for norms in (norm,) if balanced is None else (norm, balanced):
        # What was not solved is looked at first, what is out of reach last.
        order = np.argsort(np.where(np.isnan(norms), -np.inf, norms), kind="stable")
        ranks[order] = np.minimum(ranks[order], np.arange(count))
    order = np.argsort(ranks, kind="stable")
    half = MOST_CLASSES // 2
    others = order[half:][np.linspace(0, count - half - 1, half).round().astype(int)]
    return tuple(sorted({*order[:half].tolist(), *others.tolist()}))


def split_samples(
    samples: tuple[Tensor, Tensor], operation: str
) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """Those to make changes on, and those to measure them on.

    Args:
        samples: clean inputs [N, ...] and labels [N] in a random order.
        operation: named in errors.

    Raises:
        InputError: too few samples, or of one class.
    """
    inputs, labels = (part.clone() for part in samples)  # of inference mode, perhaps
    held = round(HELD_OUT_SHARE * len(labels))
    fit, held_out = (inputs[held:], labels[held:]), (inputs[:held], labels[:held])
    if len(labels) < FEWEST_KEPT or min(len(fit[1].unique()), len(held_out[1].unique())) < 2:
        raise InputError.of(
            operation,
            "data",
            expected=f"{FEWEST_KEPT} samples of several classes to change, {MOST_BYTES >> 20} MiB at most",
            got=f"{counted(len(labels), 'sample')} of "
            f"{counted(len(labels.unique()), 'class', 'classes')}",
            way_out="use more samples, of all classes, or smaller ones",
        )
    return fit, held_out


def shuffle_budgets(reached: Sequence[float]) -> tuple[float, ...]:
    """Those that a shuffle is tried with, given those that reach went through."""
    return tuple(b for b in BUDGETS if b <= _LONGER * reached[-1])


def changes_and_patches(
    model: DifferentiableModel,
    box: InputBox,
    fit: tuple[Tensor, Tensor],
    held_out: tuple[Tensor, Tensor],
    classes: tuple[int, ...],
    batch_size: int,
    seed: int,
    progress: bool | None,
) -> tuple[Reach, PatchReach | None]:
    """What drives the samples into each class: `reach` and, where there is room, `patch_reach`."""
    found = reach(
        model,
        box,
        fit,
        held_out,
        classes,
        batch_size=batch_size,
        seed=seed,
        progress=progress,
    )
    patched = None
    if has_room(box.shape):
        patched = patch_reach(
            model,
            box,
            fit,
            held_out,
            found,
            batch_size=batch_size,
            seed=seed,
            progress=progress,
        )
    return found, patched


@torch.inference_mode(False)
def look_again(
    model: nn.Module,
    head: Head,
    samples: tuple[Tensor, Tensor],
    classes: tuple[int, ...],
    by_class: tuple[Tensor, Tensor] | None = None,
    *,
    batch_size: int = 128,
    operation: str = "scan",
    seed: int = 0,
    progress: bool | None = None,
) -> SecondLook:
    """Gathers all evidence, that which needs gradients first.

    Args:
        model: the classifier; it is left as it was.
        head: of the model.
        samples: clean inputs [N, ...] and labels [N] in a random order.
        classes: to look at.
        by_class: as the samples, with as many of rare classes as of frequent ones, of at most
            `MOST_CLASSES` classes; None to look for no backdoor of single classes.
        batch_size: inputs in a pass, at most.
        operation: named in errors.
        seed: of all random choices.
        progress: whether to show progress bars; None shows them on a terminal.

    Raises:
        NoGradientError: the model has no gradients with respect to its inputs.
        InputError: too few samples, or of one class; inputs that are changed a little are rejected,
            do not fit into memory or give NaN or infinity.
    """
    begin = time.perf_counter()
    notes: list[str] = []
    fit, held_out = split_samples(samples, operation)
    box = InputBox.around(samples[0])
    with_gradients = DifferentiableModel(model, head, operation)
    found, patched = changes_and_patches(
        with_gradients, box, fit, held_out, classes, batch_size, seed, progress
    )
    shuffled = None
    if len(held_out[1]) >= FEWEST_IMAGES_A_CLASS * head.num_classes:
        shuffled = shuffle(
            with_gradients,
            box,
            fit,
            held_out,
            budgets=shuffle_budgets(found.budgets),
            batch_size=batch_size,
            seed=seed,
            progress=progress,
        )
    led = None
    if by_class is not None and has_room(box.shape) and head.num_classes <= MOST_CLASSES:
        try:
            led = source_patch(
                with_gradients,
                box,
                (by_class[0].clone(), by_class[1].clone()),  # of inference mode, perhaps
                batch_size=batch_size,
                seed=seed,
                progress=progress,
            )
        except InputError as error:  # what was gathered before stands
            notes.append(f"no search for backdoors of single classes ({error})")
    waved, cornered = _forward_alone(
        with_gradients, box, samples, classes, batch_size, seed, progress, notes
    )
    seconds = time.perf_counter() - begin
    return SecondLook(
        classes, found, patched, shuffled, led, waved, cornered, seconds, tuple(notes)
    )


@torch.inference_mode(False)
def look_without_gradients(
    model: nn.Module,
    head: Head,
    samples: tuple[Tensor, Tensor],
    classes: tuple[int, ...],
    *,
    batch_size: int = 128,
    operation: str = "scan",
    seed: int = 0,
    progress: bool | None = None,
) -> tuple[SecondLook | None, tuple[str, ...]]:
    """Gathers the evidence that takes no more than passes forward; arguments as of `look_again`.

    Returns:
        The look, and why there is none, or no more of it, though there was room for more.
    """
    begin = time.perf_counter()
    notes: list[str] = []
    if not len(samples[1]):
        return None, ()
    box = InputBox.around(samples[0])
    forward = DifferentiableModel(model, head, operation, gradients=False)
    waved, cornered = _forward_alone(
        forward, box, samples, classes, batch_size, seed, progress, notes
    )
    if cornered is None:  # norms and waves alone are nothing to join
        return None, tuple(notes)
    seconds = time.perf_counter() - begin
    told = tuple(notes)
    return SecondLook(classes, None, None, None, None, waved, cornered, seconds, told), told


def _forward_alone(
    model: DifferentiableModel,
    box: InputBox,
    samples: tuple[Tensor, Tensor],
    classes: tuple[int, ...],
    batch_size: int,
    seed: int,
    progress: bool | None,
    notes: list[str],
) -> tuple[Waves | None, CornerPatches | None]:
    """Waves and squares in the corners; a note of what had room and could not be tried."""
    # Of inference mode, perhaps; these few are all that is looked at.
    few = samples[0][:FEWEST_IMAGES].clone(), samples[1][:FEWEST_IMAGES].clone()
    waved = cornered = None
    if has_waves(box.shape) and model.head.num_classes <= MOST_CLASSES:
        try:
            waved = waves(model, box, few, batch_size=batch_size, progress=progress)
        except InputError as error:
            notes.append(f"no waves were tried ({error})")
    if not has_room(box.shape):
        return waved, None
    if len(few[1]) < FEWEST_IMAGES:
        kept = counted(len(few[1]), "image")
        notes.append(
            f"no squares in the corners were tried, which takes {FEWEST_IMAGES} images (got {kept}; at "
            f"most {MOST_BYTES >> 20} MiB of them are kept)"
        )
        return waved, None
    try:
        cornered = corner_patches(
            model, box, few, classes, batch_size=batch_size, seed=seed, progress=progress
        )
    except InputError as error:
        notes.append(f"no squares in the corners were tried ({error})")
    return waved, cornered


def norm_evidence(norm: _FloatArray) -> _FloatArray:
    """-log r_k, [C]: how suspicious each norm is; NaN where it says nothing."""
    usable = np.isfinite(norm) & (norm > 0)
    return np.where(usable, -np.log(np.where(usable, norm, 1.0)), np.nan)


def reach_evidence(gain: _FloatArray) -> _FloatArray:
    """Mean logarithm of gains [B, J] over the budgets, [J]."""
    evidence: _FloatArray = np.log(np.maximum(gain, _SMALLEST_GAIN)).mean(0)
    return evidence


# Gains of squares in corners are often none at all: what is added to them has them count as equal.
_SMALL_GAIN = 0.1


def corner_evidence(gain: _FloatArray) -> _FloatArray:
    """Mean logarithm of gains [S, J] over the sizes of the squares, [J]; small ones count alike."""
    evidence: _FloatArray = np.log(np.maximum(gain, 0.0) + _SMALL_GAIN).mean(0)
    return evidence


def share_evidence(rate: _FloatArray, images: int) -> _FloatArray:
    """Empirical logits of shares [J] of about so many images: of none and of all as finite as these tell."""
    moved = rate * images
    evidence: _FloatArray = np.log((moved + 0.5) / (images - moved + 0.5))
    return evidence


def margin_evidence(margin: _FloatArray) -> _FloatArray:
    """Logarithm of mean margins [J], in units of the median class's; zeros where that has none."""
    usual = float(np.median(margin))
    if not usual > 0:
        return np.zeros(len(margin))
    evidence: _FloatArray = np.log(np.maximum(margin / usual, _SMALLEST_MARGIN))
    return evidence


def evidence_of(
    norm: _FloatArray, look: SecondLook, balanced: _FloatArray | None = None
) -> Mapping[str, _FloatArray]:
    """One number a class and kind, [C], as the joint test wants it; NaN where not looked at.

    Args:
        norm: r_k of all classes, [C].
        look: the second look.
        balanced: r_k in the balanced metric, [C]; None where there are none.
    """

    def of_all(values: _FloatArray) -> _FloatArray:
        every = np.full(len(norm), np.nan)
        every[list(look.classes)] = values
        return every

    evidence = {"norm": norm_evidence(norm)}
    if balanced is not None:
        evidence["balanced"] = norm_evidence(balanced)
    if look.reach is not None:
        evidence["reach"] = of_all(reach_evidence(look.reach.gain.numpy()))
    if look.corners is not None:
        evidence["corner"] = of_all(corner_evidence(look.corners.gain.numpy()))
    patch = look.patch
    if patch is not None and look.reach is not None and patch.images >= FEWEST_IMAGES_OF_SHARES:
        evidence["share"] = of_all(share_evidence(look.reach.rate[-1].numpy(), patch.images))
        evidence["patch"] = of_all(share_evidence(patch.rate.numpy(), patch.images))
    return evidence
