"""The user's own code, models and triggers: the only code from outside that tacext runs."""

from __future__ import annotations

import functools
import importlib
import importlib.util
import inspect
import itertools
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

from torch import Tensor, nn

from .errors import FileError, InputError, TacextError
from .files import explain

__all__ = ["code_file", "load_factory", "load_trigger"]

_serial = itertools.count()


@dataclass(frozen=True)
class _Request:
    """Who asks for a function, for the messages, and how many arguments it will be called with."""

    operation: str
    argument: str
    arguments: int

    def refuse(self, expected: str, got: str, way_out: str) -> InputError:
        return InputError.of(
            self.operation, self.argument, expected=expected, got=got, way_out=way_out
        )


def load_factory(reference: str) -> Callable[[], nn.Module]:
    """Finds the function or class that builds a model, and runs no more than its module.

    A file is loaded anew each time, under a private name; its folder is on sys.path while it loads
    and while the factory runs, so that it can import its neighbours.

    Args:
        reference: "path/to/file.py:factory" or "package.module:factory".

    Returns:
        A callable without arguments. That it returns an nn.Module is for the caller to check.

    Raises:
        FileError: the file does not exist or cannot be read.
        InputError: no colon or no name after it, a module that cannot be imported or fails while
            it is (its exception is the cause), no such attribute, one that cannot be called or
            that needs arguments.
    """
    return _load(reference, _Request("load_factory", "arch", 0))


def load_trigger(reference: str) -> Callable[[Tensor], Tensor]:
    """Finds the function that stamps a trigger on a batch of inputs, as `load_factory` does.

    Raises:
        FileError, InputError: as `load_factory`; the function must take one argument.
    """
    return _load(reference, _Request("load_trigger", "trigger", 1))


def code_file(reference: str) -> Path:
    """The file in which a reference finds its code, found without running or importing anything.

    Of a module that is the file of that name in the working directory, whether or not it is there:
    where it is, it comes first.
    """
    place = reference.rpartition(":")[0]
    if _is_file(place):
        return Path(place)
    parts = Path(*place.split("."))
    return parts / "__init__.py" if parts.is_dir() else parts.with_suffix(".py")


def _is_file(place: str) -> bool:
    return place.endswith(".py") or "/" in place


def _load(reference: str, request: _Request) -> Callable[..., Any]:
    example = "name it as path/to/file.py:function or package.module:function"
    place, colon, name = reference.rpartition(":")
    if not colon or not place or not name.isidentifier():
        raise request.refuse(
            "a module and a function, divided by a colon", repr(reference), example
        )
    folder = None
    if _is_file(place):
        file = Path(place)
        if not file.is_file() or file.suffix != ".py":
            what = "does not exist"
            if file.exists():
                what = "does not end in .py" if file.is_file() else "is not a file"
            raise FileError.of(
                request.operation,
                request.argument,
                expected="an existing Python file",
                got=f"{file}, which {what}",
                way_out="check the path",
            )
        folder = str(file.resolve().parent)
        module = _import(place, folder, lambda: _execute(file), request)
    else:
        if not all(part.isidentifier() for part in place.split(".")):
            raise request.refuse("the name of a module", repr(place), example)
        here = str(Path.cwd())  # as python -m does, so that a file at hand can be named so, too
        module = _import(place, here, lambda: importlib.import_module(place), request)
    if not hasattr(module, name):
        own = [
            k
            for k, v in vars(module).items()
            if getattr(v, "__module__", "") == module.__name__
            and callable(v)
            and not k.startswith("_")
        ]
        raise request.refuse(
            f"{place} to define {name}",
            f"only {', '.join(own[:12])}" if own else "no function or class of its own",
            "check the name after the colon",
        )
    function = getattr(module, name)
    if not callable(function):
        raise request.refuse(
            f"{name} to be a function or class", type(function).__name__, "name what can be called"
        )
    _check_arguments(name, function, request)
    if folder is None:
        found: Callable[..., Any] = function
        return found
    return _with_path(function, folder)


@contextmanager
def _on_path(folder: str | None) -> Iterator[None]:
    if folder is None:
        yield
        return
    sys.path.insert(0, folder)
    importlib.invalidate_caches()
    try:
        yield
    finally:
        if folder in sys.path:  # the file may have changed sys.path itself
            sys.path.remove(folder)


def _with_path(function: Callable[..., Any], folder: str) -> Callable[..., Any]:
    @functools.wraps(function)
    def call(*arguments: Any) -> Any:
        with _on_path(folder):
            return function(*arguments)

    return call


def _execute(file: Path) -> ModuleType:
    name = f"_tacext_arch_{next(_serial)}_{file.stem}"
    spec = importlib.util.spec_from_file_location(name, file)
    assert spec is not None  # None only without a suffix that Python knows; the caller checked it
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    # Registered before it runs: dataclasses look their module up by name.
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    return module


def _import(
    place: str, folder: str | None, load: Callable[[], ModuleType], request: _Request
) -> ModuleType:
    try:
        with _on_path(folder):
            return load()
    except TacextError:
        raise
    # SystemExit: a script that parses its arguments or exits must not end the scan unexplained.
    except (Exception, SystemExit) as error:
        frames = traceback.extract_tb(error.__traceback__)
        own = [f for f in frames if f.filename[0] != "<" and f.filename != __file__]
        where = f" at {Path(own[-1].filename).name}:{own[-1].lineno}" if own else ""
        way_out = "correct it" if _is_file(place) else "correct it, or give the path of its file"
        if isinstance(error, ModuleNotFoundError) and error.name:
            missing = error.name.partition(".")[0]
            if missing != place.partition(".")[0]:
                way_out = f"install {missing}"
        raise request.refuse(f"{place} to import", f"{explain(error)}{where}", way_out) from error


def _check_arguments(name: str, function: Callable[..., object], request: _Request) -> None:
    try:
        signature = inspect.signature(function)
    except (TypeError, ValueError):  # builtins without one
        return
    try:
        signature.bind(*[None] * request.arguments)
    except TypeError as error:
        count = "no arguments" if request.arguments == 0 else "one argument, the batch of inputs"
        raise request.refuse(
            f"{name} to take {count}",
            f"{name}{signature} ({error})",
            "wrap it in such a function, in a file of your own",
        ) from None
