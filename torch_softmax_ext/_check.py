"""Types of arguments, looked at only when the short way into the dispatcher did not take them."""

from typing import get_args

import torch

_IS = {
    torch.Tensor: torch.overrides.is_tensor_like,
    int: lambda value: hasattr(value, "__index__") and not torch.overrides.is_tensor_like(value),
    float: lambda value: hasattr(value, "__float__") and not torch.overrides.is_tensor_like(value),
    type(None): lambda value: value is None,
}


def check_types(op: str, **arguments) -> None:
    """``name=(value, kind)`` each, where kind is torch.Tensor, int, float or one of them ``| None``; raises TypeError
    as torch's own functions do."""
    for name, (value, kind) in arguments.items():
        kinds = get_args(kind) or (kind,)
        if not any(_IS[k](value) for k in kinds):
            expected = " or ".join("None" if k is type(None) else k.__name__ for k in kinds)
            raise TypeError(f"{op}: {name}: expected {expected}, got {type(value).__name__}")
        if type(value) is int and int in kinds and not -(2**63) <= value < 2**63:
            raise ValueError(f"{op}: {name}: expected 64 bits, got {value}")
