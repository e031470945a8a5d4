"""The native guard: against the plain one, and through the C interface."""

from __future__ import annotations

import ctypes
import functools
import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import tacext
from conftest import HAS_CUDA, REQUIRE_CUDA
from digits import digit_case
from guard_files import DAMAGES, damaged
from tacext import Guard, InputError, ops
from tacext.guard_scoring import GuardScorer

LIBRARY = Path(tacext.cmake_prefix_path) / "lib" / "libtacext_core.so"


def scorer_of(classes: int, dim: int, ranks: int, knots: int, seed: int = 0) -> GuardScorer:
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    return GuardScorer(
        mean=draw(classes, dim),
        inverse_spread=draw(dim).abs() + 0.1,
        basis=torch.linalg.qr(draw(dim, max(ranks, 1))).Q.T[:ranks].contiguous(),
        near_weight=torch.cat([torch.ones(1), draw(ranks).clamp(-0.9, 2)]),
        far_weight=torch.cat([torch.ones(1), draw(ranks).clamp(-0.9, 2)]),
        direction=draw(classes, dim),
        location=draw(classes, 4),
        inverse_deviation=draw(classes, 4).abs() / math.sqrt(dim),
        knots=draw(knots).abs().sort().values,
        exceeding=torch.arange(knots, -1, -1).float(),
        threshold=torch.tensor(1.0),
        samples=torch.tensor(knots),
    )


@functools.cache
def guard() -> Guard:
    return Guard.fit(digit_case().backdoored, digit_case().data.defender, 0.05)


def arguments(scorer: GuardScorer) -> list[Tensor]:
    return list(scorer.buffers())


@given(
    st.integers(2, 12), st.integers(1, 70), st.integers(0, 9), st.integers(1, 40), st.integers(1, 9)
)
def test_native_and_plain_agree(classes: int, dim: int, ranks: int, knots: int, rows: int) -> None:
    scorer = scorer_of(classes, dim, min(ranks, dim), knots)
    generator = torch.Generator().manual_seed(rows)
    latent = torch.randn(rows, dim, generator=generator)
    logits = torch.randn(rows, classes, generator=generator)
    native, plain = scorer(latent, logits), scorer.plain(latent, logits)
    assert torch.allclose(native.score, plain.score, rtol=1e-4, atol=1e-4)
    apart = (native.score - plain.score).abs() > 0
    assert torch.equal(native.flagged[~apart], plain.flagged[~apart])
    assert torch.allclose(native.p_value[~apart], plain.p_value[~apart])


def test_flags_are_the_same_on_every_digit() -> None:
    images = torch.cat([digit_case().data.test[0], digit_case().data.training[0]])
    with torch.no_grad():
        _, latent, logits = guard().model(images)
    native, plain = guard().scorer(latent, logits), guard().scorer.plain(latent, logits)
    assert torch.equal(native.flagged, plain.flagged)
    assert float((native.score - plain.score).abs().max()) < 1e-4


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
def test_other_dtypes_are_read_as_they_are(dtype: torch.dtype) -> None:
    scorer = scorer_of(5, 37, 8, 20)
    latent = torch.randn(9, 37, generator=torch.Generator().manual_seed(1)).to(dtype)
    logits = torch.randn(9, 5, generator=torch.Generator().manual_seed(2)).to(dtype)
    expected = scorer(latent.float(), logits.float())
    assert torch.equal(scorer(latent, logits).score, expected.score)
    # Mixed ones, as of a model under autocast, lose nothing.
    assert torch.equal(scorer(latent, logits.float()).score, expected.score)
    assert torch.equal(scorer(latent.float(), logits).score, expected.score)


def test_the_bits_depend_on_nothing_but_the_row() -> None:
    scorer = scorer_of(7, 300, 32, 50)
    latent = torch.randn(203, 300, generator=torch.Generator().manual_seed(1))
    logits = torch.randn(203, 7, generator=torch.Generator().manual_seed(2))
    expected = scorer(latent, logits)
    threads = torch.get_num_threads()
    try:
        for count in (1, 3):
            torch.set_num_threads(count)
            assert torch.equal(scorer(latent, logits).score, expected.score)
    finally:
        torch.set_num_threads(threads)
    for i in range(0, 203, 17):
        assert torch.equal(
            scorer(latent[i : i + 1], logits[i : i + 1]).score, expected.score[i : i + 1]
        )
    spaced = latent.repeat(1, 2)[:, :300]
    assert torch.equal(scorer(spaced, logits).score, expected.score)


def test_no_rows_are_no_answers() -> None:
    found = scorer_of(3, 4, 2, 5)(torch.zeros(0, 4), torch.zeros(0, 3))
    assert found.score.shape == found.p_value.shape == found.flagged.shape == (0,)


def test_what_does_not_fit_is_named() -> None:
    scorer = scorer_of(5, 6, 2, 9)
    latent, logits = torch.zeros(3, 6), torch.zeros(3, 5)
    table = arguments(scorer)
    for given_latent, given_logits, message in (
        (latent[:, :4], logits, r"latent: expected \[N, 6\], got \[3, 4\]"),
        (latent.int(), logits, "latent: expected float64"),
        (latent, logits[:2], "logits: expected as many rows as latent has, 3, got 2"),
        (latent, logits[:, :2], r"logits: expected \[N, 5\]"),
        (latent.numpy(), logits, r"latent: expected a torch\.Tensor"),
        (latent, logits.to("meta"), "logits: expected cpu"),
    ):
        with pytest.raises(InputError, match=f"guard_score: {message}"):
            ops.guard_score(given_latent, given_logits, *table)
    for position in range(len(table)):
        broken = [*table]
        broken[position] = table[position].to("meta")
        with pytest.raises(InputError, match=r"guard_score: .*: expected cpu"):
            ops.guard_score(latent, logits, *broken)
        broken[position] = table[position].double()
        with pytest.raises(InputError, match=r"guard_score: .*: expected the guard's own"):
            ops.guard_score(latent, logits, *broken)
    with pytest.raises(InputError, match="guard_score: samples: expected 1 or more, got 0"):
        ops.guard_score(latent, logits, *table[:-1], torch.tensor(0))


@pytest.mark.skipif(
    not (HAS_CUDA or REQUIRE_CUDA), reason="needs a GPU and a build with the CUDA kernels"
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16])
def test_a_gpu_says_what_the_cpu_says(dtype: torch.dtype) -> None:
    for classes, dim, ranks in ((3, 15, 4), (10, 512, 32), (300, 64, 8)):
        scorer = scorer_of(classes, dim, ranks, 90)
        generator = torch.Generator().manual_seed(1)
        latent = torch.randn(70, dim, generator=generator).to(dtype)
        logits = torch.randn(70, classes, generator=generator).to(dtype)
        latent[3, 0] = logits[5, 1] = math.nan
        expected = scorer(latent, logits)
        scorer.cuda()
        assert ops.has_guard_kernel(latent.cuda().device, ranks)
        found = scorer(latent.cuda(), logits.cuda())
        assert torch.allclose(found.score.cpu(), expected.score, rtol=1e-4, atol=1e-4)
        assert torch.equal(found.score, scorer(latent.cuda(), logits.cuda()).score)
        near = (expected.score - scorer.threshold.cpu()).abs() < 1e-3
        assert torch.equal(found.flagged.cpu()[~near], expected.flagged[~near])
        apart = (expected.score[:, None] - scorer.knots.cpu()).abs().amin(1) > 1e-3
        assert torch.equal(found.p_value.cpu()[apart], expected.p_value[apart])
        assert scorer(latent[:0].cuda(), logits[:0].cuda()).score.shape == (0,)


def test_only_what_the_kernel_serves_goes_to_it(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu = torch.device("cuda")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _device: (7, 5))
    monkeypatch.setattr("tacext._core.has_cuda", lambda: False)
    assert ops.has_guard_kernel(torch.device("cpu"), 1000)
    assert not ops.has_guard_kernel(gpu, 8)
    assert not ops.has_guard_kernel(torch.device("meta"), 8)
    monkeypatch.setattr("tacext._core.has_cuda", lambda: True)
    assert not ops.has_guard_kernel(gpu, 8)  # no code for it
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _device: (8, 0))
    assert ops.has_guard_kernel(gpu, 256)
    assert not ops.has_guard_kernel(gpu, 257)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, 1e30])
def test_native_and_plain_agree_on_what_is_not_finite(value: float) -> None:
    scorer = scorer_of(5, 6, 2, 9)
    latent, logits = torch.randn(40, 6), torch.randn(40, 5)
    for i in range(6):
        latent[i, i] = value
    if not math.isfinite(value):
        for i in range(5):
            logits[10 + i, i] = value
    native, plain = scorer(latent, logits), scorer.plain(latent, logits)
    assert torch.equal(torch.isinf(native.score), torch.isinf(plain.score))
    assert bool(torch.isinf(native.score[:6]).all())
    assert int(torch.isinf(native.score).sum()) == (6 if math.isfinite(value) else 11)
    assert bool(native.flagged[:6].all())


@pytest.mark.filterwarnings("ignore")  # torch's own
def test_torch_takes_the_operator_for_one_of_its_own() -> None:
    scorer = scorer_of(5, 6, 2, 9)
    torch.library.opcheck(
        torch.ops.tacext.guard_score.default,
        (torch.randn(4, 6), torch.randn(4, 5), *arguments(scorer)),
    )


# ---- through the C interface ---------------------------------------------------------------------


@functools.cache
def library() -> ctypes.CDLL:
    loaded = ctypes.CDLL(str(LIBRARY))
    loaded.tacext_version.restype = ctypes.c_char_p
    loaded.tacext_guard_threshold.restype = ctypes.c_float
    loaded.tacext_guard_false_positive_rate.restype = ctypes.c_double
    for name in ("classes", "latents", "samples"):
        getattr(loaded, f"tacext_guard_{name}").restype = ctypes.c_int64
    return loaded


def load(path: Path) -> tuple[int, ctypes.c_void_p, str]:
    handle, message = ctypes.c_void_p(), ctypes.create_string_buffer(300)
    status = library().tacext_guard_load(
        str(path).encode(), ctypes.byref(handle), message, ctypes.c_size_t(300)
    )
    return status, handle, message.value.decode()


def test_c_reads_the_file_and_gives_the_same_bits(tmp_path: Path) -> None:
    guard().save(tmp_path / "guard.safetensors")
    status, handle, message = load(tmp_path / "guard.safetensors")
    assert status == 0, message
    native = library()
    assert native.tacext_version().decode() == tacext.__version__
    assert native.tacext_guard_classes(handle) == 10
    assert native.tacext_guard_latents(handle) == 128
    assert native.tacext_guard_samples(handle) == guard().info.samples
    assert native.tacext_guard_false_positive_rate(handle) == 0.05
    assert native.tacext_guard_threshold(handle) == float(guard().scorer.threshold)
    images = digit_case().data.test[0]
    with torch.no_grad():
        _, latent, logits = guard().model(images)
    expected, rows = guard().scorer(latent, logits), len(images)
    score, p_value = torch.empty(rows), torch.empty(rows)
    flagged, text = torch.empty(rows, dtype=torch.uint8), ctypes.create_string_buffer(300)

    def pointer(tensor: Tensor) -> ctypes.c_void_p:
        return ctypes.c_void_p(tensor.data_ptr())

    status = native.tacext_guard_score(
        handle, pointer(latent), ctypes.c_int64(128), pointer(logits), ctypes.c_int64(10),
        ctypes.c_int64(rows), pointer(score), pointer(p_value), pointer(flagged), text,
        ctypes.c_size_t(300),
    )  # fmt: skip
    native.tacext_guard_free(handle)
    assert status == 0, text.value
    assert torch.equal(score, expected.score)
    assert torch.equal(p_value, expected.p_value)
    assert torch.equal(flagged.bool(), expected.flagged)


@pytest.mark.parametrize("how", DAMAGES)
def test_c_refuses_what_python_refuses(tmp_path: Path, how: str) -> None:
    file = tmp_path / "guard.safetensors"
    guard().save(file)
    file.write_bytes(damaged(file.read_bytes(), how))
    status, handle, message = load(file)
    assert status == 2
    assert not handle.value
    assert f"path {file}: expected what tacext.Guard.save wrote, got" in message


def test_c_says_that_a_file_is_not_there(tmp_path: Path) -> None:
    status, _, message = load(tmp_path / "none")
    assert status == 2
    assert "got no regular file that can be read" in message


def test_the_core_needs_no_torch() -> None:
    code = f"import ctypes, sys; ctypes.CDLL({str(LIBRARY)!r}); assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-I", "-c", code], check=True)
    needed = subprocess.run(["ldd", LIBRARY], check=True, capture_output=True, text=True).stdout
    names = [line.split()[0] for line in needed.splitlines()]  # and not where they are loaded to
    assert any("libstdc++" in name for name in names)
    assert not any("torch" in name or "c10" in name for name in names)
