"""`tacext scan`: is this model backdoored, and with which class?"""

from __future__ import annotations

from dataclasses import replace

import click
from rich.console import Console

from ..files import check_writable
from ..normalisation import Normalized
from ..plots import plot_norms
from ..report import scan_to_dict, write_json
from ..scanning import scan
from ..tables import scan_table
from .exit_codes import EXIT_CODE_HELP, OF_VERDICT
from .inputs import ModelSource, describe_source, load_data, model_and_data


@click.command("scan", epilog=EXIT_CODE_HELP)
@model_and_data
@click.option(
    "--metric",
    type=click.Choice(["standardized", "l2"]),
    default="standardized",
    show_default=True,
    help="How perturbations are measured.",
)
@click.option(
    "--alpha",
    type=click.FloatRange(0, 1, min_open=True, max_open=True),
    default=0.01,
    show_default=True,
    help="False-alarm rate of the verdict.",
)
@click.option("--plot", type=click.Path(), help="Write a PNG of the norms.")
@click.pass_context
def scan_command(
    context: click.Context,
    weights: str,
    arch: str,
    data_path: str,
    split: str | None,
    samples: int | None,
    seed: int,
    mean: list[float] | None,
    std: list[float] | None,
    size: tuple[int, int] | None,
    head: str | None,
    batch_size: int,
    json_path: str | None,
    metric: str,
    alpha: float,
    plot: str | None,
) -> None:
    """Scan the model in WEIGHTS (.safetensors or a .pt state dict) with a few clean images.

    Prints a verdict: backdoored, with the suspect classes; clean; or inconclusive.
    """
    source = ModelSource(arch, mean, std, head)
    for path, argument in ((json_path, "json"), (plot, "plot")):
        if path is not None:
            check_writable(path, operation="scan", argument=argument)
    model = source.load(weights)
    images = load_data(data_path, split, samples, seed, size)
    report = scan(
        model,
        images,
        head=source.head_in_model,
        metric="l2" if metric == "l2" else "standardized",
        alpha=alpha,
        batch_size=batch_size,
    )
    if isinstance(model, Normalized):  # the user knows the layer by its name in their own model
        report = replace(report, head=report.head.removeprefix("model."))
    names = images.class_names
    if names is not None and len(names) != report.num_classes:
        names = None
    if json_path is not None:
        content = scan_to_dict(report, names, describe_source(weights, data_path, split, seed))
        write_json(json_path, content, operation="scan")
    if plot is not None:
        plot_norms(report, plot, class_names=names, operation="scan")
    Console().print(scan_table(report, names))
    context.exit(OF_VERDICT[report.verdict])
