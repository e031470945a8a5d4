"""tacext: find and remove backdoors in classifiers, exactly and with certificates.

    report = tacext.scan(model, (images, labels))
    result = tacext.repair(model, (images, labels), report)

The paper behind it: Iwahana et al., arXiv 2511.08944.

The names of the package are those of __init__.pyi, which is read when it is imported. What is behind each is
imported when it is first used: a server that only guards waits for no repair.
"""

import lazy_loader

# Not lazily: they register tacext's operators, and what exported guards return.
from . import guard_scoring as _guard_scoring  # noqa: F401
from . import ops

__version__ = ops.build_info().version
cmake_prefix_path = ops.cmake_prefix_path

__getattr__, _, __all__ = lazy_loader.attach_stub(__name__, __file__)
__all__ += ["__version__", "cmake_prefix_path"]
del _  # a __dir__ without what every module has


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
