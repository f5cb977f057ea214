"""Types of arguments, looked at only when the short way into the dispatcher did not take them."""

import torch


def check_types(op: str, **arguments) -> None:
    """``name=(value, torch.Tensor or int)`` each; raises TypeError as torch's own functions do."""
    for name, (value, kind) in arguments.items():
        is_kind = torch.overrides.is_tensor_like(value) if kind is torch.Tensor else hasattr(value, "__index__")
        if not is_kind:
            raise TypeError(f"{op}: {name}: expected {kind.__name__}, got {type(value).__name__}")
