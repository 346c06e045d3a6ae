"""The training bench: rows that do the same work, and a report that says so or not."""

import json
import sys
from dataclasses import asdict, replace

import pytest
import torch

from kdlib import __main__, bench_train, training_rows
from kdlib.bench_train import GKD, in_child, table
from kdlib.errors import ArgumentError
from kdlib.training_rows import PRESETS, ROWS, WARM_UP, Clock, Preset, Row, Run, measure


def shape(hidden, layers, heads):
    return training_rows._qwen3(hidden, 2 * hidden, layers, heads, hidden // heads)


TINY = Preset(
    student=shape(16, 1, 2),
    teacher=shape(32, 1, 2),
    vocab=200,
    batch=2,
    length=12,
    prompt=4,
    k=4,
    steps=2,
)
DENSE = [row for row in ROWS if ROWS[row].dense]
OURS = [row for row in ROWS if "TRL" not in row and "compiled" not in row]


@pytest.fixture
def in_process(monkeypatch):
    """Rows without the seconds that a new process takes to start."""

    def here(job):
        return measure(**job | {"preset": Preset(**job["preset"])})

    monkeypatch.setattr(bench_train, "in_child", here)


def logits(run):
    """[N, V] of student and teacher for the first batch's responses, in float64."""
    ids = torch.tensor([p.student_prompt_ids + p.response_ids for p in run.batches[0]])
    cut = run.preset.prompt
    with torch.no_grad():
        return [
            model.double()(ids).logits[:, cut - 1 : -1].flatten(0, 1)
            for model in (run.student, run.teacher)
        ]


# --- The rows ---


@pytest.mark.parametrize("row", DENSE)
def test_the_first_loss_is_the_forward_kl(row):
    if "compiled" in row:
        pytest.skip("minutes of a compiler; the loop's own test compiles")
    if "TRL" in row:
        pytest.importorskip("trl", reason="TRL is not installed")
    if "Liger" in row or "float32" in row:
        pytest.skip("on a GPU alone")
    student, teacher = (x.log_softmax(-1) for x in logits(Run(TINY, "cpu", 1)))
    forward = (teacher.exp() * (teacher - student)).sum(-1).mean().item()
    reverse = (student.exp() * (student - teacher)).sum(-1).mean().item()
    # Else a row with the wrong direction would go unnoticed.
    assert abs(reverse / forward - 1) > 10 * bench_train.TOLERANCE
    assert measure(row, TINY, "cpu", 1)["first_loss"] == pytest.approx(forward, 1e-5)


def test_the_first_loss_of_cached_targets_is_that_of_k_tokens_and_the_rest():
    student, teacher = (x.softmax(-1) for x in logits(Run(TINY, "cpu", 1)))
    p, kept = teacher.topk(TINY.k)
    q = student.gather(-1, kept)
    p, q = (torch.cat([x, 1 - x.sum(-1, keepdim=True)], dim=-1) for x in (p, q))
    wanted = (p * (p / q).log()).sum(-1).mean().item()
    found = measure("kdlib, cached", TINY, "cpu", 1)["first_loss"]
    assert found == pytest.approx(wanted, 1e-3)  # the cache is in float16


def test_every_row_sees_the_same_batches(monkeypatch):
    seen = []
    collate = training_rows.PairCollator.collate

    def recording(self, pairs):
        seen.append([pair.example_id for pair in pairs])
        return collate(self, pairs)

    monkeypatch.setattr(training_rows.PairCollator, "collate", recording)
    run = Run(TINY, "cpu", 2)
    wanted = [[pair.example_id for pair in batch] for batch in run.batches]
    assert len({number for batch in wanted for number in batch}) == len(run.pairs)
    for row in ("plain torch", "kdlib"):
        seen.clear()
        ROWS[row].train(Run(TINY, "cpu", 2), None)
        assert seen == wanted
    # What TRL's row hands over, and the order in which TRL is to take it.
    pytest.importorskip("trl", reason="TRL is not installed")
    from transformers import Trainer

    seen.clear()
    prepare = Trainer._prepare_inputs

    def watched(self, inputs):
        seen.append(inputs["input_ids"].tolist())
        assert inputs["labels"][:, : TINY.prompt].eq(-100).all()
        return prepare(self, inputs)

    monkeypatch.setattr(Trainer, "_prepare_inputs", watched)
    assert "ms" in measure(GKD, TINY, "cpu", 2)
    ids = {p.example_id: p.student_prompt_ids + p.response_ids for p in run.pairs}
    assert seen == [[ids[number] for number in batch] for batch in wanted]


@pytest.mark.parametrize("row", OURS)
def test_rows_in_bfloat16_as_on_a_gpu(row):
    found = measure(row, replace(TINY, precision="bf16"), "cpu", 1)
    assert found["precision"] == "bf16"
    exact = measure(row, TINY, "cpu", 1)["first_loss"]
    assert found["first_loss"] == pytest.approx(exact, bench_train.TOLERANCE)


@pytest.mark.parametrize("row", [GKD, "TRL GKDTrainer, float32"])
def test_trl_in_bfloat16_as_on_a_gpu(row):
    pytest.importorskip("trl", reason="TRL is not installed")
    found = measure(row, replace(TINY, precision="bf16"), "cpu", 1)
    exact = measure("plain torch", TINY, "cpu", 1)["first_loss"]
    assert found["first_loss"] == pytest.approx(exact, bench_train.TOLERANCE)


def test_a_live_teacher_s_flops_count_and_a_cached_one_s_do_not():
    live, cached = (measure(r, TINY, "cpu", 1) for r in ("kdlib", "kdlib, cached"))
    run = Run(TINY, "cpu", 1)
    tokens = TINY.batch * TINY.length
    forward = training_rows.step_flops(run.student, tokens, TINY.batch)
    assert cached["flops"] == forward
    # 2 P a token, and 4 L H length of attention: metrics.py
    parameters = sum(p.numel() for p in run.teacher.parameters())
    teacher = tokens * (2 * parameters + 4 * 1 * 32 * TINY.length)
    assert live["flops"] == pytest.approx(forward + teacher)


def test_a_missing_peer_is_a_row_that_says_so(monkeypatch):
    monkeypatch.setitem(sys.modules, "trl", None)
    assert "cannot be imported" in measure(GKD, TINY, "cpu", 1)["skipped"]


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (torch.OutOfMemoryError("out of memory\nmore"), "out of memory"),
        (ValueError("no"), "ValueError: no"),
        (ZeroDivisionError(), "ZeroDivisionError: "),
    ],
)
def test_a_row_that_fails_says_why(monkeypatch, error, reason):
    def fail(run, folder):
        raise error

    monkeypatch.setitem(ROWS, "kdlib", Row(fail))
    assert measure("kdlib", TINY, "cpu", 1) == {"skipped": reason}


def test_a_row_that_ends_early_is_no_measurement(monkeypatch):
    monkeypatch.setitem(ROWS, "kdlib", Row(lambda run, folder: run.clock(1.0)))
    assert measure("kdlib", TINY, "cpu", 1) == {"skipped": "ended after 1 steps"}


def test_the_clock_leaves_the_warm_up_out(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(training_rows.time, "perf_counter", lambda: now[0])
    clock = Clock("cpu", steps=2)
    lengths = [100.0] * WARM_UP + [1.0, 2.0] + [50.0]  # the last one measures memory
    assert clock.total == len(lengths)
    for number, seconds in enumerate(lengths):
        now[0] += seconds
        kept = torch.ones(2**20, dtype=torch.uint8) if number == clock.last else None
        clock(torch.tensor(float(number + 5)))
    assert clock.ms == [1000.0, 2000.0]
    assert clock.first_loss == 5.0
    assert clock.peak >= 2**20
    del kept


# --- Processes ---


@pytest.mark.slow
def test_a_row_in_a_process_of_its_own():
    job = {"row": "kdlib", "preset": asdict(TINY), "device": "cpu", "steps": 2}
    found, here = in_child(job), measure("kdlib", TINY, "cpu", 2)
    assert len(found["ms"]) == 2
    assert found["first_loss"] == pytest.approx(here["first_loss"])


@pytest.mark.parametrize(
    ("script", "reason"),
    [
        ("echo last words; kill -9 $$", "its process ended with SIGKILL: last words"),
        ("exit 3", "its process ended with status 3"),
        ("exec sleep 60", "not finished after 1 s"),
    ],
)
def test_a_process_that_dies_is_a_row_that_says_so(
    script, reason, tmp_path, monkeypatch
):
    program = tmp_path / "python"
    program.write_text(f"#!/bin/sh\n{script}\n")
    program.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(program))
    monkeypatch.setattr(bench_train, "SECONDS", 1)
    job = {"row": "kdlib", "preset": asdict(TINY), "device": "cpu", "steps": 2}
    assert in_child(job) == {"skipped": reason}


# --- The report ---


def test_the_report(in_process, tmp_path):
    out, lines = tmp_path / "train.json", []
    result = bench_train.bench_train(
        "cpu", preset=TINY, rounds=2, rows=tuple(OURS), out=out, log=lines.append
    )
    assert json.loads(out.read_text()) == json.loads(json.dumps(result))
    assert len(lines) == 2 * len(OURS)
    assert {"date", "device", "torch", "command"} <= result.keys()
    assert [row["row"] for row in result["rows"]] == OURS
    by_name = {row["row"]: row for row in result["rows"]}
    for row in result["rows"]:
        assert row["tokens_per_s"] == pytest.approx(24e3 / row["step_ms"], rel=1e-2)
        answers = row["response_tokens_per_s"] / row["tokens_per_s"]
        assert answers == pytest.approx(8 / 12, rel=1e-2)
        low, high = row["step_ms_iqr"]
        assert low <= row["step_ms"] <= high
        assert len(row["round_ms"]) == 2
        assert row["mfu"] is None  # a CPU's peak is not known
        assert row["peak_mib"] >= 0
    assert by_name["kdlib"]["objective"] == by_name["plain torch"]["objective"]
    assert by_name["kdlib"]["objective"] == "same"
    assert by_name["kdlib, cached"]["objective"] == "top-k of it"
    assert {target["verdict"] for target in result["targets"]} == {"not measured"}


def fake(monkeypatch, takes):
    """in_child answers from `takes`, {row: [one a round]}; the order of the calls."""
    calls, rest = [], {row: iter(found) for row, found in takes.items()}

    def answer(job):
        calls.append(job["row"])
        return next(rest[job["row"]])

    monkeypatch.setattr(bench_train, "in_child", answer)
    return calls


def took(ms, **changes):
    found = {"ms": ms, "first_loss": 2.0, "peak_mib": 100, "precision": "bf16"}
    return found | {"flops": 4e12, "peak_flops": 1e15} | changes


def report(monkeypatch, takes, **options):
    fake(monkeypatch, takes)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA H100")
    rounds = max(map(len, takes.values()))
    options = {"preset": "issue", "rounds": rounds} | options
    return bench_train.bench_train("cuda", rows=tuple(takes), **options)


def test_rows_take_turns_and_none_that_failed_is_tried_again(monkeypatch):
    takes = {GKD: [{"skipped": "no"}], "kdlib": [took([5.0]), took([7.0])]}
    calls = fake(monkeypatch, takes)
    result = bench_train.bench_train("cpu", preset=TINY, rounds=2, rows=tuple(takes))
    assert calls == [GKD, "kdlib", "kdlib"]
    first, second = result["rows"]
    assert first == {"row": GKD, "skipped": "no"}
    assert second["step_ms"] == 6.0
    assert second["round_ms"] == [5.0, 7.0]


def test_what_was_measured_is_on_disk_before_the_next_row(monkeypatch, tmp_path):
    out = tmp_path / "train.json"

    def answer(job):
        if job["row"] == "kdlib":
            raise KeyboardInterrupt
        return took([5.0])

    monkeypatch.setattr(bench_train, "in_child", answer)
    with pytest.raises(KeyboardInterrupt):
        bench_train.bench_train(
            "cpu", preset=TINY, rounds=1, rows=(GKD, "kdlib"), out=out
        )
    assert [row["row"] for row in json.loads(out.read_text())["rows"]] == [GKD]


def test_a_row_that_fails_later_keeps_what_it_had(monkeypatch):
    takes = {"kdlib": [took([5.0]), {"skipped": "out of memory"}]}
    result = report(monkeypatch, takes)
    assert result["rows"][0]["step_ms"] == 5.0


def test_mfu_ratio_and_speed(monkeypatch):
    takes = {GKD: [took([20.0, 10.0, 30.0])], "kdlib": [took([8.0])]}
    gkd, ours = report(monkeypatch, takes)["rows"]
    assert gkd["step_ms"] == 20.0
    assert gkd["tokens_per_s"] == 8 * 1024 / 0.020
    assert ours["response_tokens_per_s"] == 8 * 1016 / 0.008
    assert (gkd["ratio"], ours["ratio"]) == (1.0, 2.5)
    assert ours["mfu"] == 0.5  # 4e12 in 8 ms, of 1e15 a second


def verdicts(result):
    return {
        (target["row"], target["quantity"]): target["verdict"]
        for target in result["targets"]
    }


def test_targets(monkeypatch):
    takes = {
        GKD: [took([25.0], peak_mib=1000)],
        "kdlib": [took([10.0], peak_mib=350, flops=4.5e12)],
        "kdlib, compiled": [took([10.1], peak_mib=351, flops=4.5e12)],
        "kdlib, cached": [took([6.6], first_loss=1.9)],
        "kdlib, cached, compiled": [took([6.8], first_loss=1.9)],
    }
    assert verdicts(report(monkeypatch, takes)) == {
        ("kdlib", "tokens_per_s"): "met",
        ("kdlib", "peak_mib"): "met",
        ("kdlib", "mfu"): "met",
        ("kdlib, compiled", "tokens_per_s"): "missed",
        ("kdlib, compiled", "peak_mib"): "missed",
        ("kdlib, compiled", "mfu"): "missed",
        ("kdlib, cached", "tokens_per_s"): "met",
        ("kdlib, cached, compiled", "tokens_per_s"): "missed",
    }
    elsewhere = verdicts(report(monkeypatch, takes, preset="small"))
    assert set(elsewhere.values()) == {"not measured"}


def test_without_gkd_only_what_needs_no_rival_is_judged(monkeypatch):
    takes = {GKD: [{"skipped": "no"}], "kdlib": [took([10.0], flops=4.5e12)]}
    found = verdicts(report(monkeypatch, takes))
    assert found.pop(("kdlib", "mfu")) == "met"
    assert set(found.values()) == {"not measured"}


def test_another_objective_is_named_and_has_no_part_in_the_targets(monkeypatch):
    takes = {
        "plain torch": [took([9.0])],
        GKD: [took([50.0], first_loss=2.1)],
        "kdlib": [took([5.0])],
        "kdlib, cached": [took([1.0], first_loss=2.1)],
    }
    result = report(monkeypatch, takes)
    objectives = {row["row"]: row["objective"] for row in result["rows"]}
    assert objectives == {
        "plain torch": "same",
        GKD: "another objective",
        "kdlib": "same",
        "kdlib, cached": "another objective",  # top k of it would be less
    }
    found = verdicts(result)
    assert found["kdlib", "tokens_per_s"] == "not measured"
    assert found["kdlib, cached", "tokens_per_s"] == "not measured"
    text = table(result)
    assert sum("another objective" in line for line in text.splitlines()) == 2


def test_the_table(monkeypatch):
    takes = {
        GKD: [took([25.0, 26.0], peak_mib=70_000)],
        "TRL GKDTrainer, Liger": [{"skipped": "needs CUDA"}],
        "kdlib": [took([9.0, 11.0])],
    }
    lines = table(report(monkeypatch, takes)).splitlines()
    assert lines[0].startswith("NVIDIA H100, torch")
    row = next(line for line in lines if line.startswith("kdlib "))
    for word in ("819,200", "2.55", "10.0", "9.5 - 10.5", "100", "0.40", "2.00000"):
        assert word in row
    assert "TRL GKDTrainer, Liger      skipped: needs CUDA" in lines
    assert "met          kdlib: tokens_per_s over TRL GKDTrainer 2.55 >= 2.5" in lines
    assert "missed       kdlib: mfu 0.4 >= 0.45" in lines
    assert "not measured kdlib, cached: tokens_per_s over kdlib >= 1.5" in lines
    assert all(len(line) <= 100 for line in lines)


def test_the_presets_have_the_parameters_that_their_names_say():
    def parameters(side):
        from transformers import Qwen3Config, Qwen3ForCausalLM

        shape = getattr(PRESETS["issue"], side)
        with torch.device("meta"):
            config = Qwen3Config(vocab_size=151_936, tie_word_embeddings=True, **shape)
            return sum(p.numel() for p in Qwen3ForCausalLM(config).parameters())

    # Qwen3-0.6B, whose card says 0.6B, 0.44B of them without the embedding.
    assert parameters("student") == 596_049_920
    assert parameters("teacher") == pytest.approx(1.72e9, rel=1e-3)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"device": "mps"}, "device = 'mps'"),
        ({"preset": "large"}, "preset = 'large'"),
        ({"rows": ("verl",)}, "row = 'verl'"),
        ({"steps": 0}, "steps = 0"),
        ({"rounds": 0}, "rounds = 0"),
        ({"out": "."}, "out = '.' is a folder"),
    ],
)
def test_arguments_that_cannot_work(arguments, message):
    with pytest.raises(ArgumentError, match=message):
        bench_train.bench_train(**{"device": "cpu"} | arguments)


def test_the_command(monkeypatch, capsys, tmp_path):
    fake(monkeypatch, {row: [took([5.0])] for row in ROWS})
    out = tmp_path / "train.json"
    command = ["bench", "train", "--device", "cpu", "--preset", "small", "--steps", "3"]
    assert __main__.main([*command, "--rounds", "1", "--out", str(out)]) == 0
    shown, result = capsys.readouterr(), json.loads(out.read_text())
    assert result["steps"] == 3
    assert result["preset"] == "small"
    assert [row["row"] for row in result["rows"]] == list(ROWS)
    assert shown.out.strip() == table(result)
    assert shown.err.count("round 1") == len(ROWS)
