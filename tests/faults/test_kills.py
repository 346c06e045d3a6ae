"""A run that was killed, at whatever instant, ends as one that was not."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not hasattr(os, "fork"), reason="children are forks"),
]


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    script = Path(__file__).with_name("killed_runs.py")
    done = subprocess.run(
        [sys.executable, script, tmp_path_factory.mktemp("runs")],
        capture_output=True,
        text=True,
        # A fork has the threads of its parent only where there are none.
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_the_runs_were_killed(report):
    killed = [run for run in report["runs"] if run["kills"]]
    assert len(killed) >= 20
    assert sum(run["kills"] for run in killed if run["where"] == "saving") >= 12
    # Counting has found the calls: some hundreds of the system's in five saves.
    assert report["calls"]["saving"] > 200
    assert report["calls"]["anywhere"] > 20 * report["calls"]["saving"]


def test_every_killed_run_ends_like_the_undisturbed_one(report):
    wanted = report["undisturbed"]
    assert wanted["steps"] == list(range(1, 11))
    assert wanted["checkpoints"] == ["step-00000008", "step-00000010"]
    for number, run in enumerate(report["runs"]):
        assert run["end"] == wanted, f"run {number}, killed {run['where']}"
