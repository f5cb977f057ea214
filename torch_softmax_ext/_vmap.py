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


def batch_as_rows(info, in_dims, input, target):
    """Logits and targets of a batch of losses as those of one loss, and the shape of the loss of each row. Elements of
    shape (C) have targets of shape () or (1)."""

    def batched(t, dim):
        return t.movedim(dim, 0) if dim is not None else t.expand(info.batch_size, *t.shape)

    x, t = batched(input, in_dims[0]), batched(target, in_dims[1])
    has_classes = not t.is_floating_point()
    if t.dtype == torch.uint8:  # which cannot hold ignore_index
        t = t.int()
    shape = t.shape if has_classes else x.select(min(2, x.dim() - 1), 0).shape
    if x.dim() == 2:
        x, shape = x.unsqueeze(1), (info.batch_size,)
        t = t.reshape(info.batch_size, 1) if has_classes else t.unsqueeze(1)
    return x.flatten(0, 1), t.flatten(0, 1), shape
