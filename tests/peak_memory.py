"""How much memory a snippet needs beyond what it starts from, measured in a process of its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from typing import Any

_PROGRAM = """
import json, sys

def kib(field):
    with open("/proc/self/status") as lines:
        return next(int(line.split()[1]) for line in lines if line.startswith(field + ":"))

import torch
from tacext import ops

torch.set_num_threads(2)
{setup}
before = kib("VmRSS")
# 5 resets the peak to what is resident now. ru_maxrss would not do: it is inherited from the
# parent, so a large test process would hide everything.
with open("/proc/self/clear_refs", "w") as file:
    file.write("5")
{measured}
after = kib("VmHWM")
print(json.dumps({{"extra": 1024 * (after - before), **({report})}}))
"""


def measure(setup: str, measured: str, report: str = "{}") -> dict[str, Any]:
    """Runs both snippets; "extra" in the result is the peak of `measured`, in bytes."""
    program = _PROGRAM.format(setup=setup, measured=measured, report=report)
    done = subprocess.run(
        [sys.executable, "-c", program],
        # What the setup frees goes back to the system; kept, it would hide as much of the peak.
        env={**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536"},
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    result: dict[str, Any] = json.loads(done.stdout)
    return result
