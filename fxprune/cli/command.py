"""What every command has: --config, --print-config, --debug; one red line for an error; exit codes.

A command is a plain function with typer's annotations. A parameter that is a dataclass, such as Options, becomes one
option a field, with the help that stands in the dataclass's docstring. Exit codes are 0; 1 for an error that fxprune
names; 2 for a wrong command line or configuration file; 130 after Ctrl-C.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape

from fxprune.cli.signature import Signature
from fxprune.errors import FxPruneError, OptionsError
from fxprune.experiments.yaml_files import check_keys, read_yaml, to_yaml

ERROR, INTERRUPTED = 1, 130

# Results go to stdout, everything about the run to stderr.
stdout = Console(highlight=False)
stderr = Console(stderr=True, highlight=False)


def command(app: typer.Typer, name: str) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Decorator that makes a function the command `name` of an app; the function's docstring is its help.

    A parameter `config: dict` receives every option as it came out of flags, configuration file and defaults.
    """

    def add(function: Callable[..., None]) -> Callable[..., None]:
        signature = Signature.of(function, _common)

        @functools.wraps(function)
        def run(**values: Any) -> None:
            common = {key: values.pop(key) for key in COMMON}
            config = {key: _plain(value) for key, value in values.items()}
            if common["print_config"]:
                stdout.print(to_yaml(config).rstrip(), markup=False, soft_wrap=True)
                return
            try:
                function(**signature.arguments(values, config))
            except KeyboardInterrupt:
                stderr.print("interrupted")
                raise typer.Exit(INTERRUPTED) from None
            except (FxPruneError, OSError) as error:
                if common["debug"]:
                    raise
                stderr.print(f"[red]error:[/red] {escape(str(error))}", soft_wrap=True)
                raise typer.Exit(ERROR) from error

        run.__signature__ = signature.flat  # type: ignore[attr-defined]
        run.__annotations__ = {p.name: p.annotation for p in signature.flat.parameters.values()}
        app.command(name)(run)
        return function

    return add


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
        known = {parameter.name for parameter in context.command.params if parameter.name} - {*COMMON, "help"}
        check_keys(content, known, str(path))
    except OptionsError as error:
        raise typer.BadParameter(str(error)) from error
    # As text, so that each value is read exactly as the same flag would be.
    defaults = {key: _text(value) for key, value in content.items() if value is not None}
    context.default_map = {**(context.default_map or {}), **defaults}
    return path


def _text(value: Any) -> Any:
    if isinstance(value, list | tuple):
        return [_text(item) for item in value]
    if isinstance(value, Mapping):
        raise typer.BadParameter(f"{dict(value)} is a mapping where a value or a list is expected")
    return value if isinstance(value, bool) else str(value)


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
