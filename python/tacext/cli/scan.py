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
    models_and_perhaps_data,
    scan_options,
)
from .scan_several import class_names, scan_one, scan_several


@click.command("scan", epilog=f"{EXIT_CODE_HELP} Of several models the gravest: 1, 2, 3, 0.")
@models_and_perhaps_data
@click.option(
    "--trust-patch",
    is_flag=True,
    help="Latent patches in all WEIGHTS are of your own repairs: with them a model may be called clean.",
)
@click.option("--plot", type=click.Path(), help="Write a PNG of the norms, of one model.")
@scan_options
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
    first, *more = given
    if first.data_path is None and input_shape is None:
        raise click.UsageError("give --data, or --input-shape for a scan without any images")
    if first.data_path is not None and input_shape is not None:
        raise click.UsageError("--input-shape is for a scan without images: leave it or --data out")
    others = {f"WEIGHTS {one.weights}": one.weights for one in more}
    first.check_outputs("scan", {"json": first.json_path, "plot": plot}, others)
    if first.data_path is None and (first.split or first.samples or first.size):
        raise click.UsageError("--split, --samples and --size choose images: give --data")
    if input_shape is not None and (options.depth != "thorough" or options.quantile != 1):
        raise click.UsageError("--depth and --quantile judge real images: give --data")
    if plot is not None and input_shape is not None:
        raise click.UsageError("--plot shows the norms of real images: give --data")
    if plot is not None and more:
        raise click.UsageError("--plot shows one model: name one, or leave it out")
    if plot is not None:
        check_suffix("scan", "plot", plot, ".png")
        require_matplotlib("scan")
    if more:
        images = None if input_shape is not None else first.load_images()
        return scan_several(given, images, options, input_shape)
    model = first.load_model()
    images = None if input_shape is not None else first.load_images()
    report, source = scan_one(first, model, images, options, input_shape)
    names = class_names(images, report)
    if first.json_path is not None:
        write_json(first.json_path, scan_to_dict(report, names, source), operation="scan")
    if plot is not None:
        plot_norms(report, plot, class_names=names, operation="scan")
    ResultConsole().print(scan_table(report, names))
    return OF_VERDICT[report.verdict]
