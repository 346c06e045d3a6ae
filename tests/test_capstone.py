"""The capstone's rows: fair budgets, paired seeds, and what the result file holds."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest

from kdlib import capstone, localize, models
from kdlib.errors import ArgumentError
from kdlib.evaluate import parameter_count
from kdlib.ledger import provenance
from kdlib.pairs import PairCollator, PairedExample
from kdlib.settings import TrainConfig

WORD = {form: localize.instruction("pl", form) for form in localize.FORMATS}


@pytest.fixture(scope="module")
def task():
    teacher, tokenizer = models.load("teacher")
    collator = PairCollator(tokenizer, teacher_max_length=128, student_max_length=128)
    examples = [
        PairedExample(datum.english, datum.rendering("pl", form), WORD[form], form)
        for datum in localize.load_split("test")[:6]
        for form in WORD
    ]
    pairs = [collator.encode(example, i) for i, example in enumerate(examples)]
    start = models.first_layers(teacher, 1)
    return capstone.Task(
        teacher=teacher,
        collator=collator,
        student=lambda seed: copy.deepcopy(start),
        labelled=pairs[:4],
        unlabelled=capstone.answered(teacher, collator, examples[4:8]),
        test=pairs[8:],
        config=TrainConfig(steps=2, batch_size=4, learning_rate=1e-3),
        groups={"long": (0, 2), "short": (1, 3)},
        batch_size=3,
    )


@pytest.fixture(scope="module")
def runs(task):
    return capstone.run_seed(task, 0) + capstone.run_seed(task, 1)


def test_the_teachers_answers_stand_for_labels_that_nobody_reads(task):
    """A label that is nonsense changes nothing; an answer that does not end is out."""
    teacher, collator = task.teacher, task.collator
    nonsense = [
        PairedExample(datum.english, "nonsense", WORD["long"], "long")
        for datum in localize.load_split("test")[:3]
    ]
    found = capstone.answered(teacher, collator, nonsense)
    end = collator.tokenizer.eos_token_id
    said = [collator.tokenizer.decode(p.response_ids[:-1]) for p in found]
    wanted = [d.rendering("pl", "long") for d in localize.load_split("test")[:3]]
    assert said == wanted and all(p.response_ids[-1] == end for p in found)
    assert capstone.answered(teacher, collator, nonsense, max_new_tokens=1) == []


def test_budgets_by_hand(task):
    """Tokens of whole batches, and FLOPs 6 and 2 for a parameter and token."""
    plan = capstone.budgets(task)
    student = parameter_count(task.student(0))
    read = [len(p.student_prompt_ids) + len(p.response_ids) for p in task.unlabelled]
    asked = [len(p.teacher_prompt_ids) + len(p.response_ids) for p in task.unlabelled]
    tokens = 2 * 4 * sum(read) / len(read)
    flops = 6 * student * tokens + 2 * parameter_count(task.teacher) * sum(asked)
    assert plan[capstone.DISTILLED].flops == pytest.approx(flops)
    assert plan[capstone.DISTILLED].tokens == round(tokens)
    labels = [len(p.student_prompt_ids) + len(p.response_ids) for p in task.labelled]
    a_step = sum(labels)  # batches of four of four labels
    assert plan[capstone.HARD_TOKENS].steps == round(tokens / a_step)
    assert plan[capstone.HARD_FLOPS].steps == round(flops / (6 * student) / a_step)


def test_long_runs_have_equal_budgets(task):
    plan = capstone.budgets(replace(task, config=replace(task.config, steps=5000)))
    ours, tokens, flops = (
        plan[row]
        for row in (capstone.DISTILLED, capstone.HARD_TOKENS, capstone.HARD_FLOPS)
    )
    assert tokens.tokens == pytest.approx(ours.tokens, rel=1e-3)
    assert flops.flops == pytest.approx(ours.flops, rel=1e-3)


def test_the_teacher_is_its_own_equal_with_its_context_alone(task):
    fixed = capstone.fixed_rows(task)
    assert fixed[capstone.TEACHER]["kl"] == pytest.approx(0, abs=1e-6)
    assert fixed[capstone.TEACHER]["agreement"] == 1.0
    assert fixed[capstone.WITHOUT]["kl"] > 0.05


def test_groups_are_parts_of_the_whole(task, runs):
    for run in (*runs, *capstone.fixed_rows(task).values()):
        parts = [run[f"exact_match, {form}"] for form in ("long", "short")]
        assert sum(parts) / 2 == pytest.approx(run["exact_match"])


def test_rows_of_a_seed_start_alike_and_train(task, runs):
    kept = {}
    again = capstone.run_seed(task, 0, keep=kept.__setitem__)
    left_out = ("minutes",)

    def plain(run):
        return {k: v for k, v in run.items() if k not in left_out}

    assert [plain(run) for run in again] == [plain(run) for run in runs[:4]]
    assert tuple(kept) == capstone.SEEDED
    start = dict(task.student(0).named_parameters())
    for row, student in kept.items():
        same = all(p.equal(start[n]) for n, p in student.named_parameters())
        assert same == (row == capstone.UNTRAINED), row


def test_the_summary_by_hand(task):
    exact = {
        capstone.UNTRAINED: (0.0, 0.0),
        capstone.HARD_TOKENS: (0.4, 0.5),
        capstone.HARD_FLOPS: (0.5, 0.6),
        capstone.DISTILLED: (0.7, 0.9),
    }
    made = [
        {"row": row, "seed": seed, "exact_match": x, "kl": 0.1 * (seed + 1)}
        for row, values in exact.items()
        for seed, x in enumerate(values)
    ]
    found = capstone.summary({capstone.WITHOUT: {"kl": 0.5}}, made)
    over = found["distilled_minus"][capstone.HARD_FLOPS]["exact_match"]
    # Differences 0.2 and 0.3: t = 12.706, deviation 0.05 * sqrt(2), over sqrt(2).
    assert over["mean"] == pytest.approx(0.25)
    assert over["high"] == pytest.approx(0.25 + 12.706 * 0.05)
    assert found["recovery"]["mean"] == pytest.approx((0.8 + 0.6) / 2)
    assert capstone.summary({capstone.WITHOUT: {"kl": 0.0}}, made)["recovery"] is None
    for fewer in (made[:-1], [r for r in made if r["seed"] == 0]):
        with pytest.raises(ArgumentError, match="two seeds"):
            capstone.summary({capstone.WITHOUT: {"kl": 0.5}}, fewer)


def test_a_result_holds_its_question_and_can_be_shown(task, runs):
    fixed = capstone.fixed_rows(task)
    asked = {"question": "More?", "predictions": ["above 0.1"]}
    found = capstone.result(task, **asked, fixed=fixed, runs=runs)
    assert found["question"] == "More?" and found["seeds"] == 2
    assert found["examples"] == {"labelled": 4, "unlabelled": 4, "test": 4}
    assert not set(found) & set(provenance("python mine.py"))
    shown = capstone.table(found)
    assert all(row in shown for row in (*capstone.SEEDED, *fixed))
    for change in ({"question": " "}, {"predictions": []}, {"predictions": [""]}):
        with pytest.raises(ArgumentError, match="before the run"):
            capstone.result(task, **asked | change, fixed=fixed, runs=runs)


def test_an_empty_part_is_refused(task):
    with pytest.raises(ArgumentError, match="unlabelled is empty"):
        replace(task, unlabelled=[])
