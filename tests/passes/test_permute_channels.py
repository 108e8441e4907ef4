from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor, nn
from torch.fx import GraphModule

from fxprune.channels import analyse_channels, value_shapes
from fxprune.channels import grouping as grouping_module
from fxprune.channels.grouping import Reader, search_grouping
from fxprune.errors import CalibrationError, GraphError
from fxprune.experiments.checkpoints import load_weights
from fxprune.geometry import LayerGeometry
from fxprune.graph import input_of, module_of
from fxprune.models import create
from fxprune.models.info import IMAGENET_MEAN, IMAGENET_STD
from fxprune.passes import FoldBatchNorm, InsertObservers, RemoveInplace, RemoveObservers, SolveLayers, changes, verify
from fxprune.passes import permute_channels as module_under_test
from fxprune.passes.permute_channels import PermuteChannels
from fxprune.pattern import NMPattern
from fxprune.recipe import Recipe
from fxprune.tracing import trace
from tests.pipelines import calibration, method_of

TWO_FOUR = Recipe.parse("2:4")


def conv(a: int, b: int, k: int = 3, **kwargs: Any) -> nn.Conv2d:
    return nn.Conv2d(a, b, k, padding=k // 2, **kwargs)


def uneven(model: nn.Module) -> nn.Module:
    """Channels of very different weight, as trained networks have them."""
    for module in model.modules():
        if isinstance(module, (nn.Conv2d, nn.Linear)):
            scale = torch.rand(module.weight.shape[1]).square() * 3
            module.weight.data *= scale.view(1, -1, *[1] * (module.weight.dim() - 2))
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.2, 2)
            nn.init.normal_(module.bias)
    return model.eval()


def traced(model: nn.Module, *, fold: bool = True) -> GraphModule:
    graph_module = trace(model)
    RemoveInplace()(graph_module)
    if fold:
        FoldBatchNorm()(graph_module)
    return graph_module


def images(count: int = 24, size: int = 8, batch: int = 8) -> list[Tensor]:
    return list(torch.randn(count, 3, size, size).split(batch))


def recorded(graph_module: GraphModule, action: str) -> dict[str, str]:
    return {
        c.target: c.reason for c in changes(graph_module) if c.pass_name == "PermuteChannels" and c.action == action
    }


def saliency_lost(graph_module: GraphModule, batches: list[Tensor], name: str, pattern: NMPattern) -> float:
    """What the pattern loses of one layer's OBS saliency, from patches and a plain inverse."""
    captured: list[Tensor] = []
    layer = graph_module.get_submodule(name)
    hook = layer.register_forward_pre_hook(lambda module, args: captured.append(args[0]))
    with torch.no_grad():
        for x in batches:
            graph_module(x)
    hook.remove()
    geometry = LayerGeometry.of(layer)
    patches = torch.cat([geometry.patches(x.double())[0] for x in captured])
    patches = patches - patches.mean(0)
    hessian = patches.T @ patches / len(patches)
    weight = geometry.to_matrix(layer.weight.detach().double())[0]
    damped = hessian + 0.01 * hessian.diagonal().mean() * torch.eye(len(hessian), dtype=torch.float64)
    saliency = weight**2 / torch.linalg.inv(damped).diagonal()
    total = 0.0
    for group in saliency.reshape(-1, pattern.m).tolist():
        total += sum(sorted(group)[: pattern.m - pattern.n])
    return total / float((weight @ hessian * weight).sum())


class Residual(nn.Module):
    """A residual stream of 8 channels with two readers, and 16 inner channels in each branch."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.a, self.b = conv(3, 8), conv(8, 16), conv(16, 8)
        self.c, self.d, self.head = conv(8, 16), conv(16, 8), nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.stem(x))
        x = F.relu(x + self.b(F.relu(self.a(x))))
        x = F.relu(x + self.d(F.relu(self.c(x))))
        return self.head(x.mean((2, 3)))


class OptionA(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.down, self.last = conv(3, 8), conv(8, 16, stride=2), conv(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.stem(x))
        return self.last(F.relu(self.down(x) + F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, 2, 6))))


class Dense(nn.Module):
    """Concatenations that join in the middle of a group of four."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = conv(3, 6), conv(6, 10), conv(16, 8)
        self.d = conv(24, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.a(x))
        x = torch.cat([x, F.relu(self.b(x))], 1)
        return self.d(torch.cat([x, F.relu(self.c(x))], 1))


def squeeze_excite() -> nn.Module:
    return nn.Sequential(conv(3, 16), nn.ReLU(), torchvision.ops.SqueezeExcitation(16, 8), conv(16, 5))


def inverted_residuals() -> nn.Module:
    block = torchvision.models.mobilenetv2.InvertedResidual
    return nn.Sequential(conv(3, 8), block(8, 8, 1, 4), block(8, 12, 2, 4), block(12, 12, 1, 4), conv(12, 3))


def bottlenecks() -> nn.Module:
    block = torchvision.models.resnet.Bottleneck
    downsample = nn.Sequential(nn.Conv2d(16, 32, 1, stride=2, bias=False), nn.BatchNorm2d(32))
    return nn.Sequential(conv(3, 16), block(16, 8, 2, downsample), block(32, 8), conv(32, 3))


def vgg() -> nn.Module:
    features = nn.Sequential(conv(3, 16), nn.ReLU(), conv(16, 8), nn.ReLU(), nn.AdaptiveAvgPool2d(7), nn.Flatten())
    return nn.Sequential(*features, nn.Linear(8 * 49, 16), nn.ReLU(), nn.Linear(16, 4))


def grouped() -> nn.Module:
    return nn.Sequential(conv(3, 16), nn.ReLU(), conv(16, 16, groups=2), nn.ReLU(), conv(16, 6))


MODELS = {
    "residual": Residual,
    "option_a": OptionA,
    "dense": Dense,
    "squeeze_excite": squeeze_excite,
    "inverted_residuals": inverted_residuals,
    "bottlenecks": bottlenecks,
    "vgg": vgg,
    "grouped": grouped,
}


@pytest.mark.parametrize("name", MODELS)
def test_the_function_stays_and_the_loss_falls(name: str) -> None:
    graph_module, batches = traced(uneven(MODELS[name]())), images()
    with torch.no_grad():
        before = graph_module(batches[0])
    parameters = {key: value.clone() for key, value in graph_module.state_dict().items()}
    run, shown = PermuteChannels(TWO_FOUR), calibration(batches)
    assert run(graph_module, shown).modified
    assert any(not torch.equal(value, parameters[key]) for key, value in graph_module.state_dict().items())
    with torch.no_grad():
        assert float((graph_module(batches[0]) - before).abs().max()) <= 1e-5 * float(before.abs().max())
    assert recorded(graph_module, "permuted")
    assert not run(graph_module, shown).modified
    assert len(recorded(graph_module, "permuted")) == len(changes_permuted(graph_module))


def changes_permuted(graph_module: GraphModule) -> list[str]:
    return [c.target for c in changes(graph_module) if c.action == "permuted"]


@pytest.mark.parametrize("name", ["residual", "option_a", "dense", "grouped"])
def test_float64_stays_to_rounding(name: str) -> None:
    graph_module = traced(uneven(MODELS[name]().double()))
    batches = [x.double() for x in images()]
    with torch.no_grad():
        before = graph_module(batches[0])
        assert PermuteChannels(Recipe.parse("1:4"))(graph_module, calibration(batches)).modified
        assert float((graph_module(batches[0]) - before).abs().max()) <= 1e-10 * float(before.abs().max())


@pytest.mark.parametrize("pattern", [NMPattern(2, 4), NMPattern(1, 4), NMPattern(4, 8)], ids=str)
@pytest.mark.parametrize("model", [Residual, OptionA])
def test_the_record_says_what_each_layer_loses(model: Callable[[], nn.Module], pattern: NMPattern) -> None:
    graph_module, batches = traced(uneven(model())), images()
    names = ["a", "b", "c", "d", "head"] if model is Residual else ["down", "last"]
    before = {name: saliency_lost(graph_module, batches, name, pattern) for name in names}
    assert PermuteChannels(Recipe.parse(pattern))(graph_module, calibration(batches)).modified
    after = {name: saliency_lost(graph_module, batches, name, pattern) for name in names}
    assert sum(after.values()) < 0.99 * sum(before.values())
    said = recorded(graph_module, "permuted")
    assert said
    for name, sentence in said.items():
        share = float(sentence.split("loses ")[1].split("%")[0])
        assert share == pytest.approx(100 * after[name] / before[name], abs=0.1)


def test_a_planted_order_is_undone() -> None:
    """Two kinds of input channels that matter to different outputs, dealt out so that they compete in every group."""
    model = nn.Sequential(conv(3, 8), nn.ReLU(), conv(8, 8, 1))
    nn.init.normal_(model[0].weight)
    weight = 0.01 * torch.randn(8, 8)
    # Outputs read four channels each: the first four of the order 0 2 4 6 1 3 5 7 with weight, two of each group lost.
    weight[:4, :4] += 1.0
    weight[4:, 4:] += 1.0
    model[2].weight.data = weight[:, :, None, None]
    graph_module, batches = traced(model.eval()), images(64)
    before = saliency_lost(graph_module, batches, "2", NMPattern(2, 4))
    assert PermuteChannels(TWO_FOUR)(graph_module, calibration(batches)).modified
    assert saliency_lost(graph_module, batches, "2", NMPattern(2, 4)) < 0.05 * before
    kinds = (graph_module.get_submodule("2").weight[0, :, 0, 0].abs() > 0.5).view(2, 4)
    assert kinds.sum(1).tolist() == [2, 2]


@pytest.mark.parametrize("name", ["residual", "option_a", "dense", "grouped", "bottlenecks"])
def test_pruning_afterwards_gives_groups_along_consecutive_channels(name: str) -> None:
    graph_module, batches = traced(uneven(MODELS[name]())), images()
    PermuteChannels(TWO_FOUR)(graph_module, calibration(batches))
    InsertObservers(TWO_FOUR)(graph_module)
    SolveLayers(TWO_FOUR, method_of("magnitude", TWO_FOUR))(graph_module, calibration(batches))
    RemoveObservers()(graph_module)
    verify(graph_module)
    pruned = [c.target for c in changes(graph_module) if c.action == "pruned"]
    assert set(recorded(graph_module, "permuted")) <= set(pruned)
    for target in pruned:
        weight = graph_module.get_submodule(target).weight
        assert int((weight != 0).unflatten(1, (-1, 4)).sum(2).max()) <= 2


def test_layers_that_cannot_be_permuted_say_why() -> None:
    def shuffled(x: Tensor) -> Tensor:
        return x.view(x.size(0), 2, 4, 8, 8).transpose(1, 2).reshape(x.size(0), 8, 8, 8)

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.twice, self.c = conv(3, 8), conv(8, 8), conv(8, 8), conv(8, 8)
            self.out = conv(8, 8)
            self.flat = nn.Linear(512, 4)

        def forward(self, x: Tensor) -> Tensor:
            x = self.b(shuffled(self.a(x)))
            x = self.c(self.twice(self.twice(x)))
            return self.flat(torch.flatten(F.relu(self.out(x)), 1))

    graph_module = traced(uneven(Model()))
    run = PermuteChannels(TWO_FOUR)
    run(graph_module, calibration(images()))
    kept = recorded(graph_module, "kept")
    assert "takes channels apart" in kept.pop("b")
    assert "called at 2 places" in kept.pop("c")
    assert "flatten" in kept.pop("flat")
    assert "called at 2 places" in kept.pop("twice")
    assert not kept  # Layers that will not be pruned are InsertObservers' business.
    run(graph_module, calibration(images()))
    assert len([c for c in changes(graph_module) if c.action == "kept" and c.pass_name == "PermuteChannels"]) == 4


def test_excluded_layers_stay_as_they_are() -> None:
    graph_module = traced(uneven(Residual()))
    before = {name: value.clone() for name, value in graph_module.state_dict().items()}
    assert PermuteChannels(TWO_FOUR, exclude=("a",))(graph_module, calibration(images())).modified
    changed = {name for name, value in graph_module.state_dict().items() if not torch.equal(value, before[name])}
    assert changed == {"c.weight", "c.bias", "d.weight"}
    assert recorded(graph_module, "kept")["head"].endswith("'a' (Conv2d) is excluded")


def test_patterns_without_groups_change_nothing() -> None:
    graph_module = traced(uneven(Residual()))
    assert not PermuteChannels(Recipe.parse("0.9"))(graph_module, calibration(images())).modified
    assert set(recorded(graph_module, "kept")) == {"stem", "a", "b", "c", "d", "head"}


def test_a_choice_of_patterns_takes_its_first_groups() -> None:
    mixed, plain, batches = *(traced(uneven(Residual())) for _ in range(2)), images()
    mixed.load_state_dict(plain.state_dict())
    PermuteChannels(Recipe.parse("mixed:0.6"))(mixed, calibration(batches))
    PermuteChannels(TWO_FOUR)(plain, calibration(batches))
    assert all(torch.equal(a, b) for a, b in zip(mixed.parameters(), plain.parameters(), strict=True))


def test_the_first_shownof_the_batches_suffice() -> None:
    def permuted(model: nn.Module, batches: list[Tensor], images: int) -> list[Tensor]:
        graph_module = traced(model)
        PermuteChannels(Recipe.parse("2:4"), images=images)(graph_module, calibration(batches))
        return list(graph_module.parameters())

    batch = torch.randn(32, 3, 8, 8)
    model = uneven(Residual())
    cut, first, whole = (permuted(model, *of) for of in (([batch], 12), ([batch[:12]], 64), ([batch], 64)))
    assert all(map(torch.equal, cut, first))
    assert not all(map(torch.equal, cut, whole))

    class Fixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = Residual()

        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = self.net(x.reshape(32, 3, 8, 8))
            return out

    model = uneven(Fixed())
    assert all(map(torch.equal, permuted(model, [batch], 12), permuted(model, [batch], 64)))


def test_the_same_seed_gives_the_same_network() -> None:
    first, second, batches = *(traced(uneven(Residual())) for _ in range(2)), images()
    second.load_state_dict(first.state_dict())
    for graph_module in (first, second):
        PermuteChannels(TWO_FOUR, seed=7)(graph_module, calibration(iter(batches)))
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))


def test_parameters_stay_trainable_and_the_graph_unobserved() -> None:
    graph_module, batches = traced(uneven(Residual())), images()
    code, keys, parameters = graph_module.code, list(graph_module.state_dict()), list(graph_module.parameters())
    assert PermuteChannels(TWO_FOUR)(graph_module, calibration(batches)).modified
    assert (graph_module.code, list(graph_module.state_dict())) == (code, keys)
    assert all(a is b for a, b in zip(graph_module.parameters(), parameters, strict=True))
    graph_module(batches[0]).sum().backward()
    assert graph_module.get_submodule("a").weight.grad is not None
    assert [c for c in changes(graph_module) if c.pass_name == "InsertObservers"] == []


def test_named_inputs() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c = conv(3, 16), conv(3, 16), conv(16, 4)

        def forward(self, left: Tensor, right: Tensor) -> Tensor:
            return self.c(F.relu(self.a(left) + self.b(right)))

    graph_module = traced(uneven(Two()))
    batches = [{"left": x, "right": x.flip(0), "label": None} for x in images()]
    assert PermuteChannels(TWO_FOUR)(graph_module, calibration(batches)).modified
    with pytest.raises(CalibrationError, match="an input 'right' that calibration batch 0 does not give"):
        PermuteChannels(TWO_FOUR)(graph_module, calibration(images()))


def test_labels_in_the_batches_are_ignored() -> None:
    plain, labelled, batches = *(traced(uneven(Residual())) for _ in range(2)), images()
    labelled.load_state_dict(plain.state_dict())
    PermuteChannels(TWO_FOUR)(plain, calibration(batches))
    PermuteChannels(TWO_FOUR)(labelled, calibration([(x, torch.zeros(len(x))) for x in batches]))
    assert all(torch.equal(a, b) for a, b in zip(plain.parameters(), labelled.parameters(), strict=True))


@pytest.mark.parametrize(
    ("batches", "message"),
    [
        ([], "no batches"),
        ([torch.randn(2, 4, 8, 8)], "failed on calibration batch 0 at node 'stem'"),
        ([torch.full((2, 3, 8, 8), torch.nan)], "NaN"),
        (["image"], "expected a tensor"),
    ],
)
def test_bad_batches(batches: list[Any], message: str) -> None:
    graph_module = traced(uneven(Residual()))
    before = {name: value.clone() for name, value in graph_module.state_dict().items()}
    with pytest.raises(CalibrationError, match=message):
        PermuteChannels(TWO_FOUR)(graph_module, calibration(batches))
    assert all(torch.equal(value, before[name]) for name, value in graph_module.state_dict().items())


def test_training_mode_and_observed_graphs_are_refused() -> None:
    graph_module = traced(uneven(Residual()))
    graph_module.get_submodule("a").train()
    with pytest.raises(GraphError, match="training mode"):
        PermuteChannels(TWO_FOUR)(graph_module, calibration(images()))
    graph_module.get_submodule("a").eval()
    InsertObservers(TWO_FOUR)(graph_module)
    with pytest.raises(GraphError, match="before InsertObservers"):
        PermuteChannels(TWO_FOUR)(graph_module, calibration(images()))


def test_a_changed_function_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    graph_module = traced(uneven(Residual()))

    def wrong(graph_module: GraphModule, *args: Any) -> None:
        weight = graph_module.get_submodule("a").weight
        weight.data = weight.data.flip(1)

    monkeypatch.setattr(module_under_test, "permute_channels", wrong)
    with pytest.raises(GraphError, match="has changed the network's output"):
        PermuteChannels(TWO_FOUR)(graph_module, calibration(images()))


def test_dead_inputs_and_constant_outputs() -> None:
    """Channels that are always zero, and a layer whose output does not vary, cause no NaN."""
    model = nn.Sequential(conv(3, 8), nn.ReLU(), conv(8, 8), nn.ReLU(), conv(8, 8))
    model[0].weight.data[:3] = 0
    model[0].bias.data[:3] = -1
    model[2].weight.data.zero_()
    graph_module = traced(uneven(model))
    PermuteChannels(TWO_FOUR)(graph_module, calibration(images()))
    assert all(torch.isfinite(p).all() for p in graph_module.parameters())


def scored(model: nn.Module, names: list[str], batches: list[Tensor]) -> tuple[Any, list[Reader]]:
    graph_module = traced(model)
    channels = analyse_channels(graph_module, value_shapes(graph_module, batches[0]))
    readers = []
    for node in graph_module.graph.nodes:
        layer = module_of(node)
        if node.target in names and layer is not None:
            geometry = LayerGeometry.of(layer)
            scores = geometry.to_matrix(layer.weight.detach().double()).square().reshape(-1, geometry.in_channels)
            readers.append(Reader(scores, channels.layouts[input_of(node)].classes))
    return channels, readers


def test_atoms_that_share_a_group_are_searched_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """6 + 10 channels in groups of four: the second group holds channels of both."""
    channels, readers = scored(uneven(Dense()), ["c", "d"], images())
    found = search_grouping(readers, channels, NMPattern(2, 4))
    assert sum(found.after) < sum(found.before)
    again = [Reader(r.scores[:, _columns(r.classes, found.source)], r.classes) for r in readers]
    second = search_grouping(again, channels, NMPattern(2, 4))
    assert second.before == pytest.approx(found.after, rel=1e-12)
    assert (second.source == range(channels.count)).all()
    monkeypatch.setattr(grouping_module, "SWEEPS", 1)
    assert sum(search_grouping(readers, channels, NMPattern(2, 4)).after) >= sum(found.after) * (1 - 1e-12)


def _columns(classes: Any, source: Any) -> list[int]:
    position = {int(c): i for i, c in enumerate(classes)}
    return [position[int(source[c])] for c in classes]


def test_a_joint_loss_never_rises_though_one_layer_may_lose() -> None:
    channels, readers = scored(uneven(Residual()), ["a", "c", "head"], images())
    found = search_grouping(readers, channels, NMPattern(1, 4))
    assert sum(found.after) < sum(found.before)


@torch.no_grad()
def divergence(
    dense: GraphModule, graph_module: GraphModule, batches: list[Tensor], images: Tensor, pattern: str
) -> float:
    """KL divergence from the dense network on `images`, after pruning with everything on."""
    InsertObservers(Recipe.parse(pattern))(graph_module)
    SolveLayers(Recipe.parse(pattern), method_of("admm", pattern))(graph_module, calibration(batches))
    RemoveObservers()(graph_module)
    verify(graph_module)
    wanted, found = (m(images).double().log_softmax(1) for m in (dense, graph_module))
    return float((wanted.exp() * (wanted - found)).sum(1).mean())


@pytest.mark.slow
@pytest.mark.parametrize("pattern", ["2:4", "1:4"])
def test_trained_resnet20_loses_less_after_permutation(data_root: Path, pattern: str) -> None:
    """On average over calibration sets: of one set, and on few other images, the order does not always tell."""
    model = create("resnet20")
    load_weights(model, data_root / "cifar10" / "resnet20-12fca82f.th")
    with np.load(data_root / "cifar10" / "cifar10_subset.npz") as arrays:
        pixels = torch.from_numpy(np.concatenate([arrays["train_images"], arrays["test_images"]]))
    mean, std = (torch.tensor(v).view(1, 3, 1, 1) for v in (IMAGENET_MEAN, IMAGENET_STD))
    images = (pixels.permute(0, 3, 1, 2).float() / 255 - mean) / std
    *sets, test = images.split((512, 512, 512, len(images) - 3 * 512))
    test = test[:2000]
    dense, losses = traced(model), torch.zeros(len(sets), 2)
    for number, train in enumerate(sets):
        batches = list(train.split(128))
        plain, permuted = traced(model), traced(model)
        with torch.no_grad():
            before = permuted(batches[0])
        assert PermuteChannels(Recipe.parse(pattern))(permuted, calibration(batches)).modified
        with torch.no_grad():
            assert float((permuted(batches[0]) - before).abs().max()) <= 1e-5 * float(before.abs().max())
        # Every layer but the first, which reads the image.
        assert len(recorded(permuted, "permuted")) == 19
        losses[number] = torch.tensor([divergence(dense, g, batches, test, pattern) for g in (permuted, plain)])
    permuted_loss, plain_loss = losses.mean(0).tolist()
    assert permuted_loss < 0.97 * plain_loss, losses


@pytest.mark.gpu
def test_on_the_device() -> None:
    graph_module, batches = traced(uneven(Residual())).cuda(), images()
    assert PermuteChannels(TWO_FOUR)(graph_module, calibration(batches)).modified
    assert next(graph_module.parameters()).is_cuda
