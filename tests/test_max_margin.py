"""Max margin: classes driven from noise, on real digit classifiers, without any data."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from digits import digit_case
from tacext.differentiable import DifferentiableModel, InputBox, class_margin
from tacext.errors import NoGradientError
from tacext.heads import find_head
from tacext.max_margin import DrivenClasses, drive_classes

BOX = InputBox.unit((1, 8, 8))


def _driven(network: nn.Module, classes: list[int], steps: int = 20, **how: int) -> DrivenClasses:
    """All groups as one."""
    model = DifferentiableModel(network, find_head(network, BOX.noise(4, 0)), "scan")
    groups = list(drive_classes(model, BOX, classes, steps=steps, progress=False, **how))
    return DrivenClasses(
        tuple(k for group in groups for k in group.classes),
        torch.cat([group.margin for group in groups]),
        torch.cat([group.inputs for group in groups]),
    )


def test_the_target_overshoots() -> None:
    margin = _driven(digit_case().backdoored, list(range(10))).margin.mean(1)
    assert int(margin.argmax()) == 0
    clean = _driven(digit_case().clean, list(range(10))).margin.mean(1)
    assert float(margin[0] / margin.median()) > 1.2 * float(clean[0] / clean.median())


def test_the_inputs_have_the_margins_that_are_told() -> None:
    network = digit_case().clean
    found = _driven(network, [2, 5])
    assert float(found.inputs.min()) >= 0
    assert float(found.inputs.max()) <= 1
    with torch.no_grad():
        margin = class_margin(network(found.inputs), torch.tensor([2, 5]))
    torch.testing.assert_close(margin.double(), found.margin.amax(1), rtol=0.02, atol=0.1)


def test_more_steps_go_further() -> None:
    near, far = (_driven(digit_case().clean, [1, 6], steps).margin.mean() for steps in (2, 20))
    assert float(far) > 2 * float(near)


def test_groups_of_classes_do_not_matter_and_seeds_do() -> None:
    network = digit_case().clean
    together = _driven(network, [0, 3, 8], batch_size=128).margin
    alone = torch.cat([_driven(network, [k], batch_size=128).margin for k in (0, 3, 8)])
    torch.testing.assert_close(together, alone, rtol=0.05, atol=0.2)  # bfloat16 in other batches
    assert torch.equal(together, _driven(network, [0, 3, 8], batch_size=128).margin)
    assert not torch.equal(together, _driven(network, [0, 3, 8], seed=1).margin)
    few = _driven(network, [0, 3], batch_size=3)  # fewer starts, one class at a time
    assert few.margin.shape == (2, 3)
    assert few.classes == (0, 3)
    assert _driven(network, [1], seed=2**48).margin.isfinite().all()


def test_a_model_without_gradients_is_refused() -> None:
    class Rounded(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = digit_case().clean

        def forward(self, images: torch.Tensor) -> torch.Tensor:
            return self.model((images * 255).round() / 255)  # type: ignore[no-any-return]

    with pytest.raises(NoGradientError, match="zero everywhere"):
        _driven(Rounded(), [0, 1])


def test_noise_is_the_same_everywhere_and_within_the_box() -> None:
    box = InputBox((2, 3, 3), torch.tensor([-1.0, 2.0])[:, None, None], torch.tensor(5.0))
    noise = box.noise(50, 7)
    assert torch.equal(noise, box.noise(50, 7))
    assert noise.shape == (50, 2, 3, 3)
    assert float(noise[:, 0].min()) >= -1
    assert float(noise[:, 1].min()) >= 2
    assert float(noise.max()) <= 5
