"""`tacext scan`: is this model backdoored, and with which class?"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import click

from ..data import ImageSet
from ..errors import TacextError, printable
from ..plots import plot_norms, require_matplotlib
from ..report import Json, scan_to_dict, scans_to_dict, write_json
from ..scan_report import ScanReport
from ..tables import scan_line, scan_table
from .console import ResultConsole
from .exit_codes import EXIT_CODE_HELP, OF_VERDICT, ExitCode
from .inputs import (
    ModelAndData,
    ScanOptions,
    check_suffix,
    models_and_perhaps_data,
    scan_options,
)
from .wording import in_options, options_of

# Of several models the exit code is that of the gravest outcome.
_GRAVEST = (ExitCode.BACKDOORED, ExitCode.ERROR, ExitCode.INCONCLUSIVE, ExitCode.CLEAN)


@click.command("scan", epilog=EXIT_CODE_HELP)
@models_and_perhaps_data
@scan_options
@click.option("--plot", type=click.Path(), help="Write a PNG of the norms.")
def scan_command(
    given: tuple[ModelAndData, ...],
    options: ScanOptions,
    plot: str | None,
    input_shape: tuple[int, ...] | None,
) -> int:
    """Scan the model in WEIGHTS (.safetensors or a .pt state dict) with a few clean images.

    Prints a verdict: backdoored, with the suspect classes; clean; or inconclusive. Of several files
    of one architecture, a line each; one that fails does not stop the others.
    """
    first = given[0]
    if first.data_path is None and input_shape is None:
        raise click.UsageError("give --data, or --input-shape for a scan without any images")
    if first.data_path is not None and input_shape is not None:
        raise click.UsageError("--input-shape is for a scan without images: leave it or --data out")
    for one in given:
        one.check_outputs("scan", {"json": first.json_path, "plot": plot})
    if first.data_path is None and (first.split or first.samples or first.size):
        raise click.UsageError("--split, --samples and --size choose images: give --data")
    if input_shape is not None and (options.depth != "thorough" or options.quantile != 1):
        raise click.UsageError("--depth and --quantile judge real images: give --data")
    if plot is not None and input_shape is not None:
        raise click.UsageError("--plot shows the norms of real images: give --data")
    if plot is not None and len(given) > 1:
        raise click.UsageError("--plot shows one model: name one, or leave it out")
    if plot is not None:
        check_suffix("scan", "plot", plot, ".png")
        require_matplotlib("scan")
    if len(given) > 1:
        images = None if input_shape is not None else first.load_images()
        return _scan_several(given, images, options, input_shape)
    model = first.load_model()
    source = first.source
    images = None if input_shape is not None else first.load_images()
    report = first.named(first.scan(model, images, options, input_shape))
    names = _class_names(images, report)
    if first.json_path is not None:
        write_json(first.json_path, scan_to_dict(report, names, source), operation="scan")
    if plot is not None:
        plot_norms(report, plot, class_names=names, operation="scan")
    ResultConsole().print(scan_table(report, names))
    return OF_VERDICT[report.verdict]


def _class_names(images: ImageSet | None, report: ScanReport) -> Sequence[str] | None:
    """The names of the classes, where the images have as many as the model."""
    names = None if images is None else images.class_names
    return names if names is not None and len(names) == report.num_classes else None


def _scan_several(
    given: Sequence[ModelAndData],
    images: ImageSet | None,
    options: ScanOptions,
    input_shape: tuple[int, ...] | None,
) -> int:
    """Scans one after the other; the JSON is whole after each of them."""
    console = ResultConsole(soft_wrap=True)
    scans: list[Json] = []
    failed: list[Json] = []
    outcomes: Counter[ExitCode] = Counter()
    options_known = options_of(click.get_current_context().command)
    for one in given:
        try:
            model, source = one.load_model(), one.source
            report = one.named(one.scan(model, images, options, input_shape))
        except TacextError as error:
            told = in_options(str(error), options_known)
            click.echo(f"error: {printable(one.weights)}: {told}", err=True)
            failed.append({"weights": one.weights, "error": told})
            outcomes[ExitCode.ERROR] += 1
        else:
            console.print(scan_line(one.weights, report))
            scans.append(scan_to_dict(report, _class_names(images, report), source))
            outcomes[OF_VERDICT[report.verdict]] += 1
        if one.json_path is not None:
            content = scans_to_dict(scans, failed, len(given))
            write_json(one.json_path, content, operation="scan")
    words = {code: verdict for verdict, code in OF_VERDICT.items()} | {ExitCode.ERROR: "failed"}
    counts = ", ".join(f"{outcomes[code]} {words[code]}" for code in _GRAVEST)
    console.print(f"{len(given)} models: {counts}")
    return next(code for code in _GRAVEST if outcomes[code])
