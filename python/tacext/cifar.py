"""The binary batches in which CIFAR-10 and CIFAR-100 are published."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
import torch

from .data import ImageSet
from .errors import FileError, printable

Array: TypeAlias = npt.NDArray[Any]


@dataclass(frozen=True)
class CifarFormat:
    """How one of the two data sets is laid out.

    Attributes:
        files: the batch files of each split.
        names_file: the class names, a line each.
        classes: how many classes each label byte in front of the 3072 pixels can name.
    """

    files: Mapping[str, tuple[str, ...]]
    names_file: str
    classes: tuple[int, ...]

    def is_in(self, folder: Path) -> bool:
        """Whether the first batch of any split lies in the folder."""
        return any((folder / names[0]).is_file() for names in self.files.values())


CIFAR10 = CifarFormat(
    {
        "train": tuple(f"data_batch_{i}.bin" for i in range(1, 6)),
        "test": ("test_batch.bin",),
    },
    "batches.meta.txt",
    (10,),
)
CIFAR100 = CifarFormat(
    {"train": ("train.bin",), "test": ("test.bin",)}, "fine_label_names.txt", (20, 100)
)


def load_cifar_folder(source: Path, split: str, layout: CifarFormat) -> ImageSet:
    """All batches of a split. Raises FileError: a batch is missing or damaged."""
    files = layout.files[split]
    for name in files:
        if not (source / name).is_file():
            raise FileError.of(
                "load_images",
                "path",
                expected=f"{', '.join(files)} in {source}",
                got=f"no {name}",
                way_out="complete the download, or load one .bin file by its own path",
            )
    records = [_read_records(source / name, [layout]) for name in files]
    pixels, labels = (np.concatenate(parts) for parts in zip(*records, strict=True))
    class_names = None
    if (source / layout.names_file).is_file():
        lines = (source / layout.names_file).read_text("utf-8", errors="replace").split()
        class_names = tuple(map(printable, lines)) if len(lines) == layout.classes[-1] else None
    return ImageSet(
        torch.from_numpy(pixels), torch.from_numpy(labels), class_names, f"{source}/{split}"
    )


def load_cifar_file(source: Path) -> ImageSet:
    """One batch file of either data set. Raises FileError: damaged, or of another kind."""
    pixels, labels = _read_records(source, [CIFAR10, CIFAR100])
    return ImageSet(torch.from_numpy(pixels), torch.from_numpy(labels), None, str(source))


def _read_records(source: Path, layouts: list[CifarFormat]) -> tuple[Array, Array]:
    """Splits a batch file into uint8 [N, 3, 32, 32] and int64 [N].

    The format has no mark of its own: a layout fits when the file's size and every label do.
    """
    data = np.fromfile(source, dtype=np.uint8)
    fitting = []
    for layout in layouts:
        width = len(layout.classes)
        if data.size == 0 or data.size % (width + 3072):
            continue
        records = data.reshape(-1, width + 3072)
        if (records[:, :width] < np.array(layout.classes)).all():
            pixels = records[:, width:].reshape(-1, 3, 32, 32)
            fitting.append((np.ascontiguousarray(pixels), records[:, width - 1].astype(np.int64)))
    if len(fitting) == 1:
        return fitting[0]
    sizes = " or ".join(str(len(layout.classes) + 3072) for layout in layouts)
    ranges = " or ".join("/".join(map(str, layout.classes)) for layout in layouts)
    raise FileError.of(
        "load_images",
        "path",
        expected=f"records of {sizes} bytes with labels below {ranges}",
        got=f"{source} of {data.size} bytes, "
        + ("which fits both" if fitting else "truncated or of another kind"),
        way_out="put it into a folder under its published name"
        if fitting
        else "download it again, in the binary version",
    )
