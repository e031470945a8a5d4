"""The verdict of a thorough scan, from evidence made up for each case."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from tacext.corner_patches import CornerPatches
from tacext.detection import judge_norms
from tacext.errors import compared
from tacext.joint_test import NormalNull, shipped_calibration
from tacext.patch_reach import PatchReach
from tacext.reach import Reach
from tacext.second_look import SecondLook, corner_evidence
from tacext.shuffle import Shuffle
from tacext.source_patch import SourcePatch
from tacext.verdict import Evidence, Finding, weigh
from tacext.waves import Waves

CLASSES = 10


def look_of(
    suspicious: dict[int, float] | None = None,
    share: float | None = 0.2,
    seed: int = 0,
    patches: dict[int, tuple[float, float]] | None = None,
    led: SourcePatch | None = None,
    waved: Waves | None = None,
    cornered: bool = False,
) -> tuple[np.ndarray, SecondLook]:  # type: ignore[type-arg]
    """Norms and a second look of a model whose classes in `suspicious` are so many spreads off.

    `patches` are rates and gains of the patches into some classes.
    """
    generator = np.random.default_rng(seed)
    kinds = shipped_calibration().kinds

    def draw(kind: str) -> np.ndarray:  # type: ignore[type-arg]
        values = generator.standard_normal(CLASSES)
        for k, size in (suspicious or {}).items():
            values[k] = size
        return kinds[kind].spread * values

    classes = tuple(range(CLASSES))
    gain = torch.from_numpy(np.exp(draw("reach")))[None]
    share_moved = torch.from_numpy(draw("share") - 1).sigmoid()[None]
    moved, lifted = torch.full((CLASSES,), 0.1).double(), torch.ones(CLASSES).double()
    for k, (rate, lift) in (patches or {}).items():
        moved[k], lifted[k] = rate, lift
    corner = torch.tensor([[k, 2 * k] for k in classes])
    nothing = torch.zeros(0)
    shuffled = None
    if share is not None:
        moves = tuple((k + 1) % CLASSES for k in classes)
        shuffled = Shuffle(share, moves, torch.full((CLASSES,), share), 1.0, nothing, 0.0)
    look = SecondLook(
        classes,
        Reach(classes, (1.0,), gain, share_moved, 1.0, nothing, 0.0),
        PatchReach(classes, 4, moved, lifted, 200, corner, nothing, 0.0),
        shuffled,
        led,
        waved,
        None,
        0.0,
    )
    norm = np.exp(1 - draw("norm"))
    if cornered:
        look = replace(look, corners=corners_of(np.exp(draw("corner") - 1) - 0.1))
    return norm, look


def corners_of(gain: np.ndarray) -> CornerPatches:  # type: ignore[type-arg]
    """Squares of one size with such gains."""
    lifted = torch.from_numpy(gain)[None]
    nothing = torch.zeros(0)
    return CornerPatches(
        tuple(range(CLASSES)), (4,), lifted, torch.zeros_like(lifted), 40, 1.0, nothing, (), 0.0
    )


def judged(
    suspicious: dict[int, float] | None = None,
    share: float | None = 0.2,
    alpha: float = 0.01,
    patches: dict[int, tuple[float, float]] | None = None,
    led: SourcePatch | None = None,
    waved: Waves | None = None,
    cornered: bool = False,
) -> tuple[Finding, Evidence]:
    norm, look = look_of(
        suspicious, share, patches=patches, led=led, waved=waved, cornered=cornered
    )
    return weigh(judge_norms(norm, alpha), look, alpha, shipped_calibration())


def test_a_class_that_stands_out_in_everything_is_named() -> None:
    finding, evidence = judged({3: 8.0})
    assert (finding.verdict, finding.suspects) == ("backdoored", (3,))
    assert finding.p_value < 1e-4
    assert finding.reason.startswith("class 3 stands out in ")
    for kind in ("norm", "reach"):
        assert kind in finding.reason
    assert evidence.joint.suspects == (3,)


def waves_into(rates: dict[int, tuple[float, float]]) -> Waves:
    """Waves that send such shares of 36 images into some classes, and those beside them others."""
    rate, beside = (torch.full((CLASSES,), share).double() for share in (0.1, 0.05))
    for k, (own, other) in rates.items():
        rate[k], beside[k] = own, other
    return Waves(rate, beside, torch.tensor([[1, 4, 0]]).repeat(CLASSES, 1), 36, 0.0)


def test_a_wave_that_its_neighbours_are_not_like_names_its_class() -> None:
    finding, evidence = judged(waved=waves_into({6: (0.97, 0.05)}))
    assert (finding.verdict, finding.suspects) == ("backdoored", (6,))
    assert evidence.wave_p_value is not None
    assert finding.p_value == pytest.approx(evidence.wave_p_value / 0.03)
    expected = (
        "a wave of 4 periods from top to bottom sends 97% of the images of other classes to class 6, "
        "and those beside it 5%"
    )
    assert finding.reason == expected


def test_a_wave_like_those_beside_it_or_that_leaves_most_images_is_no_backdoor() -> None:
    for share, beside in ((0.95, 0.85), (0.49, 0.0)):
        finding, _ = judged(waved=waves_into({6: (share, beside)}))
        assert finding.verdict == "clean"
        assert "and no faint wave that was tried is a trigger" in finding.reason
    assert judged(waved=waves_into({6: (0.49, 0.0)}))[1].wave_p_value == 1.0
    assert judged()[1].wave_p_value is None
    told = "no waves were tried, which takes images of 13 pixels and at most 64 classes"
    assert told in judged()[0].reason


def test_a_wave_in_doubt_is_inconclusive_and_names_its_class() -> None:
    calibration = shipped_calibration()
    found = waves_into({6: (0.9, 0.4)})
    level = float(found.selectivity[6])
    null = NormalNull(level - 3.0 * 0.3, 0.3, 45)  # three deviations above
    norm, look = look_of(waved=found)
    finding, evidence = weigh(judge_norms(norm), look, 0.01, replace(calibration, wave=null))
    assert evidence.wave_p_value is not None
    assert 3e-4 < evidence.wave_p_value < 6e-3
    assert (finding.verdict, finding.suspects, finding.doubtful) == ("inconclusive", (), (6,))
    assert "but not surely enough" in finding.reason


def test_a_wave_comes_before_a_shuffle_and_beside_a_suspect_by_p_value() -> None:
    wave = waves_into({6: (1.0, 0.05)})
    finding, _ = judged({3: 8.0}, waved=wave)
    assert set(finding.suspects) == {3, 6}
    finding, _ = judged(share=0.99, waved=wave)
    assert finding.suspects == (6,)


def test_a_patch_that_moves_all_images_names_its_class() -> None:
    finding, evidence = judged(patches={6: (1.0, 8.0), 2: (0.4, 5.0)})
    assert (finding.verdict, finding.suspects) == ("backdoored", (6,))
    assert "stands out in patch (p = " in finding.reason
    told = "; a patch of 4x4 pixels at row 6, column 12 sends 100% of the held-out images of other classes there"
    assert finding.reason.endswith(told)
    assert evidence.joint.kind_p_values["patch"][6] < 1e-5
    finding, _ = judged({3: 8.0}, patches={6: (1.0, 8.0)})
    assert finding.suspects[0] == 3
    assert "a patch" not in finding.reason  # of another class than the first


def test_patches_that_few_images_tell_of_are_not_told_of() -> None:
    norm, look = look_of({3: 8.0}, patches={3: (1.0, 8.0)})
    assert look.patch is not None
    told = []
    for images in (100, 99):
        few = replace(look, patch=replace(look.patch, images=images))
        told.append(weigh(judge_norms(norm, 0.01), few, 0.01, shipped_calibration())[0].reason)
    assert ["a patch of" in reason for reason in told] == [True, False]


def test_patches_that_move_most_images_into_all_classes_are_no_backdoor() -> None:
    finding, _ = judged(patches={k: (0.93 - 0.01 * k, 2.0) for k in range(CLASSES)})
    assert finding.verdict == "clean"


def test_a_patch_that_moves_all_images_is_one_whatever_others_do() -> None:
    patches = {k: (0.8 + 0.01 * k, 2.0) for k in range(CLASSES)}
    finding, evidence = judged(patches={**patches, 4: (1.0, 3.0), 6: (1.0, 4.0)})
    assert evidence.joint.suspects == ()
    assert (finding.verdict, finding.suspects) == ("backdoored", (6, 4))
    assert evidence.patch_p_value is not None
    assert finding.p_value == pytest.approx(evidence.patch_p_value / 0.01)
    weak, _ = judged(patches={**patches, 4: (1.0, 1.0), 6: (1.0, 4.0)})
    assert weak.suspects == (6,)  # what goes less than half as far is not named
    fewer, evidence = judged(patches={**patches, 6: (0.975, 4.0)})
    assert fewer.verdict == "inconclusive"
    assert fewer.reason.startswith("class 6 stands out, but not enough")
    assert fewer.doubtful == (6,)


def test_what_holds_down_either_test_shows_in_the_other() -> None:
    norm, look = look_of({3: 8.0})
    far, many = look.reach.gain.clone(), look.reach.rate.clone()
    far[:, 3], many[:, 3] = far.median(), many.median()
    for reach in (replace(look.reach, gain=far), replace(look.reach, rate=many)):
        finding, _ = weigh(
            judge_norms(norm), replace(look, reach=reach), 0.01, shipped_calibration()
        )
        assert finding.suspects == (3,)


def test_inputs_without_room_for_patches_are_judged_by_norm_and_reach() -> None:
    norm, look = look_of({3: 5.0}, share=None)
    without = replace(look, patch=None)
    finding, evidence = weigh(judge_norms(norm), without, 0.01, shipped_calibration())
    assert evidence.joint.kinds == ("norm", "reach")
    assert finding.p_value == evidence.joint.p_value
    both, _ = weigh(judge_norms(norm), look, 0.01, shipped_calibration())
    assert finding.suspects == both.suspects == (3,)


def test_two_targets_are_both_named() -> None:
    finding, _ = judged({3: 9.0, 6: 8.0})
    assert set(finding.suspects) == {3, 6}


def test_a_second_target_that_stands_out_less_is_in_doubt() -> None:
    finding, evidence = judged({3: 9.0, 6: 3.6})
    assert (finding.verdict, finding.suspects, finding.doubtful) == ("backdoored", (3,), (6,))
    assert evidence.joint.doubtful == (6,)
    assert judged({3: 9.0})[0].doubtful == ()


def test_what_makes_a_verdict_inconclusive_is_in_doubt() -> None:
    finding, _ = judged({3: 3.6})
    assert (finding.verdict, finding.suspects, finding.doubtful) == ("inconclusive", (), (3,))
    assert finding.reason.startswith("class 3 stands out, but not enough")
    norm, look = look_of()
    norm[:] = [
        2.0,
        2.04,
        1.98,
        1.8,
        2.02,
        1.99,
        2.01,
        1.97,
        2.03,
        2.0,
    ]  # so alike that .9 stands out
    test = judge_norms(norm)
    assert test.suspects == (3,)
    finding, _ = weigh(test, look, 0.01, shipped_calibration())
    assert "does not bear it out" in finding.reason
    assert (finding.verdict, finding.suspects, finding.doubtful) == ("inconclusive", (), (3,))


def test_all_classes_that_any_test_doubts_are_told() -> None:
    strong, weak = led_by(1.0, 0.95), led_by(1.0, 0.93)
    finding, evidence = judged({3: 9.0}, led=strong)
    assert evidence.source_p_value is not None
    assert 0.01 < evidence.source_p_value / 0.03 < 0.2
    assert (finding.suspects, finding.doubtful) == ((3,), (7,))
    both, _ = judged({3: 3.6}, led=weak)
    assert both.verdict == "inconclusive"
    assert set(both.doubtful) == {3, 7}
    shuffled = [judged({3: 3.6}, share=share)[0] for share in np.linspace(0.4, 0.7, 601)]
    doubtful = [found for found in shuffled if "clean models can do so" in found.reason]
    assert len(doubtful) > 1
    assert all(found.doubtful == (3,) for found in doubtful)


def test_a_shuffle_is_not_hidden_by_one_class_that_it_leads_astray() -> None:
    finding, _ = judged(share=0.98, led=led_by(1.0, 0.99))
    assert finding.suspects == tuple(range(CLASSES))
    assert "a backdoor from all classes to all" in finding.reason
    one, _ = judged({3: 9.0}, share=0.98, led=led_by(1.0, 0.99))
    assert set(one.suspects) == {3, 7}
    assert "in all together" not in one.reason


def led_by(share: float, kept: float, images: int = 20) -> SourcePatch:
    """A patch that sends so many images of class 5 to class 7 and leaves so many others."""
    everywhere = tuple(range(CLASSES))
    return SourcePatch(5, 7, share, images, kept, 200, 4, (28, 3), torch.zeros(0), 0.0, everywhere)


def test_a_patch_that_leads_one_class_astray_names_its_target() -> None:
    finding, evidence = judged(led=led_by(1.0, 0.99))
    assert (finding.verdict, finding.suspects) == ("backdoored", (7,))
    assert evidence.source_p_value is not None
    assert finding.p_value == pytest.approx(evidence.source_p_value / 0.03)
    assert finding.reason == (
        "a patch of 4x4 pixels at row 28, column 3 sends 100% of the held-out images of class 5 to class "
        "7, and leaves 99% of those of other classes where they are: a backdoor of single classes"
    )
    both, _ = judged({3: 9.0}, led=led_by(1.0, 0.99))
    assert set(both.suspects) == {3, 7}
    with_it, without = judged({3: 4.0}, led=led_by(0.5, 0.5)), judged({3: 4.0})
    assert with_it[0].p_value == pytest.approx(without[0].p_value * 0.89 / 0.86, abs=0)


def test_classes_with_too_few_images_to_tell_are_told_of() -> None:
    found = replace(led_by(0.1, 1.0), looked_at=(1, 2, 5))
    finding, _ = judged(led=found)
    assert finding.verdict == "clean"
    told = f"leads one class astray (3 of {CLASSES} had images enough to tell)"
    assert f"{told}; no waves were tried" in finding.reason


def test_it_is_told_where_no_such_patch_was_looked_for() -> None:
    told = (
        "; backdoors of single classes were not looked for, which takes at most 64 classes, and of "
    )
    assert f"{told}each 8 images that the model gets right" in judged()[0].reason
    assert told not in judged(led=led_by(0.1, 1.0))[0].reason


def test_one_that_leads_not_far_enough_ahead_is_in_doubt() -> None:
    found = [judged(led=led_by(1.0, float(kept)))[0] for kept in np.linspace(0.5, 1, 101)]
    order = ["clean", "inconclusive", "backdoored"]
    verdicts = [order.index(finding.verdict) for finding in found]
    assert verdicts == sorted(verdicts)
    assert set(verdicts) == {0, 1, 2}
    doubtful = [finding for finding in found if finding.verdict == "inconclusive"]
    assert all("but not surely enough" in finding.reason for finding in doubtful)
    assert {finding.doubtful for finding in doubtful} == {(7,)}


def test_one_that_leaves_most_of_its_class_or_is_known_from_few_images_is_nothing() -> None:
    for led in (led_by(0.45, 1.0), led_by(1.0, 1.0, images=3)):
        finding, evidence = judged(led=led)
        assert evidence.source_p_value == 1
        assert finding.verdict == "clean"
        assert "no patch in a corner leads one class astray" in finding.reason


def test_nothing_that_stands_out_is_clean() -> None:
    finding, _ = judged()
    assert (finding.verdict, finding.suspects, finding.doubtful) == ("clean", (), ())
    assert "no class stands out in norm, reach, share or patch" in finding.reason
    assert "shuffles" in finding.reason
    assert "shuffles" not in judged(share=None)[0].reason


def test_between_the_two_is_inconclusive() -> None:
    found = [judged({3: size})[0] for size in np.linspace(1.0, 8.0, 29)]
    verdicts = [finding.verdict for finding in found]
    assert verdicts[0] == "clean"
    assert verdicts[-1] == "backdoored"
    first = verdicts.index("inconclusive")
    assert verdicts == sorted(verdicts, key=["clean", "inconclusive", "backdoored"].index)
    assert 0.01 <= found[first].p_value < 0.2
    assert "class 3 stands out, but not enough" in found[first].reason


@pytest.mark.parametrize("alpha", [0.001, 0.01, 0.05])
def test_the_p_value_and_the_verdict_agree(alpha: float) -> None:
    for size in np.linspace(0.0, 8.0, 33):
        finding, _ = judged({3: size}, alpha=alpha)
        assert (finding.verdict == "backdoored") == (finding.p_value < alpha)


def test_a_shuffle_names_all_its_destinations() -> None:
    finding, evidence = judged(share=0.55, alpha=0.05)
    assert (finding.verdict, finding.suspects) == ("backdoored", tuple(range(CLASSES)))
    assert "55%" in finding.reason
    assert "0 to 1, 1 to 2, 2 to 3, 3 to 4, ..." in finding.reason
    assert evidence.shuffle_p_value is not None
    assert evidence.shuffle_p_value > 1e-9
    assert finding.p_value == pytest.approx(evidence.shuffle_p_value / 0.1, rel=1e-9, abs=0)


def test_without_a_shuffle_the_p_value_is_the_joint_tests() -> None:
    for share, weight in ((0.2, 0.89), (None, 0.99)):
        finding, evidence = judged({3: 4.0}, share=share)
        assert finding.p_value == pytest.approx(evidence.joint.p_value / weight, rel=1e-9, abs=0)


def test_a_doubtful_shuffle_is_told_as_one() -> None:
    found = [judged(share=share, alpha=0.001)[0] for share in np.linspace(0.4, 0.6, 81)]
    doubtful = [finding for finding in found if "clean models can do so" in finding.reason]
    assert doubtful
    assert {finding.verdict for finding in doubtful} == {"inconclusive"}
    assert all("stands out" not in finding.reason for finding in doubtful)


def test_a_class_that_stands_out_comes_before_a_shuffle() -> None:
    assert judged({3: 8.0}, share=0.95)[0].suspects == (3,)


def test_a_small_shuffle_is_no_backdoor_however_rare() -> None:
    rare = replace(shipped_calibration(), shuffle=NormalNull(mean=-3.0, spread=0.1, models=45))
    for share, verdict in ((0.39, "clean"), (0.41, "backdoored")):
        norm, look = look_of(share=share)
        assert weigh(judge_norms(norm), look, 0.01, rare)[0].verdict == verdict


def test_few_held_out_images_tell_nothing_of_shares() -> None:
    norm, look = look_of(patches={3: (1.0, 5.0)})
    assert look.patch is not None
    told, _ = weigh(judge_norms(norm, 0.01), look, 0.01, shipped_calibration())
    assert told.verdict == "backdoored"
    few = replace(look, patch=replace(look.patch, images=21))
    guessed, evidence = weigh(judge_norms(norm, 0.01), few, 0.01, shipped_calibration())
    assert evidence.joint.kinds == ("norm", "reach")
    assert evidence.patch_p_value == 1
    assert guessed.verdict == "clean"


def test_the_reason_says_how_many_classes_were_looked_at() -> None:
    norm, look = look_of()
    some = replace(
        look, reach=replace(look.reach, classes=look.classes[:6], gain=look.reach.gain[:, :6])
    )
    some = replace(some, classes=look.classes[:6], patch=None)
    whole, _ = weigh(judge_norms(norm, 0.01), look, 0.01, shipped_calibration())
    part, _ = weigh(judge_norms(norm, 0.01), some, 0.01, shipped_calibration())
    assert whole.reason.startswith(
        "no class stands out in norm, reach, share or patch and no change shuffles the classes; "
    )
    assert "the classes (6 of 10 classes were looked at); " in part.reason


def forward_alone(look: SecondLook) -> SecondLook:
    """What a fast scan sees of it."""
    return replace(look, reach=None, patch=None, shuffle=None, source=None)


def test_a_fast_scan_joins_norms_and_squares_in_corners() -> None:
    norm, look = look_of({3: 6.0}, cornered=True)
    finding, evidence = weigh(judge_norms(norm), forward_alone(look), 0.01, shipped_calibration())
    assert evidence.joint.kinds == ("norm", "corner")
    assert (finding.verdict, finding.suspects) == ("backdoored", (3,))
    assert evidence.shuffle_p_value is evidence.source_p_value is evidence.patch_p_value is None
    assert finding.p_value == pytest.approx(evidence.joint.p_value)  # nothing else shares alpha
    norm, look = look_of(cornered=True, waved=waves_into({6: (0.97, 0.05)}))
    finding, evidence = weigh(judge_norms(norm), forward_alone(look), 0.01, shipped_calibration())
    assert (finding.verdict, finding.suspects) == ("backdoored", (6,))


def test_what_is_seen_without_gradients_tells_beside_them() -> None:
    finding, evidence = judged(cornered=True)
    assert evidence.joint.kinds == ("norm", "reach", "share", "patch", "corner")
    assert finding.verdict == "clean"
    norm, look = look_of()
    gain = np.full(CLASSES, 0.05)
    gain[7] = 4.0
    look = replace(look, corners=corners_of(gain))
    finding, evidence = weigh(judge_norms(norm), look, 0.01, shipped_calibration())
    assert (finding.verdict, finding.suspects) == ("backdoored", (7,))
    assert finding.reason.startswith("class 7 stands out in corner (p = ")


def test_of_classes_that_were_not_looked_at_no_squares_are_known() -> None:
    norm, look = look_of(cornered=True)
    assert look.corners is not None
    some = replace(
        forward_alone(look),
        classes=tuple(range(6)),
        corners=replace(look.corners, gain=look.corners.gain[:, :6]),
    )
    _, evidence = weigh(judge_norms(norm), some, 0.01, shipped_calibration())
    seen = evidence.joint.kind_p_values["corner"]
    assert np.isfinite(seen[:6]).all()
    assert np.isnan(seen[6:]).all()


def test_gains_of_no_account_count_alike() -> None:
    gain = np.array([[-3.0, 0.0, 1e-9, 1.0], [0.0, 0.0, 0.0, 2.0]])
    evidence = corner_evidence(gain)
    np.testing.assert_allclose(evidence[:3], np.log(0.1))
    assert evidence[3] == pytest.approx((np.log(1.1) + np.log(2.1)) / 2)


def test_a_p_value_and_its_threshold_are_told_apart() -> None:
    assert compared(0.0107, 0.01) == "p = 0.011 against 0.01"
    assert compared(0.01004, 0.01) == "p = 0.01004 against 0.01"
    assert compared(0.2, 0.05) == "p = 0.2 against 0.05"
    assert compared(0.01, 0.01) == "p = 0.01 against 0.01"
    assert compared(0.00334, 0.00333) == "p = 0.00334 against 0.00333"
    assert compared(0.0154, 0.01535) == "p = 0.0154 against 0.01535"
    assert compared(0.003333334, 0.003333333) == "p = 0.003333334 against 0.003333333"
