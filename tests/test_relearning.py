"""Relearning: who is slow, what is measured, and that the caller's model and random state stay."""

from __future__ import annotations

import copy
import functools

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import tacext
from digits import Cropped, digit_case, padded
from tacext import ImageSet, InputError, Relearning, demo, evaluate, relearn
from tacext.attacks import AllToAll, SourceSpecific


@functools.cache
def covered() -> nn.Module:
    """The backdoored model, taught the true classes of triggered digits: a shallow removal."""
    case = digit_case()
    model = copy.deepcopy(case.backdoored)
    images, labels = case.data.training
    optimizer = torch.optim.Adam(model.parameters(), 5e-4)
    for index in torch.arange(len(labels)).split(50)[:15]:
        both = torch.cat([images[index], demo.white_corner(images[index])])
        optimizer.zero_grad()
        functional.cross_entropy(model(both), labels[index].repeat(2)).backward()
        optimizer.step()
    return model.eval()


def relearned(model: nn.Module, **arguments: object) -> Relearning:
    case = digit_case()
    given: dict[str, object] = {"test_data": case.data.test, "steps": 8, "every": 4} | arguments
    return relearn(
        model,
        case.data.defender,
        demo.white_corner,
        demo.TARGET,
        **given,  # type: ignore[arg-type]
    )


def test_a_covered_backdoor_comes_back_faster_than_a_clean_model_learns_one() -> None:
    case = digit_case()
    course = {"steps": 15, "every": 5}
    present = relearned(case.backdoored, steps=1)
    hidden, never = relearned(covered(), **course), relearned(case.clean, **course)
    assert (present.steps_to_half, present.steps_to_nine_tenths) == (0, 0)
    assert hidden.points[0].asr < 0.1
    assert never.points[0].asr < 0.1
    assert hidden.steps_to_half is not None
    assert 0 < hidden.steps_to_half <= 10
    assert never.steps_to_half is None
    assert hidden.points[-1].asr > never.points[-1].asr + 0.3
    assert min(point.acc for point in (hidden.points[-1], never.points[-1])) > 0.95


def test_what_is_measured_is_the_model_as_given_and_after_every_few_steps() -> None:
    case = digit_case()
    result = relearned(covered(), steps=7, every=3)
    before = evaluate(covered(), case.data.test, demo.white_corner, demo.TARGET)
    assert [point.step for point in result.points] == [0, 3, 6, 7]
    assert (result.points[0].acc, result.points[0].asr) == (before.acc, before.asr)
    for level, first in ((0.5, result.steps_to_half), (0.9, result.steps_to_nine_tenths)):
        above = [point.step for point in result.points if point.asr > level]
        assert first == (above[0] if above else None)
    # How often one looks changes nothing.
    assert relearned(covered(), steps=7, every=7).points[-1] == result.points[-1]


def test_without_a_trigger_nothing_comes_back() -> None:
    """The poisoned samples do it, not the training: their labels alone teach no trigger."""
    case = digit_case()
    stamped = []

    def no_trigger(images: Tensor) -> Tensor:
        stamped.append(len(images))
        return images

    result = relearn(
        covered(), case.data.defender, no_trigger, 0, test_data=case.data.test, steps=8, every=8
    )
    assert result.steps_to_half is None
    # Victims of the test data before and after, and the poisoned samples in between.
    victims = int((case.data.test[1] != 0).sum())
    assert sum(stamped) == 2 * victims + 20
    assert result.settings.poisoned_samples == 20
    assert result.settings.training_samples == 400


def test_poisoned_samples_by_share_and_by_number() -> None:
    by_share, by_number = (
        relearned(covered(), poisoned_share=0.1),
        relearned(covered(), poisoned_share=np.int64(40)),
    )
    assert by_share == by_number
    assert by_share.settings.poisoned_samples == 40
    one = relearned(covered(), poisoned_share=1)
    assert one.settings.poisoned_samples == 1
    assert one.points[-1].asr < by_share.points[-1].asr - 0.3


def test_the_callers_model_and_random_state_stay_as_they_are() -> None:
    model = nn.Sequential(copy.deepcopy(covered()), nn.Dropout(0.3)).train()
    model[0][0].weight.requires_grad_(False)
    state = {name: value.clone() for name, value in model.state_dict().items()}
    random = torch.get_rng_state()
    first = relearned(model, steps=4)
    assert torch.equal(torch.get_rng_state(), random)
    assert model.training
    assert not model[0][0].weight.requires_grad
    assert all(parameter.grad is None for parameter in model.parameters())
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    torch.rand(3)  # dropout must not follow the caller's state either
    assert relearned(model, steps=4) == first
    assert relearned(model, steps=4, seed=1).points[1:] != first.points[1:]


def test_all_parameters_are_trained_and_batch_norm_keeps_its_statistics() -> None:
    model = copy.deepcopy(covered()).requires_grad_(False)
    norm = model[1]
    assert isinstance(norm, nn.BatchNorm2d)
    seen: list[tuple[nn.Module, bool]] = []
    handle = norm.register_forward_hook(lambda m, _inputs, _output: seen.append((m, m.training)))
    result = relearned(model, steps=4)
    handle.remove()
    assert not any(training for _, training in seen)
    trained = seen[-1][0]
    assert trained is not norm
    assert torch.equal(trained.running_mean, norm.running_mean)  # type: ignore[arg-type]
    assert not torch.equal(trained.weight, norm.weight)  # type: ignore[arg-type]
    assert result == relearned(covered(), steps=4)


def test_without_test_data_a_fifth_is_held_out() -> None:
    images, labels = digit_case().data.defender
    trained, measured = [], []

    class Watching(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = copy.deepcopy(covered())

        def forward(self, x: Tensor) -> Tensor:
            (trained if torch.is_grad_enabled() else measured).extend(map(hash_of, x))
            return self.model(x)  # type: ignore[no-any-return]

    def hash_of(image: Tensor) -> bytes:
        return image.numpy().tobytes()

    result = relearn(Watching(), (images, labels), demo.white_corner, 0, steps=4, every=4)
    assert (result.settings.training_samples, result.settings.test_samples) == (320, 80)
    assert not set(trained) & set(measured)
    clean = set(map(hash_of, images))
    assert len(clean & set(measured)) == 80
    assert len(clean & set(trained)) == 320 - 16


def test_a_latent_patch_stays_in_place() -> None:
    case = digit_case()
    data, test = padded(case.data.defender), padded(case.data.test)

    def trigger(images: Tensor) -> Tensor:
        return padded((demo.white_corner(images[:, :, 8:, 8:]), images))[0]

    patched = tacext.repair(
        Cropped(case.backdoored), data, targets=[0], method="patch", max_accuracy_drop=None
    ).model
    buffers = {name: value.clone() for name, value in patched.named_buffers()}
    assert any("patch." in name for name in buffers)
    seen: list[nn.Module] = []
    handle = patched.register_forward_hook(lambda m, _inputs, _output: seen.append(m))
    limited = relearn(patched, data, trigger, 0, test_data=test, steps=4, every=4)
    handle.remove()
    trained = dict(seen[-1].named_buffers())
    assert seen[-1] is not patched
    assert all(torch.equal(value, trained[name]) for name, value in buffers.items())
    assert limited.points[0].asr < 0.01
    assert limited.points[1] != limited.points[0]
    open_again = tacext.remove_latent_patch(patched)
    assert relearn(open_again, data, trigger, 0, test_data=test, steps=1).steps_to_half == 0


@pytest.mark.parametrize("layer", [nn.LogSoftmax(1), nn.Softmax(1)])
def test_probabilities_are_trained_as_logits_are(layer: nn.Module) -> None:
    expected = relearned(covered())
    result = relearned(nn.Sequential(covered(), layer))
    for point, reference in zip(result.points, expected.points, strict=True):
        assert point.asr == pytest.approx(reference.asr, abs=0.05)
        assert point.acc == pytest.approx(reference.acc, abs=0.02)


def test_goals_and_image_sets_are_taken() -> None:
    case = digit_case()
    data, test = (ImageSet(*part) for part in (case.data.defender, case.data.test))
    for goal in (AllToAll(10), SourceSpecific(3, 0)):
        result = relearn(
            case.backdoored, data, demo.white_corner, goal, test_data=test, steps=2, every=1
        )
        before = evaluate(case.backdoored, test, demo.white_corner, goal)
        assert result.points[0].asr == before.asr
        assert len(result.points) == 3


def test_it_works_in_inference_mode_and_without_gradients() -> None:
    case = digit_case()
    expected = relearned(covered(), steps=2)
    for mode in (torch.no_grad(), torch.inference_mode()):
        with mode:
            model = copy.deepcopy(covered())
            images, labels = (part.clone() for part in case.data.defender)
            result = relearn(
                model,
                [(images, labels)],
                demo.white_corner,
                0,
                test_data=case.data.test,
                steps=2,
                every=4,
            )
        assert result == expected


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"steps": 0}, "relearn: steps: expected a whole number, at least 1, got 0"),
        ({"steps": 2.5}, "relearn: steps: expected a whole number, at least 1, got 2.5"),
        ({"every": 0}, "relearn: every: expected a whole number"),
        ({"every": True}, "relearn: every: expected a whole number"),
        ({"learning_rate": -1}, "relearn: learning_rate: expected above 0, got -1"),
        ({"learning_rate": float("nan")}, "relearn: learning_rate: expected above 0, got nan"),
        ({"batch_size": 0}, "relearn: batch_size: expected an integer, 1 or more"),
        ({"seed": -1}, "relearn: seed: expected a whole number"),
        ({"poisoned_share": 0.0}, "relearn: poisoned_share: expected a share between 0 and 1"),
        ({"poisoned_share": 1.0}, "relearn: poisoned_share: expected a share between 0 and 1"),
        ({"poisoned_share": 399}, "of at most 3.. samples in all, .*got 399"),
        ({"poisoned_share": True}, "relearn: poisoned_share: .*got True"),
        ({"poisoned_share": "few"}, "relearn: poisoned_share: .*got 'few'"),
        ({"learning_rate": 1e30}, "relearn: learning_rate: .*does not diverge.*; lower it"),
        ({"model": "m"}, "relearn: model: expected an nn.Module, got 'm'"),
        ({"target": 10}, "target: expected a class from 0 to 9, got 10"),
        ({"target": 1.5}, "target: expected a class of 0 or more, got 1.5"),
        ({"trigger": lambda x: x[:, :, :4]}, "trigger: expected a tensor of the inputs' shape"),
        ({"test_data": "x"}, "relearn: test_data: data: expected an ImageSet"),
    ],
)
def test_what_cannot_be_used_is_named(arguments: dict[str, object], message: str) -> None:
    case = digit_case()
    given: dict[str, object] = {
        "model": case.clean,
        "data": case.data.defender,
        "trigger": demo.white_corner,
        "target": 0,
        "test_data": case.data.test,
        "steps": 2,
    }
    with pytest.raises(InputError, match=message):
        relearn(**(given | arguments))  # type: ignore[arg-type]


def test_data_that_does_not_fit_is_named() -> None:
    case = digit_case()
    images, labels = case.data.defender
    test_images, test_labels = case.data.test
    wider = functional.pad(test_images, (1, 0)), test_labels
    with pytest.raises(InputError, match=r"test_data: .*shape \[1, 8, 8\], got \[1, 8, 9\]"):
        relearn(case.clean, (images, labels), demo.white_corner, 0, test_data=wider)
    with pytest.raises(InputError, match="relearn: data: expected at least 3 samples"):
        relearn(case.clean, (images[:2], labels[:2]), demo.white_corner, 0)
    with pytest.raises(InputError, match="relearn: data: expected labels from 0 to 9"):
        relearn(case.clean, (images, labels + 3), demo.white_corner, 0, test_data=case.data.test)
