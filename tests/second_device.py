"""A second device that is none, and all that tacext does there: a program of its own.

Its tensors lie in the CPU's memory, say that they are elsewhere, and mix with no others, as those of a
GPU: what forgets to move one fails here, where there is no GPU to fail on. It runs apart from the other
tests, as torch never forgets a device that it was told of. Prints a JSON object: of every check null, or
what was wrong.
"""

from __future__ import annotations

import contextlib
import copy
import io
import json
import sys
import tempfile
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
from torch import Tensor
from torch.utils import _pytree as pytree
from torch.utils import backend_registration
from torch.utils._python_dispatch import TorchDispatchMode
from typing_extensions import Self

import tacext
from command_line import ARCH, run
from digits import Cropped, digit_case, padded
from tacext import demo
from tacext.differentiable import DifferentiableModel
from tacext.heads import find_head

aten = torch.ops.aten
# What moves tensors between devices, and what takes indices from another one.
_MOVES = (aten._to_copy.default, aten.copy_.default)
_INDEXES = (aten.index.Tensor, aten.index_put.default, aten.index_put_.default)


class _Backend(backend_registration._DummyBackendModule):  # type: ignore[misc]  # untyped in torch
    def get_amp_supported_dtype(self) -> list[torch.dtype]:
        return [torch.float16, torch.bfloat16]


backend_registration._setup_privateuseone_for_python_backend(  # type: ignore[no-untyped-call]
    "elsewhere", backend_module=_Backend()
)
DEVICE = torch.device("elsewhere:0")


class Elsewhere(torch.Tensor):
    """A tensor on the second device."""

    inner: Tensor
    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, inner: Tensor) -> Self:
        made: Self = torch.Tensor._make_wrapper_subclass(
            cls,
            inner.shape,
            strides=inner.stride(),
            storage_offset=inner.storage_offset(),
            dtype=inner.dtype,
            layout=inner.layout,
            device=DEVICE,
        )
        made.inner = inner
        return made

    def tolist(self) -> Any:
        """As of any device."""
        return self.cpu().tolist()

    def numpy(self, *, force: bool = False) -> Any:
        """As of any device but the CPU."""
        raise TypeError("expected a tensor on the CPU, got one elsewhere")

    @classmethod
    def __torch_dispatch__(
        cls,
        operator: Any,
        _types: Any,
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        return _call(operator, args, dict(kwargs or {}))


def _is_foreign(value: object) -> bool:
    """A tensor of the CPU; numbers alone may mix."""
    return isinstance(value, Tensor) and not isinstance(value, Elsewhere) and value.dim() > 0


def _call(operator: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
    """The operator on what lies in the CPU's memory, for tensors that do not mix devices."""
    leaves = pytree.tree_leaves((args, kwargs))
    here = {id(t.inner): t for t in leaves if isinstance(t, Elsewhere)}
    mixing = pytree.tree_leaves((args[0], args[2:])) if operator in _INDEXES else leaves
    if here and operator not in _MOVES and any(map(_is_foreign, mixing)):
        raise RuntimeError(f"expected all tensors on one device, {operator} got two")
    wanted = kwargs.get("device")
    if wanted is not None:
        stays = torch.device(wanted).type == DEVICE.type
    else:
        stays = isinstance(args[0], Elsewhere) if operator in _MOVES else bool(here)
    if operator in _INDEXES and here and not isinstance(args[0], Elsewhere):
        raise RuntimeError(f"expected indices on the CPU, {operator} got them from elsewhere")
    if wanted is not None and stays:
        kwargs["device"] = torch.device("cpu")
    args, kwargs = pytree.tree_map_only(Elsewhere, lambda t: t.inner, (args, kwargs))
    found = operator(*args, **kwargs)
    if not stays:
        return found
    return pytree.tree_map_only(
        Tensor, lambda t: here[id(t)] if id(t) in here else Elsewhere(t), found
    )


class _Watching(TorchDispatchMode):
    """Also of what makes tensors from nothing."""

    def __torch_dispatch__(
        self,
        operator: Any,
        _types: Any,
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        return _call(operator, args, dict(kwargs or {}))


def _empty_strided(
    size: Sequence[int], stride: Sequence[int], dtype: torch.dtype | None = None, **_: Any
) -> Tensor:
    return Elsewhere(torch.empty_strided(size, stride, dtype=dtype))


def _copy_from(source: Tensor, target: Tensor, non_blocking: bool = False) -> Tensor:
    inner = [t.inner if isinstance(t, Elsewhere) else t for t in (source, target)]
    inner[1].copy_(inner[0])
    return target


# torch.as_tensor makes and fills tensors where no mode and no subclass sees it.
_LIBRARY = torch.library.Library("aten", "IMPL")
_LIBRARY.impl("empty_strided", _empty_strided, "PrivateUse1")
_LIBRARY.impl("_copy_from", _copy_from, "PrivateUse1")


@contextlib.contextmanager
def second_device() -> Iterator[torch.device]:
    """Within it there are two devices."""
    with _Watching():
        yield DEVICE


CHECKS: dict[str, Callable[[], None]] = {}


def _check(function: Callable[[], None]) -> Callable[[], None]:
    CHECKS[function.__name__] = function
    return function


@_check
def the_devices_do_not_mix() -> None:
    there = torch.ones(3, 4).to(DEVICE)
    assert there.device == DEVICE
    assert (there @ there.t()).cpu().tolist() == [[4.0] * 3] * 3
    assert there[torch.tensor([0, 2])].shape == (2, 4)
    for wrong in (
        lambda: there + torch.ones(4),
        lambda: torch.ones(3)[torch.zeros(2, dtype=torch.int64, device=DEVICE)],
        lambda: there.numpy(),
    ):
        try:
            wrong()
        except (RuntimeError, TypeError):
            continue
        raise AssertionError("devices mixed")


def _moved() -> torch.nn.Module:
    model = copy.deepcopy(digit_case().backdoored).to(DEVICE)
    assert {p.device for p in model.parameters()} == {DEVICE}
    return model


def _scans_alike(**settings: Any) -> None:
    data = None if "input_shape" in settings else digit_case().data.defender
    one, other = (tacext.scan(m, data, **settings) for m in (digit_case().backdoored, _moved()))
    assert one.verdict != "clean"
    assert (one.verdict, one.suspects, one.p_value, one.reason) == (
        other.verdict, other.suspects, other.p_value, other.reason,
    )  # fmt: skip
    assert torch.equal(one.norm, other.norm.cpu())


@_check
def scans_of_norms() -> None:
    _scans_alike(depth="norms")


@_check
def fast_scans() -> None:
    data = padded(digit_case().data.defender)
    here, there = Cropped(digit_case().backdoored), Cropped(_moved())
    one, other = (tacext.scan(model, data, depth="fast") for model in (here, there))
    assert one.evidence is not None
    assert one.evidence.look is not None
    assert one.evidence.look.corners is not None
    assert one.evidence.look.waves is not None
    assert (one.verdict, one.p_value, one.reason) == (other.verdict, other.p_value, other.reason)


@_check
def thorough_scans() -> None:
    _scans_alike()


@_check
def scans_without_data() -> None:
    _scans_alike(input_shape=digit_case().data.defender[0].shape[1:])


def _repairs(method: Any, settings: tacext.RepairSettings | None) -> None:
    data, outcomes = digit_case().data, []
    for model in (digit_case().backdoored, _moved()):
        report = tacext.scan(model, data.defender, depth="norms")
        result = tacext.repair(
            model, data.defender, report, [0], method=method, settings=settings,
            max_accuracy_drop=None,
        )  # fmt: skip
        assert {p.device for p in result.model.parameters()} == {next(model.parameters()).device}
        found = tacext.evaluate(result.model, data.test, demo.white_corner, 0, baseline=model)
        outcomes.append((found.acc, found.asr, result.accuracy_after, result.robust_accuracy_after))
    np.testing.assert_allclose(outcomes[1], outcomes[0], atol=0.02)


@_check
def repair_by_a_patch() -> None:
    _repairs("patch", None)


@_check
def repair_by_pruning() -> None:
    _repairs("prune", None)


@_check
def repair_by_training() -> None:
    _repairs("finetune", tacext.FinetuneSettings(epochs=1))


@_check
def processors_speak_for_themselves_alone() -> None:
    """What they multiply fast in bfloat16 is no reason to use it elsewhere."""
    model = _moved()
    images = digit_case().data.defender[0]
    head = find_head(model, images[:4].to(DEVICE))
    with mock.patch("tacext.differentiable.has_fast_bfloat16", return_value=True):
        assert not DifferentiableModel(model, head, "test")._half
        here = digit_case().backdoored
        assert DifferentiableModel(here, find_head(here, images[:4]), "test")._half


@_check
def guards() -> None:
    model, (images, labels) = _moved(), digit_case().data.test
    guard = tacext.Guard.fit(model, (images, labels), false_positive_rate=0.05)
    said = guard(demo.white_corner(images[:8].clone()).to(DEVICE))
    assert said.flagged.device == DEVICE
    with tempfile.TemporaryDirectory() as folder:
        guard.save(Path(folder, "guard.safetensors"))
        again = tacext.Guard.load(Path(folder, "guard.safetensors"), model)
    assert again(images[:8].to(DEVICE)).logits.device == DEVICE
    monitor = tacext.GuardMonitor(guard.info.false_positive_rate, guard.info.samples)
    monitor.update(said)


@_check
def relearning_and_scores() -> None:
    model, data = _moved(), digit_case().data
    tacext.relearn(model, data.defender, demo.white_corner, 0, steps=5)
    shift = tacext.scan(model, data.defender, depth="norms").perturbation[0]
    assert tacext.score_neurons(model, data.defender, shift).ranking()


@_check
def the_command_line() -> None:
    case = digit_case()
    images, labels = case.data.defender
    with tempfile.TemporaryDirectory() as folder:
        tacext.save_weights(case.backdoored, Path(folder, "model.safetensors"))
        np.savez(Path(folder, "data.npz"), x=images.numpy(), y=labels.numpy())
        with contextlib.redirect_stdout(io.StringIO()):
            code = run(
                "scan", Path(folder, "model.safetensors"), "--arch", ARCH, "--depth", "norms",
                "--data", Path(folder, "data.npz"), "--device", "elsewhere:0",
                "--mean", "0", "--std", "1", "--json", Path(folder, "scan.json"),
            )  # fmt: skip
        found = json.loads(Path(folder, "scan.json").read_text(encoding="utf-8"))
    assert (code, found["source"]["device"]) == (1, "elsewhere:0")


def main() -> None:
    """Runs all checks, or those that are named."""
    torch.set_num_threads(1)
    _ = digit_case().backdoored  # trained where there is one device
    found: dict[str, str | None] = {}
    for name in sys.argv[1:] or CHECKS:
        try:
            with second_device():
                CHECKS[name]()
            found[name] = None
        except Exception:  # noqa: BLE001 - told with the others
            found[name] = traceback.format_exc()
    sys.stdout.write(json.dumps(found) + "\n")


if __name__ == "__main__":
    main()
