"""What makes a scan less trustworthy than it could be, and what would help."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from .detection import LARGEST_DOUBT
from .errors import counted, listed
from .observation import Observation
from .ops import MinimalPerturbation, Status
from .verdict import Finding

# Fewer samples leave too much of every M[k, j] to chance: at 100 images published models were seen
# to change verdicts from one draw to the next.
FEWEST_SAMPLES = 200

# The constants of all tests were fitted with as many samples; verdicts do not change beyond them.
ENOUGH_SAMPLES = 2500

# A model that is surer than it is right by more than this sees images, or labels, of another kind
# than it was trained on: on held-out images of the bench the gap is .03 at most, on mirrored and
# mixed ones .25 or more.
LARGEST_CONFIDENCE_GAP = 0.2


@dataclass(frozen=True)
class Doubt:
    """One reason not to rely on a scan.

    Attributes:
        text: for people.
        severe: no verdict stands beside it; beside others a model is not called clean.
        cured_by_samples: whether more clean samples may end it.
    """

    text: str
    severe: bool
    cured_by_samples: bool = False


def sensible_accuracy(num_classes: int) -> float:
    """Below this a classifier was most likely fed images unlike those it was trained with."""
    return 0.5 if num_classes <= 100 else 0.25


def doubts_of(
    observation: Observation, perturbations: Sequence[MinimalPerturbation], notes: list[str]
) -> tuple[Doubt, ...]:
    """All doubts of a scan with data, severe ones first.

    Args:
        observation: of the data.
        perturbations: what was solved from it, in each metric.
        notes: why there was no second look.
    """
    num_classes, samples = observation.head.num_classes, observation.samples
    seen, accuracy = observation.classes_seen, observation.correct / observation.samples
    unsolved = unsolved_doubt(*perturbations)
    found: list[Doubt] = []
    if accuracy < sensible_accuracy(num_classes):
        found.append(
            Doubt(
                f"the model is right on only {accuracy:.1%} of the samples; check the normalisation "
                "(mean and std) and the order of the classes",
                severe=True,
            )
        )
    if samples < FEWEST_SAMPLES:
        few = counted(samples, "sample is", "samples are")
        text = f"{few} too few for a verdict; use {FEWEST_SAMPLES} or more"
        found.append(Doubt(text, severe=True, cured_by_samples=True))
    if unsolved is not None:
        found.append(unsolved)
    if 2 * seen < num_classes:
        text = f"the data covers only {seen} of {num_classes} classes; pass samples of all"
        found.append(Doubt(text, severe=True, cured_by_samples=True))
    elif seen < num_classes:
        text = (
            f"the data covers {seen} of {num_classes} classes (none of {listed(observation.unseen)}); all "
            "norms are smaller than with samples of every class"
        )
        found.append(Doubt(text, severe=False, cured_by_samples=True))
    if observation.confidence - accuracy > LARGEST_CONFIDENCE_GAP:
        found.append(
            Doubt(
                f"the model is {observation.confidence:.0%} sure of its answers and right on "
                f"{accuracy:.0%}: the data may be of another kind than it was trained on, or the "
                "labels wrong",
                severe=False,
            )
        )
    return (*found, *(Doubt(note, severe=False) for note in notes))


def unsolved_doubt(*perturbations: MinimalPerturbation) -> Doubt | None:
    """The doubt about classes whose perturbations have no certificate; None where all have one."""
    limit = Status.ITERATION_LIMIT
    unsolved = sorted({k for p in perturbations for k in p.classes[p.status == limit].tolist()})
    if not unsolved:
        return None
    classes = ", ".join(map(str, unsolved[:20]))
    return Doubt(f"classes without a certificate: {classes}", severe=True)


def doubted(finding: Finding, doubts: tuple[Doubt, ...]) -> Finding:
    """The finding, which is inconclusive where a doubt stands against it."""
    worst = next((doubt for doubt in doubts if doubt.severe), None)
    if worst is not None and finding.verdict == "inconclusive":
        return replace(finding, doubtful=())
    if worst is not None:
        reason = f"{worst.text} (else: {finding.reason})"
        return replace(finding, verdict="inconclusive", suspects=(), doubtful=(), reason=reason)
    if doubts and finding.verdict == "clean":
        return replace(finding, verdict="inconclusive", reason=doubts[0].text)
    return finding


def samples_advised(
    finding: Finding, doubts: tuple[Doubt, ...], samples: int, *, comparable: bool
) -> int | None:
    """How many clean samples may turn an inconclusive verdict into another; None where more would not.

    Args:
        finding: as `doubted` left it.
        doubts: of the scan.
        samples: that it had.
        comparable: whether the norms of the classes could be compared at all.
    """
    undecided = comparable and finding.p_value < LARGEST_DOUBT
    helps = all(doubt.cured_by_samples for doubt in doubts) and (bool(doubts) or undecided)
    if finding.verdict == "inconclusive" and samples < ENOUGH_SAMPLES and helps:
        return ENOUGH_SAMPLES
    return None
