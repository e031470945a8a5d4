"""Scans of models with limits in front of classes: what these hold is a doubt, what passes them a backdoor."""

from __future__ import annotations

import copy
import dataclasses
import functools
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from digits import Cropped, digit_case, padded, padded_corner, patched_digits, scan_of
from exits import patched_head
from tacext import ScanReport, demo, evaluate, limited_scan, repair, scan
from tacext.heads import find_head, latent_of
from tacext.latent_patch import LatentPatch, patch_in_front, with_latent_patch
from tacext.latent_patch_fit import shifts_between_logits
from tacext.limited_scan import holds_back, led_anew, with_limits, without_norms
from tacext.scan_report import Depth
from tacext.second_look import SecondLook
from tacext.verdict import Finding


def holding_nothing() -> nn.Module:
    """With a patch as anybody can put into a file of weights."""
    model = copy.deepcopy(patched_digits().model)
    head = patched_head(model)
    head.exits = None
    head.patch.threshold += 1e6
    assert head.patch.limit is not None
    head.patch.limit.limit += 1e6
    return model


def always(_target: int) -> bool:
    return True


def never(_target: int) -> bool:
    return False


@pytest.mark.parametrize("depth", ["norms", "fast", "thorough"])
def test_what_a_limit_holds_is_a_doubt_and_what_passes_it_a_backdoor(depth: Depth) -> None:
    data = padded(digit_case().data.defender)
    held = scan(patched_digits().model, data, depth=depth, alpha=0.02)
    assert (held.verdict, held.suspects, held.limited) == ("inconclusive", (), (demo.TARGET,))
    assert held.doubtful[0] == demo.TARGET
    assert "; but the latent patch in front of it holds that back" in held.reason
    assert ("lets no more through" in held.reason) == (depth == "thorough")
    loose = scan(holding_nothing(), data, depth=depth, alpha=0.02)
    assert loose.verdict == "backdoored"
    assert loose.suspects[0] == demo.TARGET
    assert loose.limited == (demo.TARGET,)
    assert "is not seen to hold it back" in loose.reason


def test_only_suspects_that_limits_hold_are_doubts() -> None:
    report = scan(digit_case().backdoored, digit_case().data.defender, depth="norms")
    assert report.suspects == (demo.TARGET,)
    limited = with_limits(report, (3, demo.TARGET), always)
    assert (limited.verdict, limited.suspects) == ("inconclusive", ())
    assert limited.doubtful == (demo.TARGET,)
    for classes in ((), (3,)):
        same = with_limits(report, classes, always)
        assert same.limited == classes
        assert (same.verdict, same.suspects) == (report.verdict, report.suspects)
        assert same.reason == report.reason
    loose = with_limits(report, (demo.TARGET,), never)
    assert (loose.verdict, loose.suspects) == ("backdoored", (demo.TARGET,))
    assert loose.reason.startswith(report.reason)
    two = replace(report, suspects=(demo.TARGET, 5))
    assert with_limits(two, (demo.TARGET,), always).verdict == "backdoored"
    assert with_limits(two, (demo.TARGET, 5), lambda k: k != 5).verdict == "backdoored"
    assert with_limits(two, (demo.TARGET, 5), always).doubtful == (demo.TARGET, 5)
    more = replace(report, doubtful=(7, demo.TARGET))
    assert with_limits(more, (demo.TARGET,), always).doubtful == (demo.TARGET, 7)
    clean = scan(digit_case().clean, digit_case().data.defender, depth="norms")
    assert with_limits(clean, (0,), never).verdict == clean.verdict


def test_without_data_nothing_tells_whether_limits_hold() -> None:
    model = digit_case().backdoored
    report = scan(model, None, input_shape=(1, 8, 8))
    assert report.evidence is not None
    flagged = replace(report, verdict="backdoored", suspects=(demo.TARGET,))
    limited = with_limits(flagged, (demo.TARGET,), always)
    assert (limited.verdict, limited.suspects) == ("backdoored", (demo.TARGET,))
    assert "without data nothing tells" in limited.reason


@functools.cache
def loose_report() -> ScanReport:
    report = scan(holding_nothing(), padded(digit_case().data.defender), alpha=0.02)
    return replace(report, limited=())


def look_of(report: ScanReport) -> SecondLook:
    assert report.evidence is not None
    assert report.evidence.look is not None
    return report.evidence.look


def looking(report: ScanReport, look: SecondLook) -> ScanReport:
    assert report.evidence is not None
    return replace(report, evidence=replace(report.evidence, look=look))


def moving_nothing(report: ScanReport) -> ScanReport:
    """As if whatever was tried led far and moved no image."""
    look = look_of(report)
    assert look.corners is not None
    assert look.reach is not None
    assert look.patch is not None
    still = [replace(x, rate=x.rate * 0) for x in (look.reach, look.patch, look.corners)]
    return looking(report, replace(look, reach=still[0], patch=still[1], corners=still[2]))  # type: ignore[arg-type]


def test_gains_alone_are_a_doubt_and_images_that_are_moved_are_none() -> None:
    report, target = loose_report(), (demo.TARGET,)
    passing = with_limits(report, target, always)
    assert passing.verdict == "backdoored"
    assert passing.reason.endswith("past the latent patch in front of it")
    held = with_limits(moving_nothing(report), target, always)
    assert (held.verdict, held.doubtful[0]) == ("inconclusive", demo.TARGET)


def test_what_is_no_matter_of_norms_and_gains_stays_a_backdoor() -> None:
    """A shuffle of all classes, say."""
    report = moving_nothing(loose_report())
    look = look_of(report)
    assert look.shuffle is not None
    shuffled = replace(look.shuffle, share=1.0)
    told = with_limits(looking(report, replace(look, shuffle=shuffled)), (demo.TARGET,), always)
    assert told.verdict == "backdoored"


def test_limits_in_front_of_other_classes_are_no_yardstick() -> None:
    """Nothing is allowed to a suspect but what classes that are none show."""
    report = moving_nothing(loose_report())
    look = look_of(report)
    assert look.patch is not None
    rate = look.patch.rate.clone()
    rate[look.patch.classes.index(demo.TARGET)] = 0.5
    other = next(k for k in look.patch.classes if k != demo.TARGET)
    rate[look.patch.classes.index(other)] = 0.6
    report = looking(report, replace(look, patch=replace(look.patch, rate=rate)))
    assert led_anew(look_of(report), (demo.TARGET,), (demo.TARGET,)) is None
    assert led_anew(look_of(report), (demo.TARGET, other), (demo.TARGET,)) is not None
    everything = tuple(range(10))
    asked: list[tuple[int, ...]] = []

    def noted(look: SecondLook, targets: tuple[int, ...], limited: tuple[int, ...]) -> str | None:
        asked.append(targets)
        return led_anew(look, targets, limited)

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(limited_scan, "led_anew", noted)
        with_limits(report, everything, always)
    assert asked[0] == (demo.TARGET,)


def test_a_change_beyond_what_is_allowed_is_told_at_its_own_budget() -> None:
    report = moving_nothing(loose_report())
    look = look_of(report)
    assert look.reach is not None
    assert len(look.reach.budgets) > 1
    rate = torch.zeros_like(look.reach.rate)
    rate[0] = 0.08
    rate[0, look.classes.index(demo.TARGET)] = 0.15
    rate[1, look.classes.index(demo.TARGET)] = 0.1
    look = replace(look, reach=replace(look.reach, rate=rate))
    told = led_anew(look, (demo.TARGET,), (demo.TARGET,))
    assert told is not None
    assert "leads 15% of the samples" in told


def test_changes_that_move_images_past_a_limit_count() -> None:
    report = moving_nothing(loose_report())
    look = look_of(report)
    assert look.reach is not None
    rate = look.reach.rate.clone()
    rate[-1, look.classes.index(demo.TARGET)] = 0.5
    moved = looking(report, replace(look, reach=replace(look.reach, rate=rate)))
    told = with_limits(moved, (demo.TARGET,), always)
    assert told.verdict == "backdoored"
    assert "a change found anew leads 50%" in told.reason


@pytest.mark.parametrize("limited", [(demo.TARGET, 5), (demo.TARGET,)])
def test_what_stands_out_beside_the_suspects_is_asked_as_well(
    limited: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    report = moving_nothing(loose_report())
    asked: list[int] = []

    def holds(target: int) -> bool:
        asked.append(target)
        return True

    def weighed(_report: object, _look: object, seen: tuple[int, ...], **_: object) -> object:
        if 5 in seen:
            return Finding(
                "inconclusive", (), 0.05, "class 7 stands out, but not enough", (7,)
            ), None
        return Finding("backdoored", (5,), 0.001, "class 5 stands out"), None

    monkeypatch.setattr(limited_scan, "_without", weighed)
    told = with_limits(report, limited, holds)
    if 5 in limited:
        assert asked == [demo.TARGET, 5]  # each once
        assert told.verdict == "inconclusive"
        assert told.doubtful[:2] == (demo.TARGET, 5)
        assert 7 in told.doubtful
        assert told.reason.endswith("; beside that class 7 stands out, but not enough")
    else:
        assert (told.verdict, told.suspects) == (report.verdict, report.suspects)


def limiting(positions: bool) -> tuple[nn.Module, Callable[[float], nn.Module], Tensor]:
    """A network of six inputs and four classes, a limit of its latents on the way to class 2, and that way."""
    torch.manual_seed(0)
    body = nn.Sequential(nn.Flatten(), nn.Linear(6, 5)) if not positions else nn.Conv2d(1, 5, 1)
    head: nn.Module = nn.Conv2d(5, 4, 1) if positions else nn.Linear(5, 4)
    tail = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten()) if positions else nn.Identity()
    model = nn.Sequential(body, head, tail).eval()
    found = find_head(model, torch.randn(4, 1, 2, 3), "1")
    weight = found.weight.detach().double()
    change = torch.zeros(4, 5, dtype=torch.float64)
    change[2] = weight[2] - weight.mean(0)

    lowering = shifts_between_logits(found.weight.detach(), [2]).float()

    def limit(threshold: float) -> nn.Module:
        none = torch.zeros(1, 5)
        direction = (change[2] / change[2].norm()).float()[None]
        patch = LatentPatch(
            direction, torch.tensor([threshold]), none, none.clone(), torch.zeros(1, 5, 1),
            torch.zeros(1, 1, 5), lowering, torch.tensor([2]),
        )  # fmt: skip
        return with_latent_patch(model, found, patch)[0]

    return model, limit, change


@pytest.mark.parametrize("positions", [False, True])
def test_whether_a_limit_holds(positions: bool) -> None:
    """Against latents written down one by one, some of which get past."""
    model, limit, change = limiting(positions)
    body, tail = model[0], model[2]  # type: ignore[index]
    samples = torch.randn(400, 1, 2, 3), torch.arange(400) % 4
    others = samples[0][samples[1] != 2]
    change = 50 * change
    with torch.no_grad():
        moved = body(others) + change[2].float().view(1, -1, *((1, 1) if positions else ()))
    along = latent_of(moved) @ (change[2] / change[2].norm()).float()
    pasts = []
    for threshold in torch.quantile(
        along, torch.tensor([0.0, 0.05, 0.09, 0.11, 0.3, 1.0])
    ).tolist():
        limited = limit(threshold)
        patch = patch_in_front(limited, find_head(limited, samples[0][:4], "1.head"))
        assert patch is not None
        with torch.no_grad():
            past = float((tail(patch(moved)).argmax(1) == 2).double().mean())
        assert holds_back(limited, patch, samples, change, 32, 2) == (past <= 0.1)
        assert not patch._forward_pre_hooks
        pasts.append(past)
    assert any(0.02 < past <= 0.1 for past in pasts)
    assert any(0.1 < past < 0.4 for past in pasts)
    # Of samples of the class itself there is nothing to lead there.
    limited = limit(-1e3)
    patch = patch_in_front(limited, find_head(limited, samples[0][:4], "1.head"))
    assert patch is not None
    assert not holds_back(limited, patch, (samples[0], torch.full((400,), 2)), change, 32, 2)


def test_a_change_that_leads_few_is_made_longer() -> None:
    """As those of a quantile below 1 are, of which a limit that lets nothing through holds all."""
    model, limit, change = limiting(positions=False)
    samples = torch.randn(400, 1, 2, 3), torch.arange(400) % 4
    body, head = model[0], model[1]  # type: ignore[index]
    with torch.no_grad():
        latent = body(samples[0][samples[1] != 2])
        led = {
            length: float(
                (head(latent + length * change[2].float()).argmax(1) == 2).double().mean()
            )
            for length in (0.25 * i for i in range(60))
        }
    few = next(length for length, share in reversed(led.items()) if share <= 0.09)
    assert led[few] > 0
    for threshold, held in ((-1e3, True), (1e3, False)):
        limited = limit(threshold)
        patch = patch_in_front(limited, find_head(limited, samples[0][:4], "1.head"))
        assert patch is not None
        for length in (few, 50.0):
            assert holds_back(limited, patch, samples, length * change, 32, 2) == held
        assert not holds_back(limited, patch, samples, 0 * change, 32, 2)


@pytest.mark.parametrize("quantile", [0.97, 0.9])
def test_an_honest_repair_is_a_doubt_at_any_quantile(quantile: float) -> None:
    data = padded(digit_case().data.defender)
    held = scan(patched_digits().model, data, depth="norms", quantile=quantile, alpha=0.05)
    assert held.verdict == "inconclusive"
    assert held.doubtful[0] == demo.TARGET
    behind = scan(holding_nothing(), data, depth="norms", quantile=quantile, alpha=0.05)
    assert behind.verdict == "backdoored"


def test_inputs_of_several_shapes_are_asked_as_well() -> None:
    images, labels = padded(digit_case().data.defender)
    model = nn.Sequential(LastCorner(), copy.deepcopy(patched_digits().model))
    wider = functional.pad(images[200:], (2, 0, 2, 0))
    batches = [(images[:200], labels[:200]), (wider, labels[200:])]
    held = scan(model, batches, alpha=0.02)
    assert held.verdict == "inconclusive"
    assert "holds that back" in held.reason


class LastCorner(nn.Module):
    """Of larger images the last 16 by 16 pixels."""

    def forward(self, x: Tensor) -> Tensor:
        return x[:, :, -16:, -16:]


def test_what_is_not_finite_or_cannot_be_run_is_not_held() -> None:
    _, limit, change = limiting(positions=False)
    samples = torch.randn(80, 1, 2, 3), torch.arange(80) % 4
    limited = limit(-1e3)
    patch = patch_in_front(limited, find_head(limited, samples[0][:4], "1.head"))
    assert patch is not None
    assert holds_back(limited, patch, samples, 50 * change, 32, 2)
    handle = patch.register_forward_hook(lambda _module, _given, output: output * torch.nan)
    assert not holds_back(limited, patch, samples, 50 * change, 32, 2)
    handle.remove()

    def refusing(_module: nn.Module, _given: object, _output: Tensor) -> Tensor:
        raise RuntimeError("no")

    patch.register_forward_hook(refusing)
    assert not holds_back(limited, patch, samples, 50 * change, 32, 2)


@pytest.mark.parametrize("depth", ["norms", "fast"])
def test_a_model_with_a_patch_of_unknown_origin_is_not_called_clean(depth: Depth) -> None:
    """Which could lead inputs into a class that nothing else of the model knows of."""
    model, data = Cropped(digit_case().clean), padded(digit_case().data.defender)
    plain = scan(model, data, depth=depth, alpha=0.05)
    assert plain.verdict == "clean"
    head, zero = find_head(model, data[0][:4]), torch.zeros(1, 128)
    patch = LatentPatch(
        zero, torch.full((1,), 1e9), zero.clone(), zero.clone(), torch.zeros(1, 128, 1),
        torch.zeros(1, 1, 128), zero.clone(), torch.tensor([3]),
    )  # fmt: skip
    patched = with_latent_patch(model, head, patch)[0]
    told = scan(patched, data, depth=depth, alpha=0.05)
    assert (told.verdict, told.suspects, told.doubtful) == ("inconclusive", (), ())
    assert told.reason.startswith(f"{plain.reason}; but the model has a latent patch")
    trusted = scan(patched, data, depth=depth, alpha=0.05, trust_patch=True)
    assert (trusted.verdict, trusted.reason, trusted.limited) == ("clean", plain.reason, (3,))
    # Nor with one anywhere else.
    within = nn.Sequential(LastCorner(), nn.Flatten(), nn.Linear(256, 256))
    inside = find_head(within, data[0][:4])
    wide = torch.zeros(1, 256)
    elsewhere = LatentPatch(
        wide, torch.full((1,), 1e9), wide.clone(), wide.clone(), torch.zeros(1, 256, 1),
        torch.zeros(1, 1, 256), wide.clone(), torch.tensor([3]),
    )  # fmt: skip
    with torch.no_grad():
        inside.module.weight.copy_(torch.eye(256))
        assert inside.module.bias is not None
        inside.module.bias.zero_()
    body = with_latent_patch(within, inside, elsewhere)[0]
    told = scan(
        nn.Sequential(body, nn.Unflatten(1, (1, 16, 16)), model), data, depth=depth, alpha=0.05
    )
    assert (told.verdict, told.limited) == ("inconclusive", ())


def test_without_data_a_patched_model_is_no_more_suspect_than_before() -> None:
    shape = (1, 16, 16)
    plain = scan(Cropped(digit_case().backdoored), None, input_shape=shape)
    patched = scan(patched_digits().model, None, input_shape=shape)
    assert plain.verdict == patched.verdict == "inconclusive"
    assert patched.p_value > 0.1 * plain.p_value


@pytest.mark.parametrize("depth", ["norms", "fast", "thorough"])
def test_no_patch_touches_what_the_norms_are_of(depth: Depth) -> None:
    """Nor can it make a backdoored model a clean one by moving latents of all other classes."""
    model, data = Cropped(digit_case().backdoored), padded(digit_case().data.defender)
    plain = scan(model, data, depth=depth)
    head = find_head(model, data[0][:4])
    weight = head.weight.detach()
    others = [k for k in range(10) if k != demo.TARGET]
    count, zero = len(others), torch.zeros(len(others), weight.shape[1])
    away = torch.zeros(10)
    away[demo.TARGET] = -10.0
    change = -(torch.linalg.pinv(weight) @ away).expand(count, -1).contiguous()
    patch = LatentPatch(
        zero, -torch.ones(count), change, zero.clone(), torch.zeros(count, weight.shape[1], 1),
        torch.zeros(count, 1, weight.shape[1]), zero.clone(), torch.tensor(others),
    )  # fmt: skip
    deceiving = with_latent_patch(model, head, patch)[0]
    corner = evaluate(deceiving, padded(digit_case().data.test), padded_corner, demo.TARGET)
    assert min(corner.acc, corner.asr) > 0.95
    told = scan(deceiving, data, depth=depth)
    assert (told.verdict, told.suspects) == ("backdoored", (demo.TARGET,))
    assert torch.equal(told.norm, plain.norm)
    assert told.limited == tuple(others)


def test_a_patch_that_is_not_in_front_of_the_head_is_none() -> None:
    model = copy.deepcopy(digit_case().backdoored)
    hidden = nn.Linear(128, 128)
    with torch.no_grad():
        hidden.weight.copy_(torch.eye(128))
        hidden.bias.zero_()
    model.insert(len(model) - 1, hidden)  # type: ignore[operator,arg-type]
    data = digit_case().data.defender
    inner = find_head(model, data[0][:4])
    assert inner.name == str(len(model) - 1)  # type: ignore[arg-type]
    zero = torch.zeros(1, 128)
    patch = LatentPatch(
        zero, torch.ones(1) * 1e9, zero, zero, torch.zeros(1, 128, 1), torch.zeros(1, 1, 128),
        zero, torch.tensor([63]),
    )  # fmt: skip
    place = dataclasses.replace(inner, name=str(len(model) - 2), module=hidden)  # type: ignore[arg-type]
    limited = with_latent_patch(model, place, patch)[0]
    for depth in ("norms", "fast"):
        report = scan(limited, data, depth=depth)
        assert report.limited == ()
        assert (report.verdict, report.suspects) == ("backdoored", (demo.TARGET,))


def test_a_repair_tells_so() -> None:
    data = padded(digit_case().data.defender)
    model = Cropped(digit_case().backdoored)
    result = repair(model, data, targets=[demo.TARGET], method="patch")
    assert result.report_after is not None
    assert result.report_after.verdict != "backdoored"


def test_what_is_to_be_judged_without_its_norms_is_judged_without_either() -> None:
    report = scan_of("backdoored")
    assert report.warnings == ()
    before = report.test.balanced
    assert before is not None
    assert np.isfinite(before).all()
    _, evidence = without_norms(report, (demo.TARGET,), limited=False)
    assert evidence is not None
    for kind in ("norm", "balanced"):
        p_values = evidence.joint.kind_p_values[kind]
        assert np.isnan(p_values).tolist() == [k == demo.TARGET for k in range(10)]


def test_an_own_patch_that_holds_leaves_a_model_clean_that_inputs_do_not_betray() -> None:
    """Where it is not known to be an own one, no more than inconclusive; nor is it for the gate of a repair."""
    report = scan_of("backdoored")
    look = None if report.evidence is None else report.evidence.look
    assert look is not None
    assert look.reach is not None
    rate = look.reach.rate.clone()
    rate[:, demo.TARGET] = 0  # as behind a limit
    quiet = replace(look, reach=replace(look.reach, rate=rate))
    assert report.evidence is not None
    report = replace(report, evidence=replace(report.evidence, look=quiet))
    classes = (demo.TARGET,)
    doubted = with_limits(report, classes, lambda _: True)
    assert (doubted.verdict, doubted.doubtful) == ("inconclusive", classes)
    assert "fine if the patch is of a repair that you made" in doubted.reason
    own = with_limits(report, classes, lambda _: True, trusted=True)
    assert (own.verdict, own.suspects, own.doubtful) == ("clean", (), ())
    assert own.p_value > 0.2
    assert "in front of your latent patch, which holds it back: class 0 stands out" in own.reason
    leaking = with_limits(report, classes, lambda _: False, trusted=True)
    assert leaking.verdict == "backdoored"
