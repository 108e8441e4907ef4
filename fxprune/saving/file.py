"""save and load: a CompiledModule, with its report, in one file."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.fx import GraphModule

from fxprune.compiled import CompiledModule
from fxprune.errors import CheckpointError
from fxprune.files import read_torch_file, save_tensors
from fxprune.fine_tuning.recorded_zeros import filled_zeros
from fxprune.graph.model_argument import not_a_model
from fxprune.saving.graphs import decode_graph, encode_graph, encode_meta
from fxprune.saving.modules import ModuleReader, ModuleWriter
from fxprune.saving.names import Allowed, is_identifier
from fxprune.saving.values import Reader, Writer

FORMAT = "fxprune graph"
VERSION = 1


def save(compiled: GraphModule, path: str | Path, *, allow: Allowed = ()) -> None:
    """Write a pruned model to a file that `load` reads: graph, weights, report and what every pass did.

    The file is written beside its final place and moved there once complete.

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
    if not isinstance(compiled, GraphModule):
        raise CheckpointError(
            f"save takes what fxprune.compile returned, or another GraphModule, not a {type(compiled).__name__}; of a "
            "plain module keep the state_dict, of a compiled or wrapped one the module inside"
        )
    if filled := filled_zeros(compiled):
        raise CheckpointError(
            f"{path} would not hold a pruned model: {filled}. To keep the weights as they are, "
            "torch.save(compiled.state_dict(), path)"
        )
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
    whole = {
        "format": FORMAT,
        "version": VERSION,
        "torch": str(torch.__version__),
        "graph": json.dumps(content),
        "state_dict": modules.weights,
        "tensors": writer.tensors,
    }
    whole["digest"] = _digest(whole)
    save_tensors(whole, path)


def load(path: str | Path, *, allow: Allowed = ()) -> CompiledModule:
    """Read a model that `save` wrote. No code from the file is run.

    Args:
        path: the file.
        allow: as for `save`.

    Returns:
        The same graph, weights and report, on the CPU.

    Raises:
        CheckpointError: the file is absent, damaged, of another kind, or names something not on the list.
    """
    content = _read(Path(path))
    if content.get("format") != FORMAT:
        raise CheckpointError(
            f"{path} is not a file of fxprune.save's. If it holds weights alone, they go into a model: "
            "model.load_state_dict(torch.load(path)), or fxprune evaluate with --model"
        )
    if content.get("version") != VERSION:
        raise CheckpointError(
            f"{path} has format version {content.get('version')}, this fxprune reads {VERSION}; upgrade it"
        )
    try:
        if "digest" in content and content["digest"] != _digest(content):  # absent from files of older versions
            raise CheckpointError("its content is not what was written; it is damaged: copy or download it again")
        return _build(json.loads(content["graph"]), content, tuple(allow))
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


def is_saved(path: str | Path) -> bool:
    """Whether a file is one of `save`'s, rather than a plain weights file.

    Raises:
        CheckpointError: it is absent or unreadable.
    """
    return _read(Path(path)).get("format") == FORMAT


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
