"""Which models the zoo holds: one line each, reproducible from its name."""

from __future__ import annotations

from dataclasses import dataclass, replace

from tacext import attacks
from tacext.attacks import Attack, Trigger

DATASETS = ("cifar10", "gtsrb", "mnist")
NETWORKS = ("resnet", "preact", "vgg", "plain", "vit")


@dataclass(frozen=True)
class Spec:
    """One model of the zoo.

    Attributes:
        dataset, network: see `images` and `architectures`.
        attack: a name in `ATTACKS`, or "clean".
        rate: poisoned samples, as a share of the training set; 0 for clean models.
        seed: of everything: initial weights, order, victims, target, trigger.
    """

    dataset: str
    network: str
    attack: str
    rate: float
    seed: int

    @property
    def name(self) -> str:
        """Unique, and a file name."""
        share = "" if self.attack == "clean" else f"-{round(100 * self.rate):02d}"
        return f"{self.dataset}-{self.network}-{self.attack}{share}-{self.seed}"


# The share of samples that carry the trigger, or one like it, and keep their label.
COVER = {"wanet": 2.0, "source_specific": 1.0}  # as a multiple of the poisoning rate

# Attacks that no small network learns from fewer poisoned ones of so few images.
FEWEST = {
    "wanet": 0.2,
    "input_aware": 0.1,
    "lira": 0.1,
    "sig": 0.1,
    "source_specific": 0.05,
    "all_to_all": 0.2,
}

# Networks that do not learn the attack in so short a training, and what stands in for them.
STAND_INS = {
    ("wanet", "vgg"): "resnet",
    ("wanet", "vit"): "preact",
    ("input_aware", "plain"): "resnet",
    ("input_aware", "vgg"): "preact",
    ("lira", "vit"): "preact",
    ("all_to_all", "plain"): "preact",
    ("sig", "vit"): "vgg",
}

# A clean-label wave must be easier to see than the class itself.
SIG_AMPLITUDE = {"cifar10": 40 / 255, "gtsrb": 60 / 255}

SINGLE_TARGET = (
    "badnets", "checkerboard", "trojan_square", "trojan_watermark", "blend", "wanet",
    "input_aware", "lira", "sig",
)  # fmt: skip
SEVERAL = ("two_targets",)
HIDDEN = ("source_specific", "all_to_all")
ATTACKS = (*SINGLE_TARGET, *SEVERAL, *HIDDEN)

# A white patch whose attacker knows what the scan looks at (`adaptive`).
ADAPTIVE = ("adaptive_reach", "adaptive_spread")


def targets_of(spec: Spec, num_classes: int) -> tuple[int, int]:
    """The target and a second class (second target or source), drawn from the seed."""
    first = (3 * spec.seed + 7 * (*ATTACKS, *ADAPTIVE).index(spec.attack)) % num_classes
    return first, (first + 1 + spec.seed % (num_classes - 1)) % num_classes


def attacks_of(spec: Spec, num_classes: int, channels: int, size: int) -> tuple[Attack, ...]:
    """The attacks behind a model; none for a clean one, nor for those with learned triggers."""
    if spec.attack == "clean":
        return ()
    target, other = targets_of(spec, num_classes)
    shape = channels, size, size
    to_target = attacks.AllToOne(target)
    patch: Trigger = attacks.PatchTrigger(attacks.white_patch(4))
    checkerboard = attacks.PatchTrigger(attacks.checkerboard_patch(3), bottom=0, right=0)
    warp = attacks.WarpTrigger(spec.seed, strength=1.0)
    match spec.attack:
        case "badnets" | "adaptive_reach" | "adaptive_spread":
            return (Attack(patch, to_target),)
        case "checkerboard":
            return (Attack(checkerboard, to_target),)
        case "trojan_square":
            trigger: Trigger = attacks.AdditiveTrigger(attacks.trojan_square(*shape, spec.seed))
            return (Attack(trigger, to_target),)
        case "trojan_watermark":
            trigger = attacks.AdditiveTrigger(attacks.trojan_watermark(*shape, spec.seed))
            return (Attack(trigger, to_target),)
        case "blend":
            trigger = attacks.BlendTrigger(attacks.random_pattern(*shape, spec.seed), 0.15)
            return (Attack(trigger, to_target),)
        case "wanet":
            return (Attack(warp, to_target, cover=attacks.RandomWarp(warp)),)
        case "sig":
            wave = attacks.SinusoidTrigger(SIG_AMPLITUDE[spec.dataset])
            return (Attack(wave, to_target, clean_label=True),)
        case "two_targets":
            far = attacks.PatchTrigger(
                attacks.random_pattern(channels, 4, 4, spec.seed), size - 5, size - 5
            )
            return (Attack(patch, to_target), Attack(far, attacks.AllToOne(other)))
        case "source_specific":
            goal = attacks.SourceSpecific(other, target)
            return (Attack(patch, goal, cover=patch),)
        case "all_to_all":
            return (Attack(patch, attacks.AllToAll(num_classes)),)
    return ()


# Beyond the rotation: attacks that few networks of the zoo learned well enough to count.
MORE = (
    Spec("gtsrb", "resnet", "wanet", 0.3, 5),
    Spec("gtsrb", "preact", "input_aware", 0.1, 5),
    Spec("cifar10", "vgg", "lira", 0.1, 5),
    Spec("gtsrb", "resnet", "sig", 0.1, 5),
    Spec("cifar10", "resnet", "blend", 0.1, 5),
    Spec("cifar10", "vgg", "badnets", 0.1, 5),
    Spec("cifar10", "resnet", "two_targets", 0.1, 5),
    Spec("gtsrb", "vgg", "source_specific", 0.1, 5),
)


def _learnable(spec: Spec) -> Spec:
    """The spec, with a network and data that the attack succeeds on."""
    network = STAND_INS.get((spec.attack, spec.network), spec.network)
    dataset = spec.dataset
    if spec.attack == "all_to_all" and dataset == "cifar10":
        dataset = "gtsrb"  # a trigger that moves every class succeeds no more often than ACC
    if spec.attack == "sig" and dataset == "mnist":
        dataset = "cifar10"  # a digit is always easier to see than a wave
    return replace(spec, network=network, dataset=dataset)


def zoo() -> list[Spec]:
    """The CPU-sized zoo, backdoored and clean models in turns.

    Every attack meets several data sets, networks and rates; the combinations rotate, so that no
    attack is tied to one network.
    """
    backdoored = [
        _learnable(
            Spec(
                DATASETS[(i + turn) % 3],
                NETWORKS[(i + 2 * turn) % 5],
                attack,
                max(rate, FEWEST.get(attack, 0.0)),
                turn + 1,
            )
        )
        for turn, rate in enumerate((0.1, 0.05, 0.05, 0.01))
        for i, attack in enumerate(ATTACKS)
    ]
    clean = [
        Spec(dataset, network, "clean", 0.0, seed)
        for seed in (1, 2, 3, 4)
        for dataset in DATASETS
        for network in NETWORKS
    ]
    turns = [spec for pair in zip(backdoored, clean, strict=False) for spec in pair]
    return [*turns, *backdoored[len(clean) :], *clean[len(backdoored) :], *MORE]


def adaptive_zoo() -> list[Spec]:
    """Models of attackers who train against the scan; not part of what it is calibrated on."""
    return [
        Spec(dataset, network, attack, 0.1, 1)
        for dataset, network in (("cifar10", "resnet"), ("gtsrb", "vgg"))
        for attack in ADAPTIVE
    ]


def tinyimagenet_zoo() -> list[Spec]:
    """A few models of 200 classes; each takes some twenty minutes."""
    backdoored = [Spec("tinyimagenet", "resnet", a, 0.05, 1) for a in ("badnets", "blend")]
    clean = [Spec("tinyimagenet", "resnet", "clean", 0.0, seed) for seed in (1, 2)]
    return [spec for pair in zip(backdoored, clean, strict=True) for spec in pair]
