"""Shared by row maps: functions that map each row along ``dim`` to a row of the same length."""

import torch
from torch import Tensor
from torch.compiler import is_compiling, is_dynamo_compiling

from torch_softmax_ext import _C
from torch_softmax_ext._numbers import is_dynamic, to_tensor
from torch_softmax_ext._options import FunctionModule, checked, documented

ROW_MAPS: list[str] = []  # their names

# What the docstrings of all maps say.
_ARGUMENTS = """input: logits :math:`x` of any shape and strides; float32, float64, float16 or bfloat16. Half types
            are computed in float32.
        dim: the dimension along which the result sums to 1.
        temperature: a positive number, or one for each row: a tensor that broadcasts to ``input`` and has size 1 along
            ``dim``, with gradient; its values are not checked.
        mask: broadcasts to ``input``. Boolean: where it is False the logit counts as ``-inf``, whatever it is.
            Floating point: is added to the logits after the temperature, with gradient.
        dtype: of the result; the arithmetic is at least as wide. Default: ``input``'s."""
_PROBABILITIES = """Probabilities of ``input``'s shape. A logit of ``-inf`` gets 0. A row of ``-inf`` alone gives
        zeros and a zero gradient. A NaN or ``+inf`` that is not masked makes its own row NaN."""
_ERRORS = """IndexError: ``dim`` is out of range.
        NotImplementedError: ``input``, ``dtype`` or a tensor of numbers is not one of the four dtypes.
        RuntimeError: a tensor does not broadcast to ``input``, or is on another device.
        TypeError: an argument has another type.
        ValueError: ``temperature`` is a number that is not positive."""


documented_map = documented(arguments=_ARGUMENTS, probabilities=_PROBABILITIES, errors=_ERRORS)


def number_and_tensor(value) -> tuple:
    """Of a temperature or an alpha: the number, or 1 and the tensor that replaces it. A number that torch.compile has
    seen change is a tensor, too."""
    if is_dynamo_compiling() and not isinstance(value, Tensor) and is_dynamic(value):
        value = to_tensor(value)
    return (1.0, value) if isinstance(value, Tensor) else (value, None)


def row_map(function):
    """The body of the public function ``function(input, [alpha,] dim, …)``: plain tensors take the short way into the
    dispatcher; everything else is checked and goes through torch.ops. Also registers the rule of torch.func.vmap."""
    ROW_MAPS.append(function.__name__)
    op = getattr(torch.ops.torch_softmax_ext, function.__name__).default
    short_way = getattr(_C, function.__name__)  # plain tensors only, else NotImplemented

    def arguments(input, dim, temperature, mask, dtype, *alpha):
        """In the order of the operator's schema, which has numbers and the tensors that replace them one by one."""
        number, row_temperature = number_and_tensor(temperature)
        of_alpha = number_and_tensor(*alpha) if alpha else ()
        return (input, dim, row_temperature, mask, number, dtype, *of_alpha)

    def call(input, dim, temperature, mask, dtype, *alpha):
        if not is_dynamo_compiling():
            result = short_way(*arguments(input, dim, temperature, mask, dtype, *alpha))
            if result is not NotImplemented:
                return result
        if not is_compiling():
            values = (input, *alpha, dim, temperature, mask, dtype)
            input, *alpha, dim, temperature, mask, dtype = checked(function, values)
        return op(*arguments(input, dim, temperature, mask, dtype, *alpha))

    @torch.library.register_vmap(op)
    def vmap(info, in_dims, input, dim=-1, row_temperature=None, mask=None, *numbers):
        """A batch is one more dimension of rows. Each scalar of a batch of scalars is a row of one element."""
        in_dims = (*in_dims, *[None] * (8 - len(in_dims)))  # those of defaults are missing
        rank = input.dim() - (in_dims[0] is not None)

        if not -max(rank, 1) <= dim < max(rank, 1):
            expected = f"[{-max(rank, 1)}, {max(rank, 1) - 1}]"
            raise IndexError(f"{function.__name__}: dim: expected a dimension in {expected} under vmap, got {dim}")

        def with_batch(t, batch_dim):
            """The batch first, and as many dimensions as input has."""
            if t is None or batch_dim is None:
                return t
            t = t.movedim(batch_dim, 0)
            return t.reshape(t.shape[0], *[1] * (max(rank, 1) - t.dim() + 1), *t.shape[1:])

        if in_dims[0] is None:
            input, in_dims = input.expand(info.batch_size, *input.shape), (0, *in_dims[1:])
        x, t, m = (
            with_batch(*pair)
            for pair in zip((input, row_temperature, mask), (*in_dims[:1], *in_dims[2:4]), strict=True)
        )
        *numbers, row_alpha = numbers if len(numbers) == 4 else (*numbers, None)
        if row_alpha is not None:
            numbers.append(with_batch(row_alpha, in_dims[7]))
        result = op(x, (dim % max(rank, 1)) + 1, t, m, *numbers)
        return (result if rank > 0 else result.squeeze(1)), 0

    return call


class RowMapModule(FunctionModule):
    """Base of modules that call a row map: ``class Softmax(RowMapModule, function=softmax)``."""

    def forward(self, input: Tensor, mask: Tensor | None = None) -> Tensor:
        return self._function(input, mask=mask, **self._arguments())
