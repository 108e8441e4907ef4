"""Models whose own forward stays Python: their children are compiled in place, and one report covers the whole."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fxprune
from fxprune.calibration.calls import Reading, calls_of
from fxprune.compiled import CompiledModule
from fxprune.compiled_parts import CompiledParts
from fxprune.errors import CalibrationError, CheckpointError, ExportError, GraphError, PatternError, TraceError
from fxprune.parts.search import Search

pytestmark = pytest.mark.filterwarnings("ignore::fxprune.errors.CalibrationWarning")
QUICK: dict[str, Any] = {"method": "sparsegpt", "progress": False}


class Head(nn.Module):
    """Takes a list of levels, as the heads of one-stage detectors do."""

    def __init__(self) -> None:
        super().__init__()
        self.tower = nn.Sequential(nn.Conv2d(16, 16, 3, padding=1), nn.ReLU())
        self.scores = nn.Conv2d(16, 4, 1)

    def forward(self, levels: list[Tensor]) -> list[Tensor]:
        return [self.scores(self.tower(level)) for level in levels]


class Detector(nn.Module):
    """Images of any size in a list; boxes chosen by their scores go through a second head."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone = nn.Sequential(
            nn.Conv2d(4, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, 16, 3)
        )
        self.head = Head()
        self.box = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 8))
        self.steps = nn.Parameter(torch.ones(2, 3))

    def forward(self, images: list[Tensor], targets: Any = None) -> list[dict[str, Tensor]]:
        height, width = (max(int(image.shape[i]) for image in images) for i in (1, 2))
        batch = torch.stack([F.pad(im, (0, width - im.shape[2], 0, height - im.shape[1])) for im in images])
        features = self.backbone(batch)
        levels = self.head([features, F.max_pool2d(features, 2)])
        found = []
        for i in range(len(images)):
            scores = torch.cat([level[i].flatten(1) for level in levels], 1)
            vectors = features[i].flatten(1).T[: scores.shape[1]]
            keep = scores[0, : len(vectors)] > scores[0].median()
            found.append({"scores": scores, "boxes": self.box(vectors[keep])})
        return found


def detector() -> Detector:
    torch.manual_seed(0)
    model = Detector()
    with torch.no_grad():
        model.backbone[1].running_mean.uniform_(-0.1, 0.1)
        model.backbone[1].running_var.uniform_(0.5, 1.5)
    return model.eval()


def batches(count: int = 8) -> list[list[Tensor]]:
    generator = torch.Generator().manual_seed(1)
    return [[torch.rand(4, 8 + 2 * j, 9 + i % 2, generator=generator) for j in range(3)] for i in range(count)]


def tensors(found: list[dict[str, Tensor]]) -> list[Tensor]:
    return [x for one in found for x in one.values()]


def same(a: list[dict[str, Tensor]], b: list[dict[str, Tensor]]) -> bool:
    pairs = list(zip(tensors(a), tensors(b), strict=True))
    return bool(pairs) and all(torch.equal(x, y) for x, y in pairs)


@pytest.fixture(scope="module")
def compiled() -> CompiledParts:
    found = fxprune.compile(detector(), batches(), "2:4", **QUICK)
    assert isinstance(found, CompiledParts)
    return found


class TestTheResult:
    def test_the_parts_in_the_order_of_their_calls(self, compiled: CompiledParts) -> None:
        assert list(compiled.parts) == ["backbone", "head", "box"]
        assert isinstance(compiled.model, Detector)
        assert all(isinstance(part, CompiledModule) for part in compiled.parts.values())
        assert not any(module.training for module in compiled.modules())

    def test_the_users_model_is_as_it_was(self) -> None:
        model = detector()
        before = copy.deepcopy(model.state_dict())
        fxprune.compile(model, batches(2), "2:4", **QUICK)
        assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
        assert isinstance(model.backbone, nn.Sequential)

    def test_the_report_is_on_the_whole_model(self, compiled: CompiledParts) -> None:
        report = compiled.report
        assert sum(row.weights for row in report.layers) == sum(
            p.numel() for p in detector().parameters() if p.dim() > 1
        )
        assert report["backbone.3"].status == report["head.tower.0"].status == report["box.2"].status == "pruned"
        assert report["steps"].status == "kept"
        assert report.images == 24
        assert "backbone, head, box" in report.summary
        assert "Detector stays the Python that it is" in report.summary
        for name in ("backbone.3", "head.scores", "box.0"):
            path, _, layer = name.partition(".")
            weight = compiled.parts[path].get_submodule(layer).weight
            assert isinstance(weight, Tensor)
            assert fxprune.Pattern.parse("2:4").check(weight).ok

    def test_it_is_called_as_the_model_is(self, compiled: CompiledParts) -> None:
        found = compiled(batches()[0])
        assert [x.shape[0] for x in tensors(found)][::2] == [4, 4, 4]

    def test_excluding_everything_gives_the_model(self) -> None:
        model = detector()
        found = fxprune.compile(model, batches(2), "2:4", exclude=("*",), **QUICK)
        assert same(found(batches()[1]), model(batches()[1]))
        assert {row.reason for row in found.report.layers if row.op != "Detector"} == {"excluded"}

    def test_what_is_excluded_inside_a_part_stays(self) -> None:
        model = detector()
        found = fxprune.compile(model, batches(2), "2:4", exclude=("head.tower", "box"), **QUICK)
        assert list(found.parts) == ["backbone", "head"]  # type: ignore[union-attr]
        assert found.report["head.tower.0"].reason == found.report["box.0"].reason == "excluded"
        assert found.report["head.scores"].status == "pruned"
        assert torch.equal(found.parts["head"].get_submodule("tower.0").weight, model.head.tower[0].weight)  # type: ignore[union-attr]

    def test_copies_keep_the_report(self, compiled: CompiledParts) -> None:
        copied = copy.deepcopy(compiled)
        assert copied.report == compiled.report
        assert same(copied(batches()[0]), compiled(batches()[0]))

    def test_zeros_that_are_filled_in_are_told_and_put_back(self, compiled: CompiledParts) -> None:
        changed = copy.deepcopy(compiled)
        with torch.no_grad():
            changed.parts["box"].get_submodule("0").weight.fill_(1.0)  # type: ignore[union-attr]
        assert fxprune.filled_zeros(changed)
        assert changed.report["box.0"].sparsity == 0
        assert changed.report["backbone.3"].sparsity == 0.5
        fxprune.restore_zeros(changed)
        assert not fxprune.filled_zeros(changed)


class TestCalibration:
    def test_a_later_part_sees_what_the_compressed_ones_before_it_give(self, compiled: CompiledParts) -> None:
        """The head by itself, on the inputs that reach it in the model whose backbone is compressed."""
        only = fxprune.compile(detector(), batches(), "2:4", exclude=("head", "box"), **QUICK)
        assert isinstance(only, CompiledParts)
        head = only.model.get_submodule("head")
        reading = Reading(whole=True)
        inputs = [c.inputs for b in batches() for c in calls_of(lambda b=b: reading.run(only.model, b), {"": head})[""]]  # type: ignore[misc]
        alone = fxprune.compile(head, inputs, "2:4", **QUICK)
        for name in ("tower.0", "scores"):
            wanted, found = (m.get_submodule(name).weight for m in (alone, compiled.parts["head"]))
            assert torch.equal(wanted, found)  # type: ignore[arg-type]

    def test_inputs_of_the_dense_model_on_request(self) -> None:
        options = fxprune.Options(inputs="dense")
        dense = fxprune.compile(detector(), batches(), "2:4", options=options, **QUICK)
        assert isinstance(dense, CompiledParts)
        inputs = [c["levels"] for b in batches() for c in _inputs_of_the_head(detector(), b)]
        alone = fxprune.compile(detector().head, [{"levels": x} for x in inputs], "2:4", options=options, **QUICK)
        assert torch.equal(dense.parts["head"].get_submodule("scores").weight, alone.get_submodule("scores").weight)  # type: ignore[arg-type]

    def test_whole_batches_are_held_out_where_rows_are_no_images(self) -> None:
        """Boxes of one image are alike: those of an image that was fitted make no honest score."""
        report = fxprune.compile(detector(), batches(24), "2:4", **QUICK).report
        assert report.images == 72
        assert report.images_held_out == 16
        assert all(row.relative_error is not None for row in report.layers if row.status == "pruned")

    @pytest.mark.parametrize("method", ["magnitude", "admm"])
    def test_every_method(self, method: str) -> None:
        found = fxprune.compile(detector(), batches(), "2:4", method=method, progress=False)
        assert found.report["box.2"].sparsity == 0.5

    def test_labels_beside_the_images(self) -> None:
        loader = [(tuple(images), tuple({"labels": torch.zeros(1)} for _ in images)) for images in batches()]
        found = fxprune.compile(detector(), loader, "2:4", **QUICK)
        wanted = fxprune.compile(detector(), batches(), "2:4", **QUICK)
        assert torch.equal(found.state_dict()["model.box.0.weight"], wanted.state_dict()["model.box.0.weight"])

    def test_an_interrupted_run_goes_on(self, tmp_path: Path) -> None:
        first = fxprune.compile(detector(), batches(), "2:4", checkpoint_dir=str(tmp_path), **QUICK)
        again = fxprune.compile(detector(), batches(), "2:4", checkpoint_dir=str(tmp_path), **QUICK)
        assert sorted(path.name for path in tmp_path.iterdir()) == ["backbone", "box", "head"]
        assert all(torch.equal(a, b) for a, b in zip(first.parameters(), again.parameters(), strict=True))


def _inputs_of_the_head(model: Detector, batch: list[Tensor]) -> list[dict[str, Any]]:
    calls = calls_of(lambda: model(batch), {"head": model.head})["head"]
    return [call.inputs for call in calls if call.inputs is not None]


class TestRecipes:
    def test_by_the_names_in_the_whole_model(self) -> None:
        found = fxprune.compile(detector(), batches(2), {"head.tower.*": "1:4", "box": "2:4"}, **QUICK)
        assert found.report["head.tower.0"].sparsity == 0.75
        assert found.report["box.0"].sparsity == 0.5
        assert found.report["head.scores"].status != "pruned"
        assert found.report["backbone.3"].reason == "named by no entry of the recipe"

    def test_a_misspelt_name(self) -> None:
        with pytest.raises(PatternError, match=r"'head\.towr' matches no layer"):
            fxprune.compile(detector(), batches(2), {"head.towr": "1:4"}, **QUICK)

    def test_a_rank(self) -> None:
        found = fxprune.compile(detector(), batches(), "rank:0.5", progress=False)
        assert found.report["box.0"].status == "factored"
        assert found.report.macs[0] > found.report.macs[1]


class TestFiles:
    def test_there_and_back(self, compiled: CompiledParts, tmp_path: Path) -> None:
        fxprune.save(compiled, tmp_path / "parts.pt")
        other = Detector()  # With other weights.
        again = fxprune.load(tmp_path / "parts.pt", into=other)
        assert same(again(batches()[0]), compiled(batches()[0]))
        assert again.report == compiled.report
        assert isinstance(other.backbone, nn.Sequential)

    def test_it_needs_the_python_around_the_parts(self, compiled: CompiledParts, tmp_path: Path) -> None:
        fxprune.save(compiled, tmp_path / "parts.pt")
        with pytest.raises(CheckpointError, match=r"parts of a Detector.*into=that Detector"):
            fxprune.load(tmp_path / "parts.pt")
        with pytest.raises(CheckpointError, match="has no such module"):
            fxprune.load(tmp_path / "parts.pt", into=nn.Linear(4, 4))
        wider = Detector()
        wider.steps = nn.Parameter(torch.ones(3, 3))
        with pytest.raises(CheckpointError, match="'steps' is not the same"):
            fxprune.load(tmp_path / "parts.pt", into=wider)

    def test_a_graph_needs_none(self, compiled: CompiledParts, tmp_path: Path) -> None:
        fxprune.save(compiled.parts["box"], tmp_path / "box.pt")
        with pytest.raises(CheckpointError, match="leave `into` out"):
            fxprune.load(tmp_path / "box.pt", into=Detector())

    def test_a_changed_weight_is_noticed(self, compiled: CompiledParts, tmp_path: Path) -> None:
        fxprune.save(compiled, tmp_path / "parts.pt")
        content = torch.load(tmp_path / "parts.pt", weights_only=True)
        content["parts"]["box"]["state_dict"]["0.weight"][0, 0] += 1
        torch.save(content, tmp_path / "parts.pt")
        with pytest.raises(CheckpointError, match="damaged"):
            fxprune.load(tmp_path / "parts.pt", into=Detector())

    def test_a_part_that_takes_a_list_has_a_file_of_its_own(self, compiled: CompiledParts, tmp_path: Path) -> None:
        given = compiled.inputs_of("head", batches()[0])
        assert len(given) == 1
        report = fxprune.export_onnx(compiled.parts["head"], tmp_path / "head.onnx", given[0])
        assert report.parity.max_abs < 1e-4
        import onnx

        assert [x.name for x in onnx.load(tmp_path / "head.onnx").graph.input] == ["levels_0", "levels_1"]

    def test_the_whole_has_none(self, compiled: CompiledParts, tmp_path: Path) -> None:
        with pytest.raises(ExportError, match=r"inputs_of\('backbone', batch\)"):
            fxprune.export_onnx(compiled, tmp_path / "model.onnx", batches()[0])
        with pytest.raises(GraphError, match="there are: backbone, head, box"):
            compiled.inputs_of("nose", batches()[0])

    def test_diff(self, compiled: CompiledParts, tmp_path: Path) -> None:
        found = fxprune.diff(detector(), compiled, example_inputs=batches()[0])
        assert found["head.tower.0 (call 1)"].status == "changed"
        assert found["backbone.3"].state.pattern == "2:4"
        assert any("backbone.1" in node.folded for node in found.nodes)
        found.to_html(tmp_path / "diff.html")
        with pytest.raises(TraceError, match="example_inputs"):
            fxprune.diff(detector(), compiled)  # The head takes a list, of what length only a batch says.

    def test_the_weights_go_back_to_the_class(self, compiled: CompiledParts) -> None:
        model = detector()
        state = fxprune.state_dict_for(compiled, model)
        model.load_state_dict(state)
        for a, b in zip(tensors(model(batches()[0])), tensors(compiled(batches()[0])), strict=True):
            assert torch.allclose(a, b, atol=1e-4)
        assert float((model.backbone[3].weight == 0).float().mean()) == 0.5


class Net(nn.Module):
    """Two convolutions with something between that no graph holds."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(8, 16, 3), nn.Conv2d(16, 8, 3)

    def between(self, x: Tensor) -> Tensor:
        return x.relu() if float(x.mean()) > 0 else -x

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.between(self.first(x)))


class NeedsMore(Net):
    """Reads a child's weight."""

    def between(self, x: Tensor) -> Tensor:
        return x * self.second.weight.mean() if float(x.mean()) > 0 else x


class WritesBeside(Net):
    def between(self, x: Tensor) -> Tensor:
        view = x[:, :4]
        view += 1
        return x


class OfManyCalls(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.step = nn.Sequential(nn.Conv2d(8, 8, 3, padding=1), nn.ReLU())

    def forward(self, x: Tensor) -> Tensor:
        for _ in range(1 + int(x.mean() > -1) + int(x.std() > 0)):
            x = self.step(x)
            x = F.max_pool2d(x, 2)  # Another size at every call.
        return x


X = torch.randn(32, 8, 16, 16, generator=torch.Generator().manual_seed(0))


class TestWhatIsFound:
    @pytest.mark.parametrize("kind", [Net, WritesBeside])
    def test_layers_called_by_the_root_itself(self, kind: type[Net]) -> None:
        model = kind().eval()
        found = fxprune.compile(model, X.split(8), "2:4", **QUICK)
        assert isinstance(found, CompiledParts)
        assert found.report.sparsity == 0.5
        assert found(X[:3]).shape == model(X[:3]).shape
        again = kind().eval()
        again.load_state_dict(fxprune.state_dict_for(found, model))
        assert torch.allclose(again(X[:3]), found(X[:3]), atol=1e-5)
        assert "first" in str(fxprune.diff(model, found))
        alone = fxprune.compile(model, X.split(8), "2:4", exclude=("*",), **QUICK)
        assert torch.equal(alone(X[:3]), model(X[:3]))

    def test_a_child_that_the_model_takes_apart_stays(self) -> None:
        found = fxprune.compile(NeedsMore(), X.split(8), "2:4", **QUICK)
        assert found.report["first"].status == "pruned"
        assert "the model needs more of it than its call" in found.report["second"].reason

    def test_calls_of_several_sizes(self) -> None:
        found = fxprune.compile(OfManyCalls(), X.split(8), "2:4", **QUICK)
        assert isinstance(found, CompiledParts)
        assert len(found.inputs_of("step", X[:8])) == 3
        assert found.report["step.0"].sparsity == 0.5

    def test_a_module_of_two_names_is_one_part(self) -> None:
        class Twice(Net):
            def __init__(self) -> None:
                super().__init__()
                self.again = self.second

            def forward(self, x: Tensor) -> Tensor:
                x = self.between(self.first(x))
                return self.again(x) + self.second(x)

        found = fxprune.compile(Twice(), X.split(8), "2:4", **QUICK)
        assert isinstance(found, CompiledParts)
        assert found.model.again is found.model.second
        assert len(found.paths) == 2

    def test_most_of_the_model_in_one_child_is_better_than_a_leaf(self) -> None:
        """The root can be traced around a leaf that holds nearly all weights; its children can be compiled."""

        class Wrapped(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.stem, self.body = nn.Conv2d(8, 8, 1), Net()

            def forward(self, x: Tensor) -> Tensor:
                return self.body(self.stem(x))

        found = fxprune.compile(Wrapped(), X.split(8), "2:4", **QUICK)
        assert isinstance(found, CompiledParts)
        assert found.report.sparsity == 0.5

    def test_what_cannot_be_compiled_says_so(self) -> None:
        search = Search(NeedsMore().eval(), Reading(whole=False), X[:8], ()).run()
        assert [part.path for part in search.parts] == ["first"]
        assert set(search.problems) == {"second"}


class TestWhatIsStillAnError:
    def test_a_batch_that_the_model_does_not_take(self) -> None:
        with pytest.raises((TraceError, CalibrationError)):
            fxprune.compile(Net(), torch.randn(16, 3, 16, 16).split(8), "2:4", **QUICK)

    def test_nothing_inside_is_a_graph(self) -> None:
        class Alone(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.weight = nn.Parameter(torch.randn(8, 8, 1, 1))

            def forward(self, x: Tensor) -> Tensor:
                return F.conv2d(x, self.weight) if float(x.mean()) > 0 else x

        with pytest.raises(TraceError, match="stopped in the model's own forward"):
            fxprune.compile(Alone(), X.split(8), "2:4", **QUICK)

    def test_passes_are_for_one_graph(self) -> None:
        with pytest.raises(TraceError):
            fxprune.compile(Net(), X.split(8), passes=fxprune.default_passes("2:4"), progress=False)
