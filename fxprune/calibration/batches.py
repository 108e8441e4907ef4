"""Reads what a loader yields: which values of a batch are the model's inputs, in every form that batches come in.

A batch may be a tensor, a tuple or list, a named tuple, a dataclass or a mapping, and any of these inside another. Names
count before places: what bears the name of an input is that input. Without names, a model of one input takes the first
value, so that of (images, labels) the images are read, and one of several inputs takes them in order.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
import inspect
import operator
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Node
from torch.utils.data import Dataset, IterableDataset

from fxprune.errors import CalibrationError, FxPruneError
from fxprune.graph import has_hooks, module_of
from fxprune.statistics import HessianObserver

EMPTY = "the calibration loader gave no batches; pass a non-empty iterable (a generator can be read only once)"
_PURE = (None, "", "_operator", "builtins", "math")  # Modules of functions that change no tensor.
LABEL_KEYS = ("label", "labels", "target", "targets", "y", "class", "classes")


@dataclasses.dataclass(frozen=True)
class ModelInput:
    """One input of a model.

    Attributes:
        name: without stars.
        required: whether it has no default; False for `*args` and `**kwargs`.
        stars: 1 for `*args`, 2 for `**kwargs`, else 0.
        keys: what the graph reads of a value that it only takes apart (x["image"], x[0]); None where it reads the value
            itself; () where that is not known, which is so for all inputs of a model that is not a graph.
    """

    name: str
    required: bool = True
    stars: int = 0
    keys: tuple[Any, ...] | None = ()


def graph_inputs(placeholders: Iterable[Node]) -> tuple[ModelInput, ...]:
    """The inputs of a graph, one for each placeholder."""
    found = []
    for node in placeholders:
        target = str(node.target)
        name = target.lstrip("*")
        stars = len(target) - len(name)
        found.append(ModelInput(name, not node.args and not stars, stars, _keys_read(node)))
    return tuple(found)


def model_inputs(model: nn.Module) -> tuple[ModelInput, ...]:
    """The inputs of a model by the signature of its forward."""
    model = _unwrapped(model)
    if isinstance(model, GraphModule):
        return graph_inputs(model.graph.find_nodes(op="placeholder"))
    stars: dict[Any, int] = {inspect.Parameter.VAR_POSITIONAL: 1, inspect.Parameter.VAR_KEYWORD: 2}
    return tuple(
        ModelInput(p.name, p.default is p.empty and p.kind not in stars, stars.get(p.kind, 0))
        for p in inspect.signature(model.forward).parameters.values()
    )


def _unwrapped(model: nn.Module) -> nn.Module:
    """The model inside a wrapper for parallel runs or torch.compile, whose forward takes what that of the model takes."""
    inner = getattr(model, "_orig_mod", None)
    if isinstance(model, (nn.DataParallel, nn.parallel.DistributedDataParallel)):
        inner = model.module
    return _unwrapped(inner) if isinstance(inner, nn.Module) else model


def call_by_name(model: nn.Module, given: Mapping[str, Any]) -> Any:
    """Call a model with values for its inputs by name, by position as far as that goes: a user's hooks may count on it."""
    args: list[Any] = []
    kwargs: dict[str, Any] = {}
    parameters = list(inspect.signature(_unwrapped(model).forward).parameters.values())
    more = any(p.kind is p.VAR_POSITIONAL and given.get(p.name) for p in parameters)
    in_order = True
    for p in parameters:
        if p.kind is p.VAR_POSITIONAL:
            args += given.get(p.name, ())
            in_order = False
        elif p.kind is p.VAR_KEYWORD:
            kwargs |= given.get(p.name, {})
        elif p.kind is p.KEYWORD_ONLY or not (in_order or more or p.kind is p.POSITIONAL_ONLY):
            kwargs |= {p.name: given[p.name]} if p.name in given else {}
        elif p.name in given or more or p.kind is p.POSITIONAL_ONLY:
            args.append(given.get(p.name, p.default))
        else:  # Left to its default; what follows goes by name.
            in_order = False
    return model(*args, **kwargs)


def inputs_of(
    batch: Any,
    placeholders: Sequence[Node],
    number: int = 0,
    *,
    device: torch.device | None = None,
) -> dict[Node, Any]:
    """The value of every placeholder of a graph in one batch: a checked one, on a device if given, or the input's default.

    `*args` gets a tuple and `**kwargs` a dict; an input that takes a dict, tuple or list of tensors gets that.

    Args:
        batch: as a loader gives it.
        placeholders: in the order of the graph.
        number: of the batch, for messages.
        device: where to put tensors; None leaves them where they are.

    Raises:
        CalibrationError: if the batch cannot be used, or leaves out an input that has no default.
    """
    inputs = graph_inputs(placeholders)
    given = inputs_by_name(batch, inputs, f"calibration batch {number}")
    values: dict[Node, Any] = {}
    for node, needed in zip(placeholders, inputs, strict=True):
        if needed.name in given:
            place = functools.partial(_placed, device=device, copied=_may_be_written(node))
            values[node] = map_tensors(given[needed.name], place)
        else:
            values[node] = (node.args[0] if node.args else None, (), {})[needed.stars]
    check_values(values.values(), f"calibration batch {number}")
    return values


def inputs_by_name(
    batch: Any, inputs: Sequence[ModelInput], what: str, *, error: type[FxPruneError] = CalibrationError
) -> dict[str, Any]:
    """The values in a batch of those inputs that it gives, unchecked.

    Args:
        batch: as a loader gives it.
        inputs: of the model, in order.
        what: what to call the batch in messages.
        error: what to raise.

    Raises:
        FxPruneError: of the class `error`, if the batch gives no value, or leaves out an input that has no default.
    """
    return _Reader(tuple(inputs), what, error).read(batch)


@dataclasses.dataclass(frozen=True)
class _Reader:
    inputs: tuple[ModelInput, ...]
    what: str
    error: type[FxPruneError]

    def read(self, batch: Any) -> dict[str, Any]:
        plain = [x for x in self.inputs if not x.stars]
        required = [x for x in plain if x.required]
        first = next(chain(required, plain), None)
        rest, keywords = (next((x for x in self.inputs if x.stars == stars), None) for stars in (1, 2))
        named = _named(batch)
        if named is not None and any(x.name in named for x in plain):
            return self._by_name(named, required, plain, keywords)
        if not self.inputs:
            return {}
        if len(required) <= 1 and first is not None and _fits(batch, first):
            return {first.name: batch}
        if named is not None and first is None and keywords is not None:
            return {keywords.name: _without_labels(named)}
        values = self._values(batch, named, required)
        if len(required) <= 1 and first is not None and _fits(values[0], first):
            return {first.name: values[0]}
        if _is_container(values[0]) and self._holds_all(values, plain, required, first):
            return self.read(values[0])
        if len(required) > 1:
            if len(values) < len(required):
                self._missing(required[len(values) :], batch)
            return {x.name: value for x, value in zip(required, values, strict=False)}
        if first is not None:
            found = {first.name: values[0]}
            if rest is not None and rest.keys and (after := values[1 : 2 + max(rest.keys)]):
                found[rest.name] = tuple(after)
            return found
        if rest is not None:
            count = 1 + max(rest.keys) if rest.keys else len(without_trailing_labels(values))
            return {rest.name: tuple(values[:count])}
        raise self.error(
            f"{self.what} is {describe(batch)}, and the model takes its inputs by name alone (**{self.inputs[0].name}); "
            "yield dicts with these names as keys"
        )

    def _by_name(
        self,
        named: Mapping[str, Any],
        required: list[ModelInput],
        plain: list[ModelInput],
        keywords: ModelInput | None,
    ) -> dict[str, Any]:
        missing = [x for x in required if x.name not in named]
        if missing:
            self._missing(missing, named)
        found = {x.name: named[x.name] for x in plain if x.name in named}
        if keywords is not None:
            found[keywords.name] = {k: v for k, v in _without_labels(named).items() if k not in found}
        return found

    def _values(self, batch: Any, named: Mapping[str, Any] | None, required: list[ModelInput]) -> list[Any]:
        """The values in a batch that names nothing, in order."""
        if named is not None and isinstance(batch, tuple):
            named = None  # The fields of a named tuple are in order.
        if named is None:
            values = list(batch) if isinstance(batch, (tuple, list)) else [batch]
        else:
            if len(required) > 1:
                self._missing(required, batch)
            values = list(_without_labels(named).values()) or list(named.values())
        if not values:
            raise self.error(f"{self.what} is an empty {type(batch).__name__}")
        return values

    def _holds_all(
        self, values: list[Any], plain: list[ModelInput], required: list[ModelInput], first: ModelInput | None
    ) -> bool:
        """Whether the first value, a container, is all inputs together, as in ((a, b), labels)."""
        named = _named(values[0])
        if named is not None and any(x.name in named for x in plain):
            return True
        if len(required) > 1:
            return len(values) < len(required) or not isinstance(values[1], Tensor) or len(values[0]) >= len(required)
        return first is None or first.keys is None  # A graph that reads the value itself takes no container.

    def _missing(self, missing: list[ModelInput], batch: Any) -> None:
        names = ", ".join(repr(x.name) for x in missing)
        raise self.error(
            f"the model has an input {names} that {self.what} does not give: it is {describe(batch)}; yield dicts with the "
            "names of the model's inputs as keys, or tuples of the inputs in order"
        )


def _keys_read(node: Node) -> tuple[Any, ...] | None:
    """What a graph takes of a placeholder's value, if it does nothing else with it; else None."""
    keys = []
    for user in node.users:
        key: Any = user.args[1] if len(user.args) > 1 else None
        is_item = user.target in (operator.getitem, "get") and user.args[0] is node and isinstance(key, (int, str))
        if not is_item or isinstance(key, bool):
            return None
        keys.append(key)
    return tuple(keys) or None


def _fits(value: Any, of: ModelInput) -> bool:
    """Whether a container holds what the graph takes of one input."""
    if not of.keys or not _is_container(value):
        return False
    if isinstance(value, (tuple, list)) and all(isinstance(key, int) for key in of.keys):
        return -len(value) <= min(of.keys) and max(of.keys) < len(value) and not _is_container(value[0])
    return isinstance(value, Mapping) and all(key in value for key in of.keys if isinstance(key, str))


def _is_container(value: Any) -> bool:
    return isinstance(value, (tuple, list)) or _named(value) is not None


def _named(value: Any) -> Mapping[str, Any] | None:
    """What bears a name in a batch: the items of a mapping, the fields of a dataclass or named tuple."""
    if isinstance(value, Mapping):
        return value
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return dict(zip(value._fields, value, strict=True))
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
    if hasattr(value, "keys") and hasattr(value, "__getitem__") and not isinstance(value, type):
        return {key: value[key] for key in value.keys()}
    return None


def names_in(batch: Any) -> tuple[str, ...]:
    """The names in a batch, or in a batch's first value where that holds the inputs, as in ({"a": a, "b": b}, labels)."""
    if _named(batch) is None and isinstance(batch, (tuple, list)) and batch:
        batch = batch[0]
    return tuple(_named(batch) or ())


def _without_labels(named: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in named.items() if str(key).lower() not in LABEL_KEYS}


def without_trailing_labels(values: list[Any]) -> list[Any]:
    """For a model of any number of inputs: what comes before the last integers of one dimension."""
    last = values[-1]
    is_label = not isinstance(last, Tensor) or (not last.is_floating_point() and last.dim() <= 1)
    return values[:-1] if is_label and len(values) > 1 else values


def labels_of(batch: Any, inputs: Sequence[Any]) -> Tensor | None:
    """The labels in a batch whose inputs are known: what bears the name of labels, else the tensor that comes after them."""
    named, after = _named(batch), False
    for key in LABEL_KEYS if named is not None else ():
        value = named.get(key) if named is not None else None
        if isinstance(value, Tensor) and not any(value is x for x in inputs):
            return value
    for value in named.values() if named is not None else batch if isinstance(batch, (tuple, list)) else ():
        taken = list(_leaves([value]))
        if any(item is x for item in taken for x in _leaves(list(inputs))):
            after = True
        elif after:
            return value if isinstance(value, Tensor) else None
    return None


def check_values(values: Iterable[Any], what: str, *, error: type[FxPruneError] = CalibrationError) -> None:
    """Raise an error if the values of a model's inputs cannot be used.

    Args:
        values: of all inputs, in order.
        what: what to call the batch in messages.
        error: what to raise.
    """
    values = list(values)
    if not values:
        return
    images = next(tensors_in(values), None)
    for value in _leaves(values):
        if _is_array(value):
            raise error(
                f"{what} holds a numpy array of shape {value.shape}, {value.dtype}; make tensors of arrays: "
                f"torch.from_numpy(array){'' if value.dtype.kind == 'f' else '.float()'}, or torch.utils.data.DataLoader, "
                "which does it"
            )
    if images is None:
        raise error(
            f"{what} is {describe(values[0])}; expected a tensor, or a tuple, list, dict or dataclass with the model's inputs "
            "as tensors"
        )
    if images.dim() == 0 or images.shape[0] == 0:
        raise error(f"{what} is empty: shape {tuple(images.shape)}")
    for x in tensors_in(values):
        if not torch.isfinite(x).all():
            raise error(f"{what} holds NaN or infinite values; check its preprocessing")


def _is_array(value: Any) -> bool:
    return type(value).__module__.split(".")[0] == "numpy" and hasattr(value, "dtype") and hasattr(value, "shape")


def _placed(x: Tensor, *, device: torch.device | None, copied: bool) -> Tensor:
    # Inference tensors cannot take part in training, and the loader's own tensors are not for the model to change.
    if copied or (x.is_inference() and not torch.is_inference_mode_enabled()):
        x = x.clone()
    return x.to(device) if device is not None else x


def _may_be_written(node: Node) -> bool:
    """Whether code that is not torch's reads a value, and may change it in place: a hook, a module, a wrapped function."""
    for user in node.users:
        module = module_of(user)
        if isinstance(module, HessianObserver):
            if _may_be_written(user):
                return True
        elif module is not None:
            if has_hooks(module) or not type(module).__module__.startswith("torch.nn."):
                return True
        elif user.op == "call_function" and getattr(user.target, "__module__", "") not in _PURE:
            if not str(getattr(user.target, "__module__", "")).startswith("torch"):
                return True
    return False


def _leaves(value: Any) -> Iterator[Any]:
    named = _named(value)
    items = named.values() if named is not None else value if isinstance(value, (tuple, list)) else None
    if items is None:
        yield value
    else:
        for item in items:
            yield from _leaves(item)


def tensors_in(value: Any) -> Iterator[Tensor]:
    """All tensors in a batch, or in the values of a model's inputs, in order."""
    return (x for x in _leaves(value) if isinstance(x, Tensor))


def map_tensors(value: Any, function: Callable[[Tensor], Any]) -> Any:
    """The same batch with a function applied to each of its tensors."""
    if isinstance(value, Tensor):
        return function(value)
    if isinstance(value, tuple):
        items = [map_tensors(item, function) for item in value]
        kind: Any = type(value)
        return kind(*items) if hasattr(value, "_fields") else tuple(items)
    if isinstance(value, list):
        return [map_tensors(item, function) for item in value]
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        changed = copy.copy(value)
        for field in dataclasses.fields(value):
            object.__setattr__(changed, field.name, map_tensors(getattr(value, field.name), function))
        return changed
    named = _named(value)
    if named is None:
        return value
    items_of = {key: map_tensors(item, function) for key, item in named.items()}
    return items_of if type(value) is dict else _like(value, items_of)


def _like(mapping: Any, items: dict[str, Any]) -> Any:
    """A mapping of the same kind with other values; a dict where the kind cannot be filled."""
    try:
        changed = copy.copy(mapping)
        for key, item in items.items():
            changed[key] = item
    except (TypeError, AttributeError):  # One that cannot be changed.
        return items
    return changed


def count(value: Any) -> int:
    """How many images a batch holds, or the values of a model's inputs, by the first tensor that has dimensions."""
    return next((len(x) for x in tensors_in(value) if x.dim()), 1)


def take(value: Any, chosen: slice | Tensor) -> Any:
    """The images chosen of a batch, or of a model's inputs: of every tensor that has as many entries as there are images."""
    images = count(value)
    return map_tensors(value, lambda x: x[chosen] if x.dim() and len(x) == images else x)


def channels_last(x: Any) -> Any:
    """A batch of images with the channels last in memory; anything else as it is."""
    return x.contiguous(memory_format=torch.channels_last) if isinstance(x, Tensor) and x.dim() == 4 else x


def describe(value: Any) -> str:
    """A batch in words."""
    kind = f"{'an' if type(value).__name__[0] in 'aeiouAEIOU' else 'a'} {type(value).__name__}"
    named = _named(value)
    if isinstance(value, Tensor):
        return f"a tensor of shape {tuple(value.shape)}"
    if _is_array(value):
        return f"a numpy array of shape {value.shape}"
    if named is not None:
        return f"{kind} of " + (", ".join(f"{key}: {describe(x)}" for key, x in named.items()) or "nothing")
    if isinstance(value, list | tuple):
        shown = ", ".join(describe(item) for item in value[:4]) + (", ..." if len(value) > 4 else "")
        return f"{kind} of " + (shown or "nothing")
    return kind


def check_loader(loader: Any) -> None:
    """Raise CalibrationError for what can be iterated over, perhaps, but does not give batches."""
    if isinstance(loader, Tensor):
        raise CalibrationError(
            f"the calibration loader is a tensor of shape {tuple(loader.shape)}; give its batches, such as images.split(128)"
        )
    if _is_array(loader):
        raise CalibrationError(
            f"the calibration loader is a numpy array of shape {loader.shape}; give batches of tensors, such as "
            "torch.from_numpy(images).split(128)"
        )
    if isinstance(loader, Dataset) and not isinstance(loader, IterableDataset):
        raise CalibrationError(
            f"the calibration loader is a dataset ({type(loader).__name__}), which gives single images; "
            "wrap it in torch.utils.data.DataLoader(dataset, batch_size=128)"
        )
    iterable = hasattr(loader, "__iter__") or hasattr(loader, "__getitem__")
    if isinstance(loader, (str, bytes, Mapping)) or not iterable:
        raise CalibrationError(
            f"the calibration loader is of type {type(loader).__name__}; expected an iterable of batches, "
            "such as a DataLoader or a list of tensors"
        )


def peek(loader: Iterable[Any], images: int = 1) -> tuple[list[Any], Iterable[Any]]:
    """The first batches, with so many images if there are, and all batches; the loader is started once only.

    Raises:
        CalibrationError: if there are none, one cannot be used, or this is not a loader.
    """
    check_loader(loader)
    rest, head, seen = iter(loader), [], 0
    for batch in rest:
        head.append(batch)
        seen += count(batch)
        if seen >= images:
            break
    if not head:
        raise CalibrationError(EMPTY)
    return head, loader if isinstance(loader, (list, tuple)) else chain(head, rest)


def first_images(loader: Iterable[Any], images: int) -> list[Any]:
    """Batches of together so many images, if there are so many: of the last one, the first images only."""
    head, _ = peek(loader, images)
    surplus = sum(map(count, head)) - images
    if surplus > 0:
        head[-1] = take(head[-1], slice(count(head[-1]) - surplus))
    return head


def read_all(loader: Iterable[Any]) -> Sequence[Any]:
    """All batches of a loader in a list, for what reads them more than once.

    Raises:
        CalibrationError: if there are none.
    """
    check_loader(loader)
    batches = loader if isinstance(loader, (list, tuple)) else list(loader)
    if not batches:
        raise CalibrationError(EMPTY)
    return batches
