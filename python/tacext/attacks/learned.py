"""Triggers that a generator draws for each image, trained together with the classifier.

Both are plain modules: put their parameters into an optimiser beside the classifier's, poison a
share of every batch with them, and add `diversity_loss` where there is one.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from .triggers import check_images


class _Generator(nn.Module):
    """Images to as many maps of the same size: three scales down, three up; no batch norm."""

    def __init__(self, channels: int, outputs: int, width: int) -> None:
        super().__init__()
        self.down1 = nn.Conv2d(channels, width, 3, padding=1)
        self.down2 = nn.Conv2d(width, 2 * width, 3, 2, padding=1)
        self.down3 = nn.Conv2d(2 * width, 4 * width, 3, 2, padding=1)
        self.up2 = nn.Conv2d(4 * width, 2 * width, 3, padding=1)
        self.up1 = nn.Conv2d(2 * width, width, 3, padding=1)
        self.out = nn.Conv2d(width, outputs, 3, padding=1)

    def forward(self, images: Tensor) -> Tensor:
        """Unbounded maps [N, outputs, H, W]."""
        large = functional.relu(self.down1(images - 0.5))
        middle = functional.relu(self.down2(large))
        small = functional.relu(self.down3(middle))
        middle = functional.relu(self.up2(functional.interpolate(small, middle.shape[2:])))
        large = functional.relu(self.up1(functional.interpolate(middle, large.shape[2:])))
        maps: Tensor = self.out(large)
        return maps


def _spread(images: Tensor, others: Tensor, of_images: Tensor, of_others: Tensor) -> Tensor:
    """Distance of the inputs over the distance of what was drawn for them, averaged."""
    inputs = (images - others).square().mean((1, 2, 3)).sqrt()
    outputs = (of_images - of_others).square().mean((1, 2, 3)).sqrt()
    return (inputs / (outputs + 1e-3)).mean()


class InputAwareTrigger(nn.Module):
    """Another pattern for every image: input-aware attack (Nguyen and Tran, arXiv 2010.08138).

    A mask generator chooses few pixels, a pattern generator their values. In training a share of
    the images gets the trigger drawn for another image and keeps its label (`stamp`), so that no
    trigger works on an image that it was not drawn for.

    Args:
        channels: of the images.
        width: of the generators' largest layer.
        density: the share of pixels that the mask may cover.
    """

    def __init__(self, channels: int, width: int = 12, density: float = 0.03) -> None:
        super().__init__()
        self.density = density
        self.mask_generator = _Generator(channels, 1, width)
        self.pattern_generator = _Generator(channels, channels, width)

    def mask(self, images: Tensor) -> Tensor:
        """Which pixels, [N, 1, H, W] in [0, 1]."""
        return torch.sigmoid(20 * torch.tanh(self.mask_generator(images)))

    def pattern(self, images: Tensor) -> Tensor:
        """Which values, [N, C, H, W] in [0, 1]."""
        return torch.sigmoid(self.pattern_generator(images))

    def stamp(self, images: Tensor, drawn_for: Tensor) -> Tensor:
        """`images` with the trigger that was drawn for other ones."""
        return images + self.mask(drawn_for) * (self.pattern(drawn_for) - images)

    def forward(self, images: Tensor) -> Tensor:
        """The images, each with its own trigger."""
        check_images("InputAwareTrigger", images)
        return self.stamp(images, images)

    def mask_loss(self, images: Tensor, others: Tensor) -> Tensor:
        """To train the mask generator first: few pixels, and others for every image."""
        masks, other_masks = self.mask(images), self.mask(others)
        too_many = functional.relu(masks.mean((1, 2, 3)) - self.density).mean()
        return 100 * too_many + 0.1 * _spread(images, others, masks, other_masks)

    def diversity_loss(self, images: Tensor, others: Tensor) -> Tensor:
        """Large where different images get the same pattern."""
        return _spread(images, others, self.pattern(images), self.pattern(others))


class BoundedNoiseTrigger(nn.Module):
    """Invisible noise, drawn for every image: LIRA (Doan et al., ICCV 2021).

    Args:
        channels: of the images.
        width: of the generator's largest layer.
        bound: the largest change of any pixel.
    """

    def __init__(self, channels: int, width: int = 12, bound: float = 0.05) -> None:
        super().__init__()
        self.bound = bound
        self.generator = _Generator(channels, channels, width)

    def forward(self, images: Tensor) -> Tensor:
        """The images with their noise, clipped to [0, 1]."""
        check_images("BoundedNoiseTrigger", images)
        return (images + self.bound * torch.tanh(self.generator(images))).clamp(0, 1)
