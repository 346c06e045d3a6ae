"""One process against two: the same losses, the same weights, and checkpoints that go
on at another number of processes. torchrun, gloo, this machine alone.

Tolerances. float64 rounds at 1e-16, and sums are taken in another order. AdamW divides
a gradient by its own size + 1e-8, so 1e-9 holds for weights with gradients of any size;
a wrong factor of 2 in loss or gradient moves them by 1e-3 and more.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from runs import COPIED, RUNS, SHARDED, Setting, run

from kdlib import models, train_command

pytestmark = pytest.mark.slow

SCRIPT = Path(__file__).with_name("runs.py")
CASES = [(name, engine) for name in RUNS for engine in (COPIED, SHARDED)]


def torchrun(ranks: int, *command, **options) -> subprocess.Popen:
    """Its output and its processes' is one text."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    return subprocess.Popen(
        [
            *(sys.executable, "-m", "torch.distributed.run"),
            *("--nproc-per-node", str(ranks)),
            *("--master-addr", "127.0.0.1", "--master-port", str(port)),
            *map(str, command),
        ],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        **options,
    )


def output(process: subprocess.Popen, status: int | None = 0) -> str:
    """What it said, once it has ended; a process that hangs is a failure."""
    try:
        text, _ = process.communicate(timeout=600)
    finally:
        process.kill()
    if status is not None:
        assert process.returncode == status, text
    return text


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ranks")
    Setting(folder).write_cache()
    return folder


@pytest.fixture(scope="module")
def legs(folder):
    """Two ranks, then one, then two again, in the same folders."""
    for ranks, name in ((2, "first"), (1, "second"), (2, "third")):
        output(torchrun(ranks, SCRIPT, name, folder))
    return {
        name: torch.load(folder / f"{name}.pt", weights_only=True)
        for name in ("first", "second", "third")
    }


@pytest.fixture(scope="module")
def setting(folder):
    return Setting(folder)


def check_equal(found, wanted):
    for name in ("loss", "grad_norm"):
        assert found[name] == pytest.approx(wanted[name], rel=1e-12)
    assert found["tokens"] == wanted["tokens"]
    assert found["weights"].keys() == wanted["weights"].keys()
    for name, weight in wanted["weights"].items():
        torch.testing.assert_close(found["weights"][name], weight, rtol=0, atol=1e-9)


@pytest.mark.parametrize(("name", "engine"), CASES)
def test_two_ranks_train_as_one_process(name, engine, legs, setting):
    """Shares of 3 and 2 rows, and of 1 and none, in micro-batches of any size."""
    found, wanted = legs["first"][name, engine], run(setting, name)
    check_equal(found, wanted)
    assert found["loss"][0] != found["loss"][-1]


def test_sharded_ranks_hold_half_of_the_weights(legs):
    whole = legs["first"]["tokens", COPIED]["held"]
    half = legs["first"]["tokens", SHARDED]
    assert 0.5 <= half["held"] / whole < 0.55  # rank 0 has the odd rows
    assert half["groups"] == 3  # two blocks and the rest are gathered each in its turn


@pytest.mark.parametrize("engine", [COPIED, SHARDED])
def test_a_run_goes_on_with_one_rank_and_with_two_again(engine, legs, setting):
    """The signal came to the last rank alone; all stop after the same step."""
    assert legs["first"]["resumed", engine]["stopped"] == [1, 1]
    assert legs["second"]["resumed", engine]["stopped"] == [3]
    check_equal(legs["third"]["resumed", engine], run(setting, "rows"))


@pytest.mark.parametrize("engine", [COPIED, SHARDED])
def test_every_rank_goes_on_with_its_own_random_state(engine, legs):
    """Dropout differs between ranks; a run that stopped has the bits of one that did
    not."""
    whole, end = legs["first"]["dropout", engine], legs["third"]["dropout, end", engine]
    assert legs["first"]["dropout, part", engine]["stopped"] == [2, 2]
    assert end["loss"] == whole["loss"]
    for name, weight in whole["weights"].items():
        assert torch.equal(end["weights"][name], weight), name
    assert whole["loss"] != legs["first"]["tokens", engine]["loss"]


@pytest.mark.parametrize("engine", [COPIED, SHARDED])
def test_one_rank_writes_the_metrics(engine, legs, folder, setting, tmp_path):
    """A line a step, with the numbers of all ranks."""

    def lines(path):
        text = (path / "metrics.jsonl").read_text()
        return [json.loads(line) for line in text.splitlines()]

    run(setting, "rows", folder=tmp_path)
    found, wanted = lines(folder / f"recorded-{engine}"), lines(tmp_path)
    assert [line["step"] for line in found] == [1, 2, 3, 4]
    for one, other in zip(found, wanted, strict=True):
        assert one["tokens"] == other["tokens"]
        assert one["loss"] == pytest.approx(other["loss"], rel=1e-12)
        assert one["soft"] == pytest.approx(other["soft"], rel=1e-12)


def test_an_error_on_one_rank_ends_all(folder):
    """The other one waits for it in a collective operation."""
    said = output(torchrun(2, SCRIPT, "fail", folder), status=1)
    assert "the cat bit the cable" in said
    assert said.count("Traceback") <= 3, said  # of the rank, and torchrun's own


# --- The command ---

TOML = """
[train]
steps = {steps}
batch_size = 3
checkpoint_every = 1000
[objective]
[data]
source = "{data}"
[teacher]
model = "teacher"
[student]
build = {{ hidden_size = 8, layers = 2, heads = 2 }}
[validation]
source = "{data}"
"""
COMMAND = f'exec "{sys.executable}" -m kdlib train run.toml "$@"'
DATA = '{{"user_input": "{}", "response": "dix"}}\n'


@pytest.fixture
def place(tmp_path):
    """A settings file and its data, for each of two ranks in a folder of its own."""
    for rank in (0, 1):
        (tmp_path / str(rank)).mkdir()
        text = "".join(DATA.format(word) for word in ("one", "two", "three", "four"))
        (tmp_path / str(rank) / "data.jsonl").write_text(text)
        text = TOML.format(steps=3, data="data.jsonl")
        (tmp_path / str(rank) / "run.toml").write_text(text)
    return tmp_path


def apart(place, *options) -> subprocess.Popen:
    """The command on two ranks, each in its folder, as if on two machines."""
    line = f'cd "$RANK" && {COMMAND}'
    command = ["--no-python", "sh", "-c", line, "sh", "--out", place / "out"]
    return torchrun(2, *command, *options, cwd=place)


@pytest.mark.parametrize("case", ["settings", "data", "broken data"])
def test_ranks_that_differ_are_refused(case, place):
    there = place / "1"
    if case == "settings":
        text = (there / "run.toml").read_text()
        (there / "run.toml").write_text(text.replace("steps = 3", "steps = 4"))
        message = "the ranks differ: train.steps is 3 on rank 0, 4 on rank 1"
    elif case == "data":
        (there / "data.jsonl").write_text(DATA.format("ten") * 4)
        message = "data.sha256 is"
    else:
        (there / "data.jsonl").write_text(DATA.format("ten") + "{")
        message = "data.jsonl, line 2 is not JSON"
    said = output(apart(place), status=1)
    assert said.count("kdlib: ") == 1 and message in said, said
    assert said.count("Traceback") == 1, said  # torchrun's own
    assert not (place / "out" / "checkpoints").exists()


def test_a_full_disk_on_one_rank(place):
    """Rank 1 may write 20 blocks a file: less than its part of the checkpoint."""
    line = f'[ "$RANK" = 0 ] || ulimit -f 20; cd "$RANK" && {COMMAND}'
    command = ["--no-python", "sh", "-c", line, "sh", "--out", place / "out", "--shard"]
    said = output(torchrun(2, *command, cwd=place), status=1)
    assert said.count("kdlib: ") == 1 and "free disk space" in said, said
    assert not list((place / "out" / "checkpoints").glob("step-*"))


@pytest.mark.parametrize("options", [[], ["--shard"]])
def test_the_command_on_two_ranks(options, place):
    said = output(apart(place, *options))
    assert said.count("Student: ") == 1  # one rank speaks
    here = place / "0"
    text = (here / "run.toml").read_text().replace("data.jsonl", f"{here}/data.jsonl")
    (place / "alone.toml").write_text(text)
    alone = train_command.run(place / "alone.toml", place / "alone")
    (a, _), (b, _) = (models.load(place / f / "student") for f in ("out", "alone"))
    for file in (place / "alone" / "student").iterdir():
        if file.suffix == ".json":
            saved = place / "out" / "student" / file.name
            assert saved.read_text() == file.read_text()
    assert a.lm_head.weight.data_ptr() == a.model.embed_tokens.weight.data_ptr()
    for (name, x), (_, y) in zip(
        a.named_parameters(), b.named_parameters(), strict=True
    ):
        # float32: sums differ in the last bit, AdamW divides small by small
        torch.testing.assert_close(x, y, rtol=1e-4, atol=1e-5, msg=name)
    facts = json.loads((place / "out" / "result.json").read_text())
    assert (facts["ranks"], facts["shard"]) == (2, bool(options))
    kl = alone["validation"]["student"]["kl"]
    assert facts["validation"]["student"]["kl"] == pytest.approx(kl, rel=1e-4)


def test_ctrl_c_ends_all_ranks_with_a_checkpoint(place):
    for rank in "01":
        file = place / rank / "run.toml"
        file.write_text(file.read_text().replace("steps = 3", "steps = 100000"))
    process = apart(place)
    lines = place / "out" / "metrics.jsonl"
    deadline = time.monotonic() + 300
    while not (lines.exists() and lines.read_bytes().count(b"\n") > 3):
        assert process.poll() is None and time.monotonic() < deadline, output(process)
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    said = output(process, status=None)
    assert process.returncode != 0
    assert said.count("SIGINT: stopped after step") == 1, said
    (saved,) = (place / "out" / "checkpoints").iterdir()
    assert lines.read_bytes().count(b"\n") == int(saved.name.removeprefix("step-"))
