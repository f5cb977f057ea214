"""What row maps share: functions that give each row along ``dim`` a row of the same length."""

import torch
from torch import Tensor
from torch.compiler import is_compiling, is_dynamo_compiling

from torch_softmax_ext import _C
from torch_softmax_ext._options import FunctionModule, checked


def row_map(function):
    """The operator of a public function ``(input, dim, …)``, whose body calls it: plain tensors take the short way into
    the dispatcher, all else is checked and goes through torch.ops. Also registers the rule of torch.func.vmap."""
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
        """A batch is one more dimension of rows; a batch of scalars is a row of one element each."""
        x = input.movedim(in_dims[0], 0)
        if x.dim() == 1:
            return op(x.unsqueeze(1), 1, **options).squeeze(1), 0
        return op(x, dim + 1 if dim >= 0 else dim, **options), 0

    return call


class RowMapModule(FunctionModule):
    """A row map as a module: ``class Softmax(RowMapModule, function=softmax)``."""

    def forward(self, input: Tensor) -> Tensor:
        return self._function(input, **self._arguments())
