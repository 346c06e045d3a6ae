"""The ledger of claims: each says what its result file says, and can be run again."""

from __future__ import annotations

import json
import sys

import pytest

from kdlib import __main__ as command
from kdlib import claims
from kdlib.errors import ArgumentError, DataError, StorageError
from kdlib.ledger import Interval

KNOWN = claims.load()


@pytest.mark.parametrize("claim", KNOWN.values(), ids=list(KNOWN))
def test_a_claim_says_what_its_result_file_says(claim):
    found = claim.interval()
    assert found.low <= found.mean <= found.high
    assert claims.side(found) == claim.expect
    assert ("not shown here" in str(claim)) == (claim.expect == claims.NOT_SHOWN)
    assert f"{found}" in str(claim)


@pytest.mark.parametrize("claim", KNOWN.values(), ids=list(KNOWN))
def test_a_claim_s_script_takes_its_options(claim):
    """The small run's options and --out, as the script itself reads them."""
    script = claims.FOLDER / "experiments" / claim.script
    text = script.read_text()
    assert '"--out"' in text
    for option in claim.small:
        name = option.removeprefix("--")  # as argparse has it, or as a default's name
        assert name == option or f'"{option}"' in text or f" {name}=" in text
    facts = claim.facts()
    assert claim.script in facts["command"]
    assert facts["date"] and facts["device"] and facts["torch"]


@pytest.mark.parametrize(
    "low, high, side",
    [(0.1, 0.2, "above"), (-0.2, -0.1, "below"), (-0.1, 0.1, "not shown")],
)
def test_the_side_of_zero(low, high, side):
    assert claims.side(Interval((low + high) / 2, low, high)) == side


def test_verdicts():
    assert claims.verdict("above", "above") == "holds"
    assert claims.verdict("not shown", "not shown") == "holds"
    assert claims.verdict("above", "not shown") == "not shown at this scale"
    assert claims.verdict("not shown", "below") == "shown at this scale"
    assert claims.verdict("above", "below") == "contradicted"
    for expected in ("above", "not shown"):
        assert claims.verdict(expected, None) == "not shown at this scale"


def test_a_rerun_that_did_not_get_so_far_says_so(course, capsys):
    """Null in the place of the interval is no number; it contradicts nothing."""
    folder = course()
    script = folder / "experiments" / "one.py"
    script.write_text(SCRIPT.replace('"b": {"mean"', '"b": None, "c": {"mean"'))
    assert command.main(["ledger", "one"]) == 0
    shown = capsys.readouterr().out.splitlines()
    assert shown[-1] == "  now      no number: not shown at this scale"
    assert command.main(["ledger", "one", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["found"] is None


# --- A course of one claim ---

SCRIPT = """\
import argparse, json
parser = argparse.ArgumentParser()
parser.add_argument("--out")
parser.add_argument("--seeds", type=int, default=5)
options = parser.parse_args()
if options.seeds == 13:
    raise SystemExit("out of luck")
mean = float(options.seeds)
json.dump({"minus": {"b": {"mean": mean, "low": mean - 1.5, "high": mean + 1.5}},
           "command": "python one.py", "device": "CPU", "date": "2026-01-01",
           "minutes": 0.1}, open(options.out, "w"))
"""
CLAIM = """\
[one]
says = "A minus B"
result = "one.json"
at = ["minus", "b"]
script = "one.py"
small = ["--seeds", "{seeds}"]
expect = "above"
"""


@pytest.fixture
def course(tmp_path, monkeypatch):
    monkeypatch.setattr(claims, "FOLDER", tmp_path)
    (tmp_path / "experiments").mkdir()
    (tmp_path / "results").mkdir()
    (tmp_path / "experiments" / "one.py").write_text(SCRIPT)
    number = {"mean": 5.0, "low": 3.5, "high": 6.5}
    about = {"command": "python one.py", "device": "CPU", "date": "2026-01-01"}
    result = json.dumps({"minus": {"b": number}} | about)
    (tmp_path / "results" / "one.json").write_text(result)

    def write(text=CLAIM, seeds=3):
        (tmp_path / "claims.toml").write_text(text.format(seeds=seeds))
        return tmp_path

    write()
    return write


def test_the_list(course, capsys):
    assert command.main(["ledger"]) == 0
    assert capsys.readouterr().out == (
        "one\n"
        "    A minus B: 5.000 [3.500, 6.500].\n"
        "    one.json: python one.py; CPU, 2026-01-01\n"
    )
    assert command.main(["ledger", "--json"]) == 0
    (row,) = json.loads(capsys.readouterr().out)
    assert row["id"] == "one" and row["interval"]["low"] == 3.5


@pytest.mark.parametrize(
    "seeds, verdict, status",
    [(3, "holds", 0), (1, "not shown at this scale", 0), (-4, "contradicted", 1)],
)
def test_a_rerun_is_held_against_the_record(course, capsys, seeds, verdict, status):
    folder = course(seeds=seeds)
    before = (folder / "results" / "one.json").read_bytes()
    assert command.main(["ledger", "one"]) == status
    shown = capsys.readouterr()
    assert shown.out.splitlines() == [
        "A minus B",
        "  recorded 5.000 [3.500, 6.500]",
        f"  now      {seeds:.3f} [{seeds - 1.5:.3f}, {seeds + 1.5:.3f}]: {verdict}",
    ]
    assert shown.err == f"python notebooks/experiments/one.py --seeds {seeds}\n"
    assert (folder / "results" / "one.json").read_bytes() == before


def test_a_full_rerun_leaves_the_options_out(course, capsys):
    course(seeds=1)
    assert command.main(["ledger", "one", "--scale", "full", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["found"]["mean"] == 5.0 and found["verdict"] == "holds"
    assert sys.executable not in found["command"] and "--out" not in found["command"]


def test_a_script_that_fails_is_told_with_its_words(course):
    course(seeds=13)
    with pytest.raises(StorageError, match="status 1:\nout of luck"):
        claims.rerun(claims.find("one"))


@pytest.mark.parametrize(
    "old, new, says",
    [
        ("small =", "smal =", "'smal' is unknown|'small' is missing"),
        ('expect = "above"\n', "", "'expect' is missing"),
        ("[one]", "[one", "cannot be read"),
    ],
)
def test_a_bad_file_of_claims_is_named(course, old, new, says):
    course(CLAIM.replace(old, new))
    with pytest.raises(DataError, match=says):
        claims.load()


def test_what_is_missing_is_named(course):
    with pytest.raises(ArgumentError, match="no claim 'two'"):
        claims.find("two")
    folder = course(CLAIM.replace('"b"]', '"c"]'))
    with pytest.raises(DataError, match="no interval at minus > c"):
        claims.find("one").interval()
    (folder / "results" / "one.json").unlink()
    with pytest.raises(DataError, match="one.json cannot be read(.|\n)*one.py"):
        claims.find("one").interval()
    (folder / "claims.toml").unlink()
    with pytest.raises(DataError, match="in a clone of the course"):
        claims.load()
