"""What benchmarks measure of cross_entropy: fields of its OpSpec."""

import importlib

import torch
import torch.nn.functional as F

import torch_softmax_ext as tse
from torch_softmax_ext.testing.spec import BenchShape, Peer

_BF16 = torch.bfloat16
_TRAINING = ("forward+backward",)
_BOTH = ("forward", "forward+backward")
_NONE = {"reduction": "none"}


def _metrics(input, target):
    """What cross_entropy_with_metrics returns, as one would write it in torch."""
    predictions = input.argmax(1)
    return F.cross_entropy(input, target), input.logsumexp(1), (predictions == target).float().mean(), predictions


def _peer(module, make):
    """Peers are measured with no option but the reduction."""

    def of(options):
        return None if options.keys() - {"reduction"} else make(importlib.import_module(module), **options)

    return of


def _liger(module, reduction="mean"):
    def run(input, target):
        result = module.liger_cross_entropy(input, target, reduction=reduction)
        return result[0] if isinstance(result, tuple) else result

    return run


def _quack(module, reduction="mean"):
    return lambda input, target: module.cross_entropy(input, target, reduction=reduction)


def _flash(module, reduction="mean"):
    def run(input, target):
        losses = module.cross_entropy_loss(input, target)[0]
        return losses if reduction == "none" else losses.mean()

    return run


def _shapes():
    few_classes = (("forward", "eager", 0.7), ("forward+backward", "eager", 0.8))
    yield BenchShape((8, 10), goals=few_classes, gates=dict.fromkeys(_BOTH, 1.03), front=_TRAINING)
    yield BenchShape((4096, 10), goals=few_classes)
    thrice = (("forward+backward", "faster", 3),)
    yield BenchShape((256, 1000), goals=thrice)
    yield BenchShape((4096, 1000), goals=thrice)
    yield BenchShape((8, 21, 256, 256), goals=thrice, gates={"forward": 1.2}, front=_TRAINING)
    for dtype, forward, training, in_place in ((torch.float32, 1.25, 2.5, 1.4), (_BF16, 1.8, 3.5, 2.5)):
        goals = (
            ("forward", "roof", forward),
            ("forward+backward", "roof", training),
            ("in place", "roof", in_place),
            ("accumulation", "plain backward", 1.05),
        )
        yield BenchShape((1024, 32000), dtype, goals=goals, front=_TRAINING)
        yield BenchShape((256, 128256), dtype, goals=goals)
    yield BenchShape((1, 128256), goals=(("forward", "one thread", 1.6),))
    yield BenchShape((2, 200000, 7), gates={"forward": 1.2})
    rows = (1024, 32000)
    smoothing, transformed = {"label_smoothing": 0.1}, {"softcap": 30.0, "z_loss_weight": 1e-4}
    yield BenchShape(rows, label="metrics", modes=("forward",), functions=(tse.cross_entropy_with_metrics, _metrics))
    yield BenchShape(rows, label="smoothing", options=smoothing, modes=_TRAINING)
    yield BenchShape((8, 150, 64, 64), label="smoothing", options=smoothing, modes=_TRAINING)
    yield BenchShape(rows, label="softcap, z-loss", options=transformed, modes=_TRAINING)
    yield BenchShape(rows, label="probabilities", args=lambda x: (torch.rand_like(x).softmax(1),), modes=_TRAINING)


def _cuda_shapes():
    """Vocabularies of language models, and Quack's published shapes, 4.3 GB the largest."""
    for n in (32000, 50256, 50257, 128256, 151936, 262144):
        yield BenchShape((8192, n), _BF16, modes=_TRAINING, front=_TRAINING if n in (32000, 128256, 262144) else ())
    quack = [(32768, 2**k) for k in range(8, 17)] + [(16384, 131072), (8192, 262144)]
    for shape in quack:
        front = ("forward",) if shape[1] == 256 else ()
        yield BenchShape(shape, _BF16, label="none", options=_NONE, modes=("forward",), front=front)
    for n in (32000, 128256):
        yield BenchShape((8192, n), _BF16, label="none", options=_NONE, modes=_BOTH)
    yield BenchShape((8192, 128256), _BF16, modes=("accumulation",))
    for shape in ((4096, 128256), (8, 10), (256, 1000)):
        yield BenchShape(shape, modes=_BOTH)


BENCH = {
    "bench_shapes": tuple(_shapes()),
    "bench_cuda_shapes": tuple(_cuda_shapes()),
    "bench_args": lambda x: (torch.randint(0, x.shape[1], (x.shape[0], *x.shape[2:])),),
    "bench_modes": {"forward": "read", "forward+backward": "copy", "accumulation": "copy", "in place": "copy"},
    "bench_peers": (
        Peer("liger", "liger_kernel", _peer("liger_kernel.transformers.functional", _liger), ("cuda",)),
        Peer("quack", "quack-kernels", _peer("quack.cross_entropy", _quack), ("cuda",)),
        Peer("flash-attn", "flash_attn", _peer("flash_attn.ops.triton.cross_entropy", _flash), ("cuda",)),
    ),
}
