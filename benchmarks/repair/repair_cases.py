"""Models to repair, each with the defender's clean images and others to measure with."""

from __future__ import annotations

import functools
import importlib
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parent.parent / "detection"))
sys.path.append(str(Path(__file__).resolve().parent.parent))

import images
import torch
from clean_images import Augment, CleanImages
from make_zoo import load_attacks, load_model, read_record
from torch import Tensor, nn

from tacext import Evaluation, evaluate
from tacext.attacks import AllToOne, Attack
from tacext.evaluation import measured

MOST_SAMPLES = 2500  # images beyond these are never given to a defender
MEASURED = 3000  # of the others

# What published triggers are called here.
_PUBLISHED = {
    "white_4x4": "badnets",
    "white_5x5_corner": "badnets",
    "checkerboard_3x3": "checkerboard",
    "trojan_square": "trojan_square",
}


@dataclass(frozen=True, eq=False)
class RepairCase:
    """A model, the images around it, and the attacks behind it.

    Attributes:
        name: of the model.
        attack: what kind; "clean" where there is none.
        dataset, network: what it was trained on, and which kind it is.
        model: in evaluation mode.
        pool: test images that a defender may be given, float32 [2500, C, H, W] in [0, 1].
        pool_labels: their labels.
        measured: other test images, at most 3,000, with labels.
        attacks: behind the model; none for a clean one.
        targets: the poisoned classes; for a clean model the class that is wrongly repaired, drawn
            from its seed.
        augment: shifts and flips a batch, as in training.
    """

    name: str
    attack: str
    dataset: str
    network: str
    model: nn.Module
    pool: Tensor
    pool_labels: Tensor
    measured: tuple[Tensor, Tensor]
    attacks: tuple[Attack, ...]
    targets: tuple[int, ...]
    augment: Augment

    def clean(self, samples: int, seed: int) -> CleanImages:
        """The first of the pool; all removals get the same."""
        return CleanImages(self.pool[:samples], self.pool_labels[:samples], self.augment, seed=seed)

    def measure(self, model: nn.Module) -> list[Evaluation]:
        """On images that no defender has seen: of each attack, or of none."""
        if not self.attacks:
            return [measured(model, self.measured, lambda x: x, 0, progress=False)[0]]
        return [
            evaluate(model, self.measured, attack.trigger, attack.goal, progress=False)
            for attack in self.attacks
        ]


def _augment(dataset: str) -> Augment:
    shift, flip = 1 if dataset == "mnist" else 3, dataset in ("cifar10", "tinyimagenet")
    return functools.partial(_shifted, shift=shift, flip=flip)


def _shifted(batch: Tensor, generator: torch.Generator, shift: int, flip: bool) -> Tensor:
    return images.augment(batch, generator, shift, flip)


def _parts(count: int, seed: int) -> tuple[Tensor, Tensor]:
    """Indices of the pool, and of what is measured on."""
    order = torch.randperm(count, generator=torch.Generator().manual_seed(seed))
    return order[:MOST_SAMPLES], order[MOST_SAMPLES : MOST_SAMPLES + MEASURED]


def of_the_zoo(name: str, data_folder: Path, zoo: Path, seed: int) -> RepairCase:
    """A model of the detection bench; the seed splits the test images."""
    record = read_record(zoo / f"{name}.json")
    spec = record.spec
    data = images.load(spec.dataset, data_folder)
    pool, measured = _parts(len(data.test), seed)
    clean = spec.attack == "clean"
    wrong = ((3 * spec.seed + 1) % data.num_classes,)
    return RepairCase(
        name,
        spec.attack,
        spec.dataset,
        spec.network,
        load_model(spec, data, zoo),
        data.test.images[pool].float() / 255,
        data.test.labels[pool],
        (data.test.images[measured].float() / 255, data.test.labels[measured]),
        load_attacks(spec, data, zoo),
        wrong if clean else record.targets,
        _augment(spec.dataset),
    )


def published(name: str, folder: Path, seed: int) -> RepairCase:
    """A model of FOLDER/zoo.py, with the test images that it loads."""
    sys.path.insert(0, str(folder))
    module = importlib.import_module("zoo")
    entry, case = module.MODELS[name], module.load(name, n=None, clean=1)
    pool, measured = _parts(len(case.y), seed)
    is_clean = case.target is None
    attacks = () if is_clean else (Attack(entry.trigger, AllToOne(case.target)),)
    return RepairCase(
        name,
        "clean" if is_clean else _PUBLISHED[entry.trigger.__name__],
        entry.dataset,
        entry.factory.__name__,
        case.model,
        case.x[pool],
        case.y[pool],
        (case.x[measured], case.y[measured]),
        attacks,
        (1,) if is_clean else (case.target,),
        _augment(entry.dataset),
    )


def names(zoo: Path, models: Path | None, clean: bool, only: Sequence[str]) -> list[str]:
    """Of usable models, published ones first: the clean ones, or those with a backdoor."""
    found = []
    if models is not None:
        sys.path.insert(0, str(models))
        entries = importlib.import_module("zoo").MODELS
        found = [n for n, entry in entries.items() if (entry.target is None) == clean]
    records = [read_record(file) for file in sorted(zoo.glob("*.json"))]
    found += [r.spec.name for r in records if r.usable and (r.spec.attack == "clean") == clean]
    return [name for name in found if any(text in name for text in only)]
