"""Shared by the rules of torch.func.vmap."""

import torch


def one_by_one(op, info, in_dims, args, options):
    """Calls ``op`` once for each element of the batch, and stacks the results."""
    results = [
        op(*(a if d is None else a.select(d, i) for a, d in zip(args, in_dims, strict=True)), **options)
        for i in range(info.batch_size)
    ]
    if isinstance(results[0], torch.Tensor):
        return torch.stack(results), 0
    return tuple(torch.stack(r) for r in zip(*results, strict=True)), (0,) * len(results[0])
