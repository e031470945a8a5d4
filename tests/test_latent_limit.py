"""The last limit of a latent patch: what lies where no clean latents of its class do."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from digits import head_and_latents, patched_digits
from tacext import InputError, LatentPatch, PatchSettings, demo
from tacext.guard_fit import perturbations_of
from tacext.heads import Head
from tacext.latent_patch_fit import (
    _SHARE_OF_LATENTS,
    LedLatents,
    fit_latent_limit,
    fit_latent_patch,
)


def test_what_no_way_shows_is_told_by_where_clean_latents_lie() -> None:
    """The trigger of the digits, of which nothing was found but s_t: a shift of every latent."""
    _, head, latent, led = head_and_latents()
    s_t = perturbations_of(latent, head.logits(latent), head.weight.detach(), "test")[demo.TARGET]
    way = LedLatents(demo.TARGET, latent + s_t.float(), None)
    patch = fit_latent_patch(head, latent, [way], PatchSettings())
    limit = fit_latent_limit(head, latent, [demo.TARGET], PatchSettings())
    others = head.logits(latent).argmax(1) != demo.TARGET
    left = []
    for patch.limit in (None, limit):
        answers = head.logits(patch(led, head.module)).argmax(1)[others]
        left.append(float((answers == demo.TARGET).double().mean()))
    assert left[1] < left[0] - 0.2
    named = {name for name, value in enumerate(limit.limit.tolist()) if value < 1e4}
    assert named == {demo.TARGET}
    clean = latent[head.logits(latent).argmax(1) == demo.TARGET]
    passed = float((patch(clean, head.module) == clean).all(1).double().mean())
    assert passed >= 0.96 - 1.5 / len(clean)


def clusters(samples: int, seed: int) -> tuple[Head, Tensor]:
    """A head of five classes, and latents around its rows."""
    generator = torch.Generator().manual_seed(seed)
    head = nn.Linear(64, 5, bias=False)
    with torch.no_grad():
        head.weight.copy_(functional.normalize(torch.randn(5, 64, generator=generator)))
        centres = 6 * head.weight[torch.arange(samples) % 5]
        latent = (centres + torch.randn(samples, 64, generator=generator)).relu()
    return Head("", head), latent


@pytest.mark.parametrize(("samples", "copies"), [(2000, 1), (200, 1), (200, 4)])
def test_new_clean_latents_pass_the_limit_as_often_as_asked_for(samples: int, copies: int) -> None:
    """Those that it was not fitted on; copies of a sample tell nothing new."""
    settings = PatchSettings(untouched=0.8)  # a part of the rest is the limit's
    touched = []
    for seed in range(12):  # of 400 samples a class each knows its tail to a third
        head, latent = clusters(samples + 3000, seed)
        seen, new = latent[:samples].repeat(copies, 1), latent[samples:]
        limit = fit_latent_limit(head, seen, iter([1, 3]), settings)
        assert [k for k, at in enumerate(limit.limit.tolist()) if at < 1e4] == [1, 3]
        logits = head.logits(new)
        own = (logits.argmax(1) == 1) | (logits.argmax(1) == 3)
        touched.append(float(limit(new, logits)[own].double().mean()))
    assert sum(touched) / len(touched) <= settings_share(settings)
    if samples == 2000:  # with samples enough it is near to what may be touched
        assert sum(touched) / len(touched) >= 0.5 * settings_share(settings)


def settings_share(settings: PatchSettings) -> float:
    """What a limit may touch: a part of what a patch may, of two classes of five 1.5 % of all in all."""
    return min(1 - settings.untouched, 0.015 / 0.4) * _SHARE_OF_LATENTS


def test_one_latent_however_often_has_no_limit() -> None:
    head, latent = clusters(40, 0)
    with pytest.raises(InputError, match="takes for class 1, got 1 sample"):
        fit_latent_limit(head, latent[6:7].repeat(9, 1), [1], PatchSettings())


def test_the_limit_stays_in_single_precision() -> None:
    patch = next(m for m in patched_digits().model.modules() if isinstance(m, LatentPatch))
    half = copy.deepcopy(patch).to(torch.float16)
    assert half.direction.dtype == torch.float16
    assert half.limit is not None
    assert {buffer.dtype for buffer in half.limit.buffers()} == {torch.float32}
