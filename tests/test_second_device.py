"""All that tacext does, on a device that is not the CPU: `second_device.py`, in a process of its own."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from torch.utils import backend_registration


@pytest.mark.skipif(
    not hasattr(backend_registration, "_setup_privateuseone_for_python_backend"),
    reason="this torch takes no device that is written in Python",
)
def test_everything_on_a_second_device() -> None:
    program = Path(__file__).parent / "second_device.py"
    ran = subprocess.run(
        [sys.executable, str(program)], capture_output=True, text=True, timeout=1800, check=False
    )
    assert ran.returncode == 0, ran.stderr[-4000:]
    found: dict[str, str | None] = json.loads(ran.stdout.splitlines()[-1])
    assert len(found) > 9
    wrong = {check: told for check, told in found.items() if told is not None}
    assert not wrong, "\n\n".join(f"{check}: {told}" for check, told in wrong.items())
