"""The soak's short form."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.soak.run import soak


@pytest.mark.cluster
@pytest.mark.slow  # real processes, for a while
@pytest.mark.timeout(240)
def test_twenty_seconds_of_everything(tmp_path: Path, pytestconfig: pytest.Config) -> None:
    outcome = soak(tmp_path, 20, pytestconfig.getoption("seed"), tell=print)
    print(outcome)
    assert not outcome.findings, str(outcome)
