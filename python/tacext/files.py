"""Files that are either whole or untouched: every result that tacext writes goes through here."""

from __future__ import annotations

import os
import secrets
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO

from .errors import FileError, TacextError, printable

__all__ = [
    "atomic_write",
    "check_writable",
    "explain",
    "write_bytes_atomically",
    "write_text_atomically",
]

StrPath = str | os.PathLike[str]


def explain(error: BaseException, limit: int = 200) -> str:
    """An exception as one short printable line.

    What a file of unknown origin puts into a message could otherwise steer the user's terminal.
    """
    if isinstance(error, OSError) and error.strerror:
        text = error.strerror
    else:
        lines = str(error).strip().splitlines()
        text = f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__
    text = printable(text)
    return text if len(text) <= limit else text[: limit - 3] + "..."


def check_writable(
    path: StrPath, *, operation: str = "check_writable", argument: str = "path"
) -> Path:
    """Checks, before hours of work, that a file can be written at `path`; changes nothing.

    Args:
        path: the file to be written later; it may exist.
        operation: named in the error, as the user knows it.
        argument: named in the error, as the user knows it.

    Returns:
        The real path behind `path`: writing through a link keeps the link.

    Raises:
        FileError: `path` is a directory or a device, or its folder is missing or not writable.
    """
    target = Path(os.path.realpath(path))

    def refuse(got: str, way_out: str, cause: OSError | None = None) -> FileError:
        error = FileError.of(
            operation, argument, expected="a file that can be written", got=got, way_out=way_out
        )
        error.__cause__ = cause
        return error

    if target.is_dir():
        raise refuse(f"the directory {target}", "add a file name to it")
    # Replacing /dev/null or a pipe by a regular file would break it for everyone else.
    if target.exists() and not target.is_file():
        raise refuse(f"{target}, which is not a regular file", "give the name of a regular file")
    if not target.parent.is_dir():
        raise refuse(f"{target}, whose folder does not exist", f"create {target.parent} first")
    try:
        # Permission bits say little (root, read-only mounts, quotas): try it.
        with tempfile.TemporaryFile(dir=target.parent):
            pass
    except OSError as error:
        raise refuse(
            f"{target} ({explain(error)})", "choose a folder that you may write to", error
        ) from error
    return target


def atomic_write(
    path: StrPath,
    write: Callable[[BinaryIO], object],
    *,
    operation: str = "atomic_write",
    argument: str = "path",
) -> None:
    """Writes a file as a whole: readers see the old content or the new, never a part.

    `write` fills a temporary file in the same folder, which is flushed to the disk and then
    renamed. Whatever is raised on the way, an interrupt included, removes the temporary file and
    leaves the old one as it was. The mode of an existing file is kept.

    Args:
        path: the file to write.
        write: called once with the open binary file; its own TacextErrors pass through.
        operation: named in the error, as the user knows it.
        argument: named in the error, as the user knows it.

    Raises:
        FileError: as `check_writable`, or the disk is full, or any other failure to write.
    """
    target = check_writable(path, operation=operation, argument=argument)
    # Not derived from the target's name, which may already be as long as names can be.
    temporary = target.with_name(f".tacext-{secrets.token_hex(8)}.tmp")
    try:
        with temporary.open("xb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        if target.exists():
            temporary.chmod(target.stat().st_mode & 0o7777)
        temporary.replace(target)
    except BaseException as error:
        temporary.unlink(missing_ok=True)
        if isinstance(error, OSError) and not isinstance(error, TacextError):
            raise FileError.of(
                operation,
                argument,
                expected="a file that can be written",
                got=f"{target} ({explain(error)})",
                way_out="free some space there or choose another folder; nothing was changed",
            ) from error
        raise


def write_bytes_atomically(
    path: StrPath,
    data: bytes,
    *,
    operation: str = "write_bytes_atomically",
    argument: str = "path",
) -> None:
    """Writes `data` through `atomic_write`.

    Raises:
        FileError: as `atomic_write`.
    """
    atomic_write(path, lambda file: file.write(data), operation=operation, argument=argument)


def write_text_atomically(
    path: StrPath,
    text: str,
    *,
    operation: str = "write_text_atomically",
    argument: str = "path",
) -> None:
    """Writes `text` as UTF-8, its line ends as they are, through `atomic_write`.

    Raises:
        FileError: as `atomic_write`.
    """
    write_bytes_atomically(path, text.encode(), operation=operation, argument=argument)
