"""The zoo's data: CIFAR-10, GTSRB and MNIST as .npz, TinyImageNet as a tar of JPEG files."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

import tacext
from tacext import ImageSet

SIZE = 32  # of TinyImageNet, which is halved; the others keep theirs


@dataclass(frozen=True, eq=False)
class Data:
    """Training images and test images of one source, uint8 [N, C, H, W]."""

    name: str
    train: ImageSet
    test: ImageSet

    @property
    def num_classes(self) -> int:
        """How many classes the training labels have."""
        return int(self.train.labels.max()) + 1

    @property
    def channels(self) -> int:
        """1 or 3."""
        return self.train.images.shape[1]

    @property
    def size(self) -> int:
        """Pixels along each side."""
        return self.train.images.shape[2]


@functools.lru_cache(maxsize=2)
def load(name: str, folder: Path) -> Data:
    """Reads FOLDER/NAME.npz, or FOLDER/tinyimagenet.tar."""
    if name == "tinyimagenet":
        from make_heads import read_tinyimagenet

        parts = read_tinyimagenet(folder / "tinyimagenet.tar")
        return Data(name, *(ImageSet(parts[k].images, parts[k].labels) for k in ("train", "val")))
    file = str(folder / f"{name}.npz")
    return Data(name, *(tacext.load_images(file, split=split) for split in ("train", "test")))


def augment(images: Tensor, generator: torch.Generator, shift: int, flip: bool) -> Tensor:
    """Shifts each batch by up to `shift` pixels and flips half of its images."""
    if flip:
        flipped = torch.rand(len(images), generator=generator) < 0.5
        images = torch.where(flipped[:, None, None, None], images.flip(3), images)
    y, x = (int(torch.randint(2 * shift + 1, (), generator=generator)) for _ in range(2))
    height, width = images.shape[2:]
    padded = torch.nn.functional.pad(images, (shift,) * 4, mode="replicate")
    return padded[:, :, y : y + height, x : x + width]
