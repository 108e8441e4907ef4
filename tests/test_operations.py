"""One operation under all its names, and claims of the table checked by what torch computes."""

from __future__ import annotations

import inspect
import math
import operator
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.fx import Graph, GraphModule, Node
from torchvision.ops import stochastic_depth

from fxprune.operations import (
    OPERATIONS,
    Operation,
    bounds_of,
    is_identity,
    memory_of,
    named_arguments,
    operation_of,
    summands,
    writes_in_place,
)

INF = math.inf
ELEMENTWISE = [operation for operation in OPERATIONS if operation.channels == "elementwise" and operation.name]
IN_MODULES = [(module, operation) for operation in OPERATIONS for module in operation.modules]


def called(target: object, *args: object, **kwargs: object) -> Node:
    """The call of a function, of a method by its name, or of a module, with placeholder x as its first argument."""
    graph = Graph()
    x = graph.placeholder("x")
    if isinstance(target, nn.Module):
        root = nn.Module()
        root.layer = target
        node = graph.call_module("layer", (x, *args), kwargs)
        GraphModule(root, graph)  # The owner of the graph, from which modules are looked up.
        node.graph.owning_module = root
        return node
    if isinstance(target, str):
        return graph.call_method(target, (x, *args), kwargs)
    return graph.call_function(target, (x, *args), kwargs)


def name(target: object, *args: object) -> str:
    found = operation_of(called(target, *args))
    return "" if found is None else found.name


FORMS = {
    "relu": (nn.ReLU(), F.relu, F.relu_, torch.relu, torch.relu_, torch.Tensor.relu, "relu", "relu_",
        torch.ops.aten.relu.default),
    "relu6": (nn.ReLU6(), F.relu6),
    "hardswish": (nn.Hardswish(), F.hardswish, torch.ops.aten.hardswish.default),
    "hardtanh": (nn.Hardtanh(), F.hardtanh, F.hardtanh_),
    "silu": (nn.SiLU(), F.silu, torch.ops.aten.silu_.default),
    "gelu": (nn.GELU(), F.gelu),
    "threshold": (nn.Threshold(0, 0), F.threshold, torch.threshold, torch.threshold_),
    "clamp": (torch.clamp, torch.clip, torch.clamp_, "clamp", "clip", "clip_"),
    "add": (torch.add, operator.add, operator.iadd, "add", "add_", "__add__", "__radd__", "__iadd__",
        torch.ops.aten.add.Tensor),
    "dropout": (nn.Dropout(), F.dropout, torch.dropout),
    "linear": (nn.Linear(1, 1), F.linear, torch.ops.aten.linear.default),
    "conv2d": (nn.Conv2d(1, 1, 1), F.conv2d, torch.conv2d),
    "matmul": (torch.matmul, operator.matmul, "matmul", "__matmul__"),
    "max_pool2d": (nn.MaxPool2d(2), F.max_pool2d, torch.max_pool2d),
    "flatten": (nn.Flatten(), torch.flatten, "flatten"),
    "positive": (operator.pos, torch.positive, "positive", "__pos__"),
    "getitem": (operator.getitem, "__getitem__"),
}  # fmt: skip


@pytest.mark.parametrize(("expected", "form"), [(k, form) for k, forms in FORMS.items() for form in forms])
def test_one_operation_under_all_its_names(expected: str, form: object) -> None:
    assert name(form) == expected


def test_every_name_and_module_is_in_one_entry_only() -> None:
    names = [n for operation in OPERATIONS for n in (operation.name, *operation.aliases.split()) if n]
    assert len(names) == len(set(names))
    assert len(IN_MODULES) == len({module for module, _ in IN_MODULES})


HOMES = (torch, F, operator, torch.Tensor)
ELSEWHERE = {
    "alias", "stochastic_depth", "drop_block2d", "drop_block3d", "len", "convolution", "itruediv", "radd", "rsub", "rmul",
    "rtruediv", "rpow", "rmatmul", "iadd", "isub", "imul", "ipow", "imatmul", "multi_dot",
    "zero_pad1d", "zero_pad2d", "zero_pad3d", "reflection_pad1d", "reflection_pad2d", "reflection_pad3d",
    "replication_pad1d", "replication_pad2d", "replication_pad3d", "constant_pad1d", "constant_pad2d", "constant_pad3d",
    "circular_pad1d", "circular_pad2d", "circular_pad3d",
}  # fmt: skip


def test_every_name_is_one_of_torchs() -> None:
    """A misspelt entry would never be found."""
    names = {n for operation in OPERATIONS for n in (operation.name, *operation.aliases.split()) if n} - ELSEWHERE
    assert [n for n in names if not any(hasattr(home, form) for home in HOMES for form in (n, f"{n}_"))] == []


def relu(x: Tensor) -> Tensor:
    return -x


class Renamed(nn.ReLU):
    """Only made in another way."""

    def __init__(self) -> None:
        super().__init__(inplace=True)


class Another(nn.ReLU):
    def forward(self, x: Tensor) -> Tensor:
        return -super().forward(x)


class LeakyIdentity(nn.Identity):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * x


class Padding(nn.Dropout):
    def forward(self, x: Tensor) -> Tensor:
        return x + 1


def test_what_is_not_torchs_own_may_do_anything() -> None:
    assert operation_of(called(relu)) is None
    assert name(Renamed()) == "relu"
    assert bounds_of(called(Another())) is None
    assert not is_identity(called(LeakyIdentity().eval()))
    assert not is_identity(called(Padding().eval()))
    assert memory_of(called(LeakyIdentity())) == "new"


RECTIFIERS: list[tuple[object, tuple[object, ...], dict[str, object], tuple[float, float] | None]] = [
    (nn.Threshold(0.5, -2), (), {}, (0.5, INF)),
    (F.threshold, (0.5, -2), {}, (0.5, INF)),
    (F.threshold, (), {"threshold": 0.5, "value": 0}, (0.5, INF)),
    ("clamp", (0,), {}, (0, INF)),
    ("clip", (), {"max": 6}, (-INF, 6)),
    (torch.clamp, (None, 6), {}, (-INF, 6)),
    (torch.clip, (0,), {"max": 6}, (0, 6)),
    ("clamp_", (0, 6), {}, (0, 6)),
    (torch.clamp_min, (-1,), {}, (-1, INF)),
    ("clamp_min_", (0,), {}, (0, INF)),
    ("clamp_max", (), {"max": 2}, (-INF, 2)),
    (torch.clamp, (), {}, None),
    (torch.clamp, (2, 1), {}, None),
    (F.hardtanh_, (-2,), {}, (-2, 1)),
    (torch.relu_, (), {}, (0, INF)),
    (F.silu, (), {}, None),
]


@pytest.mark.parametrize(("target", "args", "kwargs", "expected"), RECTIFIERS)
def test_bounds(target: object, args: tuple[object, ...], kwargs: dict[str, object], expected: object) -> None:
    node = called(target, *args, **kwargs)
    assert bounds_of(node) == expected
    if expected is None:
        return
    low, high = bounds_of(node) or (0.0, 0.0)
    x = torch.linspace(-10, 10, 401)
    further = torch.where(x < low, x - 3, torch.where(x > high, x + 3, x))
    module = target if isinstance(target, nn.Module) else None
    function = module or (getattr(torch.Tensor, target) if isinstance(target, str) else target)
    torch.testing.assert_close(function(further.clone(), *args, **kwargs), function(x.clone(), *args, **kwargs))
    assert not torch.equal(further, x)


def test_bounds_that_the_graph_computes_are_not_known() -> None:
    node = called("clamp", 0)
    bound = node.graph.placeholder("bound")
    node.args = (node.args[0], bound)
    assert bounds_of(node) is None


IDENTITIES: list[tuple[Callable[..., Tensor] | str, tuple[object, ...], dict[str, object], bool]] = [
    (F.dropout, (), {}, False),
    (F.dropout, (0.5, False), {}, True),
    (F.alpha_dropout, (), {}, True),
    (F.alpha_dropout, (0.5, True), {}, False),
    (F.feature_alpha_dropout, (0.5,), {}, True),
    (torch.dropout, (0.5,), {"train": False}, True),
    (torch.dropout, (0.5, True), {}, False),
    (stochastic_depth, (0.5, "row", False), {}, True),
    (stochastic_depth, (0.5, "row"), {}, False),
    ("clone", (), {}, True),
    (torch.clone, (), {}, True),
    (torch.detach, (), {}, True),
    (operator.pos, (), {}, True),
    ("contiguous", (), {}, True),
]


@pytest.mark.parametrize(("target", "args", "kwargs", "expected"), IDENTITIES)
def test_identities_and_their_memory(
    target: Callable[..., Tensor] | str, args: tuple[object, ...], kwargs: dict[str, object], expected: bool
) -> None:
    node, x = called(target, *args, **kwargs), torch.randn(64, 8)
    function = getattr(torch.Tensor, target) if isinstance(target, str) else target
    result = function(x, *args, **kwargs)
    assert is_identity(node) is expected
    assert torch.equal(result, x) is expected
    shares = result.untyped_storage().data_ptr() == x.untyped_storage().data_ptr()
    assert not (memory_of(node) == "new" and shares)
    assert not (memory_of(node) == "same" and not shares)


@pytest.mark.parametrize("operation", ELEMENTWISE, ids=lambda operation: operation.name)
def test_what_is_elementwise_commutes_with_a_permutation(operation: Operation) -> None:
    found = [getattr(home, operation.name, None) for home in (torch.Tensor, F, torch)]
    function = next(f for f in [*found, stochastic_depth] if f is not None)
    needed = {"threshold": (0.1, 3.0), "clamp": (0, 1), "clamp_min": (0,), "clamp_max": (0,), "to": (torch.float64,)}
    needed |= {"type_as": (torch.zeros(1),), "type": (torch.float64,), "stochastic_depth": (0.5, "row", False)}
    if operation.name in ("cuda", "drop_block2d", "drop_block3d"):
        return
    args = needed.get(operation.name, ())
    if operation.training is not None and not args:
        args = (0.5, False)
    dims = {"dropout1d": 3, "dropout3d": 5}.get(operation.name, 4)
    x, order = torch.rand(2, 6, *[3] * (dims - 2)).clamp_min(0.01), torch.randperm(6)
    torch.manual_seed(0)
    torch.testing.assert_close(function(x[:, order], *args), function(x, *args)[:, order])


def test_plain_adds() -> None:
    graph = Graph()
    x, y = graph.placeholder("x"), graph.placeholder("y")
    for node in (
        graph.call_function(torch.add, (x, y)),
        graph.call_function(torch.add, (), {"input": x, "other": y}),
        graph.call_function(torch.add, (x, y), {"alpha": 1, "out": None}),
        graph.call_method("add_", (x, y)),
        graph.call_method("__iadd__", (x, y)),
        graph.call_function(torch.Tensor.add, (x,), {"other": y}),
    ):
        assert summands(node) == (x, y)
    for node in (
        graph.call_function(torch.add, (x, y), {"alpha": 2}),
        graph.call_function(torch.sub, (x, y)),
        graph.call_function(torch.add, (x, y), {"out": x}),
    ):
        assert summands(node) is None


def test_arguments_have_their_names() -> None:
    aten = torch.ops.aten
    assert list(named_arguments(called(F.batch_norm, 1, 2))) == ["input", "running_mean", "running_var"]
    assert list(named_arguments(called(torch.batch_norm, 1, 2))) == ["input", "weight", "bias"]
    assert list(named_arguments(called(aten.batch_norm.default, 1, 2))) == ["input", "weight", "bias"]
    for target in (F.conv_transpose2d, aten.conv_transpose2d.input):
        assert (
            named_arguments(called(target, 1, 2, 3, 4, 5, dilation=6)).items()
            >= {"output_padding": 5, "dilation": 6}.items()
        )
    for target in (operator.matmul, torch.matmul, "matmul", "__matmul__", aten.matmul.default):
        assert named_arguments(called(target, 1))["other"] == 1
    assert list(named_arguments(called("addmm", 1, 2, beta=3))) == ["input", "mat1", "mat2", "beta"]


def test_attributes() -> None:
    assert memory_of(called(getattr, "T")) == "view"
    for attribute in ("shape", "dtype", "device"):
        found = operation_of(called(getattr, attribute))
        assert found is not None
        assert found.is_metadata


@pytest.mark.parametrize(
    ("target", "args", "expected"),
    [
        ("relu_", (), True), (torch.relu_, (), True), (operator.iadd, (1,), True), ("__imul__", (2,), True),
        (F.relu, (True,), True), (F.elu, (0.5, True), True), (nn.ReLU(inplace=True), (), True), (Renamed(), (), True),
        (torch.ops.aten.relu_.default, (), True),
        ("relu", (), False), (operator.and_, (1,), False), ("requires_grad_", (), False), (nn.ReLU(), (), False),
        (F.relu, (), False), ("__add__", (1,), False), (operator.add, (1,), False),
    ],
)  # fmt: skip
def test_in_place(target: object, args: tuple[object, ...], expected: bool) -> None:
    assert writes_in_place(called(target, *args)) is expected


def test_settings_of_functions_are_where_the_table_says() -> None:
    """Positions and keywords, against torch's own signatures."""
    for operation in OPERATIONS:
        function = getattr(F, operation.name, None)
        if not inspect.isfunction(function):
            continue
        parameters = list(inspect.signature(function).parameters.values())
        bounds = [bound for bound in operation.bounds or () if not isinstance(bound, float)]
        for argument in filter(None, (operation.training, *bounds)):
            parameter = parameters[argument.position]
            assert parameter.name == argument.name.split()[0]
            if argument.default is not None:
                assert parameter.default == argument.default
