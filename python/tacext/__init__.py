"""tacext: find and remove backdoors in classifiers, exactly and with certificates.

    report = tacext.scan(model, (images, labels))
    result = tacext.repair(model, (images, labels), report)

The paper behind it: Iwahana et al., arXiv 2511.08944.

The names of the package are those of __init__.pyi. Each is imported when it is first used: a server that only
guards waits for no repair.
"""

import lazy_loader

from . import ops  # not lazily: importing tacext registers its operators

__version__ = ops.build_info().version
cmake_prefix_path = ops.cmake_prefix_path

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
