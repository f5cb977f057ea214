"""Arguments of the public functions. Their names, types and defaults are written once, in the function's signature;
type checks, keyword calls of the operators and modules read them there.

A function takes tensors first, then options, in the order of its operator.
"""

import inspect
from collections.abc import Iterable
from types import NoneType
from typing import TYPE_CHECKING, Any, get_args

import torch
from torch import Tensor, nn


def _is_float(value) -> bool:
    if torch.is_tensor(value):  # such a tensor is a number for torch's own functions, too
        return value.dim() == 0 and not value.is_complex() and not value.requires_grad
    return hasattr(value, "__float__")


def _is_int(value) -> bool:
    if torch.is_tensor(value):
        return _is_float(value) and not value.is_floating_point()
    return hasattr(value, "__index__")


_IS = {
    Tensor: torch.overrides.is_tensor_like,
    int: _is_int,
    float: _is_float,
    torch.dtype: lambda value: isinstance(value, torch.dtype),
    NoneType: lambda value: value is None,
}


def _kinds(parameter: inspect.Parameter) -> tuple[type, ...]:
    """``(float, NoneType)`` of ``float | None``."""
    return get_args(parameter.annotation) or (parameter.annotation,)


def options_of(function) -> dict[str, object]:
    """The parameters that need not be tensors, with their defaults."""
    parameters = inspect.signature(function).parameters.values()
    return {p.name: p.default for p in parameters if not set(_kinds(p)) <= {Tensor, NoneType}}


def _checked(op: str, parameter: inspect.Parameter, value):
    """The value, where a number of NumPy or in a tensor without dimensions becomes one of Python's own."""
    name, kinds = parameter.name, _kinds(parameter)
    if kinds == (str,):
        if not isinstance(value, str):
            raise ValueError(f"{op}: {name}: expected 'none', 'mean' or 'sum', got {value!r}")
        return value
    if not any(_IS[k](value) for k in kinds):
        expected = " or ".join("None" if k is NoneType else k.__name__ for k in kinds)
        raise TypeError(f"{op}: {name}: expected {expected}, got {type(value).__name__}")
    if value is None or torch.dtype in kinds or (Tensor in kinds and torch.overrides.is_tensor_like(value)):
        return value
    if float in kinds:
        return float(value)
    number = int(value)
    if not -(2**63) <= number < 2**63:
        raise ValueError(f"{op}: {name}: expected 64 bits, got {value}")
    return number


def checked(function, values) -> list:
    """The first arguments of a call of ``function``, after type checks. As in torch's own functions, a wrong type
    raises TypeError, and a ``reduction`` that is not a string ValueError."""
    parameters = inspect.signature(function).parameters.values()
    return [_checked(function.__name__, p, v) for p, v in zip(parameters, values, strict=False)]


def split(args, options) -> tuple[tuple, dict[str, object]]:
    """The tensors, and the options by name, for the call ``op(*tensors, **options)``."""
    count = len(args) - len(options)
    return args[:count], dict(zip(options, args[count:], strict=True))


def documented(**texts):
    """A decorator that puts ``text`` into the place of ``{name}`` in a docstring: what several functions say alike."""

    def decorate(function):
        for name, text in texts.items():
            function.__doc__ = function.__doc__.replace(f"{{{name}}}", text)
        return function

    return decorate


def described(options: Iterable[tuple[str, object]]) -> str:
    """The options of a module for its repr; of tensors with several elements, the shape."""

    def short(value):
        if not isinstance(value, Tensor):
            return repr(value)
        return f"{value.item():.4g}" if value.numel() == 1 and not value.is_meta else f"<{tuple(value.shape)}>"

    return ", ".join(f"{name}={short(value)}" for name, value in options)


class FunctionModule(nn.Module):
    """Base of modules that call a public function: ``class M(FunctionModule, function=f)``.

    The constructor takes the function's options, and its class weights ``weight``, if it has them. Each becomes an
    attribute that may be changed later: a buffer of a tensor, a parameter of an nn.Parameter.
    """

    if TYPE_CHECKING:

        def __init__(self, *args: Any, **kwargs: Any) -> None: ...

    def __init_subclass__(cls, function=None, **kwargs) -> None:
        super().__init_subclass__(**kwargs)
        if function is None:
            return
        parameters = inspect.signature(function).parameters
        own = [inspect.Parameter("self", inspect.Parameter.POSITIONAL_ONLY)]
        if "weight" in parameters:
            own.append(parameters["weight"].replace(kind=inspect.Parameter.POSITIONAL_OR_KEYWORD, default=None))
        signature = inspect.Signature([*own, *(parameters[name] for name in options_of(function))])

        def __init__(self, *args, **kwargs) -> None:
            super(cls, self).__init__()
            arguments = signature.bind(self, *args, **kwargs)
            arguments.apply_defaults()
            for name in self._names:
                self._set_option(name, arguments.arguments[name])

        __init__.__signature__ = signature
        cls.__init__ = __init__
        cls._function = staticmethod(function)
        cls._names = tuple(signature.parameters)[1:]

    def _set_option(self, name, value) -> None:
        if name == "weight" or (isinstance(value, Tensor) and not isinstance(value, nn.Parameter)):
            self.register_buffer(name, value)
        else:
            setattr(self, name, value)

    def __setattr__(self, name, value) -> None:
        if name != "weight" and not isinstance(value, Tensor):  # a number may take the place of a tensor
            self.__dict__.get("_buffers", {}).pop(name, None)
        super().__setattr__(name, value)

    def _arguments(self) -> dict[str, object]:
        return {name: getattr(self, name) for name in self._names}

    def extra_repr(self) -> str:
        return described((name, value) for name, value in self._arguments().items() if name != "weight")
