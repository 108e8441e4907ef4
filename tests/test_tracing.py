"""Tracing: the graph computes what the model computes, the model stays as it was, and failures say how to go on."""

from __future__ import annotations

import copy
import operator

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.fx import GraphModule

import fxprune
from fxprune.errors import FxPruneError, TraceError
from fxprune.passes import RemoveInplace
from fxprune.tracing import check_exclude, matches, trace, usable_copy


class Net(nn.Module):
    """Residual add, concatenation, chunk, a shared module, a keyword call and functionals."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(inplace=True))
        self.shared = nn.Conv2d(8, 8, 3, padding=1)
        self.drop = nn.Dropout(0.5)
        self.filter = nn.Parameter(torch.randn(8, 16, 1, 1))
        self.head = nn.Linear(4, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        y = x + self.shared(input=self.drop(x))
        y = torch.cat([y, self.shared(y)], dim=1)
        first, _ = F.conv2d(y, self.filter).chunk(2, dim=1)
        return self.head(F.adaptive_avg_pool2d(first, 1).flatten(1))


class Branch(nn.Module):
    """Control flow that depends on a tensor's value."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(4, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        if x.sum() > 0:
            x = x * 2
        return self.conv(x)


class IsInstance(Branch):
    """A branch that tracing takes wrongly without an error: a Proxy is no Tensor."""

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x * 2 if isinstance(x, Tensor) else x)


class Counter(Branch):
    """State that tracing freezes."""

    calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return self.conv(x * self.calls)


def around(inner: nn.Module) -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 4, 1), nn.Sequential(nn.ReLU(), inner), nn.Conv2d(4, 2, 1))


def images(*shape: int) -> Tensor:
    return torch.randn(*(shape or (2, 3, 8, 8)))


def test_the_graph_computes_the_model_in_eval_mode():
    model, x = Net().train(), images()
    graph_module = trace(model, example=x)
    assert isinstance(graph_module, GraphModule)
    assert not any(module.training for module in graph_module.modules())
    torch.testing.assert_close(graph_module(x), copy.deepcopy(model).eval()(x), rtol=0, atol=0)


def test_the_model_stays_as_it_was():
    model = Net().train()
    model.drop.eval()
    seen = []
    model.head.register_forward_hook(lambda module, args, output: seen.append(type(output)))
    state = copy.deepcopy(model.state_dict())
    flags = [module.training for module in model.modules()]
    inplace = model.stem[2].inplace
    grads = [p.requires_grad for p in model.parameters()]
    graph_module = trace(model, example=images())
    RemoveInplace()(graph_module)
    with torch.no_grad():
        for parameter in graph_module.parameters():
            parameter.zero_()
    torch.testing.assert_close(model.state_dict(), state, rtol=0, atol=0)
    assert [module.training for module in model.modules()] == flags
    assert model.stem[2].inplace is inplace is True
    assert [p.requires_grad for p in model.parameters()] == grads
    assert len(model.head._forward_hooks) == 1
    assert not any(issubclass(kind, torch.fx.Proxy) for kind in seen)


def test_a_graph_module_can_be_traced_again():
    x = images()
    once = trace(Net())
    torch.testing.assert_close(trace(once, example=x)(x), once(x), rtol=0, atol=0)


def test_the_example_and_the_random_state_stay_as_they_were():
    model = nn.Sequential(nn.ReLU(inplace=True), nn.Conv2d(3, 2, 1))
    x = images()
    before, state = x.clone(), torch.get_rng_state()
    trace(model, example=x)
    assert torch.equal(x, before)
    assert torch.equal(torch.get_rng_state(), state)


class TestInplace:
    @pytest.mark.parametrize("name", ["iadd", "isub", "imul", "itruediv"])
    def test_another_name_of_the_same_tensor_sees_the_change(self, name):
        class Alias(nn.Module):
            def forward(self, x: Tensor) -> Tensor:
                y = x * 1.0
                z = y
                z = getattr(operator, name)(z, x + 3)
                return y * 2  # y is z.

        x = images()
        graph_module = trace(Alias(), example=x)
        torch.testing.assert_close(graph_module(x), Alias()(x))
        RemoveInplace()(graph_module)
        torch.testing.assert_close(graph_module(x), Alias()(x))
        before = x * 1.0
        assert not torch.allclose(graph_module(x), before * 2)

    def test_node_names_are_those_of_plain_operators(self):
        class Residual(nn.Module):
            def forward(self, x: Tensor) -> Tensor:
                y = x.relu()
                y += x
                return y

        graph_module = trace(Residual())
        RemoveInplace()(graph_module)
        assert [node.name for node in graph_module.graph.nodes] == ["x", "relu", "add", "output"]
        assert graph_module.graph.find_nodes(op="call_function", target=operator.add)

    def test_numbers_are_counted_up(self):
        class Sizes(nn.Module):
            def forward(self, x: Tensor) -> Tensor:
                n = x.size(2)
                n += 1
                n *= 2
                return x * n

        x = images()
        graph_module = trace(Sizes(), example=x)
        RemoveInplace()(graph_module)
        torch.testing.assert_close(graph_module(x), x * 18)


class TestFailures:
    def test_the_message_names_module_line_and_remedy(self):
        with pytest.raises(TraceError) as caught:
            trace(around(Branch()))
        message = str(caught.value)
        assert "module '1.1' (Branch)" in message
        assert __file__ in message
        assert "if x.sum() > 0:" in message
        assert "exclude=('1.1',)" in message

    def test_in_the_models_own_forward(self):
        with pytest.raises(TraceError, match=r"the model's own forward \(Branch\).*Move that part into a submodule"):
            trace(Branch())

    @pytest.mark.parametrize("exclude", [("1.1",), ("1",), ("1.*",), ("1", "2"), ("*",)])
    def test_the_remedy_works(self, exclude):
        model = around(Branch())
        graph_module = trace(model, exclude=exclude, example=images())
        for x in (images(), -images().abs(), images().abs()):
            torch.testing.assert_close(graph_module(x), model(x))
        targets = {str(node.target) for node in graph_module.graph.find_nodes(op="call_module")}
        assert targets & {"1", "1.1"}
        assert not targets & {"1.1.conv"}

    def test_two_untraceable_modules_are_found_one_after_the_other(self):
        model = nn.Sequential(around(Branch()), nn.Conv2d(2, 3, 1), around(Branch()))
        with pytest.raises(TraceError, match=r"exclude=\('2.1.1',\)"):
            trace(model, exclude=("0.1.1",))
        graph_module = trace(model, exclude=("0.1.1", "2.1.1"))
        x = images()
        torch.testing.assert_close(graph_module(x), model(x))

    def test_an_excluded_module_that_traces_well_is_traced(self):
        graph_module = trace(around(nn.Conv2d(4, 4, 1)), exclude=("1",))
        assert "1.1" in {str(node.target) for node in graph_module.graph.nodes}

    @pytest.mark.parametrize(
        ("exclude", "message"),
        [
            (("layer9",), "'layer9' matches no module of Sequential; names look like '0', '1', '1.0'"),
            (("0", "conv*"), "'conv*' matches no module"),
            ("0", r"write exclude=('0',)"),
        ],
    )
    def test_misspelt_names(self, exclude, message):
        with pytest.raises(FxPruneError) as caught:
            trace(around(nn.ReLU()), exclude=exclude)
        assert message in str(caught.value)

    @pytest.mark.parametrize("not_a_model", [nn.Linear, torch.relu, None, "resnet18", {"weight": 1}])
    def test_what_is_no_module(self, not_a_model):
        with pytest.raises(TraceError, match=r"expected a torch\.nn\.Module"):
            trace(not_a_model)

    @pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
    def test_torchscript(self):
        with pytest.raises(TraceError, match=r"TorchScript.*compile the nn.Module"):
            trace(torch.jit.script(nn.Sequential(nn.ReLU())))

    def test_a_lazy_module_has_no_weights_yet(self):
        with pytest.raises(TraceError, match=r"'0.weight' holds no values yet.*run a lazy model on one batch"):
            trace(nn.Sequential(nn.LazyConv2d(4, 3)))

    def test_a_model_on_the_meta_device_has_no_weights_yet(self):
        with pytest.raises(TraceError, match=r"'weight' holds no values yet.*meta"):
            trace(nn.Linear(3, 3, device="meta"))

    def test_a_model_that_cannot_be_copied(self):
        model = around(nn.ReLU())
        model.log = (line for line in ())
        with pytest.raises(TraceError, match=r"Sequential cannot be copied .*generator"):
            trace(model)


class TestWrongTraces:
    def test_they_are_found_and_placed(self):
        model, x = around(Counter()), images()
        graph_module = trace(model)  # Nothing fails, and without an example nothing is compared.
        model(x)
        assert not torch.allclose(graph_module(x), model(x))
        with pytest.raises(TraceError) as caught:
            trace(model, example=x)
        message = str(caught.value)
        assert "computes something else on the first calibration batch" in message
        assert "after module '1.0' and before '1.1.conv'" in message
        assert "exclude" in message

    @pytest.mark.slow  # torch.export takes seconds.
    def test_torch_export_sees_what_symbolic_tracing_does_not(self):
        model, x = around(IsInstance()), images()
        assert not torch.allclose(trace(model)(x), model(x))
        torch.testing.assert_close(trace(model, example=x)(x), model(x))

    @pytest.mark.parametrize("exclude", [("1.1",), ("1",), ("*",)])
    @pytest.mark.parametrize("inner", [IsInstance, Branch])
    def test_exclude_makes_the_module_a_leaf(self, inner, exclude):
        model, x = around(inner()), images()
        graph_module = trace(model, exclude=exclude, example=x)
        torch.testing.assert_close(graph_module(x), model(x))
        assert "1.1.conv" not in {str(node.target) for node in graph_module.graph.nodes}

    def test_excluding_something_else_does_not_help(self):
        with pytest.raises(TraceError, match=r"computes something else"):
            trace(around(Counter()), exclude=("0", "2"), example=images())

    def test_a_graph_that_fails_where_the_model_does_not(self):
        class Sizes(nn.Module):
            def forward(self, x: Tensor) -> Tensor:
                return x.reshape(len(x) if isinstance(x, Tensor) else 7, -1)

        with pytest.raises(TraceError, match=r"fails on the first calibration batch, and the model does not"):
            trace(Sizes(), example=images())

    def test_a_graph_that_runs_where_the_model_does_not(self):
        class Picky(nn.Module):
            def forward(self, x: Tensor) -> Tensor:
                if isinstance(x, Tensor):
                    raise ValueError("no tensors, please")
                return x

        with pytest.raises(TraceError, match=r"and the model does not: no tensors, please"):
            trace(Picky(), example=images())

    def test_random_operations_see_the_same_numbers(self):
        class Noisy(nn.Module):
            def forward(self, x: Tensor) -> Tensor:
                return F.dropout(x, 0.5)  # training=True by default, also in eval mode

        trace(Noisy(), example=images())

    def test_a_model_for_one_batch_size(self):
        class Fixed(nn.Module):
            def forward(self, x: Tensor) -> Tensor:
                return x.reshape(20, 3, 64)

        trace(Fixed(), example=images(20, 3, 8, 8))

    def test_nan_in_the_output_is_no_difference(self):
        class Log(nn.Module):
            def forward(self, x: Tensor) -> Tensor:
                return x.log()

        trace(Log(), example=images())

    def test_nested_outputs(self):
        class Many(nn.Module):
            def forward(self, x: Tensor) -> dict[str, object]:
                return {"a": x, "b": (x * 2, [x.mean()]), "n": 3}

        trace(Many(), example=images())


class Optional(nn.Module):
    """Arguments with defaults, as timm's and many other models have them."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 1)

    def forward(
        self, x: Tensor, mask: Tensor | None = None, pool: bool = False, times: int = 2, *, mode: str = "sum"
    ) -> Tensor:
        if mask is not None:
            x = x * mask
        for _ in range(times):
            x = x + 1
        x = self.conv(x)
        return x.mean((2, 3)) if pool else x.sum((2, 3)) if mode == "sum" else x


class TestDefaults:
    def test_arguments_that_nobody_gives_keep_their_default(self):
        model, x = Optional(), images()
        graph_module = trace(model, example=x)
        torch.testing.assert_close(graph_module(x), model(x), rtol=0, atol=0)
        assert [node.name for node in graph_module.graph.find_nodes(op="placeholder")] == ["x"]
        torch.testing.assert_close(trace(model)(x), model(x), rtol=0, atol=0)

    def test_an_argument_that_the_batch_gives_is_an_input(self):
        model = Optional()
        batch = {"x": images(), "mask": (images() > 0).float()}
        graph_module = trace(model, example=batch)
        torch.testing.assert_close(graph_module(**batch), model(**batch), rtol=0, atol=0)
        assert not torch.allclose(graph_module(**batch), model(batch["x"]))

    def test_the_user_calls_the_result_with_the_image_only(self):
        model, x = Optional(), images()
        compiled = fxprune.compile(model, [x], "dense", progress=False)
        assert compiled.report["conv"].status == "reconstructed"
        assert compiled(x).shape == model(x).shape


class TestWrappers:
    def test_data_parallel_is_taken_off(self):
        model, x = around(nn.ReLU()), images()
        torch.testing.assert_close(trace(nn.DataParallel(model), exclude=("1",), example=x)(x), model(x))

    @pytest.mark.slow  # Importing torch._dynamo takes seconds.
    def test_torch_compile_is_taken_off(self):
        model, x = around(nn.ReLU()), images()
        torch.testing.assert_close(trace(torch.compile(model), example=x)(x), model(x))

    @pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")
    def test_a_weight_computed_by_a_hook_can_be_copied(self):
        """torch.nn.utils.weight_norm keeps its last result, which deepcopy refuses because it has a history."""
        model = nn.Sequential(nn.utils.weight_norm(nn.Conv2d(3, 4, 1)))
        x = images()
        with pytest.raises(RuntimeError, match=r"deepcopy"):
            copy.deepcopy(model)
        torch.testing.assert_close(trace(model, example=x)(x), model(x))

    def test_pickle_keeps_the_function(self, tmp_path):
        graph_module, x = trace(Net(), example=images()), images()
        torch.save(graph_module, tmp_path / "graph.pt")
        loaded = torch.load(tmp_path / "graph.pt", weights_only=False)
        torch.testing.assert_close(loaded(x), graph_module(x), rtol=0, atol=0)


@pytest.mark.parametrize(
    ("name", "patterns", "expected"),
    [
        ("layer1.0.conv1", ["layer1"], True),
        ("layer1.0.conv1", ["layer1.0"], True),
        ("layer1.0.conv1", ["*.conv1"], True),
        ("layer1.0.conv1", ["layer?"], True),
        ("layer10.conv1", ["layer1"], False),
        ("layer1.0.conv1", ["conv1"], False),
        ("layer1.0.conv1", ["Layer1"], False),
        ("layer1.0.conv1", [], False),
        ("layer1.0.conv1", ["nothing", "layer[12]*"], True),
    ],
)
def test_matches(name, patterns, expected):
    assert matches(name, patterns) is expected


def test_check_exclude_accepts_what_there_is():
    check_exclude(around(nn.ReLU()), ["0", "1.*", "?"])


class TestCopying:
    def test_what_is_shared_stays_shared(self):
        model = nn.Sequential(nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4), nn.Conv2d(4, 4, 3))
        model[2].weight, model.again = model[0].weight, model[0]
        model.table = {"first": model[0], "weight": model[0].weight}
        model[1].hooks_of_mine = model[0]._forward_hooks
        copied = usable_copy(model)
        assert copied[2].weight is copied[0].weight is copied.table["weight"]
        assert copied.again is copied[0] is copied.table["first"]
        assert copied[1].hooks_of_mine is copied[0]._forward_hooks
        assert copied[1].hooks_of_mine is not model[0]._forward_hooks
        assert copied[0].weight is not model[0].weight
        assert not copied[1].training
        assert model[1].training
        copied[0].register_forward_hook(lambda *_: None)
        assert not model[0]._forward_hooks

    @pytest.mark.parametrize("own", ["__deepcopy__", "__getstate__", "__setstate__"])
    def test_a_module_may_have_its_own_way(self, own):
        class Own(nn.Conv2d):
            def __deepcopy__(self, memo):
                return Own(4, 8, 1)

            def __getstate__(self):
                return self.__dict__ | {"told": 1}

            def __setstate__(self, state):
                super().__setstate__(state | {"told": 1})

        for name in {"__deepcopy__", "__getstate__", "__setstate__"} - {own}:
            delattr(Own, name)
        copied = usable_copy(nn.Sequential(Own(4, 4, 1), nn.ReLU()))
        assert copied[0].out_channels == (8 if own == "__deepcopy__" else 4)
        assert hasattr(copied[0], "told") == (own != "__deepcopy__")
