"""Loads the compiled library. Every failure becomes one readable ImportError, chained to its cause."""

import importlib
import importlib.util
import os
import sys

NAME = "torch_softmax_ext._C"


def load():
    """The library's module; importing it registers the operators."""
    try:
        import torch
    except ImportError as error:
        raise ImportError("torch_softmax_ext needs PyTorch 2.11 or newer, which could not be imported") from error
    try:
        # The test suite points this at a build of its own (CUDA kernels executed on the host).
        if path := os.environ.get("TORCH_SOFTMAX_EXT_LIBRARY"):
            spec = importlib.util.spec_from_file_location(NAME, path)
            module = importlib.util.module_from_spec(spec)
            sys.modules[NAME] = module
            spec.loader.exec_module(module)
            return module
        return importlib.import_module(NAME)
    except ImportError as error:
        message = str(error)
        if isinstance(error, ModuleNotFoundError):
            why = f"it was not built for this Python, {sys.version_info.major}.{sys.version_info.minor}"
        elif "undefined symbol" in message:
            why = f"it was built for another version of PyTorch than {torch.__version__}"
        elif "cannot open shared object file" in message:
            why = "the library, or one that it needs (for a CUDA build: CUDA's runtime), was not found"
        else:
            why = "the system could not load it"
        raise ImportError(
            f"torch_softmax_ext: its compiled library could not be loaded: {why}; build it with "
            f"`pip install --no-build-isolation --force-reinstall .` (`make build` in a checkout). {message}"
        ) from error
