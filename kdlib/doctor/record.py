"""What a run left behind: its lines of metrics, its settings, its validation."""

from __future__ import annotations

import json
import math
import statistics
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path

from kdlib import checkpoints
from kdlib.doctor.thresholds import STEPS
from kdlib.errors import ArgumentError, DataError
from kdlib.objective import Objective
from kdlib.settings import TrainConfig


@dataclass(frozen=True)
class Record:
    """lines:      of metrics.jsonl, in order
    config, objective: of the run; None where only metrics are there
    vocabulary: of the student, where it was saved
    validation: of result.json (train_command.py), where there is one
    """

    lines: list[dict]
    config: TrainConfig | None = None
    objective: Objective | None = None
    vocabulary: int | None = None
    validation: dict | None = None

    @classmethod
    def read(cls, folder: str | Path) -> Record:
        """Raises DataError for a folder without metrics, or whose files are no JSON."""
        folder = Path(folder)
        lines = _lines(folder / "metrics.jsonl")
        result, shape = (
            _json(folder / "result.json"),
            _json(folder / "student/config.json"),
        )
        config, objective = _settings(folder, result)
        return cls(
            lines, config, objective, shape.get("vocab_size"), result.get("validation")
        )

    def values(self, name: str) -> list[float]:
        """Of every line that has the number."""
        found = (line.get(name) for line in self.lines)
        return [x for x in found if x is not None]

    def tenths(self, name: str) -> list[float]:
        """Medians of ten stretches of the run, fewer where there are fewer values."""
        values = self.values(name)
        parts = min(10, len(values))
        edges = (
            [round(i * len(values) / parts) for i in range(parts + 1)] if parts else []
        )
        pairs = zip(edges, edges[1:], strict=False)
        return [statistics.median(values[a:b]) for a, b in pairs]

    def thirds(self, name: str) -> list[float]:
        """Means of the tenths: what is left of noise is small. Empty below 3 values."""
        tenths = self.tenths(name)
        third = len(tenths) // 3
        if not third:
            return []
        parts = tenths[:third], tenths[third:-third], tenths[-third:]
        return [statistics.fmean(part) for part in parts]

    @property
    def of_one_writer(self) -> Record:
        """The lines whose responses one side wrote, the one that wrote most: data,
        student and teacher have losses and speeds of their own (on_policy.py)."""
        writers = [
            (line.get("student_written"), line.get("teacher_written"))
            for line in self.lines
        ]
        most = statistics.mode(writers)
        pairs = zip(self.lines, writers, strict=True)
        return replace(self, lines=[line for line, writer in pairs if writer == most])

    @property
    def unseen(self) -> list[str]:
        """What this record is too short, or too poor, to show."""
        unseen = []
        if len(self.lines) < STEPS:
            unseen.append(f"trends ({len(self.lines)} steps of at least {STEPS})")
        if self.objective is None:
            unseen.append("scale (no settings beside the metrics)")
        if not self.values("kl"):
            unseen.append("student against teacher (no step was measured)")
        return unseen

    @property
    def learnt_on(self) -> str:
        """The number that tells best what was learnt: kl, or the loss without it."""
        return "kl" if len(self.values("kl")) > 1 else "loss"


def as_row(values: list[float]) -> str:
    return " ".join(f"{x:.3g}" for x in values)


def _lines(path: Path) -> list[dict]:
    text = _text(path)
    if text is None:
        raise DataError(
            f"{path} does not exist",
            "name the folder of a run: kdlib.train writes metrics.jsonl into it",
        )
    *whole, last = text.split("\n")
    numbered = [(i, line) for i, line in enumerate(whole, 1) if line.strip()]
    lines = [_numbers(path, number, line) for number, line in numbered]
    if last:
        # Cut off by a kill, or being written at this moment: all others are good.
        with suppress(DataError):
            lines.append(_numbers(path, len(whole) + 1, last))
    if not lines:
        raise DataError(f"{path} holds no whole line", "let the run make a step")
    return lines


def _numbers(path: Path, number: int, text: str) -> dict:
    """A line of metrics. NaN and infinity, which other writers have, become None."""
    try:
        line = json.loads(text)
        if not isinstance(line, dict):
            raise ValueError(f"{text.strip()[:20]} has no names")
        line["step"], line["loss"]
        wrong = [n for n, x in line.items() if not isinstance(x, int | float | None)]
        if wrong:
            raise ValueError(f"{wrong[0]} is {line[wrong[0]]!r}")
    except (ValueError, KeyError) as error:
        raise DataError(
            f"{path}, line {number} is no line of metrics: {error}",
            "take it out of a copy of the folder and examine that; a line has step, "
            "loss and other numbers, as JSON",
        ) from error
    return {n: x if x is None or math.isfinite(x) else None for n, x in line.items()}


def _text(path: Path) -> str | None:
    """None where there is no such file."""
    try:
        return path.read_text(encoding="utf-8")
    except FileNotFoundError:
        return None
    except OSError as error:
        raise DataError(
            f"{path} cannot be read: {error}",
            "have its owner let you read it, or examine a copy of the folder",
        ) from error
    except UnicodeDecodeError as error:
        raise DataError(
            f"{path} cannot be read as text: {error}",
            "get it again from where the run was made",
        ) from error


def _json(path: Path) -> dict:
    text = _text(path)
    try:
        return {} if text is None else dict(json.loads(text))
    except (ValueError, TypeError) as error:
        raise DataError(
            f"{path} is no JSON object: {error}",
            "get it again from where the run was made, or move it away: without it the "
            "settings are taken from the newest checkpoint",
        ) from error


def _settings(folder: Path, result: dict):
    """From result.json, or else from the newest checkpoint, if there is either."""
    tables = result.get("settings")
    if tables is None:
        newest = None
        # Warns of every one that is damaged; the numbers can be read all the same.
        with suppress(DataError, OSError):
            newest = checkpoints.newest_good(folder / "checkpoints")
        if newest is None:
            return None, None
        tables = {"train": newest.facts["config"], **newest.facts}
    try:
        train, objective = tables["train"], tables.get("objective", {})
        return TrainConfig(**train), Objective(**objective)
    except (ArgumentError, KeyError, TypeError) as error:
        raise DataError(
            f"the settings of the run {folder} are not kdlib's: {error}",
            "read it with the version that made it, or copy metrics.jsonl alone into a "
            "folder and examine that: nothing is compared with settings then",
        ) from error
