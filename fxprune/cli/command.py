"""What every command has: options from dataclasses, --config, --print-config, --debug; one red line for an error; exit codes.

A command is a plain function with typer's annotations. A parameter that is a dataclass, such as Options, becomes one option a
field, with the help that stands in the dataclass's docstring. Commands are shown and checked without torch: what a command
runs on is imported when it starts, with a word on the screen. Exit codes are 0; 1 for an error that fxprune names, and for a
result that cannot be meant; 2 for a wrong command line or configuration file; 130 after Ctrl-C.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib
import inspect
import io
import os
import re
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, get_args, get_origin, get_type_hints

import typer
from rich.console import Console
from rich.markup import escape
from typer.models import OptionInfo

from fxprune.cli.help_page import Command
from fxprune.errors import FxPruneError, OptionsError
from fxprune.experiments.recipe_texts import recipe_from
from fxprune.experiments.yaml_files import check_keys, parse_scalar, read_yaml, to_yaml
from fxprune.runtime.interrupt import INTERRUPTED, raise_again
from fxprune.tables import terminal_width

ERROR = 1
CONFIG = "config"
KEY_VALUE = "KEY=VALUE"  # shown for a mapping; the mark by which a configuration file's mapping is let through
RECIPE = "[LAYER=]RECIPE"  # likewise, for what becomes a text or a mapping (`recipe_from`)

# Results go to stdout, everything about the run to stderr.
stdout = Console(highlight=False, width=None if sys.stdout.isatty() else terminal_width())
stderr = Console(stderr=True, highlight=False)


@dataclass(frozen=True)
class Group:
    """How a dataclass's fields appear in a command's help.

    Attributes:
        title: of their panel.
        everyday: fields that stand first, above all panels.
        left_out: fields that make no sense in this command.
    """

    title: str
    everyday: tuple[str, ...] = ()
    left_out: tuple[str, ...] = ()


def command(
    app: typer.Typer, name: str, *, runs_on: Sequence[str] = (), example: str = "", shared: bool = False
) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Decorator that makes a function the command `name` of an app; the function's docstring is its help.

    A parameter `config: dict` receives every option as it came out of flags, configuration file and defaults.

    Args:
        app: receives the command.
        name: of the command.
        runs_on: modules to import before the function is called.
        example: command lines for the foot of the help.
        shared: whether processes that torchrun has started can share its work; the first one alone reports.
    """

    def add(function: Callable[..., None]) -> Callable[..., None]:
        signature = Signature.of(function, _common)

        @functools.wraps(function)
        def run(**values: Any) -> None:
            common = {key: values.pop(key) for key in COMMON}
            try:
                values = signature.converted(values)
                config = {key: _plain(value) for key, value in values.items()}
                if common["print_config"]:
                    stdout.print(to_yaml(config).rstrip(), markup=False, soft_wrap=True)
                    return
                arguments = signature.arguments(values, config)
                if os.environ.get("RANK", "0") != "0":  # The first of several processes reports.
                    stdout.file = stderr.file = io.StringIO()
                _import(runs_on)
                with _our_warnings(), _processes(name, shared=shared):
                    function(**arguments)
            except KeyboardInterrupt:
                stderr.print("interrupted")
                raise typer.Exit(INTERRUPTED) from None
            except (FxPruneError, OSError, MemoryError) as error:
                if common["debug"]:
                    raise
                fail(str(error) or "there is not enough memory; try a smaller --batch-size or fewer images", error)

        run.__signature__ = signature.flat  # type: ignore[attr-defined]
        run.__annotations__ = {p.name: p.annotation for p in signature.flat.parameters.values()}
        # typer keeps the line ends of a docstring, which are made for another width.
        paragraphs = (inspect.getdoc(function) or "").split("\n\n")
        text = "\n\n".join(" ".join(paragraph.split()) for paragraph in paragraphs)
        app.command(name, cls=Command, help=text, epilog=f"Example\n{escape(example)}" if example else None)(run)
        return function

    return add


def fail(message: str, cause: BaseException | None = None) -> None:
    """Say what is wrong in one red line and end the command with exit code 1.

    Raises:
        typer.Exit: always.
    """
    stderr.print(f"[red]error:[/red] {escape(message)}", soft_wrap=True)
    raise typer.Exit(ERROR) from cause


def warn(message: str) -> None:
    """Say what the user should know, in one yellow line."""
    stderr.print(f"[yellow]warning:[/yellow] {escape(message)}", soft_wrap=True)


@contextmanager
def working(on: str) -> Iterator[None]:
    """Show on a terminal what a command is doing; a log has no use for it."""
    if stderr.is_terminal:
        with stderr.status(on):
            yield
    else:
        yield


def _import(modules: Sequence[str]) -> None:
    """Import what a command runs on, which takes seconds; until then Ctrl-C ends the process."""
    if any(module not in sys.modules for module in modules):
        terminal = stderr.is_terminal
        stderr.file.write("loading PyTorch ..." + ("" if terminal else "\n"))
        stderr.file.flush()
        try:
            for module in modules:
                importlib.import_module(module)
        except ModuleNotFoundError as error:
            raise OptionsError(f"{error.name} is not installed; pip install {error.name}") from error
        finally:
            if terminal:
                stderr.file.write("\r\033[K")
                stderr.file.flush()
    raise_again()


@contextmanager
def _processes(name: str, *, shared: bool) -> Iterator[None]:
    """Work together with the other processes that torchrun has started, if there are any.

    Raises:
        OptionsError: there are, and the command's work cannot be shared.
    """
    from fxprune.runtime import processes  # which brings torch

    if processes.is_started_by_torchrun() and not shared:
        raise OptionsError(f"fxprune {name} runs in one process: start it without torchrun")
    with processes.group_of_torchrun(), processes.together():
        yield


@contextmanager
def _our_warnings() -> Iterator[None]:
    """Show fxprune's own warnings as one line, and all others as Python does."""
    with warnings.catch_warnings():
        show = warnings.showwarning

        def as_line(message: Warning | str, category: type[Warning], *where: Any, **more: Any) -> None:
            if category.__module__.startswith("fxprune."):
                warn(str(message))
            else:
                show(message, category, *where, **more)

        warnings.showwarning = as_line
        yield


@dataclass(frozen=True)
class Signature:
    """A command's signature as typer sees it, and how its values become the function's arguments.

    Attributes:
        flat: one parameter an option.
        records: parameters of the function that are dataclasses, with their classes.
        plain: its other parameters.
        mappings: options that are given as key=value.
        figures: options that are given as numbers with commas, or repeated.
        recipes: options that are given as recipes, one for all layers or one for each name.
    """

    flat: inspect.Signature
    records: Mapping[str, type[Any]]
    plain: tuple[str, ...]
    mappings: frozenset[str]
    figures: frozenset[str]
    recipes: frozenset[str]

    @classmethod
    def of(cls, function: Callable[..., None], common: Callable[..., None]) -> Signature:
        """The signature of `function` with the parameters of `common` added.

        A parameter `Annotated[Dataclass, Group("Title")]` stands for the dataclass's fields, under that title in the help.
        """
        hints = get_type_hints(function, include_extras=True)
        options: list[inspect.Parameter] = []
        first: list[inspect.Parameter] = []
        records: dict[str, type[Any]] = {}
        plain: list[str] = []
        mappings: set[str] = set()
        figures: set[str] = set()
        recipes: set[str] = set()
        for parameter in inspect.signature(function).parameters.values():
            hint = hints[parameter.name]
            record, *notes = get_args(hint) if get_origin(hint) is Annotated else (hint,)
            if dataclasses.is_dataclass(record) and isinstance(record, type):
                records[parameter.name] = record
                group = notes[0] if notes else Group(record.__name__)
                for option in _fields(record, group):
                    (first if option.name in group.everyday else options).append(option)
                kinds = get_type_hints(record)
                mappings |= {key for key, kind in kinds.items() if _is(kind, Mapping)}
                figures |= {key for key, kind in kinds.items() if _figures(kind)}
            else:
                plain.append(parameter.name)
                note = next((note for note in notes if isinstance(note, OptionInfo)), None)
                if note is not None and note.metavar == RECIPE:
                    recipes.add(parameter.name)
                    parameter = parameter.replace(default=[parameter.default])
                    hint = Annotated[list[str], note]
                if parameter.name != CONFIG:
                    options.append(parameter.replace(annotation=hint, kind=inspect.Parameter.KEYWORD_ONLY))
        options += inspect.signature(common, eval_str=True).parameters.values()
        # Panels follow each other as their first options do: what has none comes first.
        for option in (*first, *options):
            _shorten(option)
        free = [option for option in options if not _panel(option)]
        flat = inspect.Signature([*first, *free, *(option for option in options if _panel(option))])
        return cls(flat, records, tuple(plain), frozenset(mappings), frozenset(figures), frozenset(recipes))

    def converted(self, values: Mapping[str, Any]) -> dict[str, Any]:
        """The options' values with mappings and rows of numbers read.

        Raises:
            typer.BadParameter: one cannot be read.
        """
        found = dict(values)
        for name in self.mappings & set(found):
            found[name] = dict(_pair(text, name) for text in found[name]) if found[name] else None
        for name in self.figures & set(found):
            found[name] = [number for text in found[name] for number in _numbers(text, name)] if found[name] else None
        for name in self.recipes & set(found):
            found[name] = recipe_from(found[name])
        return found

    def arguments(self, values: Mapping[str, Any], config: dict[str, Any]) -> dict[str, Any]:
        """The function's arguments from the options' values; dataclasses check theirs as they are made."""
        arguments = {name: config if name == CONFIG else values[name] for name in self.plain}
        for name, record in self.records.items():
            given = {field.name: values[field.name] for field in dataclasses.fields(record) if field.name in values}
            lists = {key: tuple(value) or None for key, value in given.items() if isinstance(value, list)}
            arguments[name] = record(**given | lists)
        return arguments


def _is(kind: Any, wanted: type[Any]) -> bool:
    """Whether a type hint is a generic of this class, or that or None."""
    options = (get_origin(kind), *(get_origin(option) for option in get_args(kind)))
    return wanted in options or getattr(wanted, "__origin__", wanted) in options


def _figures(kind: Any) -> bool:
    """Whether a type hint is a row of numbers, or that or None."""
    return tuple[float, ...] in (kind, *get_args(kind))


def _panel(parameter: inspect.Parameter) -> str | None:
    notes = get_args(parameter.annotation)[1:] if get_origin(parameter.annotation) is Annotated else ()
    return next((note.rich_help_panel for note in notes if hasattr(note, "rich_help_panel")), None)


def _pair(text: str, name: str) -> tuple[str, Any]:
    key, sign, value = text.partition("=")
    if not sign or not key.strip().isidentifier():
        raise typer.BadParameter(f"{text!r} is not {KEY_VALUE}, such as width=32", param_hint=_flag(name))
    return key.strip(), parse_scalar(value)


def _numbers(text: str, name: str) -> list[float]:
    try:
        return [float(part) for part in text.replace(",", " ").split()]
    except ValueError as error:
        raise typer.BadParameter(
            f"{text!r} is not a row of numbers, such as 0.5,0.5,0.5", param_hint=_flag(name)
        ) from error


def _flag(name: str) -> str:
    return f"--{name.replace('_', '-')}"


# A flag's type, where typer's own word would take the room of the help text beside it.
_SHORT = ((bool, ""), (int, "N"), (float, "X"), (str, "TEXT"), (list[str], "TEXT"), (Path, "PATH"))


def _shorten(option: inspect.Parameter) -> None:
    """Give a flag the shortest name of its type."""
    if get_origin(option.annotation) is not Annotated:
        return
    hint, note = get_args(option.annotation)[:2]
    for kind, text in _SHORT:
        if hint in (kind, kind | None) and isinstance(note, OptionInfo) and note.metavar is None:
            note.metavar = text


def _fields(record: type[Any], group: Group) -> list[inspect.Parameter]:
    """One keyword parameter a field of a dataclass, its help from the docstring."""
    hints, texts = get_type_hints(record), attribute_texts(record)
    parameters = []
    for field in dataclasses.fields(record):
        if field.name in group.left_out:
            continue
        hint = hints[field.name]
        metavar = KEY_VALUE if _is(hint, Mapping) else "X,Y,..." if _figures(hint) else None
        option = typer.Option(
            help=_capital(texts.get(field.name, "")),
            rich_help_panel=None if field.name in group.everyday else group.title,
            metavar=metavar,
            show_default=field.default is not False,
        )
        parameters.append(
            inspect.Parameter(
                field.name,
                inspect.Parameter.KEYWORD_ONLY,
                default=inspect.Parameter.empty if field.default is dataclasses.MISSING else field.default,
                annotation=Annotated[list[str] | None if metavar or _is(hint, tuple) else hint, option],
            )
        )
    return parameters


def attribute_texts(record: type[Any]) -> dict[str, str]:
    """What the Attributes section of a Google-style docstring says about each attribute, in one line each."""
    section = inspect.getdoc(record) or ""
    section = section.partition("Attributes:\n")[2].partition("\n\n")[0]
    texts: dict[str, str] = {}
    name = ""
    for line in section.splitlines():
        start = re.match(r" {4}(\w+): (.*)", line)
        if start:
            name = start[1]
            texts[name] = start[2]
        elif name:
            texts[name] += f" {line.strip()}"
    return texts


def _capital(text: str) -> str:
    return text[:1].upper() + text[1:]


def _plain(value: Any) -> Any:
    if isinstance(value, tuple | list):
        return [_plain(item) for item in value]
    return str(value) if isinstance(value, Path) else value


def _read_config(context: typer.Context, path: Path | None) -> Path | None:
    """Make a configuration file's values the defaults; flags still win."""
    if path is None or context.resilient_parsing:
        return path
    try:
        content = read_yaml(path)
        options = {option.name: option for option in context.command.params if option.name}
        check_keys(content, set(options) - {*COMMON, "help"}, str(path))
    except OptionsError as error:
        raise typer.BadParameter(str(error)) from error
    # As text, so that each value is read exactly as the same flag would be.
    context.default_map = {**(context.default_map or {})} | {
        key: _text(value, options[key]) for key, value in content.items() if value is not None
    }
    return path


def _text(value: Any, option: Any) -> Any:
    """A value of a configuration file as the text of its flag, or as the texts of one that may be repeated."""
    repeated = option.nargs == -1 or getattr(option, "multiple", False)
    if isinstance(value, Mapping):
        if option.metavar not in (KEY_VALUE, RECIPE):
            raise typer.BadParameter(f"{option.name}: {dict(value)} is a mapping where a value or a list is expected")
        return [f"{key}={to_yaml({'': item}).partition(':')[2].strip()}" for key, item in value.items()]
    items = value if isinstance(value, list) else [value]
    if (isinstance(value, list) and not repeated) or any(isinstance(item, list | Mapping) for item in items):
        raise typer.BadParameter(f"{option.name}: {value} is a list where a value is expected")
    texts = [item if isinstance(item, bool) else str(item) for item in items]
    return texts if repeated else texts[0]


_PANEL = "Configuration"


def _common(
    *,
    config: Annotated[
        Path | None,
        typer.Option(
            callback=_read_config,
            is_eager=True,
            metavar="FILE",
            help="YAML file with any of these options as keys; flags win.",
            rich_help_panel=_PANEL,
        ),
    ] = None,
    print_config: Annotated[
        bool, typer.Option("--print-config", help="Print all options as YAML and do nothing.", rich_help_panel=_PANEL)
    ] = False,
    debug: Annotated[
        bool, typer.Option("--debug", help="Show the traceback of an error.", rich_help_panel=_PANEL)
    ] = False,
) -> None:
    """The options that every command has; only its signature is used."""


COMMON = ("config", "print_config", "debug")
