"""torch.compile, torch.export, AOTInductor and compiled autograd: static and dynamic, without graph breaks."""

import inspect
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import specs
from torch._dynamo.testing import CompileCounterWithBackend
from torch._inductor import config as inductor_config

from torch_softmax_ext.testing import SPECS

pytestmark = pytest.mark.not_on_host  # nothing here depends on the kernels


@pytest.fixture(autouse=True)
def _fresh():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def batch(spec, rows, device="cpu", dtype=torch.float32):
    x = torch.randn(rows, 30, device=device, dtype=dtype)
    return x, tuple(a.to(device) for a in spec.bench_args(x))


def value_and_grad(function, x, *args, **options):
    x = x.detach().requires_grad_()
    y = function(x * 1.5, *args, **options)
    return y.detach(), torch.autograd.grad(y.square().sum(), x)[0]


@specs
@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_compiles_without_graph_breaks(spec, device, dynamic, dtype):
    compiled = torch.compile(spec.op, fullgraph=True, dynamic=dynamic)
    x, args = batch(spec, 7, device, dtype)
    for got, want in zip(value_and_grad(compiled, x, *args), value_and_grad(spec.op, x, *args), strict=True):
        torch.testing.assert_close(got, want)
    with torch.no_grad():
        torch.testing.assert_close(compiled(x, *args), spec.op(x, *args))


@specs
def test_batch_sizes_share_a_graph(spec, device):
    """The second batch size compiles a graph for every size: the operators do not specialise on one."""
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(spec.op, fullgraph=True, backend=counter)
    for rows in (7, 9, 16, 33):
        x, args = batch(spec, rows, device)
        for got, want in zip(value_and_grad(compiled, x, *args), value_and_grad(spec.op, x, *args), strict=True):
            torch.testing.assert_close(got, want)
    assert counter.frame_count == 2


@specs
def test_the_graph_holds_the_operator(spec, device):
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph

    x, args = batch(spec, 7, device)
    torch.compile(spec.op, fullgraph=True, backend=backend)(x, *args)
    assert [n.target for n in graphs[0].graph.nodes if n.op == "call_function"] == [spec.overload]


def with_compiled_autograd(function):
    torch._dynamo.reset()
    with torch._dynamo.compiled_autograd._enable(torch.compile(backend="aot_eager", fullgraph=True)):
        return function()


NUMBERS = ("label_smoothing", "z_loss_weight", "softcap", "temperature", "chunk_size")
VALUES = dict(zip(NUMBERS, (0.1, 0.2, 5.0, 0.7, 3), strict=True))


def options_of(function):
    """Each option alone, each reduction, and all options together."""
    names = inspect.signature(function).parameters
    numbers = {name: value for name, value in VALUES.items() if name in names}
    yield {}
    for name, value in numbers.items():
        yield {name: value}
    for reduction in ("none", "mean", "sum") if "reduction" in names else ():
        yield {"reduction": reduction}
        yield {"reduction": reduction, **numbers}
    if "inplace_backward" in names:
        yield {"inplace_backward": True}
        yield {"inplace_backward": True, "reduction": "none", **numbers}


OPTIONS = [(spec, options) for spec in SPECS for options in options_of(spec.op)]


@pytest.mark.parametrize(("spec", "options"), OPTIONS, ids=lambda v: getattr(v, "name", None) or str(v))
def test_compiled_autograd(spec, options, device):
    x, args = batch(spec, 7, device)

    def run():
        return value_and_grad(spec.op, x, *args, **options)

    torch.testing.assert_close(with_compiled_autograd(run), run())


class Wrapper(torch.nn.Module):
    def __init__(self, op):
        super().__init__()
        self.op = op

    def forward(self, x, *args):
        return self.op(x, *args)


@specs
def test_export_with_dynamic_batch(spec, device):
    x, args = batch(spec, 7, device)
    rows = torch.export.Dim("rows", min=2, max=1000)
    shapes = {
        "x": {0: rows},
        **({"args": tuple({0: rows} if len(a) == len(x) else None for a in args)} if args else {}),
    }
    program = torch.export.export(Wrapper(spec.op), (x, *args), dynamic_shapes=shapes)
    assert spec.overload in [n.target for n in program.graph.nodes]
    for size in (7, 12):
        x, args = batch(spec, size, device)
        assert torch.equal(program.module()(x, *args), spec.op(x, *args))
        assert torch.equal(program.run_decompositions().module()(x, *args), spec.op(x, *args))


LOAD_AND_RUN = """
import sys, torch, torch_softmax_ext
package, inputs, output = sys.argv[1:]
torch.save(torch._inductor.aoti_load_package(package)(*torch.load(inputs)), output)
"""


@pytest.mark.parametrize(  # ten seconds each
    "spec", [SPECS[0], *(pytest.param(s, marks=pytest.mark.full) for s in SPECS[1:])], ids=lambda s: s.name
)
def test_aot_inductor(spec, device, tmp_path):
    """The package is loaded in another process."""
    x, args = batch(spec, 7, device)
    program = torch.export.export(Wrapper(spec.op), (x, *args))
    with inductor_config.patch({"compile_threads": 1}):
        package = torch._inductor.aoti_compile_and_package(program, package_path=str(tmp_path / "model.pt2"))
    torch.save((x, *args), tmp_path / "inputs.pt")
    out = subprocess.run(
        [sys.executable, "-c", LOAD_AND_RUN, package, tmp_path / "inputs.pt", tmp_path / "output.pt"],
        cwd=Path(__file__).parent.parent,
        capture_output=True,
        text=True,
    )
    assert out.returncode == 0, out.stderr[-2000:]
    assert torch.equal(torch.load(tmp_path / "output.pt"), spec.op(x, *args))
