"""Takes one network through every stage, and says how far it came."""

from __future__ import annotations

import tempfile
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx
import torch
from torch import Tensor, nn
from torch.fx import GraphModule

import fxprune
from benchmarks.coverage.awkward import RETURNED
from benchmarks.coverage.row import OK, Row
from benchmarks.coverage.zoos import Case
from fxprune.calibration.batches import map_tensors, tensors_in
from fxprune.errors import ExportError, ValidationError
from fxprune.experiments.tasks import module_classes
from fxprune.geometry import LayerGeometry, is_matrix_layer
from fxprune.intake.record import intake
from fxprune.onnx_import import import_onnx
from fxprune.report import PruneReport

LONGEST = 240  # Characters of a message.
HOLDS_MATRICES = (nn.RNNBase, nn.RNNCellBase, nn.MultiheadAttention, nn.Bilinear)
PRODUCTS = ("matmul", "einsum", "bmm", "mm", "addmm", "linear", "conv")


def run(
    case: Case, *, pattern: str, method: str, debug: bool = False, tell: Callable[[Row], None] = lambda row: None
) -> Row:
    """A row of the table; `tell` is given what is known of it after each stage."""
    row = Row(case.zoo, case.name)
    started = time.perf_counter()
    warnings.simplefilter("ignore")
    torch.manual_seed(0)
    try:
        given = case.build()
    except ImportError as error:
        row.note = f"not installed: {error}"
        return row
    # Of a file the network that it is read as, which is checked against onnxruntime as it is read.
    model = given.eval() if isinstance(given, nn.Module) else import_onnx(given, case.batches()[0])
    row.millions = sum(p.numel() for p in model.parameters()) / 1e6
    with tempfile.TemporaryDirectory() as folder:
        stages = _Stages(given, model, case.batches(), pattern, method, Path(folder), row)
        for name in ("compile", "export", "diff", "save", "load", "exclude"):
            if stages.compiled is None and name not in ("compile", "exclude"):
                continue
            if name == "load" and row.save != OK:
                continue
            try:
                setattr(row, name, getattr(stages, name)() or OK)
            except Exception as error:
                if debug:
                    traceback.print_exc()
                message = " ".join(str(error).split())
                setattr(row, name, f"{type(error).__name__}: {message}"[:LONGEST])
            tell(row)
    row.seconds = time.perf_counter() - started
    return row


class _Stages:
    """The stages of one network; each raises where it goes wrong, and gives "-" where it does not apply."""

    def __init__(
        self,
        given: nn.Module | Path,
        model: nn.Module,
        batches: list[Any],
        pattern: str,
        method: str,
        folder: Path,
        row: Row,
    ) -> None:
        self.given = given
        self.model = model
        self.batches = batches
        self.pattern = pattern
        self.method = method
        self.folder = folder
        self.row = row
        self.compiled: Any = None
        self.allow = (*module_classes(model), *RETURNED)  # What a file may name of the user's own code.

    def compile(self) -> None:
        compiled = fxprune.compile(self.given, self.batches, self.pattern, method=self.method, progress=False)
        found = intake(compiled)
        self.row.way = "parts" if hasattr(compiled, "parts") else "" if found is None else found.way
        if hasattr(compiled, "parts"):
            self.row.note = f"parts: {', '.join(compiled.parts)}"
        leaves = [] if found is None else [f"{leaf.name} ({leaf.kind}), {leaf.share:.1%}" for leaf in found.leaves]
        if leaves:
            self.row.note = f"called as a whole: {', '.join(leaves)}"
        self.row.of_possible, self.row.of_all, self.row.rest = shares(self.model, compiled.report, self.pattern)
        all_of_it = sum(p.numel() for p in self.model.parameters() if p.dim() > 1)
        self.row.unread = sum(row.weights for row in compiled.report.unread) / max(all_of_it, 1)
        wanted, got = self._outputs(self.model), self._outputs(compiled)
        if [x.shape for x in wanted] != [x.shape for x in got] and not hasattr(compiled, "parts"):
            raise ValueError("other shapes of outputs")
        if isinstance(compiled, GraphModule):
            self.allow = (*self.allow, *_functions_of_package(self.model, compiled))
        self.compiled = compiled

    def export(self) -> str | None:
        try:
            return self._export()
        except (ExportError, ValidationError) as error:
            if "fixes the batch size in its graph" in str(error) and not self._torch_exports(open_batch=True):
                self._export(dynamic_batch=False)
                self._note("exported for one batch size, which torch's exporter fixes in the model, too")
                return None
            refused = "torch.onnx.export fails" in str(error) or "onnx.checker rejects" in str(error)
            if refused and not self._torch_exports(open_batch=False):
                told = f"torch's exporter fails on the model, too: {error}"
                self._note(" ".join(told.split())[:LONGEST])
                return "-"
            raise

    def _note(self, told: str) -> None:
        self.row.note = f"{self.row.note}; {told}" if self.row.note else told

    def _torch_exports(self, *, open_batch: bool) -> bool:
        """Whether torch's exporter makes a valid file of the user's model, and leaves the batch size open if it is to."""
        batch = self.batches[0] if isinstance(self.batches[0], tuple) else (self.batches[0],)
        axes = tuple({0: torch.export.Dim("batch")} for _ in batch) if open_batch else None
        try:
            program = torch.onnx.export(self.model, batch, dynamo=True, verbose=False, dynamic_shapes=axes)
            assert program is not None
            program.save(self.folder / "torch.onnx", external_data=True)
            onnx.checker.check_model(self.folder / "torch.onnx")
        except Exception:
            return False
        return not open_batch or not any(isinstance(x.shape[0], int) for x in program.model.graph.inputs if x.shape)

    def _export(self, *, dynamic_batch: bool = True) -> None:
        if hasattr(self.compiled, "parts"):
            for name, part in self.compiled.parts.items():
                calls = self.compiled.inputs_of(name, self.batches[0])
                fxprune.export_onnx(part, self.folder / "part.onnx", calls[0])
            return
        fxprune.export_onnx(self.compiled, self.folder / "model.onnx", self.batches[0], dynamic_batch=dynamic_batch)

    def diff(self) -> str | None:
        if isinstance(self.given, Path):  # Two files, as there is no comparing a file with a model.
            after = self.folder / "model.onnx"
            if not after.exists():
                return "-"
            if not str(fxprune.diff(self.given, after)):
                raise ValueError("an empty difference")
            return None
        if not str(fxprune.diff(self.given, self.compiled, example_inputs=self.batches[0])):
            raise ValueError("an empty difference")
        return None

    def save(self) -> None:
        fxprune.save(self.compiled, self.folder / "model.pt", allow=self.allow)

    def load(self) -> None:
        into = {"into": self.model} if hasattr(self.compiled, "parts") else {}
        loaded = fxprune.load(self.folder / "model.pt", allow=self.allow, **into)
        if not _equal(self._outputs(self.compiled), self._outputs(loaded)):
            raise ValueError("other outputs than what was saved")
        if loaded.report != self.compiled.report:
            raise ValueError("another report than what was saved")

    def exclude(self) -> None:
        alone = fxprune.compile(
            self.given, self.batches, self.pattern, method=self.method, exclude=("*",), progress=False
        )
        wanted, got = self._outputs(self.model), self._outputs(alone)
        if not _equal(wanted, got):
            worst = max(
                (float((a - b).abs().max()) for a, b in zip(wanted, got, strict=False) if a.numel()), default=0.0
            )
            raise ValueError(f"not the model's outputs: off by up to {worst:.2g}")

    def _outputs(self, module: nn.Module) -> list[Tensor]:
        batch = map_tensors(self.batches[0], torch.clone)
        torch.manual_seed(2)
        with torch.no_grad():
            result = module(*batch) if isinstance(batch, tuple) else module(batch)
        return list(tensors_in(result))


def _functions_of_package(model: nn.Module, compiled: GraphModule) -> set[Callable[..., Any]]:
    """Functions of the model's own package that its graph calls, since they are hidden from torch.fx."""
    package = type(model).__module__.partition(".")[0]
    called = {node.target for node in compiled.graph.nodes if callable(node.target)}
    return {f for f in called if str(getattr(f, "__module__", "")).partition(".")[0] == package}


def _equal(a: list[Tensor], b: list[Tensor]) -> bool:
    return len(a) == len(b) > 0 and all(torch.equal(x.nan_to_num(), y.nan_to_num()) for x, y in zip(a, b, strict=True))


def shares(model: nn.Module, report: PruneReport, pattern: str) -> tuple[float, float, str]:
    """What share of the weights that the pattern could hold was pruned, what share of all, and why not the rest.

    What could hold the pattern is told by the user's model alone, and not by the report: convolutions, transposed ones and
    linear layers with a number of input channels that suits it, the matrices of attention and recurrent layers, and bare
    parameters that something multiplies by. Weights that no output depends on, which the compiled model does without, count
    among all weights only.

    Args:
        model: the user's.
        report: of the result.
        pattern: "N:M".
    """
    rows = {row.name: row for row in report.layers}.values()
    done = sum(row.weights for row in rows if row.status == "pruned")
    total = sum(p.numel() for p in model.parameters() if p.dim() > 1)
    could = possible(model, report, pattern)
    reasons: Counter[str] = Counter()
    for row in rows:
        if row.status not in ("pruned", "unread") and "not a multiple" not in row.reason:
            reasons[row.reason] += row.weights
    told = [
        f"{weights / total:.1%}: {reason}"[:160]
        for reason, weights in reasons.most_common(3)
        if weights >= 0.01 * total
    ]
    return (
        done / could if could else 1.0,
        done / total if total else 1.0,
        "; ".join(told) if done < 0.98 * could else "",
    )


def possible(model: nn.Module, report: PruneReport, pattern: str) -> int:
    """How many weights of a model could hold a pattern, without those that no output depends on."""
    chosen = fxprune.Pattern.parse(pattern)
    multiple = int(pattern.partition(":")[2])
    found: dict[int, int] = {}
    bare: dict[str, nn.Parameter] = {}
    for path, module in model.named_modules():
        weights = {name: p for name, p in module.named_parameters(recurse=False) if p.dim() > 1}
        if is_matrix_layer(module):
            fits = chosen.decline(LayerGeometry.of(module)) is None
            weight = weights.get("weight", next(iter(weights.values()), None))  # Or weight_orig, weight_v.
            if weight is not None:
                found[id(weight)] = weight.numel() * fits
        elif isinstance(module, HOLDS_MATRICES):
            found |= {id(p): p.numel() * (p.shape[-1] % multiple == 0) for p in weights.values()}
        elif not isinstance(module, (nn.Embedding, nn.EmbeddingBag)):
            bare |= {f"{path}.{name}" if path else name: p for name, p in weights.items()}
    rows = {row.name: row for row in report.layers}
    parameters = dict(model.named_parameters(remove_duplicate=False))
    for row in report.unread:
        unread = parameters.get(f"{row.name}.weight", parameters.get(row.name))
        found.pop(id(unread), None)
    for name, p in bare.items():
        row = rows.get(name)
        if id(p) not in found and row is not None and any(f"only {product}" in row.reason for product in PRODUCTS):
            found[id(p)] = p.numel()
    pruned = sum(row.weights for row in rows.values() if row.status == "pruned")
    in_layers = sum(row.weights for row in rows.values() if row.status == "pruned" and row.name in bare)
    return max(sum(found.values()) + in_layers, pruned)
