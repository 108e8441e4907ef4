"""Models of the user's own, by where they are: `mynet.py:MyNet` or `package.module:MyNet`."""

from __future__ import annotations

import difflib
import functools
import importlib
import importlib.util
import inspect
import sys
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

from torch import nn

from fxprune.errors import ModelError


def import_user_code(name: str) -> ModuleType:
    """Import a module by its name, or by the path of its .py file.

    It sees the modules beside it, as if it were run by itself; a name is also looked for in the current folder.

    Raises:
        ModelError: there is none, or it fails; the message names the line.
    """
    try:
        return _from_file(Path(name)) if name.endswith(".py") else _from_name(name)
    except (Exception, SystemExit) as error:  # a script without a `__main__` guard may do anything
        # The last line that is neither ours nor the import system's; a SyntaxError names its own.
        ours = (__file__, importlib.__file__)
        frames = [
            f for f in traceback.extract_tb(error.__traceback__) if f.filename not in ours and f.filename[0] != "<"
        ]
        where = f" ({frames[-1].filename}, line {frames[-1].lineno})" if frames else ""
        what = str(error) if isinstance(error, ImportError | OSError) else f"{type(error).__name__}: {error}"
        raise ModelError(f"cannot import {name!r}: {what}{where}") from error


def _from_file(path: Path) -> ModuleType:
    if not path.is_file():
        raise FileNotFoundError("there is no such file")
    path = path.resolve()
    known = sys.modules.get(path.stem)
    if known is not None and Path(getattr(known, "__file__", None) or "").resolve() == path:
        return known
    _search_in(path.parent)
    # A file may have the name of a module that is in use, such as data.py: it must not take its place.
    name = path.stem if known is None else f"{path.stem}_of_{path.parent.name}"
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise ImportError("it is no Python file")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses and pickle look a class's module up here
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    return module


def _from_name(name: str) -> ModuleType:
    _search_in(Path.cwd())
    return importlib.import_module(name)


def _search_in(folder: Path) -> None:
    if str(folder) not in sys.path:
        sys.path.insert(0, str(folder))


def is_own(name: str) -> bool:
    """Whether a model's name says where its code is: `mynet.py:MyNet`, `package.module:make_net`."""
    return ":" in name or name.endswith(".py")


@functools.cache
def find(name: str) -> Callable[..., nn.Module] | nn.Module:
    """What a name such as `mynet.py:MyNet` stands for: a class, a function that builds a model, or a model.

    Raises:
        ModelError: no class is named, or it is not in the module.
    """
    place, _, attribute = name.rpartition(":")
    if not place or not attribute:
        place, attribute = name.rstrip(":"), ""
    module = import_user_code(place)
    there = _models_of(module)
    listed = f"{place} holds {', '.join(there[:8])}" if there else f"{place} defines no torch.nn.Module"
    if not attribute:
        raise ModelError(f"model {name!r}: name the class too, {place}:{there[0] if there else 'MyNet'}; {listed}")
    try:
        found = functools.reduce(getattr, attribute.split("."), module)
    except AttributeError as error:
        close = difflib.get_close_matches(attribute, there, n=1)
        hint = f"did you mean {place}:{close[0]}? " if close else ""
        raise ModelError(f"model {name!r}: there is no {attribute!r} in it; {hint}{listed}") from error
    if not callable(found):
        raise ModelError(f"model {name!r} is a {type(found).__name__}, not a class or function; {listed}")
    return found


def takes(name: str, argument: str) -> bool:
    """Whether a model's class or function has a parameter of this name."""
    found = find(name)
    if isinstance(found, nn.Module):
        return False
    try:
        return argument in inspect.signature(found).parameters
    except (TypeError, ValueError):
        return False


def build(name: str, arguments: Mapping[str, Any]) -> nn.Module:
    """Build a model of the user's own.

    Raises:
        ModelError: it takes other arguments, fails, or builds something else.
    """
    found = find(name)
    if isinstance(found, nn.Module):
        if arguments:
            raise ModelError(
                f"model {name!r} is a model already and takes no arguments, such as {', '.join(arguments)}"
            )
        return found
    call = f"{name.rpartition(':')[2]}({', '.join(f'{key}={value!r}' for key, value in arguments.items())})"
    try:
        signature = inspect.signature(found)
    except (TypeError, ValueError):
        signature = None
    if signature is not None:
        try:
            signature.bind(**arguments)
        except TypeError as error:
            raise ModelError(
                f"model {name!r}: {call}: {error}; it takes {signature}. Give what it needs by --model-args (model_args)"
            ) from error
    try:
        model = found(**arguments)
    except Exception as error:
        last = traceback.extract_tb(error.__traceback__)[-1]
        raise ModelError(
            f"model {name!r}: {call} fails: {type(error).__name__}: {error} ({last.filename}, line {last.lineno})"
        ) from error
    if not isinstance(model, nn.Module):
        raise ModelError(f"model {name!r}: {call} gives a {type(model).__name__}, not a torch.nn.Module")
    return model


def _models_of(module: ModuleType) -> list[str]:
    """Names of the module classes that a module defines itself."""
    return [
        name
        for name, value in vars(module).items()
        if isinstance(value, type) and issubclass(value, nn.Module) and value.__module__ == module.__name__
    ]
