"""A class's leaderboard: one JSONL file, an entry a line, each held to its result file.

    {"name": "Ada", "result": "ada.json", "sha256": "..", "recovery": 0.81, "kl": 0.05,
     "over_hard_flops": 0.12}

The result file (capstone.py) stands beside the board or below it. `add` writes an
entry, `check` reads them all: the entry's three numbers are computed again from the
file's runs, seed by seed. So an entry can neither be typed in nor go on standing when
its file is changed. Whoever makes up runs is not found out here: the file names the
command that makes them again.

    recovery         mean over the seeds, 1 - kl / gain
    kl               of the distilled student, nats a token
    over_hard_flops  exact match, distilled minus hard labels at equal FLOPs

Knows entries and result files. Does not know what was learned.
"""

from __future__ import annotations

import hashlib
import json
import math
from dataclasses import asdict, dataclass
from pathlib import Path

from kdlib.capstone import MEASURES, SEEDED, WITHOUT, summary
from kdlib.errors import DataError, KdlibError
from kdlib.ledger import Interval, write_text
from kdlib.phone import DISTILLED, HARD_FLOPS, TEACHER

MIN_SEEDS = 3
PROVENANCE = ("command", "date", "device", "python", "torch", "transformers")
NUMBERS = ("recovery", "kl", "over_hard_flops")
TOLERANCE = 1e-6


@dataclass(frozen=True)
class Entry:
    """A line of the board; the fields are those of the file."""

    name: str
    result: str
    sha256: str
    recovery: float
    kl: float
    over_hard_flops: float


@dataclass(frozen=True)
class Checked:
    """An entry that is what its result file says, and that file."""

    entry: Entry
    found: dict


def add(board: str | Path, name: str, result: str | Path) -> Entry:
    """Append the entry of a result file, which must lie beside the board or below it.

    Raises DataError where the file is none, or the board has the name or the file
    already; StorageError where the board cannot be written.
    """
    board, result = Path(board), Path(result)
    place = board.resolve().parent
    if not result.resolve().is_relative_to(place):
        raise DataError(
            f"{result} is not in the board's folder {place}", "copy it there first"
        )
    found, digest = _read(result)
    entry = Entry(
        name.strip(),
        result.resolve().relative_to(place).as_posix(),
        digest,
        **_numbers(found),
    )
    lines = _lines(board) if board.exists() else []
    lines.append(json.dumps(asdict(entry), ensure_ascii=False))
    *_, (entry, problem) = _judged(lines, place)
    if problem:
        raise problem
    write_text(board, "\n".join(lines) + "\n")
    return entry.entry


def check(board: str | Path) -> tuple[list[Checked], list[str]]:
    """The good entries, best recovery first, and what is wrong with each other line.

    Raises DataError for a board that cannot be read, or has no line.
    """
    board = Path(board)
    lines = _lines(board)
    if not any(map(str.strip, lines)):
        raise DataError(f"{board} has no entry", "add one: --add RESULT --name NAME")
    good, bad = [], []
    for number, (entry, problem) in enumerate(_judged(lines, board.parent), start=1):
        if problem:
            bad.append(f"line {number}: {problem.what}\n    remedy: {problem.remedy}")
        elif entry:
            good.append(entry)
    return sorted(good, key=lambda one: -one.entry.recovery), bad


def _lines(board: Path) -> list[str]:
    try:
        return board.read_text("utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(
            f"{board} cannot be read: {error}",
            "name a board; --add RESULT --name NAME begins one",
        ) from error


def _judged(lines, place: Path):
    """(Checked, None) or (None, error) for each line, (None, None) for an empty one."""
    names, digests = {}, {}
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            yield None, None
            continue
        try:
            entry = _parse(line)
            for seen, key in ((names, entry.name.casefold()), (digests, entry.sha256)):
                if key in seen:
                    what = "name" if seen is names else "result"
                    raise DataError(
                        f"{entry.name!r} has the {what} of line {seen[key]}",
                        "keep one of the two lines",
                    )
                seen[key] = number
            yield Checked(entry, _held(entry, place)), None
        except KdlibError as error:
            yield None, error


def _parse(line: str) -> Entry:
    again = "remove the line, and add the entry again: --add RESULT --name NAME"
    try:
        row = json.loads(line)
        entry = Entry(**row)
    except (ValueError, TypeError) as error:
        raise DataError(f"no entry: {error}", again) from error
    texts = (entry.name, entry.result, entry.sha256)
    if not all(isinstance(text, str) and text.strip() for text in texts):
        raise DataError("name, result and sha256 must be texts", again)
    for name in NUMBERS:
        if not _is_number(getattr(entry, name)):
            raise DataError(f"{name} = {getattr(entry, name)!r} is no number", again)
    return entry


def _held(entry: Entry, place: Path) -> dict:
    """The entry's result file, if it says what the entry says."""
    path = place / entry.result
    if not path.resolve().is_relative_to(place.resolve()):
        raise DataError(
            f"{entry.name!r}: {entry.result} is not in the board's folder",
            "copy the result file there, and add the entry again",
        )
    found, digest = _read(path)
    if digest != entry.sha256:
        raise DataError(
            f"{entry.name!r}: {entry.result} is not the file that was entered: its "
            f"sha256 begins {digest[:12]}, the entry's {entry.sha256[:12]}",
            "restore the file, or remove the line and add the entry again",
        )
    for name, value in _numbers(found).items():
        if abs(value - getattr(entry, name)) > TOLERANCE:
            raise DataError(
                f"{entry.name!r}: {name} is {getattr(entry, name):g} in the entry, and "
                f"{value:g} by the runs of {entry.result}",
                "remove the line, and add the entry again: numbers are not typed in",
            )
    return found


def _numbers(found: dict) -> dict[str, float]:
    """What an entry says of a result file, from its summary (which `_read` checked)."""
    over = found["distilled_minus"][HARD_FLOPS]["exact_match"]
    return {
        "recovery": found["recovery"]["mean"],
        "kl": found["rows"][DISTILLED]["kl"]["mean"],
        "over_hard_flops": over["mean"],
    }


def _read(path: Path) -> tuple[dict, str]:
    """A result file whose summary is that of its runs, and its sha256."""
    remedy = "write it with capstone.result and ledger.provenance, as chapter 14 does"
    try:
        data = path.read_bytes()
        found = json.loads(data)
        _check_result(found)
        again = summary(found["fixed"], found["runs"])
        for name, value in again.items():
            _same(found[name], value, name)
    except DataError:
        raise
    except OSError as error:
        raise DataError(
            f"{path} cannot be read: {error.strerror}", "put the result file there"
        ) from error
    except (KdlibError, ValueError, KeyError, TypeError, AttributeError) as error:
        said = f"{error} is missing" if isinstance(error, KeyError) else error
        raise DataError(f"{path.name} is no capstone result: {said}", remedy) from error
    return found, hashlib.sha256(data).hexdigest()


def _check_result(found: dict) -> None:
    """Raises ValueError, KeyError or TypeError that says what is wrong."""
    for name in (*PROVENANCE, "question"):
        if not str(found[name]).strip():
            raise ValueError(f"{name} is empty")
    if not found["predictions"]:
        raise ValueError("predictions is empty")
    if found["recovery"] is None:
        raise ValueError("no recovery: the teacher loses nothing without c")
    runs, seeds = found["runs"], {run["seed"] for run in found["runs"]}
    if len(seeds) < MIN_SEEDS:
        raise DataError(
            f"{len(seeds)} seeds, and {MIN_SEEDS} are asked for",
            "run more seeds, all rows of each: an interval of two says little",
        )
    if sorted((r["row"], r["seed"]) for r in runs) != sorted(
        (row, seed) for row in SEEDED for seed in seeds
    ):
        raise ValueError(f"the runs are not one of each row ({', '.join(SEEDED)})")
    for row in (*runs, found["fixed"][TEACHER], found["fixed"][WITHOUT]):
        for name in MEASURES:
            top = math.inf if name == "kl" else 1
            if not _is_number(row[name]) or not -1e-9 <= row[name] <= top:
                raise ValueError(f"{name} = {row[name]!r} in a row")


def _same(told, value, where: str) -> None:
    if isinstance(value, dict):
        for key, inner in value.items():
            _same(told[key], inner, f"{where} > {key}")
    elif abs(told - value) > TOLERANCE:
        raise ValueError(f"{where} is {told:g} there, and {value:g} by its runs")


def _is_number(value) -> bool:
    known = isinstance(value, (int, float)) and not isinstance(value, bool)
    return known and math.isfinite(value)


def table(entries: list[Checked]) -> str:
    """The board, best recovery first, with 95 % intervals over the seeds."""
    wide = max(len("name"), *(len(one.entry.name) for one in entries))
    head = f"{'name':{wide}}  {'recovery':24}{'exact match over hard FLOPs':42}seeds"
    lines = [head]
    for one in entries:
        found = one.found
        recovery = Interval(**found["recovery"])
        over = Interval(**found["distilled_minus"][HARD_FLOPS]["exact_match"]).claim()
        seeds = len({run["seed"] for run in found["runs"]})
        lines.append(f"{one.entry.name:{wide}}  {recovery!s:24}{over:42}{seeds}")
    return "\n".join(lines)
