"""save and load: what `fxprune.compile` returned, with its report, in one file."""

from __future__ import annotations

import copy
import hashlib
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, overload

import torch
from torch import Tensor, nn
from torch.fx import GraphModule

from fxprune.annotations import KEY
from fxprune.compiled import CompiledModule
from fxprune.compiled_parts import CompiledParts
from fxprune.errors import CheckpointError
from fxprune.files import read_torch_file, save_tensors
from fxprune.fine_tuning.recorded_zeros import filled_zeros
from fxprune.graph.model_argument import not_a_model
from fxprune.parts.search import put_in
from fxprune.saving.graphs import decode_graph, encode_graph, encode_meta
from fxprune.saving.modules import ModuleReader, ModuleWriter
from fxprune.saving.names import Allowed, is_identifier
from fxprune.saving.values import Reader, Writer

FORMAT = "fxprune graph"
PARTS_FORMAT = "fxprune parts"
VERSION = 1


def save(compiled: GraphModule | CompiledParts, path: str | Path, *, allow: Allowed = ()) -> None:
    """Write a pruned model to a file that `load` reads: graph, weights, report and what every pass did.

    The file is written beside its final place and moved there once complete. Of a model with compiled parts it holds these and
    all weights, and not the Python around them.

    Args:
        compiled: what `fxprune.compile` returned, or any GraphModule.
        path: the file, by habit ``.pt``.
        allow: functions that the graph calls and classes of its leaf modules, where they are neither torch's,
            torchvision's nor timm's. `load` must be given the same.

    Raises:
        CheckpointError: the graph holds something that cannot be stored by name, or the model's zeros have been filled in;
            the message says what, and the remedy.
        OSError: the file cannot be written.
    """
    if not isinstance(compiled, nn.Module):
        raise CheckpointError(not_a_model(compiled))
    if not isinstance(compiled, (GraphModule, CompiledParts)):
        raise CheckpointError(
            f"save takes what fxprune.compile returned, or another GraphModule, not a {type(compiled).__name__}; of a "
            "plain module keep the state_dict, of a compiled or wrapped one the module inside"
        )
    if filled := filled_zeros(compiled):
        raise CheckpointError(
            f"{path} would not hold a pruned model: {filled}. To keep the weights as they are, "
            "torch.save(compiled.state_dict(), path)"
        )
    save_tensors(
        _parts_written(compiled, allow) if isinstance(compiled, CompiledParts) else _written(compiled, allow), path
    )


def _written(compiled: GraphModule, allow: Allowed) -> dict[str, Any]:
    """A graph as plain values and tensors."""
    writer = Writer(tuple(allow))
    modules = ModuleWriter(writer)
    try:
        content = {
            "class_name": _class_name(compiled),
            "modules": modules.encode(compiled),
            "nodes": encode_graph(compiled, writer),
            "meta": encode_meta(compiled.meta, writer),
            "training": {name: module.training for name, module in compiled.named_modules()},
        }
    except RecursionError as error:
        raise CheckpointError("the model holds a value that contains itself, or values nested too deeply") from error
    return _with_digest(FORMAT, json.dumps(content), modules.weights, writer.tensors)


def _parts_written(compiled: CompiledParts, allow: Allowed) -> dict[str, Any]:
    """Compiled parts, and the weights around them, as plain values and tensors."""
    writer = Writer(tuple(allow))
    content = {"class_name": type(compiled.model).__name__, "meta": encode_meta(compiled.meta, writer)}
    whole = _with_digest(PARTS_FORMAT, json.dumps(content), compiled.state_around(), writer.tensors)
    return whole | {"parts": {path: _written(part, allow) for path, part in compiled.parts.items()}}


def _with_digest(kind: str, graph: str, weights: dict[str, Tensor], tensors: dict[str, Tensor]) -> dict[str, Any]:
    whole = {
        "format": kind,
        "version": VERSION,
        "torch": str(torch.__version__),
        "graph": graph,
        "state_dict": weights,
        "tensors": tensors,
    }
    return whole | {"digest": _digest(whole)}


@overload
def load(path: str | Path, *, into: None = None, allow: Allowed = ()) -> CompiledModule: ...


@overload
def load(path: str | Path, *, into: nn.Module, allow: Allowed = ()) -> CompiledParts: ...


def load(path: str | Path, *, into: nn.Module | None = None, allow: Allowed = ()) -> CompiledModule | CompiledParts:
    """Read a model that `save` wrote. No code from the file is run.

    Args:
        path: the file.
        into: for the file of a model with compiled parts an instance of the class that was compiled, whatever its weights;
            it is copied, not modified.
        allow: as for `save`.

    Returns:
        The same graph, weights and report, on the CPU.

    Raises:
        CheckpointError: the file is absent, damaged, of another kind, or names something not on the list; or `into` is left out
            where it is needed, given where it is not, or of another class.
    """
    content = _read(Path(path))
    if content.get("format") not in (FORMAT, PARTS_FORMAT):
        raise CheckpointError(
            f"{path} is not a file of fxprune.save's. If it holds weights alone, they go into a model: "
            "model.load_state_dict(torch.load(path)), or fxprune evaluate with --model"
        )
    if content.get("version") != VERSION:
        raise CheckpointError(
            f"{path} has format version {content.get('version')}, this fxprune reads {VERSION}; upgrade it"
        )
    if into is not None and content["format"] == FORMAT:
        raise CheckpointError(f"{path} holds a whole graph, which needs no model around it: leave `into` out")
    try:
        if content["format"] == PARTS_FORMAT:
            return _parts_read(content, into, tuple(allow))
        return _graph_read(content, tuple(allow))
    except CheckpointError as error:
        raise CheckpointError(f"{path}: {error}") from error
    except (
        KeyError,
        TypeError,
        ValueError,
        AttributeError,
        IndexError,
        AssertionError,
        RuntimeError,
        SyntaxError,
    ) as error:
        raise CheckpointError(f"{path} is damaged: {type(error).__name__}: {error}") from error


def _graph_read(content: Mapping[str, Any], allow: Allowed) -> CompiledModule:
    _check_digest(content)
    return _build(json.loads(content["graph"]), content, allow)


def _parts_read(content: Mapping[str, Any], into: nn.Module | None, allow: Allowed) -> CompiledParts:
    """A model of the user's class with the parts of a file in their places, and the other weights of the file."""
    _check_digest(content)
    data = json.loads(content["graph"])
    name = data["class_name"]
    if into is None:
        raise CheckpointError(
            f"it holds the compiled parts of a {name}, and not the Python around them. Make a {name} as it was made before "
            f"it was compiled, and call fxprune.load(path, into=that {name})"
        )
    if not isinstance(into, nn.Module):
        raise CheckpointError(f"into: {not_a_model(into)}")
    parts = {path: _graph_read(part, allow) for path, part in content["parts"].items()}
    reader = Reader(allow, content["tensors"])
    report = reader.decode(data["meta"][KEY]).report
    model = copy.deepcopy(into).cpu()
    for path, part in parts.items():
        try:
            put_in(model, path, part)
        except AttributeError as error:
            raise CheckpointError(
                f"it holds a part {path!r} of a {name}, and the {type(into).__name__} given has no such module"
            ) from error
    compiled = CompiledParts(model, tuple(parts), report).eval()
    own, found = compiled.state_around(), content["state_dict"]
    if wrong := sorted(own.keys() ^ found.keys()) or [n for n in own if own[n].shape != found[n].shape]:
        raise CheckpointError(
            f"{wrong[0]!r} is not the same in the file and in the {type(into).__name__} given: make it with the arguments with "
            "which the one that was compiled was made"
        )
    for key, tensor in own.items():
        tensor.copy_(found[key])
    return compiled


def is_saved(path: str | Path) -> bool:
    """Whether a file is one of `save`'s, rather than a plain weights file.

    Raises:
        CheckpointError: it is absent or unreadable.
    """
    return _read(Path(path)).get("format") in (FORMAT, PARTS_FORMAT)


def _check_digest(content: Mapping[str, Any]) -> None:
    if "digest" in content and content["digest"] != _digest(content):  # Absent from files of older versions.
        raise CheckpointError("its content is not what was written; it is damaged: copy or download it again")


def _build(data: dict[str, Any], content: Mapping[str, Any], allow: Allowed) -> CompiledModule:
    reader = Reader(allow, content["tensors"])
    root = ModuleReader(reader, content["state_dict"]).decode(data["modules"])
    graph = decode_graph(data["nodes"], reader)
    graph.lint()
    if not is_identifier(data["class_name"]):
        raise CheckpointError(f"the file's model has the name {data['class_name']!r}, which is no class name")
    compiled = CompiledModule(root, graph, data["class_name"])
    # The constructor takes over what the graph calls, in that order; the model had all of these, in theirs.
    for parts in ("_parameters", "_buffers", "_modules", "_non_persistent_buffers_set"):
        compiled.__dict__[parts] = root.__dict__[parts]
    compiled.meta.update({key: reader.decode(value) for key, value in data["meta"].items()})
    for name, module in compiled.named_modules():
        module.training = bool(data["training"][name])
    return compiled


def _digest(content: Mapping[str, Any]) -> str:
    """A fingerprint of graph and tensors, since torch.load does not notice a changed byte of a weight."""
    found = hashlib.sha256(content["graph"].encode())
    for kind in ("state_dict", "tensors"):
        for name, tensor in content[kind].items():
            found.update(f"{kind} {name} {tensor.dtype} {tuple(tensor.shape)}".encode(errors="surrogatepass"))
            if tensor.layout == torch.strided and not tensor.is_meta and not tensor.is_quantized:
                plain = tensor.detach().cpu().resolve_conj().resolve_neg().contiguous()
                found.update(plain.reshape(-1).view(torch.uint8).numpy())
    return found.hexdigest()


def _class_name(compiled: GraphModule) -> str:
    """The model's class name as an identifier."""
    name = re.sub(r"\W|^(?=\d)", "_", compiled._get_name())
    return name if is_identifier(name) else f"_{name}"


def _read(path: Path) -> Mapping[str, Any]:
    return {} if path.suffix == ".safetensors" and path.is_file() else read_torch_file(path)
