"""Guards on real digit classifiers, and their false-alarm rate on latents drawn at will."""

from __future__ import annotations

import copy
import functools
import logging
import math
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch
from torch import Tensor, nn

import tacext
from digits import Cropped, digit_case, padded
from tacext import Guard, GuardOutput, HeadNotFoundError, InputError, demo
from tacext.guard_fit import fit_scorer
from tacext.guard_scoring import GuardScorer


@functools.cache
def guard() -> Guard:
    return Guard.fit(digit_case().backdoored, digit_case().data.defender, 0.05)


def stamped(images: Tensor, labels: Tensor) -> Tensor:
    return demo.white_corner(images[labels != demo.TARGET])


def same(a: GuardOutput, b: GuardOutput) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def close(a: GuardOutput, b: GuardOutput) -> bool:
    pairs = zip(a[:3], b[:3], strict=True)
    return all(torch.allclose(x, y, atol=1e-4) for x, y in pairs) and torch.equal(a[3], b[3])


# ---- what it says --------------------------------------------------------------------------------


def test_triggered_digits_are_flagged_and_clean_ones_are_not() -> None:
    images, labels = digit_case().data.test
    with torch.no_grad():
        clean, triggered = guard()(images), guard()(stamped(images, labels))
        honest = Guard.fit(digit_case().clean, digit_case().data.defender, 0.05)
        mistaken = honest(stamped(images, labels))
    assert float(triggered.flagged.float().mean()) > 0.85
    assert float(clean.flagged.float().mean()) < 0.08
    # On a clean model the corner is no trigger; unusual it still is.
    assert float(mistaken.flagged.float().mean()) < 0.4
    assert float(triggered.p_value.median()) < 0.02
    assert float(clean.p_value.median()) > 0.3


def test_the_models_own_output_is_untouched() -> None:
    model, images = digit_case().backdoored, digit_case().data.test[0]
    before = copy.deepcopy(model.state_dict())
    with torch.no_grad():
        assert torch.equal(guard()(images).logits, model(images))
    assert all(torch.equal(before[n], t) for n, t in model.state_dict().items())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    shared = next(guard().model.trunk.parameters())
    assert shared.data_ptr() == next(model.parameters()).data_ptr()


def test_a_fit_gives_the_same_bits_again() -> None:
    again = Guard.fit(digit_case().backdoored, digit_case().data.defender, 0.05)
    for name, tensor in guard().scorer.state_dict().items():
        assert torch.equal(tensor, again.scorer.state_dict()[name]), name


def test_the_score_is_what_it_says_it_is() -> None:
    scorer, images = guard().scorer, digit_case().data.test[0][:50]
    with torch.no_grad():
        _, latent, logits = guard().model(images)
        found = scorer(latent, logits)
    t = {name: value.double().numpy() for name, value in scorer.state_dict().items()}
    for phi, z, score in zip(
        latent.double().numpy(), logits.double().numpy(), found.score, strict=True
    ):
        k = int(z.argmax())
        y = (phi - t["mean"][k]) * t["inverse_spread"]
        squares = np.concatenate([[y @ y], (t["basis"] @ y) ** 2])
        parts = np.array([
            math.sqrt(max(0, squares @ t["near_weight"])),
            math.sqrt(max(0, squares @ t["far_weight"])),
            y @ t["direction"][k],
            z[k] - np.delete(z, k).max(),
        ])  # fmt: skip
        units = np.maximum(0, (parts - t["location"][k]) * t["inverse_deviation"][k])
        assert float(score) == pytest.approx(float(np.linalg.norm(units)), rel=1e-4, abs=1e-4)


# ---- what it is fitted on -------------------------------------------------------------------------


def test_few_samples_are_said_to_be_few() -> None:
    images, labels = digit_case().data.defender
    with pytest.raises(
        InputError,
        match=r"expected 0.0101 or more, as there are 98 samples, got 0.01; .* 99 samples",
    ):
        Guard.fit(digit_case().backdoored, (images[:98], labels[:98]))
    assert Guard.fit(digit_case().backdoored, (images[:99], labels[:99])).info.samples == 99
    with pytest.raises(InputError, match="at_rate"):
        guard().at_rate(0.001)


def test_another_rate_needs_no_other_fit() -> None:
    images = digit_case().data.test[0]
    fitted = Guard.fit(digit_case().backdoored, digit_case().data.defender, 0.2)
    moved = guard().at_rate(0.2)
    assert same(moved(images), fitted(images))
    assert moved.info == fitted.info
    assert guard().info.false_positive_rate == 0.05


def test_a_class_without_samples_is_told_and_guarded(caplog: pytest.LogCaptureFixture) -> None:
    images, labels = digit_case().data.defender
    keep = labels != 3
    with caplog.at_level(logging.WARNING, "tacext.guard"):
        some = Guard.fit(digit_case().backdoored, (images[keep], labels[keep]), 0.05)
    with torch.no_grad():
        taken = digit_case().backdoored(images[keep]).argmax(1)
    expected = tuple(k for k in range(10) if not bool((taken == k).any()))
    assert some.info.unseen_classes == expected
    assert ("will mostly be flagged" in caplog.text) == bool(expected)
    threes = some(images[labels == 3])
    assert bool(torch.isfinite(threes.score).all())
    assert float(threes.flagged.float().mean()) > 0.3


# ---- around other models -------------------------------------------------------------------------


class Pooled(nn.Module):
    """Ends in a 1x1 convolution whose map is averaged."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.features = nn.Conv2d(1, 12, 3)
        self.head = nn.Conv2d(12, 10, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.features(x).relu()).mean((2, 3))


def test_it_stands_beside_every_kind_of_head() -> None:
    case = digit_case()
    images = case.data.test[0]
    for model, ends_in_head in (
        (nn.Sequential(case.backdoored, nn.Softmax(1)), False),
        (Pooled(), False),
    ):
        beside = Guard.fit(model.eval(), case.data.defender, 0.05)
        assert beside.model.ends_in_head == ends_in_head
        with torch.no_grad():
            assert torch.equal(beside(images).logits, model(images))
    softmax = Guard.fit(
        nn.Sequential(case.backdoored, nn.Softmax(1)).eval(), case.data.defender, 0.05
    )
    assert torch.allclose(softmax(images).score, guard()(images).score, atol=1e-4)


def test_it_stands_beside_a_patched_model() -> None:
    case = digit_case()
    patched = tacext.repair(Cropped(case.backdoored), padded(case.data.defender), method="patch")
    beside = Guard.fit(patched.model, padded(case.data.defender), 0.05)
    images = padded(case.data.test)[0]
    with torch.no_grad():
        assert torch.equal(beside(images).logits, patched.model(images))
        assert float(beside(images).flagged.float().mean()) < 0.09


def test_threads_do_not_mix_their_latents() -> None:
    """A model that goes on after its head is tapped, and its taps are kept apart."""
    case = digit_case()
    shared = Guard.fit(
        nn.Sequential(case.backdoored, nn.Softmax(1)).eval(), case.data.defender, 0.05
    )
    images, found = case.data.test[0], {}
    with torch.no_grad():
        expected = [shared(images[i : i + 40]) for i in range(8)]

    def work(i: int) -> None:
        with torch.no_grad():
            found[i] = [shared(images[i : i + 40]) for _ in range(30)]

    threads = [threading.Thread(target=work, args=(i,)) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(same(each, expected[i]) for i in range(8) for each in found[i])


def test_half_precision_keeps_the_guards_own_numbers() -> None:
    case = digit_case()
    images = case.data.test[0]
    halved = Guard.fit(copy.deepcopy(case.backdoored), case.data.defender, 0.05).bfloat16()
    assert next(halved.model.parameters()).dtype == torch.bfloat16
    assert {t.dtype for t in halved.scorer.buffers()} == {torch.float32, torch.int64}
    with torch.no_grad():
        found, expected = halved(images.bfloat16()), guard()(images)
    assert found.score.dtype == torch.float32
    assert float((found.flagged == expected.flagged).float().mean()) > 0.98


def test_autocast_rounds_no_distances() -> None:
    """Where clean latents hardly spread but along a few directions, |y|^2 and its parts cancel."""
    generator = torch.Generator().manual_seed(0)
    mix = torch.randn(24, 256, generator=generator)
    latent = torch.randn(900, 24, generator=generator) @ mix
    latent = latent + 0.3 * torch.randn(900, 256, generator=generator)
    logits = latent @ torch.randn(256, 5, generator=generator)
    fitted = fit_scorer(latent[:500], logits[:500], torch.ones(5, 256), 0.02, 0, "test")
    expected = fitted.plain(latent[500:], logits[500:])
    assert torch.equal(fitted(latent[500:], logits[500:]).flagged, expected.flagged)
    for dtype in (torch.bfloat16, torch.float16):
        with torch.autocast("cpu", dtype=dtype):
            assert same(fitted.plain(latent[500:], logits[500:]), expected)


def test_a_model_that_is_wrong_is_told(caplog: pytest.LogCaptureFixture) -> None:
    images, labels = digit_case().data.defender
    with caplog.at_level(logging.WARNING, "tacext.guard"):
        Guard.fit(digit_case().backdoored, (images, (labels + 1) % 10), 0.05)
    assert "the model is right on 0 % of the samples alone" in caplog.text


def test_samples_that_come_again_count_once(caplog: pytest.LogCaptureFixture) -> None:
    images, labels = digit_case().data.defender
    repeated = images.repeat(4, 1, 1, 1), labels.repeat(4)
    with caplog.at_level(logging.WARNING, "tacext.guard"):
        again = Guard.fit(digit_case().backdoored, repeated, 0.05)
    assert again.info.samples == guard().info.samples
    assert "came more than once" in caplog.text


class Overriding(nn.Module):
    """Goes its own way after the head where a corner is bright."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        bright = x[:, :, -1, -1].mean(1) > 0.95
        return torch.where(bright[:, None], torch.eye(10)[7] * 9, self.model(x).log_softmax(1))


def test_what_overrides_the_head_is_flagged() -> None:
    case = digit_case()
    images = case.data.test[0].clone()
    images[:, :, -1, -1] = 0
    beside = Guard.fit(Overriding(case.clean).eval(), (images, case.data.test[1]), 0.05)
    images[:, :, -1, -1] = 1
    with torch.no_grad():
        found = beside(images)
    assert bool((found.logits.argmax(1) == 7).all())
    assert bool(found.flagged[case.clean(images).argmax(1) != 7].all())


def test_latents_at_hand_need_no_pass() -> None:
    images = digit_case().data.test[0]
    with torch.no_grad():
        expected = guard()(images)
        _, latent, logits = guard().model(images)
        assert same(guard().check(latent, logits), expected)
        assert same(guard().check(latent), expected)


@pytest.mark.filterwarnings("ignore")  # torch's own, of its internals
@pytest.mark.parametrize("ends_in_head", [True, False])
def test_compiled_and_exported_it_says_the_same(tmp_path: Path, ends_in_head: bool) -> None:
    images = digit_case().data.test[0]
    rows = {0: torch.export.Dim("rows")}
    beside = guard()
    if not ends_in_head:
        softmax = nn.Sequential(digit_case().backdoored, nn.Softmax(1)).eval()
        beside = Guard.fit(softmax, digit_case().data.defender, 0.05)
    with torch.no_grad():
        expected = beside(images)
        assert close(torch.compile(beside, fullgraph=True)(images), expected)
        exported = torch.export.export(beside, (images[:8],), dynamic_shapes=(rows,))
        torch.export.save(exported, tmp_path / "guard.pt2")
        loaded = torch.export.load(tmp_path / "guard.pt2").module()
        assert close(GuardOutput(*loaded(images)), expected)
    # A server knows no more of tacext than that it is there.
    code = f"import torch, tacext; torch.export.load({str(tmp_path / 'guard.pt2')!r})"
    subprocess.run([sys.executable, "-W", "ignore", "-c", code], check=True)


@pytest.mark.filterwarnings("ignore")  # of TorchScript
def test_scripted_the_scorer_says_the_same(tmp_path: Path) -> None:
    images = digit_case().data.test[0]
    scripted = torch.jit.script(guard().scorer)
    scripted.save(str(tmp_path / "guard.pt"))
    with torch.no_grad():
        latent, logits = guard().model(images)[1:]
        found = torch.jit.load(str(tmp_path / "guard.pt"))(latent, logits)
        assert close(GuardOutput(*found), guard()(images))


@pytest.mark.filterwarnings("ignore")
def test_onnx_says_the_same(tmp_path: Path) -> None:
    images, labels = digit_case().data.test
    program = torch.onnx.export(
        guard(), (images[:8],), dynamo=True, dynamic_shapes=({0: torch.export.Dim("rows")},)
    )
    program.save(tmp_path / "guard.onnx")
    session = onnxruntime.InferenceSession(tmp_path / "guard.onnx")
    asked = torch.cat([images, stamped(images, labels)])
    found = session.run(None, {session.get_inputs()[0].name: asked.numpy()})
    with torch.no_grad():
        assert close(GuardOutput(*map(torch.from_numpy, found)), guard()(asked))


# ---- bad input -----------------------------------------------------------------------------------


def test_what_is_not_finite_is_flagged_and_stops_nobody() -> None:
    images = digit_case().data.test[0][:6].clone()
    images[2] = math.nan
    with torch.no_grad():
        found, expected = guard()(images), guard()(digit_case().data.test[0][:6])
    assert bool(found.flagged[2])
    assert math.isinf(float(found.score[2]))
    assert float(found.p_value[2]) == pytest.approx(1 / 401)
    others = torch.tensor([0, 1, 3, 4, 5])
    assert torch.equal(found.score[others], expected.score[others])


def test_bad_latents_are_named() -> None:
    latent, logits = torch.zeros(3, 128), torch.zeros(3, 10)
    check: Any = guard().check
    broken = latent.clone()
    broken[1, 5] = math.nan
    for given_latent, given_logits, message in (
        (latent[:0], None, r"latent: expected \[N, 128\] with N >= 1, got \[0, 128\]"),
        (latent[:, :7], None, r"latent: expected \[N, 128\]"),
        (latent[0], None, r"latent: expected \[N, 128\]"),
        (latent.long(), None, "latent: expected a floating dtype, got torch.int64"),
        (latent.numpy(), None, r"latent: expected a torch.Tensor"),
        (latent.to("meta"), None, "latent: expected cpu"),
        (broken, None, "latent: expected finite numbers, got NaN or infinity in row 1"),
        (latent, logits[:, :3], r"logits: expected \[N, 10\]"),
        (latent, logits[:2], "logits: expected 3 rows"),
        (latent, logits + math.inf, "logits: expected finite numbers"),
    ):
        with pytest.raises(InputError, match=f"Guard.check: {message}"):
            check(given_latent, given_logits)


def test_bad_calls_are_named() -> None:
    case, fit = digit_case(), Guard.fit
    call: Any = guard()
    for inputs in (case.data.test[0][:0], None, torch.tensor(1.0)):
        with pytest.raises(InputError, match="Guard: inputs: expected a tensor"):
            call(inputs)
    wrong: Any
    for wrong in (0, 1, -0.1, 2, "a", True, math.nan):
        with pytest.raises(InputError, match="false_positive_rate: expected a number between"):
            fit(case.backdoored, case.data.defender, wrong)
    with pytest.raises(InputError, match="seed"):
        fit(case.backdoored, case.data.defender, seed=-1)
    with pytest.raises(InputError, match=r"Guard.fit: model: expected an nn.Module"):
        fit(wrong, case.data.defender)
    with pytest.raises(InputError, match=r"Guard.fit: data"):
        fit(case.backdoored, (case.data.defender[0] * math.nan, case.data.defender[1]))
    with pytest.raises(HeadNotFoundError, match=r"Guard.fit: head"):
        fit(case.backdoored, case.data.defender, head="0")


def test_what_is_done_to_the_guard_is_not_done_to_the_model() -> None:
    model, images = copy.deepcopy(digit_case().backdoored).train(), digit_case().data.test[0]
    beside = Guard.fit(model, digit_case().data.defender, 0.05)
    with torch.no_grad():
        assert same(beside(images), guard()(images))  # in evaluation mode, whatever the model's
    beside.train()
    beside.bfloat16()
    assert not any(module.training for module in beside.modules())
    assert all(module.training for module in model.modules())
    assert {p.dtype for p in model.parameters()} == {torch.float32}


@pytest.mark.filterwarnings("ignore")
def test_a_compiled_model_is_guarded_and_left_whole() -> None:
    model, images = copy.deepcopy(digit_case().backdoored), digit_case().data.test[0]
    beside = Guard.fit(torch.compile(model), digit_case().data.defender, 0.05)  # type: ignore[arg-type]
    with torch.no_grad():
        assert same(beside(images), guard()(images))
    assert [name for name, _ in model.named_children()] == [str(i) for i in range(20)]


def test_a_forward_of_the_instance_is_refused_at_once() -> None:
    model = copy.deepcopy(digit_case().backdoored)
    forward = model.forward
    model.forward = lambda x: forward(x)  # type: ignore[method-assign]
    with pytest.raises(InputError, match=r"Guard.fit: model: .* wrap it in a plain nn\.Module"):
        Guard.fit(model, digit_case().data.defender, 0.05)


def test_a_fit_within_inference_mode_is_like_any_other() -> None:
    with torch.inference_mode():
        beside = Guard.fit(digit_case().backdoored, digit_case().data.defender, 0.05)
    assert not any(buffer.is_inference() for buffer in beside.scorer.buffers())
    beside.scorer.load_state_dict(guard().scorer.state_dict())


def test_one_class_and_one_latent_are_refused() -> None:
    class Constant(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.head = nn.Linear(4, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(torch.ones(len(x), 4))

    with pytest.raises(InputError, match="samples whose latents differ"):
        Guard.fit(Constant().eval(), (torch.rand(150, 1, 2, 2), torch.zeros(150, dtype=torch.long)))


def test_scorers_move_without_losing_digits() -> None:
    scorer: GuardScorer = copy.deepcopy(guard().scorer)
    before = {n: t.clone() for n, t in scorer.state_dict().items()}
    for moved in (scorer.half(), scorer.double(), scorer.to(torch.bfloat16)):
        for name, tensor in moved.state_dict().items():
            assert torch.equal(tensor, before[name]), name


def test_whole_numbers_as_images_come_are_refused_in_words() -> None:
    case = digit_case()
    guard = Guard.fit(case.backdoored, case.data.test, false_positive_rate=0.05)
    images = case.data.test[0][:4]
    whole = (255 * images).round().byte()
    with pytest.raises(InputError, match=r"Guard: inputs: .* got uint8; pass floats"):
        guard(whole)

    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = case.backdoored

        def forward(self, x: Tensor) -> Tensor:
            return self.model(x / 255 if x.dtype == torch.uint8 else x)  # type: ignore[no-any-return]

    taking = Guard.fit(Scaled(), case.data.test, false_positive_rate=0.05)
    torch.testing.assert_close(taking(whole).score, taking(whole / 255).score)
