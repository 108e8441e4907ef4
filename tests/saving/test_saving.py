from __future__ import annotations

import copy
import resource
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
import torchvision
from torch import nn
from torch.fx import GraphModule, symbolic_trace

import fxprune
from fxprune.annotations import annotation
from fxprune.errors import CheckpointError
from fxprune.experiments.checkpoints import save_checkpoint
from fxprune.models import create
from fxprune.passes import changes
from fxprune.saving import is_saved, load, save


def compiled(name: str, size: tuple[int, ...]) -> tuple[fxprune.CompiledModule, torch.Tensor]:
    x = torch.randn(4, *size)
    return fxprune.compile(create(name), [x], method="magnitude", device="cpu", progress=False), x


def round_trip(graph_module: GraphModule, folder: Path, **kwargs: object) -> fxprune.CompiledModule:
    save(graph_module, folder / "model.pt", **kwargs)  # type: ignore[arg-type]
    return load(folder / "model.pt", **kwargs)  # type: ignore[arg-type]


class Odd(nn.Module):
    """Shared and tied weights, buffers, keyword calls, slices, constants: what a file must bring back."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(4, 4, 3, padding="same", padding_mode="reflect")
        self.tied = nn.Conv2d(4, 4, 3, bias=False)
        self.tied.weight = self.conv.weight
        self.norm = nn.BatchNorm2d(4, affine=False)
        self.act = nn.ModuleDict({"a": nn.PReLU(4), "b": nn.Hardtanh(-1.0, float("inf"))})
        self.scale = nn.Parameter(torch.rand(4, 1, 1), requires_grad=False)
        self.register_buffer("shift", torch.rand(1), persistent=False)
        self.order = torch.tensor([3, 1, 0, 2])

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        y = self.act["b"](self.act["a"](self.conv(self.conv(input=x)))) * self.scale + self.shift
        y = F.pad(self.tied(self.norm(y)), (1, 1), value=0.5)[..., ::2].to(dtype=torch.float64)
        y = y.index_select(1, self.order).contiguous(memory_format=torch.channels_last)
        return {"out": torch.flatten(y, 1).view(y.shape[0], -1), "mean": y.mean((2, 3))}


@pytest.mark.parametrize(("name", "size"), [("simple_cnn", (1, 28, 28)), ("resnet20", (3, 32, 32))])
def test_a_compiled_model_comes_back_the_same(name: str, size: tuple[int, ...], tmp_path: Path) -> None:
    before, x = compiled(name, size)
    after = round_trip(before, tmp_path)
    assert isinstance(after, fxprune.CompiledModule)
    assert torch.equal(before(x), after(x))
    assert after.report == before.report
    assert changes(after) == changes(before) != ()
    assert after.code == before.code
    assert str(after.graph) == str(before.graph)
    assert list(after.state_dict()) == list(before.state_dict())
    # The chain of constraints is not stored: it may be of a user's own class.
    notes = [[replace(annotation(n), chain=()) for n in model.graph.nodes] for model in (before, after)]
    assert notes[0] == notes[1]
    assert [(n, type(m), m.training) for n, m in after.named_modules() if n] == [
        (n, type(m), m.training) for n, m in before.named_modules() if n
    ]
    assert after._get_name() == before._get_name()


def test_factored_and_permuted_layers_come_back_the_same(tmp_path: Path) -> None:
    x = torch.randn(16, 1, 28, 28)
    factored = fxprune.low_rank(create("simple_cnn", width=8), [x], device="cpu", progress=False)
    permuted = fxprune.compile(factored, [x], "2:4", device="cpu", progress=False)
    assert any(change.action == "permuted" for change in changes(permuted))
    for before in (factored, permuted):
        after = round_trip(before, tmp_path)
        assert torch.equal(before(x), after(x))
        assert (after.report, changes(after), after.code) == (before.report, changes(before), before.code)
        assert fxprune.diff(before, after).is_empty


@pytest.mark.parametrize("name", ["mobilenet_v3_small", "shufflenet_v2_x0_5", "densenet121", "swin_t", "vit_b_32"])
def test_every_function_of_torchvisions_models_may_be_named(name: str, tmp_path: Path) -> None:
    model = create(name, num_classes=3).eval()
    before = symbolic_trace(model)
    after = round_trip(before, tmp_path)
    size = 224 if name == "vit_b_32" else 32
    x = torch.randn(1, 3, size, size)
    with torch.no_grad():
        assert torch.equal(before(x), after(x))


@pytest.mark.parametrize("name", ["swin3d_t", "mvit_v2_s", "r2plus1d_18"])
def test_the_functions_of_its_video_models_too(name: str, tmp_path: Path) -> None:
    with torch.device("meta"):
        before = symbolic_trace(torchvision.models.get_model(name, num_classes=3).eval())
    after = round_trip(before.to_empty(device="cpu"), tmp_path)
    assert [node.target for node in after.graph.nodes] == [node.target for node in before.graph.nodes]


def test_a_loaded_model_can_be_compiled_copied_and_saved_again(tmp_path: Path) -> None:
    before, x = compiled("simple_cnn", (1, 28, 28))
    after = round_trip(before, tmp_path)
    assert torch.equal(copy.deepcopy(after)(x), before(x))
    again = fxprune.compile(after, [x], "1:4", method="magnitude", device="cpu", progress=False)
    assert round_trip(again, tmp_path).report["conv2"].sparsity == 0.75


def test_odd_graphs_come_back_the_same(tmp_path: Path) -> None:
    before = symbolic_trace(Odd().eval())
    before.same = before.conv  # a second name, called by the second of the two calls
    [node for node in before.graph.nodes if node.target == "conv"][1].target = "same"
    before.recompile()
    after = round_trip(before, tmp_path)
    x = torch.randn(2, 4, 6, 6)
    for key, value in before(x).items():
        assert torch.equal(after(x)[key], value)
    assert after.conv is after.same
    assert after.tied.weight is after.conv.weight
    assert not after.scale.requires_grad
    assert set(after.state_dict()) == set(before.state_dict())
    assert after.act.b.max_val == float("inf")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_number_types_are_kept(dtype: torch.dtype, tmp_path: Path) -> None:
    before, x = compiled("simple_cnn", (1, 28, 28))
    before.to(dtype)
    after = round_trip(before, tmp_path)
    assert after.conv1.weight.dtype == dtype
    assert torch.equal(after(x.to(dtype)), before(x.to(dtype)))


class Gate(nn.Module):
    """A user's module that torch.fx cannot trace, so it stays a leaf."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(1))
        self.least = 0.5

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * self.weight if float(x.sum()) > self.least else x


def user_model() -> tuple[fxprune.CompiledModule, torch.Tensor]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(4, 4, 1), Gate(), nn.Flatten(), nn.Linear(16, 3))
    x = torch.randn(4, 4, 2, 2)
    return fxprune.compile(model, [x], method="magnitude", exclude=("1",), device="cpu", progress=False), x


def test_a_users_leaf_must_be_handed_over(tmp_path: Path) -> None:
    before, x = user_model()
    with pytest.raises(CheckpointError, match=r"module '1' cannot be stored.*Gate.*allow=\(Gate,\)"):
        save(before, tmp_path / "model.pt")
    assert not (tmp_path / "model.pt").exists()
    save(before, tmp_path / "model.pt", allow=(Gate,))
    with pytest.raises(CheckpointError, match=r"Gate.*allow=\(Gate,\)"):
        load(tmp_path / "model.pt")
    assert torch.equal(load(tmp_path / "model.pt", allow=(Gate,))(x), before(x))


def own_function(x: torch.Tensor) -> torch.Tensor:
    return x + 1


torch.fx.wrap("own_function")


def test_a_users_function_must_be_handed_over(tmp_path: Path) -> None:
    class Model(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return own_function(x)

    graph_module = symbolic_trace(Model())
    with pytest.raises(CheckpointError, match=r"node 'own_function'.*allow=\(that function,\)"):
        save(graph_module, tmp_path / "model.pt")
    after = round_trip(graph_module, tmp_path, allow=(own_function,))
    assert after(torch.ones(1)).item() == 2


def test_hooks_and_odd_attributes_are_refused(tmp_path: Path) -> None:
    hooked, _ = compiled("simple_cnn", (1, 28, 28))
    hooked.conv1.register_forward_hook(lambda module, args, output: output * 2)
    with pytest.raises(CheckpointError, match="module 'conv1' has _forward_hooks"):
        save(hooked, tmp_path / "model.pt")
    odd, _ = compiled("simple_cnn", (1, 28, 28))
    odd.conv1.note = object()  # type: ignore[assignment]
    with pytest.raises(
        CheckpointError, match=r"module 'conv1' has an attribute 'note': values of type builtins\.object"
    ):
        save(odd, tmp_path / "model.pt")


class Marked(torch.Tensor):
    """A tensor of another kind, such as torch's semi-structured ones."""


def test_tensors_of_other_kinds_are_refused(tmp_path: Path) -> None:
    model, _ = compiled("simple_cnn", (1, 28, 28))
    model.fc2.weight = torch.nn.Parameter(model.fc2.weight.detach().as_subclass(Marked))
    with pytest.raises(CheckpointError, match=r"fc2\.weight is a Marked"):
        save(model, tmp_path / "model.pt")


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04 not a zip", None, "cut"])
def test_damaged_files_are_errors(content: bytes | str | None, tmp_path: Path) -> None:
    path = tmp_path / "model.pt"
    save(symbolic_trace(Odd()), path)
    if content == "cut":
        path.write_bytes(path.read_bytes()[:-1000])
    elif content is None:
        path.unlink()
    else:
        path.write_bytes(content)  # type: ignore[arg-type]
    with pytest.raises(CheckpointError, match=r"model\.pt"):
        load(path)


def test_other_files_are_told_apart(tmp_path: Path) -> None:
    model = create("simple_cnn")
    save_checkpoint(tmp_path / "weights.pt", model)
    save(symbolic_trace(Odd()), tmp_path / "model.pt")
    assert is_saved(tmp_path / "model.pt")
    assert not is_saved(tmp_path / "weights.pt")
    with pytest.raises(CheckpointError, match=r"not a file of fxprune\.save's.*load_state_dict"):
        load(tmp_path / "weights.pt")


def test_a_file_of_a_later_version_is_an_error(tmp_path: Path) -> None:
    path = tmp_path / "model.pt"
    save(symbolic_trace(Odd()), path)
    torch.save(torch.load(path, weights_only=True) | {"version": 2}, path)
    with pytest.raises(CheckpointError, match="format version 2"):
        load(path)


def test_a_full_disk_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "model.pt"
    save(symbolic_trace(Odd()), path)
    old = path.read_bytes()
    big = symbolic_trace(nn.Sequential(nn.Linear(500, 500)))
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))
    try:
        with pytest.raises((CheckpointError, OSError)):
            save(big, path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert path.read_bytes() == old
    assert [file.name for file in tmp_path.iterdir()] == ["model.pt"]
