"""The C and C++ examples, built against what is installed, give what Python gives.

The one with LibTorch takes a minute to build: TACEXT_TEST_LIBTORCH=1 includes it, as CI does. The
one with ONNX Runtime needs its headers and library, which no Python package has:
TACEXT_TEST_ONNXRUNTIME=FOLDER names where they are, as include/ and lib/.
"""

from __future__ import annotations

import functools
import os
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import tacext
from digits import digit_case
from tacext import Guard, GuardOutput

EXAMPLES = Path(__file__).resolve().parent.parent / "examples" / "cpp"
WITH_TORCH = os.environ.get("TACEXT_TEST_LIBTORCH") == "1"
ONNXRUNTIME = os.environ.get("TACEXT_TEST_ONNXRUNTIME", "")

pytestmark = pytest.mark.skipif(shutil.which("cmake") is None, reason="needs cmake")


@pytest.fixture(scope="module")
def programs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the built examples."""
    build = tmp_path_factory.mktemp("examples")
    prefixes = [tacext.cmake_prefix_path, torch.utils.cmake_prefix_path, ONNXRUNTIME]
    options = [
        f"-DCMAKE_PREFIX_PATH={';'.join(prefixes)}",
        f"-DTACEXT_EXAMPLE_TORCH={int(WITH_TORCH)}",
        f"-DTACEXT_EXAMPLE_ONNXRUNTIME={int(bool(ONNXRUNTIME))}",
    ]
    for command in (
        ["cmake", "-S", EXAMPLES, "-B", build, "-DCMAKE_CXX_FLAGS=-Wall -Wextra -Werror", *options],
        ["cmake", "--build", build, "--parallel"],
    ):
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return build


@functools.cache
def guard() -> Guard:
    return Guard.fit(digit_case().backdoored, digit_case().data.defender, 0.05)


@functools.cache
def judged() -> tuple[Tensor, Tensor, GuardOutput]:
    beside, images = guard(), digit_case().data.test[0]
    with torch.no_grad():
        _, latent, logits = beside.model(images)
        return latent, logits, beside.scorer(latent, logits)


def run(*command: object) -> list[list[str]]:
    arguments = [str(part) for part in command]
    done = subprocess.run(arguments, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return [line.split() for line in done.stdout.splitlines()]


def same(rows: list[list[str]], expected: GuardOutput) -> bool:
    flags = ["FLAGGED" in row for row in rows]
    scores = torch.tensor([float(row[0]) for row in rows])  # nine digits name every float32
    p_values = torch.tensor([float(row[1]) for row in rows])
    return (
        flags == expected.flagged.tolist()
        and torch.equal(scores, expected.score)
        and torch.equal(p_values, expected.p_value)
    )


def nearly_same(rows: list[list[str]], atol: float = 1e-8) -> bool:
    """Whether these say the same of each image, with latents that another library computed."""
    _, logits, expected = judged()
    scores = torch.tensor([float(row[1]) for row in rows])
    return (
        [int(row[0]) for row in rows] == logits.argmax(1).tolist()
        and torch.allclose(scores, expected.score, rtol=1e-5, atol=atol)
        and ["FLAGGED" in row for row in rows] == expected.flagged.tolist()
    )


def test_plain_c_guards_latents(programs: Path, tmp_path: Path) -> None:
    latent, logits, expected = judged()
    guard().save(tmp_path / "guard.safetensors")
    latent.numpy().tofile(tmp_path / "latents")
    logits.numpy().tofile(tmp_path / "logits")
    command = (programs / "guard_latents", tmp_path / "guard.safetensors")
    assert same(run(*command, tmp_path / "latents", tmp_path / "logits"), expected)
    for wrong in (
        (programs / "guard_latents",),
        (programs / "guard_latents", tmp_path / "none", tmp_path / "latents", tmp_path / "logits"),
        (*command, tmp_path / "logits", tmp_path / "latents"),
        (*command, tmp_path / "none", tmp_path / "none"),
    ):
        done = subprocess.run([str(w) for w in wrong], capture_output=True, text=True, check=False)
        assert done.returncode in (2, 4)
        assert done.stderr


def test_cpp_scans_a_head(programs: Path, tmp_path: Path) -> None:
    _, logits, _ = judged()
    weight = guard().model.head.weight.detach()
    weight.numpy().tofile(tmp_path / "weight")
    logits.numpy().tofile(tmp_path / "logits")
    rows = run(programs / "scan_head", 10, 128, tmp_path / "weight", tmp_path / "logits")
    solved = tacext.ops.minimal_perturbation(
        weight.double(), tacext.ops.pairwise_margin_max(logits).double()
    )
    assert [int(row[0]) for row in rows] == solved.norm.argsort().tolist()
    assert [float(row[1]) for row in rows] == solved.norm.sort().values.tolist()
    assert max(float(row[2]) for row in rows) < 1e-9


@pytest.mark.skipif(not WITH_TORCH, reason="set TACEXT_TEST_LIBTORCH=1: a minute of compiling")
@pytest.mark.filterwarnings("ignore")  # torch's own, of TorchScript
def test_libtorch_guards_a_model(programs: Path, tmp_path: Path) -> None:
    class Inputs(nn.Module):
        def __init__(self, inputs: Tensor) -> None:
            super().__init__()
            self.register_buffer("inputs", inputs)

        def forward(self) -> Tensor:
            return self.inputs

    images = digit_case().data.test[0]
    with torch.no_grad():
        torch.jit.trace(guard().model, (images,)).save(str(tmp_path / "model.pt"))
    torch.jit.script(Inputs(images)).save(str(tmp_path / "inputs.pt"))
    guard().save(tmp_path / "guard.safetensors")
    rows = run(
        programs / "guard_model", tmp_path / "model.pt", tmp_path / "guard.safetensors", tmp_path / "inputs.pt"
    )  # fmt: skip
    assert nearly_same(rows)


@pytest.mark.skipif(not ONNXRUNTIME, reason="set TACEXT_TEST_ONNXRUNTIME to its include/ and lib/")
@pytest.mark.filterwarnings("ignore")  # the exporter's
def test_onnx_runtime_guards_a_model(programs: Path, tmp_path: Path) -> None:
    images = digit_case().data.test[0]
    torch.onnx.export(
        guard().model,
        (images[:8],),
        output_names=["output", "latent", "logits"],
        dynamo=True,
        dynamic_shapes=({0: torch.export.Dim("rows")},),
    ).save(tmp_path / "model.onnx")
    images.numpy().tofile(tmp_path / "inputs")
    guard().save(tmp_path / "guard.safetensors")
    command = (programs / "guard_onnx", tmp_path / "model.onnx", tmp_path / "guard.safetensors")
    assert nearly_same(run(*command, tmp_path / "inputs"), atol=1e-5)
    (tmp_path / "short").write_bytes(b"1234")
    for wrong in (
        command,
        (*command, tmp_path / "none"),
        (*command, tmp_path / "short"),
        (command[0], tmp_path / "guard.safetensors", command[2], tmp_path / "inputs"),
        (command[0], command[1], tmp_path / "model.onnx", tmp_path / "inputs"),
    ):
        done = subprocess.run([str(w) for w in wrong], capture_output=True, text=True, check=False)
        assert done.returncode in (2, 4)
        assert done.stderr
