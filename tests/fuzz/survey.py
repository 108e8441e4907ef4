"""Runs many cases through the checks, goes on after a finding, and says what was found and what was tried."""

from __future__ import annotations

import json
import random
import re
import time
import traceback
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from tests.fuzz.case import Case, Refused

Check = Callable[[Case], None]


@dataclass
class Kind:
    """Findings that are alike: the same check fails with the same words."""

    check: str
    message: str
    script: str
    trace: str
    times: int = 1

    def __str__(self) -> str:
        place = f"{'=' * 100}\n{self.times} x {self.check}: {self.message}"
        return f"{place}\n{'-' * 100}\n{self.script}\n{'-' * 100}\n{self.trace}"


@dataclass
class Survey:
    """What came of the cases so far.

    Attributes:
        log: a file that gets one line of JSON for every case, or None.
    """

    log: Path | None = None
    networks: int = 0
    seen: set[str] = field(default_factory=set)
    refused: Counter[str] = field(default_factory=Counter)
    impossible: int = 0
    checked: Counter[str] = field(default_factory=Counter)
    features: Counter[str] = field(default_factory=Counter)
    seconds: Counter[str] = field(default_factory=Counter)
    kinds: dict[tuple[str, str], Kind] = field(default_factory=dict)

    def run(self, case: Case, checks: Sequence[Check]) -> None:
        """Put a case through the checks; a network that does not run by itself is only counted, a second one like it is not."""
        if case.network.script in self.seen:
            return
        self.seen.add(case.network.script)
        if not case.network.runs():
            self.impossible += 1
            return
        self.networks += 1
        self.features.update([*case.network.features, f"method {case.method}", f"recipe {case.recipe}"])
        found = []
        for check in checks:
            started = time.perf_counter()
            try:
                check(case)
            except Refused as refusal:
                self.refused[f"{check.__name__}: {refusal}"] += 1
                continue
            except Exception as error:
                found.append(self._add(case, check.__name__, error))
            self.checked[check.__name__] += 1
            self.seconds[check.__name__] += time.perf_counter() - started
        if self.log is not None:
            names = [check.__name__ for check in checks]
            line = {
                "network": self.networks,
                "checks": names,
                "findings": found,
                "script": case.script if found else "",
            }
            with self.log.open("a", encoding="utf-8") as file:
                file.write(json.dumps(line) + "\n")

    def _add(self, case: Case, check: str, error: Exception) -> str:
        text = f"{type(error).__name__}: {error}"
        key = (check, re.sub(r"\S*/\S*|[\d.]+(e[-+]?\d+)?", "#", text)[:90])
        known = self.kinds.get(key)
        if known is None:
            self.kinds[key] = Kind(check, text, case.script, traceback.format_exc(chain=False))
        else:
            known.times += 1
            if len(case.script) < len(known.script):  # The smallest is the easiest to read.
                known.message, known.script, known.trace = text, case.script, traceback.format_exc(chain=False)
        return text

    def __str__(self) -> str:
        lines = [
            f"{self.networks} different networks, {self.impossible} more that do not run by themselves, "
            f"{sum(self.checked.values())} checks; refused: {dict(self.refused)}",
            f"{sum(kind.times for kind in self.kinds.values())} findings of {len(self.kinds)} kinds",
            *(f"{n:6} {name} ({self.seconds[name]:.0f} s)" for name, n in self.checked.most_common()),
            ", ".join(f"{name} {n}" for name, n in self.features.most_common()),
        ]
        return "\n".join([*lines, *map(str, self.kinds.values())])


def some_of(case: Case, always: Sequence[Check], often: Sequence[Check], seldom: Sequence[Check]) -> list[Check]:
    """All of the first, a third of the second, a tenth of the last; the same for the same case."""
    dice = random.Random(case.script)
    return [*always, *(c for c in often if dice.random() < 1 / 3), *(c for c in seldom if dice.random() < 0.1)]
