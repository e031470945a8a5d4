"""Scanning several models of one architecture: each by itself, whatever becomes of the others."""

from __future__ import annotations

import copy
import time
from collections import Counter
from collections.abc import Callable, Sequence

import click
from rich.console import RenderableType
from torch import nn

from ..data import ImageSet
from ..errors import FileError, InputError, TacextError, printable
from ..files import explain
from ..report import Json, scan_to_dict, scans_to_dict, write_json
from ..scan_report import ScanReport
from ..tables import scan_line
from ..user_code import load_factory
from .console import ResultConsole
from .exit_codes import OF_VERDICT, ExitCode
from .failures import tell, told_of
from .inputs import ModelAndData, ScanOptions

# Of several models the exit code is that of the gravest outcome.
_GRAVEST = (ExitCode.BACKDOORED, ExitCode.ERROR, ExitCode.INCONCLUSIVE, ExitCode.CLEAN)
# Writing takes this share of the time at most: of very many models each time is long.
_WRITING = 0.1


def scan_one(
    given: ModelAndData,
    model: nn.Module,
    images: ImageSet | None,
    options: ScanOptions,
    input_shape: tuple[int, ...] | None,
) -> tuple[ScanReport, Json]:
    """The scan of a loaded model as the command line wants it, and where model and data came from."""
    source = given.source
    return given.named(given.scan(model, images, options, input_shape)), source


def class_names(images: ImageSet | None, report: ScanReport) -> Sequence[str] | None:
    """The names of the classes, where the images have as many as the model."""
    names = None if images is None else images.class_names
    return names if names is not None and len(names) == report.num_classes else None


class _Factory:
    """The user's code, loaded with the first model: a file that is unsafe is refused before it runs.

    Weights of one model must not be found in the next where the code hands out the same module again,
    or one with the same inside: then every model gets a copy.
    """

    def __init__(self, reference: str) -> None:
        self._reference = self.__qualname__ = reference
        self._found: Callable[[], nn.Module] | None = None
        self._shares = False
        self.failure: TacextError | None = None

    def __call__(self) -> nn.Module:
        if self._found is None:
            try:
                found = load_factory(self._reference)
            except TacextError as error:
                self.failure = error
                raise
            built = found()
            self._shares = _share(built, found())
            self._found = found
        else:
            built = self._found()
        if not self._shares:
            return built
        try:
            return copy.deepcopy(built)
        except Exception as error:
            raise InputError.of(
                "scan",
                "arch",
                expected="a factory that builds a new model each time",
                got=f"modules that it hands out again, and that cannot be copied ({explain(error)})",
                way_out="build all of the model within the factory, or scan one file at a time",
            ) from error


def _share(one: object, other: object) -> bool:
    modules = [
        set(map(id, m.modules())) if isinstance(m, nn.Module) else {id(m)} for m in (one, other)
    ]
    return not modules[0].isdisjoint(modules[1])


class _Outcomes:
    """What came of the models, on the terminal and in the JSON, which is whole at any time."""

    def __init__(self, models: int, json_path: str | None) -> None:
        self._models, self._path = models, json_path
        self._scans: list[Json] = []
        self._failed: list[Json] = []
        self._counts: Counter[ExitCode] = Counter()
        self._console = ResultConsole(soft_wrap=True)
        self._written, self._took = 0.0, 0.0
        self._unwritten = ""
        self.write()  # what an earlier run left is not taken for what these models are

    def add(self, name: str, report: ScanReport, told: Json) -> None:
        """Of a model that was scanned."""
        self._scans.append(told)
        self._counts[OF_VERDICT[report.verdict]] += 1
        self._write_perhaps()
        self._print(scan_line(name, report))

    def fail(self, name: str, told: str) -> None:
        """Of one that could not be."""
        self._failed.append({"weights": name, "error": told})
        self._counts[ExitCode.ERROR] += 1
        self._write_perhaps()
        tell(f"error: {printable(name)}: {told}")

    def write(self) -> None:
        """Writes what there is; what cannot be written now may be later."""
        if self._path is None:
            return
        begin = time.monotonic()
        try:
            content = scans_to_dict(self._scans, self._failed, self._models)
            write_json(self._path, content, operation="scan")
            self._unwritten = ""
        except (FileError, ValueError, MemoryError) as error:
            if not self._unwritten:
                tell(f"error: {printable(str(error)) or type(error).__name__}")
            self._unwritten = str(error) or type(error).__name__
        self._written = time.monotonic()
        self._took = self._written - begin

    def _write_perhaps(self) -> None:
        if time.monotonic() - self._written >= self._took / _WRITING:
            self.write()

    def _print(self, what: RenderableType | str) -> None:
        try:
            self._console.print(what, markup=False, highlight=False)
        except (OSError, UnicodeError) as error:
            tell(f"error: tacext: {printable(str(error))}")
            self._console.on_broken_pipe()
            self._counts[ExitCode.ERROR] += 1

    def end(self) -> ExitCode:
        """How many of each there were, and the gravest."""
        words = {code: verdict for verdict, code in OF_VERDICT.items()} | {ExitCode.ERROR: "failed"}
        counts = ", ".join(f"{self._counts[code]} {words[code]}" for code in _GRAVEST)
        self._print(f"{self._models} models: {counts}")
        if self._unwritten:
            self._counts[ExitCode.ERROR] += 1
        return next(code for code in _GRAVEST if self._counts[code])


def scan_several(
    given: Sequence[ModelAndData],
    images: ImageSet | None,
    options: ScanOptions,
    input_shape: tuple[int, ...] | None,
) -> ExitCode:
    """Scans one model after the other; what happens to one does not stop the others."""
    outcomes = _Outcomes(len(given), given[0].json_path)
    factory = _Factory(given[0].arch)
    command = click.get_current_context().command
    try:
        for one in given:
            try:
                report, source = scan_one(
                    one, one.load_model(factory=factory), images, options, input_shape
                )
                told = scan_to_dict(report, class_names(images, report), source)
            except (Exception, SystemExit) as error:
                if error is factory.failure:  # the same for all
                    raise
                outcomes.fail(one.weights, told_of(error, command))
                continue
            outcomes.add(one.weights, report, told)
    finally:
        outcomes.write()
    return outcomes.end()
