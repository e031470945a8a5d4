"""Writes real heads for the benchmarks: of published models, and of a network trained here.

    python benchmarks/make_heads.py --output DIR [--models FOLDER] [--tinyimagenet TAR]

FOLDER holds a zoo.py with MODELS and load(name, n, clean); TAR holds
tinyimagenet/{train,val}/CLASS/*.JPEG. Neither is part of this project. Each file has `weight`
[C, D], `bias` [C] and the `latents` [N, D] of clean images: `run.py --heads DIR` takes them.
"""

from __future__ import annotations

import argparse
import importlib
import io
import sys
import tarfile
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional

from networks import ResNet
from tacext.heads import find_head, recording_latents

CLEAN_IMAGES = 2500
_SIZE = 32
_BATCH = 128
_CHANNELS_LAST = torch.channels_last


def save_head(path: Path, head: nn.Module, latents: Tensor, about: dict[str, str]) -> None:
    """Writes the file that `problems.load_heads` reads."""
    weight = head.get_parameter("weight").detach().flatten(1).float()
    bias = head.get_parameter("bias").detach().float()
    tensors = {"weight": weight, "bias": bias, "latents": latents.float()}
    save_file({name: t.contiguous() for name, t in tensors.items()}, path, about)
    print(f"{path.name}: {len(weight)} x {weight.shape[1]}, {len(latents)} images, {about}")


@torch.no_grad()
def latents_of(model: nn.Module, images: Tensor) -> tuple[nn.Module, Tensor, Tensor]:
    """The head's layer, and the latents and logits of all images."""
    head = find_head(model, images[:4])
    latents, logits = [], []
    with recording_latents(head) as recorder:
        for batch in torch.split(images, 250):
            logits.append(model(batch))
            latents.append(recorder.take())
    return head.module, torch.cat(latents), torch.cat(logits)


def accuracy(logits: Tensor, labels: Tensor) -> str:
    """As the file's description has it."""
    return f"{float((logits.argmax(1) == labels).double().mean()):.3f}"


def published_heads(folder: str, output: Path) -> None:
    """One file for each published model."""
    sys.path.insert(0, folder)
    zoo = importlib.import_module("zoo")
    for name in zoo.MODELS:
        case = zoo.load(name, n=10, clean=CLEAN_IMAGES)
        head, latents, logits = latents_of(case.model, case.x_clean)
        about = {"model": name, "accuracy": accuracy(logits, case.y_clean)}
        save_head(output / f"{name}.safetensors", head, latents, about)


@dataclass(frozen=True)
class _Images:
    """Images [N, 3, size, size] in uint8 with their labels."""

    images: Tensor
    labels: Tensor


def read_tinyimagenet(archive: Path) -> dict[str, _Images]:
    """The `train` and `val` images at half their size."""
    found: dict[str, list[tuple[str, Image.Image]]] = {"train": [], "val": []}
    with tarfile.open(archive) as tar:
        for member in tar:
            parts = Path(member.name).parts
            file = tar.extractfile(member) if member.name.endswith(".JPEG") else None
            if file is None:
                continue
            image = Image.open(io.BytesIO(file.read())).convert("RGB")
            shrunk = image.resize((_SIZE, _SIZE), Image.Resampling.BOX)
            found[parts[-3]].append((parts[-2], shrunk))
    order = {name: i for i, name in enumerate(sorted({name for name, _ in found["train"]}))}
    return {
        split: _Images(
            torch.from_numpy(np.stack([np.asarray(x) for _, x in items])).permute(0, 3, 1, 2),
            torch.tensor([order[name] for name, _ in items]),
        )
        for split, items in found.items()
    }


def _prepare(images: Tensor) -> Tensor:
    return ((images.float() / 255 - 0.45) / 0.27).contiguous(memory_format=_CHANNELS_LAST)


def _augment(images: Tensor, generator: torch.Generator) -> Tensor:
    """Flips half of the images and shifts each batch by up to four pixels."""
    flipped = torch.rand(len(images), generator=generator) < 0.5
    images = torch.where(flipped[:, None, None, None], images.flip(3), images)
    x, y = (int(torch.randint(9, (), generator=generator)) for _ in range(2))
    return functional.pad(images, (4, 4, 4, 4))[:, :, y : y + _SIZE, x : x + _SIZE]


def train(data: _Images, classes: int, epochs: int) -> ResNet:
    """A small residual network with 512 latents, from a fixed seed."""
    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(0)
    model = ResNet(classes, (32, 64, 128, 512), blocks=1)
    model.to(memory_format=_CHANNELS_LAST)  # type: ignore[call-overload]  # torch's stub lacks it
    optimizer = torch.optim.SGD(
        model.parameters(), lr=0.1, momentum=0.9, weight_decay=5e-4, nesterov=True
    )
    steps = epochs * (len(data.labels) // _BATCH)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.1, steps)
    begin = time.perf_counter()
    for epoch in range(epochs):
        order = torch.randperm(len(data.labels), generator=generator)
        total = 0.0
        for index in torch.split(order, _BATCH)[: len(data.labels) // _BATCH]:
            images = _augment(_prepare(data.images[index]), generator)
            with torch.autocast("cpu", torch.bfloat16):  # twice as fast where the CPU has it
                loss = functional.cross_entropy(model(images), data.labels[index])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            total += float(loss.detach())
        mean = total * epochs / steps
        passed = time.perf_counter() - begin
        print(f"epoch {epoch + 1}/{epochs}: loss {mean:.3f}, {passed:.0f} s", flush=True)
    model.eval()
    return model


def trained_head(archive: Path, output: Path, epochs: int) -> None:
    """Trains on the 200 classes and writes the head with latents of images it has not seen."""
    data = read_tinyimagenet(archive)
    model = train(data["train"], int(data["train"].labels.max()) + 1, epochs)
    held_out = data["val"]
    head, latents, logits = latents_of(model, _prepare(held_out.images))
    keep = torch.randperm(len(latents), generator=torch.Generator().manual_seed(0))[:CLEAN_IMAGES]
    about = {
        "model": f"ResNet, widths 32-64-128-512, {epochs} epochs of TinyImageNet at 32x32, seed 0",
        "accuracy": accuracy(logits, held_out.labels),
    }
    save_head(output / "tinyimagenet_resnet.safetensors", head, latents[keep], about)


def main() -> None:
    """Writes what the command line names."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--output", type=Path, required=True, metavar="DIR")
    parser.add_argument("--models", metavar="FOLDER", help="folder of zoo.py")
    parser.add_argument("--tinyimagenet", type=Path, metavar="TAR")
    parser.add_argument("--epochs", type=int, default=16, help="of the training (%(default)s)")
    options = parser.parse_args()
    options.output.mkdir(parents=True, exist_ok=True)
    if options.models:
        published_heads(options.models, options.output)
    if options.tinyimagenet:
        trained_head(options.tinyimagenet, options.output, options.epochs)


if __name__ == "__main__":
    main()
