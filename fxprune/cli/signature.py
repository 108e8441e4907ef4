"""Turns a function's dataclass parameters into one command-line option a field, and back."""

from __future__ import annotations

import dataclasses
import inspect
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Annotated, Any, get_args, get_origin, get_type_hints

import typer

CONFIG = "config"


@dataclass(frozen=True)
class Signature:
    """A command's signature as typer sees it, and how its values become the function's arguments.

    Attributes:
        flat: one parameter an option.
        records: parameters of the function that are dataclasses, with their classes.
        plain: its other parameters.
    """

    flat: inspect.Signature
    records: Mapping[str, type[Any]]
    plain: tuple[str, ...]

    @classmethod
    def of(cls, function: Callable[..., None], common: Callable[..., None]) -> Signature:
        """The signature of `function` with the parameters of `common` added.

        A parameter `Annotated[Dataclass, "Title"]` stands for the dataclass's fields, under that title in the help;
        `Annotated[Dataclass, "Title", ("field",)]` leaves some out.
        """
        hints = get_type_hints(function, include_extras=True)
        options: list[inspect.Parameter] = []
        records: dict[str, type[Any]] = {}
        plain: list[str] = []
        for parameter in inspect.signature(function).parameters.values():
            hint = hints[parameter.name]
            record, *notes = get_args(hint) if get_origin(hint) is Annotated else (hint,)
            if dataclasses.is_dataclass(record) and isinstance(record, type):
                records[parameter.name] = record
                options += _fields(record, *notes)
            else:
                plain.append(parameter.name)
                if parameter.name != CONFIG:
                    options.append(parameter.replace(annotation=hint, kind=inspect.Parameter.KEYWORD_ONLY))
        options += inspect.signature(common, eval_str=True).parameters.values()
        return cls(inspect.Signature(options), records, tuple(plain))

    def arguments(self, values: Mapping[str, Any], config: dict[str, Any]) -> dict[str, Any]:
        """The function's arguments from the options' values; dataclasses check theirs as they are made."""
        arguments = {name: config if name == CONFIG else values[name] for name in self.plain}
        for name, record in self.records.items():
            given = {field.name: values[field.name] for field in dataclasses.fields(record) if field.name in values}
            lists = {key: tuple(value) or None for key, value in given.items() if isinstance(value, list)}
            arguments[name] = record(**given | lists)
        return arguments


def _fields(record: type[Any], title: str, left_out: tuple[str, ...] = ()) -> list[inspect.Parameter]:
    """One keyword parameter a field of a dataclass, its help from the docstring."""
    hints, texts = get_type_hints(record), attribute_texts(record)
    parameters = []
    for field in dataclasses.fields(record):
        if field.name in left_out:
            continue
        option = typer.Option(help=_capital(texts.get(field.name, "")), rich_help_panel=title)
        hint = list[float] | None if hints[field.name] == tuple[float, ...] | None else hints[field.name]
        parameters.append(
            inspect.Parameter(
                field.name,
                inspect.Parameter.KEYWORD_ONLY,
                default=inspect.Parameter.empty if field.default is dataclasses.MISSING else field.default,
                annotation=Annotated[hint, option],
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
