"""Labelled images from files: .npz archives, folders of class folders, CIFAR's binary batches."""

from __future__ import annotations

import logging
import os
import warnings
import zipfile
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO, TypeAlias

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image

from .cifar import CIFAR10, CIFAR100, load_cifar_file, load_cifar_folder
from .data import ImageSet, check_labels, first_not_finite
from .errors import FileError, InputError, TacextError, printable
from .files import explain

__all__ = ["load_images"]

OPERATION = "load_images"
# Few decoders, the common ones: each is code that untrusted bytes reach.
SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".webp", ".ppm", ".pgm")
FORMATS = ("PNG", "JPEG", "BMP", "WEBP", "PPM")
CHANNELS = (1, 3, 4)
LARGEST_HARMLESS, LARGEST_GROWTH = 2**28, 100  # bytes, and times the size of an archive

Array: TypeAlias = npt.NDArray[Any]
_input_error = partial(InputError.of, OPERATION)
_file_error = partial(FileError.of, OPERATION)
logger = logging.getLogger(__name__)


def load_images(
    path: str | os.PathLike[str],
    *,
    split: str | None = None,
    size: tuple[int, int] | None = None,
    need_labels: bool = True,
) -> ImageSet:
    """Loads labelled images into memory; what the path is decides how.

    - `.npz`: arrays x and y, or x_<split> and y_<split>. x is uint8 or floating, [N, H, W],
      [N, H, W, C] or [N, C, H, W] with C of 1, 3 or 4; y is integers [N]. Never unpickles.
    - a folder of class folders, <path>/<class>/*.png or <path>/<split>/<class>/*.png, also
      .jpg, .jpeg, .bmp, .webp, .ppm, .pgm, also one level down in <class>/images/. Classes count
      from 0 in the order of their names. RGB, unless every image is greyscale.
    - CIFAR-10's or CIFAR-100's binary version (fine labels): the folder, or one .bin file.

    Args:
        path: the file or folder.
        split: which part to load, where there are several.
        size: (H, W) to resize to (antialiased bilinear); for folders of images only.
        need_labels: without, an .npz may hold x alone, and a folder the images themselves, in order of
            their names; all labels are then 0.

    Returns:
        An ImageSet: uint8 images, or float32 where an .npz holds floats, which stay as they are.

    Raises:
        FileError: the path is missing, unreadable, damaged, empty or of no known kind.
        InputError: a split that does not exist or was not given, images of several sizes without
            `size`, an unclear layout, unusable dtypes or labels, NaN or infinity.
    """
    source = Path(path)
    if size is not None:
        _check_size(size)
    try:
        return _load(source, split, size, need_labels)
    except TacextError:
        raise
    except OSError as error:
        raise _file_error(
            "path",
            expected="a file or folder that can be read",
            got=f"{error.filename or source} ({explain(error)})",
            way_out="check its permissions",
        ) from error


def _load(
    source: Path, split: str | None, size: tuple[int, int] | None, need_labels: bool
) -> ImageSet:
    if source.is_dir():
        layout = next((known for known in (CIFAR10, CIFAR100) if known.is_in(source)), None)
        if layout is not None:
            chosen = _check_split(split, list(layout.files), source)
            result = load_cifar_folder(source, chosen, layout)
        else:
            return _load_folder(source, split, size, need_labels)
    elif source.is_file():
        suffix = source.suffix.lower()
        if suffix == ".npz":
            result = _load_npz(source, split, need_labels)
        elif suffix == ".bin":
            if split is not None:
                _check_split(split, [], source)
            result = load_cifar_file(source)
        else:
            raise _file_error(
                "path",
                expected="an .npz file, a CIFAR .bin file or a folder",
                got=str(source),
                way_out="convert the images to one of these",
            )
    else:
        what = "is not a regular file" if source.exists() else "does not exist"
        raise _file_error(
            "path",
            expected="an existing file or folder",
            got=f"{source}, which {what}",
            way_out="check the path",
        )
    if size is not None and tuple(result.images.shape[2:]) != tuple(size):
        raise _input_error(
            "size",
            expected=f"{tuple(result.images.shape[2:])}, the size of the images in {source}",
            got=str(tuple(size)),
            way_out="leave size out; only folders of images are resized",
        )
    return result


def _check_size(size: object) -> None:
    if (
        not isinstance(size, tuple | list)
        or len(size) != 2
        or not all(isinstance(n, int) and not isinstance(n, bool) and n > 0 for n in size)
    ):
        raise _input_error(
            "size",
            expected="two positive integers (H, W)",
            got=repr(size),
            way_out="give the height and width that the model takes",
        )


def _check_split(split: str | None, found: list[str], source: Path) -> str:
    """Refuses a split that is not there, and to guess one."""
    if split in found:
        return str(split)
    raise _input_error(
        "split",
        expected=f"one of {', '.join(map(repr, found))}" if found else "none",
        got=repr(split) if split else "none",
        way_out=f"choose a split that {source} has" if found else f"{source} has no splits",
    )


# ---- .npz ----------------------------------------------------------------------------------------


def _load_npz(source: Path, split: str | None, need_labels: bool) -> ImageSet:
    with source.open("rb") as file:
        _refuse_bomb(source, file)
        try:
            with np.load(file, allow_pickle=False) as archive:
                names = archive.files
                if not need_labels:  # those that are not there are not asked for
                    names = names + [f"y{n[1:]}" for n in names if n == "x" or n[:2] == "x_"]
                x_key, y_key = _npz_keys(names, split, source)
                x: Array = archive[x_key]
                known = y_key in archive.files
                y: Array = archive[y_key] if known else np.zeros(len(np.atleast_1d(x)), np.int64)
        except TacextError:
            raise
        except Exception as error:  # zip, zlib and numpy raise many kinds on damaged bytes
            raise _file_error(
                "path",
                expected="an .npz archive of plain arrays",
                got=f"{source} ({explain(error)})",
                way_out="write it with numpy.savez, without object arrays; nothing was unpickled",
            ) from error
    images = _to_nchw(_to_images_dtype(x, x_key), x_key)
    labels = _to_labels(y, y_key)
    if len(labels) != len(images):
        raise _input_error(
            y_key,
            expected=f"as many labels as images, {len(images)}",
            got=f"{len(labels)}",
            way_out="give one label for each image",
        )
    if images.size == 0:
        raise _file_error(
            "path",
            expected="at least 1 image",
            got=f"{source} with {x_key} of shape {list(x.shape)}",
            way_out="check how the file was written",
        )
    tensor = torch.from_numpy(images)
    _check_range(tensor, x_key, source)
    return ImageSet(tensor, labels, None, str(source))


def _refuse_bomb(source: Path, file: BinaryIO) -> None:
    """Images hardly compress: an archive that grows a hundredfold is there to fill the memory."""
    if not zipfile.is_zipfile(file):
        return  # numpy says what is wrong
    file.seek(0)
    with zipfile.ZipFile(file) as archive:
        size = sum(entry.file_size for entry in archive.infolist())
    file.seek(0)
    if size > LARGEST_HARMLESS and size > LARGEST_GROWTH * source.stat().st_size:
        raise _file_error(
            "path",
            expected="an .npz archive of images",
            got=f"{source}, which would grow to {size / 2**20:.0f} MiB in memory",
            way_out="if you trust it, write it again with numpy.savez, without compression",
        )


def _npz_keys(names: list[str], split: str | None, source: Path) -> tuple[str, str]:
    splits = sorted(n[2:] for n in names if n.startswith("x_") and f"y_{n[2:]}" in names)
    if split is None and {"x", "y"} <= set(names):
        return "x", "y"
    if split is not None and split not in splits and f"x_{split}" in names:
        raise _input_error(
            "path",
            expected=f"labels y_{split} beside x_{split}",
            got=f"{source} with {', '.join(map(repr, names[:8]))}",
            way_out=f"add them, e.g. numpy.savez(path, x_{split}=images, y_{split}=labels)",
        )
    if split is not None or splits:
        chosen = _check_split(split, splits, source)
        return f"x_{chosen}", f"y_{chosen}"
    raise _input_error(
        "path",
        expected="arrays x and y, or x_<split> and y_<split>",
        got=f"{source} with {', '.join(map(repr, names[:8])) or 'no arrays'}",
        way_out="rename the arrays, e.g. numpy.savez(path, x=images, y=labels)",
    )


def _to_images_dtype(x: Array, key: str) -> Array:
    if x.dtype == np.uint8:
        return x
    if np.issubdtype(x.dtype, np.floating):
        with np.errstate(over="ignore"):  # what float32 cannot hold is reported as infinite below
            return x.astype(np.float32)
    raise _input_error(
        key,
        expected="uint8 or a floating dtype",
        got=str(x.dtype),
        way_out="convert with .astype(numpy.uint8) for values of 0 to 255",
    )


def _to_nchw(x: Array, key: str) -> Array:
    if x.ndim == 3:
        return np.ascontiguousarray(x[:, None])
    if x.ndim == 4:
        first, last = x.shape[1] in CHANNELS, x.shape[3] in CHANNELS
        if first and not last:
            return np.ascontiguousarray(x)
        if last and not first:
            return np.ascontiguousarray(x.transpose(0, 3, 1, 2))
        if first and last:
            raise _input_error(
                key,
                expected="either axis 1 or axis 3 to be the channels",
                got=f"{list(x.shape)}, where both could be",
                way_out="pass a pair (images, labels) from Python, or save the images as files",
            )
    raise _input_error(
        key,
        expected="[N, H, W], [N, H, W, C] or [N, C, H, W] with C of 1, 3 or 4",
        got=str(list(x.shape)),
        way_out="reshape the array",
    )


def _to_labels(y: Array, key: str) -> torch.Tensor:
    if not np.issubdtype(y.dtype, np.number):
        raise _input_error(
            key,
            expected="integer labels [N]",
            got=str(y.dtype),
            way_out="give class indices, counted from 0",
        )
    # np.array: a copy of its own in the machine's byte order, which torch needs.
    return check_labels(
        torch.from_numpy(np.array(y, dtype=y.dtype.newbyteorder("="))), OPERATION, key
    )


def _check_range(images: torch.Tensor, key: str, source: Path) -> None:
    bad = first_not_finite(images)
    if bad is not None:
        raise _input_error(
            key,
            expected="finite values",
            got=f"NaN or infinity at index {bad}",
            way_out="repair or leave out that image",
        )
    low, high = float(images.min()), float(images.max())
    # Not an error: models exist that take mean-subtracted images, of -124 to 152 or -2.2 to 2.7,
    # and nothing in the file tells those from images that someone forgot to divide by 255.
    if images.is_floating_point() and (low < 0 or high > 1):
        logger.warning(
            "%s: %s: %s holds floats from %g to %g, not in [0, 1]; they are used as they are: "
            "check that the model was trained on such values; if not, divide by 255, or give uint8 images",
            OPERATION,
            key,
            source,
            low,
            high,
        )


# ---- folders of class folders --------------------------------------------------------------------


def _load_folder(
    source: Path, split: str | None, size: tuple[int, int] | None, need_labels: bool
) -> ImageSet:
    root = source
    if split is not None:
        root = source / _check_split(split, _splits(source), source)
    names = _subfolders(root)
    if not need_labels and (flat := _flat_images(root, names)):
        unlabelled = torch.from_numpy(_read_all(flat, root, size))
        return ImageSet(unlabelled, torch.zeros(len(flat), dtype=torch.int64), None, str(root))
    if not names:
        raise _file_error(
            "path",
            expected="a folder with one folder for each class, or CIFAR's binary batches",
            got=f"{root} without folders",
            way_out="arrange the images as <path>/<class>/<image>",
        )
    files = [_image_files(root / name) for name in names]
    for name, listed in zip(names, files, strict=True):
        if listed:
            continue
        # Skipping it would shift the index of every class behind it.
        if split is None and (splits := _splits(root)):
            _check_split(None, splits, source)
        raise _file_error(
            "path",
            expected=f"images ({', '.join(SUFFIXES)}) in every class folder",
            got=f"none in {root / name}",
            way_out="add images or remove the folder",
        )
    if all(name.isdecimal() for name in names) and names != sorted(names, key=int):
        logger.warning(
            "%s: path: the class folders of %s count from 0 in the order %s, as text and not as "
            "numbers; pad the names with zeros if the model counts them as numbers",
            OPERATION,
            printable(str(root)),
            printable(", ".join(names[:4])) + ", ...",
        )
    pixels = _read_all([file for listed in files for file in listed], root, size)
    labels = np.repeat(np.arange(len(names)), [len(listed) for listed in files])
    return ImageSet(
        torch.from_numpy(pixels),
        torch.from_numpy(labels).long(),
        tuple(map(printable, names)),
        str(root),
    )


def _subfolders(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.iterdir() if p.is_dir() and not p.name.startswith("."))


def _splits(root: Path) -> list[str]:
    """The folders that hold class folders with images and no images themselves."""
    return [
        name
        for name in _subfolders(root)
        if not _image_files(root / name)
        and any(_image_files(root / name / child) for child in _subfolders(root / name))
    ]


def _flat_images(root: Path, names: list[str]) -> list[Path]:
    """The images of a folder that has no others below; beside others a few would stand for all."""
    flat = _images_in(root)
    below = [name for name in names if any(_image_files(root / name)) or _subfolders(root / name)]
    if flat and below:
        raise _file_error(
            "path",
            expected="images, or folders of images",
            got=f"both in {root}",
            way_out="put them into folders of their own",
        )
    return flat


def _images_in(folder: Path) -> list[Path]:
    listed = (p for p in folder.iterdir() if p.suffix.lower() in SUFFIXES)
    return sorted(p for p in listed if p.is_file() and not p.name.startswith("."))


def _image_files(folder: Path) -> list[Path]:
    """The images of a class, also those in <class>/images/, as Tiny ImageNet keeps them."""
    for place in (folder, folder / "images"):
        if place.is_dir() and (files := _images_in(place)):
            return files
    return []


def _read_all(files: list[Path], root: Path, size: tuple[int, int] | None) -> Array:
    """uint8 [N, C, H, W], C = 1 where all are greyscale and 3 otherwise."""
    arrays: list[Array] = []
    for file in files:
        array = _read_image(file, size)
        if arrays and array.shape[:2] != arrays[0].shape[:2]:
            shapes = [
                f"{f.name} of {a.shape[:2]}" for f, a in ((files[0], arrays[0]), (file, array))
            ]
            raise _input_error(
                "size",
                expected=f"images of one size in {root}",
                got=" and ".join(shapes),
                way_out="give size=(H, W), or --size on the command line, to resize them",
            )
        arrays.append(array)
    channels = max(array.shape[2] for array in arrays)
    stacked = np.empty((len(arrays), channels, *arrays[0].shape[:2]), dtype=np.uint8)
    for target, array in zip(stacked, arrays, strict=True):
        target[:] = array.transpose(2, 0, 1)  # greyscale among RGB spreads over the channels
    return stacked


def _read_image(file: Path, size: tuple[int, int] | None) -> Array:
    """uint8 [H, W, 1] for greyscale, [H, W, 3] for all else."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(file, formats=FORMATS) as image:
                if image.mode == "F" or image.mode.startswith("I"):
                    raise ValueError(f"mode {image.mode}: more than 8 bits a channel")
                decoded = image.convert("L" if image.mode == "L" else "RGB")
                if size is not None:
                    decoded = decoded.resize((size[1], size[0]), Image.Resampling.BILINEAR)
                array = np.asarray(decoded)
    except Exception as error:  # each of Pillow's decoders raises kinds of its own
        raise _file_error(
            "path",
            expected="a whole 8-bit image",
            got=f"{file} ({explain(error)})",
            way_out="replace or remove that file",
        ) from error
    return array.reshape(*array.shape[:2], -1)
