"""A class's board: good entries pass, and every way to spoil one is found."""

from __future__ import annotations

import errno
import json
from pathlib import Path

import pytest

from kdlib import capstone, class_leaderboard
from kdlib.__main__ import main
from kdlib.errors import DataError, StorageError
from kdlib.ledger import provenance

FIXED = {
    capstone.TEACHER: {"exact_match": 0.98, "agreement": 1.0, "kl": 0.0},
    capstone.WITHOUT: {"exact_match": 0.2, "agreement": 0.8, "kl": 0.5},
}
EXACT = dict(zip(capstone.SEEDED, (0.0, 0.5, 0.55, 0.8), strict=True))


def runs(seeds=3, kl=0.1):
    return [
        {
            "row": row,
            "seed": seed,
            "exact_match": EXACT[row] + 0.01 * seed,
            "agreement": 0.9,
            "kl": kl if row == capstone.DISTILLED else 1.0,
            "minutes": 0.1,
        }
        for seed in range(seeds)
        for row in capstone.SEEDED
    ]


def result(**changes):
    made = changes.pop("runs", None) or runs()
    return {
        **provenance("python mine.py --seeds 3"),
        "question": "At equal FLOPs, more or less?",
        "predictions": ["above 0.1"],
        "fixed": FIXED,
        "runs": made,
        **capstone.summary(FIXED, made),
        **changes,
    }


@pytest.fixture
def place(tmp_path):
    (tmp_path / "ada.json").write_text(json.dumps(result()))
    (tmp_path / "bob.json").write_text(json.dumps(result(runs=runs(kl=0.3))))
    return tmp_path


@pytest.fixture
def board(place):
    class_leaderboard.add(place / "board.jsonl", "Bob", place / "bob.json")
    class_leaderboard.add(place / "board.jsonl", "Ada", place / "ada.json")
    return place / "board.jsonl"


def lines(board):
    return [json.loads(line) for line in board.read_text().splitlines()]


def rewrite(board, *rows):
    board.write_text("".join(json.dumps(row) + "\n" for row in rows))


def test_numbers_of_an_entry_by_hand(board):
    """Recovery 1 - 0.1 / 0.5 and 1 - 0.3 / 0.5; exact match 0.8 - 0.55 at each seed."""
    bob, ada = lines(board)
    assert ada["recovery"] == pytest.approx(0.8)
    assert bob["recovery"] == pytest.approx(0.4)
    assert ada["kl"] == pytest.approx(0.1)
    assert ada["over_hard_flops"] == pytest.approx(0.25)


def test_the_best_recovery_stands_first(board, capsys):
    assert main(["leaderboard", str(board)]) == 0
    printed = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in printed] == ["name", "Ada", "Bob"]
    assert "0.800 [0.800, 0.800]" in printed[1]
    assert "0.250 [0.250, 0.250]" in printed[1]


def test_the_command_adds_and_refuses(place, capsys):
    board = str(place / "new.jsonl")
    ada = ["--add", str(place / "ada.json"), "--name", "Ada"]
    assert main(["leaderboard", board, *ada]) == 0
    assert main(["leaderboard", board, *ada]) == 2
    assert "'Ada' has the name of line 1" in capsys.readouterr().err
    assert main(["leaderboard", board, "--add", str(place / "bob.json")]) == 2
    assert "give both, or neither" in capsys.readouterr().err
    assert len(lines(place / "new.jsonl")) == 1


@pytest.mark.parametrize("name", class_leaderboard.NUMBERS)
def test_a_number_that_was_typed_in_is_found(board, capsys, name):
    bob, ada = lines(board)
    rewrite(board, bob, {**ada, name: ada[name] + 0.01})
    good, bad = class_leaderboard.check(board)
    assert [one.entry.name for one in good] == ["Bob"]
    assert len(bad) == 1 and bad[0].startswith("line 2: ") and name in bad[0]
    assert main(["leaderboard", str(board)]) == 1
    said = capsys.readouterr()
    assert "Bob" in said.out and "Ada" not in said.out and "remedy" in said.err


def test_a_file_that_was_changed_after_its_entry_is_found(board, place):
    (place / "ada.json").write_text(json.dumps(result(runs=runs(kl=0.05))))
    _, bad = class_leaderboard.check(board)
    assert len(bad) == 1 and "not the file that was entered" in bad[0]
    (place / "ada.json").unlink()
    assert "cannot be read" in class_leaderboard.check(board)[1][0]


def test_duplicates_are_found_by_name_and_by_result(board):
    bob, ada = lines(board)
    rewrite(board, ada, {**bob, "name": "ADA"}, {**ada, "name": "Eve"}, bob)
    good, bad = class_leaderboard.check(board)
    assert [one.entry.name for one in good] == ["Ada", "Bob"]
    assert "line 2: 'ADA' has the name of line 1" in bad[0]
    assert "line 3: 'Eve' has the result of line 1" in bad[1]


@pytest.mark.parametrize(
    "line, says",
    [
        ("{", "no entry"),
        ("[]", "no entry"),
        ('"Ada"', "no entry"),
        ('{"name": "Ada"}', "missing"),
        ({"points": 3}, "points"),
        ({"name": " "}, "must be texts"),
        ({"name": 7}, "must be texts"),
        ({"recovery": "0.8"}, "recovery = '0.8' is no number"),
        ({"kl": True}, "kl = True is no number"),
        ({"kl": float("nan")}, "kl = nan is no number"),
        ({"result": "../ada.json"}, "not in the board's folder"),
        ({"result": "/ada.json"}, "not in the board's folder"),
    ],
)
def test_a_broken_line_is_found_and_the_others_stand(board, line, says):
    bob, ada = lines(board)
    if isinstance(line, dict):
        line = json.dumps({**ada, **line})
    board.write_text(f"{json.dumps(bob)}\n\n{line}\n")
    good, bad = class_leaderboard.check(board)
    assert [one.entry.name for one in good] == ["Bob"]
    assert len(bad) == 1 and bad[0].startswith("line 3: ") and says in bad[0], bad
    assert "remedy: " in bad[0]


def spoilt(change):
    found = json.loads(json.dumps(result()))
    change(found)
    return found


def drop_run(found):
    del found["runs"][0]


def repeat_run(found):
    found["runs"].append(found["runs"][-1])


def better_run(found):
    found["runs"][3]["exact_match"] += 0.05


def better_gain(found):
    found["fixed"][capstone.WITHOUT]["kl"] = 5.0


def negative_kl(found):
    found["runs"][3]["kl"] = -1.0


def more_than_all(found):
    found["runs"][3]["exact_match"] = 1.5


def no_gain(found):
    found["fixed"][capstone.WITHOUT]["kl"] = 0.0
    found |= capstone.summary(found["fixed"], found["runs"])


@pytest.mark.parametrize(
    "change, says",
    [
        (drop_run, "not one of each row"),
        (repeat_run, "not one of each row"),
        (better_run, "by its runs"),
        (better_gain, "by its runs"),
        (negative_kl, "kl = -1.0"),
        (more_than_all, "exact_match = 1.5"),
        (no_gain, "loses nothing without c"),
        (lambda found: found.pop("command"), "'command' is missing"),
        (lambda found: found.update(device=""), "device is empty"),
        (lambda found: found.update(question=" "), "question is empty"),
        (lambda found: found.update(predictions=[]), "predictions is empty"),
        (lambda found: found.pop("recovery"), "'recovery' is missing"),
        (lambda found: found.update(runs=3), "no capstone result"),
    ],
)
def test_a_result_that_does_not_bear_its_summary_is_refused(place, change, says):
    (place / "bad.json").write_text(json.dumps(spoilt(change)))
    with pytest.raises(DataError, match=says) as refused:
        class_leaderboard.add(place / "board.jsonl", "Bad", place / "bad.json")
    assert refused.value.remedy
    assert not (place / "board.jsonl").exists()


def test_two_seeds_are_not_enough(place):
    (place / "two.json").write_text(json.dumps(result(runs=runs(seeds=2))))
    with pytest.raises(DataError, match="2 seeds, and 3 are asked for"):
        class_leaderboard.add(place / "board.jsonl", "Two", place / "two.json")


@pytest.mark.parametrize("text", ["{", "[]", "3"])
def test_what_is_no_result_is_refused(place, text):
    (place / "bad.json").write_text(text)
    with pytest.raises(DataError, match="no capstone result"):
        class_leaderboard.add(place / "board.jsonl", "Bad", place / "bad.json")


def test_a_result_from_elsewhere_is_refused(place, tmp_path_factory):
    other = tmp_path_factory.mktemp("other") / "ada.json"
    other.write_text(json.dumps(result()))
    with pytest.raises(DataError, match="not in the board's folder"):
        class_leaderboard.add(place / "board.jsonl", "Ada", other)


@pytest.mark.parametrize("text", [None, "", "\n\n"])
def test_a_board_without_entries_is_refused(tmp_path, text, capsys):
    if text is not None:
        (tmp_path / "board.jsonl").write_text(text)
    assert main(["leaderboard", str(tmp_path / "board.jsonl")]) == 2
    assert "--add RESULT --name NAME" in capsys.readouterr().err


def test_a_full_disk_leaves_the_board_as_it_was(place, monkeypatch):
    board = place / "board.jsonl"
    class_leaderboard.add(board, "Bob", place / "bob.json")
    before = board.read_bytes()

    def half(self, text, *args, **kwargs):
        with self.open("w", encoding="utf-8") as file:
            file.write(text[: len(text) // 2])
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "write_text", half)
    with pytest.raises(StorageError, match="No space left"):
        class_leaderboard.add(board, "Ada", place / "ada.json")
    assert board.read_bytes() == before
    assert {p.name for p in place.iterdir()} == {"ada.json", "bob.json", "board.jsonl"}


def test_a_board_that_is_no_text_is_not_added_to(place):
    board = place / "board.jsonl"
    board.write_bytes(b"\xff\xfe junk")
    with pytest.raises(DataError, match="cannot be read"):
        class_leaderboard.add(board, "Ada", place / "ada.json")
    assert board.read_bytes() == b"\xff\xfe junk"
