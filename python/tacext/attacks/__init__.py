"""Backdoor attacks, to test your own models, defences and training pipelines against.

attack = Attack(PatchTrigger(white_patch(4)), AllToOne(8))
poisoned, plan = poison(images, attack, rate=0.05)    # an ImageSet to train on
tacext.evaluate(model, test_images, attack.trigger, attack.goal)
"""

from .goals import AllToAll, AllToOne, Goal, SourceSpecific
from .learned import BoundedNoiseTrigger, InputAwareTrigger
from .poisoning import Attack, PoisoningPlan, plan_poisoning, poison
from .triggers import (
    AdditiveTrigger,
    BlendTrigger,
    PatchTrigger,
    RandomWarp,
    SinusoidTrigger,
    Trigger,
    WarpTrigger,
    checkerboard_patch,
    random_pattern,
    trojan_square,
    trojan_watermark,
    white_patch,
)

__all__ = [
    "AdditiveTrigger",
    "AllToAll",
    "AllToOne",
    "Attack",
    "BlendTrigger",
    "BoundedNoiseTrigger",
    "Goal",
    "InputAwareTrigger",
    "PatchTrigger",
    "PoisoningPlan",
    "RandomWarp",
    "SinusoidTrigger",
    "SourceSpecific",
    "Trigger",
    "WarpTrigger",
    "checkerboard_patch",
    "plan_poisoning",
    "poison",
    "random_pattern",
    "trojan_square",
    "trojan_watermark",
    "white_patch",
]
