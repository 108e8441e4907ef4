from __future__ import annotations

from pathlib import Path
from typing import Any

import onnxruntime
import pytest
import torch
from torch import Tensor, nn

import fxprune
from fxprune import Options
from fxprune.annotations import annotation
from fxprune.channels import analyse_channels
from fxprune.errors import OptionsError, PatternError
from fxprune.graph import value_shapes
from fxprune.passes import changes
from fxprune.tracing import trace
from fxprune.widths.network import find_widths
from tests.channels_nets import NETWORKS, Mobile, Residual, images, network

EXACT = {"damping": 1e-9, "channel_multiple": 1, "holdout": 0.0}


def batches(count: int = 96) -> list[Tensor]:
    return list(images(count, 1).split(32))


def compiled(model: nn.Module, recipe: object, **options: Any) -> fxprune.CompiledModule:
    method = str(options.pop("method", "admm"))
    exclude = options.pop("exclude", ())
    return fxprune.compile(
        model, batches(), recipe, method=method, exclude=exclude, options=Options(**options), progress=False
    )


def count_macs(model: nn.Module) -> int:
    """Counted by hooks, apart from the code that is tested."""
    total = 0

    def add(module: nn.Module, inputs: tuple[Tensor], output: Tensor) -> None:
        nonlocal total
        positions = inputs[0] if isinstance(module, nn.ConvTranspose2d) else output
        total += positions[0].numel() * module.weight[0].numel()

    layers = [m for m in model.modules() if isinstance(m, (nn.Conv2d, nn.ConvTranspose2d, nn.Linear))]
    handles = [m.register_forward_hook(add) for m in layers]
    with torch.no_grad():
        model(images(1))
    for handle in handles:
        handle.remove()
    return total


@torch.no_grad()
def with_redundant(name: str) -> nn.Module:
    """A network in which a quarter of the units of every width are copies of others, in all layers that write them."""
    model = network(name)
    graph_module = trace(model, example=images(2))
    channels = analyse_channels(graph_module, value_shapes(graph_module, images(2)))
    for width in find_widths(channels, lambda node: "")[0]:
        copies = range(0, len(width.units) // 4)
        for node, layout in channels.layouts.items():
            module = model.get_submodule(str(node.target)) if node.op == "call_module" else None
            if module is None or not hasattr(module, "weight") or module.weight.numel() == 1:
                continue
            for copy in copies:
                other = len(width.units) - 1 - copy
                a, b = (
                    [i for i, c in enumerate(layout.classes) if c in channels.units[width.units[u]]]
                    for u in (copy, other)
                )
                for tensor in (module.weight, module.bias, *module.buffers()):
                    if isinstance(tensor, Tensor) and tensor.dim() and len(tensor) == len(layout.classes) and a:
                        tensor[a] = tensor[b]
    return model


@pytest.mark.parametrize("name", NETWORKS)
def test_the_budget_is_kept_and_the_report_is_true(name: str) -> None:
    model = network(name)
    found = compiled(model, "channels:0.7", channel_multiple=1)
    before, after = count_macs(model), count_macs(found)
    assert after <= 0.7 * before
    assert found.report.macs == (before, after)
    assert found.report.parameters[1] == sum(p.numel() for p in found.parameters())
    for row in found.report.layers:
        module = found.get_submodule(row.name)
        assert row.shape == tuple(module.weight.shape)
        if row.channels:
            assert row.status == "narrowed"
            assert row.reason
            assert row.channels[1] < row.channels[0] or row.channels[3] < row.channels[2]
            assert row.macs[1] < row.macs[0]
        else:
            assert row.status != "narrowed"
    with torch.no_grad():
        assert found(images(4, 5)).shape == model(images(4, 5)).shape
    assert not any(hasattr(module, "geometry") for module in found.modules())
    assert "MACs a sample became" in str(found.report)


@pytest.mark.parametrize("method", ["admm", "magnitude"])
@pytest.mark.parametrize("name", NETWORKS)
def test_files_agree(name: str, method: str, tmp_path: Path) -> None:
    found, x = compiled(network(name), "channels:0.7", channel_multiple=1, method=method), images(3, 5)
    with torch.no_grad():
        wanted = found(x)
    fxprune.save(found, tmp_path / "model.pt")
    loaded = fxprune.load(tmp_path / "model.pt")
    assert loaded.report == found.report
    with torch.no_grad():
        assert torch.equal(loaded(x), wanted)
    fxprune.export_onnx(found, tmp_path / "model.onnx", images(2, 6))
    session = onnxruntime.InferenceSession(tmp_path / "model.onnx", providers=["CPUExecutionProvider"])
    (output,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    torch.testing.assert_close(torch.from_numpy(output), wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["Residual", "OptionA", "DenseBlock", "Flat", "Halves", "Sliced", "UNet"])
def test_copies_of_channels_go_without_a_loss(name: str) -> None:
    model = with_redundant(name).double()
    data = [batch.double() for batch in batches(256)]
    found = fxprune.compile(model, data, "channels:0.85", options=Options(**EXACT, patches=0), progress=False)
    assert found.report.macs[1] <= 0.85 * found.report.macs[0]
    x = images(8, 9).double()
    with torch.no_grad():
        torch.testing.assert_close(found(x), model(x), rtol=1e-4, atol=1e-4)


def test_where_nothing_can_go_the_error_says_why() -> None:
    with pytest.raises(OptionsError, match=r"at least 100.00% .* does not ask"):
        compiled(network("Residual"), {"a": "channels:0.9", "*": "dense"})


def test_multiples_are_kept() -> None:
    found = compiled(network("Residual"), "channels:0.7", channel_multiple=4)
    for row in found.report.layers:
        if row.channels:
            assert row.channels[1] == row.channels[0] or row.channels[1] % 4 == 0
            assert row.channels[3] == row.channels[2] or row.channels[3] % 4 == 0


def test_a_budget_out_of_reach_names_the_least_and_the_remedy() -> None:
    with pytest.raises(OptionsError, match=r"channels:0.05 is out of reach: at least .* MACs stay; .*channel_multiple"):
        compiled(network("Residual"), "channels:0.05")


def test_excluded_layers_keep_every_weight() -> None:
    model = network("Residual")
    found = compiled(model, "channels:0.8", channel_multiple=1, exclude=("b",))
    assert torch.equal(found.b.weight, model.b.weight)
    assert found.report["b"].status == "kept"
    assert found.report["stem"].channels == ()  # It writes what b is added to.
    assert found.report["c"].channels != ()


def test_a_mapping_names_the_layers_whose_channels_may_go() -> None:
    model = network("Residual")
    found = compiled(model, {"b": "channels:0.5", "*": "dense"}, channel_multiple=1)
    assert found.report["a"].channels == (12, 12, 16, 8)
    assert found.report["b"].channels == (16, 8, 12, 12)
    assert {row.name for row in found.report.layers if row.channels} == {"a", "b"}
    assert "does not ask" in annotation(next(n for n in found.graph.nodes if n.target == "d")).narrowing.reason


def test_a_chain_is_solved_on_the_smaller_layers() -> None:
    found = compiled(network("Residual"), "channels:0.7+2:4", channel_multiple=4)
    pruned = [row for row in found.report.layers if row.status == "pruned"]
    assert pruned
    assert any(row.channels for row in pruned)
    for row in pruned:
        assert fxprune.Pattern.parse("2:4").check(found.get_submodule(row.name).weight).ok


def test_channels_and_rank() -> None:
    found = compiled(network("Residual"), "channels:0.7+rank:0.8", channel_multiple=1)  # Polished, too.
    assert any(row.status == "factored" for row in found.report.layers)
    before, after = found.report.macs
    assert after <= 0.7 * 0.8 * before * 1.01


@pytest.mark.parametrize(
    "method", ["sparsegpt", "exact_obs", "magnitude"]
)  # Their defaults re-fit no layer that stays dense.
def test_a_layer_that_loses_inputs_makes_up_for_them_where_no_rank_is_asked_of_it(method: str) -> None:
    found = compiled(network("Residual"), "channels:0.7+rank:0.9", channel_multiple=4, method=method)
    narrowed = [row for row in found.report.layers if row.status == "narrowed" and row.channels[1] < row.channels[0]]
    assert narrowed
    assert all(row.relative_error is not None for row in narrowed)


def test_few_images_do_not_make_columns_free() -> None:
    """With as many columns as images any columns can make up for any others on these images, and on no others."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 60)).eval()
    x, unseen = torch.randn(1000, 64), torch.randn(500, 64)
    errors = []
    for number in (250, 1000):
        found = fxprune.compile(
            model, x[:number].split(30), "channels:0.7", options=Options(channel_multiple=1, polish=0), progress=False
        )
        with torch.no_grad():
            wanted, got = model(unseen), found(unseen)
        errors.append(float((got - wanted).square().sum() / (wanted - wanted.mean(0)).square().sum()))
    assert errors[0] < 1.7 * errors[1]


def test_channels_come_first_in_a_chain() -> None:
    with pytest.raises(PatternError, match=r"comes first, write 'channels:0.7\+2:4'"):
        fxprune.Recipe.parse("2:4+channels:0.7")


@pytest.mark.parametrize("text", ["channels:2", "channels:0", "channels:speedup=0.5", "channels:x", "channels:speed=2"])
def test_what_cannot_be_read(text: str) -> None:
    with pytest.raises(PatternError, match=r"channels:0\.6"):
        fxprune.Recipe.parse(text)


def test_magnitude_looks_at_no_images_and_can_be_fitted_again() -> None:
    model, x = network("Mobile"), images(64, 9)
    plain = compiled(model, "channels:0.7", channel_multiple=1, method="magnitude")
    fitted = compiled(
        model, "channels:0.7", channel_multiple=1, method="magnitude", target="skip", refit=True, reconstruct=True,
        bias_correction=True,
    )  # fmt: skip
    assert plain.report.images == 0
    with torch.no_grad():
        wanted = model(x)
        errors = [
            float((found(x) - wanted).square().mean())
            for found in (plain, fitted, compiled(model, "channels:0.7", channel_multiple=1))
        ]
    assert errors[2] < errors[1] < errors[0]


def test_polish_works_on_it() -> None:
    found = compiled(Residual().eval(), "channels:0.6", channel_multiple=1, polish=2)
    assert found.report.kl is not None
    assert found.report.layers[1].relative_error is not None


def test_a_second_run_of_the_pass_does_nothing() -> None:
    from fxprune import Calibration
    from fxprune.passes import RemoveChannels
    from tests.pipelines import method_of

    recipe = fxprune.Recipe.parse("channels:0.7")
    graph_module = trace(Mobile().eval())
    calibration = Calibration(batches())
    step = RemoveChannels(recipe, method_of("admm", "channels:0.7", channel_multiple=1))
    assert step(graph_module, calibration).modified
    count = len(changes(graph_module))
    assert not step(graph_module, calibration).modified
    assert len(changes(graph_module)) == count


def test_a_scan_says_that_channels_have_no_price_for_one_layer() -> None:
    with pytest.raises(PatternError, match="decided over the whole network"):
        fxprune.scan(network("Residual"), batches(), ["channels:0.6"], progress=False)


def test_a_measured_speed_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """The clock here is the size of the files' weights: the most MACs that are fast enough are found."""
    from fxprune.export import latency

    def by_size(paths: list[Path], inputs: list[Tensor], runs: int) -> list[latency.Latency]:
        return [latency.Latency(path.stat().st_size, path.stat().st_size, 0, 1) for path in paths]

    monkeypatch.setattr(latency, "measure_latency", by_size)
    found = compiled(network("Residual"), "channels:speedup=1.3", channel_multiple=1)
    assert float(found.report.pattern.split("measured ")[1]) >= 1.3
    assert found.report.macs[1] < found.report.macs[0]
    with pytest.raises(OptionsError, match="a speed-up of 50 is out of reach"):
        compiled(network("Residual"), "channels:speedup=50", channel_multiple=1)


def test_a_layer_of_too_many_columns_keeps_them(monkeypatch: pytest.MonkeyPatch) -> None:
    from fxprune.passes import insert_observers, remove_channels

    for module in (insert_observers, remove_channels):
        monkeypatch.setattr(module, "MAX_COLUMNS", 100)
    monkeypatch.setattr(insert_observers.InsertObservers.__init__, "__kwdefaults__", {
        **insert_observers.InsertObservers.__init__.__kwdefaults__, "max_columns": 100,
    })  # fmt: skip
    found = compiled(network("Residual"), "channels:0.8", channel_multiple=1)
    assert found.report["b"].channels[:2] in (
        (),
        (16, 16),
    )  # 144 columns; "c" reads the stream too, but so does "a" with 108.
    assert found.report["d"].channels[0] > found.report["d"].channels[1]


@pytest.mark.parametrize("recipe", ["channels:0.7", "channels:0.7+2:4"])
@pytest.mark.parametrize(
    "name", [name for name in NETWORKS if name != "Halves"]
)  # torch.fx alone cannot trace that one.
def test_the_diff_shows_which_channels_are_gone(name: str, recipe: str) -> None:
    model = network(name)
    found = compiled(model, recipe, channel_multiple=2)
    shown = str(fxprune.diff(model, found, example_inputs=images(2)))
    assert "channels removed" in shown
    assert fxprune.diff(found, found).is_empty
    assert str(fxprune.diff(found, model))


@torch.no_grad()
def test_readers_can_be_fitted_on_the_dense_model_s_inputs() -> None:
    """Those of its channels that are left: here the least squares of what the dense layer gave."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(6, 16, 1), nn.ReLU(), nn.Conv2d(16, 8, 1)).eval()
    x = torch.randn(96, 6, 5, 5)
    found = fxprune.compile(
        model, x.split(32), "channels:0.6", progress=False,
        options=Options(inputs="dense", target="dense", shrink=False, polish=0, patches=0, **EXACT),
    )  # fmt: skip
    parameters = found.state_dict()
    kept = [int((model[0].weight == row).flatten(1).all(1).nonzero()) for row in parameters["0.weight"]]
    assert 0 < len(kept) < 16
    hidden = model[:2](x).movedim(1, -1).flatten(0, 2)[:, kept].double()
    wanted = model(x).movedim(1, -1).flatten(0, 2).double()
    with_ones = torch.cat([hidden, torch.ones(len(hidden), 1)], 1)
    solution = torch.linalg.lstsq(with_ones, wanted).solution
    torch.testing.assert_close(parameters["2.weight"][:, :, 0, 0].double(), solution[:-1].mT, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("name", NETWORKS)
def test_dense_inputs_on_every_network(name: str) -> None:
    found = compiled(network(name), "channels:0.7", inputs="dense", polish=0, channel_multiple=1)
    errors = [row.relative_error for row in found.report.layers if row.relative_error is not None]
    assert 0 < max(errors) < 1
