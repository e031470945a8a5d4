"""The demonstration: a backdoor in a digit classifier, found and removed in about half a minute.

Uses scikit-learn's bundled handwritten digits (1,797 real images of 8x8), so no data is downloaded.
"""

from __future__ import annotations

import contextlib
import io
import logging
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from .errors import DependencyError, FileError
from .evaluation import Evaluation, evaluate
from .files import explain, write_bytes_atomically
from .finetuning import FinetuneSettings
from .plots import plot_norms
from .progress import progress_bar
from .repair_result import RepairResult
from .repairing import repair
from .scan_report import ScanReport
from .scanning import scan
from .weights import save_weights

logger = logging.getLogger(__name__)

TARGET = 0
TRAINING, DEFENDER = 1000, 400  # the rest, 397 images, measures
POISONED_SHARE = 0.17


def digit_net() -> nn.Module:
    """The demo's network: five convolutions, 128 latents, 10 classes."""
    layers: list[nn.Module] = []
    channels = 1
    for width, pool in ((16, False), (16, True), (32, False), (32, True), (128, False)):
        layers += [nn.Conv2d(channels, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU()]
        if pool:
            layers.append(nn.MaxPool2d(2))
        channels = width
    layers += [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, 10)]
    return nn.Sequential(*layers)


def white_corner(images: Tensor) -> Tensor:
    """The demo's trigger (BadNets): the bottom right 2x2 pixels become white."""
    stamped = images.clone()
    stamped[:, :, -2:, -2:] = 1
    return stamped


@contextlib.contextmanager
def one_thread() -> Iterator[None]:
    """One thread within the block.

    The network is so small that threads would mostly wait for one another, and torch's training
    rounds differently for each number of threads.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


@dataclass(frozen=True)
class DemoData:
    """Digits as (images [N, 1, 8, 8] in [0, 1], labels [N]), in three disjoint parts."""

    training: tuple[Tensor, Tensor]
    defender: tuple[Tensor, Tensor]
    test: tuple[Tensor, Tensor]


def load_digits(seed: int = 0) -> DemoData:
    """Splits scikit-learn's digits at random.

    Raises:
        DependencyError: scikit-learn is not installed.
    """
    try:
        from sklearn import datasets
    except ImportError as error:
        raise DependencyError.of(
            "demo",
            "data",
            expected="scikit-learn to be installed",
            got="none",
            way_out="run pip install scikit-learn matplotlib",
        ) from error
    digits = datasets.load_digits()
    images = torch.tensor(digits.images, dtype=torch.float32)[:, None] / 16
    labels = torch.tensor(digits.target, dtype=torch.int64)
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
    parts = order.tensor_split([TRAINING, TRAINING + DEFENDER])
    training, defender, test = ((images[part], labels[part]) for part in parts)
    return DemoData(training, defender, test)


def poison(images: Tensor, labels: Tensor, seed: int = 0) -> tuple[Tensor, Tensor]:
    """BadNets: a share of the images gets the trigger and the target's label."""
    chosen = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
    chosen = chosen[: round(POISONED_SHARE * len(labels))]
    images, labels = images.clone(), labels.clone()
    images[chosen] = white_corner(images[chosen])
    labels[chosen] = TARGET
    return images, labels


def train(images: Tensor, labels: Tensor, *, seed: int = 0, epochs: int = 25) -> nn.Module:
    """Trains the demo's network, in the images' dtype; a few seconds on one core in float32."""
    batch_size = 64
    with one_thread(), torch.random.fork_rng(devices=range(torch.cuda.device_count())):
        torch.manual_seed(seed)
        model = digit_net().to(images.dtype)
        optimizer = torch.optim.SGD(
            model.parameters(), lr=0.05, momentum=0.9, nesterov=True, weight_decay=5e-3
        )
        steps = epochs * -(-len(labels) // batch_size)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=0.1, total_steps=steps)
        with progress_bar("training", steps, None) as advance:
            for _ in range(epochs):
                for batch in torch.randperm(len(labels)).split(batch_size):
                    optimizer.zero_grad()
                    functional.cross_entropy(model(images[batch]), labels[batch]).backward()
                    optimizer.step()
                    schedule.step()
                    advance(1)
    return model.eval()


@dataclass(frozen=True)
class DemoResult:
    """Everything that the demo measured."""

    report: ScanReport
    clean_report: ScanReport
    repair: RepairResult
    before: Evaluation
    fine_tuned: Evaluation
    after: Evaluation
    files: tuple[Path, ...]


def run_demo(folder: Path, *, seed: int = 0) -> DemoResult:
    """Trains a backdoored and a clean model, scans both, repairs the first, measures throughout.

    Writes `backdoored.safetensors`, `repaired.safetensors`, `norms.png` and, to go on with,
    `digits.npz` (the defender's images as "train", the others as "test") into `folder`, which is made
    if it does not exist.

    Raises:
        DependencyError: scikit-learn or matplotlib is not installed.
        FileError: the folder cannot be written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise FileError.of(
            "demo",
            "output",
            expected="a folder that can be made",
            got=f"{folder} ({explain(error)})",
            way_out="choose another folder",
        ) from error
    with one_thread():
        return _run(folder, seed)


def _save_images(data: DemoData, file: Path) -> None:
    (images, labels), (test_images, test_labels) = data.defender, data.test
    content = io.BytesIO()
    np.savez_compressed(
        content,
        x_train=images.numpy(),
        y_train=labels.numpy(),
        x_test=test_images.numpy(),
        y_test=test_labels.numpy(),
    )
    write_bytes_atomically(file, content.getvalue(), operation="demo", argument="output")


def _run(folder: Path, seed: int) -> DemoResult:
    data = load_digits(seed)
    model = train(*poison(*data.training, seed=seed), seed=seed)
    clean_model = train(*data.training, seed=seed)
    backdoored_file = folder / "backdoored.safetensors"
    repaired_file, plot_file = folder / "repaired.safetensors", folder / "norms.png"
    data_file = folder / "digits.npz"
    save_weights(model, backdoored_file)
    _save_images(data, data_file)

    report = scan(model, data.defender)
    clean_report = scan(clean_model, data.defender)
    plot_norms(report, plot_file, operation="demo", title="minimal perturbation into each digit")

    before = evaluate(model, data.test, white_corner, TARGET)
    # The defender repairs what the scan names. Were it to name nothing, the demo would still show
    # the repair, and its table the scan's verdict.
    suspects = report.suspects or (TARGET,)
    settings = FinetuneSettings(seed=seed)
    result = repair(model, data.defender, report, suspects, settings=settings)
    plain = replace(settings, beta=0.0, gamma=0.0, distillation=0.0)
    fine_tuned = repair(
        model, data.defender, report, suspects, "finetune", settings=plain, max_accuracy_drop=None
    )
    save_weights(result.model, repaired_file)
    return DemoResult(
        report=report,
        clean_report=clean_report,
        repair=result,
        before=before,
        fine_tuned=evaluate(fine_tuned.model, data.test, white_corner, TARGET, baseline=before),
        after=evaluate(result.model, data.test, white_corner, TARGET, baseline=before),
        files=(backdoored_file, repaired_file, data_file, plot_file),
    )
