"""The command evaluate: numbers found again by hand from logits, and errors."""

from __future__ import annotations

import json

import pytest
import torch

from kdlib import build_cache, evaluate_command, localize, models
from kdlib.__main__ import main
from kdlib.evaluate import Fidelity, evaluate, fidelity_report, together
from kdlib.pairs import PairCollator
from kdlib.sampling import complete
from kdlib.sparse_targets import top_k_targets
from kdlib.teachers import LiveTeacher

# Without the context some of the teacher's answers are right, and most are wrong.
EXAMPLES = localize.examples("test", limit=2)[:12]


@pytest.fixture(scope="module")
def shipped():
    return models.load("teacher")


@pytest.fixture(scope="module")
def place(shipped, tmp_path_factory):
    """data.jsonl, a student of half the teacher's layers, and three caches."""
    place = tmp_path_factory.mktemp("place")
    text = "\n".join(json.dumps(vars(example)) for example in EXAMPLES)
    (place / "data.jsonl").write_text(text)
    models.save(models.first_layers(shipped[0], 2), shipped[1], place / "student")
    every = len(shipped[1])
    for name, options in (
        ("all", {"k": every}),
        ("four", {"k": 4}),
        ("sampled", {"k": 50, "tail": "sampled"}),
    ):
        build_cache.build(
            "teacher", place / "data.jsonl", place / name, say=print, **options
        )
    return place


@pytest.fixture
def run(place, monkeypatch, capsys):
    """The command in that folder; its JSON, or its status and message."""
    monkeypatch.chdir(place)

    def run(*arguments, status=0):
        capsys.readouterr()
        assert main(["evaluate", *arguments, "--json"]) == status
        said = capsys.readouterr()
        return said.err if status else json.loads(said.out)

    return run


def by_hand(shipped, student):
    """Exact match by decoding; argmax and KL from logits in float64, row by row."""
    teacher, tokenizer = shipped
    collator = PairCollator(tokenizer)
    pairs = [collator.encode(example) for example in EXAMPLES]
    same, kl, rows = [], [], {}
    for pair in pairs:
        said = []
        for model, prompt in (
            (student, pair.student_prompt_ids),
            (teacher, pair.teacher_prompt_ids),
        ):
            with torch.no_grad():
                logits = model(torch.tensor([prompt + pair.response_ids])).logits[0]
            said.append(logits[len(prompt) - 1 : -1].double().log_softmax(-1))
        q, p = said
        same += (q.argmax(-1) == p.argmax(-1)).tolist()
        kl += (p.exp() * (p - q)).sum(-1).tolist()
    for side, model in (("student", student), ("teacher", teacher)):
        prompts = [getattr(pair, f"{side}_prompt_ids") for pair in pairs]
        answers = complete(model, tokenizer, prompts)
        right = [
            tokenizer.decode(answer) == example.response
            for answer, example in zip(answers, EXAMPLES, strict=True)
        ]
        rows[side] = {
            "exact_match": sum(right) / len(right),
            "examples": len(EXAMPLES),
            "parameters": sum(p.numel() for p in model.parameters()),
        }
    rows["student"] |= {"agreement": sum(same) / len(same), "kl": sum(kl) / len(kl)}
    rows["teacher"] |= {"agreement": 1.0, "kl": 0.0}
    return rows


@pytest.mark.parametrize("name", ["student", "teacher"])
def test_the_report_is_what_one_finds_by_hand(run, place, shipped, name):
    student, _ = models.load(place / name if name == "student" else name)
    wanted = by_hand(shipped, student)
    facts = run(name, "data.jsonl", "--teacher", "teacher")
    assert facts["validation"].keys() == wanted.keys()
    for side, row in wanted.items():
        assert facts["validation"][side] == pytest.approx(row, abs=1e-5)
    student = wanted["student"]
    assert 0 < student["agreement"] < 1 and student["kl"] > 0.1
    assert wanted["teacher"]["exact_match"] > 0.9
    if name == "teacher":
        assert 0 < student["exact_match"] < 1
    assert (facts["student"], facts["data"]) == (name, "data.jsonl")
    assert facts["command"].endswith(f"evaluate {name} data.jsonl --teacher teacher")


def test_cached_targets_stand_for_the_teacher(run, shipped, place):
    live = run("student", "data.jsonl", "--teacher", "teacher")["validation"]
    for name, rel in (("all", 1e-3), ("four", None)):
        found = run("student", "data.jsonl", "--teacher", name)["validation"]
        for side in found:
            for number in ("agreement", "exact_match", "examples"):
                assert found[side][number] == live[side][number]
        assert found["teacher"]["parameters"] is None
        if rel:
            assert found["student"]["kl"] == pytest.approx(live["student"]["kl"], rel)
        else:  # coarser: four tokens and the rest
            assert 0.1 < found["student"]["kl"] < live["student"]["kl"]
    found = run("student", "data.jsonl", "--teacher", "sampled")["validation"]
    assert found.keys() == {"student"}  # draws in no order: no argmax, no answer
    assert found["student"]["agreement"] is None
    assert found["student"]["kl"] == pytest.approx(live["student"]["kl"], rel=0.2)


def test_without_a_teacher_the_answers_alone(run, shipped, capsys):
    found = run("teacher", "data.jsonl")
    assert found["teacher"] is None and found["validation"].keys() == {"student"}
    row = found["validation"]["student"]
    assert row["agreement"] is row["kl"] is None
    wanted = by_hand(shipped, shipped[0])["student"]
    assert row["exact_match"] == wanted["exact_match"]
    assert main(["evaluate", "teacher", "data.jsonl"]) == 0
    line = capsys.readouterr().out.splitlines()[1].split()
    share, size = f"{wanted['exact_match']:.3f}", f"{wanted['parameters']:,}"
    assert line == ["student", share, "-", "-", size, "12", "examples"]


def test_means_are_over_tokens_however_the_examples_are_batched(run):
    """Responses of unequal length: a mean of batches' means is another number."""
    reports = [
        run("student", "data.jsonl", "--teacher", "teacher", "--batch-size", size)
        for size in ("12", "5", "1")
    ]
    for report in reports[1:]:
        for side, row in reports[0]["validation"].items():
            assert report["validation"][side] == pytest.approx(row, abs=1e-6)


def test_parts_put_together():
    parts = [Fidelity(0.5, 0.25, 1.0, 4, (True, False)), Fidelity(1, 1, 4, 2, (True,))]
    assert together(parts) == Fidelity(2 / 3, 0.5, 2.0, 6, (True, False, True))
    unknown = Fidelity(1.0, None, None, 2, (True,))
    found = together([parts[0], unknown])
    assert found.agreement is found.kl is None and found.exact_match == 2 / 3


def test_padding_of_the_head_is_no_disagreement(shipped):
    """A teacher with fewer columns than the student's padded head."""
    model, tokenizer = shipped
    batch = PairCollator(tokenizer)(EXAMPLES[:3])
    logits = LiveTeacher(model).targets(batch)
    wide = models.first_layers(model, 1)
    wide.resize_token_embeddings(len(tokenizer) + 64)
    with torch.no_grad():
        weight = wide.lm_head.weight
        # No tokens, and always one of the two on top.
        weight[len(tokenizer)], weight[len(tokenizer) + 1] = torch.stack(
            [100 * weight[5], -100 * weight[5]]
        )
        narrow = wide(
            batch.student.input_ids, attention_mask=batch.student.attention_mask.long()
        ).logits[..., : len(tokenizer)]
    wanted = (batch.student.select(narrow).argmax(-1) == logits.argmax(-1)).tolist()
    assert 0 < sum(wanted) < len(wanted)
    for targets in (logits, top_k_targets(logits, 4)):
        found = evaluate(wide, [batch], [targets])
        assert found.agreement == pytest.approx(sum(wanted) / len(wanted))


REFUSED = [
    (["./none", "data.jsonl"], "./none does not exist"),
    (["four", "data.jsonl"], "four has no config.json"),
    (["student", "none.jsonl"], "none.jsonl cannot be read"),
    (["student", "broken.jsonl"], "broken.jsonl, line 1 is not JSON"),
    (["student", "data.jsonl", "--teacher", "./none"], "./none does not exist"),
    (["student", "data.jsonl", "--teacher", "other"], "tokenizers differ in"),
    (
        ["student", "less.jsonl", "--teacher", "four"],
        "the cached targets were made for",
    ),
    (["student", "more.jsonl", "--teacher", "four"], "example 12 has no cached"),
    (
        ["student", "data.jsonl", "--teacher", "four", "--tokenizer", "other"],
        "made with another tokenizer",
    ),
    (["student", "data.jsonl", "--teacher", "begun"], "begun is not complete: 1"),
    (["student", "data.jsonl", "--teacher", "data.jsonl"], "data.jsonl cannot be read"),
    (["student", "data.jsonl", "--tokenizer", "student"], "tokenizer='student' with"),
    (["student", "data.jsonl", "--batch-size", "0"], "batch_size=0"),
    (["student", "data.jsonl", "--precision", "bf61"], "precision='bf61'"),
    (["student", "data.jsonl", "--student-max-length", "3"], "student_max_length=3"),
]


@pytest.fixture(scope="module")
def bad(place, shipped):
    """What is refused, beside the good."""
    lines = (place / "data.jsonl").read_text().splitlines()
    (place / "broken.jsonl").write_text("{")
    (place / "less.jsonl").write_text("\n".join(lines[1:]))
    (place / "more.jsonl").write_text("\n".join([*lines, lines[0]]))
    words = models.train_tokenizer(["other words"], 270)
    other = models.build(words, hidden_size=8, layers=1, heads=1)
    models.save(other, words, place / "other")
    stop = []

    def say(line):
        stop.append(line)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        build_cache.build(
            "teacher", place / "data.jsonl", place / "begun", shard_size=5, say=say
        )


@pytest.mark.parametrize(("arguments", "message"), REFUSED)
def test_what_cannot_be_compared(run, bad, arguments, message):
    said = run(*arguments, status=2)
    assert said.startswith("kdlib: ") and message in said, said
    assert "Remedy: " in said and "Traceback" not in said


def test_a_gpu_whose_memory_is_too_small(run, monkeypatch):
    def full(*arguments, **options):
        raise torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate")

    monkeypatch.setattr(evaluate_command, "fidelity_report", full)
    for teacher, other in (("teacher", True), ("four", False)):
        said = run("student", "data.jsonl", "--teacher", teacher, status=2)
        assert "Tried to allocate" in said and "lower batch_size" in said
        assert ("kdlib cache" in said) == other


def test_the_report_leaves_both_models_as_they_were(shipped):
    student = models.first_layers(shipped[0], 1).train()
    collator = PairCollator(shipped[1])
    pairs = [collator.encode(example, i) for i, example in enumerate(EXAMPLES[:3])]
    fidelity_report(student, LiveTeacher(shipped[0]), collator, pairs)
    assert student.training and not shipped[0].training
    assert all(p.grad is None for p in student.parameters())
