"""What of `Options` rank reduction goes by, and what each of its methods takes for its own."""

from __future__ import annotations

from dataclasses import fields, replace

from fxprune.errors import OptionsError
from fxprune.options import OURS, PUBLISHED, Options, given_options
from fxprune.ranks.survey import METHODS, Method

UNUSED = ("permute", "global_budget", "polish", "checkpoint_dir")


def low_rank_options(options: Options | None, method: Method) -> Options:
    """Options with every None replaced: "data_aware" fits to the dense model's output, "svd" leaves weights as published.

    Raises:
        OptionsError: an unknown method, or an option that is asked for and has no part in rank reduction.
    """
    if method not in METHODS:
        raise OptionsError(f"unknown method {method!r}; choose one of {', '.join(map(repr, METHODS))}")
    given = given_options(options)
    if unused := [name for name in UNUSED if getattr(given, name, None)]:
        raise OptionsError(f"{', '.join(unused)}: low_rank has no such step; give it to fxprune.compile on the result")
    own = OURS if method == "data_aware" else PUBLISHED
    missing = {f.name: getattr(own, f.name) for f in fields(given) if getattr(given, f.name) is None}
    return replace(given, **missing)
