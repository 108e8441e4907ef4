from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.sparse import SparseSemiStructuredTensorCUSPARSELT, SparseSemiStructuredTensorCUTLASS

from fxprune.export import assess_deployment, tensorrt_2to4, torch_semi_structured
from fxprune.layers.deployment import LEGEND, SEMI_STRUCTURED_UNITS
from fxprune.pattern import Pattern


def sparse(*shape: int, pattern: str = "2:4") -> Tensor:
    return Pattern.parse(pattern).project(torch.randn(*shape))


def naive_2to4(weight: Tensor) -> bool:
    """The rule, word for word: for each (k, r, s), every 4 consecutive input channels hold at least 2 zeros."""
    k, c = weight.shape[:2]
    if c % 4:
        return False
    columns = weight.reshape(k, c, -1)
    return all(
        int((columns[i, 4 * g : 4 * g + 4, p] == 0).sum()) >= 2
        for i in range(k)
        for g in range(c // 4)
        for p in range(columns.shape[2])
    )


@pytest.mark.parametrize("trial", range(40))
def test_tensorrt_rule_against_its_words(trial: int) -> None:
    torch.manual_seed(trial)
    channels = int(torch.randint(1, 4, ())) * 4 + (trial % 5 == 0)
    weight = torch.randn(3, channels, *((2, 2) if trial % 2 else ()))
    weight = weight * (torch.rand_like(weight) < 0.3)
    if trial % 3 and channels % 4 == 0:
        weight = Pattern.parse("2:4").project(weight)
    assert tensorrt_2to4(weight).ok == naive_2to4(weight)


def test_both_outcomes_of_the_rule_occur() -> None:
    outcomes = set()
    for trial in range(40):
        torch.manual_seed(trial)
        weight = torch.randn(3, 8, 2, 2)
        outcomes.add(naive_2to4(Pattern.parse("2:4").project(weight) if trial % 3 else weight))
    assert outcomes == {True, False}


@pytest.mark.parametrize(
    ("shape", "op", "ok", "reason"),
    [
        ((64, 64, 3, 3), "Conv2d", True, "multiple of 4"),
        ((64, 3, 7, 7), "Conv2d", False, "3 input channels are not a multiple of 4"),
        ((64, 1, 3, 3), "Conv2d", False, "depthwise"),
        ((10, 64), "Linear", True, "multiple of 4"),
        ((10, 30), "Gemm", False, "30 input channels"),
        ((8, 8, 3), "Conv1d", True, "multiple of 4"),
        ((8, 8, 3, 3, 3), "Conv3d", False, "2-D convolutions only"),
        ((8, 8, 3, 3), "ConvTranspose2d", False, "transposed"),
    ],
)
def test_tensorrt_shapes(shape: tuple[int, ...], op: str, ok: bool, reason: str) -> None:
    rule = tensorrt_2to4(shape, op=op)
    assert rule.ok is ok
    assert reason in rule.reason


def test_wrong_axis_is_not_eligible() -> None:
    # Grouping over torch's own flattening (C, kh, kw), a common mistake.
    weight = Pattern.parse("2:4").project(torch.randn(16, 16 * 9)).reshape(16, 16, 3, 3)
    rule = tensorrt_2to4(weight)
    assert not rule.ok
    assert "hold fewer than 2 zeros" in rule.reason
    assert assess_deployment(weight).verdict == "not 2:4: no speed-up"


def test_stricter_patterns_are_eligible() -> None:
    assert tensorrt_2to4(sparse(8, 16, 3, 3, pattern="1:4")).ok
    assert not tensorrt_2to4(torch.ones(8, 16)).ok
    weight = torch.zeros(8, 16)
    weight[:, 0:4] = 1  # 4:8, but not 2:4
    assert not tensorrt_2to4(weight).ok


def test_units_are_torchs_own() -> None:
    for kind, name in (
        (SparseSemiStructuredTensorCUSPARSELT, "cuSPARSELt"),
        (SparseSemiStructuredTensorCUTLASS, "CUTLASS"),
    ):
        for dtype in (torch.float16, torch.bfloat16):
            unit = kind._DTYPE_SHAPE_CONSTRAINTS[dtype]
            assert SEMI_STRUCTURED_UNITS[name] == (unit.sparse_min_rows, unit.sparse_min_cols)


@pytest.mark.parametrize(
    ("weight", "op", "dtype", "ok", "reason"),
    [
        (sparse(32, 64), "Linear", torch.float16, True, "cuSPARSELt and CUTLASS"),
        (sparse(16, 16), "Linear", torch.bfloat16, True, "fits cuSPARSELt"),
        (sparse(64, 64, 1, 1), "Conv2d", torch.float16, True, "fits"),
        (sparse(64, 64, 3, 3), "Conv2d", torch.float16, False, "1x1"),
        (sparse(32, 64), "Linear", torch.float32, False, "float16 and bfloat16, not float32"),
        (
            sparse(10, 64),
            "Linear",
            torch.float16,
            False,
            "no multiple of 16x16 (cuSPARSELt) or 32x64 (CUTLASS)",
        ),
        (torch.ones(32, 64), "Linear", torch.float16, False, "not 2:4"),
        ((32, 64), "Linear", torch.float16, True, "fits"),
    ],
)
def test_torch_shapes(weight: Tensor, op: str, dtype: torch.dtype, ok: bool, reason: str) -> None:
    rule = torch_semi_structured(weight, op=op, dtype=dtype)
    assert rule.ok is ok
    assert reason in rule.reason


@pytest.mark.parametrize(
    ("weight", "options", "verdict", "gain"),
    [
        (sparse(256, 256, 3, 3), {}, "2:4, gain possible", "possible"),
        (sparse(256, 256, 1, 1), {"precision": "int8"}, "2:4, gain possible", "possible"),
        (sparse(256, 256, 3, 3), {"precision": "fp32"}, "2:4, fp32: gain unlikely", "unlikely"),
        (sparse(64, 256, 3, 3), {}, "2:4, small: gain unlikely", "unlikely"),
        (sparse(256, 64, 3, 3), {}, "2:4, small: gain unlikely", "unlikely"),
        (sparse(512, 256, 3, 3), {"groups": 2}, "2:4, grouped: gain unlikely", "unlikely"),
        (sparse(512, 512, pattern="0.9"), {"op": "Linear"}, "not 2:4: no speed-up", "none"),
        (torch.randn(64, 64, 3, 3), {}, "dense", "none"),
        (torch.randn(64, 3, 3, 3), {}, "dense", "none"),
        (torch.zeros(64, 64, 0), {}, "2:4, small: gain unlikely", "unlikely"),
    ],
)
def test_verdicts(weight: Tensor, options: dict[str, object], verdict: str, gain: str) -> None:
    found = assess_deployment(weight, **options)  # type: ignore[arg-type]
    assert found.verdict == verdict
    assert found.gain == gain
    assert len(found.verdict) <= 30  # fits a table cell


@pytest.mark.parametrize("pattern", ["2:4", "1:4", "4:8", "0.5", "0.9"])
@pytest.mark.parametrize("channels", [16, 512])
def test_no_speed_up_is_promised(pattern: str, channels: int) -> None:
    found = assess_deployment(sparse(channels, channels, pattern=pattern), op="Linear")
    assert "On onnxruntime's CPU provider N:M zeros bring no speed-up" in found.explanation
    assert "low_rank" in found.explanation
    for promise in ("will be faster", "is faster", "guarantee", "twice"):
        assert promise not in found.explanation
    if found.gain == "possible":
        assert "not certain" in found.explanation


def test_legend_covers_every_sparse_verdict() -> None:
    for weight in (sparse(256, 256), sparse(16, 16), sparse(16, 16, pattern="0.9")):
        assert assess_deployment(weight).verdict in LEGEND
    assert assess_deployment(sparse(16, 16), groups=2).verdict in LEGEND
