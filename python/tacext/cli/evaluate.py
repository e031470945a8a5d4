"""`tacext evaluate`: ACC, ASR, RA and DER under a known trigger."""

from __future__ import annotations

import click

from ..attacks import AllToOne, Goal, SourceSpecific
from ..evaluation import Evaluation, evaluate
from ..report import evaluation_to_dict, write_json
from ..tables import evaluation_table
from ..user_code import code_file, load_trigger
from .console import ResultConsole
from .exit_codes import EXIT_CODE_HELP
from .inputs import BATCH_SIZE, ModelAndData, model_and_data


@click.command("evaluate", epilog=EXIT_CODE_HELP)
@model_and_data
@click.option(
    "--trigger",
    required=True,
    metavar="MODULE_OR_FILE:FUNCTION",
    help="Maps a batch of images in [0, 1] to triggered images; runs that code.",
)
@click.option("--target", required=True, type=click.IntRange(min=0), help="The attacked class.")
@click.option(
    "--source",
    type=click.IntRange(min=0),
    help="The class whose images the trigger leads there, if it acts on one class alone.",
)
@click.option(
    "--baseline", type=click.Path(), help="Weights before repair; the DER is measured against it."
)
def evaluate_command(
    given: ModelAndData,
    trigger: str,
    target: int,
    source: int | None,
    baseline: str | None,
) -> None:
    """Measure the model in WEIGHTS on clean images and on the same images with a known trigger."""
    given.check_outputs(
        "evaluate",
        {"json": given.json_path},
        {"--trigger": code_file(trigger), "--baseline": baseline},
    )
    stamp = load_trigger(trigger)
    model = given.load_model()
    provenance = given.source  # of the file that was read, whatever becomes of it meanwhile
    images = given.load_images()
    goal: Goal = AllToOne(target) if source is None else SourceSpecific(source, target)
    rows: list[tuple[str, Evaluation]] = []
    before = None
    if baseline is not None:
        before = evaluate(
            given.load_model(baseline),
            images,
            stamp,
            goal,
            batch_size=given.batch_size or BATCH_SIZE,
        )
        rows.append(("baseline", before))
    after = evaluate(
        model, images, stamp, goal, baseline=before, batch_size=given.batch_size or BATCH_SIZE
    )
    rows.append(("model", after))
    if given.json_path is not None:
        content = evaluation_to_dict(after, provenance)
        write_json(given.json_path, content, operation="evaluate")
    ResultConsole().print(evaluation_table(rows))
