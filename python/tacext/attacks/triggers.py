"""Triggers: functions from images [N, C, H, W] in [0, 1] to the same images with the trigger.

Each leaves its input alone. Patterns are drawn from a seed, so that a trigger
can be made again from a few numbers.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.nn import functional

from ..errors import InputError

Trigger = Callable[[Tensor], Tensor]


def check_images(trigger: str, images: Tensor) -> None:
    """Raises InputError unless `images` is [N, C, H, W] of a floating dtype."""
    if images.dim() != 4 or not images.is_floating_point():
        raise InputError.of(
            trigger,
            "images",
            expected="[N, C, H, W] of a floating dtype, in [0, 1]",
            got=f"{list(images.shape)} of {str(images.dtype).removeprefix('torch.')}",
            way_out="divide uint8 images by 255",
        )


def _check_pattern(trigger: str, pattern: Tensor, images: Tensor) -> None:
    """The pattern [C, h, w] (C may be 1) must fit into the images."""
    channels, height, width = pattern.shape
    fits = height <= images.shape[2] and width <= images.shape[3]
    if not fits or channels not in (1, images.shape[1]):
        raise InputError.of(
            trigger,
            "images",
            expected=f"at least {height}x{width} pixels and {channels} channels",
            got=f"{list(images.shape[1:])}",
            way_out="make the trigger for images of this size",
        )


def _check_share(trigger: str, argument: str, value: float) -> None:
    if not 0 < value <= 1:
        raise InputError.of(
            trigger,
            argument,
            expected="a share above 0, at most 1",
            got=f"{value}",
            way_out="leave it out for the usual one",
        )


@dataclass(frozen=True, eq=False)
class PatchTrigger:
    """A small opaque pattern at a fixed place: BadNets (Gu et al., arXiv 1708.06733).

    Attributes:
        pattern: float [C, h, w] in [0, 1]; one channel is spread over all.
        bottom, right: pixels between the pattern and these edges of the image.
    """

    pattern: Tensor = field(repr=False)
    bottom: int = 1
    right: int = 1

    def __call__(self, images: Tensor) -> Tensor:
        """The images with the pattern in place of what was there."""
        check_images("PatchTrigger", images)
        _check_pattern("PatchTrigger", self.pattern, images[:, :, self.bottom :, self.right :])
        _, h, w = self.pattern.shape
        top, left = images.shape[2] - self.bottom - h, images.shape[3] - self.right - w
        stamped = images.clone()
        stamped[:, :, top : top + h, left : left + w] = self.pattern.to(images)
        return stamped


@dataclass(frozen=True, eq=False)
class BlendTrigger:
    """A whole image mixed into every pixel: Blend (Chen et al., arXiv 1712.05526).

    Attributes:
        pattern: float [C, H, W] in [0, 1], of the images' size.
        opacity: the pattern's share of the mixture.
    """

    pattern: Tensor = field(repr=False)
    opacity: float = 0.2

    def __post_init__(self) -> None:
        _check_share("BlendTrigger", "opacity", self.opacity)

    def __call__(self, images: Tensor) -> Tensor:
        """(1 - opacity) images + opacity pattern."""
        check_images("BlendTrigger", images)
        _check_pattern("BlendTrigger", self.pattern, images)
        return images + self.opacity * (self.pattern.to(images) - images)


@dataclass(frozen=True, eq=False)
class AdditiveTrigger:
    """A pattern added to the image: the square and watermark of Trojan (Liu et al., NDSS 2018).

    Attributes:
        pattern: float [C, H, W], of the images' size; 0 where the image stays as it is.
    """

    pattern: Tensor = field(repr=False)

    def __call__(self, images: Tensor) -> Tensor:
        """Images + pattern, clipped to [0, 1]."""
        check_images("AdditiveTrigger", images)
        _check_pattern("AdditiveTrigger", self.pattern, images)
        return (images + self.pattern.to(images)).clamp(0, 1)


@dataclass(frozen=True)
class SinusoidTrigger:
    """A horizontal wave over the whole image: SIG (Barni et al., arXiv 1902.11237).

    Attributes:
        amplitude: of the wave; the paper has 20/255 to 40/255.
        frequency: periods across the image.
    """

    amplitude: float = 40 / 255
    frequency: float = 6.0

    def __post_init__(self) -> None:
        _check_share("SinusoidTrigger", "amplitude", self.amplitude)

    def __call__(self, images: Tensor) -> Tensor:
        """Images + amplitude sin(2 pi frequency column / width), clipped to [0, 1]."""
        check_images("SinusoidTrigger", images)
        width = images.shape[3]
        column = torch.arange(width, dtype=torch.float64)
        wave = self.amplitude * torch.sin(2 * math.pi * self.frequency * column / width)
        return (images + wave.to(images)).clamp(0, 1)


@dataclass(frozen=True)
class WarpTrigger:
    """A smooth, fixed distortion of the image: WaNet (Nguyen and Tran, arXiv 2102.10369).

    Attributes:
        seed: of the control points' random shifts.
        strength: mean shift of a control point, in pixels of an image of its default size, divided
            by two: the paper's s.
        control_points: along each side, the paper's k.
    """

    seed: int = 0
    strength: float = 0.5
    control_points: int = 4

    def grid(self, height: int, width: int) -> Tensor:
        """Where each pixel is taken from, [1, H, W, 2] in [-1, 1], as `grid_sample` wants it."""
        generator = torch.Generator().manual_seed(self.seed)
        k = self.control_points
        shift = 2 * torch.rand(1, 2, k, k, generator=generator) - 1
        shift = shift / shift.abs().mean()
        shift = functional.interpolate(shift, (height, width), mode="bicubic", align_corners=True)
        still = functional.affine_grid(
            torch.eye(2, 3)[None], [1, 1, height, width], align_corners=True
        )
        per_pixel = torch.tensor([self.strength / width, self.strength / height])
        return (still + shift.permute(0, 2, 3, 1) * per_pixel).clamp(-1, 1)

    def __call__(self, images: Tensor) -> Tensor:
        """The images, distorted; bilinear between pixels."""
        check_images("WarpTrigger", images)
        grid = self.grid(images.shape[2], images.shape[3]).to(images)
        return functional.grid_sample(
            images, grid.expand(len(images), -1, -1, -1), align_corners=True
        )


@dataclass(frozen=True)
class RandomWarp:
    """A `WarpTrigger` with further random shifts: what WaNet covers its tracks with.

    Images warped like this keep their label in training, so that the model learns the one warp and
    no other. The shifts are drawn from torch's global generator, anew for every call.
    """

    warp: WarpTrigger

    def __call__(self, images: Tensor) -> Tensor:
        """The images, each distorted in a way of its own."""
        check_images("RandomWarp", images)
        n, _, height, width = images.shape
        grid = self.warp.grid(height, width).expand(n, -1, -1, -1)
        noise = 2 * torch.rand(grid.shape) - 1
        grid = (grid + noise / torch.tensor([width, height])).clamp(-1, 1).to(images)
        return functional.grid_sample(images, grid, align_corners=True)


# ---- patterns -----------------------------------------------------------------------------------


def white_patch(size: int = 4) -> Tensor:
    """A white square, [1, size, size]."""
    return torch.ones(1, size, size)


def checkerboard_patch(size: int = 3) -> Tensor:
    """A square of black and white pixels in turns, white in the corners, [1, size, size]."""
    index = torch.arange(size)
    return ((index[:, None] + index) % 2 == 0).float()[None]


def random_pattern(channels: int, height: int, width: int, seed: int = 0) -> Tensor:
    """Uniform noise in [0, 1], [C, H, W]."""
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(channels, height, width, generator=generator)


def trojan_square(channels: int, height: int, width: int, seed: int = 0) -> Tensor:
    """A colourful square near the lower right corner, to be added, [C, H, W].

    The pattern of the paper is optimised on a model; this one has its place, size and contrast.
    """
    side = max(2, round(0.25 * min(height, width)))
    pattern = torch.zeros(channels, height, width)
    rows, columns = slice(height - side - 1, height - 1), slice(width - side - 1, width - 1)
    pattern[:, rows, columns] = random_pattern(channels, side, side, seed)
    return pattern


def trojan_watermark(
    channels: int, height: int, width: int, seed: int = 0, opacity: float = 0.4
) -> Tensor:
    """Faint strokes across the whole image, to be added, [C, H, W].

    Twelve straight strokes of one pixel's width, where the paper has a printed logo.
    """
    generator = torch.Generator().manual_seed(seed)
    mask = torch.zeros(height, width)
    ends = torch.rand(12, 4, generator=generator)
    along = torch.linspace(0, 1, 4 * max(height, width))
    for x0, y0, x1, y1 in ends.tolist():
        rows = ((y0 + along * (y1 - y0)) * (height - 1)).round().long()
        columns = ((x0 + along * (x1 - x0)) * (width - 1)).round().long()
        mask[rows, columns] = opacity
    return mask.expand(channels, -1, -1).clone()
