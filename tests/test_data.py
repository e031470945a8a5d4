"""Images from every kind of file, and batches from every kind of holder; bad ones say why."""

from __future__ import annotations

import logging
import struct
import zlib
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, IterableDataset, TensorDataset

from tacext.data import ImageSet, as_batches, materialise
from tacext.errors import FileError, InputError
from tacext.images import load_images

RNG = np.random.default_rng(0)


def pixels(*shape: int) -> Any:
    return RNG.integers(0, 256, shape, dtype=np.uint8)


def image_set(count: int = 10) -> ImageSet:
    images = torch.arange(count, dtype=torch.uint8).view(-1, 1, 1, 1).expand(count, 3, 2, 2)
    return ImageSet(images.contiguous(), torch.arange(count) % 3)


# ---- ImageSet ------------------------------------------------------------------------------------


def test_batches() -> None:
    batches = list(image_set().batches(4))
    assert [len(y) for _, y in batches] == [4, 4, 2]
    x, y = (torch.cat(parts) for parts in zip(*batches, strict=True))
    assert x.dtype == torch.float32
    torch.testing.assert_close(x[:, 0, 0, 0] * 255, torch.arange(10.0))
    assert torch.equal(y, torch.arange(10) % 3)


def test_shuffled_batches() -> None:
    data = image_set(50)

    def order(seed: int) -> list[float]:
        return torch.cat([x[:, 0, 0, 0] for x, _ in data.batches(16, shuffle_seed=seed)]).tolist()

    assert order(1) == order(1) != order(2)
    assert sorted(order(1)) == sorted(order(2))
    for x, y in data.batches(16, shuffle_seed=1):
        assert torch.equal((x[:, 0, 0, 0] * 255).round().long() % 3, y)


def test_float_images_stay() -> None:
    images = torch.randn(3, 1, 2, 2)
    (x, _), *rest = ImageSet(images, torch.zeros(3, dtype=torch.int32)).batches()
    assert torch.equal(x, images)
    assert not rest


def test_sample_and_subset() -> None:
    data = image_set(20)
    few, more = data.sample(5, 0), data.sample(12, 0)
    assert torch.equal(few.images, more.images[:5])
    assert len(data.sample(20, 1).images.unique()) == 20
    assert not torch.equal(data.sample(5, 1).images, few.images)
    assert few.images.dtype == torch.uint8
    assert data.subset([3, 1]).images[:, 0, 0, 0].tolist() == [3, 1]
    assert data.subset(torch.tensor([4])).labels.tolist() == [1]
    assert len(data.subset([])) == 0


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda d: d.sample(0, 0), "ImageSet.sample: count: expected an integer, 1 to 10, got 0;"),
        (lambda d: d.sample(11, 0), "ImageSet.sample: count: .* got 11; give a number of samples"),
        (lambda d: d.batches(0), "ImageSet.batches: batch_size: .*1 or more, got 0; give"),
        (lambda d: d.batches(True), "ImageSet.batches: batch_size: .* got True"),
        (lambda d: d.subset([10]), "ImageSet.subset: indices: expected 0 to 9, got 10 to 10; drop"),
        (lambda d: d.subset([-1]), "ImageSet.subset: indices: expected 0 to 9, got -1 to -1"),
        (lambda d: d.subset([0.5]), r"indices: expected integers \[M\], got \[1\] of float32;"),
        (lambda d: d.subset(d.labels > 1), r"indices: .* got \[10\] of bool; turn a mask"),
    ],
)
def test_image_set_methods_refuse(call: Callable[[ImageSet], object], message: str) -> None:
    with pytest.raises(InputError, match=message):
        call(image_set())


@pytest.mark.parametrize(
    ("images", "labels", "names", "message"),
    [
        ([1], torch.zeros(1), None, "images: expected a torch.Tensor, got list; convert it"),
        (torch.zeros(2, 3, 4), torch.zeros(2), None, r"images: expected \[N, C, H, W\].*; convert"),
        (torch.zeros(2, 1, 4, 4).double(), torch.zeros(2), None, "images: .*of float64; convert"),
        (torch.zeros(2, 1, 4, 4), torch.zeros(2), None, "labels: expected integer labels"),
        (torch.zeros(2, 1, 4, 4), torch.arange(3), None, "labels: expected as many labels as inp"),
        (torch.zeros(2, 1, 4, 4), torch.arange(2), ("a",), "class_names: expected a name for each"),
    ],
)
def test_image_set_refuses(images: Any, labels: Any, names: Any, message: str) -> None:
    with pytest.raises(InputError, match=f"^ImageSet: {message}"):
        ImageSet(images, labels, names)


# ---- .npz ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("shape", "to_nchw"),
    [
        ((4, 8, 9, 3), (0, 3, 1, 2)),
        ((4, 8, 9, 1), (0, 3, 1, 2)),
        ((4, 3, 8, 9), (0, 1, 2, 3)),
        ((4, 4, 8, 9), (0, 1, 2, 3)),
    ],
)
def test_npz_layouts(tmp_path: Path, shape: tuple[int, ...], to_nchw: tuple[int, ...]) -> None:
    x = pixels(*shape)
    np.savez_compressed(tmp_path / "d.npz", x=x, y=np.array([0, 2, 1, 0], dtype=np.uint8))
    data = load_images(tmp_path / "d.npz")
    assert data.images.dtype == torch.uint8
    assert torch.equal(data.images, torch.from_numpy(x.transpose(to_nchw)))
    assert data.labels.tolist() == [0, 2, 1, 0]
    assert data.labels.dtype == torch.int64
    assert data.source == str(tmp_path / "d.npz")


def test_npz_greyscale_and_splits(tmp_path: Path) -> None:
    arrays = {
        "x_test": pixels(2, 5, 6),
        "y_test": [1, 0],
        "x_odd": pixels(3, 5, 6),
        "y_odd": [0] * 3,
    }
    np.savez(tmp_path / "d.npz", **arrays)
    assert load_images(tmp_path / "d.npz", split="test").images.shape == (2, 1, 5, 6)
    assert len(load_images(str(tmp_path / "d.npz"), split="odd")) == 3
    with pytest.raises(InputError, match=r"load_images: split: .*'odd', 'test', got none; choose"):
        load_images(tmp_path / "d.npz")
    with pytest.raises(InputError, match=r"split: expected one of 'odd', 'test', got 'train'"):
        load_images(tmp_path / "d.npz", split="train")
    np.savez(tmp_path / "bare.npz", **(arrays | {"x_new": pixels(2, 5, 6)}))
    with pytest.raises(InputError, match=r"path: expected labels y_new beside x_new, got .*bare"):
        load_images(tmp_path / "bare.npz", split="new")
    assert len(load_images(tmp_path / "bare.npz", split="new", need_labels=False)) == 2
    np.savez(tmp_path / "plain.npz", x=arrays["x_test"], y=[0, 1])
    with pytest.raises(InputError, match=r"split: expected none, got 'test'; .* has no splits"):
        load_images(tmp_path / "plain.npz", split="test")


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64, ">f4"])
def test_npz_floats(tmp_path: Path, dtype: Any, caplog: pytest.LogCaptureFixture) -> None:
    x = np.linspace(0, 1, 24).reshape(2, 3, 4).astype(dtype)
    np.savez(tmp_path / "d.npz", x=x, y=np.array([0, 1], dtype=">i8"))
    data = load_images(tmp_path / "d.npz")
    assert data.images.dtype == torch.float32
    assert np.array_equal(data.images[:, 0].numpy(), x.astype(np.float32))
    assert data.labels.tolist() == [0, 1]
    assert not caplog.records


@pytest.mark.parametrize(("low", "high"), [(0, 255), (-2, 2.5), (0, 1.5)])
def test_npz_floats_out_of_range_warn(
    tmp_path: Path, low: float, high: float, caplog: pytest.LogCaptureFixture
) -> None:
    np.savez(tmp_path / "d.npz", x=np.linspace(low, high, 24).reshape(2, 3, 4), y=[0, 1])
    with caplog.at_level(logging.WARNING, "tacext"):
        assert float(load_images(tmp_path / "d.npz").images.max()) == high
    assert f"holds floats from {low:g} to {high:g}, not in [0, 1]" in caplog.text


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"x": pixels(2, 4, 4)}, "path: expected arrays x and y, .* with 'x'; rename the arrays"),
        ({}, "path: expected arrays x and y, .* with no arrays"),
        (
            {"x": pixels(2, 3, 9, 3), "y": [0, 1]},
            r"x: .*\[2, 3, 9, 3\], where both could be; pass a",
        ),
        ({"x": pixels(2, 8, 9, 7), "y": [0, 1]}, r"x: .*1, 3 or 4, got \[2, 8, 9, 7\]; reshape"),
        ({"x": pixels(2, 8), "y": [0, 1]}, r"x: expected \[N, H, W\], .*got \[2, 8\]; reshape"),
        ({"x": np.zeros((2, 8, 8), int), "y": [0, 1]}, "x: expected uint8 or .*int64; convert"),
        ({"x": pixels(2, 8, 8), "y": [0]}, "y: expected as many labels as images, 2, got 1; give"),
        ({"x": pixels(2, 8, 8), "y": [0.0, 1]}, r"y: expected integer labels \[N\], got float64;"),
        ({"x": pixels(2, 8, 8), "y": [True, False]}, "y: expected integer labels .* got bool;"),
        ({"x": pixels(2, 8, 8), "y": ["a", "b"]}, "y: expected integer labels .* got <U1; give"),
        ({"x": pixels(2, 8, 8), "y": [[0], [1]]}, r"y: .* got shape \[2, 1\]; give one class"),
        (
            {"x": pixels(2, 8, 8), "y": np.eye(2, dtype=int)},
            r"y: .*\[2, 2\]; turn one-hot .*argmax",
        ),
        ({"x": pixels(2, 8, 8), "y": [0, -1]}, "y: expected class .* or more, got -1 at index 1;"),
    ],
    ids=range(13),
)
def test_npz_refuses(tmp_path: Path, arrays: dict[str, Any], message: str) -> None:
    np.savez(tmp_path / "d.npz", **arrays)
    with pytest.raises(InputError, match=f"^load_images: {message}"):
        load_images(tmp_path / "d.npz")


@pytest.mark.parametrize("value", [np.nan, np.inf, 1e300])
def test_npz_must_be_finite(tmp_path: Path, value: float) -> None:
    x = np.zeros((4, 3, 5))
    x[2, 1, 1] = value
    np.savez(tmp_path / "d.npz", x=x, y=[0] * 4)
    with pytest.raises(InputError, match=r"x: expected finite .* infinity at index 2; repair or"):
        load_images(tmp_path / "d.npz")


class Mark:
    """Unpickling it leaves a mark."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.path,)


def test_npz_is_never_unpickled(tmp_path: Path) -> None:
    objects = np.array([Mark(tmp_path / "mark")], dtype=object)
    np.savez(tmp_path / "d.npz", x=pixels(1, 8, 8), y=objects)
    objects.dump(tmp_path / "bare.npz")
    for name in ("d", "bare"):
        with pytest.raises(FileError, match=r"path: expected an \.npz .*; nothing was unpickled"):
            load_images(tmp_path / f"{name}.npz")
    assert not (tmp_path / "mark").exists()


def test_npz_damaged(tmp_path: Path) -> None:
    np.savez_compressed(tmp_path / "whole.npz", x=pixels(2, 8, 8), y=[0, 1])
    content, path = (tmp_path / "whole.npz").read_bytes(), tmp_path / "cut.npz"
    for cut in [*range(12), *range(12, len(content), 37), len(content) - 1]:
        path.write_bytes(content[:cut])
        with pytest.raises(FileError, match=r"load_images: path: expected an \.npz archive"):
            load_images(path)
    np.save(tmp_path / "one.npy", pixels(2))
    (tmp_path / "one.npy").rename(tmp_path / "one.npz")
    with pytest.raises(FileError, match=r"expected an \.npz archive"):
        load_images(tmp_path / "one.npz")


@given(position=st.integers(0, 10_000), value=st.integers(0, 255))
def test_npz_one_damaged_byte(
    tmp_path_factory: pytest.TempPathFactory, position: int, value: int
) -> None:
    path = tmp_path_factory.getbasetemp() / "flipped.npz"
    np.savez_compressed(path, x=np.ones((2, 8, 8), np.uint8), y=[0, 1])
    content = bytearray(path.read_bytes())
    content[position % len(content)] = value
    path.write_bytes(content)
    with suppress(FileError, InputError):
        assert len(load_images(path)) > 0


def test_no_images(tmp_path: Path) -> None:
    np.savez(tmp_path / "d.npz", x=pixels(0, 8, 8), y=np.zeros(0, int))
    with pytest.raises(FileError, match=r"expected at least 1 image, got .*\[0, 8, 8\]; check how"):
        load_images(tmp_path / "d.npz")


# ---- paths ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("no", r"existing file or folder, got .*/no, which does not exist; check the path"),
        ("file.txt", r"expected an \.npz file, a CIFAR \.bin file or a folder, .*; convert"),
        ("file.txt/x", r"does not exist; check the path"),
        ("empty", r"one folder for each class, .* got .*empty without folders; arrange"),
    ],
)
def test_paths(tmp_path: Path, name: str, message: str) -> None:
    (tmp_path / "file.txt").write_text("x")
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileError, match=f"^load_images: path: .*{message}"):
        load_images(tmp_path / name)


def test_unreadable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # Simulated: permission bits do not stop root.
    def denied(path: object) -> None:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr("tacext.images.os.listdir", denied)
    with pytest.raises(FileError, match=r"\(Permission denied\); check its permissions"):
        load_images(tmp_path)


@pytest.mark.parametrize("size", [3, (3,), (0, 3), (3.0, 3), (True, 3), "33"])
def test_size(tmp_path: Path, size: Any) -> None:
    with pytest.raises(InputError, match=r"load_images: size: expected two positive integers"):
        load_images(tmp_path, size=size)


def test_arrays_are_not_resized(tmp_path: Path) -> None:
    np.savez(tmp_path / "d.npz", x=pixels(2, 8, 9), y=[0, 1])
    assert len(load_images(tmp_path / "d.npz", size=(8, 9))) == 2
    with pytest.raises(InputError, match=r"size: expected \(8, 9\), .*got \(9, 8\); leave size"):
        load_images(tmp_path / "d.npz", size=(9, 8))


# ---- class folders -------------------------------------------------------------------------------


def put(path: Path, array: Any, **options: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(array).save(path, **options)
    return path


def test_folder(tmp_path: Path) -> None:
    cat, dog = pixels(6, 7, 3), pixels(6, 7, 3)
    put(tmp_path / "dog" / "b.png", dog)
    put(tmp_path / "cat" / "a.BMP", cat)
    put(tmp_path / "cat" / "z.webp", cat, lossless=True)
    (tmp_path / "cat" / "notes.txt").write_text("not an image")
    (tmp_path / "cat" / ".hidden.png").write_text("not an image")
    (tmp_path / ".cache").mkdir()
    data = load_images(tmp_path)
    assert data.class_names == ("cat", "dog")
    assert data.labels.tolist() == [0, 0, 1]
    assert torch.equal(data.images, torch.from_numpy(np.stack([cat, cat, dog])).permute(0, 3, 1, 2))


def test_folder_splits_and_nesting(tmp_path: Path) -> None:
    put(tmp_path / "train" / "a" / "images" / "1.JPEG", pixels(8, 8, 3), format="JPEG")
    put(tmp_path / "val" / "a" / "1.png", pixels(8, 8, 3))
    put(tmp_path / "val" / "b" / "1.png", pixels(8, 8, 3))
    assert len(load_images(tmp_path, split="train")) == 1
    assert load_images(tmp_path, split="val").labels.tolist() == [0, 1]
    with pytest.raises(
        InputError, match=r"split: expected one of 'train', 'val', got none; choose a split"
    ):
        load_images(tmp_path)
    with pytest.raises(InputError, match=r"split: expected one of 'train', 'val', got 'test'"):
        load_images(tmp_path, split="test")
    with pytest.raises(InputError, match=r"split: expected none, got 'x'; .*val has no splits"):
        load_images(tmp_path / "val", split="x")


def test_folder_greyscale(tmp_path: Path) -> None:
    grey = pixels(4, 5)
    put(tmp_path / "a" / "1.png", grey)
    put(tmp_path / "a" / "2.pgm", grey)
    assert load_images(tmp_path).images.shape == (2, 1, 4, 5)
    put(tmp_path / "b" / "1.png", pixels(4, 5, 3))
    data = load_images(tmp_path)
    assert data.images.shape == (3, 3, 4, 5)
    assert torch.equal(data.images[0], torch.from_numpy(grey).expand(3, 4, 5))


def test_folder_other_modes_become_rgb(tmp_path: Path) -> None:
    put(tmp_path / "a" / "1.png", pixels(4, 5, 4))
    Image.fromarray(pixels(4, 5)).convert("P").save(tmp_path / "a" / "2.png")
    assert load_images(tmp_path).images.shape == (2, 3, 4, 5)


def test_folder_sizes(tmp_path: Path) -> None:
    put(tmp_path / "a" / "1.png", pixels(4, 5, 3))
    put(tmp_path / "b" / "2.png", pixels(6, 5, 3))
    with pytest.raises(
        InputError,
        match=r"size: expected images of one size .*1\.png of \(4, 5\) and 2\.png of \(6, 5\); "
        r"give size=\(H, W\), or --size",
    ):
        load_images(tmp_path)
    assert load_images(tmp_path, size=(7, 3)).images.shape == (2, 3, 7, 3)


def test_folder_without_images_in_a_class(tmp_path: Path) -> None:
    put(tmp_path / "a" / "1.png", pixels(4, 5, 3))
    (tmp_path / "b").mkdir()
    with pytest.raises(
        FileError, match=r"images \(\.png, .*\) in every class folder, got none in .*/b; add images"
    ):
        load_images(tmp_path)


def test_folder_order_of_numbers(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for name in ("2", "10"):
        put(tmp_path / name / "1.png", pixels(4, 5))
    with caplog.at_level(logging.WARNING, "tacext"):
        assert load_images(tmp_path).class_names == ("10", "2")
    assert "as text and not as numbers" in caplog.text


def png(width: int, height: int) -> bytes:
    """A PNG that claims a size and holds no pixels."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return (
            struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        )

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", b"") + chunk(b"IEND", b"")


@pytest.mark.parametrize("case", ["text", "empty", "cut.png", "cut.jpg", "bomb", "huge", "16bit"])
def test_folder_with_a_bad_file(tmp_path: Path, case: str) -> None:
    bad = tmp_path / "a" / f"bad{Path(case).suffix or '.png'}"
    put(bad, pixels(64, 64, 3))
    if case.startswith("cut"):
        bad.write_bytes(bad.read_bytes()[:-700])
    elif case == "16bit":
        put(bad, np.full((4, 4), 4000, dtype=np.uint16))
    else:
        # 100 megapixels: Pillow only warns; 400: it refuses.
        content = {
            "text": b"hello",
            "empty": b"",
            "bomb": png(10**4, 10**4),
            "huge": png(2 * 10**4, 2 * 10**4),
        }
        bad.write_bytes(content[case])
    with pytest.raises(FileError, match=r"path: expected a whole 8-bit image, got .*/bad\..*") as e:
        load_images(tmp_path)
    assert str(e.value).endswith("replace or remove that file")
    if case in ("bomb", "huge"):
        assert "DecompressionBomb" in str(e.value)


# ---- CIFAR ---------------------------------------------------------------------------------------


def records(labels: list[list[int]]) -> tuple[bytes, Any]:
    images = pixels(len(labels), 3, 32, 32)
    parts = [bytes(y) + x.tobytes() for y, x in zip(labels, images, strict=True)]
    return b"".join(parts), torch.from_numpy(images)


def test_cifar10(tmp_path: Path) -> None:
    train = [records([[i], [9]]) for i in range(5)]
    for i, (content, _) in enumerate(train, start=1):
        (tmp_path / f"data_batch_{i}.bin").write_bytes(content)
    content, images = records([[3], [0], [7]])
    (tmp_path / "test_batch.bin").write_bytes(content)
    data = load_images(tmp_path, split="train")
    assert torch.equal(data.images, torch.cat([x for _, x in train]))
    assert data.labels.tolist() == [0, 9, 1, 9, 2, 9, 3, 9, 4, 9]
    assert data.class_names is None
    (tmp_path / "batches.meta.txt").write_text("\n".join("abcdefghij") + "\n\n")
    data = load_images(tmp_path, split="test")
    assert torch.equal(data.images, images)
    assert data.class_names == tuple("abcdefghij")
    assert load_images(tmp_path / "test_batch.bin").labels.tolist() == [3, 0, 7]
    with pytest.raises(InputError, match=r"split: expected one of 'train', 'test', got none"):
        load_images(tmp_path)
    with pytest.raises(InputError, match="split: expected none, got 'test'"):
        load_images(tmp_path / "test_batch.bin", split="test")
    (tmp_path / "data_batch_4.bin").unlink()
    with pytest.raises(FileError, match=r"path: .*got no data_batch_4\.bin; complete the download"):
        load_images(tmp_path, split="train")


def test_cifar100(tmp_path: Path) -> None:
    content, images = records([[19, 99], [0, 4]])
    for name in ("train.bin", "test.bin", "other.bin"):
        (tmp_path / name).write_bytes(content)
    for data in (load_images(tmp_path, split="test"), load_images(tmp_path / "other.bin")):
        assert torch.equal(data.images, images)
        assert data.labels.tolist() == [99, 4]


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\0" * 3072,
        b"\0" * (3 * 3073 - 1),
        b"\x0a" + bytes(3072),
        bytes([0, 100]) + bytes(3072),
    ],
    ids=["empty", "short", "cut", "label10", "label100"],
)
def test_cifar_damaged(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "x.bin").write_bytes(content)
    with pytest.raises(
        FileError,
        match=rf"path: expected records of 3073 or 3074 bytes .* of {len(content)} bytes, "
        "truncated or of another kind; download it again",
    ):
        load_images(tmp_path / "x.bin")


def test_cifar_that_fits_both(tmp_path: Path) -> None:
    (tmp_path / "x.bin").write_bytes(bytes(3073 * 3074))
    with pytest.raises(FileError, match="which fits both; put it into a folder"):
        load_images(tmp_path / "x.bin")


# ---- as_batches ----------------------------------------------------------------------------------


class Samples(Dataset[Any]):
    def __init__(self, samples: list[Any]) -> None:
        self.samples = samples

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> Any:
        return self.samples[index]


class Stream(IterableDataset[Any]):
    def __iter__(self) -> Iterator[Any]:
        return zip(X, Y.tolist(), strict=True)


X = torch.linspace(0, 1, 10 * 12).view(10, 3, 2, 2)
Y = torch.arange(10) % 4
HOLDERS: dict[str, Callable[[], Any]] = {
    "image set": lambda: ImageSet(X, Y),
    "pair": lambda: (X, Y),
    "list pair": lambda: [X, Y.to(torch.uint8)],
    "numpy pair": lambda: (X.numpy(), Y.numpy()),
    "tensor dataset": lambda: TensorDataset(X, Y),
    "dataset": lambda: Samples(list(zip(X, Y.tolist(), strict=True))),
    "stream": Stream,
    "loader": lambda: DataLoader(TensorDataset(X, Y), batch_size=3),
    "list": lambda: [(X[:4], Y[:4]), [X[4:], Y[4:]]],
    "generator": lambda: ((X[i : i + 3], Y[i : i + 3]) for i in range(0, 10, 3)),
    "empty batches": lambda: [(X[:0], Y[:0]), (X, Y), (X[:0], Y[:0])],
}


@pytest.mark.parametrize("holder", HOLDERS)
def test_as_batches(holder: str) -> None:
    batches = list(as_batches(HOLDERS[holder](), operation="scan", batch_size=4))
    x, y = (torch.cat(parts) for parts in zip(*batches, strict=True))
    assert torch.equal(x, X)
    assert torch.equal(y, Y)
    assert y.dtype == torch.int64
    assert all(0 < len(y) <= 10 for _, y in batches)


def test_dtypes() -> None:
    whole = torch.full((2, 1, 2, 2), 255, dtype=torch.uint8)
    ((x, _),) = as_batches((whole, Y[:2]), operation="scan")
    assert x.dtype == torch.float32
    assert bool((x == 1).all())
    ((x, _),) = as_batches((X.double(), Y), operation="scan")
    assert x.dtype == torch.float64


def test_numpy_that_torch_dislikes() -> None:
    x, y = X.numpy()[::-1], Y.numpy().copy()
    y.flags.writeable = False
    ((tensor, labels),) = as_batches([(x, y)], operation="scan")
    assert torch.equal(tensor, X.flip(0))
    assert torch.equal(labels, Y)


NAN = X.clone()
NAN[7, 0, 0, 0] = torch.nan
INF = X.clone()
INF[2, 0, 0, 0] = torch.inf


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (X, "data: expected an ImageSet, .* got Tensor; pass"),
        ("path", "data: expected an ImageSet, .* got str; pass"),
        ({"x": X}, "data: expected an ImageSet, .* got dict; pass"),
        (7, "data: expected an ImageSet, .* got int; pass"),
        (X.numpy(), "data: expected an ImageSet, .* got ndarray; pass"),
        ((X, Y[:9]), "data: labels: expected as many labels as inputs, 10, got 9; give one"),
        ((X[0, 0, 0, 0], Y), r"data: expected inputs \[N, ...\] and labels \[N\], got \[\] and"),
        ([], "data: expected at least 1 sample, got none; check the path"),
        ((X[:0], Y[:0]), "data: expected at least 1 sample, got none"),
        ([(X[:0], Y[:0])], "data: expected at least 1 sample, got none"),
        (iter(()), "data: expected at least 1 sample, got none; .* used only once"),
        (Samples([]), "data: expected at least 1 sample, got none"),
        ([X], "data: batch 0: expected a pair .*, got Tensor; yield"),
        ([(X, Y), (X, Y, Y)], "data: batch 1: expected a pair .*, got tuple of 3; yield"),
        ([("a", Y)], "data: batch 0 inputs: expected a torch.Tensor, got str; convert"),
        ([(X, [1, 2])], "data: batch 0 labels: expected a torch.Tensor, got list; convert"),
        ([(X, np.array(["a"] * 10))], "data: batch 0 labels: .* got a numpy array of <U1"),
        ([(X, Y[:3])], "data: batch 0 labels: expected as many labels as inputs, 10, got 3"),
        ([(X, Y.float())], r"data: batch 0 labels: expected integer labels \[N\], got float32; c"),
        ([(X, Y > 1)], r"data: batch 0 labels: expected integer labels \[N\], got bool"),
        ([(X, torch.eye(10))], r"batch 0 labels: .*got shape \[10, 10\]; .*one-hot .*argmax\(1\)"),
        ([(X, Y[:, None])], r"batch 0 labels: .*got shape \[10, 1\]; .*reshape\(-1\)"),
        ([(X, Y - 1)], "batch 0 labels: expected class indices of 0 or more, got -1 at index 0"),
        ([(X.long(), Y)], r"batch 0 inputs: expected \[N, ...\] of a floating .* of int64; give"),
        ([(X[:, 0, 0, 0], Y)], r"batch 0 inputs: expected \[N, ...\] .* got \[10\] of float32"),
        ([(X, Y), (NAN, Y)], "batch 1 inputs: expected finite values, .* at index 7; repair or"),
        ((INF, Y), "batch 0 inputs: expected finite values, got NaN or infinity at index 2"),
        (ImageSet(INF, Y), "batch 0 inputs: expected finite values"),
        (
            Samples([("a", object())]),
            "data: expected samples .* cannot be stacked .*; let the data",
        ),
        (
            Samples([(X[0], 0), (X[0, :1], 0)]),
            "data: expected samples .* cannot be stacked .*stack",
        ),
    ],
    ids=range(30),
)
def test_as_batches_refuses(data: Any, message: str) -> None:
    with pytest.raises(InputError, match=f"^scan: .*{message}"):
        list(as_batches(data, operation="scan"))


def test_wrong_kinds_are_refused_at_once() -> None:
    with pytest.raises(InputError, match="scan: data"):
        as_batches(7, operation="scan")  # type: ignore[arg-type]
    with pytest.raises(InputError, match="scan: batch_size: expected an integer, 1 or more, got 0"):
        as_batches((X, Y), operation="scan", batch_size=0)


def test_errors_of_the_users_data_set_pass() -> None:
    def broken() -> Iterator[tuple[Tensor, Tensor]]:
        yield X, Y
        raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"):
        list(as_batches(broken(), operation="scan"))


# ---- materialise ---------------------------------------------------------------------------------


@pytest.mark.parametrize("holder", HOLDERS)
@pytest.mark.parametrize("limit", [None, 1, 5, 10, 99])
def test_materialise(holder: str, limit: int | None) -> None:
    x, y = materialise(HOLDERS[holder](), operation="repair", limit=limit)
    assert torch.equal(x, X[:limit])
    assert torch.equal(y, Y[:limit])


def test_materialise_stops_at_the_limit() -> None:
    def endless() -> Iterator[tuple[Tensor, Tensor]]:
        while True:
            yield X, Y

    assert len(materialise(endless(), operation="repair", limit=25)[1]) == 25


def test_materialise_refuses() -> None:
    with pytest.raises(
        InputError,
        match=r"repair: data: expected samples of one shape, \[3, 2, 2\] .*\[1, 2, 2\]; resize",
    ):
        materialise([(X, Y), (X[:, :1], Y)], operation="repair")
    with pytest.raises(InputError, match=r"repair: limit: expected an integer, 1 or more, got 0"):
        materialise((X, Y), operation="repair", limit=0)
    with pytest.raises(InputError, match=r"repair: data: expected at least 1 sample, got none"):
        materialise([], operation="repair")


def test_an_archive_that_would_fill_the_memory_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "bomb.npz"
    np.savez_compressed(file, x=np.zeros((4000, 28, 28), np.uint8), y=np.zeros(4000, np.int64))
    assert len(load_images(file)) == 4000  # small enough to do no harm
    monkeypatch.setattr("tacext.images.LARGEST_HARMLESS", 2**20)
    with pytest.raises(FileError, match="would grow to 3 MiB"):
        load_images(file)
