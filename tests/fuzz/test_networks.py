"""Random networks: a few in every run of the tests, many with `make fuzz`."""

from __future__ import annotations

import contextlib
from pathlib import Path

import pytest
from hypothesis import HealthCheck, Phase, given, note, settings

from tests.fuzz.case import Case, Refused, cases
from tests.fuzz.properties import ALWAYS, OFTEN, SELDOM
from tests.fuzz.survey import Survey, some_of

settings.register_profile(
    "networks", deadline=None, database=None, suppress_health_check=list(HealthCheck), print_blob=False
)
NETWORKS = settings.get_profile("networks")


@settings(NETWORKS, max_examples=6, derandomize=True)
@given(cases())
def test_a_few_networks(case: Case) -> None:
    if case.network.runs():
        note(case.script)
        for check in (*ALWAYS, *OFTEN, *SELDOM):
            with contextlib.suppress(Refused):
                check(case)


@pytest.mark.fuzz
def test_many_networks(request: pytest.FixtureRequest) -> None:
    """Goes on after a finding; fails at the end with the smallest network of each kind."""
    log = request.config.getoption("--fuzz-log")
    survey = Survey(Path(log) if log else None)

    wanted = request.config.getoption("--networks")

    @settings(NETWORKS, max_examples=5 * wanted, phases=[Phase.generate])  # Some are drawn twice.
    @given(cases())
    def run(case: Case) -> None:
        if survey.networks < wanted:
            survey.run(case, some_of(case, ALWAYS, OFTEN, SELDOM))

    run()
    print(survey)
    assert not survey.kinds, f"{len(survey.kinds)} kinds of finding, see above"
