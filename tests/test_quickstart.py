"""The first command, at a size that a test can wait for, and what can go wrong."""

from __future__ import annotations

import json
import os
import pickle
import signal
import subprocess
import sys
import time
from dataclasses import replace

import pytest
import torch

from kdlib import beside, errors, models, phone, quickstart
from kdlib.errors import StorageError, TrainingError

COMMAND = [sys.executable, "-m", "kdlib", "quickstart"]


def command(*arguments, **options):
    return subprocess.run(
        [*COMMAND, *map(str, arguments)], capture_output=True, text=True, **options
    )


@pytest.fixture(scope="module")
def data():
    return phone.Data()


@pytest.fixture
def short(monkeypatch):
    """Runs of a few steps, whatever the machine."""
    monkeypatch.setattr(quickstart, "_share", lambda *_: 0.005)


@pytest.mark.slow
def test_json_files_and_a_second_run(tmp_path):
    out = tmp_path / "q"
    done = command("--json", "--out", out, "--seconds", 1)
    assert done.returncode == 0, done.stderr
    facts = json.loads(done.stdout)
    assert [row["name"] for row in facts["rows"]] == list(phone.ROWS)
    wanted = "name exact_match agreement kl parameters bytes latency_ms requests_per_s"
    for row in facts["rows"]:
        assert set(wanted.split()) <= set(row)
        assert row["bytes"] > 4 * row["parameters"]
    teacher, untrained, *_ = facts["rows"]
    assert teacher["exact_match"] >= 0.97 and teacher["kl"] < 1e-6
    assert untrained["exact_match"] == 0
    assert facts["teacher_without_context"]["exact_match"] <= 0.3
    assert facts["seconds"] > 0 and len(facts["examples"]) == 3
    assert (out / "quickstart.png").stat().st_size > 5000
    assert not list(out.glob(".*"))  # nothing half-written
    # The same command again trains nothing anew and ends with the same students.
    before = (out / "student" / "model.safetensors").read_bytes()
    again = command("--json", "--out", out, "--seconds", 1)
    assert again.returncode == 0 and again.stderr.count("in an earlier run") == 3
    assert (out / "student" / "model.safetensors").read_bytes() == before
    rows = json.loads(again.stdout)["rows"]
    for old, new in zip(facts["rows"], rows, strict=True):
        assert [old[k] for k in ("exact_match", "kl", "steps")] == [
            new[k] for k in ("exact_match", "kl", "steps")
        ]
    assert "distilled student" in quickstart.report(facts)


@pytest.mark.slow
@pytest.mark.parametrize("whom", ["process", "group"])
def test_an_interrupt_keeps_what_is_done(tmp_path, whom):
    """Ctrl-C in a terminal reaches the group; `kill -INT` the process alone."""
    run = subprocess.Popen(
        [*COMMAND, "--out", str(tmp_path / "q")],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    while not (tmp_path / "q").is_dir():  # made before anything long begins
        time.sleep(0.1)
    time.sleep(15)  # somewhere in loading or training
    if whom == "group":
        os.killpg(run.pid, signal.SIGINT)
    else:
        run.send_signal(signal.SIGINT)
    _, said = run.communicate(timeout=60)
    assert run.returncode == 130
    assert "the same command goes on" in said and "Traceback" not in said
    # The second process is gone too: soon the group is empty.
    with pytest.raises(ProcessLookupError):
        for _ in range(100):
            os.killpg(run.pid, 0)
            time.sleep(0.1)


@pytest.mark.slow
def test_a_run_that_was_cut_off_goes_on(tmp_path, short, monkeypatch):
    whole = quickstart.run(tmp_path / "whole", show_progress=False)
    real = models.save

    def cut(model, tokenizer, folder):
        if folder.name == "hard-labels-equal-tokens":
            raise KeyboardInterrupt
        return real(model, tokenizer, folder)

    monkeypatch.setattr(models, "save", cut)
    with pytest.raises(KeyboardInterrupt):
        quickstart.run(tmp_path / "cut", show_progress=False)
    monkeypatch.setattr(models, "save", real)
    state = json.loads((tmp_path / "cut" / "state.json").read_text())
    assert phone.DISTILLED in state["trained"]
    assert phone.HARD_TOKENS not in state["trained"]
    facts = quickstart.run(tmp_path / "cut", show_progress=False)
    for old, new in zip(whole["rows"], facts["rows"], strict=True):
        assert (old["name"], old["kl"]) == (new["name"], new["kl"])


@pytest.mark.slow
def test_one_core_trains_the_same_rows(tmp_path, short, monkeypatch):
    two = quickstart.run(tmp_path / "two", show_progress=False)
    monkeypatch.setattr(quickstart, "cores", lambda: 1)
    one = quickstart.run(tmp_path / "one", show_progress=False)
    assert [row["kl"] for row in one["rows"]] == [row["kl"] for row in two["rows"]]


def test_a_folder_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").write_text("in the way")
    done = command("--out", tmp_path / "file" / "q")
    assert done.returncode == 2
    assert "cannot write to" in done.stderr and "--out" in done.stderr
    assert "Traceback" not in done.stderr
    with pytest.raises(StorageError):
        quickstart.run(tmp_path / "file" / "q")


@pytest.mark.parametrize("wrong", ["--seconds=0", "--seconds=nan", "--seconds=soon"])
def test_seconds_must_be_a_positive_number(tmp_path, wrong):
    done = command("--out", tmp_path / "q", wrong)
    assert done.returncode == 2 and "seconds" in done.stderr
    assert "Traceback" not in done.stderr
    assert not list(tmp_path.iterdir())


def test_a_full_disk_leaves_no_half_student(tmp_path, short, monkeypatch, data):
    """A file may not grow beyond 100 kB: the student's weights do not fit."""
    resource = pytest.importorskip("resource")
    monkeypatch.setattr(quickstart, "Data", lambda: data)
    monkeypatch.setattr(quickstart, "cores", lambda: 1)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    ignored = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, before[1]))
    try:
        with pytest.raises(StorageError, match="free disk space"):
            quickstart.run(tmp_path / "q", show_progress=False)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, ignored)
    assert not [p for p in (tmp_path / "q").rglob("*") if p.is_file()]


def test_a_state_that_is_not_this_run_s_is_not_taken_over(tmp_path):
    settings = {"version": "x", "seed": 1, "seconds": 2}
    fresh = {"settings": settings, "share": None, "trained": []}
    assert quickstart._resume(tmp_path, settings) == fresh
    good = {"settings": settings, "share": 0.5, "trained": []}
    for text in (
        "{ cut",
        "[]",
        json.dumps(good | {"settings": {**settings, "seed": 2}}),
        json.dumps(good | {"share": 7}),
        json.dumps(good | {"trained": ["somebody"]}),
        json.dumps(good | {"trained": [phone.DISTILLED]}),  # but no such folder
    ):
        (tmp_path / "state.json").write_text(text)
        assert quickstart._resume(tmp_path, settings) == fresh
    (tmp_path / "state.json").write_text(json.dumps(good))
    assert quickstart._resume(tmp_path, settings) == good


# --- The second process ---


@pytest.mark.slow
def test_a_row_beside_is_the_row_here(tmp_path, data):
    """The second process ends with the very same weights."""
    budget = phone.Budget(4, 0, 0.0, 64)
    row = beside.Beside(phone.DISTILLED, budget, 3, tmp_path / "there")
    steps = 0
    while not row.done:
        steps += row.steps(wait=True)
    row.stop()
    assert steps == 4
    there, _ = models.load(tmp_path / "there")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        here = phone.fit(phone.DISTILLED, data, budget, 3)
    finally:
        torch.set_num_threads(threads)
    for a, b in zip(here.parameters(), there.parameters(), strict=True):
        assert torch.equal(a, b)


@pytest.mark.slow
def test_a_killed_second_process_is_reported(tmp_path):
    budget = phone.Budget(10_000, 0, 0.0, 64)
    row = beside.Beside(phone.DISTILLED, budget, 0, tmp_path / "there")
    os.kill(row._process.pid, signal.SIGKILL)
    with pytest.raises(TrainingError, match="exit code -9.*\n.*same command again"):
        row.steps(wait=True)
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_ctrl_c_is_the_first_process_s_to_decide(tmp_path):
    """The terminal sends it to both; the second one goes on until it is stopped."""
    row = beside.Beside(phone.HARD_TOKENS, phone.Budget(4, 0, 0.0), 0, tmp_path / "a")
    row.steps(wait=True)
    os.kill(row._process.pid, signal.SIGINT)
    while not row.done:
        row.steps(wait=True)
    row.stop()
    assert row._process.exitcode == 0


@pytest.mark.slow
def test_stop_does_not_wait_for_the_row(tmp_path):
    row = beside.Beside(phone.HARD_TOKENS, phone.Budget(9_999, 0, 0.0), 0, tmp_path)
    row.steps(wait=True)
    row.stop()
    assert row._process.exitcode == -signal.SIGTERM


@pytest.mark.slow
def test_an_error_beside_is_raised_here(tmp_path):
    (tmp_path / "file").write_text("in the way")
    row = beside.Beside(
        phone.HARD_TOKENS, phone.Budget(1, 0, 0.0), 0, tmp_path / "file" / "there"
    )
    with pytest.raises(StorageError, match="cannot write"):
        while not row.done:
            row.steps(wait=True)
    row.stop()


@pytest.mark.parametrize("name", [n for n in vars(errors) if n.endswith("Error")])
def test_an_error_survives_the_way_to_another_process(name):
    error = vars(errors)[name]("what", "do that")
    again = pickle.loads(pickle.dumps(error))
    assert type(again) is type(error) and str(again) == str(error)
    assert (again.what, again.remedy) == ("what", "do that")


# --- Budgets ---


def test_budgets_are_those_that_they_say(data):
    plan = phone.budgets(data)
    assert plan[phone.DISTILLED].unlabelled == len(data.unlabelled) == 6_000
    # What an epoch reads, counted on the batch itself.
    pairs = data.unlabelled[:320]
    batch = data.collator.collate(pairs)
    assert batch.student.attention_mask.sum() / 320 == phone._mean_length(pairs)
    read = batch.teacher.attention_mask.sum() / 320
    assert read == phone._mean_length(pairs, "teacher")
    # Equal within half a step.
    tokens = [plan[n].tokens for n in (phone.DISTILLED, phone.HARD_TOKENS)]
    step = plan[phone.HARD_TOKENS].tokens / plan[phone.HARD_TOKENS].steps
    assert abs(tokens[0] - tokens[1]) <= step / 2
    flops = [plan[n].flops for n in (phone.DISTILLED, phone.HARD_FLOPS)]
    step = plan[phone.HARD_FLOPS].flops / plan[phone.HARD_FLOPS].steps
    assert abs(flops[0] - flops[1]) <= step / 2
    # The teacher's reading is in it.
    asked = sum(len(p.teacher_prompt_ids + p.response_ids) for p in data.unlabelled)
    student = 6 * 172_352 * plan[phone.DISTILLED].tokens
    wanted = student + 2 * 1_496_480 * asked
    assert plan[phone.DISTILLED].flops == pytest.approx(wanted, rel=1e-4)


def test_a_share_shortens_every_row_alike(data):
    whole, half = phone.budgets(data), phone.budgets(data, 0.5)
    for name in whole:
        assert half[name].flops == pytest.approx(whole[name].flops / 2, rel=0.02)


@pytest.mark.parametrize("seed", [0, 1])
def test_a_seed_fixes_the_student(data, seed):
    def weights(seed):
        short = replace(phone.budgets(data, 0.002)[phone.DISTILLED], unlabelled=64)
        student = phone.fit(phone.DISTILLED, data, short, seed)
        return torch.cat([p.detach().flatten() for p in student.parameters()])

    assert torch.equal(weights(seed), weights(seed))
    assert not torch.equal(weights(seed), weights(seed + 1))


def test_a_seed_fixes_the_first_weights(data, monkeypatch):
    monkeypatch.setattr(phone, "train", lambda *_, **__: None)
    budget = phone.Budget(1, 0, 0.0)
    first, again, other = (
        phone.fit(phone.HARD_TOKENS, data, budget, seed).lm_head.weight
        for seed in (0, 0, 1)
    )
    assert torch.equal(first, again) and not torch.equal(first, other)
