"""The first command, at a size that a test can wait for."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

from kdlib import quickstart
from kdlib.errors import ArgumentError, StorageError


def command(*arguments):
    return subprocess.run(
        [sys.executable, "-m", "kdlib", "quickstart", *arguments],
        capture_output=True,
        text=True,
    )


@pytest.mark.slow
def test_json_resume_and_files(tmp_path):
    done = command("--json", "--out", str(tmp_path / "q"), "--seconds", "1")
    assert done.returncode == 0, done.stderr
    facts = json.loads(done.stdout)
    assert [row["name"] for row in facts["rows"]] == list(quickstart.ROWS)
    wanted = "name exact_match agreement kl parameters bytes latency_ms requests_per_s"
    for row in facts["rows"]:
        assert set(wanted.split()) <= set(row)
    assert facts["rows"][0]["exact_match"] >= 0.95
    assert facts["seconds"] > 0 and len(facts["examples"]) == 3
    assert (tmp_path / "q" / "quickstart.png").stat().st_size > 5000
    assert (tmp_path / "q" / "student" / "model.safetensors").is_file()
    # A second run with the same settings trains nothing anew.
    state = quickstart._resume(
        tmp_path / "q",
        {"version": quickstart.__version__, "seed": 0, "seconds": 1.0},
    )
    assert state["steps"] == facts["steps"]
    assert state["rows"] == {row["name"]: row for row in facts["rows"]}
    assert "distilled student" in quickstart.report(facts)


def test_a_folder_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").write_text("in the way")
    done = command("--out", str(tmp_path / "file" / "q"))
    assert done.returncode == 2
    assert "cannot write to" in done.stderr and "--out" in done.stderr
    assert "Traceback" not in done.stderr
    with pytest.raises(StorageError):
        quickstart.run(tmp_path / "file" / "q")


def test_seconds_must_be_positive(tmp_path):
    with pytest.raises(ArgumentError, match="seconds=0"):
        quickstart.run(tmp_path, seconds=0)
    assert not os.listdir(tmp_path)


def test_an_earlier_run_with_other_settings_is_not_taken_over(tmp_path):
    settings = {"version": "x", "seed": 1, "seconds": 2}
    assert quickstart._resume(tmp_path, settings)["rows"] == {}
    (tmp_path / "rows.json").write_text("{ cut")
    assert quickstart._resume(tmp_path, settings)["rows"] == {}
    (tmp_path / "rows.json").write_text(
        json.dumps({"settings": {**settings, "seed": 2}, "rows": {"teacher": {}}})
    )
    assert quickstart._resume(tmp_path, settings)["rows"] == {}
