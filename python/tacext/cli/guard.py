"""`tacext guard fit` and `tacext guard judge`: a guard from clean images, and what it says of others."""

from __future__ import annotations

import click

from ..guard import Guard
from ..guard_judgement import judge
from ..report import guard_to_dict, write_json
from ..tables import guard_table, judgement_table
from .console import ResultConsole
from .exit_codes import EXIT_CODE_HELP, ExitCode
from .inputs import (
    BATCH_SIZE,
    Finite,
    ModelAndData,
    check_suffix,
    head_in_model,
    model_and_data,
)


@click.group("guard", epilog=EXIT_CODE_HELP)
def guard_command() -> None:
    """Guard a model in production: is this image a trigger?"""


@guard_command.command("fit", epilog=EXIT_CODE_HELP)
@model_and_data
@click.option(
    "--output", required=True, type=click.Path(), help="Where to write the guard (.safetensors)."
)
@click.option(
    "--false-positive-rate",
    type=Finite(0, 1, min_open=True, max_open=True),
    default=0.01,
    show_default=True,
    help="Share of clean images that the guard may flag.",
)
@click.option("--head", help="Name of the last linear layer, if it is not found by itself.")
def fit_command(
    given: ModelAndData, output: str, false_positive_rate: float, head: str | None
) -> None:
    """Learn from clean images what is usual for the model in WEIGHTS, and write a guard.

    The images should be like those of production, and new to the model. The file holds no weights;
    tacext.Guard.load puts it beside the model, and C and C++ programs read it, too.
    """
    given.check_outputs("guard fit", {"output": output, "json": given.json_path})
    check_suffix("guard fit", "output", output, ".safetensors")
    model = given.load_model()
    provenance = given.source
    images = given.load_images()
    guard = Guard.fit(
        model,
        images,
        false_positive_rate,
        head=head_in_model(head, model),
        batch_size=given.batch_size or BATCH_SIZE,
        seed=given.seed,
    )
    guard.save(output)
    if given.json_path is not None:
        content = guard_to_dict(guard, None, provenance)
        write_json(given.json_path, content, operation="guard fit")
    console = ResultConsole()
    console.print(guard_table(guard))
    console.print(f"written: {output}", soft_wrap=True, highlight=False)


@guard_command.command("judge", epilog=EXIT_CODE_HELP)
@model_and_data
@click.option(
    "--guard",
    "guard_path",
    required=True,
    type=click.Path(),
    help="A file that `tacext guard fit` wrote, for this model with the same --mean and --std.",
)
@click.option(
    "--false-positive-rate",
    type=Finite(0, 1, min_open=True, max_open=True),
    help="Share of clean images that may be flagged.  [default: that of the guard]",
)
def judge_command(
    given: ModelAndData, guard_path: str, false_positive_rate: float | None
) -> ExitCode:
    """Run the model in WEIGHTS on images, and say which look like ones with a trigger.

    They need no labels: an .npz may hold x alone, a folder just images, in order of their names.

    Exits with 1 where more are flagged than clean images explain (p below 0.01), else with 0.
    """
    given.check_outputs("guard judge", {"json": given.json_path}, {"--guard": guard_path})
    model = given.load_model()
    provenance = given.source | {"guard": guard_path}
    guard = Guard.load(guard_path, model)
    if false_positive_rate is not None:
        guard = guard.at_rate(false_positive_rate)
    images = given.load_images(need_labels=False)
    judgement = judge(guard, images, batch_size=given.batch_size or BATCH_SIZE)
    if given.json_path is not None:
        content = guard_to_dict(guard, judgement, provenance)
        write_json(given.json_path, content, operation="guard judge")
    ResultConsole().print(judgement_table(judgement))
    return ExitCode.BACKDOORED if judgement.suspicious else ExitCode.CLEAN
