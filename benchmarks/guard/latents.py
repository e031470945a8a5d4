"""The latents of a model on clean and on triggered images, computed once and kept in a folder."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parent.parent / "repair"))

import torch
from repair_cases import MOST_SAMPLES, RepairCase, of_the_zoo, published
from safetensors.torch import load_file, save_file
from torch import Tensor

from tacext.heads import Head, find_head, recording_latents

BATCH = 256


@dataclass(frozen=True, eq=False)
class Latents:
    """What a guard sees of a model.

    Attributes:
        name, attack, dataset, network: of the model; "clean" where there is no attack.
        weight: float32 [C, D], of the head.
        bias: float32 [C].
        clean: float32 [2500, D], of images that a guard may be fitted on.
        labels: int64 [2500].
        measured: float32 [3000, D], of other clean images.
        triggered: for each attack float32 [V, D], of its victims among the latter with the trigger.
        goals: for each attack int64 [V], the class it sends each to.
    """

    name: str
    attack: str
    dataset: str
    network: str
    weight: Tensor
    bias: Tensor
    clean: Tensor
    labels: Tensor
    measured: Tensor
    triggered: tuple[Tensor, ...]
    goals: tuple[Tensor, ...]


def _latents(case: RepairCase, head: Head, images: Tensor) -> Tensor:
    found = []
    with torch.no_grad(), recording_latents(head) as recorded:
        for batch in images.split(BATCH):
            case.model(batch.contiguous(memory_format=torch.channels_last))
            found.append(recorded.take().float())
    return torch.cat(found)


def _compute(case: RepairCase) -> dict[str, Tensor]:
    head = find_head(case.model, case.pool[:4])
    bias = head.module.bias
    images, labels = case.measured
    tensors = {
        "weight": head.weight.detach().float(),
        "bias": torch.zeros(head.num_classes) if bias is None else bias.detach().float(),
        "clean": _latents(case, head, case.pool),
        "labels": case.pool_labels,
        "measured": _latents(case, head, images),
    }
    for j, attack in enumerate(case.attacks):
        victims = attack.goal.victims(labels)
        tensors[f"triggered.{j}"] = _latents(case, head, attack.trigger(images[victims]))
        tensors[f"goals.{j}"] = attack.goal(labels[victims])
    return {name: tensor.contiguous() for name, tensor in tensors.items()}


def latents_of(name: str, folder: Path, data: Path, zoo: Path, models: Path | None) -> Latents:
    """The latents of one model, from the folder where they are there already."""
    file = folder / f"{name}.safetensors"
    about = folder / f"{name}.txt"
    if not file.exists():
        if (zoo / f"{name}.json").exists():
            case = of_the_zoo(name, data, zoo, seed=0)
        else:
            assert models is not None
            case = published(name, models, seed=0)
        folder.mkdir(parents=True, exist_ok=True)
        about.write_text(f"{case.attack}\n{case.dataset}\n{case.network}\n", encoding="utf-8")
        unfinished = file.with_suffix(".part")
        save_file(_compute(case), unfinished)
        unfinished.rename(file)
    tensors = load_file(file)
    attack, dataset, network = about.read_text(encoding="utf-8").split()
    attacks = sum(key.startswith("triggered.") for key in tensors)
    assert len(tensors["clean"]) == MOST_SAMPLES
    return Latents(
        name,
        attack,
        dataset,
        network,
        weight=tensors["weight"],
        bias=tensors["bias"],
        clean=tensors["clean"],
        labels=tensors["labels"],
        measured=tensors["measured"],
        triggered=tuple(tensors[f"triggered.{j}"] for j in range(attacks)),
        goals=tuple(tensors[f"goals.{j}"] for j in range(attacks)),
    )
