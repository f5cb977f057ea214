"""Loads the compiled library. Whatever goes wrong becomes one readable ImportError with its cause chained."""

import os
from pathlib import Path


def load():
    try:
        import torch
    except ImportError as error:
        raise ImportError("torch_softmax_ext needs PyTorch 2.11 or newer, which could not be imported") from error

    # The test suite points this at a build of its own (CUDA kernels executed on the host).
    override = os.environ.get("TORCH_SOFTMAX_EXT_LIBRARY")
    path = Path(override) if override else Path(__file__).parent / "_C.so"
    if not path.exists():
        raise ImportError(
            f"torch_softmax_ext: its compiled library {path} is not there; "
            "build it with `pip install --no-build-isolation .` (or `make build` in a checkout)"
        )
    try:
        torch.ops.load_library(str(path))
    except OSError as error:  # torch puts the loader's own words into the cause
        message = str(error.__cause__ or error)
        if "undefined symbol" in message:
            why = f"it was built for another version of PyTorch than {torch.__version__}"
        elif "cannot open shared object file" in message:
            why = "a library that it needs was not found (for a CUDA build: CUDA's runtime)"
        else:
            why = "the system could not load it"
        raise ImportError(
            f"torch_softmax_ext: {path} could not be loaded: {why}; "
            f"rebuild it with `pip install --no-build-isolation --force-reinstall .`. {message}"
        ) from error


load()
