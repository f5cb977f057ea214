"""Shared by the tests of cross_entropy."""

import torch


def logits_and_target(device, rows=40, classes=3000, dtype=torch.float32, scale=3.0):
    x = (torch.randn(rows, classes, dtype=torch.float64) * scale).to(device, dtype)
    target = torch.randint(0, classes, (rows,), device=device)
    target[::7] = -100
    return x, target


def grad(function, x, *args, scale=1.0, **kwargs):
    x = x.detach().requires_grad_()
    z = x * 1  # not a leaf, so that it may be written in place
    loss = function(z, *args, **kwargs) * scale
    loss.sum().backward()
    return loss.detach(), x.grad
