"""Registers rules with modules of torch that ``import torch`` does not import, as soon as the program imports them."""

import importlib.util
import sys
import warnings
from collections.abc import Callable

import torch


def _register(name: str, register: Callable[[], None]) -> None:
    try:
        register()
    except Exception as error:  # in an unknown version of torch; its own import must still succeed
        warnings.warn(f"torch_softmax_ext: no rules for {name} in torch {torch.__version__}: {error!r}", stacklevel=2)


class _Finder:
    def __init__(self, name: str, register: Callable[[], None]) -> None:
        self.name, self.register = name, register

    def find_spec(self, name, path=None, target=None):
        if name != self.name or self not in sys.meta_path:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        if spec is not None and spec.loader is not None:
            execute = spec.loader.exec_module

            def exec_module(module):
                execute(module)
                _register(self.name, self.register)

            spec.loader.exec_module = exec_module
        return spec


def when_imported(name: str, register: Callable[[], None]) -> None:
    """Calls ``register`` now if the module is already imported, else right after its import."""
    if name in sys.modules:
        _register(name, register)
    else:
        sys.meta_path.insert(0, _Finder(name, register))
