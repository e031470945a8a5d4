"""Labelled images, from whatever the caller holds them in, as checked batches."""

from __future__ import annotations

import operator
from collections.abc import Iterable, Iterator, Mapping, Sequence, Sized
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, IterableDataset, default_collate

from .errors import InputError

__all__ = ["DataLike", "ImageSet", "as_batches", "check_labels", "materialise"]


def check_labels(labels: Tensor, operation: str, argument: str) -> Tensor:
    """Checks class indices and returns them as int64.

    Args:
        labels: any tensor.
        operation: named in the error.
        argument: named in the error.

    Returns:
        int64 [N], on the device of `labels`.

    Raises:
        InputError: not one dimension, not integers, or a negative class.
    """
    expected = "integer labels [N]"
    if labels.dim() != 1:
        one_hot = labels.dim() == 2 and labels.shape[1] > 1
        raise InputError.of(
            operation,
            argument,
            expected=expected,
            got=f"shape {list(labels.shape)}",
            way_out="turn one-hot rows into classes with .argmax(1)"
            if one_hot
            else "give one class index for each image, e.g. with .reshape(-1)",
        )
    if labels.is_floating_point() or labels.is_complex() or labels.dtype == torch.bool:
        raise InputError.of(
            operation,
            argument,
            expected=expected,
            got=str(labels.dtype).removeprefix("torch."),
            way_out="convert class indices with .long()",
        )
    classes = labels.long()
    if classes.numel() and int(classes.min()) < 0:
        first = int((classes < 0).nonzero()[0])
        raise InputError.of(
            operation,
            argument,
            expected="class indices of 0 or more",
            got=f"{int(classes[first])} at index {first}",
            way_out="count classes from 0 and leave unlabelled images out",
        )
    return classes


def first_not_finite(images: Tensor) -> int | None:
    """The index of the first sample [N, ...] that holds NaN or infinity; None where none does."""
    if not images.is_floating_point() or bool(torch.isfinite(images).all()):
        return None
    finite = torch.isfinite(images).reshape(len(images), -1).all(dim=1)
    return int((~finite).nonzero()[0])


def check_seed(operation: str, seed: object) -> int:
    """The seed as an int. Raises InputError unless it is a whole number from 0 to 2^31 - 1."""
    if not isinstance(seed, int | np.integer) or isinstance(seed, bool) or not 0 <= seed < 2**31:
        raise InputError.of(
            operation,
            "seed",
            expected="a whole number from 0 to 2**31 - 1",
            got=repr(seed),
            way_out="leave it out for 0",
        )
    return int(seed)


def check_positive(operation: str, argument: str, value: object, at_most: int | None) -> int:
    """The value as an int. Raises InputError unless it is a whole number of 1 or more."""
    if (
        not isinstance(value, int | np.integer)
        or isinstance(value, bool)
        or value < 1
        or (at_most is not None and value > at_most)
    ):
        span = "1 or more" if at_most is None else f"1 to {at_most}"
        raise InputError.of(
            operation,
            argument,
            expected=f"an integer, {span}",
            got=repr(value),
            way_out=f"give a number of samples, {span}",
        )
    return int(value)


def as_index(value: object) -> int | None:
    """A class index, of Python, numpy or torch, as an int; None where it is no whole number."""
    if isinstance(value, bool | np.bool_) or getattr(value, "dtype", None) is torch.bool:
        return None
    try:
        return operator.index(value)  # type: ignore[arg-type]
    except (TypeError, ValueError):
        return None


def _to_float(images: Tensor) -> Tensor:
    return images.float() / 255 if images.dtype == torch.uint8 else images


@dataclass(frozen=True, eq=False)
class ImageSet:
    """Labelled images in memory.

    Attributes:
        images: [N, C, H, W], uint8 (kept so, a quarter of the memory) or float32.
        labels: int64 [N], 0 or more.
        class_names: the name of each class index, where the source has names.
        source: where the images are from, for reports.
    """

    images: Tensor = field(repr=False)
    labels: Tensor = field(repr=False)
    class_names: tuple[str, ...] | None = None
    source: str = "memory"

    def __repr__(self) -> str:
        kind = str(self.images.dtype).removeprefix("torch.")
        shape = "x".join(map(str, self.images.shape[1:]))
        return f"ImageSet({len(self)} images of {shape}, {kind}, from {self.source})"

    def __post_init__(self) -> None:
        """Checks shapes, dtypes and the range of the labels.

        Raises:
            InputError: see the attributes; also labels without a name where there are names.
        """
        for argument, value in (("images", self.images), ("labels", self.labels)):
            if not isinstance(value, Tensor):
                raise InputError.of(
                    "ImageSet",
                    argument,
                    expected="a torch.Tensor",
                    got=type(value).__name__,
                    way_out="convert it with torch.as_tensor",
                )
        if self.images.dim() != 4 or self.images.dtype not in (torch.uint8, torch.float32):
            raise InputError.of(
                "ImageSet",
                "images",
                expected="[N, C, H, W] of uint8 or float32",
                got=f"{list(self.images.shape)} of {str(self.images.dtype).removeprefix('torch.')}",
                way_out="convert them, e.g. with .float() or .unsqueeze(1)",
            )
        classes = check_labels(self.labels, "ImageSet", "labels")
        _check_same_length("ImageSet", "labels", self.images, classes)
        object.__setattr__(self, "labels", classes)
        names = self.class_names
        if names is not None and classes.numel() and int(classes.max()) >= len(names):
            raise InputError.of(
                "ImageSet",
                "class_names",
                expected=f"a name for each class up to {int(classes.max())}",
                got=f"{len(names)} names",
                way_out="name every class, or give None",
            )

    def __len__(self) -> int:
        return len(self.labels)

    def batches(
        self, batch_size: int = 256, *, shuffle_seed: int | None = None
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Iterates over the set, once, in order or shuffled.

        Args:
            batch_size: images in a batch; the last one may hold fewer.
            shuffle_seed: the order to take the images in, the same for the same seed; None is
                the order that they are stored in.

        Returns:
            Pairs of float32 [B, C, H, W], uint8 images divided by 255, and int64 [B].

        Raises:
            InputError: a batch size below 1.
        """
        step = check_positive("ImageSet.batches", "batch_size", batch_size, None)
        if shuffle_seed is None:
            pairs = zip(torch.split(self.images, step), torch.split(self.labels, step), strict=True)
            return ((_to_float(images), labels) for images, labels in pairs)
        order = torch.split(self._permutation(shuffle_seed), step)
        return ((_to_float(self.images[i]), self.labels[i]) for i in order)

    def sample(self, count: int, seed: int) -> ImageSet:
        """A random subset without replacement.

        A smaller count with the same seed gives the first images of a larger one.

        Args:
            count: 1 to len(self).
            seed: the same seed gives the same images, on every machine.

        Raises:
            InputError: a count out of range.
        """
        number = check_positive("ImageSet.sample", "count", count, len(self))
        return self.subset(self._permutation(seed)[:number])

    def subset(self, indices: Sequence[int] | Tensor) -> ImageSet:
        """The images at `indices`, in that order; copies.

        Args:
            indices: integers of 0 to len(self) - 1, one dimension.

        Raises:
            InputError: not integers, or out of range.
        """
        wanted = torch.as_tensor(indices)
        if wanted.numel() == 0:
            wanted = wanted.long()
        integers = not (wanted.is_floating_point() or wanted.dtype == torch.bool)
        if wanted.dim() != 1 or not integers:
            raise InputError.of(
                "ImageSet.subset",
                "indices",
                expected="integers [M]",
                got=f"{list(wanted.shape)} of {str(wanted.dtype).removeprefix('torch.')}",
                way_out="turn a mask into indices with .nonzero().flatten()",
            )
        wanted = wanted.long().to(self.images.device)
        if wanted.numel() and (int(wanted.min()) < 0 or int(wanted.max()) >= len(self)):
            raise InputError.of(
                "ImageSet.subset",
                "indices",
                expected=f"0 to {len(self) - 1}",
                got=f"{int(wanted.min())} to {int(wanted.max())}",
                way_out="drop those that are out of range",
            )
        labels = self.labels[wanted.to(self.labels.device)]
        return ImageSet(self.images[wanted], labels, self.class_names, self.source)

    def _permutation(self, seed: int) -> Tensor:
        return torch.from_numpy(np.random.default_rng(seed).permutation(len(self)))


DataLike: TypeAlias = ImageSet | tuple[Tensor, Tensor] | Dataset[Any] | Iterable[Any]


def _check_same_length(operation: str, argument: str, inputs: Tensor, labels: Tensor) -> None:
    if len(inputs) != len(labels):
        raise InputError.of(
            operation,
            argument,
            expected=f"as many labels as inputs, {len(inputs)}",
            got=f"{len(labels)}",
            way_out="give one label for each input",
        )


def _as_tensor(operation: str, argument: str, value: object) -> Tensor:
    if isinstance(value, Tensor):
        return value
    if isinstance(value, np.ndarray):
        # torch takes neither negative strides nor, without a warning, read-only memory.
        array = np.ascontiguousarray(value) if value.ndim else value
        try:
            return torch.as_tensor(array if array.flags.writeable else array.copy())
        except (TypeError, ValueError):
            got = f"a numpy array of {value.dtype}"
    else:
        got = type(value).__name__
    raise InputError.of(
        operation,
        argument,
        expected="a torch.Tensor",
        got=got,
        way_out="convert it with torch.as_tensor, or wrap a data set in a DataLoader",
    )


def _check_batch(operation: str, where: str, batch: object) -> tuple[Tensor, Tensor]:
    if not isinstance(batch, tuple | list) or len(batch) != 2:
        got = type(batch).__name__
        raise InputError.of(
            operation,
            where,
            expected="a pair (inputs, labels)",
            got=f"{got} of {len(batch)}" if isinstance(batch, tuple | list) else got,
            way_out="yield (inputs, labels), without further fields",
        )
    inputs = _as_tensor(operation, f"{where} inputs", batch[0])
    labels = check_labels(
        _as_tensor(operation, f"{where} labels", batch[1]), operation, f"{where} labels"
    )
    if inputs.dim() < 2 or not (inputs.is_floating_point() or inputs.dtype == torch.uint8):
        raise InputError.of(
            operation,
            f"{where} inputs",
            expected="[N, ...] of a floating dtype or uint8",
            got=f"{list(inputs.shape)} of {str(inputs.dtype).removeprefix('torch.')}",
            way_out="give images in [0, 1] as float32, or in 0 to 255 as uint8",
        )
    _check_same_length(operation, f"{where} labels", inputs, labels)
    bad = first_not_finite(inputs)
    if bad is not None:
        raise InputError.of(
            operation,
            f"{where} inputs",
            expected="finite values",
            got=f"NaN or infinity at index {bad}",
            way_out="repair or leave out that sample",
        )
    return _to_float(inputs), labels


def _checked(operation: str, batches: Iterable[Any]) -> Iterator[tuple[Tensor, Tensor]]:
    total = 0
    for number, batch in enumerate(batches):
        inputs, labels = _check_batch(operation, f"data: batch {number}", batch)
        if len(labels) == 0:
            continue
        total += len(labels)
        yield inputs, labels
    if total == 0:
        raise InputError.of(
            operation,
            "data",
            expected="at least 1 sample",
            got="none",
            way_out="check the path, the split and any filter; a generator can be used only once",
        )


def as_batches(
    data: DataLike, *, operation: str, batch_size: int = 256
) -> Iterator[tuple[Tensor, Tensor]]:
    """Checked (inputs, labels) batches of whatever holds labelled data.

    A generator, or any iterator, can be consumed only once: a second call on it finds no samples.
    A DataLoader that shuffles gives another order each time.

    Args:
        data: one of
            an ImageSet;
            a pair of tensors (inputs [N, ...], labels [N]);
            a torch Dataset of (input, label) samples;
            an iterable of (inputs, labels) batches: a list, a DataLoader, a generator.
            numpy arrays stand for tensors everywhere.
        operation: named in the errors, as the user knows it.
        batch_size: of the first three; an iterable keeps its own batches.

    Returns:
        Pairs of floating inputs [B, ...] (uint8 becomes float32 in [0, 1], other dtypes stay) and
        int64 labels [B], B >= 1, on the device where they were. Empty batches are skipped.

    Raises:
        InputError: at once, data or batch size of another kind; while iterating, a batch that is
            not a pair of tensors of one length, inputs that are neither floating nor uint8, NaN or
            infinity, labels that are not class indices, or no sample at all.
    """
    step = check_positive(operation, "batch_size", batch_size, None)
    if isinstance(data, ImageSet):
        return _checked(operation, data.batches(step))
    if isinstance(data, Dataset):

        def collate(samples: list[Any]) -> Any:
            try:
                return default_collate(samples)
            except (TypeError, RuntimeError) as error:
                raise InputError.of(
                    operation,
                    "data",
                    expected="samples (tensor, class index) of one shape",
                    got=f"a batch that cannot be stacked ({str(error).splitlines()[0]})",
                    way_out="let the data set convert its images to tensors of one size",
                ) from error

        # A generator of its own: a loader draws a seed for its workers even where it has none.
        private = torch.Generator().manual_seed(0)
        loader = DataLoader(data, batch_size=step, collate_fn=collate, generator=private)
        return _checked(operation, loader)
    arrays = Tensor | np.ndarray
    if (
        isinstance(data, tuple | list)
        and len(data) == 2
        and all(isinstance(part, arrays) for part in data)
    ):
        inputs = _as_tensor(operation, "data: inputs", data[0])
        labels = _as_tensor(operation, "data: labels", data[1])
        if inputs.dim() == 0 or labels.dim() == 0:
            raise InputError.of(
                operation,
                "data",
                expected="inputs [N, ...] and labels [N]",
                got=f"{list(inputs.shape)} and {list(labels.shape)}",
                way_out="put single samples into a batch with .unsqueeze(0)",
            )
        _check_same_length(operation, "data: labels", inputs, labels)
        return _checked(
            operation, zip(torch.split(inputs, step), torch.split(labels, step), strict=True)
        )
    not_batches = (Tensor, np.ndarray, str, bytes, Mapping, nn.Module)
    if isinstance(data, not_batches) or not isinstance(data, Iterable):
        raise InputError.of(
            operation,
            "data",
            expected="an ImageSet, a pair (inputs, labels), a Dataset or an iterable of batches",
            got=type(data).__name__,
            way_out="pass (inputs, labels), or load images with tacext.load_images",
        )
    return _checked(operation, data)


def materialise(
    data: DataLike, *, operation: str, limit: int | None = None
) -> tuple[Tensor, Tensor]:
    """All batches of `as_batches` in one piece, on the CPU.

    Args:
        data: as `as_batches`; a generator is consumed, up to the batch where `limit` is reached.
        operation: named in the errors, as the user knows it.
        limit: keep only the first `limit` samples; None keeps all.

    Returns:
        Floating inputs [N, ...] and int64 labels [N], which gradients may pass by.

    Raises:
        InputError: as `as_batches`; also a limit below 1, or batches whose samples differ in shape.
    """
    left = None if limit is None else check_positive(operation, "limit", limit, None)
    inputs: list[Tensor] = []
    labels: list[Tensor] = []
    for images, classes in as_batches(data, operation=operation):
        if inputs and images.shape[1:] != inputs[0].shape[1:]:
            raise InputError.of(
                operation,
                "data",
                expected=f"samples of one shape, {list(inputs[0].shape[1:])} as in the first batch",
                got=f"{list(images.shape[1:])}",
                way_out="resize the images to one size",
            )
        inputs.append(images[:left].detach().cpu())
        labels.append(classes[:left].cpu())
        if left is not None:
            left -= len(labels[-1])
            if left == 0:
                break
    return _trainable(torch.cat(inputs)), _trainable(torch.cat(labels))


def _trainable(tensor: Tensor) -> Tensor:
    """A copy where gradients could not pass by: tensors of inference mode."""
    return tensor.clone() if tensor.is_inference() else tensor


def sample_count(data: DataLike) -> int | None:
    """How many samples there are; None where only reading all would tell."""
    if isinstance(data, ImageSet):
        return len(data)
    if isinstance(data, Dataset) and not isinstance(data, IterableDataset):
        return len(data) if isinstance(data, Sized) else None
    if isinstance(data, tuple | list) and len(data) == 2:
        inputs, labels = data
        arrays = isinstance(inputs, Tensor | np.ndarray) and isinstance(labels, Tensor | np.ndarray)
        return len(inputs) if arrays and inputs.ndim else None
    return None
