"""One process at a time in a folder, shown with a second real process."""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from kdlib import build_cache, localize, lock, models
from kdlib.__main__ import main
from kdlib.errors import ArgumentError, StorageError
from kdlib.lock import LOCK, only_process_in
from kdlib.objective import Objective
from kdlib.pairs import PairCollator
from kdlib.train import TrainConfig, train

needs_flock = pytest.mark.skipif(lock.fcntl is None, reason="no flock here")
HOLDER = """
import sys
from pathlib import Path
from kdlib.lock import only_process_in
with only_process_in(Path(sys.argv[1])):
    print("held", flush=True)
    sys.stdin.readline()
"""


@pytest.fixture
def holder(tmp_path):
    """Another process that has the lock of tmp_path / "run" until it reads a line."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLDER, tmp_path / "run"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        assert process.stdout.readline() == "held\n"
        yield process
    finally:
        process.kill()
        process.communicate()


@needs_flock
@pytest.mark.parametrize("end", ["a line", "SIGKILL"])
def test_the_lock_ends_with_its_process(holder, tmp_path, end):
    folder = tmp_path / "run"
    for _ in range(2):  # asking does not take it away
        with pytest.raises(StorageError, match=rf"in use .*pid {holder.pid} on "):
            with only_process_in(folder):
                raise AssertionError("two at a time")
    if end == "SIGKILL":
        holder.kill()
        holder.wait()
        assert (folder / LOCK).exists()  # the file is left, and is no lock
    else:
        holder.communicate("\n")
        assert not folder.exists()
    with only_process_in(folder):
        assert f"pid {os.getpid()} on " in (folder / LOCK).read_text()
    assert not (folder / LOCK).exists()


@needs_flock
def test_a_holder_may_take_it_again_and_another_thread_may_not(tmp_path):
    refused = []

    def other():
        try:
            with only_process_in(tmp_path):
                refused.append(False)
        except StorageError:
            refused.append(True)

    def in_a_thread():
        thread = threading.Thread(target=other)
        thread.start()
        thread.join()

    with only_process_in(tmp_path):
        with only_process_in(tmp_path / "." / ""):
            in_a_thread()
        in_a_thread()  # the inner end has not ended it
    in_a_thread()
    assert refused == [True, True, False]


def test_nothing_is_left_but_what_was_there(tmp_path):
    (tmp_path / "old").mkdir()
    with only_process_in(tmp_path / "old"), only_process_in(tmp_path / "a" / "b"):
        pass
    assert [path.name for path in tmp_path.iterdir()] == ["old"]
    with pytest.raises(ZeroDivisionError), only_process_in(tmp_path / "a" / "b"):
        (tmp_path / "a" / "mine").touch()
        raise ZeroDivisionError
    assert sorted(path.name for path in (tmp_path / "a").iterdir()) == ["mine"]


@needs_flock
def test_a_lock_on_a_file_that_was_removed_is_none(tmp_path, monkeypatch):
    """The one before ends between our opening the file and our locking it."""
    flock, calls = lock.fcntl.flock, []

    def late(handle, how):
        calls.append(handle)
        if len(calls) == 1:
            (tmp_path / LOCK).unlink()
        flock(handle, how)

    monkeypatch.setattr(lock.fcntl, "flock", late)
    with only_process_in(tmp_path):
        assert len(calls) == 2
        assert os.path.samestat(os.stat(tmp_path / LOCK), os.fstat(calls[1]))


def test_where_there_are_no_locks_a_warning_says_so(tmp_path, monkeypatch):
    if lock.fcntl is not None:

        def none(handle, how):
            raise OSError(errno.ENOLCK, "No locks available")

        with monkeypatch.context() as patch:
            patch.setattr(lock.fcntl, "flock", none)
            with pytest.warns(UserWarning, match="not guarded .*No locks available"):
                with only_process_in(tmp_path):
                    assert not (tmp_path / LOCK).exists()
    monkeypatch.setattr(lock, "fcntl", None)
    with pytest.warns(UserWarning, match="not guarded .*this system has no flock"):
        with only_process_in(tmp_path / "new"):
            pass
    assert list(tmp_path.iterdir()) == []


# --- The commands ---

TOML = """
[train]
steps = {steps}
batch_size = 2
checkpoint_every = 1
[objective]
hard_weight = 1.0
[data]
source = "data.jsonl"
[student]
model = "start"
"""


@pytest.fixture
def place(tmp_path, monkeypatch):
    """A run of many steps, from a small model."""
    monkeypatch.chdir(tmp_path)
    examples = localize.examples("test", locales=["fr"], formats=["long"], limit=4)
    Path("data.jsonl").write_text("\n".join(json.dumps(vars(e)) for e in examples))
    _, tokenizer = models.load("teacher")
    small = models.build(tokenizer, hidden_size=8, layers=1, heads=1)
    models.save(small, tokenizer, "start")
    Path("run.toml").write_text(TOML.format(steps=1_000_000))
    return tmp_path


@needs_flock
def test_a_run_s_folder_is_of_one_command_at_a_time(place, capsys):
    """Also while the other one saves; killed, it leaves the folder to the next."""
    command = [sys.executable, "-m", "kdlib", "train", "run.toml", "--out", "out"]
    other = subprocess.Popen(command, stderr=subprocess.PIPE)
    try:
        lines, deadline = Path("out", "metrics.jsonl"), time.monotonic() + 300
        while not (lines.exists() and lines.read_bytes().count(b"\n") > 3):
            assert other.poll() is None and time.monotonic() < deadline
            time.sleep(0.05)
        assert main(["train", "run.toml", "--out", "out"]) == 2
        said = capsys.readouterr().err
        assert f"out is in use by another process (pid {other.pid} on " in said
        assert "Remedy: wait until it has ended" in said
        assert other.poll() is None
    finally:
        other.send_signal(signal.SIGKILL)
        other.communicate()
    (step,) = [p.name for p in sorted(Path("out", "checkpoints").glob("step-*"))][-1:]

    def stop(*arguments):
        raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("kdlib.run_folder.RunFolder.write_line", stop)
        assert main(["train", "run.toml", "--out", "out"]) == 130  # it has begun
    assert Path("out", "checkpoints", step).is_dir()


@needs_flock
def test_the_command_asks_before_it_loads(holder, place, monkeypatch, capsys):
    monkeypatch.setattr("kdlib.train_command.prepare", None)
    assert main(["train", "run.toml", "--out", "run"]) == 2
    assert f"pid {holder.pid}" in capsys.readouterr().err


@needs_flock
def test_train_itself_asks(holder, tmp_path):
    student, tokenizer = models.load("teacher")
    collator = PairCollator(tokenizer)
    pairs = [collator.encode(localize.examples("test", limit=1)[0])]
    labels, config = Objective(hard_weight=1.0), TrainConfig(steps=2, batch_size=1)

    def run():
        return train(student, pairs, collator, labels, config, folder=tmp_path / "run")

    before = [p.detach().clone() for p in student.parameters()]
    with pytest.raises(StorageError, match=f"pid {holder.pid}"):
        run()
    assert all(map(torch.equal, before, student.parameters()))
    assert [path.name for path in (tmp_path / "run").iterdir()] == [LOCK]
    holder.communicate("\n")
    assert len(run().loss) == 2
    assert not (tmp_path / "run" / LOCK).exists()  # given back
    with pytest.raises(ArgumentError, match="config.seed"):
        config = replace(config, seed=5)
        run()
    with only_process_in(tmp_path / "run"):  # also after an error
        pass
    assert not (tmp_path / "run" / LOCK).exists()


@needs_flock
def test_a_cache_s_folder_is_of_one_process_at_a_time(holder, tmp_path):
    folder = tmp_path / "run"
    with pytest.raises(StorageError, match=f"pid {holder.pid}"):
        build_cache.build("teacher", "localize:fr:long:test", folder, say=str)
    assert [path.name for path in folder.iterdir()] == [LOCK]
