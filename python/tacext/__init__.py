"""tacext: exact backdoor detection and removal for classifiers."""

from . import ops

__version__ = ops.build_info().version
