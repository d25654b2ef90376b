"""Fast inference: engines to run a model in, and selection of the fastest."""

import inspect
import sys
from types import ModuleType

from siglip_port.optimize.choice import Choice
from siglip_port.optimize.engines import ENGINES, EngineError
from siglip_port.optimize.optimized_model import OptimizedModel
from siglip_port.optimize.selection import optimize, with_engine

__all__ = ["ENGINES", "Choice", "EngineError", "OptimizedModel", "optimize", "with_engine"]


class _CallablePackage(ModuleType):
    """Callable package.

    `siglip_port.optimize(model)` is public, but importing any submodule binds the package to
    `siglip_port.optimize` instead of the function. So the package itself is callable.
    """

    __call__ = staticmethod(optimize)


sys.modules[__name__].__class__ = _CallablePackage
__signature__ = inspect.signature(optimize)
