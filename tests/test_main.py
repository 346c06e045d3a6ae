"""The command line: every command answers, and a wrong one says what is right."""

from __future__ import annotations

import json
import subprocess
import sys
from importlib.metadata import PackageNotFoundError

import pytest

from kdlib import leaderboard
from kdlib.__main__ import main
from kdlib.laws import LAWS
from kdlib.loss_under_test import LossUnderTest
from kdlib.peers import PEERS


def test_laws_hold_for_kdlib(capsys):
    assert main(["laws", "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)
    assert len(rows) > 10
    assert "failed" not in {v["status"] for r in rows for v in r["verdicts"]}


def test_laws_print_a_row_a_law(capsys):
    assert main(["laws"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == list(LAWS)
    assert all(line.split()[1] == "passed" for line in lines)


def test_a_broken_law_is_status_1(capsys, monkeypatch):
    broken = LossUnderTest("wrong", lambda s, t, labels: 0 * s.sum())
    monkeypatch.setattr(leaderboard, "kdlib_losses", lambda: [broken])
    assert main(["laws"]) == 1
    assert "no gradient reaches the student" in capsys.readouterr().out


def test_peers_that_are_not_here_are_a_reason_each(capsys, monkeypatch):
    def absent(name):
        raise PackageNotFoundError(name)

    monkeypatch.setattr(leaderboard.importlib.metadata, "version", absent)
    assert main(["laws", "--peers"]) == 0
    text = capsys.readouterr().out
    for package in PEERS.values():
        assert f"skipped: pip install {package} " in text


def test_an_error_is_one_message_and_status_2(capsys):
    assert main(["bench", "loss", "--device", "abacus"]) == 2
    assert "abacus" in capsys.readouterr().err


def test_an_interrupt_says_how_to_go_on(capsys, monkeypatch):
    from kdlib import quickstart

    def interrupted(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(quickstart, "run", interrupted)
    assert main(["quickstart"]) == 130
    assert "the same command goes on" in capsys.readouterr().err


def test_an_unknown_command_is_refused(capsys):
    with pytest.raises(SystemExit) as stop:
        main(["quickstrat"])
    assert stop.value.code == 2 and "quickstart" in capsys.readouterr().err


def test_a_reader_that_has_seen_enough_gets_no_traceback():
    command = f"'{sys.executable}' -m kdlib laws --json | head -c 1"
    done = subprocess.run(command, shell=True, capture_output=True, text=True)
    assert (done.stdout, done.stderr) == ("[", "")
