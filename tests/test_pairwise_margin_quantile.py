from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, TypeAlias

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import digits
import tacext
from tacext import MarginMax, MarginQuantile, ops
from tacext.errors import InputError

Accumulator: TypeAlias = Any  # MarginMax or MarginQuantile
DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16]


def random_logits(n: int, c: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (5 * torch.randn(n, c, generator=generator, dtype=torch.float64)).to(dtype)


def reference(logits: Tensor, quantile: float) -> Tensor:
    """numpy's own definition of the same quantile, pair by pair."""
    z = (logits if logits.dtype == torch.float64 else logits.float()).cpu().numpy()
    differences = z[:, None, :] - z[:, :, None]
    return torch.from_numpy(np.quantile(differences, quantile, axis=0, method="inverted_cdf"))


# ---- at once ------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("quantile", [0.003, 0.25, 0.5, 0.9, 0.99, 1.0])
@pytest.mark.parametrize("shape", [(1, 1), (1, 5), (2, 3), (100, 10), (333, 17), (1000, 40)])
def test_equals_numpy(
    shape: tuple[int, int], quantile: float, dtype: torch.dtype, device: str
) -> None:
    logits = random_logits(*shape, dtype).to(device)
    margins = ops.pairwise_margin_quantile(logits, quantile)
    assert margins.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert torch.equal(margins.cpu(), reference(logits, quantile).to(margins.dtype))


@pytest.mark.parametrize(
    "logits",
    [
        torch.zeros(500, 9),
        random_logits(500, 9).round().clamp(-1, 1),  # ties
        random_logits(5, 9).repeat(100, 1),
        random_logits(500, 9) ** 7,
        torch.cat([random_logits(499, 9), 1e30 * random_logits(1, 9)]),
        -0.0 * random_logits(500, 9).abs(),
    ],
    ids=["zero", "ties", "repeated", "heavy", "outlier", "negative zero"],
)
@pytest.mark.parametrize("quantile", [0.5, 0.99])
def test_degenerate_logits(logits: Tensor, quantile: float, device: str) -> None:
    margins = ops.pairwise_margin_quantile(logits.to(device), quantile).cpu()
    assert torch.equal(margins, reference(logits, quantile))
    assert not torch.signbit(margins[margins == 0]).any()


def test_one_is_the_maximum(device: str) -> None:
    logits = random_logits(700, 30).to(device)
    assert torch.equal(ops.pairwise_margin_quantile(logits, 1.0), ops.pairwise_margin_max(logits))


def test_many_samples_are_selected_in_several_rounds() -> None:
    # Rising logits: every later sample beats all that was kept before.
    logits = torch.zeros(40_000, 2)
    logits[:, 1] = torch.arange(40_000)
    margins = ops.pairwise_margin_quantile(logits, 0.99)
    assert margins[0, 1] == 40_000 * 0.99 - 1
    assert margins[1, 0] == -(40_000 * 0.01)


@given(
    seed=st.integers(0, 2**32 - 1),
    samples=st.integers(1, 60),
    classes=st.integers(1, 12),
    quantile=st.floats(1e-3, 1),
)
def test_the_promised_share_lies_at_or_below(
    seed: int, samples: int, classes: int, quantile: float
) -> None:
    z = random_logits(samples, classes, torch.float64, seed).round(decimals=1)
    margins = ops.pairwise_margin_quantile(z, quantile)
    differences = z[:, None, :] - z[:, :, None]
    at_or_below = (differences <= margins).sum(0)
    below = (differences < margins).sum(0)
    assert (at_or_below >= quantile * samples - 1e-6).all()
    assert (below < quantile * samples).all()


@pytest.mark.usefixtures("restore_threads")
def test_threads_do_not_change_the_bits() -> None:
    logits = random_logits(900, 61)
    results = []
    for threads in (1, 2, 5):
        torch.set_num_threads(threads)
        results.append(ops.pairwise_margin_quantile(logits, 0.97))
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])


# ---- streamed -----------------------------------------------------------------------------------


@pytest.mark.parametrize("max_samples", [None, 403, 5000], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("classes", [3, 37])
@pytest.mark.parametrize("quantile", [0.9, 0.99, 1.0])
def test_batches_and_shards_equal_the_whole(
    quantile: float, classes: int, dtype: torch.dtype, max_samples: int | None, device: str
) -> None:
    logits = random_logits(403, classes, dtype).to(device)
    one, two = MarginQuantile(quantile, max_samples), MarginQuantile(quantile, max_samples)
    for batch in logits[:203].split([1, 200, 2]):
        one.update(batch)
    for batch in logits[203:].split(64):
        two.update(batch)
    one.merge(two)
    assert one.samples == 403
    assert torch.equal(one.result(), ops.pairwise_margin_quantile(logits, quantile))
    assert torch.equal(two.result(), ops.pairwise_margin_quantile(logits[203:], quantile))


def test_merging_into_and_from_nothing() -> None:
    logits = random_logits(50, 4)
    filled, empty = MarginQuantile(0.9, 1000), MarginQuantile(0.9, 1000)
    filled.update(logits)
    filled.merge(empty)
    empty.merge(filled)
    assert torch.equal(empty.result(), ops.pairwise_margin_quantile(logits, 0.9))
    assert torch.equal(filled.result(), empty.result())
    filled.update(logits[:1])  # the two share nothing
    assert torch.equal(empty.result(), ops.pairwise_margin_quantile(logits, 0.9))


def test_the_running_maximum_buffers_and_merges(device: str) -> None:
    logits = random_logits(3000, 300).to(device)
    one, two = MarginMax(), MarginMax()
    for batch in logits[:1000].split(64):
        one.update(batch)
    for batch in logits[1000:].split(700):
        two.update(batch)
    one.merge(two)
    assert torch.equal(one.result(), ops.pairwise_margin_max(logits))
    one.update(logits + 0.0)
    assert torch.equal(one.result(), ops.pairwise_margin_max(logits))


MAKERS = (MarginMax, lambda: MarginQuantile(0.9), lambda: MarginQuantile(0.9, 1000))


@pytest.mark.parametrize("make", MAKERS)
def test_a_batch_of_another_kind_is_named_and_left_out(make: Callable[[], Accumulator]) -> None:
    accumulator = make()
    logits = random_logits(5, 4)
    accumulator.update(logits)
    before = accumulator.result()
    name = type(accumulator).__name__
    for other in (random_logits(5, 3), logits.double(), logits.half()):
        message = rf"^{name}.update: logits: expected torch.float32 \[N, 4\] on cpu, as at first"
        with pytest.raises(InputError, match=message):
            accumulator.update(other)
    assert torch.equal(accumulator.result(), before)


@pytest.mark.parametrize("make", MAKERS)
def test_a_shard_of_another_kind_is_named(make: Callable[[], Accumulator]) -> None:
    accumulator = make()
    accumulator.update(random_logits(5, 4))
    before = accumulator.result()
    name = type(accumulator).__name__
    for logits in (random_logits(5, 3), random_logits(5, 4, torch.float64)):
        other = make()
        other.update(logits)
        message = rf"^{name}.merge: other: expected torch.float32 \[N, 4\] on cpu, as at first"
        with pytest.raises(InputError, match=message):
            accumulator.merge(other)
    for wrong in (before, None, MarginQuantile(0.5) if name == "MarginMax" else MarginMax()):
        with pytest.raises(InputError, match=f"^{name}.merge: other: expected"):
            accumulator.merge(wrong)
    assert torch.equal(accumulator.result(), before)


@pytest.mark.parametrize("make", MAKERS)
def test_nothing_adds_nothing(make: Callable[[], Accumulator]) -> None:
    logits = random_logits(5, 4)
    filled, empty, without = make(), make(), make()
    filled.update(logits[:0])
    filled.update(logits)
    before = filled.result()
    without.update(logits[:0])
    for nothing in (empty, without):
        filled.merge(nothing)
        assert torch.equal(filled.result(), before)
        with pytest.raises(InputError, match="expected at least 1 sample"):
            nothing.result()
    empty.merge(without)
    empty.merge(filled)
    assert torch.equal(empty.result(), before)
    with pytest.raises(InputError, match="as at first"):
        empty.update(random_logits(5, 3))  # it is of the shard's kind now


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("make", MAKERS)
def test_the_batch_that_is_not_finite_is_named(
    make: Callable[[], Accumulator], bad: float, device: str
) -> None:
    accumulator = make()
    logits = random_logits(5, 4).to(device)
    accumulator.update(logits)
    before = accumulator.result()
    wrong = logits.clone()
    wrong[3, 1] = bad
    with pytest.raises(InputError, match=r"NaN or infinity at \[3, 1\] of batch 1; check"):
        accumulator.update(wrong)
    assert torch.equal(accumulator.result(), before)


@pytest.mark.parametrize(
    ("batch", "message"),
    [
        (np.zeros((3, 4), np.float32), "logits: expected a torch.Tensor, got ndarray"),
        (torch.zeros(3), r"logits: expected \[N, C\] of float64, .*got torch.float32 \[3\]"),
        (torch.zeros(3, 4, dtype=torch.int64), r"logits: expected \[N, C\] of float64"),
        (torch.zeros(3, 4).to(torch.float8_e5m2), r"got torch.float8_e5m2 \[3, 4\]"),
        (torch.zeros(3, 4).to_sparse(), "logits: expected a dense tensor, got torch.sparse_coo"),
    ],
)
@pytest.mark.parametrize("make", MAKERS)
def test_wrong_batches(make: Callable[[], Accumulator], batch: Tensor, message: str) -> None:
    with pytest.raises(InputError, match=f"update: .*{message}"):
        make().update(batch)


# ---- what is refused ----------------------------------------------------------------------------


@pytest.mark.parametrize("quantile", [0.0, -1.0, 1.5, math.nan, "a", None, torch.tensor(0.5)])
def test_wrong_quantile(quantile: float) -> None:
    message = "quantile: expected above 0 and at most 1"
    with pytest.raises(InputError, match=f"^pairwise_margin_quantile: {message}"):
        ops.pairwise_margin_quantile(torch.zeros(3, 4), quantile)
    with pytest.raises(InputError, match=f"^MarginQuantile: {message}"):
        MarginQuantile(quantile)
    with pytest.raises(InputError, match=f"^scan: {message}"):
        tacext.scan(torch.nn.Linear(3, 2), (torch.zeros(3, 3), torch.arange(3)), quantile=quantile)


@pytest.mark.parametrize(
    ("logits", "message"),
    [
        (torch.zeros(10), "logits: expected 2 dimensions, got 1"),
        (torch.zeros(0, 10), "logits: expected at least 1 sample, got none"),
        (torch.zeros(3, 4, dtype=torch.int64), "logits: expected float64, float32, float16"),
        (torch.tensor([[0.0, math.inf]]), r"logits: .*NaN or infinity at \[0, 1\]"),
        ([[1.0]], "logits: expected a torch.Tensor, got list"),
        (torch.zeros(3, 4, dtype=torch.complex64), "logits: expected float64, .*got complex64;"),
        (torch.zeros(3, 4).to(torch.float8_e5m2), "logits: expected .*got float8_e5m2;"),
        (torch.zeros(3, 4).to(torch.float8_e4m3fn), "logits: expected .*got float8_e4m3fn;"),
        (torch.zeros(3, 4, dtype=torch.int16), "logits: expected .*got int16;"),
        (torch.zeros(3, 4).to_sparse(), "logits: expected a dense tensor, got torch.sparse_coo; "),
    ],
)
def test_wrong_logits(logits: Tensor, message: str) -> None:
    with pytest.raises(InputError, match=f"^pairwise_margin_quantile: {message}"):
        ops.pairwise_margin_quantile(logits, 0.5)


@pytest.mark.parametrize(
    ("out", "message"),
    [
        (torch.zeros(4, 4), "out: expected 3 dimensions, got 2"),
        (torch.zeros(4, 5, 2), r"out: expected shape \[4, 4, at least 1\], got \[4, 5, 2\]"),
        (torch.zeros(4, 4, 0), "out: expected shape"),
        (torch.zeros(4, 4, 2, dtype=torch.float64), "out: expected float64 for float64 logits"),
        (torch.zeros(4, 4, 4)[:, :, ::2], "out: expected a contiguous tensor"),
        (torch.full((4, 4, 2), math.nan), "out: expected values without NaN, got NaN; start from"),
        (torch.zeros(1), "out: expected 3 dimensions, got 1"),
    ],
)
def test_wrong_out(out: Tensor, message: str) -> None:
    with pytest.raises(InputError, match=f"^pairwise_margin_largest: {message}"):
        ops.pairwise_margin_largest(torch.zeros(3, 4), out)


def test_accumulators_say_what_is_wrong() -> None:
    for empty in (MarginMax(), MarginQuantile(0.9)):
        with pytest.raises(InputError, match="logits: expected at least 1 sample, got none"):
            empty.result()
    with pytest.raises(InputError, match="max_samples: expected at least 1, or None, got 0"):
        MarginQuantile(0.9, 0)
    few = MarginQuantile(0.9, 10)
    few.update(torch.zeros(8, 3))
    with pytest.raises(InputError, match="at most 10 samples in all"):
        few.update(torch.zeros(3, 3))
    more = MarginQuantile(0.9, 10)
    more.update(torch.zeros(8, 3))
    with pytest.raises(InputError, match="at most 10 samples in all"):
        few.merge(more)
    with pytest.raises(InputError, match=r"quantile 0\.9 and max_samples 10, got 0\.9 and None"):
        few.merge(MarginQuantile(0.9))


# ---- torch, and the scan ------------------------------------------------------------------------


def test_opcheck() -> None:
    torch.library.opcheck(
        torch.ops.tacext.pairwise_margin_quantile.default, (random_logits(5, 4), 2)
    )
    torch.library.opcheck(
        torch.ops.tacext.pairwise_margin_largest_.default,
        (torch.full((4, 4, 2), -torch.inf), random_logits(5, 4)),
    )


def test_what_runs_on_a_gpu_gives_the_same() -> None:
    # Made of torch's own operators, so it can be checked here as well.
    for logits in (random_logits(300, 7), random_logits(300, 7, torch.float16).round()):
        values = ops._cuda_pairwise_margin_quantile(logits, 13)
        assert torch.equal(values, torch.ops.tacext.pairwise_margin_quantile(logits, 13))
        largest = torch.full((7, 7, 13), -torch.inf)
        for batch in logits.split(100):
            ops._cuda_pairwise_margin_largest_(largest, batch)
        assert torch.equal(largest.min(2).values, values)


def test_a_scan_at_a_quantile() -> None:
    case = digits.digit_case()
    model, data = case.clean, case.data.defender
    at_max = digits.scan_of("clean")
    at_quantile = tacext.scan(model, data, quantile=0.99)
    assert (at_max.quantile, at_quantile.quantile) == (1.0, 0.99)
    assert (at_quantile.norm < at_max.norm).all()
    logits = model(data[0]).detach()
    torch.testing.assert_close(
        at_quantile.margins, ops.pairwise_margin_quantile(logits, 0.99), rtol=1e-4, atol=1e-4
    )
