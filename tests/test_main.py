"""The command line: every command answers, and a wrong one says what is right."""

from __future__ import annotations

import json

import pytest

from kdlib.__main__ import main


def test_laws_hold_for_kdlib(capsys):
    assert main(["laws", "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)
    assert len(rows) > 10
    assert "failed" not in {v["status"] for r in rows for v in r["verdicts"]}


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
