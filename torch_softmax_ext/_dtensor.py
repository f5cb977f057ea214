"""Sharding rules for DTensor. Every dimension but that of the classes may be sharded; each rank computes its own rows.

Losses summed over rows are partial sums. A mean or an accuracy needs a divisor from all ranks, so it is computed as a
sum and divided by the total weight or number of counted targets (:func:`mean`, :func:`metrics`). The operators
themselves divide by what they see, so with reduction "mean" their inputs are replicated. A sharded class dimension
raises.
"""

import math
import sys

import torch

from torch_softmax_ext._row_map import ROW_MAPS
from torch_softmax_ext._when_imported import when_imported

_ops = torch.ops.torch_softmax_ext
ENTMAX_LOSSES: list[str] = []  # their names; their file adds them


def is_sharded(input) -> bool:
    """Whether a mean needs a divisor from all ranks."""
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(input, module.DTensor) and any(p.is_shard() for p in input.placements)


def _mean_as_sum(target, weight, options, class_dim):
    """The options of a sum, and what it is divided by. The z-loss is divided by the number of targets, all else by
    their weight, so its weight is scaled by the ratio of the two."""
    options = {**options, "reduction": "sum"}
    if target.is_floating_point():
        return options, target.numel() // target.shape[class_dim]
    counted = target.long() != options["ignore_index"]
    count = counted.sum()
    if weight is None:
        return options, count
    total = (weight[target.long().where(counted, 0)] * counted).sum()
    if options["z_loss_weight"] != 0:
        ratio = (total / count).full_tensor().item()
        options["z_loss_weight"] *= ratio if math.isfinite(ratio) else 1  # where nothing counts the mean is NaN anyway
    return options, total


def mean(op, tensors, options, target, class_dim, weight=None):
    """``op`` with reduction "mean" over the rows of all ranks. ``weight``: the class weights, if it has any."""
    options, total = _mean_as_sum(target, weight, options, class_dim)
    return op(*tensors, **options) / total


def metrics(input, target, weight, **options):
    """cross_entropy_with_metrics over the rows of all ranks."""
    class_dim = min(1, input.dim() - 1)
    is_mean = options["reduction"] == "mean"
    if is_mean:
        options, total = _mean_as_sum(target, weight, options, class_dim)
    loss, z_loss, lse, _, predictions = _ops.cross_entropy_with_metrics.default(input, target, weight, **options)
    if is_mean:
        loss, z_loss = loss / total, z_loss / total
    if target.is_floating_point():
        right = predictions == target.argmax(class_dim)
        count = right.numel()
    else:
        counted = target.long() != options["ignore_index"]
        right, count = (predictions == target) & counted, counted.sum()
    return loss, z_loss, lse, (right.sum() / count).float(), predictions


def _register():
    from torch.distributed.tensor import DTensor, Partial, Replicate, Shard
    from torch.distributed.tensor._op_schema import RuntimeSchemaInfo
    from torch.distributed.tensor.experimental import register_sharding

    propagator = DTensor._op_dispatcher.sharding_propagator

    def rule(overload):
        """As register_sharding, but the cache of placements also depends on ``reduction``, which is not an int."""

        def register(function):
            register_sharding(overload)(function)
            info = RuntimeSchemaInfo(static_argnum=1, static_kwargkey=["ignore_index", "reduction"], needs_pytree=True)
            propagator.register_op_strategy(overload, propagator.op_strategy_funcs[overload], info)

        return register

    def refuse_sharded(op, argument, spec, dim, what="classes"):
        if spec is not None and any(p.is_shard(dim % max(1, len(spec.shape))) for p in spec.placements):
            raise NotImplementedError(
                f"{op}: {argument}: expected a dimension of {what} that is not sharded, got {spec.placements}"
            )

    def present(specs, shards):
        """Placements for the tensors that are given; None for an optional tensor that is not."""
        return [None if s is None else p for s, p in zip(specs, shards, strict=True)]

    def is_by_rows(stats):
        """Whether each rank holds the statistics of its own rows. They are never redistributed."""
        return any(p.is_shard() for p in stats.placements)

    def with_rows(dims, results, tensors, shard):
        """All strategies: everything replicated, or rows sharded along one of `dims`, for which shard(dim) gives the
        placements of results and tensors."""
        yield [Replicate()] * results, present(tensors, [Replicate()] * len(tensors))
        for dim in dims:
            of_results, of_tensors = shard(dim)
            yield of_results, present(tensors, of_tensors)

    # ---- losses: logits have one dimension more than rows: the classes, dimension 1 ----------------------------------

    def class_loss(name, results, input, target, reduction):
        dims = [] if reduction == "mean" else [d for d in range(len(input.shape)) if d != 1 and len(input.shape) > 1]
        refuse_sharded(name, "input", input, 0 if len(input.shape) == 1 else 1)
        has_classes = len(target.shape) == len(input.shape) and len(input.shape) > 1

        def shard(dim):
            row = Shard(dim if dim == 0 else dim - 1)
            loss = row if reduction == "none" else Partial()
            of = {"loss": loss, "stats": Shard(0), "grad_input": Shard(dim), "row": row, "accuracy": Partial("avg")}
            return [of[r] for r in results], row, Shard(dim) if has_classes else row

        return dims, shard

    for overload, results in (
        (_ops.cross_entropy.default, ["loss"]),
        (_ops._cross_entropy_forward.default, ["loss", "stats"]),
        (_ops.cross_entropy_with_metrics.default, ["loss", "loss", "row", "accuracy", "row"]),
        (_ops._cross_entropy_metrics_forward.default, ["loss", "stats", "loss", "row", "accuracy", "row"]),
    ):

        @rule(overload)
        def _(input, target, weight=None, ignore_index=-100, reduction="mean", *numbers, results=results, **options):
            dims, shard = class_loss("cross_entropy", results, input, target, reduction)

            def placed(dim):
                of_results, _, of_target = shard(dim)
                return of_results, [Shard(dim), of_target, Replicate()]

            return list(with_rows(dims, len(results), [input, target, weight], placed))

    @rule(_ops._cross_entropy_backward.default)
    def _(grad_output, grad_lse, input, target, stats, weight, ignore_index, reduction, *numbers):
        dims, shard = class_loss("cross_entropy", ["grad_input"], input, target, reduction)

        def placed(dim):
            results, row, of_target = shard(dim)
            of_grad = row if reduction == "none" else Replicate()
            return results, [of_grad, row, Shard(dim), of_target, Shard(0), Replicate()]

        tensors = [grad_output, grad_lse, input, target, stats, weight]
        return list(with_rows(dims if is_by_rows(stats) else [], 1, tensors, placed))

    def of_broadcast(tensors, dim, rank):
        """The placements of tensors, or None, that broadcast to `rank` dimensions, of which `dim` is sharded."""
        placements = []
        for t in tensors:
            own = -1 if t is None else dim - rank + len(t.shape)
            placements.append(Shard(own) if own >= 0 and t.shape[own] != 1 else Replicate())
        return placements

    for name in ENTMAX_LOSSES:
        for overload, results in (
            (getattr(_ops, name).default, ["loss"]),
            (getattr(_ops, f"_{name}_forward").default, ["loss", "row"]),
        ):

            @rule(overload)
            def _(input, target, ignore_index=-100, reduction="mean", *alpha, name=name, results=results):
                dims, shard = class_loss(name, results, input, target, reduction)

                def placed(dim):
                    of_results, _, of_target = shard(dim)
                    return of_results, [Shard(dim), of_target, *of_broadcast(alpha[1:], dim, len(input.shape))]

                return list(with_rows(dims, len(results), [input, target, *alpha[1:]], placed))

        @rule(getattr(_ops, f"_{name}_backward").default)
        def _(grad_output, input, target, stats, ignore_index, reduction, *alpha, name=name):
            dims, shard = class_loss(name, ["grad_input"], input, target, reduction)

            def placed(dim):
                results, row, of_target = shard(dim)
                of_grad = row if reduction == "none" else Replicate()
                return results, [of_grad, Shard(dim), of_target, row, *of_broadcast(alpha[1:], dim, len(input.shape))]

            return list(with_rows(dims, 1, [grad_output, input, target, stats, *alpha[1:]], placed))

    # ---- linear_cross_entropy: the gradients of weight and bias are partial sums ------------------------------------

    def linear(input, linear_weight, target, linear_bias, weight, reduction, wanted=()):
        refuse_sharded("linear_cross_entropy", "linear_weight", linear_weight, 0)
        refuse_sharded("linear_cross_entropy", "linear_bias", linear_bias, 0)
        tensors = [input, linear_weight, target, linear_bias, weight]

        def shard(dim):
            loss = Shard(dim) if reduction == "none" else Partial()
            gradients = [
                p if w else Replicate() for p, w in zip((Shard(dim), Partial(), Partial()), wanted, strict=False)
            ]
            return [loss, *gradients], [Shard(dim), Replicate(), Shard(dim), Replicate(), Replicate()]

        dims = range(len(input.shape) - 1) if reduction != "mean" else ()
        return dims, tensors, shard

    @rule(_ops.linear_cross_entropy.default)
    def _(input, linear_weight, target, linear_bias=None, weight=None, *, reduction="mean", **options):
        dims, tensors, shard = linear(input, linear_weight, target, linear_bias, weight, reduction)
        return list(with_rows(dims, 1, tensors, shard))

    @rule(_ops._linear_cross_entropy_forward.default)
    def _(input, linear_weight, target, linear_bias, weight, ignore_index, reduction, *rest):
        dims, tensors, shard = linear(input, linear_weight, target, linear_bias, weight, reduction, rest[-3:])
        return list(with_rows(dims, 4, tensors, shard))

    @rule(_ops._linear_cross_entropy_backward.default)
    def _(grad_output, input, linear_weight, target, linear_bias, weight, ignore_index, reduction, *rest):
        dims, tensors, shard = linear(input, linear_weight, target, linear_bias, weight, reduction, rest[-3:])

        def placed(dim):
            (loss, *gradients), of_tensors = shard(dim)
            return gradients, [loss, *of_tensors]

        return list(with_rows(dims, 3, [grad_output, *tensors], placed))

    # ---- selective_log_softmax --------------------------------------------------------------------------------------

    def selective(input):
        refuse_sharded("selective_log_softmax", "input", input, len(input.shape) - 1)
        return range(len(input.shape) - 1)

    for overload, results in (
        (_ops.selective_log_softmax.default, 1),
        (_ops.selective_log_softmax_with_entropy.default, 2),
    ):

        @rule(overload)
        def _(input, index, *, results=results, **options):
            rows = lambda dim: ([Shard(dim)] * results, [Shard(dim)] * 2)  # noqa: E731
            return list(with_rows(selective(input), results, [input, index], rows))

    @rule(_ops._selective_log_softmax_forward.default)
    def _(input, index, entropy, *numbers):
        def rows(dim):
            return [Shard(dim), Shard(dim) if entropy else Replicate(), Shard(1)], [Shard(dim)] * 2

        return list(with_rows(selective(input), 3, [input, index], rows))

    @rule(_ops._selective_log_softmax_backward.default)
    def _(grad_logp, grad_entropy, input, index, stats, *numbers):
        rows = lambda dim: ([Shard(dim)], [*[Shard(dim)] * 4, Shard(1)])  # noqa: E731
        dims = selective(input) if is_by_rows(stats) else []
        return list(with_rows(dims, 1, [grad_logp, grad_entropy, input, index, stats], rows))

    # ---- row maps ---------------------------------------------------------------------------------------------------

    def row_map(name, tensors, broadcast, dim):
        """tensors: of the result's shape; broadcast: those that broadcast to it, or None."""
        rank = len(tensors[0].shape)
        for tensor in tensors:
            refuse_sharded(name, "input", tensor, dim % max(1, rank), what="the result that sums to 1")

        def placed(d):
            return [Shard(d)], [Shard(d)] * len(tensors) + of_broadcast(broadcast, d, rank)

        return list(with_rows([d for d in range(rank) if d != dim % rank], 1, [*tensors, *broadcast], placed))

    for name in ROW_MAPS:

        @rule(getattr(_ops, name).default)
        def _(input, dim=-1, row_temperature=None, mask=None, temperature=1.0, dtype=None, *alpha, name=name):
            return row_map(name, [input], [row_temperature, mask, *alpha[1:]], dim)

        @rule(getattr(_ops, f"_{name}_backward").default)
        def _(grad_output, output, dim, row_temperature, mask, temperature, dtype, *alpha, name=name):
            return row_map(name, [output, output], [row_temperature, mask, *alpha[1:]], dim)


def register() -> None:
    """Registers the rules once the program imports DTensor."""
    when_imported("torch.distributed.tensor", _register)
