"""Weights load as data or not at all; model code runs only when it is named."""

from __future__ import annotations

import os
import pickle
import sys
import textwrap
import warnings
import zipfile
from collections import OrderedDict
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from tacext.errors import FileError, InputError
from tacext.normalisation import Normalized
from tacext.user_code import load_trigger
from tacext.weights import load_factory, load_model, load_state_dict, save_weights


def small() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {
        "fc.weight": torch.randn(3, 4, generator=generator),
        "fc.bias": torch.randn(3, generator=generator),
        "steps": torch.tensor(7),
    }


def assert_same(left: dict[str, Tensor], right: dict[str, Tensor]) -> None:
    assert left.keys() == right.keys()
    assert all(torch.equal(left[k], right[k]) for k in left)


class Touch:
    """Pickles into a call that leaves a mark."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"touch {self.mark}",)


# ---- load_state_dict -----------------------------------------------------------------------------


def test_safetensors(tmp_path: Path) -> None:
    safetensors.torch.save_file(small(), tmp_path / "w.safetensors")
    assert_same(load_state_dict(tmp_path / "w.safetensors"), small())
    assert_same(load_state_dict(str(tmp_path / "w.safetensors")), small())


@pytest.mark.parametrize("suffix", [".pt", ".pth", ".bin", ".ckpt", ".PT"])
@pytest.mark.parametrize("zipped", [True, False])
def test_pickles_of_tensors(tmp_path: Path, suffix: str, zipped: bool) -> None:
    path = tmp_path / f"w{suffix}"
    state = OrderedDict(small())
    state["fc.weight"] = nn.Parameter(state["fc.weight"])
    torch.save(state, path, _use_new_zipfile_serialization=zipped)
    loaded = load_state_dict(path)
    assert_same(loaded, small())
    assert type(loaded) is dict
    assert all(type(t) is Tensor and not t.requires_grad for t in loaded.values())


@pytest.mark.parametrize("key", ["state_dict", "model_state_dict", "model", "net", "weights"])
@pytest.mark.parametrize("prefix", ["", "module.", "_orig_mod.", "module._orig_mod."])
def test_unwraps_checkpoints(tmp_path: Path, key: str, prefix: str) -> None:
    nested = {prefix + k: v for k, v in small().items()}
    torch.save({"epoch": 3, "optimizer": {"lr": 0.1}, key: nested}, tmp_path / "w.pt")
    assert_same(load_state_dict(tmp_path / "w.pt"), small())


def test_prefix_that_not_all_share_stays(tmp_path: Path) -> None:
    state = {"module.a": torch.ones(1), "n_averaged": torch.tensor(1)}
    torch.save(state, tmp_path / "w.pt")
    assert_same(load_state_dict(tmp_path / "w.pt"), state)


@pytest.mark.parametrize("form", ["zip", "legacy", "bare", "text", "module", "nested"])
def test_code_is_refused_and_never_runs(tmp_path: Path, form: str) -> None:
    mark, path = tmp_path / "mark", tmp_path / "w.pt"
    touch = Touch(mark)
    if form == "bare":
        path.write_bytes(pickle.dumps(touch))
    elif form == "text":
        path.write_bytes(pickle.dumps(touch, protocol=0))
    elif form == "module":
        model = nn.Linear(1, 1)
        model.__dict__["touch"] = touch
        torch.save(model, path)
    elif form == "nested":
        torch.save({"state_dict": small(), "args": touch}, path)
    else:
        torch.save({"w": touch}, path, _use_new_zipfile_serialization=form == "zip")
    with pytest.raises(FileError) as caught:
        load_state_dict(path)
    message = str(caught.value)
    assert message.startswith("load_state_dict: path: expected tensors and nothing else, got")
    assert "refused, nothing was run; ask the publisher for safetensors" in message
    assert ("torch.nn" in message) if form == "module" else ("system" in message or form == "bare")
    assert "weights_only" not in message
    # Chained exceptions are shown too: torch's own message tells users to switch the guard off.
    assert caught.value.__suppress_context__
    assert not mark.exists()


def test_no_environment_variable_turns_the_guard_off(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")
    torch.save({"w": Touch(tmp_path / "mark")}, tmp_path / "w.pt")
    with pytest.raises(FileError, match="nothing was run"):
        load_state_dict(tmp_path / "w.pt")
    assert not (tmp_path / "mark").exists()


def test_other_opcodes_of_pickle_never_run(tmp_path: Path) -> None:
    path, mark = tmp_path / "w.pt", tmp_path / "mark"
    path.write_bytes(b"(S'touch " + str(mark).encode() + b"'\nios\nsystem\n.")  # INST
    with pytest.raises(FileError, match=r"asks to run code: refused, nothing was run"):
        load_state_dict(path)
    assert not mark.exists()


def test_torchscript_is_refused(tmp_path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # scripting is deprecated, its files are still around
        torch.jit.save(torch.jit.script(nn.Linear(1, 1)), tmp_path / "w.pt")
    with pytest.raises(FileError, match="a TorchScript program: refused, nothing was run"):
        load_state_dict(tmp_path / "w.pt")


@pytest.mark.parametrize("suffix", [".safetensors", ".zip.pt", ".legacy.pt"])
def test_truncated_anywhere(tmp_path: Path, suffix: str) -> None:
    whole, path = tmp_path / f"whole{suffix}", tmp_path / f"cut{suffix}"
    if suffix == ".safetensors":
        safetensors.torch.save_file(small(), whole)
    else:
        torch.save(small(), whole, _use_new_zipfile_serialization="zip" in suffix)
    content = whole.read_bytes()
    cuts = {*range(24), *range(24, len(content), len(content) // 60), len(content) - 1}
    for cut in sorted(cuts):
        path.write_bytes(content[:cut])
        with pytest.raises(FileError, match=r"load_state_dict: path: .*nothing (in it )?was run"):
            load_state_dict(path)


@given(content=st.binary(max_size=200), head=st.sampled_from([b"", b"PK\x03\x04", b"\x80\x02"]))
@pytest.mark.parametrize("suffix", [".safetensors", ".pt"])
def test_random_bytes(
    tmp_path_factory: pytest.TempPathFactory, suffix: str, content: bytes, head: bytes
) -> None:
    path = tmp_path_factory.getbasetemp() / f"random{suffix}"
    path.write_bytes(head + content)
    with pytest.raises((FileError, InputError)):  # a few bytes can be a valid pickle of nothing
        load_state_dict(path)


@given(position=st.integers(0, 10_000), value=st.integers(0, 255))
@pytest.mark.parametrize("zipped", [True, False])
def test_one_damaged_byte(
    tmp_path_factory: pytest.TempPathFactory, zipped: bool, position: int, value: int
) -> None:
    path = tmp_path_factory.getbasetemp() / "flipped.pt"
    torch.save(small(), path, _use_new_zipfile_serialization=zipped)
    content = bytearray(path.read_bytes())
    content[position % len(content)] = value
    path.write_bytes(content)
    try:
        state = load_state_dict(path)
    except (FileError, InputError):
        return
    assert all(bool(torch.isfinite(t).all()) for t in state.values())


def test_kind_and_name_must_agree(tmp_path: Path) -> None:
    torch.save({"w": Touch(tmp_path / "mark")}, tmp_path / "a.safetensors")
    (tmp_path / "b.safetensors").write_bytes(pickle.dumps(Touch(tmp_path / "mark")))
    for name in "ab":
        with pytest.raises(
            FileError, match=r"expected safetensors, as its name says, got a PyTorch pickle .*run"
        ):
            load_state_dict(tmp_path / f"{name}.safetensors")
    assert not (tmp_path / "mark").exists()
    safetensors.torch.save_file(small(), tmp_path / "c.pt")
    with pytest.raises(FileError, match=r"got safetensors in .*; rename it to \.safetensors"):
        load_state_dict(tmp_path / "c.pt")


@pytest.mark.parametrize("suffix", [".safetensors", ".pt"])
def test_no_such_file_or_no_file(tmp_path: Path, suffix: str) -> None:
    with pytest.raises(
        FileError, match=r"load_state_dict: path: .*No such file or directory\); check the path"
    ):
        load_state_dict(tmp_path / f"no{suffix}")
    folder = tmp_path / f"folder{suffix}"
    folder.mkdir()
    with pytest.raises(FileError, match=r"expected a file, got .* a directory; name the file"):
        load_state_dict(folder)
    (tmp_path / "file").write_text("")
    with pytest.raises(FileError, match="check the path and its permissions"):
        load_state_dict(tmp_path / "file" / f"w{suffix}")
    os.mkfifo(tmp_path / f"pipe{suffix}")
    with pytest.raises(FileError, match="not a regular file"):
        load_state_dict(tmp_path / f"pipe{suffix}")


def test_permission(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # Simulated: permission bits do not stop root.
    def denied(*_: object, **__: object) -> None:
        raise PermissionError(13, "Permission denied")

    safetensors.torch.save_file(small(), tmp_path / "w.safetensors")
    monkeypatch.setattr(Path, "open", denied)
    with pytest.raises(FileError, match=r"\(Permission denied\); check the path"):
        load_state_dict(tmp_path / "w.safetensors")


def test_unknown_suffix(tmp_path: Path) -> None:
    (tmp_path / "w.h5").write_bytes(b"x")
    with pytest.raises(FileError, match=r"expected a file ending in \.safetensors, .*as safetens"):
        load_state_dict(tmp_path / "w.h5")


@pytest.mark.parametrize(
    ("saved", "message"),
    [
        ({}, "expected names and tensors, got no entries in"),
        ([torch.ones(1)], "expected names and tensors, got list in"),
        (torch.ones(1), "expected names and tensors, got Tensor in"),
        ({"w": torch.ones(1), "epoch": 3}, "got a int under 'epoch' in"),
        ({"state_dict": {"w": torch.ones(1), "v": 2}}, "got a int under 'v' in"),
        ({"state_dict": {}}, "got a dict under 'state_dict' in"),
        ({0: torch.ones(1)}, "got a Tensor under 0 in"),
        ({"model": {"w": torch.ones(1)}, "net": {"w": torch.ones(1)}}, "got 'model', 'net' in"),
        ({"w": torch.ones(1).expand(1 << 40)}, "repeats its memory under 'w' in"),
        ({"w": torch.empty(2, device="meta")}, "meta tensor under 'w' in"),
        ({"\x1b[2J": torch.tensor([float("nan")])}, r"NaN or infinity in '\\x1b\[2J' in"),
    ],
    ids=range(11),
)
def test_not_a_state_dict(tmp_path: Path, saved: object, message: str) -> None:
    torch.save(saved, tmp_path / "w.pt")
    with pytest.raises(InputError, match=rf"^load_state_dict: path: .*{message} .*; \w+"):
        load_state_dict(tmp_path / "w.pt")


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize(
    "dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e5m2]
)
def test_weights_must_be_finite(tmp_path: Path, value: float, dtype: torch.dtype) -> None:
    state = {"a": torch.ones(2), "b.weight": torch.tensor([1.0, value]).to(dtype)}
    safetensors.torch.save_file(state, tmp_path / "w.safetensors")
    with pytest.raises(
        InputError, match=r"load_state_dict: path: expected finite weights, got .*'b.weight'.*; "
    ):
        load_state_dict(tmp_path / "w.safetensors")


def test_8_bit_floats_are_checked(tmp_path: Path) -> None:
    state = {"w": torch.tensor([1.0, float("nan")]).to(torch.float8_e4m3fn)}
    safetensors.torch.save_file(state, tmp_path / "w.safetensors")
    with pytest.raises(InputError, match="NaN or infinity in 'w'"):
        load_state_dict(tmp_path / "w.safetensors")


# ---- load_factory --------------------------------------------------------------------------------

ARCH = """
    from __future__ import annotations
    from dataclasses import dataclass
    from torch import nn
    from neighbour_of_arch import WIDTH

    @dataclass(frozen=True)
    class Entry:
        width: int

    class Net(nn.Module):
        def __init__(self, classes: int = 3):
            super().__init__()
            self.fc = nn.Linear(WIDTH, classes)
            self.register_buffer("steps", __import__("torch").tensor(0))

    class Wrapped(nn.Module):
        def __init__(self):
            super().__init__()
            self.module = Net()

    def late():
        import late_neighbour_of_arch
        return late_neighbour_of_arch.build()

    def ten(): return Net(10)
    def hungry(depth): return Net()
    def nothing(): return None
    def broken(): raise KeyError("depth")
    def leaves(): raise SystemExit(2)
    lambda_net = lambda: Net()
    LABEL = "not callable"
"""


@pytest.fixture
def arch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "code"
    folder.mkdir()
    (folder / "neighbour_of_arch.py").write_text("WIDTH = 4\n")
    (folder / "late_neighbour_of_arch.py").write_text(
        "from torch import nn\ndef build(): return nn.Linear(4, 3)\n"
    )
    (folder / "arch.py").write_text(textwrap.dedent(ARCH))
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    for name in ("neighbour_of_arch", "late_neighbour_of_arch"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    return folder / "arch.py"


@pytest.mark.parametrize("name", ["Net", "ten", "lambda_net", "late"])
def test_factory_from_a_file(arch: Path, name: str) -> None:
    before = list(sys.path)
    factory = load_factory(f"{arch}:{name}")
    assert isinstance(factory(), nn.Module)
    assert sys.path == before
    assert "arch" not in sys.modules


def test_factory_from_a_relative_path(arch: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(arch.parent)
    assert isinstance(load_factory("arch.py:Net")(), nn.Module)
    assert isinstance(load_factory("../code/arch.py:Net")(), nn.Module)


def test_factory_from_a_module(arch: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert load_factory("torch.nn:Identity") is nn.Identity
    with pytest.raises(InputError, match=r"got ModuleNotFoundError.*'arch'.* path of its file"):
        load_factory("arch:Net")
    monkeypatch.syspath_prepend(arch.parent)
    try:
        assert isinstance(load_factory("arch:Net")(), nn.Module)
    finally:
        sys.modules.pop("arch", None)


@pytest.mark.parametrize(
    ("reference", "message"),
    [
        ("arch.py", "expected a module and a function, divided by a colon, got 'arch.py'; name it"),
        (":Net", "divided by a colon, got ':Net'; name it as path/to/file.py:function"),
        ("arch.py:", "divided by a colon"),
        ("arch.py:a b", "divided by a colon"),
        ("..os:system", "expected the name of a module, got '..os'; name it as"),
        ("{folder}/arch.py:Nope", "to define Nope, got only Entry, Net, .*; check the name"),
        ("{folder}/arch.py:LABEL", "expected LABEL to be a function or class, got str; name what"),
        ("{folder}/arch.py:hungry", r"take no arguments, got hungry\(depth\) .*'depth'.*; wrap it"),
        ("no_such_module_x:Net", "no_such_module_x to import, got ModuleNotFoundError.*; correct"),
    ],
)
def test_factory_references(arch: Path, reference: str, message: str) -> None:
    with pytest.raises(InputError, match=f"^load_factory: arch: .*{message}"):
        load_factory(reference.format(folder=arch.parent))


def test_factory_file_missing(tmp_path: Path) -> None:
    with pytest.raises(FileError, match=r"load_factory: arch: .*does not exist; check the path"):
        load_factory(f"{tmp_path}/no.py:f")
    (tmp_path / "d.py").mkdir()
    with pytest.raises(FileError, match="which is not a file"):
        load_factory(f"{tmp_path}/d.py:f")


@pytest.mark.parametrize(
    ("code", "cause", "message"),
    [
        ("x = 1\nimport no_such_module_y", ModuleNotFoundError, r"module_y' at bad\.py:2"),
        ("def f(:", SyntaxError, r"SyntaxError: .*\(bad\.py, line 1\); correct"),
        ("1 / 0", ZeroDivisionError, r"ZeroDivisionError: division by zero at bad\.py:1"),
        ("raise SystemExit(3)", SystemExit, r"SystemExit: 3 at bad\.py:1"),
    ],
)
def test_factory_file_that_fails(
    tmp_path: Path, code: str, cause: type[BaseException], message: str
) -> None:
    before = set(sys.modules), list(sys.path)
    (tmp_path / "bad.py").write_text(code)
    with pytest.raises(InputError, match=message) as caught:
        load_factory(f"{tmp_path}/bad.py:f")
    assert isinstance(caught.value.__cause__, cause)
    assert not {m for m in set(sys.modules) - before[0] if m.startswith("_tacext_arch")}
    assert sys.path == before[1]


# ---- load_model ----------------------------------------------------------------------------------


@pytest.mark.parametrize("prefix", ["", "module."])
def test_load_model(tmp_path: Path, arch: Path, prefix: str) -> None:
    path = tmp_path / "w.safetensors"
    safetensors.torch.save_file({prefix + k: v for k, v in small().items()}, path)
    model = load_model(path, f"{arch}:Net")
    assert not model.training
    assert_same(dict(model.state_dict()), small())


def test_load_model_with_the_function_itself(tmp_path: Path) -> None:
    path = tmp_path / "w.safetensors"
    save_weights(nn.Linear(3, 2), path)
    assert not load_model(path, lambda: nn.Linear(3, 2)).training

    def other() -> nn.Module:
        return nn.Linear(3, 4)

    with pytest.raises(InputError, match=r"arch: expected .*\.other to fit the weights"):
        load_model(path, other)
    with pytest.raises(InputError, match=r"arch: expected Linear to build a model, got TypeError"):
        load_model(path, nn.Linear)


@pytest.mark.parametrize("arch", [nn.Linear(3, 2), None, 3])
def test_load_model_with_something_else(tmp_path: Path, arch: Any) -> None:
    path = tmp_path / "w.safetensors"
    save_weights(nn.Linear(3, 2), path)
    message = (
        "^load_model: arch: expected a function that builds the model, or where to find it, got a "
        f"{type(arch).__name__}; pass"
    )
    with pytest.raises(InputError, match=message):
        load_model(path, arch)


@pytest.mark.parametrize("missing", ["no_such_module_y", "no_such_module_y.models"])
def test_what_the_factory_file_lacks_is_to_be_installed(tmp_path: Path, missing: str) -> None:
    (tmp_path / "zoo.py").write_text(f"import {missing}")
    with pytest.raises(InputError, match=r"'no_such_module_y' at zoo\.py:1; install no_such_modu"):
        load_factory(f"{tmp_path}/zoo.py:net")


def test_a_child_named_module_is_no_prefix(tmp_path: Path, arch: Path) -> None:
    path = tmp_path / "w.safetensors"
    safetensors.torch.save_file({f"module.{k}": v for k, v in small().items()}, path)
    model = load_model(path, f"{arch}:Wrapped")
    assert torch.equal(model.get_parameter("module.fc.bias"), small()["fc.bias"])


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("ten", r"wrong shape fc.weight \[3, 4\] for \[10, 4\], fc.bias \[3\] for \[10\]; --arch"),
        ("late", r"missing weight, bias; unexpected 'fc.bias', 'fc.weight', 'steps'; --arch must"),
        ("nothing", "arch.py:nothing to return an nn.Module, got NoneType; name a function"),
        ("broken", "to build a model, got KeyError: 'depth'; correct the factory"),
        ("leaves", "to build a model, got SystemExit: 2; correct the factory"),
    ],
)
def test_load_model_that_does_not_fit(tmp_path: Path, arch: Path, name: str, message: str) -> None:
    safetensors.torch.save_file(small(), tmp_path / "w.safetensors")
    with pytest.raises(InputError, match=f"^load_model: arch: expected .*{message}"):
        load_model(tmp_path / "w.safetensors", f"{arch}:{name}")


def test_many_mismatches_are_counted(tmp_path: Path, arch: Path) -> None:
    state = {**small(), **{f"x{i}": torch.ones(1) for i in range(9)}}
    safetensors.torch.save_file(state, tmp_path / "w.safetensors")
    with pytest.raises(InputError, match=r"unexpected 'x0', 'x1', 'x2' and 6 more;"):
        load_model(tmp_path / "w.safetensors", f"{arch}:Net")


def test_unsafe_weights_are_refused_before_the_model_code_runs(tmp_path: Path) -> None:
    (tmp_path / "arch.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w').close()")
    torch.save({"w": Touch(tmp_path / "mark")}, tmp_path / "w.pt")
    with pytest.raises(FileError, match=r"load_model: weights: .*nothing was run"):
        load_model(tmp_path / "w.pt", f"{tmp_path}/arch.py:f")
    assert not (tmp_path / "ran").exists()


# ---- save_weights --------------------------------------------------------------------------------


def test_save_and_load(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.Flatten(), nn.Linear(2, 2))
    save_weights(model, tmp_path / "m.safetensors")
    save_weights(small(), tmp_path / "s.safetensors")
    assert_same(load_state_dict(tmp_path / "m.safetensors"), dict(model.state_dict()))
    assert_same(load_state_dict(tmp_path / "s.safetensors"), small())


def test_save_shared_and_strided(tmp_path: Path) -> None:
    tied = nn.ModuleList([nn.Linear(3, 3), nn.Linear(3, 3)])
    tied[1].weight = tied[0].weight
    save_weights(tied, tmp_path / "w.safetensors")
    assert_same(load_state_dict(tmp_path / "w.safetensors"), dict(tied.state_dict()))
    matrix = torch.arange(12.0).view(3, 4)
    state = {"t": matrix.t(), "row": matrix[1], "all": matrix}
    save_weights(state, tmp_path / "w.safetensors")
    assert_same(load_state_dict(tmp_path / "w.safetensors"), state)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ([torch.ones(1)], "model_or_state: expected an nn.Module or a dict of tensors, got list"),
        ({}, "model_or_state: expected names and tensors, got no entries; save"),
        ({"a": 1}, "model_or_state: expected names and dense tensors, got a int under 'a'; save"),
        ({"a": torch.tensor([float("inf")])}, "model_or_state: .* infinity in 'a'; the file"),
        ({"a": torch.empty(1, device="meta")}, "meta tensor under 'a'"),
    ],
)
def test_save_refuses(tmp_path: Path, value: Any, message: str) -> None:
    path = tmp_path / "w.safetensors"
    path.write_bytes(b"old")
    with pytest.raises(InputError, match=f"^save_weights: .*{message}"):
        save_weights(value, path)
    assert path.read_bytes() == b"old"


def test_save_path(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"save_weights: path: .*safetensors, got .*; add"):
        save_weights(small(), tmp_path / "w.pt")
    with pytest.raises(FileError, match=r"save_weights: path: .*folder does not exist; create"):
        save_weights(small(), tmp_path / "no" / "w.safetensors")


def test_save_on_a_full_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    path = tmp_path / "w.safetensors"
    path.write_bytes(b"old")
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(FileError, match=r"save_weights: path: .*No space left.*free some space"):
        save_weights(small(), path)
    assert [p.name for p in tmp_path.iterdir()] == ["w.safetensors"]
    assert path.read_bytes() == b"old"


# ---- Normalized ----------------------------------------------------------------------------------


def test_normalized() -> None:
    x = torch.rand(2, 3, 4, 4)
    model = Normalized(nn.Identity(), (0.4, 0.5, 0.6), (0.2,))
    expected = (x - torch.tensor([0.4, 0.5, 0.6]).view(1, 3, 1, 1)) / 0.2
    torch.testing.assert_close(model(x), expected)
    assert model.mean.shape == model.std.shape == (1, 3, 1, 1)
    assert Normalized(nn.Identity(), [0.5], [0.5])(x).shape == x.shape
    copy = Normalized(nn.Identity(), [0.0], [1.0, 1.0, 1.0])
    copy.load_state_dict({k: v.expand(1, 3, 1, 1) for k, v in model.state_dict().items()})
    assert torch.equal(copy(x), model(x))


@pytest.mark.parametrize(
    ("mean", "std", "message"),
    [
        ([], [1.0], "mean: expected finite floats, got"),
        ([float("nan")], [1.0], "mean: expected finite floats"),
        (0.5, [1.0], "mean: expected a sequence of floats, got 0.5; give one value"),
        (["x"], [1.0], "mean: expected a sequence of floats"),
        ([0.5], [0.0], "std: expected values above 0, got .*; use 1 for"),
        ([0.5], [-1.0], "std: expected values above 0"),
        ([0.5], [1e-60], "std: expected values above 0"),
        ([0.5], [float("inf")], "std: expected finite floats"),
        ([0.5] * 3, [1.0] * 2, "std: expected 1 or 3 values, like mean, got 2; give one"),
    ],
)
def test_normalized_refuses(mean: Any, std: Any, message: str) -> None:
    with pytest.raises(InputError, match=f"^Normalized: {message}"):
        Normalized(nn.Identity(), mean, std)


def test_normalized_refuses_models_and_channels() -> None:
    not_a_model: Any = len
    with pytest.raises(InputError, match=r"Normalized: model: expected an nn.Module, got builtin"):
        Normalized(not_a_model, [0.5], [0.5])
    model = Normalized(nn.Identity(), [0.5] * 3, [0.5] * 3)
    for shape in ((2, 1, 4, 4), (3, 4, 4)):
        with pytest.raises(InputError, match=r"Normalized: x: expected \[N, 3, H, W\], got .*; "):
            model(torch.zeros(shape))


def test_a_trigger_is_a_function_of_one_batch(tmp_path: Path) -> None:
    file = tmp_path / "triggers.py"
    file.write_text(
        "def white(images):\n    return images * 0 + 1\n\ndef none():\n    return None\n"
    )
    assert bool((load_trigger(f"{file}:white")(torch.zeros(2, 3)) == 1).all())
    with pytest.raises(InputError, match=r"^load_trigger: trigger: expected none to take one"):
        load_trigger(f"{file}:none")
    with pytest.raises(FileError, match=r"^load_trigger: trigger: .*does not exist"):
        load_trigger(f"{tmp_path}/missing.py:white")


def test_a_compressed_archive_is_refused_before_it_grows(tmp_path: Path) -> None:
    plain, bomb = tmp_path / "plain.pt", tmp_path / "bomb.pt"
    torch.save({"w": torch.zeros(1000, 1000)}, plain)
    with zipfile.ZipFile(plain) as source, zipfile.ZipFile(bomb, "w", zipfile.ZIP_DEFLATED) as to:
        for entry in source.infolist():
            to.writestr(entry.filename, source.read(entry))
    assert bomb.stat().st_size < 50_000
    assert load_state_dict(plain)["w"].shape == (1000, 1000)
    with pytest.raises(FileError, match="it would grow to 4 MiB"):
        load_state_dict(bomb)


def test_counters_of_batch_norm_may_be_missing_as_torch_has_it(tmp_path: Path) -> None:
    def build() -> nn.Module:
        return nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2))

    model = build()
    state = {k: v for k, v in model.state_dict().items() if not k.endswith("num_batches_tracked")}
    save_weights(state, tmp_path / "old.safetensors")
    loaded = load_model(tmp_path / "old.safetensors", build).state_dict()
    assert all(torch.equal(loaded[name], value) for name, value in state.items())
    assert loaded["1.num_batches_tracked"] == 0
    del state["1.running_mean"]
    save_weights(state, tmp_path / "older.safetensors")
    with pytest.raises(InputError, match=r"got missing 1\.running_mean;"):
        load_model(tmp_path / "older.safetensors", build)


def test_weights_of_a_normalized_model_are_told_as_such(tmp_path: Path) -> None:
    save_weights(Normalized(nn.Conv2d(1, 2, 3), [0.5], [0.5]), tmp_path / "model.safetensors")
    with pytest.raises(InputError, match=r"of a tacext\.Normalized: save its \.model"):
        load_model(tmp_path / "model.safetensors", lambda: nn.Conv2d(1, 2, 3))
