"""The parts of the fine-tuning loop that a repaired model alone would not show."""

from __future__ import annotations

import torch

from digits import digit_case
from tacext import scan
from tacext.finetuning import _Shifts
from tacext.heads import find_head


def test_a_shift_follows_the_model_and_never_grows_longer() -> None:
    case = digit_case()
    images, labels = case.data.defender
    head = find_head(case.clean, images[:4])
    report = scan(case.clean, (images, labels), depth="fast", metric="l2")
    full = report.perturbation[[3, 5]]
    with torch.no_grad():
        logits = case.clean(images)
    for share, expected in ((0.3, 0.3), (2.0, 1.0)):  # shorter than what is needed, and longer
        shifts = _Shifts(share * full.flip(1), (3, 5), head, quantile=1.0)
        shifts.see(logits)
        shifts.follow()
        torch.testing.assert_close(shifts._shifts, expected * full, rtol=1e-4, atol=1e-6)
