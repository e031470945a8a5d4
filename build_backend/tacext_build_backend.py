"""scikit-build-core as the build backend, with torch added to the build only where it is missing.

The extension needs torch's headers and libraries. Where the environment that pip installs into
already has a supported torch, CMake builds against that one: nothing is downloaded and a CUDA
build of torch stays the one in use. Elsewhere pip's isolated build environment gets FALLBACK.
"""

import os
import re
import sysconfig

from scikit_build_core import build as _scikit_build
from scikit_build_core.build import *  # re-exports the hooks that need no torch

FALLBACK = "torch==2.13.0"
SUPPORTED = ((2, 11), (2, 15))  # keep in step with project.dependencies


def _torch_requirement() -> list[str]:
    # pip's isolated build runs with the target's interpreter, so platlib is the target's folder.
    version_file = os.path.join(sysconfig.get_path("platlib"), "torch", "version.py")
    try:
        with open(version_file) as file:
            found = re.search(r"__version__ *= *['\"](\d+)\.(\d+)", file.read())
    except OSError:
        found = None
    if found and SUPPORTED[0] <= (int(found[1]), int(found[2])) < SUPPORTED[1]:
        return []
    return [FALLBACK]


def get_requires_for_build_wheel(config_settings=None):
    """Requirements of a wheel build: scikit-build-core's own, and torch if there is none."""
    return [*_scikit_build.get_requires_for_build_wheel(config_settings), *_torch_requirement()]


def get_requires_for_build_editable(config_settings=None):
    """Requirements of an editable build, as for a wheel."""
    return [*_scikit_build.get_requires_for_build_editable(config_settings), *_torch_requirement()]
