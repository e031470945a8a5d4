"""`tacext repair`: remove the backdoor and save the repaired weights."""

from __future__ import annotations

from dataclasses import fields, replace
from typing import Any, get_args

import click
from click.core import ParameterSource

from ..errors import InputError
from ..finetune_checkpoint import check_checkpoint
from ..finetuning import FinetuneSettings
from ..latent_patch import has_latent_patch
from ..repair_methods import SETTINGS_OF, Method
from ..repair_settings import RepairSettings
from ..repairing import repair
from ..report import repair_to_dict, write_json
from ..tables import repair_table, scan_table
from ..weights import save_weights
from .console import ResultConsole
from .exit_codes import EXIT_CODE_HELP, ExitCode
from .inputs import (
    Finite,
    ModelAndData,
    ScanOptions,
    check_suffix,
    head_in_model,
    inner,
    model_and_data,
    scan_options,
)

_TRAINING = ("epochs", "learning_rate", "beta", "gamma", "distillation", "checkpoint")
_DEFAULTS = {field.name: field.default for field in fields(FinetuneSettings)}


@click.command("repair", epilog=EXIT_CODE_HELP)
@model_and_data
@scan_options
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
    help="Class to repair; may be given several times.  [default: what the scan suspects or doubts]",
)
@click.option(
    "--method",
    type=click.Choice(get_args(Method)),
    default="auto",
    show_default=True,
    help="patch limits the latent in front of the last layer, prune makes channels constant, finetune "
    "trains; auto tries them in this order, and puts limits in front of what the others make, too.",
)
@click.option(
    "--epochs",
    type=click.IntRange(min=1),
    help="Passes over the images.  [default: six, or more of few images]",
)
@click.option(
    "--learning-rate",
    type=Finite(min=0, min_open=True),
    default=_DEFAULTS["learning_rate"],
    show_default=True,
    help="Of finetune: the peak of a cosine schedule.",
)
@click.option(
    "--beta",
    type=Finite(min=0),
    default=_DEFAULTS["beta"],
    show_default=True,
    help="Weight of the loss on shifted latents.",
)
@click.option(
    "--gamma",
    type=Finite(min=0),
    default=_DEFAULTS["gamma"],
    show_default=True,
    help="Weight of the loss on images with changes and patches that lead to the class.",
)
@click.option(
    "--distillation",
    type=Finite(min=0),
    default=_DEFAULTS["distillation"],
    show_default=True,
    help="Weight of staying with the original's answers on clean images.",
)
@click.option(
    "--max-accuracy-drop",
    type=Finite(0, 1),
    default=0.02,
    show_default=True,
    help="What the repair may cost on held-out images; one that costs more is rolled back.",
)
@click.option(
    "--no-gate",
    is_flag=True,
    help="Write whatever comes out, and do without the scan of the repaired model. Needs a --method.",
)
@click.option(
    "--holdout",
    type=Finite(0, 1, min_open=True, max_open=True),
    default=_DEFAULTS["holdout"],
    show_default=True,
    help="Share of the images kept to measure accuracy with.",
)
@click.option(
    "--checkpoint",
    type=click.Path(),
    help="Where finetune keeps its state after every epoch, and goes on from (.safetensors).",
)
def repair_command(
    given: ModelAndData,
    options: ScanOptions,
    output: str,
    targets: tuple[int, ...],
    method: Method,
    epochs: int | None,
    learning_rate: float,
    beta: float,
    gamma: float,
    distillation: float,
    max_accuracy_drop: float,
    no_gate: bool,
    holdout: float,
    checkpoint: str | None,
) -> ExitCode:
    """Remove the backdoor from the model in WEIGHTS, given clean labelled images.

    Without --target the model is scanned first; what it suspects is repaired, or else what it is in
    doubt of. Perturbations come from the scan's margins, and so --quantile matters with --target, too;
    --metric and --alpha bear on the suspects, and on the scan of the outcome, whose alpha is .01 at
    least. With --target, --depth is fast unless it is given: only of a thorough scan the gate knows the
    patch that leads a single class astray, and asks it again.

    The file in WEIGHTS is left as it is. The outcome is scanned thoroughly; one that costs too much
    accuracy, or in which the backdoor is not seen to be gone, is not written. Of a patch, and of auto,
    the file holds limits beside the weights: tacext loads it into the same --arch; into plain torch code
    load the outcome of --method prune or finetune.

    --epochs, --learning-rate, --beta, --gamma, --distillation and --checkpoint are those of finetune.
    """
    outputs = {"output": output, "json": given.json_path, "checkpoint": checkpoint}
    given.check_outputs("repair", outputs)
    check_suffix("repair", "output", output, ".safetensors")
    if no_gate and method == "auto":
        raise click.UsageError("--no-gate needs a --method: auto is judged by the gate")
    shared: dict[str, Any] = {
        "batch_size": given.batch_size or FinetuneSettings().batch_size,
        "holdout": holdout,
        "seed": given.seed,
    }
    settings: RepairSettings
    if method in ("auto", "finetune"):
        settings = FinetuneSettings(
            epochs=epochs,
            learning_rate=learning_rate,
            beta=beta,
            gamma=gamma,
            distillation=distillation,
            **shared,
        )
    else:
        _refuse_what_trains(method)
        settings = SETTINGS_OF[method](**shared)
    if checkpoint is not None:
        check_checkpoint(checkpoint)
    model = given.load_model()
    if has_latent_patch(model):
        raise InputError.of(
            "repair",
            "WEIGHTS",
            expected="weights without a latent patch",
            got=f"{given.weights}, which has one",
            way_out="repair the weights that it was made of, with a --target for each class, or what "
            "tacext.remove_latent_patch returns",
        )
    source = given.source
    images = given.load_images()
    console = ResultConsole()
    # Targets that are given need not be found; most of what leads into them is seen without gradients.
    source_of_depth = click.get_current_context().get_parameter_source("depth")
    if targets and source_of_depth != ParameterSource.COMMANDLINE:
        options = replace(options, depth="fast")
    report = given.scan(model, images, options)
    if not targets:
        console.print(scan_table(given.named(report), images.class_names))
    result = repair(
        model,
        images,
        report,
        targets=targets or None,
        method=method,
        max_accuracy_drop=None if no_gate else max_accuracy_drop,
        head=head_in_model(options.head, model),
        settings=settings,
        checkpoint=checkpoint,
    )
    if result.accepted:
        save_weights(inner(result.model), output)
    if given.json_path is not None:
        content = repair_to_dict(result, source)
        write_json(given.json_path, content, operation="repair")
    console.print(repair_table(result))
    if not result.accepted:
        console.print(f"not written: {output}", highlight=False, soft_wrap=True)
        return ExitCode.ROLLED_BACK
    console.print(f"written: {output}", highlight=False, soft_wrap=True)
    return ExitCode.CLEAN


def _refuse_what_trains(method: Method) -> None:
    """Options that nothing would come of are an error."""
    context = click.get_current_context()
    for name in _TRAINING:
        if context.get_parameter_source(name) == ParameterSource.COMMANDLINE:
            raise click.UsageError(
                f"--{name.replace('_', '-')} is of --method finetune, not of {method}"
            )
