from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import peak_memory
from conftest import HAS_CUDA, REQUIRE_CUDA
from tacext import ops
from tacext.errors import InputError

DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16]
SHAPES = [
    (1, 1),
    (1, 2),
    (5, 2),
    (1, 10),
    (7, 10),
    (300, 15),
    (300, 16),
    (300, 17),
    (257, 43),
    (64, 131),
    (3, 1000),
]


def result_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def reference(logits: Tensor) -> Tensor:
    """The definition, broadcast: N x C x C values."""
    z = logits.to(result_dtype(logits.dtype))
    return (z[:, None, :] - z[:, :, None]).amax(0)


def random_logits(n: int, c: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (5 * torch.randn(n, c, generator=generator, dtype=torch.float64)).to(dtype)


# ---- values -------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_equals_the_broadcast_bit_for_bit(
    shape: tuple[int, int], dtype: torch.dtype, device: str
) -> None:
    logits = random_logits(*shape, dtype).to(device)
    margins = ops.pairwise_margin_max(logits)
    assert margins.dtype == result_dtype(dtype)
    assert margins.device == logits.device
    assert torch.equal(margins, reference(logits))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_extreme_values_of_the_dtype(dtype: torch.dtype, device: str) -> None:
    info = torch.finfo(dtype)
    # A quarter of the range, so that no difference overflows.
    values = [info.max / 4, -info.max / 4, info.tiny, -info.tiny, info.smallest_normal / 4, 0.0]
    logits = torch.tensor([values, values[::-1]], dtype=torch.float64).to(dtype).to(device)
    assert torch.equal(ops.pairwise_margin_max(logits), reference(logits))


def test_every_float16_and_bfloat16_is_read_right() -> None:
    for dtype in (torch.float16, torch.bfloat16):
        every = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype)
        every = every[every.isfinite()]
        logits = torch.stack([every, torch.zeros_like(every)], dim=1)
        for row in (logits, logits.flip(1)):
            assert torch.equal(ops.pairwise_margin_max(row), reference(row))
        # Value by value as well: each alone, against 0.
        step = 4001
        for part in every[::step]:
            pair = torch.stack([part, torch.zeros((), dtype=dtype)])[None]
            assert ops.pairwise_margin_max(pair)[1, 0].item() == part.item()


def test_strided_and_transposed_input(device: str) -> None:
    base = random_logits(60, 80).to(device)
    for view in (base.t(), base[::3, 5:70:2], base[:, 3:13], base.flip(1), base[:1].expand(9, 80)):
        assert torch.equal(ops.pairwise_margin_max(view), reference(view))


def test_the_input_is_left_alone_and_may_require_grad(device: str) -> None:
    logits = random_logits(20, 10).to(device).requires_grad_()
    before = logits.detach().clone()
    margins = ops.pairwise_margin_max(logits)
    assert not margins.requires_grad
    assert torch.equal(logits.detach(), before)
    out = torch.full((10, 10), -torch.inf, device=device)
    ops.pairwise_margin_max(logits, out=out)
    assert torch.equal(out, margins)


# ---- screening: many classes and samples ----------------------------------------------------------

# Large enough to be screened in 8-bit integers, with a ragged last tile, block and panel.
MANY_SAMPLES, MANY_CLASSES = 2351, 301


def chunked_reference(logits: Tensor) -> Tensor:
    margins = reference(logits[:40])
    for chunk in logits[40:].split(40):
        torch.maximum(margins, reference(chunk), out=margins)
    return margins


def many_logits(family: str) -> Tensor:
    z = random_logits(MANY_SAMPLES, MANY_CLASSES)
    generator = torch.Generator().manual_seed(1)
    labels = torch.randint(MANY_CLASSES, (MANY_SAMPLES,), generator=generator)
    one_hot = torch.nn.functional.one_hot(labels, MANY_CLASSES).float()
    if family == "one outlier":  # one level of the screen would be wider than all other logits
        z[1234] *= 1e6
        return z
    if family == "few distinct samples":
        return z[:7].repeat(MANY_SAMPLES // 7 + 1, 1)[:MANY_SAMPLES]
    families = {
        "normal": z,
        "trained": z + 40 * one_hot,
        "heavy tails": z**7,
        "far from zero": 1e-3 * z + 1e4,  # too little room above the rounding to be screened
        "classes far apart": z + 1000 * torch.arange(MANY_CLASSES),
        "samples far apart": z + 1000 * torch.arange(MANY_SAMPLES)[:, None],
        "integers": z.round().clamp(-3, 3),  # ties everywhere
        "constant": torch.full_like(z, 2.5),
        "equal classes": z[:, :1].expand_as(z).contiguous(),
        "tiny": z * 1e-41,
        "huge": (z / z.abs().max()) * torch.finfo(torch.float32).max / 2.1,
        "one hot": one_hot,
    }
    return families[family]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    "family",
    [
        "normal",
        "trained",
        "heavy tails",
        "far from zero",
        "classes far apart",
        "samples far apart",
        "integers",
        "constant",
        "equal classes",
        "few distinct samples",
        "one outlier",
        "tiny",
        "huge",
        "one hot",
    ],
)
def test_many_classes_equal_the_definition_bit_for_bit(
    family: str, dtype: torch.dtype, device: str
) -> None:
    logits = many_logits(family).to(dtype).to(device)
    assert torch.equal(ops.pairwise_margin_max(logits), chunked_reference(logits))


@given(seed=st.integers(0, 2**32 - 1), scale=st.floats(1e-6, 1e6), power=st.integers(1, 9))
@settings(max_examples=15)
def test_the_screen_misses_no_maximum(seed: int, scale: float, power: int) -> None:
    # The maximum of every pair hides in a random place, by a margin below the screen's resolution.
    generator = torch.Generator().manual_seed(seed)
    z = torch.randn(1300, 260, generator=generator).abs() ** power
    z = scale * z * torch.randint(-1, 2, z.shape, generator=generator)
    assert torch.equal(ops.pairwise_margin_max(z), chunked_reference(z))


@pytest.mark.usefixtures("restore_threads")
def test_screened_accumulation_and_threads() -> None:
    logits = many_logits("trained")
    expected = chunked_reference(logits)
    for threads in (1, 2, 5):
        torch.set_num_threads(threads)
        out = ops.pairwise_margin_max(logits[:1100])
        ops.pairwise_margin_max(logits[1100:], out=out)
        assert torch.equal(out, expected)
    high = expected + 1
    assert torch.equal(ops.pairwise_margin_max(logits, out=high.clone()), high)


# ---- accumulation -------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_ragged_batches_equal_the_whole(dtype: torch.dtype, device: str) -> None:
    logits = random_logits(403, 37, dtype).to(device)
    batches = logits.split([1, 200, 2, 128, 72])
    out = ops.pairwise_margin_max(batches[0])
    for batch in batches[1:]:
        returned = ops.pairwise_margin_max(batch, out=out)
        assert returned is out
    assert torch.equal(out, reference(logits))


def test_accumulation_may_start_from_minus_infinity(device: str) -> None:
    logits = random_logits(50, 10).to(device)
    out = torch.full((10, 10), -torch.inf, device=device)
    ops.pairwise_margin_max(logits, out=out)
    assert torch.equal(out, reference(logits))


def test_accumulation_never_lowers_out(device: str) -> None:
    logits = random_logits(50, 10).to(device)
    high = torch.full((10, 10), 1e6, device=device)
    assert torch.equal(ops.pairwise_margin_max(logits, out=high.clone()), high)


def test_an_empty_batch_changes_nothing(device: str) -> None:
    out = ops.pairwise_margin_max(random_logits(50, 10).to(device))
    before = out.clone()
    assert ops.pairwise_margin_max(torch.empty(0, 10, device=device), out=out) is out
    assert torch.equal(out, before)


@given(
    seed=st.integers(0, 2**32 - 1),
    samples=st.integers(2, 40),
    classes=st.integers(1, 40),
    data=st.data(),
)
def test_shards_merge_by_maximum(
    seed: int, samples: int, classes: int, data: st.DataObject
) -> None:
    logits = random_logits(samples, classes, seed=seed)
    cut = data.draw(st.integers(1, samples - 1))
    merged = torch.maximum(
        ops.pairwise_margin_max(logits[:cut]), ops.pairwise_margin_max(logits[cut:])
    )
    assert torch.equal(merged, ops.pairwise_margin_max(logits))


@given(seed=st.integers(0, 2**32 - 1), samples=st.integers(1, 40), classes=st.integers(1, 40))
def test_order_of_samples_and_constants_do_not_matter(
    seed: int, samples: int, classes: int
) -> None:
    # Integers, so that adding a constant to a sample's logits is exact.
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randint(-1000, 1000, (samples, classes), generator=generator).float()
    margins = ops.pairwise_margin_max(logits)
    order = torch.randperm(samples, generator=generator)
    assert torch.equal(ops.pairwise_margin_max(logits[order]), margins)
    shift = torch.randint(-1000, 1000, (samples, 1), generator=generator).float()
    assert torch.equal(ops.pairwise_margin_max(logits + shift), margins)
    columns = torch.randperm(classes, generator=generator)
    permuted = ops.pairwise_margin_max(logits[:, columns])
    assert torch.equal(permuted, margins[columns][:, columns])


@given(
    logits=st.integers(1, 6).flatmap(
        lambda c: st.lists(
            st.lists(st.floats(-1e300, 1e300), min_size=c, max_size=c), min_size=1, max_size=5
        )
    )
)
def test_matches_numpy_on_arbitrary_doubles(logits: list[list[float]]) -> None:
    z = np.array(logits)
    expected = (z[:, None, :] - z[:, :, None]).max(0)
    assert np.array_equal(ops.pairwise_margin_max(torch.tensor(z)).numpy(), expected)


@pytest.mark.usefixtures("restore_threads")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_threads_do_not_change_the_bits(dtype: torch.dtype) -> None:
    logits = random_logits(2000, 131, dtype)
    results = []
    for threads in (1, 2, 5):
        torch.set_num_threads(threads)
        results.append(ops.pairwise_margin_max(logits))
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])


# ---- what is refused ----------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("position", [(0, 0), (1000, 70), (1999, 130)])
def test_non_finite_logits_are_refused_with_their_position(
    position: tuple[int, int], bad: float, dtype: torch.dtype
) -> None:
    logits = random_logits(2000, 131, dtype)
    logits[position] = bad
    logits[-1, -1] = bad  # only the first in reading order is named
    where = rf"logits: .*NaN or infinity at \[{position[0]}, {position[1]}\]; check the model"
    with pytest.raises(InputError, match=where):
        ops.pairwise_margin_max(logits)
    out = torch.full((131, 131), 0.25, dtype=result_dtype(dtype))
    with pytest.raises(InputError, match=where):
        ops.pairwise_margin_max(logits, out=out)
    assert torch.equal(out, torch.full_like(out, 0.25))


@pytest.mark.skipif(
    not (HAS_CUDA or REQUIRE_CUDA), reason="needs a GPU and a build with the CUDA kernels"
)
def test_on_a_gpu_a_nan_shows_in_its_row_and_column() -> None:
    # A check would make the host wait for the GPU at every batch; minimal_perturbation refuses it.
    logits = random_logits(40, 7).cuda()
    logits[11, 3] = torch.nan
    out = ops.pairwise_margin_max(logits[:20])
    ops.pairwise_margin_max(logits[20:], out=out)
    expected = torch.zeros(7, 7, dtype=torch.bool, device="cuda")
    expected[3] = expected[:, 3] = True
    assert torch.equal(out.isnan(), expected)
    with pytest.raises(InputError, match="margins: expected finite values"):
        ops.minimal_perturbation(torch.eye(7, device="cuda"), out)


@pytest.mark.parametrize(
    ("logits", "message"),
    [
        (torch.zeros(10), r"logits: expected 2 dimensions, got 1; reshape it"),
        (torch.zeros(2, 3, 4), r"logits: expected 2 dimensions, got 3"),
        (torch.zeros(0, 10), r"logits: expected at least 1 sample, got none"),
        (torch.zeros(3, 4, dtype=torch.int64), r"logits: expected float64, float32, float16"),
        (torch.zeros(3, 4, dtype=torch.bool), r"logits: expected float64, float32, float16"),
        (torch.zeros(3, 4, dtype=torch.complex64), r"logits: expected float64, float32, float16"),
        ([[1.0, 2.0]], r"logits: expected a torch.Tensor, got list; convert it"),
        (torch.eye(2).to_sparse(), r"logits: expected a dense tensor, got torch.sparse_coo; conv"),
        (torch.eye(2).cfloat(), r"logits: expected float64, .* or bfloat16, got complex64; conv"),
        (np.zeros((3, 4)), r"logits: expected a torch.Tensor, got ndarray"),
        (3, r"logits: expected a torch.Tensor, got int"),
        (None, r"logits: expected a torch.Tensor, got NoneType"),
    ],
)
def test_wrong_logits(logits: object, message: str) -> None:
    with pytest.raises(InputError, match=rf"^pairwise_margin_max: {message}"):
        ops.pairwise_margin_max(logits)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("out", "message"),
    [
        (torch.zeros(4), r"out: expected 2 dimensions, got 1"),
        (torch.zeros(3, 4), r"out: expected shape \[4, 4\], got \[3, 4\]"),
        (torch.zeros(5, 5), r"out: expected shape \[4, 4\], got \[5, 5\]"),
        (torch.zeros(4, 4, dtype=torch.float64), r"out: expected float64 for float64 logits"),
        (torch.zeros(4, 4, dtype=torch.float16), r"out: expected float64 for float64 logits"),
        (torch.zeros(4, 8)[:, ::2], r"out: expected a contiguous tensor, got a strided view"),
        ([[0.0]], r"out: expected a torch.Tensor, got list"),
    ],
)
def test_wrong_out(out: object, message: str) -> None:
    with pytest.raises(InputError, match=rf"^pairwise_margin_max: {message}"):
        ops.pairwise_margin_max(torch.zeros(3, 4), out=out)  # type: ignore[arg-type]


def test_messages_are_one_line_without_native_locations() -> None:
    with pytest.raises(InputError) as caught:
        ops.pairwise_margin_max(torch.zeros(10))
    assert "\n" not in str(caught.value)
    assert ".cpp" not in str(caught.value)


def test_meta_tensors_give_shape_and_dtype() -> None:
    margins = ops.pairwise_margin_max(torch.empty(3, 4, device="meta", dtype=torch.float16))
    assert (margins.shape, margins.dtype, margins.device.type) == ((4, 4), torch.float32, "meta")


# ---- torch integration --------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name",
    [
        "pairwise_margin_max",
        "pairwise_margin_max_",
        "pairwise_margin_quantile",
        "pairwise_margin_largest_",
        "minimal_perturbation",
        "neuron_scores",
    ],
)
@pytest.mark.parametrize("key", ["CPU", "CUDA", "Meta"])
def test_each_operator_answers_on_each_device(name: str, key: str) -> None:
    # A build without CUDA registers a kernel too: one whose message says how to get the real one.
    assert torch._C._dispatch_has_kernel_for_dispatch_key(f"tacext::{name}", key)


def test_opcheck() -> None:
    torch.library.opcheck(torch.ops.tacext.pairwise_margin_max.default, (random_logits(5, 4),))
    torch.library.opcheck(
        torch.ops.tacext.pairwise_margin_max_.default, (torch.zeros(4, 4), random_logits(5, 4))
    )


def test_compiles_without_a_graph_break() -> None:
    def stream(first: Tensor, second: Tensor) -> Tensor:
        out = torch.ops.tacext.pairwise_margin_max(2 * first)
        torch.ops.tacext.pairwise_margin_max_(out, 2 * second)
        return out + 1

    first, second = random_logits(30, 10), random_logits(20, 10, seed=1)
    compiled = torch.compile(stream, fullgraph=True, backend="aot_eager")
    expected = reference(torch.cat([2 * first, 2 * second])) + 1
    assert torch.equal(compiled(first, second), expected)


def test_extra_memory_does_not_grow_with_the_samples() -> None:
    # M is 4 MB. A broadcast would take 40 GB, its smallest useful chunk still 4 MB a sample. The
    # bound is what docs/performance.md promises.
    measured = peak_memory.measure(
        setup="""
logits = torch.empty(10_000, 1000).uniform_(-5, 5)
ops.pairwise_margin_max(logits[:8])
""",
        measured="margins = ops.pairwise_margin_max(logits)",
        report="{'diagonal': margins.diagonal().abs().max().item()}",
    )
    assert measured["diagonal"] == 0
    assert measured["extra"] < 64 * 2**20


def test_the_sign_of_a_zero_does_not_depend_on_the_order() -> None:
    logits = torch.tensor([[-0.0, 0.0], [0.0, 0.0], [0.0, -0.0]])
    for order in ([0, 1, 2], [2, 1, 0], [1, 0, 2]):
        margins = ops.pairwise_margin_max(logits[order])
        assert not torch.signbit(margins).any()
