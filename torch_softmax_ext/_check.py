"""Types of arguments, looked at only when the short way into the dispatcher did not take them."""

from typing import get_args

import torch

_IS = {
    torch.Tensor: torch.overrides.is_tensor_like,
    int: lambda value: hasattr(value, "__index__") if not torch.is_tensor(value) else _is_number(value, integer=True),
    float: lambda value: hasattr(value, "__float__") if not torch.is_tensor(value) else _is_number(value),
    type(None): lambda value: value is None,
}


def _is_number(t, integer=False):
    """A tensor that torch's own functions take for a number."""
    fits = not (t.is_floating_point() if integer else t.is_complex())
    return t.dim() == 0 and fits and not t.requires_grad


def check_types(op: str, **arguments) -> None:
    """``name=(value, kind)`` each, where kind is torch.Tensor, int, float or one of them ``| None``; raises TypeError
    as torch's own functions do."""
    for name, (value, kind) in arguments.items():
        kinds = get_args(kind) or (kind,)
        if not any(_IS[k](value) for k in kinds):
            expected = " or ".join("None" if k is type(None) else k.__name__ for k in kinds)
            raise TypeError(f"{op}: {name}: expected {expected}, got {type(value).__name__}")


def numbers(op: str, **arguments) -> list:
    """The values of ``name=(value, kind)``, kind as in :func:`check_types`, as Python's own numbers: of NumPy's, and of
    tensors without dimensions."""
    check_types(op, **arguments)
    result = []
    for name, (value, kind) in arguments.items():
        number = value
        if value is not None:
            convert = int if int in (get_args(kind) or (kind,)) else float
            number = convert(value)
            if convert is int and not -(2**63) <= number < 2**63:
                raise ValueError(f"{op}: {name}: expected 64 bits, got {value}")
        result.append(number)
    return result


def check_reduction(op: str, reduction) -> None:
    if not isinstance(reduction, str):
        raise ValueError(f"{op}: reduction: expected 'none', 'mean' or 'sum', got {reduction!r}")
