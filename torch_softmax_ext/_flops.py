"""FLOP formulas of linear_cross_entropy, whose matrix products torch's FLOP counters cannot see."""

from math import prod

import torch

from torch_softmax_ext._when_imported import when_imported

_ops = torch.ops.torch_softmax_ext


def _product(input_shape, linear_weight_shape):
    return 2 * prod(input_shape) * linear_weight_shape[0]


def _register():
    from torch.utils.flop_counter import register_flop_formula

    @register_flop_formula(_ops.linear_cross_entropy)
    def linear_cross_entropy(input_shape, linear_weight_shape, *args, out_shape=None, **options):
        return _product(input_shape, linear_weight_shape)

    @register_flop_formula(_ops._linear_cross_entropy_forward)
    def forward(input_shape, linear_weight_shape, *args, out_shape=None, **options):
        *_, grad_input, grad_weight, _ = args  # which gradients the forward pass computes
        return _product(input_shape, linear_weight_shape) * (1 + grad_input + grad_weight)

    @register_flop_formula(_ops._linear_cross_entropy_backward)
    def backward(grad_output_shape, *args, **options):
        return forward(*args)


when_imported("torch.utils.flop_counter", _register)
