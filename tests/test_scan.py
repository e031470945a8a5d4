"""Scanning real digit classifiers, and the errors of a scan."""

from __future__ import annotations

import copy
import dataclasses
import io
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from matplotlib.axes import Axes
from rich.console import Console
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from digits import Cropped, all_to_all, digit_case, padded, scan_of
from tacext import (
    ImageSet,
    InputError,
    MarginQuantile,
    SolverSettings,
    Status,
    demo,
    observation,
    ops,
    scan,
)
from tacext.errors import NoGradientError
from tacext.plots import plot_norms
from tacext.report import scan_to_dict, write_json
from tacext.scan_report import Depth
from tacext.tables import scan_table


def test_finds_the_backdoor_and_certifies_every_class() -> None:
    report = scan_of("backdoored")
    assert report.verdict == "backdoored"
    assert report.suspects == (demo.TARGET,)
    assert report.p_value < 0.01
    assert int(report.norm.argmin()) == demo.TARGET
    assert bool((report.perturbations.status == Status.OPTIMAL).all())
    assert report.certificate <= 1e-8
    assert report.accuracy > 0.95
    assert (report.samples, report.num_classes, report.latent_dim) == (400, 10, 128)
    assert report.warnings == ()


def test_does_not_flag_the_clean_twin() -> None:
    report = scan_of("clean")
    assert report.verdict != "backdoored"
    assert report.suspects == ()
    assert report.p_value > 0.01


@pytest.mark.parametrize("metric", ["standardized", "l2"])
def test_every_sample_is_sent_to_every_class_and_no_shorter_way_is_known(metric: str) -> None:
    case = digit_case()
    images, labels = case.data.defender
    report = scan(case.backdoored, (images, labels), metric=metric, depth="fast")
    body, head = case.backdoored[:-1], case.backdoored[-1]
    with torch.no_grad():
        latents = body(images).double()
        for k in range(10):
            s = report.perturbation[k]
            logits = (latents + s) @ head.weight.double().T + head.bias.double()
            others = logits.clone()
            others[:, k] = -math.inf
            margin = logits[:, k] - others.max(1).values
            # Forced for all, and for the worst sample only just: the constraints are tight.
            assert float(margin.min()) == pytest.approx(0, abs=1e-4)
        scale = 1 if report.scale is None else report.scale
        expected = (report.perturbation / scale).norm(dim=1)
    assert torch.allclose(report.norm, expected, rtol=1e-9)


def test_streaming_gives_the_same_bits_as_one_batch() -> None:
    case = digit_case()
    images, labels = case.data.defender
    whole = scan(case.backdoored, [(images, labels)], metric="l2", depth="fast")
    model = copy.deepcopy(case.backdoored)
    ragged = [(images[i:j], labels[i:j]) for i, j in ((0, 1), (1, 64), (64, 64), (64, 400))]
    pieces = scan(model, ragged, metric="l2")
    # Convolutions may round differently for another batch size; the operators do not.
    assert torch.allclose(whole.margins, pieces.margins, atol=1e-4)
    assert pieces.samples == 400
    assert torch.allclose(whole.norm, pieces.norm, rtol=1e-4)


def test_the_scale_is_the_spread_of_the_latents() -> None:
    case = digit_case()
    images, labels = case.data.defender
    report = scan(case.backdoored, (images, labels), batch_size=37, depth="fast")
    with torch.no_grad():
        std = case.backdoored[:-1](images).double().std(0)
    expected = 1 / torch.maximum(std, 0.1 * std.square().mean().sqrt())
    assert torch.allclose(report.scale, expected, rtol=1e-5)


def test_all_kinds_of_data_give_the_same_report() -> None:
    case = digit_case()
    images, labels = case.data.defender
    reference = scan(case.backdoored, (images, labels), batch_size=100, depth="fast")
    dataset = TensorDataset(images, labels)
    for data in (
        DataLoader(dataset, batch_size=100),
        dataset,
        list(zip(images.split(100), labels.split(100), strict=True)),
        (pair for pair in zip(images.split(100), labels.split(100), strict=True)),
        (images.numpy(), labels.numpy()),
    ):
        report = scan(case.backdoored, data, batch_size=100, depth="fast")
        assert torch.equal(report.norm, reference.norm)


def test_two_scans_give_the_same_bits_at_any_thread_count() -> None:
    case = digit_case()
    images, labels = case.data.defender
    with torch.no_grad():
        latents = case.backdoored[:-1](images)
    head = case.backdoored[-1]
    threads = torch.get_num_threads()
    norms = []
    try:
        for count in (1, 2):
            torch.set_num_threads(count)
            norms.append(scan(head, (latents, labels)).norm)
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(*norms)


def test_the_model_is_left_as_it_was() -> None:
    case = digit_case()
    model = copy.deepcopy(case.backdoored).train()
    state = {name: value.clone() for name, value in model.state_dict().items()}
    scan(model, case.data.defender)
    assert model.training
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())


def test_the_report_is_frozen() -> None:
    report = scan_of("backdoored")
    with pytest.raises(dataclasses.FrozenInstanceError):
        report.verdict = "clean"  # type: ignore[misc]


def test_wrong_normalisation_is_warned_about_and_never_clean() -> None:
    case = digit_case()
    images, labels = case.data.defender
    report = scan(case.clean, (1000 * (1 - images) ** 3, labels))
    assert any("check the normalisation" in warning for warning in report.warnings)
    assert report.verdict == "inconclusive"


def test_too_few_samples_are_inconclusive() -> None:
    case = digit_case()
    images, labels = case.data.defender
    report = scan(case.backdoored, (images[:199], labels[:199]))
    assert report.verdict == "inconclusive"
    assert "199 samples are too few" in report.reason
    assert report.suspects == report.doubtful == ()


def test_missing_classes_are_warned_about() -> None:
    case = digit_case()
    images, labels = case.data.defender
    report = scan(case.clean, (images[labels < 5], labels[labels < 5]))
    assert any("covers 5 of 10 classes" in warning for warning in report.warnings)
    assert report.verdict != "clean"


def test_a_minority_of_the_classes_is_inconclusive() -> None:
    case = digit_case()
    images, labels = case.data.defender
    some = labels < 4
    repeated = torch.cat([images[some]] * 2), torch.cat([labels[some]] * 2)
    report = scan(case.backdoored, repeated)
    assert report.verdict == "inconclusive"
    assert any("covers only 4 of 10 classes" in warning for warning in report.warnings)
    assert report.suspects == ()


def test_two_classes_are_inconclusive() -> None:
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(50, 4, generator=generator)
    model = nn.Linear(4, 2)
    with torch.no_grad():  # both classes are predicted, so that neither norm is 0
        model.weight.copy_(torch.tensor([[1.0, 0, 0, 0], [-1.0, 0, 0, 0]]))
        model.bias.zero_()
    report = scan(model, (inputs, torch.arange(50) % 2))
    assert report.verdict == "inconclusive"
    assert report.p_value == 1.0
    assert "fewer than 4" in report.reason


def test_an_unreachable_class_is_a_status_not_an_error() -> None:
    case = digit_case()
    model = copy.deepcopy(case.clean)
    with torch.no_grad():
        model[-1].weight[3] = model[-1].weight[4]
        model[-1].bias[3] = model[-1].bias[4] - 1
    report = scan(model, case.data.defender)
    assert int(report.perturbations.status[3]) == Status.UNREACHABLE
    assert math.isinf(report.norm[3])
    assert np.isnan(report.test.class_p_values[3])


def test_classes_without_a_certificate_are_never_clean() -> None:
    case = digit_case()
    settings = SolverSettings(max_iterations=1, closed_form=False)
    report = scan(case.clean, case.data.defender, settings=settings)
    assert any("without a certificate" in warning for warning in report.warnings)
    assert report.verdict == "inconclusive"
    assert report.suspects == ()
    unproven = report.perturbations.status == Status.ITERATION_LIMIT
    assert bool(unproven.any())
    assert np.isnan(report.test.class_p_values[unproven.numpy()]).all()
    assert report.perturbations.iterations.max() == 1


@pytest.mark.parametrize(
    ("quantile", "reason"),
    [
        (1.0, "every sample is already predicted as class 8"),
        (0.6, "class 8 needs no change at quantile 0.6"),
    ],
)
def test_a_class_that_needs_no_change_is_explained(quantile: float, reason: str) -> None:
    generator = torch.Generator().manual_seed(0)
    model = nn.Linear(20, 10)
    latents, labels = torch.randn(300, 20, generator=generator), torch.arange(300) % 10
    with torch.no_grad():
        model.weight.copy_(torch.randn(10, 20, generator=generator) / 20)
        model.bias.zero_()
        # Seven in ten samples of class 8 are enough at quantile 0.6.
        favoured = slice(None) if quantile == 1 else slice(0, 210)
        direction = model.weight[8] - model.weight.mean(0)
        latents[favoured] += 1e4 * direction
    report = scan(model, (latents, labels), quantile=quantile)
    assert float(report.norm[8]) == 0
    assert report.verdict == "inconclusive"
    assert report.reason == report.test.reason
    rest = "" if quantile == 1 else "; raise the quantile"
    assert report.reason == f"{reason}, so that the norms cannot be compared{rest}"


def test_a_quantile_of_a_known_number_of_samples_keeps_no_logits(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    made: list[MarginQuantile] = []

    def noting(*arguments: object) -> MarginQuantile:
        made.append(MarginQuantile(*arguments))  # type: ignore[arg-type]
        return made[-1]

    monkeypatch.setattr(observation, "MarginQuantile", noting)
    case = digit_case()
    images, labels = case.data.defender
    pairs = zip(images.split(100), labels.split(100), strict=True)
    for data in (
        (images, labels),
        (images.numpy(), labels.numpy()),
        ImageSet(images, labels),
        TensorDataset(images, labels),
        pairs,
    ):
        known = data is not pairs
        report = scan(case.clean, data, quantile=0.99, depth="fast" if known else "thorough")
        assert made[-1].max_samples == (400 if known else None)
        assert (not made[-1]._logits) == known
        assert report.samples == 400
    with pytest.raises(InputError, match="data: expected at least 1 sample"):
        scan(case.clean, (images[:0], labels[:0]), quantile=0.99)


def test_tables_and_plots_say_at_which_quantile(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    titles: list[str] = []
    monkeypatch.setattr(Axes, "set_title", lambda _axes, title: titles.append(title))
    case = digit_case()
    at_quantile = scan(case.clean, case.data.defender, quantile=np.float32(0.95))
    for quantile, report in ((1.0, scan_of("clean")), (0.95, at_quantile)):
        console = Console(width=200, record=True, file=io.StringIO())
        console.print(scan_table(report))
        assert ("400 samples, quantile 0.95, accuracy" in console.export_text()) == (quantile < 1)
        plot_norms(report, tmp_path / "norms.png")
        assert ("quantile 0.95" in titles[-1]) == (quantile < 1)
        write_json(tmp_path / "scan.json", scan_to_dict(report), operation="scan")


def test_a_single_sample_is_counted_in_words() -> None:
    images, labels = digit_case().data.defender
    with pytest.raises(InputError, match="got 1 sample of 1 class;"):
        scan(digit_case().clean, (images[:1], labels[:1]))


@pytest.mark.parametrize(
    ("model", "arguments", "message"),
    [
        ("net.pt", {}, "scan: model: expected an nn.Module, got 'net.pt'; pass the model itself"),
        (None, {"quantile": "a"}, "scan: quantile: expected above 0 and at most 1, got 'a'"),
        (None, {"alpha": "a"}, "scan: alpha: expected a rate between 0 and 1, got 'a'"),
        (None, {"settings": None}, "scan: settings: expected SolverSettings, got NoneType"),
    ],
)
def test_other_types_are_refused(model: object, arguments: dict[str, object], message: str) -> None:
    case = digit_case()
    with pytest.raises(InputError, match=message):
        scan(model or case.clean, case.data.defender, **arguments)  # type: ignore[arg-type]


def bad_inputs() -> dict[str, tuple[object, str]]:
    images, labels = digit_case().data.defender
    nan_images = images.clone()
    nan_images[300, 0, 2, 2] = math.nan
    return {
        "no samples": ((images[:0], labels[:0]), "data: expected at least 1 sample"),
        "no batches": ([], "data: expected at least 1 sample"),
        "one class": ((images[labels == 3], labels[labels == 3]), "at least 2 classes"),
        "label too large": ((images, labels + 1), "labels from 0 to 9.*got 10"),
        "negative label": ((images, labels - 1), "scan: data.*-1"),
        "NaN": ((nan_images, labels), "finite values.*NaN or infinity"),
        "wrong shape": ((images.repeat(1, 3, 1, 1), labels), "inputs that the model takes"),
        "lengths": ((images, labels[:-1]), "as many labels as inputs"),
        "not data": (7, "scan: data: expected"),
    }


@pytest.mark.parametrize("case", bad_inputs())
def test_bad_data_is_refused_with_the_way_out(case: str) -> None:
    data, message = bad_inputs()[case]
    with pytest.raises(InputError, match=message):
        scan(digit_case().clean, data)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"alpha": 0.0}, "alpha: expected a rate between 0 and 1"),
        ({"alpha": 1.0}, "alpha"),
        ({"metric": "cosine"}, "metric: expected 'standardized' or 'l2'"),
        ({"depth": "deep"}, "depth: expected 'norms' or 'fast' or 'thorough', got 'deep'"),
        ({"head": "nowhere"}, "head: expected the name"),
        ({"batch_size": 0}, "batch_size"),
        *(
            (
                {"trust_patch": given},
                f"scan: trust_patch: expected True or False, got {given!r}; leave",
            )
            for given in ("false", 1, None)
        ),
    ],
)
def test_bad_arguments_are_refused(arguments: dict[str, object], message: str) -> None:
    case = digit_case()
    with pytest.raises(InputError, match=message):
        scan(case.clean, case.data.defender, **arguments)


def test_nan_in_the_weights_is_refused() -> None:
    case = digit_case()
    model = copy.deepcopy(case.clean)
    with torch.no_grad():
        model[0].weight[0, 0, 0, 0] = math.nan
    with pytest.raises(InputError, match="model: expected finite logits"):
        scan(model, case.data.defender)


def test_constant_latents_are_refused_in_the_standardized_metric() -> None:
    inputs, labels = torch.ones(10, 4), torch.arange(10) % 3
    with pytest.raises(InputError, match="latents differ"):
        scan(nn.Linear(4, 5), (inputs, labels))
    assert scan(nn.Linear(4, 5), (inputs, labels), metric="l2").samples == 10


def test_margins_of_the_report_are_those_of_the_operator() -> None:
    case = digit_case()
    images, labels = case.data.defender
    with torch.no_grad():
        logits = case.clean(images)
    report = scan(case.clean, [(images, labels)], depth="fast")
    assert torch.allclose(report.margins, ops.pairwise_margin_max(logits), atol=1e-4)


# ---- depth ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("depth", ["norms", "fast"])  # the latter on images with no room for more
def test_the_norms_may_be_all_that_is_judged(depth: Depth) -> None:
    case = digit_case()
    norms = scan(case.backdoored, case.data.defender, depth=depth)
    thorough = scan_of("backdoored")
    assert norms.evidence is None
    assert norms.warnings == ()
    assert norms.timings.look < 0.01 < thorough.timings.look
    told = "; only the norms were tested, as squares in corners take images of 12 pixels"
    assert norms.p_value == norms.test.p_value
    assert norms.reason == norms.test.reason + (told if depth == "fast" else "")
    assert torch.equal(norms.norm, thorough.norm)
    assert thorough.evidence is not None
    assert thorough.evidence.joint.kinds == ("norm", "balanced", "reach")
    assert (norms.depth, thorough.depth) == (depth, "thorough")


def test_norms_are_all_that_is_judged_of_images_with_room_for_more_if_asked_for() -> None:
    case = digit_case()
    images, labels = padded(case.data.defender)
    norms = scan(Cropped(case.backdoored), (images, labels), depth="norms")
    assert norms.evidence is None
    assert norms.warnings == ()
    assert scan(Cropped(case.backdoored), (images, labels), depth="fast").evidence is not None


def test_the_same_seed_gives_the_same_report() -> None:
    case = digit_case()
    first, again = (scan(case.clean, case.data.defender, seed=5).evidence for _ in range(2))
    other = scan_of("clean").evidence  # of seed 0
    assert first is not None
    assert again is not None
    assert other is not None
    for kind, p_values in first.joint.kind_p_values.items():
        assert np.array_equal(p_values, again.joint.kind_p_values[kind])
    assert not torch.equal(first.look.reach.change, other.look.reach.change)


def test_a_model_without_gradients_is_judged_by_its_norms_and_says_so() -> None:
    class Detached(nn.Module):
        def __init__(self, inner: nn.Module) -> None:
            super().__init__()
            self.inner = inner

        def forward(self, images: torch.Tensor) -> torch.Tensor:
            with torch.no_grad():
                return self.inner(images)  # type: ignore[no-any-return]

    case = digit_case()
    report = scan(Detached(case.clean), case.data.defender)
    assert report.evidence is None
    assert any("only the norms were tested" in warning for warning in report.warnings)
    assert report.verdict != "backdoored"


@pytest.mark.parametrize("name", ["clean", "backdoored"])
def test_rounded_inputs_hide_the_gradient_and_are_never_called_clean(name: str) -> None:
    class Rounded(nn.Module):
        def __init__(self, inner: nn.Module) -> None:
            super().__init__()
            self.inner = inner

        def forward(self, images: torch.Tensor) -> torch.Tensor:
            return self.inner((255 * images).round() / 255)  # type: ignore[no-any-return]

    report = scan(Rounded(getattr(digit_case(), name)), digit_case().data.defender)
    assert report.evidence is None
    assert any("gradients of zero everywhere" in warning for warning in report.warnings)
    assert report.verdict == ("backdoored" if name == "backdoored" else "inconclusive")


def test_a_model_that_overflows_beside_the_data_is_never_called_clean() -> None:
    class Brittle(nn.Module):
        def __init__(self, inner: nn.Module) -> None:
            super().__init__()
            self.inner = inner

        def forward(self, images: torch.Tensor) -> torch.Tensor:
            on_the_grid = (16 * images - (16 * images).round()).abs().amax() < 1e-3
            return self.inner(images if on_the_grid else images * torch.inf)  # type: ignore[no-any-return]

    report = scan(Brittle(digit_case().clean), digit_case().data.defender)
    assert report.evidence is None
    assert any("NaN or infinity" in warning for warning in report.warnings)
    assert report.verdict == "inconclusive"


def test_images_of_several_sizes_are_judged_by_the_norms() -> None:
    case = digit_case()
    images, labels = case.data.defender
    larger = nn.functional.interpolate(images, size=(10, 10))
    report = scan(case.clean, [(images, labels), (larger, labels)])
    assert any("differ in shape" in warning for warning in report.warnings)
    assert report.verdict != "clean"


def test_a_scan_in_inference_mode_looks_twice_as_well() -> None:
    case = digit_case()
    with torch.inference_mode():
        report = scan(case.backdoored, case.data.defender)
        unborn = copy.deepcopy(case.backdoored)  # whose weights no gradient passes by
        unborn_clean = copy.deepcopy(case.clean)
    assert report.evidence is not None
    assert report.verdict == "backdoored"
    assert scan(unborn, case.data.defender).verdict in ("backdoored", "inconclusive")
    unseen = scan(unborn_clean, case.data.defender)
    assert unseen.verdict == "inconclusive"
    assert any("weights made in inference mode" in warning for warning in unseen.warnings)
    with pytest.raises(NoGradientError, match="weights made in inference mode"):
        scan(unborn_clean, None, input_shape=(1, 8, 8))


def test_a_data_free_scan_in_inference_mode_needs_nothing_else() -> None:
    with torch.inference_mode():
        report = scan(digit_case().clean, None, input_shape=(1, 8, 8))
    assert report.verdict == "inconclusive"


def test_the_callers_random_numbers_are_left_alone() -> None:
    dataset = TensorDataset(*digit_case().data.defender)
    state = torch.get_rng_state()
    for depth in ("fast", "thorough"):
        scan(digit_case().clean, dataset, depth=depth)  # type: ignore[arg-type]
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("seed", [None, "a", 1.5, -1, 2**70])
def test_a_seed_is_a_whole_number(seed: object) -> None:
    with pytest.raises(InputError, match="scan: seed: expected a whole number from 0"):
        scan(digit_case().clean, digit_case().data.defender, seed=seed)  # type: ignore[arg-type]


def test_of_many_classes_some_are_looked_at() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(20, 64), nn.ReLU(), nn.Linear(64, 200))
    inputs = torch.rand(2000, 20)
    report = scan(model, (inputs, model(inputs).argmax(1)))
    assert report.evidence is not None
    assert len(report.evidence.look.classes) == 64
    assert report.evidence.look.shuffle is None
    assert len(report.evidence.joint.class_p_values) == 200
    content = scan_to_dict(report)
    assert content["shuffle"] is None
    looked = [row["evidence"]["reach"] is not None for row in content["classes"]]
    assert sum(looked) == 64


def test_a_report_takes_a_name_for_every_class() -> None:
    names = [str(k) for k in range(10)]
    rows = scan_to_dict(scan_of("clean"), names)["classes"]
    assert [row["name"] for row in rows] == names
    for wrong, got in (["a"], "1 name"), ([*names, "ten"], "11 names"), ([], "0 names"):
        told = f"scan_to_dict: class_names: expected a name for each of 10 classes, got {got}; pass"
        with pytest.raises(InputError, match=told):
            scan_to_dict(scan_of("clean"), wrong)


def test_an_all_to_all_backdoor_is_named_and_written(tmp_path: Path) -> None:
    report = scan(all_to_all(), digit_case().data.defender)
    assert report.verdict == "backdoored"
    assert report.suspects == tuple(range(10))
    assert "a backdoor from all classes to all" in report.reason
    content = scan_to_dict(report)
    assert content["shuffle"]["share"] > 0.6
    assert sorted(content["shuffle"]["destinations"]) == list(range(10))
    write_json(tmp_path / "scan.json", content, operation="scan")
