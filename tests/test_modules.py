"""Modules: constructors, attributes, repr, pickling and torch.compile, as the functions' signatures ask for."""

import copy
import inspect
import pickle

import pytest
import torch

import torch_softmax_ext as tse
from torch_softmax_ext.testing import SPECS

pytestmark = pytest.mark.not_on_host  # nothing here depends on the kernels
modules = pytest.mark.parametrize("spec", [s for s in SPECS if s.module], ids=lambda s: s.name)


@modules
def test_constructor_takes_the_options_of_the_function(spec):
    of_function = inspect.signature(spec.op).parameters
    of_module = inspect.signature(spec.module).parameters
    tensors = {"input", "target", "linear_weight", "linear_bias", "mask"}
    assert set(of_module) - {"learnable"} == set(of_function) - tensors
    for name, parameter in of_module.items():
        if name == "learnable":
            continue
        assert (parameter.default, parameter.annotation) == (of_function[name].default, of_function[name].annotation)
        assert name == "weight" or parameter.kind == of_function[name].kind
    with pytest.raises(TypeError, match="wrong"):
        spec.module(wrong=1)


@modules
def test_options_are_attributes_and_can_be_changed(spec):
    module = spec.module()
    for name, parameter in inspect.signature(spec.module).parameters.items():
        assert getattr(module, name) == parameter.default
        assert name == "weight" or f"{name}={parameter.default!r}" in repr(module)
    loss = tse.CrossEntropyLoss(temperature=3.0)
    loss.temperature = 2.0
    x, target = torch.randn(4, 3), torch.tensor([0, 1, 2, 0])
    assert torch.equal(loss(x, target), tse.cross_entropy(x, target, temperature=2.0))
    assert torch.equal(tse.Sparsemax(0)(x), tse.sparsemax(x, 0))


def test_loss_is_an_instance_of_torchs_class():
    weight = torch.rand(3)
    module = tse.CrossEntropyLoss(weight, ignore_index=7, label_smoothing=0.1, z_loss_weight=0.1, temperature=2.0)
    assert isinstance(module, torch.nn.CrossEntropyLoss)
    for m in (module, copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        assert repr(m) == repr(module)
        assert "z_loss_weight=0.1" in repr(m)
        assert list(m.state_dict()) == ["weight"]
        x, target = torch.randn(4, 3), torch.tensor([0, 1, 2, 7])
        options = {"ignore_index": 7, "label_smoothing": 0.1, "z_loss_weight": 0.1, "temperature": 2.0}
        assert torch.equal(m(x, target), tse.cross_entropy(x, target, weight, **options))


def test_subclasses_have_their_own_constructors(tmp_path):
    class Warm(tse.CrossEntropyLoss):
        def __init__(self, factor):
            super().__init__(temperature=2.0 * factor)

    assert list(inspect.signature(Warm).parameters) == ["factor"]
    assert Warm(2).temperature == 4.0
    weight = torch.rand(5)
    module = tse.LinearCrossEntropyLoss(weight, chunk_size=2)
    torch.save(module, tmp_path / "module.pt")
    loaded = torch.load(tmp_path / "module.pt", weights_only=False)
    assert torch.equal(loaded.weight, weight)
    assert repr(loaded) == repr(module)


@modules
def test_compiled_modules_have_one_graph(spec):
    torch._dynamo.reset()
    x = torch.randn(6, 7)
    args = spec.bench_args(x)
    module = spec.module()
    compiled = torch.compile(module, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(x, *args), module(x, *args))
    if hasattr(module, "temperature"):
        for module.temperature in (0.5, 0.6, 0.7):
            torch.testing.assert_close(compiled(x, *args), spec.op(x, *args, temperature=module.temperature))
