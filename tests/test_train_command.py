"""The commands train and cache, from a file of settings to what a run leaves."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM

from kdlib import localize, models, train_command
from kdlib.__main__ import main
from kdlib.distributed import Ranks
from kdlib.errors import ArgumentError, DataError, ModelError
from kdlib.evaluate import evaluate, teacher_reference
from kdlib.pairs import PairCollator
from kdlib.run_plan import Plan
from kdlib.settings import TrainConfig
from kdlib.teachers import LiveTeacher

ROOT = Path(__file__).parents[1]
EXAMPLE = ROOT / "notebooks" / "experiments" / "fr_long.toml"


@pytest.fixture(scope="module")
def teacher():
    return models.load("teacher")


@pytest.fixture
def data(tmp_path):
    """A JSONL file of 12 examples."""
    examples = localize.examples("test", locales=["fr"], formats=["long"], limit=12)
    path = tmp_path / "data.jsonl"
    path.write_text("\n".join(json.dumps(vars(e)) for e in examples))
    return path


def toml(value) -> str:
    if isinstance(value, dict):
        return "{" + ", ".join(f"{k} = {toml(v)}" for k, v in value.items()) + "}"
    return json.dumps(str(value) if isinstance(value, Path) else value)


@pytest.fixture
def write(tmp_path, data):
    """Write a settings file; a table given here stands in the place of this one."""

    def write(**changes) -> str:
        tables = {
            "train": {"steps": 4, "batch_size": 4, "checkpoint_every": 2},
            "objective": {},
            "data": {"source": data},
            "teacher": {"model": "teacher"},
            "student": {"build": {"hidden_size": 8, "layers": 1, "heads": 1}},
            **changes,
        }
        path = tmp_path / "run.toml"
        lines = []
        for name, table in tables.items():
            if table is not None:
                lines.append(f"[{name}]")
                lines += [f"{key} = {toml(value)}" for key, value in table.items()]
        path.write_text("\n".join(lines))
        return str(path)

    return write


def weights(folder):
    model, _ = models.load(folder)
    return torch.cat([p.flatten() for p in model.parameters()])


# --- What a run leaves ---


def test_a_run_from_file_to_verdict(write, data, tmp_path, teacher, capsys):
    out = tmp_path / "out"
    file = write(validation={"source": data})
    assert main(["train", file, "--out", str(out), "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts == json.loads((out / "result.json").read_text())
    assert (facts["steps"], facts["examples"]) == (4, 12)
    assert facts["settings"]["train"]["batch_size"] == 4
    assert len((out / "metrics.jsonl").read_text().splitlines()) == 4

    # What it says of the saved student, measured in another way.
    student = AutoModelForCausalLM.from_pretrained(out / "student")
    tokenizer = AutoTokenizer.from_pretrained(out / "student")
    collator = PairCollator(tokenizer)
    batch = collator(localize.examples("test", locales=["fr"], formats=["long"])[:12])
    live = LiveTeacher(teacher[0])
    for side, model in (("student", student), ("teacher", teacher[0])):
        whole = evaluate(model, [batch], teacher_reference(live, [batch]), side=side)
        said = facts["validation"][side]
        for name in ("exact_match", "agreement", "kl"):
            assert said[name] == pytest.approx(getattr(whole, name), abs=1e-6)
    assert facts["validation"]["student"]["kl"] > 0.1
    assert main(["train", file, "--out", str(out)]) == 0  # finished: it says so again
    assert "exact" in capsys.readouterr().out


def test_ctrl_c_saves_and_the_same_command_goes_on(
    write, tmp_path, monkeypatch, capsys
):
    file, train = write(), train_command.train
    assert main(["train", file, "--out", str(tmp_path / "whole")]) == 0

    for name, status in (("SIGINT", 130), ("SIGTERM", 143)):

        def interrupted(*args, name=name, **kwargs):
            def on_step(step, loss):
                if step == 3:
                    os.kill(os.getpid(), getattr(signal, name))

            return train(*args, on_step=on_step, **kwargs)

        out = tmp_path / name
        monkeypatch.setattr(train_command, "train", interrupted)
        assert main(["train", file, "--out", str(out)]) == status
        said = capsys.readouterr().err
        assert f"{name}: stopped after step 3" in said and "same command" in said
        assert not (out / "student").exists()
        monkeypatch.setattr(train_command, "train", train)
        assert main(["train", file, "--out", str(out)]) == 0
        assert torch.equal(
            weights(out / "student"), weights(tmp_path / "whole" / "student")
        )


def test_the_run_s_folder_has_the_file_s_name(write, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert train_command.run(write())["student"] == "runs/run/student"
    assert (tmp_path / "runs" / "run" / "student" / "config.json").is_file()


def test_the_example_file_runs(tmp_path):
    plan = Plan.read(EXAMPLE)
    assert plan.train.steps >= 200 and plan.validation is not None
    text = EXAMPLE.read_text()
    steps = f"steps = {plan.train.steps}"
    assert text.count(steps) == 1
    text = text.replace(steps, "steps = 2").replace(":unlabelled", ":validation")
    (tmp_path / "short.toml").write_text(text)
    facts = train_command.run(tmp_path / "short.toml", tmp_path / "out")
    assert facts["steps"] == 2 and facts["validation"]["teacher"]["exact_match"] > 0.9


# --- Students ---


def test_a_student_made_of_the_teacher_s_first_layers(teacher):
    """It says what the teacher's norm and head make of the teacher's own layer n."""
    model, tokenizer = teacher
    ids = tokenizer("3 January", return_tensors="pt").input_ids
    before = torch.get_rng_state()
    with torch.no_grad():
        hidden = model(ids, output_hidden_states=True).hidden_states
        for n in range(1, model.config.num_hidden_layers):
            shorter = models.first_layers(model, n)
            assert shorter.config.num_hidden_layers == n
            wanted = model.lm_head(model.model.norm(hidden[n]))
            torch.testing.assert_close(shorter(ids).logits, wanted)
        whole = models.first_layers(model, model.config.num_hidden_layers)
        torch.testing.assert_close(whole(ids).logits, model(ids).logits)
        # A copy: training one must not change the other.
        next(whole.parameters()).add_(1)
        assert not torch.equal(next(whole.parameters()), next(model.parameters()))
    assert torch.equal(before, torch.get_rng_state())
    for n in (0, model.config.num_hidden_layers + 1):
        with pytest.raises(ArgumentError, match=f"first_layers={n} of a model of"):
            models.first_layers(model, n)


def test_every_start_of_a_student(write, tmp_path, teacher):
    ranks = Ranks(device=torch.device("cpu"))

    def made(**student):
        return train_command.prepare(Plan.read(write(student=student)), ranks).student

    assert made(first_layers=1).config.num_hidden_layers == 1
    assert torch.equal(made(model="teacher").lm_head.weight, teacher[0].lm_head.weight)
    models.save(made(first_layers=2), teacher[1], tmp_path / "two")
    assert made(model=tmp_path / "two").config.num_hidden_layers == 2
    assert made(model=tmp_path / "two", first_layers=1).config.num_hidden_layers == 1
    size = {"hidden_size": 8, "layers": 1, "heads": 2}
    first, again, other = (made(build={**size, "seed": s}) for s in (3, 3, 4))
    assert first.config.num_attention_heads == 2
    assert torch.equal(first.lm_head.weight, again.lm_head.weight)
    assert not torch.equal(first.lm_head.weight, other.lm_head.weight)


@pytest.fixture
def peft():
    return pytest.importorskip("peft", reason="LoRA students need peft")


@pytest.mark.parametrize("shard", [False, True])
def test_a_lora_student_is_left_merged_and_as_adapters(
    peft, write, data, tmp_path, teacher, shard
):
    base = models.save(models.first_layers(teacher[0], 2), teacher[1], tmp_path / "two")
    start = {"model": base, "lora_rank": 2, "lora_alpha": 6}
    rate = {"steps": 4, "batch_size": 4, "learning_rate": 0.03}
    file = write(student=start, validation={"source": data}, train=rate)
    facts = train_command.run(file, tmp_path / "out", shard=shard)
    # Seven linear layers a block; A and B of each have in + out columns of rank 2.
    block = models.load(base)[0].model.layers[0]
    sizes = [sum(w.shape) for w in block.parameters() if w.ndim == 2]
    assert len(sizes) == 7
    assert facts["trained_parameters"] == 2 * 2 * sum(sizes)

    student = AutoModelForCausalLM.from_pretrained(tmp_path / "out" / "student")
    before = models.load(base)[0]
    assert student.state_dict().keys() == before.state_dict().keys()
    examples = localize.examples("test", locales=["fr"], formats=["long"], limit=12)
    batch = PairCollator(teacher[1])(examples)
    adapter = peft.PeftModel.from_pretrained(before, tmp_path / "out" / "adapter")
    assert adapter.peft_config["default"].lora_alpha == 6
    reference = teacher_reference(LiveTeacher(teacher[0]), [batch])
    found = [evaluate(m, [batch], reference).kl for m in (student, adapter.eval())]
    assert found[0] == pytest.approx(found[1], rel=1e-5)
    # The file says that of the trained student, not of its base.
    said = facts["validation"]["student"]["kl"]
    then = evaluate(models.load(base)[0], [batch], reference).kl
    assert said == pytest.approx(found[0], rel=1e-4)
    assert abs(then - said) > 0.01 * said

    with pytest.raises(ModelError, match="adapter holds adapters(.|\n)*student/"):
        models.load(tmp_path / "out" / "adapter")
    file = write(student={**start, "lora_alpha": 7}, train=rate)
    with pytest.raises(ArgumentError, match="lora_alpha was .6., now .7."):
        train_command.run(file, tmp_path / "out", shard=shard)


def test_adapters_without_a_base_are_not_left(peft, write, tmp_path):
    """Others have the whole teacher, and not its first layers alone."""
    file = write(student={"first_layers": 1, "lora_rank": 2})
    train_command.run(file, tmp_path / "out")
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert names == {"checkpoints", "metrics.jsonl", "result.json", "student"}
    assert models.load(tmp_path / "out" / "student")[0].config.num_hidden_layers == 1


def test_lora_without_peft_is_an_error_before_the_run(
    write, tmp_path, monkeypatch, capsys
):
    monkeypatch.setitem(sys.modules, "peft", None)
    file = write(student={"model": "teacher", "lora_rank": 2})
    assert main(["train", file, "--out", str(tmp_path / "out")]) == 2
    assert "pip install peft" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_lengths_and_a_server_s_options_arrive(write, data, monkeypatch):
    monkeypatch.setenv("KDLIB_API_KEY", "a key")
    lengths = {"teacher_max_length": 90, "student_max_length": 40}
    table = {
        "url": "http://h",
        "tokenizer": "teacher",
        "server": {"k": 3, "retries": 9},
    }
    whole = {"source": data, "truncate_context": "never", **lengths}
    plan = Plan.read(write(data=whole, teacher=table))
    parts = train_command.prepare(plan, Ranks(device=torch.device("cpu")))
    sides = parts.collator.teacher_side, parts.collator.student_side
    assert [side.max_length for side in sides] == [90, 40]
    assert {side.truncate_context for side in sides} == {"never"}
    assert parts.teacher.k == 3 and parts.teacher._server.retries == 9
    assert "a key" in str(vars(parts.teacher._server))


def test_labels_alone_need_no_teacher(write, tmp_path):
    file = write(
        objective={"hard_weight": 1.0}, teacher=None, student={"model": "teacher"}
    )
    assert train_command.run(file, tmp_path / "out")["steps"] == 4


# --- Teachers ---


def test_a_cache_is_written_and_trained_from(write, data, tmp_path, capsys):
    cache, out = tmp_path / "cache", str(tmp_path / "out")
    arguments = ["cache", "teacher", str(data), str(cache), "--k", "4"]
    assert main([*arguments, "--max-length", "200", "--json"]) == 0
    told = capsys.readouterr()
    assert "bytes per token" in told.err
    assert json.loads(told.out)["plan"]["k"] == 4
    table = {"cache": cache, "tokenizer": "teacher"}
    lengths = {"source": data, "teacher_max_length": 200}
    assert main(["train", write(teacher=table, data=lengths), "--out", out]) == 0
    first = json.loads((tmp_path / "out/metrics.jsonl").read_text().splitlines()[0])
    assert 0.5 < first["teacher_mass"] <= 1.0  # sparse targets, then

    warm = {"temperature": 2.0}
    capsys.readouterr()
    file = write(teacher=table, data=lengths, objective=warm)
    assert main(["train", file, "--out", str(tmp_path / "warm")]) == 2
    assert "made with another temperature" in capsys.readouterr().err
    examples = localize.examples("test", locales=["de"], limit=3)
    data.write_text("\n".join(json.dumps(vars(e)) for e in examples))
    assert main(["train", write(teacher=table, data=lengths), "--out", out]) == 2
    assert "the cached targets were made for" in capsys.readouterr().err


@pytest.fixture
def address():
    server = [sys.executable, str(ROOT / "tests" / "logprob_server.py")]
    process = subprocess.Popen(server, stdout=subprocess.PIPE, text=True)
    try:
        yield f"http://127.0.0.1:{int(process.stdout.readline())}/good"
    finally:
        process.kill()
        process.communicate()


def test_a_served_teacher(write, address, data, tmp_path, capsys):
    table = {"url": address, "tokenizer": "teacher", "server": {"k": 3, "workers": 2}}
    run = train_command.run(write(teacher=table), tmp_path / "served")
    arguments = [address, str(data), str(tmp_path / "cache"), "--tokenizer", "teacher"]
    options = ["--k", "3", "--server-workers", "2"]
    assert main(["cache", *arguments, *options]) == 0
    table = {"cache": tmp_path / "cache", "tokenizer": "teacher"}
    again = train_command.run(write(teacher=table), tmp_path / "cached")
    # The cache rounds log-probabilities to float16.
    assert again["loss"] == pytest.approx(run["loss"], rel=1e-3)


# --- What is refused ---

BUILD = {"hidden_size": 8, "layers": 1, "heads": 1}
REFUSED = [
    ({"trian": {}}, r"\[trian\] is unknown(.|\n)*did you mean 'train'"),
    ({"train": {"step": 3}}, r"\[train\]: setting 'step' is unknown(.|\n)*'steps'"),
    ({"train": None}, r"\[train\]: setting 'steps' is missing"),
    ({"train": {"steps": 0}}, r"\[train\]: steps=0"),
    ({"objective": {"divergence": "forward_lk"}}, "forward_lk(.|\n)*'forward_kl'"),
    ({"objective": {"temperature": "hot"}}, r"\[objective\]: temperature='hot'"),
    ({"objective": {"divergence_params": 2}}, r"\[objective\]: divergence_params=2"),
    ({"objective": {"hard_wieght": 1.0}}, "'hard_wieght' is unknown(.|\n)*hard_weight"),
    ({"data": None}, r"\[data\]: setting 'source' is missing"),
    ({"data": {"sauce": "x"}}, r"\[data\]: setting 'sauce' is unknown"),
    ({"data": {"source": 3}}, r"\[data\]: source=3"),
    ({"data": {"source": "none.jsonl"}}, "none.jsonl"),
    ({"teacher": {}}, r"\[teacher\] names no teacher"),
    ({"teacher": {"model": "teacher", "cache": "c"}}, "names model and cache"),
    ({"teacher": {"modle": "teacher"}}, r"\[teacher\]: setting 'modle'(.|\n)*'model'"),
    ({"teacher": {"model": "./none"}}, "./none does not exist"),
    ({"teacher": {"cache": "none"}}, r"\[teacher\] names no tokenizer"),
    ({"teacher": {"model": "teacher", "tokenizer": "x"}}, "model and tokenizer"),
    ({"teacher": {"cache": "none", "tokenizer": "teacher"}}, "none"),
    ({"teacher": {"cache": "c", "tokenizer": "./none"}}, "tokenizer './none' cannot"),
    (
        {"teacher": {"url": "http://h", "tokenizer": "teacher", "server": {"modl": 1}}},
        "'modl' is unknown(.|\n)*'model'",
    ),
    (
        {"teacher": {"url": "u", "tokenizer": "t", "server": {"api_key": "secret"}}},
        "KDLIB_API_KEY",
    ),
    ({"teacher": {"model": "teacher", "server": {"k": 1}}}, "but no url"),
    ({"student": {}}, r"\[student\] names no start"),
    ({"student": None}, r"\[student\] names no start"),
    ({"student": {"build": BUILD, "model": "teacher"}}, "names model and build"),
    ({"student": {"build": BUILD, "first_layers": 1}}, "first_layers and build"),
    ({"student": {"build": {"layers": 1}}}, r"build: setting 'hidden_size' is missing"),
    ({"student": {"build": {**BUILD, "head": 1}}}, "'head' is unknown(.|\n)*'heads'"),
    ({"student": {"build": {**BUILD, "heads": 3}}}, "heads=3"),
    ({"student": {"build": 3}}, r"\[student\]: build=3"),
    ({"student": {"first_layers": 9}}, "first_layers=9 of a model of"),
    ({"student": {"first_layers": 0}}, "first_layers=0 of a model of"),
    (
        {"teacher": {"cache": "c"}, "student": {"first_layers": 1}},
        "first_layers=1 of no model",
    ),
    ({"student": {"model": "teacher", "lora_rank": 0}}, "lora_rank=0"),
    ({"student": {"model": "teacher", "lora_rank": 2.5}}, "lora_rank=2.5"),
    ({"student": {"model": "teacher", "lora_alpha": 2.0}}, "without lora_rank"),
    (
        {"student": {"model": "teacher", "lora_rank": 2, "lora_alpha": -1}},
        "lora_alpha=-1",
    ),
    ({"student": {"lora_rank": 2}}, r"\[student\] names no start"),
    ({"student": {"build": BUILD, "lora_rank": 2}}, "lora_rank=2 of a new model"),
    ({"validation": {}}, r"\[validation\]: setting 'source' is missing"),
    (
        {
            "teacher": {"cache": "c", "tokenizer": "teacher"},
            "validation": {"source": "localize:fr:long:test"},
        },
        r"\[validation\] without \[teacher\] model",
    ),
]


@pytest.mark.parametrize(("changes", "match"), REFUSED)
def test_what_cannot_work_is_refused_before_anything_is_written(
    changes, match, write, tmp_path
):
    out = tmp_path / "out"
    with pytest.raises((ArgumentError, DataError, ModelError), match=match):
        train_command.run(write(**changes), out)
    assert not out.exists()


def test_another_run_s_folder_is_refused(write, tmp_path, capsys):
    out = str(tmp_path / "out")
    assert main(["train", write(), "--out", out]) == 0
    file = write(objective={"temperature": 2.0})
    assert main(["train", file, "--out", out]) == 2
    assert "objective.temperature was 1.0, now 2.0" in capsys.readouterr().err


def test_a_result_that_cannot_be_written_is_an_error(write, tmp_path, capsys):
    (tmp_path / "out" / "result.json").mkdir(parents=True)
    assert main(["train", write(), "--out", str(tmp_path / "out")]) == 2
    said = capsys.readouterr().err
    assert "cannot write" in said and "result.json" in said
    # What came before is kept, and nothing half-written.
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert names == {"checkpoints", "metrics.jsonl", "result.json", "student"}


def test_models_that_are_too_large_for_the_gpu(write, tmp_path, monkeypatch, capsys):
    to = LlamaForCausalLM.to

    def large(self, where):
        if isinstance(where, torch.device):
            raise torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate")
        return to(self, where)

    file = write()
    monkeypatch.setattr(LlamaForCausalLM, "to", large)
    assert main(["train", file, "--out", str(tmp_path / "out")]) == 2
    said = capsys.readouterr().err
    assert "loading the models: the GPU's memory is too small: CUDA" in said
    assert "--shard" in said and not (tmp_path / "out").exists()


def test_sharding_among_one(write, tmp_path, capsys):
    """Without torchrun: a group of one process, which changes no bit."""
    whole, parts = str(tmp_path / "whole"), str(tmp_path / "parts")
    file = write()
    assert main(["train", file, "--out", whole]) == 0
    assert main(["train", file, "--out", parts, "--shard"]) == 0
    assert torch.equal(weights(f"{whole}/student"), weights(f"{parts}/student"))
    assert main(["train", file, "--out", whole, "--shard"]) == 2
    assert "run.shard was False, now True" in capsys.readouterr().err
    file = write(train={"steps": 1, "batch_size": 2, "teacher_offload": True})
    assert main(["train", file, "--out", str(tmp_path / "new"), "--shard"]) == 2
    assert "shard=True with teacher_offload=True" in capsys.readouterr().err


@pytest.mark.parametrize("options", [{"lmbda": 1.0}, {"sequence_level": True}])
def test_sharded_models_write_as_whole_ones(write, tmp_path, options):
    settings = {"steps": 3, "batch_size": 4, "max_new_tokens": 5, **options}
    file = write(train=settings, objective={"divergence": "reverse_kl"})
    found = [
        train_command.run(file, tmp_path / str(shard), shard=shard)
        for shard in (False, True)
    ]
    assert found[0]["loss"] == found[1]["loss"]
    assert found[0]["tokens"] == found[1]["tokens"]
    assert torch.equal(
        weights(tmp_path / "False" / "student"), weights(tmp_path / "True" / "student")
    )


def test_settings_know_their_files(tmp_path):
    with pytest.raises(ArgumentError, match="table is 3"):
        TrainConfig.from_table(3, "table")
    with pytest.raises(DataError, match="none.toml"):
        Plan.read(tmp_path / "none.toml")
