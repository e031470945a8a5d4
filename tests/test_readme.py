"""The README's Python runs as it stands, on a backdoored model and on a clean one."""

from __future__ import annotations

import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import tacext
from digits import digit_case

README = Path(__file__).parents[1] / "README.md"


def snippets() -> list[str]:
    return re.findall(r"^```python\n(.*?)^```$", README.read_text(), re.MULTILINE | re.DOTALL)


def test_rows_of_tables_have_as_many_cells_as_their_headings() -> None:
    for file in [README, *README.parent.glob("docs/*.md"), *README.parent.glob("*.md")]:
        wanted = 0
        for number, line in enumerate(file.read_text(encoding="utf-8").splitlines(), 1):
            is_row = line.startswith("|")
            cells = len(re.sub(r"`[^`]*`|\\\|", "", line).strip().strip("|").split("|"))
            assert not is_row or wanted in (0, cells), f"{file.name}:{number}"
            wanted = cells if is_row else 0


@pytest.mark.parametrize("name", ["backdoored", "clean"])
def test_the_snippets_run_one_after_the_other(
    name: str, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    shutil.copy(folder / f"{name}.safetensors", "model.safetensors")
    Path("my_model.py").write_text("from tacext.demo import digit_net as build\n")
    (images, labels), (test_images, test_labels) = (
        digit_case().data.defender,
        digit_case().data.test,
    )
    np.savez("images.npz", x_train=images, y_train=labels, x_test=test_images, y_test=test_labels)
    code = "".join(snippets())
    code = code.replace("input_shape=(3, 32, 32)", "input_shape=(1, 8, 8)")
    variables: dict[str, Any] = {}
    exec(compile(code, str(README), "exec"), variables)  # noqa: S102
    assert bool(variables["report"].suspects) == (name == "backdoored")
    assert Path("repaired.safetensors").is_file() == (name == "backdoored")
    logits = torch.cat(variables["batches"])
    assert torch.equal(variables["margins"], tacext.ops.pairwise_margin_max(logits))
    quantile = tacext.ops.pairwise_margin_quantile(logits, 0.99)
    assert torch.equal(variables["shards"][0].result(), quantile)
    assert variables["found"].classes.tolist() == [3, 7]
