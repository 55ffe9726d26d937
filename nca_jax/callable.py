"""Modules that are called by their own name: `nca_jax.fit(...)` is `nca_jax.fit.fit(...)`.

The attribute `fit` of the package is its module as soon as anything has imported it; so that a
notebook need not know what has, the module answers a call.
"""

import sys
from types import ModuleType


class _Callable(ModuleType):
    def __call__(self, *args, **kwargs):
        return getattr(self, self.__name__.rpartition(".")[2])(*args, **kwargs)


def make_callable(module: str) -> None:
    """Makes a module, by its __name__, call the function of its own name."""
    sys.modules[module].__class__ = _Callable
