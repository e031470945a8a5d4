"""Build information, solver settings and status of tacext's native library."""

import enum
import typing

__all__: list[str] = [
    "SolverSettings",
    "Status",
    "cuda_device_count",
    "has_cuda",
    "simd_level",
    "torch_version",
    "version",
]

class Status(enum.IntEnum):
    """How a class's problem ended."""

    OPTIMAL = 0
    UNREACHABLE = 1
    ITERATION_LIMIT = 2

class SolverSettings:
    """Settings of the exact solver; immutable."""

    def __eq__(self, arg0: object) -> bool: ...
    def __hash__(self) -> int: ...
    def __init__(
        self,
        *,
        tolerance: typing.SupportsFloat | typing.SupportsIndex = 1e-09,
        max_iterations: typing.SupportsInt | typing.SupportsIndex = 0,
        closed_form: bool = True,
    ) -> None: ...
    @property
    def closed_form(self) -> bool: ...
    @property
    def max_iterations(self) -> int: ...
    @property
    def tolerance(self) -> float: ...

def cuda_device_count() -> int: ...
def has_cuda() -> bool: ...
def simd_level() -> str: ...
def version() -> str: ...

torch_version: str
