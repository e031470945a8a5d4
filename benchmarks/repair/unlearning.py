"""I-BAU: a removal that unlearns what a universal perturbation does to the model."""

from __future__ import annotations

import torch
from clean_images import CleanImages, trainable_copy
from torch import Tensor, nn
from torch.nn import functional

RADIUS = 10.0
_BATCH = 100
_ROUNDS = 5
_TERMS = 5  # of the Neumann series


class Inner:
    """The attacker's problem: one change of all images that raises the loss, at a price for its length."""

    def __init__(self, model: nn.Module, images: Tensor, labels: Tensor) -> None:
        self.model, self.images, self.labels = model, images, labels

    def loss(self, change: Tensor) -> Tensor:
        """Of one batch, to be made small."""
        attacked = functional.cross_entropy(self.model(self.images + change), self.labels)
        return 0.001 * change.square().sum() - attacked


def universal_change(model: nn.Module, clean: CleanImages) -> Tensor:
    """[1, C, H, W]: one pass over the images by SGD at 10, against what the model itself says."""
    change = torch.zeros_like(clean.images[:1])
    for images in clean.images.split(_BATCH):
        change.requires_grad_(True)
        with torch.no_grad():
            told = model(images).argmax(1)
        (slope,) = torch.autograd.grad(Inner(model, images, told).loss(change), change)
        change = (change - 10 * slope).detach()
        change = change * min(1.0, RADIUS / max(float(change.norm()), 1e-12))
    return change


def hypergradient(
    inner: Inner, outer: Tensor, change: Tensor, parameters: list[nn.Parameter]
) -> list[Tensor]:
    """Of the outer loss with respect to the parameters, with the change as a function of them.

    The change is a fixed point of one descent step of the inner problem (step size .1); what passes
    through it is a Neumann series of five terms (section 4 and appendix of the paper).
    """
    of_change, *direct = torch.autograd.grad(outer, [change, *parameters])
    (slope,) = torch.autograd.grad(inner.loss(change), change, create_graph=True)
    step = change - 0.1 * slope
    vector = of_change  # the first term
    for _ in range(_TERMS - 1):
        (back,) = torch.autograd.grad(step, change, vector, retain_graph=True)
        vector = back + of_change
    through = torch.autograd.grad(step, parameters, vector, allow_unused=True)
    return [d if t is None else d + t for d, t in zip(direct, through, strict=True)]


def i_bau(
    model: nn.Module, clean: CleanImages, portion: float = 0.01, rate: float = 1e-3
) -> nn.Module:
    """I-BAU (Zeng et al., ICLR 2022): unlearns universal perturbations by implicit hypergradients.

    Five rounds of finding the change in one pass and unlearning it in another, by Adam at .001 in
    batches of 100. As in the authors' code one image in a hundred carries the change, the others
    hold the model where it is, and batch norm keeps its statistics.
    """
    student = trainable_copy(model).eval()
    parameters = list(student.parameters())
    optimizer = torch.optim.Adam(parameters, rate)
    generator = torch.Generator().manual_seed(clean.seed)
    batches = list(zip(clean.images.split(_BATCH), clean.labels.split(_BATCH), strict=True))
    for _ in range(clean.rounds(_ROUNDS)):
        change = universal_change(student, clean).requires_grad_(True)
        for images, labels in batches:
            carried = max(1, round(portion * len(images)))
            chosen = torch.zeros(len(images), 1, 1, 1)
            chosen[torch.randperm(len(images), generator=generator)[:carried]] = 1
            outer = functional.cross_entropy(student(images + chosen * change), labels)
            found = hypergradient(Inner(student, *batches[0]), outer, change, parameters)
            for parameter, gradient in zip(parameters, found, strict=True):
                parameter.grad = gradient
            optimizer.step()
    return student.eval()
