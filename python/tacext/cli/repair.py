"""`tacext repair`: remove the backdoor and save the repaired weights."""

from __future__ import annotations

from dataclasses import fields

import click
from rich.console import Console

from ..files import check_writable
from ..repairing import FinetuneSettings, repair
from ..report import repair_to_dict, write_json
from ..tables import repair_table
from ..weights import save_weights
from .exit_codes import EXIT_CODE_HELP
from .inputs import ModelSource, describe_source, load_data, model_and_data

_DEFAULTS = {field.name: field.default for field in fields(FinetuneSettings)}


@click.command("repair", epilog=EXIT_CODE_HELP)
@model_and_data
@click.option(
    "--output",
    required=True,
    type=click.Path(),
    help="Where to write the repaired weights (.safetensors).",
)
@click.option(
    "--target",
    "targets",
    multiple=True,
    type=click.IntRange(min=0),
    help="Class to repair; may be given several times.  [default: the scan's suspects]",
)
@click.option(
    "--epochs", type=click.IntRange(min=1), default=_DEFAULTS["epochs"], show_default=True
)
@click.option(
    "--learning-rate",
    type=click.FloatRange(min=0, min_open=True),
    default=_DEFAULTS["learning_rate"],
    show_default=True,
)
@click.option(
    "--beta",
    type=click.FloatRange(min=0),
    default=_DEFAULTS["beta"],
    show_default=True,
    help="Weight of the loss on shifted latents; 0 is plain fine-tuning.",
)
@click.option(
    "--holdout",
    type=click.FloatRange(0, 1, min_open=True, max_open=True),
    default=_DEFAULTS["holdout"],
    show_default=True,
    help="Share of the images kept to measure accuracy with.",
)
def repair_command(
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
    output: str,
    targets: tuple[int, ...],
    epochs: int,
    learning_rate: float,
    beta: float,
    holdout: float,
) -> None:
    """Remove the backdoor from the model in WEIGHTS by fine-tuning on clean labelled images.

    Without --target the model is scanned first and its suspects are repaired. The file in WEIGHTS
    is left as it is.
    """
    source = ModelSource(arch, mean, std, head)
    check_writable(output, operation="repair", argument="output")
    if json_path is not None:
        check_writable(json_path, operation="repair", argument="json")
    model = source.load(weights)
    images = load_data(data_path, split, samples, seed, size)
    result = repair(
        model,
        images,
        targets=targets or None,
        head=source.head_in_model,
        settings=FinetuneSettings(
            epochs=epochs,
            learning_rate=learning_rate,
            beta=beta,
            batch_size=min(batch_size, FinetuneSettings.batch_size),
            holdout=holdout,
            seed=seed,
        ),
    )
    save_weights(source.inner(result.model), output)
    if json_path is not None:
        content = repair_to_dict(result, describe_source(weights, data_path, split, seed))
        write_json(json_path, content, operation="repair")
    console = Console()
    console.print(repair_table(result))
    console.print(f"written: {output}", highlight=False, soft_wrap=True)
