"""What a run left behind: its lines of metrics, its settings, its validation."""

from __future__ import annotations

import json
import statistics
from dataclasses import dataclass
from pathlib import Path

from kdlib import checkpoints
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
    def learnt_on(self) -> str:
        """The number that tells best what was learnt: kl, or the loss without it."""
        return "kl" if len(self.values("kl")) > 1 else "loss"


def _lines(path: Path) -> list[dict]:
    if not path.is_file():
        raise DataError(
            f"{path} does not exist",
            "name the folder of a run: kdlib.train writes metrics.jsonl into it",
        )
    lines = []
    for number, text in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        try:
            line = json.loads(text)
            line["step"], line["loss"]
        except (ValueError, KeyError, TypeError) as error:
            raise DataError(
                f"{path}, line {number} is no line of metrics: {error}",
                "remove the line; one that was cut off by a kill is the last",
            ) from error
        lines.append(line)
    if not lines:
        raise DataError(f"{path} is empty", "let the run make a step")
    return lines


def _json(path: Path) -> dict:
    if not path.is_file():
        return {}
    try:
        return dict(json.loads(path.read_text(encoding="utf-8")))
    except (ValueError, TypeError) as error:
        raise DataError(f"{path} cannot be read: {error}", "remove it") from error


def _settings(folder: Path, result: dict):
    """From result.json, or else from the newest checkpoint, if there is either."""
    tables = result.get("settings")
    if tables is None:
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
            "read it with the version that made it",
        ) from error
