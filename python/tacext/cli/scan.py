"""`tacext scan`: is this model backdoored, and with which class?"""

from __future__ import annotations

import click

from ..plots import plot_norms, require_matplotlib
from ..report import scan_to_dict, write_json
from ..tables import scan_table
from .console import ResultConsole
from .exit_codes import EXIT_CODE_HELP, OF_VERDICT
from .inputs import (
    ModelAndData,
    ScanOptions,
    check_suffix,
    model_and_perhaps_data,
    scan_options,
)


@click.command("scan", epilog=EXIT_CODE_HELP)
@model_and_perhaps_data
@scan_options
@click.option("--plot", type=click.Path(), help="Write a PNG of the norms.")
def scan_command(
    given: ModelAndData,
    options: ScanOptions,
    plot: str | None,
    input_shape: tuple[int, ...] | None,
) -> int:
    """Scan the model in WEIGHTS (.safetensors or a .pt state dict) with a few clean images.

    Prints a verdict: backdoored, with the suspect classes; clean; or inconclusive.
    """
    if given.data_path is None and input_shape is None:
        raise click.UsageError("give --data, or --input-shape for a scan without any images")
    if given.data_path is not None and input_shape is not None:
        raise click.UsageError("--input-shape is for a scan without images: leave it or --data out")
    given.check_outputs("scan", {"json": given.json_path, "plot": plot})
    if given.data_path is None and (given.split or given.samples or given.size):
        raise click.UsageError("--split, --samples and --size choose images: give --data")
    if input_shape is not None and (options.depth != "thorough" or options.quantile != 1):
        raise click.UsageError("--depth and --quantile judge real images: give --data")
    if plot is not None and input_shape is not None:
        raise click.UsageError("--plot shows the norms of real images: give --data")
    if plot is not None:
        check_suffix("scan", "plot", plot, ".png")
        require_matplotlib("scan")
    model = given.load_model()
    source = given.source
    images = None if input_shape is not None else given.load_images()
    report = given.named(given.scan(model, images, options, input_shape))
    names = None if images is None else images.class_names
    if names is not None and len(names) != report.num_classes:
        names = None
    if given.json_path is not None:
        content = scan_to_dict(report, names, source)
        write_json(given.json_path, content, operation="scan")
    if plot is not None:
        plot_norms(report, plot, class_names=names, operation="scan")
    ResultConsole().print(scan_table(report, names))
    return OF_VERDICT[report.verdict]
