"""Early exits: what they compute, which layers they look at, and that no two passes mix."""

from __future__ import annotations

import copy
import threading

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from blobs import blobs, trained
from digits import digit_case, padded, patched_digits
from exits import exits_of, triggered
from tacext import Guard
from tacext.early_exits import MOST_FEATURES, EarlyExit, EarlyExits, ExitLimit, LayerHook, pooled
from tacext.early_exits_fit import fit_early_exits
from tacext.heads import find_head
from tacext.latent_patch import LatentPatch, with_latent_patch
from tacext.latent_patch_fit import shifts_between_logits


@pytest.mark.parametrize("shape", [(5, 7), (4, 4), (1, 1), (2, 1)])
def test_maps_are_averaged_over_quarters(shape: tuple[int, int]) -> None:
    maps = torch.randn(3, 6, *shape, generator=torch.Generator().manual_seed(0))
    expected = functional.adaptive_avg_pool2d(maps.relu(), 2)  # [N, C, 2, 2]
    features = pooled(nn.Conv2d(1, 1, 1), maps)
    assert features is not None
    torch.testing.assert_close(features, expected.permute(0, 2, 3, 1).flatten(1))


def test_what_is_too_wide_is_averaged_or_left_out() -> None:
    maps = torch.rand(2, MOST_FEATURES // 4 + 1, 3, 3, dtype=torch.float64)
    features = pooled(nn.Conv2d(1, 1, 1), maps)
    assert features is not None
    torch.testing.assert_close(features, maps.mean((2, 3)).float())
    for shape in ((MOST_FEATURES + 1, 3, 3), (MOST_FEATURES + 1,), (3, 4, 5, 6), ()):
        assert pooled(nn.Conv2d(1, 1, 1), torch.rand(2, *shape)) is None
    tokens = torch.randn(2, 5, 7)
    features = pooled(nn.Linear(1, 1), tokens)
    assert features is not None
    torch.testing.assert_close(features, torch.cat([tokens.mean(1), tokens.max(1).values], 1))


@pytest.mark.parametrize("positions", [None, (2, 3)])
def test_touched_latents_go_where_the_exits_say(positions: tuple[int, int] | None) -> None:
    generator = torch.Generator().manual_seed(1)
    head: nn.Linear | nn.Conv2d = nn.Linear(8, 4, dtype=torch.float64)
    with torch.no_grad():
        head.weight *= 2  # as loud as the exits
    weight = head.weight.detach().clone()
    if positions is not None:
        head = nn.Conv2d(8, 4, 1, dtype=torch.float64)
        head.weight.data.copy_(weight[:, :, None, None])
    shape = (80, 8, *(positions or ()))
    before = torch.randn(shape, generator=generator, dtype=torch.float64)
    after = before.clone()
    after[::2] += torch.randn(after[::2].shape, generator=generator, dtype=torch.float64)
    layers = {
        f"block.{i}": EarlyExit(
            torch.randn(4, 5, generator=generator), torch.randn(4, generator=generator)
        )
        for i in range(2)
    }
    raising = torch.linalg.pinv(weight - weight.mean(0)).T.contiguous()
    raising[2] = 0  # a class that cannot be raised
    known = torch.tensor([True, True, True, False])
    exits = EarlyExits(layers, known, torch.tensor(2.0), raising)
    assert exits.names == ("block.0", "block.1")
    features = torch.randn(2, 80, 5, generator=generator)
    for number, seen in enumerate(features):
        LayerHook(exits.notes, number)(head, (), seen)
    said = exits.scores(80)
    assert said is not None
    assert exits.scores(80) is None  # no note of a second pass: nothing is said
    moved = exits(said, before, after, head).detach()
    assert torch.equal(moved[1::2], before[1::2])

    def logits(latent: Tensor) -> Tensor:
        flat = latent if latent.dim() == 1 else latent.flatten(1).mean(1)
        return (weight @ flat + head.bias).detach()

    raised = 0
    for i in range(0, 80, 2):
        scores = sum(e(seen[i]) for e, seen in zip(layers.values(), features, strict=True))
        assert isinstance(scores, Tensor)
        scores = scores + 2 * logits(after[i])
        banned = int(logits(before[i]).argmax())
        scores[[banned, 3]] = -torch.inf
        told = int(scores.argmax())
        guessed = logits(after[i])
        guessed[banned] = -torch.inf
        if told == 2 or int(guessed.argmax()) == 3:
            assert torch.equal(moved[i], after[i])
            continue
        was, now = logits(after[i]), logits(moved[i])
        assert int(now.argmax()) == told
        if int(was.argmax()) == told:
            assert torch.equal(moved[i], after[i])
            continue
        raised += 1
        others = [k for k in range(4) if k != told]
        assert float(now[told] - now[others].max()) >= float(was[others].max() - was[told]) - 1e-9
    assert raised > 8


def test_a_class_that_the_exits_hardly_see_is_doubted() -> None:
    """But none that they have never seen."""
    known = torch.tensor([True, True, False, True])
    least = torch.tensor([-1.0, 0.5, 9.0, torch.finfo(torch.float32).min])
    raising = torch.zeros(4, 8)
    exits = EarlyExits({}, known, torch.tensor(1.0), raising, ExitLimit(least))
    scores = torch.randn(50, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    doubted = exits.doubts(scores)
    assert doubted is not None
    for row, said in zip(scores.tolist(), doubted.tolist(), strict=True):
        for k in range(4):
            others = [row[j] for j in (0, 1, 3) if j != k]
            assert said[k] == (bool(known[k]) and row[k] - max(others) < float(least[k]))
    assert 5 < int(doubted[:, 0].sum()) < 45
    assert EarlyExits({}, known, torch.tensor(1.0), raising).doubts(scores) is None


def test_autocast_rounds_no_scores() -> None:
    model, (images, _) = patched_digits().model, triggered()
    features = torch.randn(40, 30, generator=torch.Generator().manual_seed(0)) * 100
    exit_ = EarlyExit(torch.randn(5, 30, generator=torch.Generator().manual_seed(1)), torch.ones(5))
    expected = exit_(features)
    assert expected.dtype == torch.float64
    for dtype in (torch.bfloat16, torch.float16):
        with torch.autocast("cpu", dtype=dtype), torch.no_grad():
            assert torch.equal(exit_(features), expected)
            answers = model(images).argmax(1)
        with torch.no_grad():
            same = (answers == model(images).argmax(1)).double().mean()
        assert float(same) > 0.95


def test_where_scores_are_not_finite_the_head_guesses() -> None:
    head = nn.Linear(8, 4)
    raising = torch.linalg.pinv(head.weight.detach() - head.weight.detach().mean(0)).T.contiguous()
    limit = ExitLimit(torch.tensor([-1e9, 0.0, 0.0, torch.finfo(torch.float32).min]))
    exits = EarlyExits({}, torch.ones(4, dtype=torch.bool), torch.tensor(0.0), raising, limit)
    before, after = (torch.randn(5, 8, generator=torch.Generator().manual_seed(i)) for i in (0, 1))
    scores = torch.randn(5, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    expected = exits(scores, before, after, head)
    broken = scores.clone()
    broken[1, 0], broken[2, 1], broken[3, 2] = torch.nan, torch.inf, -torch.inf
    doubted, moved = exits.doubts(broken), exits(broken, before, after, head)
    assert doubted is not None
    assert bool(doubted[1:4].all())
    assert not bool(doubted[[0, 4]][:, [0, 3]].any())
    assert torch.equal(moved[1:4], after[1:4])
    assert torch.equal(moved[[0, 4]], expected[[0, 4]])
    assert not torch.equal(moved[[0, 4]], after[[0, 4]])


def test_an_empty_batch_passes() -> None:
    for model in (patched_digits().model, copy.deepcopy(patched_digits().model).double()):
        dtype = next(model.parameters()).dtype
        assert model(torch.zeros(0, 1, 16, 16, dtype=dtype)).shape == (0, 10)


def test_a_copy_looks_at_its_own_layers() -> None:
    model, (images, _) = patched_digits().model, triggered()
    copied = copy.deepcopy(model)
    with torch.no_grad():
        expected = model(images)
        for parameter in copied.parameters():
            parameter.mul_(0.0)
        copied(images)
        assert torch.equal(model(images), expected)
    notes, own = exits_of(model).notes, exits_of(copied).notes
    assert notes is not own
    assert notes.taken == own.taken == {}  # every pass takes its notes with it
    assert exits_of(copy.deepcopy(model)).notes.taken == {}


def test_threads_do_not_mix_their_notes() -> None:
    model, (images, _) = patched_digits().model, triggered()
    parts = images[:240].split(30)
    with torch.no_grad():
        expected = [model(part) for part in parts]
    found: dict[int, list[Tensor]] = {}

    def work(i: int) -> None:
        with torch.no_grad():
            found[i] = [model(parts[i]) for _ in range(20)]

    threads = [threading.Thread(target=work, args=(i,)) for i in range(len(parts))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for i, logits in found.items():
        assert all(torch.equal(answer, expected[i]) for answer in logits)


def test_exported_and_compiled_they_say_the_same() -> None:
    model, (images, _) = patched_digits().model, triggered()
    batch = torch.export.Dim("batch", min=2, max=4096)
    exported = torch.export.export(model, (images[:8],), dynamic_shapes=({0: batch},)).module()
    with torch.no_grad():
        expected = model(images)
        torch.testing.assert_close(exported(images), expected)
        compiled = torch.compile(model, backend="eager", fullgraph=True)
        torch.testing.assert_close(compiled(images), expected)
        inner = copy.deepcopy(model)
        inner.model[0].compile(backend="eager")  # type: ignore[index,operator]
        torch.testing.assert_close(inner(images), expected)


def test_a_guard_beside_them_leaves_the_answers() -> None:
    model, (images, _) = patched_digits().model, triggered()
    guard = Guard.fit(model, padded(digit_case().data.defender), 0.05)
    with torch.no_grad():
        assert torch.equal(guard(images).logits, model(images))


def test_half_precision_keeps_the_classes() -> None:
    model, (images, _) = patched_digits().model, triggered()
    half = copy.deepcopy(model).bfloat16()
    with torch.no_grad():
        answers = half(images.bfloat16())
        assert answers.dtype == torch.bfloat16
        same = (answers.argmax(1) == model(images).argmax(1)).double().mean()
    assert float(same) > 0.95


def touched_everywhere(
    model: nn.Module, samples: tuple[Tensor, Tensor], target: int
) -> tuple[nn.Module, nn.Module]:
    """With exits, and without, behind limits that touch whatever is taken for the target."""
    head = find_head(model, samples[0][:4])
    width = head.latent_dim
    lowering = shifts_between_logits(head.weight.detach(), [target]).float()
    nothing = torch.zeros(1, width)
    patch = LatentPatch(
        nothing, torch.tensor([-1.0]), nothing, nothing, torch.zeros(1, width, 1),
        torch.zeros(1, 1, width), lowering, torch.tensor([target]),
    )  # fmt: skip
    exits = fit_early_exits(model, head, samples, [], batch_size=64, seed=0)
    assert exits is not None
    return with_latent_patch(model, head, patch, exits)[0], with_latent_patch(model, head, patch)[0]


@torch.enable_grad()
def test_a_class_that_exits_have_not_seen_is_left_to_the_head() -> None:
    torch.manual_seed(0)
    inputs, labels = blobs()
    model = trained(nn.Sequential(nn.Linear(8, 8), nn.Tanh()), inputs, labels)
    seen = labels != 3
    exits, plain = touched_everywhere(model, (inputs[seen], labels[seen]), 0)
    with torch.no_grad():
        answers, without = exits(inputs).argmax(1), plain(inputs).argmax(1)
        said = model(inputs).argmax(1)
    hidden = (said == 0) & (without == 3)  # taken for the target, and class 3 next
    assert int(hidden.sum()) >= 3
    assert bool((answers[hidden] == 3).all())
    assert bool((answers[said != 0] == said[said != 0]).all())


def test_notes_are_of_this_pass_alone() -> None:
    """Whatever happened before: another batch, an error half way, a layer behind the head."""

    class Failing(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(8, 8), nn.Linear(8, 8)
            self.fails = self.skips = False

        def forward(self, x: Tensor) -> Tensor:
            x = self.a(x).relu()
            if self.fails:
                raise RuntimeError("half way")
            return (x if self.skips else self.b(x)).tanh()  # type: ignore[no-any-return]

    torch.manual_seed(1)
    inputs, labels = blobs()
    inner = Failing()
    with torch.enable_grad():
        model = trained(inner, inputs, labels)
    exits, plain = touched_everywhere(model, (inputs, labels), 0)
    body = exits[0]  # type: ignore[index]
    batch, other = inputs[:120], inputs[120:]
    with torch.no_grad():
        expected = exits(batch)
        assert not torch.equal(expected, plain(batch))
        body.fails = True
        with pytest.raises(RuntimeError, match="half way"):
            exits(other)
        body.fails = False
        assert torch.equal(exits(batch), expected)
        body(other)  # inner layers alone
        assert torch.equal(exits(batch), expected)
        latent = body(batch)
        body(other[:50])  # notes of a batch of another size
        assert torch.equal(exits[1](latent), plain(batch))  # type: ignore[index]
        assert torch.equal(exits[1](latent), plain(batch))  # type: ignore[index]
        body(other)
        body.skips = plain[0].skips = True  # type: ignore[index,union-attr]
        assert torch.equal(exits(batch), plain(batch))  # no note of the layer left out is at hand
        body.skips = False
        copied = copy.deepcopy(exits)
        assert exits_of(copied).notes.taken == {}
    features = exits_of(exits).notes
    exits(batch.clone().requires_grad_(True)).sum().backward()
    body(batch.clone().requires_grad_(True))
    assert not any(note.requires_grad for note in features.take().values())


def test_they_stay_in_single_precision() -> None:
    half = copy.deepcopy(exits_of(patched_digits().model)).half()
    assert {b.dtype for b in half.layers.buffers()} == {torch.float32}
    assert half.raising.dtype == torch.float16
    assert half.limit is not None
    assert half.limit.least.dtype == torch.float32
