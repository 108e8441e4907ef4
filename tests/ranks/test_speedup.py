from __future__ import annotations

import copy
from pathlib import Path

import onnx
import pytest
import torch
from torch import Tensor, nn
from torch.fx import GraphModule, symbolic_trace

from fxprune.annotations import annotation
from fxprune.errors import OptionsError, ValidationError
from fxprune.export.latency import measure_latency
from fxprune.export.torch_export import to_onnx_program
from fxprune.options import Method
from fxprune.passes import InsertObservers
from fxprune.rank_reduction import low_rank, low_rank_options
from fxprune.ranks import speedup
from fxprune.ranks.plan import RankPlan, RankRule, Survey
from fxprune.ranks.survey import survey
from fxprune.recipe import Recipe
from fxprune.solvers import Magnitude
from tests.pipelines import calibration


def model() -> nn.Module:
    torch.manual_seed(0)
    convs = [nn.Conv2d(8, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 8, 3, padding=1), nn.ReLU()]
    return nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), *convs, nn.Flatten(), nn.Linear(8 * 36, 10)).eval()


def surveyed() -> tuple[GraphModule, Survey, Tensor]:
    x = torch.randn(4, 3, 6, 6, generator=torch.Generator().manual_seed(1))
    graph_module = symbolic_trace(copy.deepcopy(model()))
    InsertObservers(Recipe.parse("rank:0.7"))(graph_module)
    layers = [node for node in graph_module.graph.nodes if annotation(node).role == "compress"]
    method = Method(Magnitude(), low_rank_options(None, "svd"))
    found = survey(graph_module, layers, calibration([x]), method, splits=("channel", "spatial"), multiple=1)
    return graph_module, found, x[:1]


def test_search_ends_near_the_wanted_speedup() -> None:
    _, found, _ = surveyed()
    seen: list[float] = []

    def speed(plan: RankPlan) -> float:
        seen.append(plan.macs[0] / plan.macs[1])
        return seen[-1]

    plan = speedup.search(found, 1.5, speed)
    reached = plan.macs[0] / plan.macs[1]
    assert 1.5 <= reached < 1.6
    assert len(seen) == speedup.TRIALS
    assert reached == min(ratio for ratio in seen if ratio >= 1.5)
    assert plan.rule == f"rank speedup:1.5, measured {reached:.2f}"


def test_time_that_does_not_shrink_with_the_macs_needs_lower_ranks() -> None:
    _, found, _ = surveyed()
    dense = found.macs
    plan = speedup.search(found, 1.4, lambda plan: 2 * dense / (plan.macs[1] + dense))
    assert 2 * dense / (plan.macs[1] + dense) >= 1.4


def test_a_speedup_out_of_reach_names_the_best_one() -> None:
    _, found, _ = surveyed()
    with pytest.raises(OptionsError, match=r"a speed-up of 3 is out of reach: it was 1\.10"):
        speedup.search(found, 3.0, lambda plan: 1.1)


def test_files_have_the_shape_of_the_plan(tmp_path: Path) -> None:
    graph_module, found, image = surveyed()
    text = str(graph_module.graph)
    plan = RankRule.parse("macs:0.6").plan(found)
    speedup.write_shape(graph_module, plan, [image], tmp_path / "candidate.onnx")
    assert str(graph_module.graph) == text  # the candidate is a copy
    graph = onnx.load(str(tmp_path / "candidate.onnx")).graph
    sizes = {tensor.name: list(tensor.dims) for tensor in graph.initializer}
    weights = [(node.op_type, torch.Size(sizes[node.input[1]]).numel()) for node in graph.node if len(node.input) > 1]
    count = sum(size * {"Conv": 36, "Gemm": 1}.get(op, 0) for op, size in weights)
    assert count == plan.macs[1] < found.macs


@pytest.mark.slow
def test_low_rank_for_a_measured_speedup() -> None:
    torch.manual_seed(4)
    convs = [part for _ in range(4) for part in (nn.Conv2d(64, 64, 3, padding=1), nn.ReLU())]
    wide = nn.Sequential(nn.Conv2d(3, 64, 3, padding=1), nn.ReLU(), *convs, nn.Flatten(), nn.Linear(64 * 24**2, 10))
    x = torch.randn(2, 3, 24, 24, generator=torch.Generator().manual_seed(2))
    compiled = low_rank(wide, [x], "speedup:1.2", method="svd", device="cpu", progress=False)
    before, after = compiled.report.macs
    assert before / after > 1.1
    assert compiled.report.pattern.startswith("rank speedup:1.2, measured 1.")
    assert all(layer.rank % 16 == 0 for layer in compiled.report.layers)


def test_measured_latency(tmp_path: Path) -> None:
    torch.manual_seed(3)
    x = torch.randn(1, 16, 24, 24)
    small, large = nn.Conv2d(16, 4, 1), nn.Sequential(*[nn.Conv2d(16, 16, 5, padding=2) for _ in range(4)])
    paths = [tmp_path / "large.onnx", tmp_path / "small.onnx"]
    for path, module in zip(paths, (large, small), strict=True):
        program = to_onnx_program(module.eval(), (x,), opset=None, dynamic_batch=False, precision="fp32")
        program.save(str(path))
    slow, fast = measure_latency(paths, [x], runs=8)
    assert slow.median > 3 * fast.median > 0
    assert fast.low <= fast.median <= fast.high
    assert fast.runs == 8
    with pytest.raises(ValidationError, match="cannot run"):
        measure_latency(paths, [x[:, :5]])
