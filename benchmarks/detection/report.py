"""Scores the detectors on the evidence of the zoo, each model by constants fitted without its kind.

    python benchmarks/detection/report.py [--alpha 0.01] [--leave-out network|dataset] [--models] [--plot FILE]

Prints, for every attack, network and data set: how many backdoored models are flagged, how many with
the right class first, and how many clean ones are flagged, with 95 % intervals; and beside the
thorough scan the fast one and the paper's rule on the same models.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import calibrate
import numpy as np
import torch
from calibrate import Case
from rich.box import MARKDOWN
from rich.console import Console
from rich.table import Table
from scipy import stats
from specs import ADAPTIVE, HIDDEN, SEVERAL

from tacext.detection import NormTest, Verdict, anomaly_index, judge_norms
from tacext.joint_test import Calibration, judge_jointly
from tacext.patch_reach import PatchReach
from tacext.reach import Reach
from tacext.second_look import SecondLook
from tacext.shuffle import Shuffle
from tacext.verdict import weigh, weigh_without_data

# The index above which the paper's rule, as it is commonly used, calls a class poisoned.
PAPER_INDEX = 2.0
NORM_OF_THE_PAPER = "l2 1 2500"


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What a detector said of one model.

    Attributes:
        score: larger where the model is more suspicious.
        verdict: what it called the model; without the doubts that a scan has of its samples.
        first: the class that it suspects most.
    """

    case: Case
    score: float
    verdict: Verdict
    first: int

    @property
    def flagged(self) -> bool:
        """Whether it called the model backdoored."""
        return self.verdict == "backdoored"

    @property
    def named(self) -> bool:
        """Flagged, and the class it suspects most is a target."""
        return self.flagged and self.first in self.case.targets


def look_of(case: Case) -> SecondLook:
    """The second look as the evidence tells it."""
    raw = case.raw
    classes = tuple(range(len(case.evidence["norm"])))
    gain = torch.tensor(raw["reach"]["gain"], dtype=torch.float64)
    nothing = torch.zeros(0)
    shuffled = raw["shuffle"] and Shuffle(
        raw["shuffle"]["share"],
        tuple(raw["shuffle"]["destinations"]),
        nothing,
        raw["shuffle"]["budget"],
        nothing,
        raw["shuffle"]["seconds"],
    )
    patched = None
    if "patch" in raw:
        rate = torch.tensor(raw["patch"]["rate"], dtype=torch.float64)
        patched = PatchReach(
            classes,
            raw["patch"]["side"],
            rate,
            torch.tensor(raw["patch"]["gain"], dtype=torch.float64),
            raw["patch"]["images"],
            torch.zeros(len(classes), 2, dtype=torch.int64),
            nothing,
            raw["patch"]["seconds"],
        )
    return SecondLook(
        classes,
        Reach(
            classes,
            tuple(raw["reach"]["budgets"]),
            gain,
            torch.tensor(raw["reach"]["rate"], dtype=torch.float64),
            raw["reach"]["scale"],
            nothing,
            raw["reach"]["seconds"],
        ),
        patched,
        shuffled or None,
        calibrate.source_of(raw),
        calibrate.waves_of(raw),
        calibrate.corners_of(raw),
        0.0,
    )


def norms_of(case: Case, norm: str = calibrate.NORM) -> np.ndarray:
    """The norms of all classes."""
    return np.array(case.raw["norms"][norm], dtype=np.float64)


def norm_test(case: Case, alpha: float) -> NormTest:
    """What a scan makes of the norms."""
    return judge_norms(norms_of(case), alpha, norms_of(case, calibrate.BALANCED))


def thorough(case: Case, alpha: float, calibration: Calibration) -> Outcome:
    """The verdict of a thorough scan."""
    finding, evidence = weigh(norm_test(case, alpha), look_of(case), alpha, calibration)
    first = finding.suspects[0] if finding.suspects else evidence.joint.most_suspicious
    return Outcome(case, -np.log(finding.p_value), finding.verdict, first)


def fast(case: Case, alpha: float, calibration: Calibration) -> Outcome:
    """The verdict of a fast scan."""
    look = dataclasses.replace(look_of(case), reach=None, patch=None, shuffle=None, source=None)
    finding, evidence = weigh(norm_test(case, alpha), look, alpha, calibration)
    first = finding.suspects[0] if finding.suspects else evidence.joint.most_suspicious
    return Outcome(case, -np.log(finding.p_value), finding.verdict, first)


def by_norms(case: Case, alpha: float) -> Outcome:
    """The verdict of a scan that has nothing but the norms."""
    test = norm_test(case, alpha)
    first = test.suspects[0] if test.suspects else int(np.nanargmin(test.class_p_values))
    return Outcome(case, -np.log(test.p_value), test.verdict, first)


def without_data(case: Case, alpha: float, calibration: Calibration) -> Outcome:
    """The verdict of a scan that has no images."""
    kinds = {kind: case.evidence[kind] for kind in ("margin", "prototype")}
    joint = judge_jointly(kinds, alpha, calibration)
    finding = weigh_without_data(joint)
    return Outcome(case, -np.log(finding.p_value), finding.verdict, joint.most_suspicious)


def papers_rule(case: Case) -> Outcome:
    """The anomaly index of the plain norms, above 2."""
    index = anomaly_index(norms_of(case, NORM_OF_THE_PAPER))
    largest = float(np.nanmax(index))
    verdict: Verdict = "backdoored" if largest > PAPER_INDEX else "clean"
    return Outcome(case, largest, verdict, int(np.nanargmax(index)))


def cross_validated(
    cases: Sequence[Case],
    alpha: float,
    leave_out: str,
    judge: Callable[[Case, float, Calibration], Outcome] = thorough,
) -> list[Outcome]:
    """Every model by constants fitted on the clean models of other networks, or other data sets."""

    @functools.cache
    def without(kind: str) -> Calibration:
        return calibrate.fit([c for c in cases if not c.targets and getattr(c, leave_out) != kind])

    return [judge(case, alpha, without(getattr(case, leave_out))) for case in cases]


def of_knowing_attackers(
    knowing: Sequence[Case], cases: Sequence[Case], alpha: float, leave_out: str
) -> Table:
    """A row for each model whose attacker trained against the scan; no rate counts them."""
    table = Table("model", "target", "ACC", "ASR", "thorough", "p", "fast", "p", box=MARKDOWN)
    for case in knowing:
        kind = getattr(case, leave_out)
        clean = [c for c in cases if not c.targets and getattr(c, leave_out) != kind]
        cells: list[str] = []
        fitted = calibrate.fit(clean)
        for found in (thorough(case, alpha, fitted), fast(case, alpha, fitted)):
            flagged = f"flagged, {found.first}" if found.flagged else f"- ({found.first} first)"
            cells += [flagged, f"{np.exp(-found.score):.2g}"]
        table.add_row(
            case.name,
            str(case.targets[0]),
            f"{case.raw['acc']:.3f}",
            f"{case.raw['asr']:.3f}",
            *cells,
        )
    return table


def share(hits: int, of: int) -> str:
    """A share with its exact 95 % interval (Clopper and Pearson)."""
    if not of:
        return "-"
    low = stats.beta.ppf(0.025, hits, of - hits + 1) if hits else 0.0
    high = stats.beta.ppf(0.975, hits + 1, of - hits) if hits < of else 1.0
    return f"{hits}/{of} [{low:.2f}, {high:.2f}]"


def is_single(case: Case) -> bool:
    """Whether one target is reached from all classes."""
    return bool(case.targets) and case.attack not in (*SEVERAL, *HIDDEN)


def auroc(outcomes: Iterable[Outcome]) -> float:
    """How often a backdoored model scores above a clean one."""
    scores: dict[bool, list[float]] = {True: [], False: []}
    for outcome in outcomes:
        scores[bool(outcome.case.targets)].append(outcome.score)
    pairs = np.subtract.outer(np.array(scores[True]), np.array(scores[False]))
    return float(((pairs > 0) + 0.5 * (pairs == 0)).mean())


def summary(outcomes: Sequence[Outcome]) -> list[str]:
    """One row of the table: flagged, named, hidden ones, false alarms, AUROC."""
    single = [o for o in outcomes if is_single(o.case)]
    others = [o for o in outcomes if o.case.targets and not is_single(o.case)]
    clean = [o for o in outcomes if not o.case.targets]
    return [
        share(sum(o.flagged for o in single), len(single)),
        share(sum(o.named for o in single), len(single)),
        share(sum(o.flagged for o in others), len(others)),
        share(sum(o.flagged for o in clean), len(clean)),
        f"{auroc(outcomes):.3f}" if clean and len(clean) < len(outcomes) else "-",
    ]


def plot_p_values(outcomes: Sequence[Outcome], path: Path) -> None:
    """A PNG of how many clean models have a p-value below each threshold."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    p_values = np.sort([np.exp(-o.score) for o in outcomes if not o.case.targets])
    figure = Figure(figsize=(5, 4), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    axes.plot([0, 1], [0, 1], color="0.5", linestyle="--", label="uniform")
    count = np.arange(1, len(p_values) + 1)
    band = stats.binom.interval(0.95, len(p_values), np.linspace(0, 1, 201))
    axes.fill_between(
        np.linspace(0, 1, 201),
        band[0] / len(p_values),
        band[1] / len(p_values),
        color="0.5",
        alpha=0.2,
        label="95 % of the time",
    )
    axes.step(p_values, count / len(p_values), where="post", label=f"{len(p_values)} clean models")
    axes.set_xlabel("p-value of the scan")
    axes.set_ylabel("share of clean models below")
    axes.legend(frameon=False)
    figure.savefig(path, dpi=150)


VERDICTS: tuple[Verdict, ...] = ("backdoored", "inconclusive", "clean")


def verdicts(outcomes: dict[str, list[Outcome]]) -> Table:
    """How many models of each kind each detector called backdoored, inconclusive and clean."""
    kinds: dict[str, Callable[[Case], bool]] = {
        "one target": is_single,
        "others": lambda case: bool(case.targets) and not is_single(case),
        "clean": lambda case: not case.targets,
    }
    told = " / ".join(VERDICTS)
    table = Table("detector", *(f"{kind}: {told}" for kind in kinds), box=MARKDOWN)
    for name, found in outcomes.items():
        cells = []
        for is_kind in kinds.values():
            said = [o.verdict for o in found if is_kind(o.case)]
            cells.append(" / ".join(str(said.count(verdict)) for verdict in VERDICTS))
        table.add_row(name, *cells)
    return table


HEADINGS = ("one target, flagged", "target named", "others, flagged", "clean, flagged", "AUROC")


def tables(
    outcomes: dict[str, list[Outcome]], cells: Callable[[Case], Sequence[str]]
) -> list[Table]:
    """All detectors on all models, and the first of them in every cell."""
    over_all = Table("detector", *HEADINGS, box=MARKDOWN)
    for name, found in outcomes.items():
        over_all.add_row(name, *summary(found))
    first, found = next(iter(outcomes.items()))
    by_cell = Table(f"{first}, by", *HEADINGS[:-1], box=MARKDOWN)
    for cell in sorted({cell for o in found for cell in cells(o.case)}):
        by_cell.add_row(cell, *summary([o for o in found if cell in cells(o.case)])[:-1])
    return [over_all, by_cell]


def main() -> None:
    """Prints the tables."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--alpha", type=float, default=0.01)
    parser.add_argument("--leave-out", choices=("network", "dataset"), default="network")
    parser.add_argument("--models", action="store_true", help="a line for every model as well")
    parser.add_argument("--plot", type=Path, help="PNG of the p-values of clean models")
    options = parser.parse_args()
    everything = calibrate.read_cases()
    cases = [case for case in everything if case.attack not in ADAPTIVE]
    knowing = [case for case in everything if case.attack in ADAPTIVE]
    outcomes = {
        "thorough": cross_validated(cases, options.alpha, options.leave_out),
        "fast": cross_validated(cases, options.alpha, options.leave_out, fast),
        "fast, alpha .05": cross_validated(cases, 0.05, options.leave_out, fast),
        "norms alone": [by_norms(case, options.alpha) for case in cases],
        "norms alone, alpha .05": [by_norms(case, 0.05) for case in cases],
        "the paper's rule": [papers_rule(case) for case in cases],
    }
    seen = [case for case in cases if "margin" in case.evidence]  # older files lack it
    if seen:
        found = cross_validated(seen, options.alpha, options.leave_out, without_data)
        outcomes["without data"] = found
        targets_first = sum(o.first in o.case.targets for o in found if is_single(o.case))
    console = Console(width=150)
    for table in tables(
        outcomes, lambda c: (f"attack {c.attack}", f"network {c.network}", f"data {c.dataset}")
    ):
        console.print(table)
    console.print(verdicts(outcomes))
    if seen:
        console.print(
            f"without data a target is the most suspicious class of {targets_first} of the first kind"
        )
    if knowing:
        console.print(of_knowing_attackers(knowing, cases, options.alpha, options.leave_out))
    if options.plot is not None:
        plot_p_values(outcomes["thorough"], options.plot)
    if options.models:
        for o in sorted(outcomes["thorough"], key=lambda o: (not o.case.targets, -o.score)):
            right = "named" if o.named else "flagged" if o.flagged else ""
            first = (
                "" if not o.case.targets else "first" if o.first in o.case.targets else "not first"
            )
            console.print(
                f"{o.case.name:42} p {np.exp(-o.score):8.2g} {right:8} {first}", highlight=False
            )


if __name__ == "__main__":
    main()
