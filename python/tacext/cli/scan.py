"""`tacext scan`: is this model backdoored, and with which class?"""

from __future__ import annotations

import click

from ..plots import plot_norms, require_matplotlib
from ..report import scan_to_dict, write_json
from ..scanning import scan
from ..tables import scan_table
from .console import ResultConsole
from .exit_codes import EXIT_CODE_HELP, OF_VERDICT
from .inputs import BATCH_SIZE, ModelAndData, check_suffix, head_option, model_and_data


@click.command("scan", epilog=EXIT_CODE_HELP)
@model_and_data
@head_option
@click.option(
    "--metric",
    type=click.Choice(["standardized", "l2"]),
    default="standardized",
    show_default=True,
    help="How perturbations are measured.",
)
@click.option(
    "--quantile",
    type=click.FloatRange(0, 1, min_open=True),
    default=1.0,
    show_default=True,
    help="Share of the images that must be carried past each pair of classes.",
)
@click.option(
    "--alpha",
    type=click.FloatRange(0, 1, min_open=True, max_open=True),
    default=0.01,
    show_default=True,
    help="False-alarm rate of the verdict.",
)
@click.option("--plot", type=click.Path(), help="Write a PNG of the norms.")
def scan_command(
    given: ModelAndData,
    head: str | None,
    metric: str,
    quantile: float,
    alpha: float,
    plot: str | None,
) -> int:
    """Scan the model in WEIGHTS (.safetensors or a .pt state dict) with a few clean images.

    Prints a verdict: backdoored, with the suspect classes; clean; or inconclusive.
    """
    given.check_outputs("scan", json=given.json_path, plot=plot)
    if plot is not None:
        check_suffix("scan", "plot", plot, ".png")
        require_matplotlib("scan")
    model = given.load_model()
    source = given.source
    images = given.load_images()
    report = scan(
        model,
        images,
        head=given.head_in_model(head),
        metric="l2" if metric == "l2" else "standardized",
        quantile=quantile,
        alpha=alpha,
        batch_size=given.batch_size or BATCH_SIZE,
    )
    report = given.named(report)
    names = images.class_names
    if names is not None and len(names) != report.num_classes:
        names = None
    if given.json_path is not None:
        content = scan_to_dict(report, names, source)
        write_json(given.json_path, content, operation="scan")
    if plot is not None:
        plot_norms(report, plot, class_names=names, operation="scan")
    ResultConsole().print(scan_table(report, names))
    return OF_VERDICT[report.verdict]
