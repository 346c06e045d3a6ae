"""Kill training runs at random moments, let them go on, and compare their ends.

    python killed_runs.py SCRATCH_FOLDER      prints one JSON object

The moments are seeded. A child process counts the function calls that it makes and
kills itself with SIGKILL before the n-th one: of all calls in the run, or of the calls
to the operating system while a checkpoint is written. There the power fails as well: a
file that was not flushed loses its second half. Some children are killed from outside
instead, by the clock, which finds moments within a call.

All children are forks of this process, which has imported everything once.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import signal
import sys
import time
import traceback
import warnings
from pathlib import Path

import numpy as np
import torch

from kdlib import checkpoints, localize, models
from kdlib.objective import Objective
from kdlib.pairs import PairCollator
from kdlib.teachers import LiveTeacher
from kdlib.train import TrainConfig, train

CONFIG = TrainConfig(
    steps=10,
    batch_size=6,
    micro_batch_size=3,
    learning_rate=1e-2,
    checkpoint_every=2,
    keep_checkpoints=2,
    log_every=3,
)
OBJECTIVE = Objective(hard_weight=0.3, temperature=2.0)
ANYWHERE, SAVING, BY_CLOCK = "anywhere", "saving", "by the clock"
RUNS = [ANYWHERE] * 10 + [SAVING] * 12 + [BY_CLOCK] * 4
KILLS = 2  # of each run, at most: a run that has gone on may end before the second


class Setting:
    """What every run begins with, made once."""

    def __init__(self):
        _, self.tokenizer = models.load("teacher")
        self.collator = PairCollator(self.tokenizer)
        examples = localize.examples("train", locales=["fr"], limit=10)
        self.pairs = [self.collator.encode(e, i) for i, e in enumerate(examples)]
        self.teacher = LiveTeacher(self.model(seed=1))

    def model(self, seed: int):
        return models.build(self.tokenizer, hidden_size=8, layers=1, heads=1, seed=seed)


def run(setting: Setting, folder: Path) -> None:
    """One attempt: begin, or go on, and write `end.json` when the last step is done."""
    torch.manual_seed(0)
    random.seed(0)
    np.random.seed(0)
    student = setting.model(seed=0)
    for module in student.modules():
        if hasattr(module, "attention_dropout"):
            module.attention_dropout = 0.1  # draws from torch's global generator

    def on_step(step, loss):  # so do many users' callbacks, from the other two
        random.random()
        np.random.random()

    history = train(
        student,
        setting.pairs,
        setting.collator,
        OBJECTIVE,
        CONFIG,
        teacher=setting.teacher,
        folder=folder / "run",
        on_step=on_step,
    )
    weights = b"".join(p.detach().numpy().tobytes() for p in student.parameters())
    end = {
        "weights": hashlib.sha256(weights).hexdigest(),
        "loss": history.loss,
        "grad_norm": history.grad_norm,
        "tokens": history.tokens,
        "draws": [random.random(), np.random.random(), torch.rand(1).item()],
    }
    (folder / "end.json").write_text(json.dumps(end))


class KillAt:
    """Kill this process before its n-th call; count calls only while `counting`."""

    def __init__(self, n: int, folder: Path, where: str):
        self.n, self.folder, self.calls = n, folder, 0
        self.counting = where == ANYWHERE
        # Files as the disk has them, by number and time of change.
        self.flushed = {_identity(f.stat()) for f in folder.rglob("*")}
        self.write, self.fsync = checkpoints.write, os.fsync
        if where == SAVING:
            checkpoints.write = self._write
            os.fsync = self._fsync

    def __enter__(self):
        sys.setprofile(self._event)
        return self

    def __exit__(self, *error):
        sys.setprofile(None)

    def _event(self, frame, event, argument):
        if event in ("call", "c_call") and self.counting and self._counts(argument):
            self.calls += 1
            if self.calls == self.n:
                sys.setprofile(None)
                if os.fsync != self.fsync:
                    self._power_failure()
                os.kill(os.getpid(), signal.SIGKILL)

    def _counts(self, function) -> bool:
        if os.fsync == self.fsync:
            return True
        module = getattr(function, "__module__", None)
        name = getattr(function, "__name__", "")
        return module in ("posix", "_io") or name in ("serialize_file", "write_record")

    def _write(self, *arguments, **options):
        self.counting = True
        try:
            return self.write(*arguments, **options)
        finally:
            self.counting = False

    def _fsync(self, handle):
        self.fsync(handle)
        self.flushed.add(_identity(os.fstat(handle)))

    def _power_failure(self):
        for file in (self.folder / "run" / "checkpoints").rglob("*"):
            if file.is_file() and _identity(file.stat()) not in self.flushed:
                os.truncate(file, file.stat().st_size // 2)


def _identity(status: os.stat_result) -> tuple[int, int]:
    return status.st_ino, status.st_mtime_ns


def forked(action, folder: Path, *, kill_after: float | None = None) -> int:
    """Run `action` in a child; its exit status, negative for a signal."""
    child = os.fork()
    if child == 0:
        try:
            # A checkpoint that a kill has damaged is the failure that is looked for.
            warnings.filterwarnings("error", message=".*damaged")
            sys.stdout = sys.stderr = (folder / "output.txt").open("a")
            action()
        except BaseException:
            traceback.print_exc()
            sys.stdout.flush()
            os._exit(1)
        sys.stdout.flush()
        os._exit(0)
    if kill_after is not None:
        time.sleep(kill_after)
        os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    return os.waitstatus_to_exitcode(status)


def count_calls(setting: Setting, folder: Path, where: str) -> int:
    """Calls of an undisturbed run. It leaves its end in `folder`."""
    folder.mkdir()

    def action():
        with KillAt(0, folder, where) as counter:
            run(setting, folder)
        (folder / "calls").write_text(str(counter.calls))

    assert forked(action, folder) == 0, (folder / "output.txt").read_text()
    return int((folder / "calls").read_text())


def killed_run(
    setting: Setting, folder: Path, where: str, calls: int, seconds: float, rng
) -> int:
    """Run until the end through up to KILLS kills; how many there were."""
    folder.mkdir()
    kills = 0
    for _ in range(KILLS):
        moment, number = rng.uniform(0, seconds), rng.randint(1, calls)

        def action(number=number):
            with KillAt(number, folder, where):
                run(setting, folder)

        if where == BY_CLOCK:
            status = forked(lambda: run(setting, folder), folder, kill_after=moment)
        else:
            status = forked(action, folder)
        kills += status == -signal.SIGKILL
        if status == 0:
            return kills
        assert status == -signal.SIGKILL, (folder / "output.txt").read_text()
    status = forked(lambda: run(setting, folder), folder)
    assert status == 0, (folder / "output.txt").read_text()
    return kills


def end_of(folder: Path) -> dict:
    """The run's end, and what its folder says about it."""
    lines = (folder / "run" / "metrics.jsonl").read_text().splitlines()
    found = json.loads((folder / "end.json").read_text())
    found["steps"] = [json.loads(line)["step"] for line in lines]
    # Also what is hidden: a killed write's scratch is gone after the next write.
    found["checkpoints"] = sorted(
        path.name for path in (folder / "run" / "checkpoints").iterdir()
    )
    return found


def main(scratch: Path) -> dict:
    torch.set_num_threads(1)
    setting, rng = Setting(), random.Random(0)
    plain = scratch / "undisturbed"
    plain.mkdir()
    start = time.perf_counter()
    assert forked(lambda: run(setting, plain), plain) == 0, (
        plain / "output.txt"
    ).read_text()
    seconds = time.perf_counter() - start
    calls = {
        where: count_calls(setting, scratch / f"counted-{where}", where)
        for where in (ANYWHERE, SAVING)
    }
    runs = []
    for number, where in enumerate(RUNS):
        folder = scratch / f"run-{number}"
        kills = killed_run(setting, folder, where, calls.get(where, 1), seconds, rng)
        runs.append({"where": where, "kills": kills, "end": end_of(folder)})
    return {"undisturbed": end_of(plain), "calls": calls, "runs": runs}


if __name__ == "__main__":
    print(json.dumps(main(Path(sys.argv[1]))))
