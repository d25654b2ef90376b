"""The fast path: the engines that a model can run in, and the choice of the fastest."""

import inspect
import sys
from types import ModuleType

from siglip_port.optimize.choice import Choice
from siglip_port.optimize.engines import ENGINES, EngineError
from siglip_port.optimize.optimized_model import OptimizedModel
from siglip_port.optimize.selection import optimize, with_engine

__all__ = ["ENGINES", "Choice", "EngineError", "OptimizedModel", "optimize", "with_engine"]


class _CallablePackage(ModuleType):
    """A package that can be called.

    `siglip_port.optimize(model)` is public, and this folder has the same name: whoever imports a
    part of it binds the package to `siglip_port.optimize`, where the function is expected. So the
    package is both.
    """

    __call__ = staticmethod(optimize)


sys.modules[__name__].__class__ = _CallablePackage
__signature__ = inspect.signature(optimize)
