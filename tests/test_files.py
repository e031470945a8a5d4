"""Files are written as a whole or not at all, and every refusal says why."""

from __future__ import annotations

import errno
import os
from pathlib import Path
from typing import BinaryIO

import pytest

from tacext.errors import FileError, InputError
from tacext.files import (
    atomic_write,
    check_writable,
    explain,
    write_bytes_atomically,
    write_text_atomically,
)


def names(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.iterdir())


def test_writes_text_and_bytes(tmp_path: Path) -> None:
    write_text_atomically(tmp_path / "a.json", "é\r\n")
    write_bytes_atomically(tmp_path / "b", b"\x00\n")
    assert (tmp_path / "a.json").read_bytes() == "é\r\n".encode()
    assert (tmp_path / "b").read_bytes() == b"\x00\n"
    assert names(tmp_path) == ["a.json", "b"]


def test_replaces_and_keeps_the_mode(tmp_path: Path) -> None:
    target = tmp_path / "a"
    target.write_text("old")
    target.chmod(0o640)
    write_text_atomically(target, "new")
    assert target.read_text() == "new"
    assert target.stat().st_mode & 0o777 == 0o640


def test_new_file_follows_the_umask(tmp_path: Path) -> None:
    old = os.umask(0o027)
    try:
        write_text_atomically(tmp_path / "a", "x")
    finally:
        os.umask(old)
    assert (tmp_path / "a").stat().st_mode & 0o777 == 0o640


def test_writes_through_a_link(tmp_path: Path) -> None:
    (tmp_path / "real").write_text("old")
    (tmp_path / "link").symlink_to("real")
    write_text_atomically(tmp_path / "link", "new")
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "real").read_text() == "new"


def test_name_of_full_length(tmp_path: Path) -> None:
    write_text_atomically(tmp_path / ("n" * 255), "x")
    assert names(tmp_path) == ["n" * 255]


@pytest.mark.parametrize("old", [None, "old"])
@pytest.mark.parametrize("kind", [KeyboardInterrupt, SystemExit, RuntimeError, InputError])
def test_whatever_is_raised_leaves_the_old_file(
    tmp_path: Path, old: str | None, kind: type[BaseException]
) -> None:
    target = tmp_path / "a"
    if old is not None:
        target.write_text(old)

    def write(file: BinaryIO) -> None:
        file.write(b"half")
        raise kind("stop")

    with pytest.raises(kind, match="stop"):
        atomic_write(target, write)
    assert names(tmp_path) == ([] if old is None else ["a"])
    assert old is None or target.read_text() == old


@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_full_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str) -> None:
    target = tmp_path / "a"
    target.write_text("old")

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, call, full)
    with pytest.raises(FileError) as caught:
        write_text_atomically(target, "new", operation="scan", argument="--json")
    monkeypatch.undo()
    assert str(caught.value) == (
        f"scan: --json: expected a file that can be written, got {target} "
        "(No space left on device); "
        "free some space there or choose another folder; nothing was changed"
    )
    assert isinstance(caught.value.__cause__, OSError)
    assert names(tmp_path) == ["a"]
    assert target.read_text() == "old"


def test_full_disk_while_writing(tmp_path: Path) -> None:
    def write(file: BinaryIO) -> None:
        file.write(b"half")
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with pytest.raises(FileError, match=r"atomic_write: path: .*No space left.*free some space"):
        atomic_write(tmp_path / "a", write)
    assert names(tmp_path) == []


def test_check_writable_changes_nothing(tmp_path: Path) -> None:
    (tmp_path / "old").write_text("old")
    assert check_writable(tmp_path / "new") == tmp_path.resolve() / "new"
    check_writable(tmp_path / "old")
    assert names(tmp_path) == ["old"]
    assert (tmp_path / "old").read_text() == "old"


@pytest.mark.parametrize(
    ("path", "message"),
    [
        (".", r"repair: output: expected .* got the directory .*; add a file name to it"),
        ("no/a", r"repair: output: expected .*folder does not exist; create .* first"),
        ("file/a", r"repair: output: expected .*folder does not exist; create .* first"),
        (os.devnull, r"repair: output: .*not a regular file; give the name of a regular file"),
    ],
)
def test_refuses_before_the_work(tmp_path: Path, path: str, message: str) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(FileError, match=message):
        check_writable(tmp_path / path, operation="repair", argument="output")
    with pytest.raises(FileError, match=message):
        atomic_write(tmp_path / path, lambda file: None, operation="repair", argument="output")


def test_unwritable_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # Simulated: permission bits do not stop root.
    def denied(**_: object) -> None:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))

    monkeypatch.setattr("tempfile.TemporaryFile", denied)
    with pytest.raises(FileError, match=r"\(Permission denied\); choose a folder that you may"):
        check_writable(tmp_path / "a")


def test_explain_is_one_short_printable_line() -> None:
    assert explain(ValueError("a\x1b[31mb\nsecond")) == "ValueError: a?[31mb"
    assert explain(EOFError()) == "EOFError"
    assert explain(FileNotFoundError(errno.ENOENT, "No such file", "x")) == "No such file"
    assert len(explain(ValueError("x" * 999))) == 200
