"""Shared by row maps: functions that map each row along ``dim`` to a row of the same length."""

import torch
from torch import Tensor
from torch.compiler import is_compiling, is_dynamo_compiling

from torch_softmax_ext import _C
from torch_softmax_ext._options import FunctionModule, checked

ROW_MAPS: list[str] = []  # their names


def row_map(function):
    """The body of the public function ``function(input, dim, …)``: plain tensors take the short way into the
    dispatcher; everything else is checked and goes through torch.ops. Also registers the rule of torch.func.vmap."""
    ROW_MAPS.append(function.__name__)
    op = getattr(torch.ops.torch_softmax_ext, function.__name__).default
    short_way = getattr(_C, function.__name__)  # plain tensors only, else NotImplemented

    def call(*args):
        if not is_dynamo_compiling():
            result = short_way(*args)
            if result is not NotImplemented:
                return result
        return op(*(args if is_compiling() else checked(function, args)))

    @torch.library.register_vmap(op)
    def vmap(info, in_dims, input, dim=-1, **options):
        """A batch is one more dimension of rows. Each scalar of a batch of scalars is a row of one element."""
        x = input.movedim(in_dims[0], 0)
        if x.dim() == 1:
            return op(x.unsqueeze(1), 1, **options).squeeze(1), 0
        return op(x, dim + 1 if dim >= 0 else dim, **options), 0

    return call


class RowMapModule(FunctionModule):
    """Base of modules that call a row map: ``class Softmax(RowMapModule, function=softmax)``."""

    def forward(self, input: Tensor) -> Tensor:
        return self._function(input, **self._arguments())
