"""compile() as a user meets it: what goes in, what comes out, what stays as it was, and what is told when it cannot work."""

from __future__ import annotations

import copy
from collections import namedtuple
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.fx import GraphModule
from torch.utils.data import DataLoader, TensorDataset

import fxprune
from fxprune import CompiledModule, FxPruneError, Options, Pattern
from fxprune.errors import CalibrationError, OptionsError, PatternError, SolverError, TraceError
from fxprune.passes import changes, verify

METHODS = ["magnitude", "sparsegpt", "exact_obs", "admm"]


class Net(nn.Module):
    """A small residual CNN with BatchNorm, dropout, a depthwise conv and a 3-channel stem."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU(inplace=True))
        self.conv1, self.bn1 = nn.Conv2d(8, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.conv2, self.bn2 = nn.Conv2d(8, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.depthwise, self.drop = nn.Conv2d(8, 8, 3, groups=8), nn.Dropout(0.5)
        self.head = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        out = F.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        out += x
        return self.head(self.drop(F.relu(self.depthwise(out))).mean((2, 3)))


def net() -> Net:
    """With BatchNorm statistics as after training."""
    model = Net()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_()
            module.running_var.uniform_(0.5, 2)
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias)
    return model.eval()


def images(count: int = 16, size: int = 8) -> Tensor:
    return torch.randn(count, 3, size, size)


def compiled_with(model: nn.Module, loader: object, pattern: str = "2:4", **options: object) -> CompiledModule:
    return fxprune.compile(model, loader, pattern, progress=False, **options)


def statuses(compiled: CompiledModule) -> dict[str, str]:
    return {layer.name: layer.status for layer in compiled.report.layers}


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("pattern", ["2:4", "1:4", "1:2", "0.6"])
def test_a_pruned_graph_module_comes_out(method, pattern):
    model, x = net(), images()
    compiled = compiled_with(model, [x[:10], x[10:]], pattern, method=method)
    assert isinstance(compiled, CompiledModule)
    assert isinstance(compiled, GraphModule)
    assert not any(module.training for module in compiled.modules())
    assert compiled(x).shape == (16, 5)
    assert not torch.allclose(compiled(x), model(x), atol=1e-4)
    for name in ("conv1", "conv2", "head"):
        check = Pattern.parse(pattern).check(compiled.get_submodule(name).weight)
        assert check.ok
        assert check.sparsity == pytest.approx(Pattern.parse(pattern).sparsity, abs=0.02)
    rest = "reconstructed" if method == "admm" else "kept"
    expected = {"stem.0": rest, "conv1": "pruned", "conv2": "pruned", "depthwise": rest, "head": "pruned"}
    assert statuses(compiled) == expected
    assert compiled.report.method == method
    assert compiled.report.pattern == pattern
    assert compiled.report.images == 16
    assert compiled.report.seconds > 0
    verify(compiled)


def test_the_order_of_the_methods():
    """Each step of the method lowers the output error on the calibration set; a swap of any two would show here."""
    model, x = net(), images(256)
    with torch.no_grad():
        errors = [
            float((compiled_with(model, x.split(64), method=method)(x) - model(x)).square().mean())
            for method in ("magnitude", "sparsegpt", "admm")
        ]
    assert errors == sorted(errors, reverse=True)
    assert errors[2] < 0.7 * errors[1] < 0.7 * errors[0]


@pytest.mark.parametrize("permute", [False, True])
def test_the_report_agrees_with_both_models(permute):
    model, x = net().double(), images(200).double()
    compiled = compiled_with(model, x.split(16), options=Options(permute=permute))
    held_out = x[fxprune.Calibration([]).held_out(len(x))]
    before, after = model(held_out), compiled(held_out)
    assert compiled.report.images_held_out == len(held_out) == 20
    assert compiled.report.agreement == pytest.approx(float((before.argmax(1) == after.argmax(1)).double().mean()))
    kl = F.kl_div(after.log_softmax(1), before.log_softmax(1), log_target=True, reduction="batchmean")
    assert compiled.report.kl == pytest.approx(kl.item(), rel=1e-9)
    error = (before - after).square().sum() / (before - before.mean(0)).square().sum()
    assert compiled.report["head"].relative_error == pytest.approx(error.item(), rel=1e-9)
    zeros = sum(int((compiled.get_submodule(n).weight == 0).sum()) for n in statuses(compiled))
    total = sum(compiled.get_submodule(n).weight.numel() for n in statuses(compiled))
    assert compiled.report.sparsity == pytest.approx(zeros / total)


def test_two_runs_give_the_same_weights_and_leave_the_random_state():
    model, x = net(), images()
    state = torch.get_rng_state()
    first, second = (compiled_with(model, [x], method="admm") for _ in range(2))
    torch.testing.assert_close(first.state_dict(), second.state_dict(), rtol=0, atol=0)
    assert torch.equal(torch.get_rng_state(), state)


class TestTheUsersModel:
    @pytest.mark.parametrize("method", ["magnitude", "admm"])
    def test_it_stays_as_it_was(self, method):
        model = net().train()
        model.bn1.eval()  # A frozen BatchNorm inside a training model.
        model.conv1.weight.requires_grad_(False)
        model.stem[2].marker = "mine"
        calls = []
        model.head.register_forward_pre_hook(lambda module, args: calls.append(module))
        state, x = copy.deepcopy(model.state_dict()), images()
        flags = {name: module.training for name, module in model.named_modules()}
        ids = {name: id(parameter) for name, parameter in model.named_parameters()}
        before = x.clone()
        compiled = compiled_with(model, [x], method=method)
        torch.testing.assert_close(model.state_dict(), state, rtol=0, atol=0)
        assert {name: module.training for name, module in model.named_modules()} == flags
        assert {name: id(parameter) for name, parameter in model.named_parameters()} == ids
        assert all(p.grad is None for p in model.parameters())
        assert model.stem[2].inplace
        assert len(model.head._forward_pre_hooks) == 1
        assert model.head not in calls  # The hook runs on the copy.
        assert torch.equal(x, before)
        shared = {p.data_ptr() for p in model.parameters()} & {p.data_ptr() for p in compiled.parameters()}
        assert not shared

    def test_a_training_model_gives_what_its_eval_mode_gives(self):
        model, x = net(), images()
        expected = compiled_with(model, [x])
        torch.testing.assert_close(compiled_with(copy.deepcopy(model).train(), [x])(x), expected(x), rtol=0, atol=0)

    def test_dtype_and_device_stay(self):
        compiled = compiled_with(net().double(), [images().double()], device="cpu")
        assert {p.dtype for p in compiled.parameters()} == {torch.float64}
        assert {p.device.type for p in compiled.parameters()} == {"cpu"}

    @pytest.mark.gpu
    @pytest.mark.parametrize("home", ["cpu", "cuda"])
    @pytest.mark.parametrize("device", [None, "cpu", "cuda"])
    def test_the_result_is_where_the_model_was(self, home, device):
        model, x = net().to(home), images()
        compiled = compiled_with(model, [x], device=device)
        assert {p.device.type for p in compiled.parameters()} == {home}
        reference = compiled_with(copy.deepcopy(model).cpu(), [x], device="cpu")
        assert (compiled(x.to(home)).cpu() - reference(x)).abs().max() < 0.05


Named = namedtuple("Named", "image label")


class TestLoaders:
    forms: dict[str, Callable[[Tensor], object]] = {  # noqa: RUF012
        "tensors": lambda x: list(x.split(5)),
        "tuple of tensors": lambda x: x.split(5),
        "tuples": lambda x: [(part, torch.zeros(len(part))) for part in x.split(5)],
        "lists": lambda x: [[part, torch.zeros(len(part))] for part in x.split(5)],
        "named tuples": lambda x: [Named(part, 0) for part in x.split(5)],
        "nested": lambda x: [((part, 1), {"label": 2}) for part in x.split(5)],
        "dicts": lambda x: [{"image": part, "label": 0} for part in x.split(5)],
        "dicts with the input's name": lambda x: [{"label": "cat", "x": part} for part in x.split(5)],
        "a generator": lambda x: (part for part in x.split(5)),
        "a DataLoader": lambda x: DataLoader(TensorDataset(x, torch.zeros(len(x))), batch_size=5),
        "one batch": lambda x: [x],
        "sizes of all kinds": lambda x: x.split([1, 7, 2, 6]),
        "a map": lambda x: map(lambda part: part, x.split(5)),
    }

    @pytest.mark.parametrize("form", forms)
    def test_every_form_gives_the_same(self, form):
        torch.manual_seed(1)
        model, x = net().double(), images().double()
        expected = compiled_with(model, [x])
        found = compiled_with(model, self.forms[form](x))
        assert found.report.images == 16
        torch.testing.assert_close(found.state_dict(), expected.state_dict(), rtol=1e-6, atol=1e-8)

    def test_image_sizes_may_differ(self):
        compiled = compiled_with(net(), [images(4, 8), images(3, 13), torch.randn(2, 3, 9, 17)])
        assert compiled.report.images == 9
        assert all(layer.relative_error < 1 for layer in compiled.report.layers)

    @pytest.mark.parametrize(
        ("loader", "message"),
        [
            ([], "gave no batches"),
            (iter(()), "gave no batches"),
            (torch.zeros(16, 3, 8, 8), r"a tensor of shape \(16, 3, 8, 8\); give its batches, such as images.split"),
            (TensorDataset(torch.zeros(16, 3, 8, 8)), r"a dataset \(TensorDataset\).*DataLoader"),
            ("images/", "of type str"),
            (None, "of type NoneType"),
            (3, "of type int"),
            ({"x": torch.zeros(16, 3, 8, 8)}, "of type dict"),
            (["a.png"], "batch 0 is a str"),
            ([None], "batch 0 is a NoneType"),
            ([torch.zeros(4, 3, 8, 8).numpy()], r"batch 0 holds a numpy array .* torch.from_numpy"),
            ([torch.full((4, 3, 8, 8), float("nan"))], "batch 0 holds NaN"),
            ([torch.zeros(0, 3, 8, 8)], "batch 0 is empty"),
            ([torch.zeros(4, 1, 8, 8)], r"batch 0.*shapes \[\(4, 1, 8, 8\)\].*to have 3 channels, but got 1"),
            ([torch.zeros(4, 8, 8, 3)], r"batch 0.*shapes \[\(4, 8, 8, 3\)\].*to have 3 channels, but got 8"),
            ([(torch.zeros(4).long(), torch.zeros(4, 3, 8, 8))], r"batch 0.*shapes \[\(4,\)\]"),
            ([torch.zeros(4, 3, 8, 8).long()], r"images are torch.int64 and the weights torch.float32"),
            ([torch.zeros(4, 3, 8, 8).byte()], r"images are torch.uint8 and the weights torch.float32"),
            ([torch.zeros(4, 3, 8, 8).double()], r"images are torch.float64 and the weights torch.float32"),
            ([torch.zeros(4, 3, 1, 1)], "Kernel size can't be greater than actual input size"),
        ],
    )  # fmt: skip
    def test_what_cannot_be_used_is_said(self, loader, message):
        with pytest.raises(CalibrationError, match=message):
            compiled_with(net(), loader)

    def test_a_generator_that_was_read_before(self):
        loader = (part for part in images().split(4))
        compiled_with(net(), loader)
        with pytest.raises(CalibrationError, match="a generator can be read only once"):
            compiled_with(net(), loader)

    def test_a_loader_that_fails_shows_its_own_error(self):
        def broken():
            yield images()
            raise OSError("disk gone")

        with pytest.raises(OSError, match="disk gone"):
            compiled_with(net(), broken())


class TestMistakes:
    @pytest.mark.parametrize(
        ("arguments", "error", "message"),
        [
            ({"pattern": "2.4"}, PatternError, "cannot read the pattern '2.4'"),
            ({"pattern": "4:2"}, PatternError, "0 < N < M"),
            ({"method": "sparsgpt"}, FxPruneError, "unknown method 'sparsgpt'; choose one of"),
            ({"exclude": ("conv9",)}, FxPruneError, "'conv9' matches no module of Net"),
            ({"exclude": "head"}, FxPruneError, r"write exclude=\('head',\)"),
            ({"options": Options(permute=True), "pattern": "0.5"}, OptionsError, "permute"),
        ],
    )
    def test_they_are_told_before_a_layer_is_solved(self, arguments, error, message, monkeypatch):
        monkeypatch.setattr("fxprune.passes.solve_layers.solve_layer", lambda *a: pytest.fail("work was done"))
        with pytest.raises(error, match=message):
            compiled_with(net(), [images()], **arguments)

    @pytest.mark.parametrize("arguments", [{"pattern": "2.4"}, {"method": "sparsgpt"}])
    def test_a_typo_costs_no_batch(self, arguments):
        loader = iter([images()])
        with pytest.raises(FxPruneError):
            compiled_with(net(), loader, **arguments)
        assert len(list(loader)) == 1

    def test_an_untraceable_module_and_its_remedy(self):
        class Branch(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.conv = nn.Conv2d(8, 8, 1)

            def forward(self, x: Tensor) -> Tensor:
                return self.conv(x) if x.mean() > -1e9 else x

        model = net()
        model.stem.append(Branch())
        with pytest.warns(UserWarning, match=r"module 'stem.3' \(Branch\).*exclude=\('stem.3',\)"):
            by_itself = compiled_with(model, [images()])
        compiled = compiled_with(model, [images()], exclude=("stem.3",))
        assert by_itself.report["stem.3.conv"].reason == compiled.report["stem.3.conv"].reason
        assert torch.equal(compiled.get_submodule("stem.3").conv.weight, model.stem[3].conv.weight)
        report = compiled.report["stem.3.conv"]
        assert (report.status, report.reason) == ("kept", "inside 'stem.3' (Branch), which is called as a whole")

    def test_a_wrong_trace_is_no_result(self):
        class Counter(nn.Module):
            def forward(self, x: Tensor) -> Tensor:
                self.calls = getattr(self, "calls", 0) + 1
                return x * self.calls

        model = net()
        model.stem.append(Counter())
        with pytest.raises(TraceError, match="computes something else on the first calibration batch"):
            compiled_with(model, [images()])

    def test_weights_that_are_not_finite(self):
        model = net()
        model.conv2.weight.data[0, 0, 0, 0] = float("nan")
        with pytest.raises((SolverError, FxPruneError), match="NaN"):
            compiled_with(model, [images()])


class TestModels:
    def test_without_a_layer_to_prune(self):
        model = nn.Sequential(nn.ReLU(), nn.AvgPool2d(2), nn.Flatten())
        compiled, x = compiled_with(model, [images()]), images()
        assert torch.equal(compiled(x), model(x))
        assert compiled.report.layers == ()
        assert "0 of 0 layers pruned" in str(compiled.report)

    def test_with_kept_layers_only(self):
        model, x = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ConvTranspose2d(4, 3, 3)), images()
        compiled = compiled_with(model, [x], exclude=("0", "1"))
        assert torch.equal(compiled(x), model(x))
        assert set(statuses(compiled).values()) == {"kept"}
        assert compiled.report["0"].reason == "excluded"
        assert compiled.report.sparsity == 0

    @pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")
    @pytest.mark.parametrize(
        "normalise", [nn.utils.weight_norm, nn.utils.spectral_norm, nn.utils.parametrizations.weight_norm]
    )
    def test_computed_weights_are_pruned_like_others(self, normalise):
        model, x = net(), images()
        model.conv2 = normalise(model.conv2)
        compiled = compiled_with(model, [x])
        assert statuses(compiled)["conv1"] == statuses(compiled)["conv2"] == "pruned"

    def test_attention_is_on_record(self):
        class Attention(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.conv, self.attention = nn.Conv2d(3, 8, 3), nn.MultiheadAttention(8, 2, batch_first=True)
                self.lstm, self.layer = (
                    nn.LSTM(8, 4),
                    nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True),
                )

            def forward(self, x: Tensor) -> Tensor:
                x = self.conv(x).flatten(2).transpose(1, 2)
                return self.lstm(self.layer(self.attention(x, x, x)[0]))[0]

        compiled = compiled_with(Attention(), [images()])
        assert list(statuses(compiled)) == [
            "conv", *(f"attention.{name}_proj" for name in ("q", "k", "v", "out")),
            *(f"layer.self_attn.{name}_proj" for name in ("q", "k", "v", "out")), "layer.linear1", "layer.linear2",
            "lstm.weight_ih_l0", "lstm.weight_hh_l0",
        ]  # fmt: skip
        assert compiled.report["layer.linear1"].shape == (16, 8)
        assert compiled.report["attention.out_proj"].status == "pruned"

    def test_groups_of_an_unstructured_layer_keep_the_share_together(self):
        """Four groups of 36 weights: each rounded by itself to 0.9 would leave more than the layer may."""
        compiled = compiled_with(nn.Sequential(nn.Conv2d(16, 4, 3, groups=4)), [torch.randn(8, 16, 6, 6)], "0.9")
        assert compiled.report["0"].sparsity >= 0.9

    def test_batchnorm_is_folded_or_left(self):
        model, x = net(), images()
        folded, left = (compiled_with(model, [x], options=Options(fold_batchnorm=on)) for on in (True, False))
        kinds = [{type(module) for module in compiled.modules()} for compiled in (folded, left)]
        assert nn.BatchNorm2d not in kinds[0]
        assert nn.BatchNorm2d in kinds[1]
        assert folded.get_submodule("conv1").bias is not None
        assert {"FoldBatchNorm", "SolveLayers"} <= {change.pass_name for change in changes(folded)}

    def test_inputs_that_are_tokens(self):
        class Text(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.embedding, self.conv = nn.Embedding(20, 8), nn.Conv1d(8, 4, 3)

            def forward(self, x: Tensor) -> Tensor:
                return self.conv(self.embedding(x).transpose(1, 2))

        compiled = compiled_with(Text(), [torch.randint(0, 20, (6, 12))])
        assert statuses(compiled) == {"conv": "pruned", "embedding.weight": "kept"}

    @pytest.mark.parametrize("dims", [1, 3])
    def test_other_dimensions(self, dims):
        kind = {1: nn.Conv1d, 3: nn.Conv3d}[dims]
        model = nn.Sequential(kind(4, 8, 3, padding=1), nn.ReLU(), kind(8, 4, 3))
        compiled = compiled_with(model, [torch.randn(4, 4, *[5] * dims)])
        assert statuses(compiled) == {"0": "pruned", "2": "pruned"}
        assert compiled.report["2"].relative_error < 1

    def test_a_single_image(self):
        compiled = compiled_with(net(), [images(1)])
        assert torch.isfinite(compiled(images())).all()


class TestTheResult:
    @pytest.fixture
    def compiled(self) -> CompiledModule:
        return compiled_with(net(), [images()])

    def test_deepcopy(self, compiled):
        other, x = copy.deepcopy(compiled), images()
        assert isinstance(other, CompiledModule)
        assert other.report == compiled.report
        assert torch.equal(other(x), compiled(x))
        other.conv1.weight.data.zero_()
        assert compiled.conv1.weight.any()

    def test_to(self, compiled):
        x = images()
        expected = compiled(x)
        moved = compiled.to(torch.float64)
        assert moved is compiled
        torch.testing.assert_close(moved(x.double()).float(), expected)
        assert moved.report.pattern == "2:4"

    def test_state_dict(self, compiled):
        other, x = copy.deepcopy(compiled), images()
        for parameter in other.parameters():
            parameter.data.zero_()
        other.load_state_dict(compiled.state_dict())
        assert torch.equal(other(x), compiled(x))
        assert "conv1.weight" in compiled.state_dict()
        assert not any("observer" in key for key in compiled.state_dict())

    def test_torch_export(self, compiled):
        x = images()
        batch = torch.export.Dim("batch", min=2)
        program = torch.export.export(compiled, (x,), dynamic_shapes=({0: batch},))
        for size in (16, 3):
            torch.testing.assert_close(program.module()(x[:size]), compiled(x[:size]))

    def test_torch_save_keeps_the_function(self, compiled, tmp_path):
        x = images()
        torch.save(compiled, tmp_path / "compiled.pt")
        assert torch.equal(torch.load(tmp_path / "compiled.pt", weights_only=False)(x), compiled(x))

    def test_gradients_flow(self, compiled):
        compiled(images()).sum().backward()
        assert all(p.grad is not None for p in compiled.parameters())

    def test_compile_again(self, compiled):
        x = images()
        again = compiled_with(compiled, [x], "1:4")
        assert again.report.pattern == "1:4"
        assert statuses(again) == statuses(compiled)
        assert Pattern.parse("1:4").check(again.conv1.weight).ok
        assert compiled.report.pattern == "2:4"
        assert Pattern.parse("2:4").check(compiled.conv1.weight).sparsity == 0.5

    def test_it_is_silent_but_for_the_bar(self, capsys):
        fxprune.compile(net(), [images()], progress=False)
        assert capsys.readouterr() == ("", "")
        fxprune.compile(net(), [images()], progress=True)
        assert capsys.readouterr().out == ""


def test_golden_graph(golden):
    """The whole graph and what is said about each layer; times and figures that depend on the machine left out."""
    torch.manual_seed(0)
    compiled = compiled_with(net(), [images()])
    lines = [
        f"{n.op:<13} {n.name:<12} {getattr(n.target, '__name__', n.target)} {n.args} {n.kwargs}"
        for n in compiled.graph.nodes
    ]
    lines.append("")
    for layer in compiled.report.layers:
        lines.append(
            f"{layer.name:<10} {layer.op:<7} {layer.shape!s:<14} {layer.status:<14} {layer.sparsity:.3f} {layer.reason}"
        )
    lines += [
        "",
        *(f"{c.pass_name:<16} {c.action:<14} {c.node:<10} {c.into:<10} {c.reason}" for c in changes(compiled)),
    ]
    golden("compile/residual.txt", "\n".join(line.rstrip() for line in lines) + "\n")


def test_excluded_layers_stay_exactly_as_they_are_with_their_batchnorm():
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(4, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3)
    ).eval()  # fmt: skip
    before = copy.deepcopy(model.state_dict())
    compiled = fxprune.compile(model, [torch.randn(16, 4, 8, 8)], "2:4", exclude=("3",), progress=False)
    for name in ("3.weight", "3.bias", "4.weight", "4.running_var"):
        assert torch.equal(compiled.state_dict()[name], before[name])
    assert compiled.report["3"].reason == "excluded"
