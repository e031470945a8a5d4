"""ACC, ASR, RA and DER against their definitions."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from digits import digit_case
from tacext import Evaluation, InputError, demo, evaluate
from tacext.attacks import SourceSpecific, Trigger


def test_rates_match_their_definitions() -> None:
    case = digit_case()
    images, labels = case.data.test
    result = evaluate(case.backdoored, (images, labels), demo.white_corner, 0, batch_size=33)
    with torch.no_grad():
        clean = case.backdoored(images).argmax(1)
        triggered = case.backdoored(demo.white_corner(images)).argmax(1)
    others = labels != 0
    assert result.acc == pytest.approx(float((clean == labels).double().mean()))
    assert result.asr == pytest.approx(float((triggered[others] == 0).double().mean()))
    assert result.ra == pytest.approx(float((triggered[others] == labels[others]).double().mean()))
    assert result.der is None
    assert (result.samples, result.triggered) == (len(labels), int(others.sum()))


def test_der_weighs_both_losses() -> None:
    case = digit_case()
    before = Evaluation(acc=1.0, asr=1.0, ra=0.0, der=None, target=0, samples=1, triggered=1)
    after = evaluate(case.clean, case.data.test, demo.white_corner, 0, baseline=before)
    assert after.der == pytest.approx(((1 - after.asr) - (1 - after.acc) + 1) / 2)
    better = Evaluation(acc=0.0, asr=0.0, ra=0.0, der=None, target=0, samples=1, triggered=1)
    worse = evaluate(case.backdoored, case.data.test, demo.white_corner, 0, baseline=better)
    assert worse.der == pytest.approx(0.5)  # neither a gain nor a loss counts


def test_a_model_can_be_the_baseline() -> None:
    case = digit_case()
    arguments = case.data.test, demo.white_corner, 0
    before = evaluate(case.backdoored, *arguments)
    by_model = evaluate(case.clean, *arguments, baseline=case.backdoored)
    assert by_model == evaluate(case.clean, *arguments, baseline=before)


def test_the_trigger_may_write_into_its_input() -> None:
    def in_place(images: torch.Tensor) -> torch.Tensor:
        images[:, :, -2:, -2:] = 1
        return images

    case = digit_case()
    images, labels = case.data.test
    copy = images.clone()
    first = evaluate(case.backdoored, (images, labels), in_place, 0)
    assert torch.equal(images, copy)
    assert first == evaluate(case.backdoored, (images, labels), demo.white_corner, 0)


def test_bad_triggers_and_targets_are_refused() -> None:
    case = digit_case()
    images, labels = case.data.test
    with pytest.raises(InputError, match="trigger: expected a tensor of the inputs' shape"):
        evaluate(case.clean, (images, labels), lambda x: x[:, :, :4], 0)
    with pytest.raises(InputError, match=r"expected real values, got torch\.complex64"):
        evaluate(case.clean, (images, labels), lambda x: x * 1j, 0)
    with pytest.raises(InputError, match="trigger: expected finite values"):
        evaluate(case.clean, (images, labels), lambda x: x * torch.nan, 0)
    with pytest.raises(InputError, match=r"trigger: .*one that fails \(ZeroDivisionError"):
        evaluate(case.clean, (images, labels), lambda x: x / (1 // 0), 0)
    with pytest.raises(InputError, match=r"labels from 0 to 9.*got 12"):
        evaluate(case.clean, (images, labels + 3), demo.white_corner, 0)
    with pytest.raises(InputError, match="target: expected a class from 0 to 9"):
        evaluate(case.clean, (images, labels), demo.white_corner, 10)
    with pytest.raises(InputError, match="other classes than the target 3"):
        evaluate(case.clean, (images[labels == 3], labels[labels == 3]), demo.white_corner, 3)


def _told(
    trigger: Trigger, caplog: pytest.LogCaptureFixture, data: object = None, **more: object
) -> str:
    caplog.clear()
    caplog.set_level("WARNING", "tacext.evaluation")
    data = digit_case().data.test if data is None else data
    evaluate(digit_case().clean, data, trigger, **{"target": 0} | more)  # type: ignore[arg-type]
    return caplog.text


def test_a_trigger_that_is_not_there_is_told(caplog: pytest.LogCaptureFixture) -> None:
    def seldom(images: torch.Tensor) -> torch.Tensor:
        images[::4] = demo.white_corner(images[::4])
        return images

    nothing = "the trigger changes no sample"
    assert nothing in _told(lambda x: x, caplog)
    assert nothing in _told(lambda x: (x * 0.2 + 0.4 - 0.4) / 0.2, caplog)
    assert nothing in _told(lambda x: x.half(), caplog)
    assert "leaves 271 of 363 samples as they are" in _told(seldom, caplog)
    assert _told(demo.white_corner, caplog) == ""
    assert _told(lambda x: x, caplog, baseline=digit_case().backdoored).count(nothing) == 1


def test_a_trigger_in_other_units_is_told(caplog: pytest.LogCaptureFixture) -> None:
    assert "reach from 0 to 255, without it from 0 to 1;" in _told(
        lambda x: demo.white_corner(x) * 255, caplog
    )
    assert "reach from -2 to 0," in _told(lambda x: -2 * demo.white_corner(x), caplog)
    assert _told(lambda x: demo.white_corner(x) * 1.5 - 0.5, caplog) == ""
    images, labels = digit_case().data.test
    dark = torch.where((labels == 4)[:, None, None, None], images * 0.1, images)
    assert _told(demo.white_corner, caplog, (dark, labels), target=SourceSpecific(4, 0)) == ""
    flat = torch.full_like(images, 0.5), labels
    assert _told(lambda x: x + 0.1, caplog, flat) == ""


def test_of_one_source_its_images_alone_count() -> None:
    case = digit_case()
    images, labels = case.data.test
    found = evaluate(
        case.backdoored, (images, labels), demo.white_corner, SourceSpecific(4, 0),
        baseline=case.clean,
    )  # fmt: skip
    assert (found.source_class, found.target) == (4, 0)
    assert found.triggered == int((labels == 4).sum())
    everyone = evaluate(case.backdoored, (images, labels), demo.white_corner, 0)
    assert everyone.source_class is None
    with pytest.raises(InputError, match="expected a class from 0 to 9 as the source, got 99"):
        evaluate(case.clean, (images, labels), demo.white_corner, SourceSpecific(99, 0))


@pytest.mark.parametrize("target", [np.int64(demo.TARGET), torch.tensor(demo.TARGET)])
def test_the_target_may_be_of_numpy_or_torch(target: int) -> None:
    case = digit_case()
    result = evaluate(case.backdoored, case.data.test, demo.white_corner, target)
    assert result == evaluate(case.backdoored, case.data.test, demo.white_corner, demo.TARGET)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"target": "1"}, "evaluate: target: expected a class of 0 or more, got '1'; pass"),
        ({"target": 1.5}, "evaluate: target: expected a class of 0 or more, got 1.5; pass"),
        ({"target": None}, "evaluate: target: expected a class of 0 or more, got None; pass"),
        ({"baseline": "m"}, "evaluate: baseline: expected an nn.Module, .*got 'm'; pass"),
        ({"model": "m"}, "evaluate: model: expected an nn.Module, got 'm'; pass"),
    ],
)
def test_other_types_are_refused(arguments: dict[str, object], message: str) -> None:
    case = digit_case()
    given = {"model": case.backdoored, "data": case.data.test, "target": 0} | arguments
    with pytest.raises(InputError, match=message):
        evaluate(trigger=demo.white_corner, **given)  # type: ignore[arg-type]


def test_the_mode_is_restored() -> None:
    case = digit_case()
    model = nn.Sequential(case.clean).train()
    evaluate(model, case.data.test, demo.white_corner, 0)
    assert model.training
    case.clean.eval()
