from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from tacext import ops
from tacext.errors import InputError

DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16]
SHAPES = [
    (1, 1),
    (1, 7),
    (300, 1),
    (33, 513),
    (5, 3, 1),
    (5, 3, 7),
    (5, 3, 8),
    (1, 64, 9),
    (16, 37, 8, 8),
    (2, 5, 3, 4, 5),
]


def random_pair(shape: tuple[int, ...], dtype: torch.dtype, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    a, g = torch.randn(2, *shape, generator=generator, dtype=torch.float64).to(dtype)
    return a, g


def reference(activation: Tensor, gradient: Tensor) -> Tensor:
    """The definition in float64."""
    products = activation.double() * gradient.double()
    return products.flatten(2).sum(2).mean(0) if products.dim() > 2 else products.mean(0)


def assert_close(scores: Tensor, activation: Tensor, gradient: Tensor) -> None:
    assert scores.dtype == torch.float64
    assert scores.device == activation.device
    # Sums in float64: the error is relative to the sum of the sizes.
    size = reference(activation.abs(), gradient.abs())
    error = (scores - reference(activation, gradient)).abs()
    assert (error <= 1e-13 * size).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_equals_the_definition(shape: tuple[int, ...], dtype: torch.dtype, device: str) -> None:
    a, g = (x.to(device) for x in random_pair(shape, dtype))
    assert_close(ops.neuron_scores(a, g), a, g)


def test_sums_do_not_round_in_the_inputs_precision(device: str) -> None:
    # 4096 + 1 is 4096 in bfloat16, and 2^24 + 1 is 2^24 in float32.
    a = torch.tensor([2.0**24, 1.0, 1.0, -(2.0**24)], device=device)[None, None]
    assert ops.neuron_scores(a, torch.ones_like(a)).item() == 2.0
    a = torch.tensor([4096.0, 1.0, 1.0, -4096.0], device=device)[:, None]
    for dtype in DTYPES:
        assert ops.neuron_scores(a.to(dtype), torch.ones_like(a, dtype=dtype)).item() == 0.5


def test_strided_and_channels_last(device: str) -> None:
    a, g = (x.to(device) for x in random_pair((6, 10, 8, 8), torch.float32))
    expected = ops.neuron_scores(a, g)
    last = torch.channels_last
    assert torch.equal(ops.neuron_scores(a.to(memory_format=last), g), expected)
    assert torch.equal(
        ops.neuron_scores(a.to(memory_format=last), g.to(memory_format=last)), expected
    )
    wide_a, wide_g = a[::2, 1:9:3, :, 2:7], g[::2, 1:9:3, :, 2:7]
    assert torch.equal(
        ops.neuron_scores(wide_a, wide_g),
        ops.neuron_scores(wide_a.contiguous(), wide_g.contiguous()),
    )
    assert_close(
        ops.neuron_scores(a[:, :, 0, 0].t(), g[:, :, 0, 0].t()),
        a[:, :, 0, 0].t(),
        g[:, :, 0, 0].t(),
    )
    expanded = g[:1].expand_as(a)
    assert_close(ops.neuron_scores(a, expanded), a, expanded)


def test_parameters_and_graphs_are_left_alone(device: str) -> None:
    a, g = (x.to(device).requires_grad_() for x in random_pair((4, 6), torch.float32))
    scores = ops.neuron_scores(a * 2, g)
    assert not scores.requires_grad
    assert a.grad is None


def test_no_positions_sum_to_zero(device: str) -> None:
    empty = torch.zeros(3, 4, 0, device=device)
    assert torch.equal(
        ops.neuron_scores(empty, empty), torch.zeros(4, dtype=torch.float64, device=device)
    )


def test_no_channels_have_no_scores(device: str) -> None:
    empty = torch.zeros(3, 0, 5, device=device)
    assert ops.neuron_scores(empty, empty).shape == (0,)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("shape", [(5, 9), (5, 9, 17)], ids=str)
def test_non_finite_values_stay_in_their_channel(
    shape: tuple[int, ...], bad: float, dtype: torch.dtype, device: str
) -> None:
    a, g = (x.to(device) for x in random_pair(shape, dtype))
    clean = ops.neuron_scores(a, g)
    for tensor in (a, g):
        spoilt = tensor.clone()
        spoilt[2, 4] = bad
        pair = (spoilt, g) if tensor is a else (a, spoilt)
        scores = ops.neuron_scores(*pair)
        assert not scores[4].isfinite()
        others = torch.arange(9, device=device) != 4
        assert torch.equal(scores[others], clean[others])


@pytest.mark.usefixtures("restore_threads")
@pytest.mark.parametrize("shape", [(700, 300), (64, 48, 16, 16), (3, 5, 100_003)], ids=str)
def test_threads_do_not_change_the_bits(shape: tuple[int, ...]) -> None:
    a, g = random_pair(shape, torch.float32)
    results = []
    for threads in (1, 2, 5):
        torch.set_num_threads(threads)
        results.append(ops.neuron_scores(a, g))
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])


# ---- laws ---------------------------------------------------------------------------------------

SIZES = st.tuples(st.integers(1, 6), st.integers(1, 9), st.integers(1, 20))


@given(shape=SIZES, seed=st.integers(0, 2**32 - 1), factor=st.integers(-8, 8))
def test_linear_in_the_gradient(shape: tuple[int, int, int], seed: int, factor: int) -> None:
    # Small integers: every product and sum is exact, so the law holds bit for bit.
    generator = torch.Generator().manual_seed(seed)
    a, g, h = torch.randint(-50, 50, (3, *shape), generator=generator).float()
    samples = shape[0]
    combined = ops.neuron_scores(a, factor * g + h) * samples
    expected = (factor * ops.neuron_scores(a, g) + ops.neuron_scores(a, h)) * samples
    assert torch.allclose(combined, expected, rtol=1e-14, atol=1e-9)
    assert torch.equal(ops.neuron_scores(a, g), ops.neuron_scores(g, a))


@given(shape=SIZES, seed=st.integers(0, 2**32 - 1))
def test_zeroing_a_channel_takes_away_its_score(shape: tuple[int, int, int], seed: int) -> None:
    # Where the rest of the network is linear the score is no approximation: the mean of
    # <s, phi(x)> drops by it.
    _, channels, positions = shape
    generator = torch.Generator().manual_seed(seed)

    def random(*size: int) -> Tensor:
        return torch.randn(*size, generator=generator, dtype=torch.float64)

    mixing, s = random(11, channels * positions), random(11)
    activation = random(*shape).requires_grad_()

    def along(values: Tensor) -> Tensor:
        return (values.flatten(1) @ mixing.t()) @ s

    (gradient,) = torch.autograd.grad(along(activation).sum(), activation)
    scores = ops.neuron_scores(activation, gradient)
    for channel in range(channels):
        zeroed = activation.detach().clone()
        zeroed[:, channel] = 0
        drop = (along(activation.detach()) - along(zeroed)).mean()
        assert float(scores[channel]) == pytest.approx(float(drop), rel=1e-9, abs=1e-9)


@given(shape=SIZES, seed=st.integers(0, 2**32 - 1), data=st.data())
def test_batches_combine_by_their_size(
    shape: tuple[int, int, int], seed: int, data: st.DataObject
) -> None:
    a, g = random_pair((shape[0] + 1, *shape[1:]), torch.float32, seed)
    cut = data.draw(st.integers(1, shape[0]))
    rest = len(a) - cut
    parts = cut * ops.neuron_scores(a[:cut], g[:cut]) + rest * ops.neuron_scores(a[cut:], g[cut:])
    assert torch.allclose(parts / len(a), ops.neuron_scores(a, g), rtol=1e-12, atol=1e-12)


# ---- what is refused ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("activation", "gradient", "message"),
    [
        (torch.zeros(3), torch.zeros(3), r"activation: expected \[samples, channels, \.\.\.\]"),
        (torch.zeros(3, 4), torch.zeros(3, 5), r"gradient: expected shape .* like activation, got"),
        (
            torch.zeros(3, 4),
            torch.zeros(3, 4, 1),
            r"gradient: expected shape .* like activation, got",
        ),
        (
            torch.zeros(3, 4, 1),
            torch.zeros(3, 4),
            r"gradient: expected shape .* like activation, got",
        ),
        (
            torch.zeros(3, 4),
            torch.zeros(3, 4).double(),
            r"gradient: expected float32 like activation, got float64",
        ),
        (torch.zeros(0, 4), torch.zeros(0, 4), r"activation: expected at least 1 sample"),
        (torch.zeros(3, 4).int(), torch.zeros(3, 4).int(), r"activation: expected float64"),
        (np.zeros((3, 4)), torch.zeros(3, 4), r"activation: expected a torch.Tensor, got ndarray"),
        (torch.zeros(3, 4), None, r"gradient: expected a torch.Tensor, got NoneType"),
    ],
)
def test_wrong_arguments(activation: object, gradient: object, message: str) -> None:
    with pytest.raises(InputError, match=rf"^neuron_scores: {message}"):
        ops.neuron_scores(activation, gradient)  # type: ignore[arg-type]


def test_opcheck() -> None:
    operator = torch.ops.tacext.neuron_scores.default
    for shape in ((4, 3), (4, 3, 2, 2)):
        torch.library.opcheck(operator, random_pair(shape, torch.float32))


def test_compiles_without_a_graph_break() -> None:
    def ranked(a: Tensor, g: Tensor) -> Tensor:
        return torch.ops.tacext.neuron_scores(a.relu(), g).argsort()

    a, g = random_pair((4, 6, 5), torch.float32)
    compiled = torch.compile(ranked, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(a, g), ranked(a, g))
