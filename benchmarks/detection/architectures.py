"""The networks of the zoo: residual, pre-activation residual, VGG, transformer, without batch norm.

All take images in [0, 1] as they are and end in one linear layer. They train in a minute or two on
a core; `full=True` gives ResNet-18 and its like for a GPU.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import Tensor, nn
from torch.nn import functional

from networks import ResNet, VisionTransformer


class _PreactivationBlock(nn.Module):
    """Batch norm and ReLU in front of each of two convolutions (He et al., arXiv 1603.05027)."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.norm1 = nn.BatchNorm2d(inputs)
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.norm2 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        changes = stride != 1 or inputs != outputs
        self.shortcut = nn.Conv2d(inputs, outputs, 1, stride, bias=False) if changes else None

    def forward(self, x: Tensor) -> Tensor:
        active = functional.relu(self.norm1(x))
        out = self.conv2(functional.relu(self.norm2(self.conv1(active))))
        return out + (x if self.shortcut is None else self.shortcut(active))  # type: ignore[no-any-return]


class PreactivationResNet(nn.Module):
    """Residual network whose blocks begin, not end, with norm and ReLU."""

    def __init__(
        self,
        classes: int,
        widths: Sequence[int],
        blocks: int,
        channels: int = 3,
        stem_stride: int = 1,
    ) -> None:
        super().__init__()
        layers: list[nn.Module] = [
            nn.Conv2d(channels, widths[0], 3, stem_stride, padding=1, bias=False)
        ]
        inputs = widths[0]
        for i, width in enumerate(widths):
            for block in range(blocks):
                layers.append(
                    _PreactivationBlock(inputs, width, stride=2 if i and not block else 1)
                )
                inputs = width
        self.features = nn.Sequential(*layers, nn.BatchNorm2d(inputs), nn.ReLU())
        self.head = nn.Linear(inputs, classes)

    def forward(self, images: Tensor) -> Tensor:
        """Logits [N, classes]."""
        return self.head(self.features(images).mean((2, 3)))  # type: ignore[no-any-return]


class Vgg(nn.Module):
    """Pairs of convolutions and pooling down to 4x4, flattened: the latent keeps its places."""

    def __init__(self, classes: int, widths: Sequence[int], channels: int, size: int) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        inputs = channels
        for stage, width in enumerate(widths):
            for _ in range(2 if stage else 1):
                layers += [nn.Conv2d(inputs, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU()]
                inputs = width
            layers.append(nn.MaxPool2d(2))
        self.features = nn.Sequential(*layers, nn.Flatten())
        self.head = nn.Linear(inputs * (size // 2 ** len(widths)) ** 2, classes)

    def forward(self, images: Tensor) -> Tensor:
        """Logits [N, classes]."""
        return self.head(self.features(images))  # type: ignore[no-any-return]


class PlainNet(nn.Module):
    """Four convolutions without any normalisation, and a hidden linear layer with dropout."""

    def __init__(
        self, classes: int, widths: Sequence[int], hidden: int, channels: int, size: int
    ) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        inputs = channels
        for stage, width in enumerate(widths):
            layers += [nn.Conv2d(inputs, width, 3, padding=1), nn.ReLU()]
            layers += [nn.MaxPool2d(2)] if stage < 3 else []
            inputs = width
        self.features = nn.Sequential(*layers, nn.Flatten())
        self.hidden = nn.Sequential(
            nn.Linear(inputs * (size // 8) ** 2, hidden), nn.ReLU(), nn.Dropout(0.3)
        )
        self.head = nn.Linear(hidden, classes)

    def forward(self, images: Tensor) -> Tensor:
        """Logits [N, classes]."""
        centred = 4 * (images - 0.5)  # no norm layer makes up for inputs that are all positive
        return self.head(self.hidden(self.features(centred)))  # type: ignore[no-any-return]


class StemmedTransformer(nn.Module):
    """A vision transformer on what two strided convolutions make of the image.

    So few images do not teach a transformer on bare patches; with the stem it gets as good as the
    others here, on a quarter of the tokens.
    """

    def __init__(self, classes: int, width: int, depth: int, heads: int, channels: int, size: int):
        super().__init__()
        self.stem = nn.Sequential(
            nn.Conv2d(channels, width // 2, 3, 2, 1),
            nn.ReLU(),
            nn.Conv2d(width // 2, width, 3, 2, 1),
            nn.ReLU(),
        )
        self.transformer = VisionTransformer(
            classes, size // 4, 2, width, depth, heads, channels=width
        )

    def forward(self, images: Tensor) -> Tensor:
        """Logits [N, classes]."""
        return self.transformer(self.stem(images))  # type: ignore[no-any-return]


Build = Callable[[int, int, int], nn.Module]  # classes, channels, size

SMALL: dict[str, Build] = {
    "resnet": lambda k, c, _: ResNet(k, (32, 64, 128), 1, c, stem_stride=2),
    "preact": lambda k, c, _: PreactivationResNet(k, (32, 64, 128), 1, c, stem_stride=2),
    "vgg": lambda k, c, size: Vgg(k, (16, 32, 64), c, size),
    "vit": lambda k, c, size: StemmedTransformer(k, 64, 3, 4, c, size),
    "plain": lambda k, c, size: PlainNet(k, (24, 48, 64, 64), 128, c, size),
}

FULL: dict[str, Build] = {
    "resnet": lambda k, c, _: ResNet(k, channels=c),
    "preact": lambda k, c, _: PreactivationResNet(k, (64, 128, 256, 512), 2, c),
    "vgg": lambda k, c, size: Vgg(k, (64, 128, 256), c, size),
    "vit": lambda k, c, size: StemmedTransformer(k, 192, 8, 6, c, size),
    "plain": lambda k, c, size: PlainNet(k, (64, 128, 256, 256), 512, c, size),
}


def build(name: str, classes: int, channels: int, size: int, full: bool = False) -> nn.Module:
    """A fresh network; its weights come from torch's global generator."""
    return (FULL if full else SMALL)[name](classes, channels, size)
