"""The doctor: every injected fault by its name, and nothing in what is healthy."""

from __future__ import annotations

import copy
import json
import re
import sys
from dataclasses import replace
from pathlib import Path

import hypothesis
import pytest
import torch
from hypothesis import strategies as st

from kdlib import localize
from kdlib.__main__ import main
from kdlib.doctor import (
    NOTHING,
    catalogue,
    examine_batch,
    examine_run,
    fidelity,
    from_labels,
    optimisation,
    report,
    thresholds,
)
from kdlib.doctor import run as runs
from kdlib.doctor.closed_form import Question
from kdlib.doctor.finding import found
from kdlib.doctor.gradient import examine_closed_form
from kdlib.doctor.positions import examine_positions
from kdlib.doctor.record import Record
from kdlib.doctor.views import examine_views
from kdlib.doctor.watch import Call, Reading, predicting, reading
from kdlib.errors import ArgumentError, DataError
from kdlib.metrics import fidelity as measured
from kdlib.objective import Objective
from kdlib.pairs import PairCollator
from kdlib.settings import TrainConfig
from kdlib.sparse_targets import top_k_targets
from kdlib.teachers import LiveTeacher
from kdlib.views import View

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "notebooks" / "experiments"))

import doctor_runs  # noqa: E402
import doctor_table  # noqa: E402
import doctor_zoo  # noqa: E402

BATCHES = doctor_zoo.FAULTS + doctor_zoo.HEALTHY
RUNS = doctor_runs.BROKEN + doctor_runs.HEALTHY


@pytest.fixture(scope="module")
def bench():
    return doctor_zoo.Bench()


def names(findings) -> set[str]:
    return {finding.name for finding in findings}


# --- Batches: the confusion table, its diagonal ---


@pytest.mark.parametrize("case", BATCHES, ids=lambda case: case.name)
def test_every_fault_is_named_and_nothing_else(case, bench):
    findings = examine_batch(**case.make(bench))
    assert names(findings) == case.expected, report(findings)
    assert all(re.search(r"\d|no forward pass|alone|nan", f.evidence) for f in findings)


def test_the_zoo_is_large_and_says_where_its_faults_were_seen():
    assert len(doctor_zoo.FAULTS) >= 20 and len(doctor_runs.HEALTHY) >= 10
    provoked = set().union(*(case.expected for case in BATCHES + RUNS))
    assert provoked == set(catalogue()), "a name that no fault provokes, or none has"
    for text in [c.seen for c in BATCHES + RUNS] + [
        x.get("seen", "") for x in catalogue().values()
    ]:
        for place in re.findall(r"(\S*)#\d+", text):
            assert re.fullmatch(r"[\w.-]+/[\w.-]+|", place), text


def test_the_committed_table_is_of_this_zoo_and_right():
    facts = json.loads(doctor_table.RESULT.read_text(encoding="utf-8"))
    rows = [(r["kind"], r["case"], r["expected"]) for r in facts["rows"]]
    kinds = ("batch", BATCHES), ("run", RUNS)
    assert rows == [(k, c.name, sorted(c.expected)) for k, some in kinds for c in some]
    assert all(row["found"] == row["expected"] for row in facts["rows"])


def test_everything_is_left_as_it_was(bench):
    """Weights, modes, gradients, hooks, methods, the random state."""
    student, teacher = bench.student, bench.teacher
    student.train()
    live = LiveTeacher(teacher)
    weights = [p.clone() for p in student.parameters()]
    state = torch.get_rng_state()
    examine_batch(**bench.whole(teacher=live, examples=bench.examples))
    assert torch.equal(state, torch.get_rng_state())
    assert student.training and not teacher.training
    assert "targets" not in vars(live)
    for model in (student, teacher):
        assert not model._forward_hooks
        assert all(p.grad is None for p in model.parameters())
    assert all(map(torch.equal, weights, student.parameters()))
    student.eval()


def test_a_factor_is_shown_with_its_number(bench):
    case = next(c for c in doctor_zoo.FAULTS if c.name == "T^2 left out")
    (finding,) = examine_batch(**case.make(bench))  # T = 2
    assert "0.25 times" in finding.evidence
    assert "scale_by_t2" in finding.remedy


@pytest.mark.parametrize("name", ["label_shift", "labels_shifted_twice"])
def test_positions_are_shown_row_by_row(bench, name):
    case = next(c for c in doctor_zoo.FAULTS if name in c.expected)
    (finding,) = examine_batch(**case.make(bench))
    row, seen, due = re.match(
        r"row (\d+): gradient at (\d+)-\d+, expected at (\d+)-\d+", finding.evidence
    ).groups()
    first = int(bench.batch.student.completion_mask[int(row)].nonzero()[0])
    assert int(due) == first - 1
    assert int(seen) - int(due) == (1 if name == "label_shift" else -1)


# --- What it is given ---


def dictionary(view):
    labels = view.input_ids.masked_fill(~view.completion_mask, -100)
    return {
        "input_ids": view.input_ids,
        "attention_mask": view.attention_mask.long(),
        "labels": labels,
    }


def test_a_batch_of_dicts(bench):
    made = from_labels(dictionary(bench.batch.student), dictionary(bench.batch.teacher))
    for side in ("student", "teacher"):
        for field in ("input_ids", "attention_mask", "completion_mask"):
            mine, theirs = (
                getattr(getattr(x, side), field) for x in (made, bench.batch)
            )
            assert torch.equal(mine, theirs)
    assert torch.equal(made.response_ids, bench.batch.response_ids)
    assert torch.equal(made.row_ids, bench.batch.row_ids)
    assert examine_batch(**bench.whole(batch=made)) == []
    alone = from_labels({k: v for k, v in dictionary(bench.plain.student).items()})
    assert alone.teacher is alone.student


def test_what_cannot_be_examined_is_refused(bench):
    def asked(**changes):
        return examine_batch(**bench.whole(**changes))

    with pytest.raises(ArgumentError, match="loss returned float"):
        asked(loss=lambda student, batch: 1.0)
    with pytest.raises(ArgumentError, match="loss returned Tensor"):
        asked(loss=lambda student, batch: torch.zeros(2))

    def backward(student, batch):
        loss = student(batch.student.input_ids).logits.logsumexp(-1).mean()
        loss.backward()
        return loss

    with pytest.raises(ArgumentError, match="cannot be differentiated"):
        asked(loss=backward)
    bench.student.zero_grad(set_to_none=True)
    with pytest.raises(ArgumentError, match="never called the student"):
        asked(loss=lambda student, batch: student.lm_head.weight.sum())
    with pytest.raises(ArgumentError, match="one module"):
        asked(teacher=LiveTeacher(bench.student))
    with pytest.raises(ArgumentError, match=r"LiveTeacher\(model\)"):
        asked(teacher=bench.teacher)


def test_without_a_teacher_positions_are_examined_all_the_same(bench):
    loop = bench.loop(mask=lambda view: view.completion_mask)
    assert names(examine_batch(**loop | {"teacher": None})) == {"label_shift"}
    assert examine_batch(**bench.loop() | {"teacher": None}) == []


def test_what_is_learnt_to_the_last_bit_needs_no_gradient(bench):
    """Where both sides read the same, a copy has nothing to learn; elsewhere it has."""
    examples = bench.examples
    mixed = [replace(e, context="") for e in examples[:3]] + examples[3:]
    student = copy.deepcopy(bench.teacher)
    batch = bench.collator(mixed)
    right = bench.whole(batch=batch, student=student)
    assert examine_batch(**right) == []
    live, first = LiveTeacher(bench.teacher), batch.row_ids < 4

    def loss(student, batch):
        logits = batch.student.select(student(batch.student.input_ids).logits)
        logits = torch.where(first[:, None], logits.detach(), logits)
        return Objective()(logits, live.targets(batch), batch.response_ids).total

    (finding,) = examine_batch(**right, loss=loss)
    count = int((batch.row_ids == 3).sum())
    assert finding.name == "tokens_without_gradient"
    assert finding.evidence.startswith(f"{count} of {len(batch.response_ids)} ")


@pytest.mark.parametrize("offset", [0.0, 1e3, 1e5])
def test_a_right_loss_may_round_its_log_sum_exp(offset):
    rng = torch.Generator().manual_seed(0)
    z = (2 * torch.randn(16, 64, generator=rng) + offset).requires_grad_()
    teacher = 2 * torch.randn(16, 64, generator=rng)
    (z.logsumexp(-1) - (teacher.softmax(-1) * z).sum(-1)).mean().backward()
    question = Question(
        logits=z.detach().double(),
        gradient=z.grad.double(),
        targets=teacher.double(),
        ids=torch.zeros(16, dtype=torch.long),
        objective=Objective(),
        weights=torch.full((16,), 1 / 16, dtype=torch.float64),
        others={},
        moved={},
        sizes={},
        tolerance=thresholds.tolerance(z),
    )
    assert examine_closed_form(question) == []


def test_rows_of_one_length_are_compared_token_by_token():
    def side(*rows):
        ids = torch.tensor(rows)
        return {"input_ids": ids, "labels": ids.where(torch.arange(4) > 1, -100)}

    one, other = [5, 6, 7, 8], [5, 6, 9, 8]
    assert examine_views(from_labels(side(one, other), side(one, other))) == []
    (finding,) = examine_views(from_labels(side(one, other), side(other, one)))
    assert finding.name == "misaligned_responses"
    assert finding.evidence.startswith("2 of 2 rows differ, 4 tokens in all")
    assert finding.evidence.endswith("row 0, position 0: teacher's 9, student's 7")


def test_rows_are_found_in_any_order_and_padding():
    view = View(
        torch.tensor([[5, 6, 7, 0], [8, 9, 0, 0]]),
        torch.tensor([[1, 1, 1, 0], [1, 1, 0, 0]]).bool(),
        torch.tensor([[0, 0, 1, 0], [0, 1, 0, 0]]).bool(),
    )
    ids = torch.tensor([[0, 0, 0, 8, 9], [0, 0, 5, 6, 7]])
    logits = torch.arange(10.0).reshape(2, 5, 1)
    gradient = torch.zeros(2, 5, 1)
    gradient[0, 3], gradient[1, 0] = 2.0, 3.0
    read = reading(view, [Call(ids, (ids > 0).long(), logits, True)], [gradient])
    assert read.logits[..., 0].tolist() == [[7, 8, 9, 0], [3, 4, 0, 0]]
    assert read.gradient[1, 0] == 2.0 and read.gradient.sum() == 2.0
    assert read.outside == pytest.approx(3.0)
    assert read.hidden == 0
    mask = torch.tensor([[0, 0, 0, 1, 0], [0, 0, 1, 0, 1]])  # 9 is last, and unread
    assert reading(view, [Call(ids, mask, logits, True)]).hidden == 1
    assert reading(view, [Call(ids[:1], None, logits[:1], True)]) is None


def test_positions_by_hand():
    """One prompt of two tokens, two response tokens, one of padding."""
    view = View(
        torch.tensor([[1, 2, 3, 4, 0]]),
        torch.tensor([[1, 1, 1, 1, 0]]).bool(),
        torch.tensor([[0, 0, 1, 1, 0]]).bool(),
    )

    def of(*positions):
        gradient = torch.zeros(1, 5, 2)
        gradient[0, list(positions)] = 1.0
        read = Reading(gradient, gradient, 0.0, [0], 0)
        return names(examine_positions(view, read, predicting(view)))

    assert of(1, 2) == set()
    assert of() == {"no_gradient"}
    assert of(2, 3) == {"label_shift"}
    assert of(0, 1) == {"labels_shifted_twice"}
    assert of(2) == {"first_token_dropped"}
    assert of(1) == {"end_token_dropped"}
    assert of(0, 1, 2) == {"prompt_in_loss"}
    assert of(1, 2, 3) == {"padding_in_loss"} == of(1, 2, 4)
    assert of(0, 1, 2, 3, 4) == {"prompt_in_loss", "padding_in_loss"}


# --- What it says ---


def test_a_report_has_all_parts_and_fits_a_terminal():
    finding = found("label_shift", "row 0: gradient at 3, expected at 2")
    text = report([finding, finding])
    assert text.startswith("1. ") and "\n\n2. " in text
    for part in (finding.evidence, finding.remedy, finding.seen, "[label_shift]"):
        assert part in re.sub(r"\s+", " ", text)
    assert max(map(len, text.splitlines())) <= 88
    assert report([]) == NOTHING


def test_every_fault_is_described():
    for name, words in catalogue().items():
        assert set(words) - {"seen"} == {"symptom", "cause", "remedy"}, name


# --- Runs: their numbers, on both sides of every line ---


def record(n=100, objective=None, config=None, **numbers):
    """A record whose numbers are functions of 0 .. 1."""
    lines = []
    for i in range(n):
        line = {"step": i + 1, "loss": 1.0 - 0.9 * i / n}
        for name, value in numbers.items():
            line[name] = value(i / n) if callable(value) else value
        lines.append(line)
    return Record(lines, config, objective)


def falling(x):
    return 1.0 - 0.9 * x


T3 = Objective(temperature=3.0)
CONFIG = TrainConfig(steps=100, max_grad_norm=0.5, max_new_tokens=7)
LINES = [
    # check, numbers that are healthy, numbers that are not, its name
    (optimisation.loss_and_parts, {"loss": 9.0, "soft": 1.0},
     {"soft": 1.0, "loss": 1.0}, "t2_missing"),
    (optimisation.loss_and_parts, {"loss": 9.0, "soft": 1.0},
     {"soft": 1.0, "loss": 9.1}, "wrong_scale"),
    (optimisation.learning_rate, {"learning_rate": 2e-7}, {"learning_rate": 0.9e-7},
     "learning_rate_zero"),
    (optimisation.warmup, {"learning_rate": 1.0}, {"learning_rate": 1.0, "loss":
     lambda x: 1.0 + 3 * (x > 0.02)}, "no_warmup"),
    (optimisation.diverging, {"loss": lambda x: 1 + 0.4 * x}, {"loss": lambda x: 1 + x},
     "diverging"),
    (optimisation.not_learning, {}, {"loss": 1.0}, "not_learning"),
    (optimisation.not_learning, {"loss": 0.04}, {"loss": 0.06}, "not_learning"),
    (optimisation.not_learning, {"kl": 1.0}, {"kl": 1.0, "loss": 1.0}, "not_learning"),
    (optimisation.not_learning, {"kl": falling, "loss": 1.0},
     {"kl": lambda x: 1 - 0.01 * x, "loss": 1.0}, "not_learning"),
    (optimisation.vanishing, {"grad_norm": 1e-5}, {"grad_norm": 1e-7},
     "gradient_vanishes"),
    (optimisation.clipped, {"grad_norm": 4.9}, {"grad_norm": 5.1}, "always_clipped"),
    (optimisation.spikes, {"grad_norm": lambda x: 1 + 90 * (x == 0.5)},
     {"grad_norm": lambda x: 1 + 110 * (x == 0.5)}, "gradient_spikes"),
    (fidelity.fidelity_stuck, {"kl": falling}, {"kl": 1.0}, "fidelity_stuck"),
    (fidelity.late_positions, {"kl_quarter_1": falling, "kl_quarter_4": falling},
     {"kl_quarter_1": falling, "kl_quarter_4": 1.0}, "late_positions_stuck"),
    (fidelity.support, {"teacher_mass": 0.9, "off_support": 0.3, "kl": 0.11},
     {"teacher_mass": 0.9, "off_support": 0.5, "kl": 0.3}, "top_k_renormalised"),
    (fidelity.support, {"teacher_mass": 0.9, "off_support": 0.06, "kl": 0.1},
     {"teacher_mass": 0.9, "off_support": 0.04, "kl": 0.1}, "top_k_tail_cut"),
    (fidelity.support, {"teacher_mass": 0.99, "off_support": 0.001, "kl": 0.1},
     {"teacher_mass": 0.9, "off_support": 0.001, "kl": -0.1}, "top_k_tail_cut"),
    (fidelity.sureness, {"entropy_gap": lambda x: 5 - 4 * x},
     {"entropy_gap": lambda x: x}, "too_flat"),
    (fidelity.sureness, {"entropy_gap": -0.09}, {"entropy_gap": -0.11},
     "overconfident"),
    (fidelity.teacher_mass, {"teacher_mass": 0.95}, {"teacher_mass": 0.85},
     "teacher_mass_low"),
    (fidelity.unfinished, {"unfinished": 0.9}, {"unfinished": 1.0},
     "unfinished_responses"),
    (optimisation.throughput, {"tokens_per_s": lambda x: 10 - 7 * x},
     {"tokens_per_s": lambda x: 10 if x < 0.5 else 1}, "throughput_collapses"),
    (optimisation.memory, {"peak_memory": lambda x: 5.0 + min(x, 0.6)},
     {"peak_memory": lambda x: 1.0 + 4 * x}, "memory_grows"),
]  # fmt: skip


@pytest.mark.parametrize(("check", "right", "wrong", "name"), LINES)
def test_both_sides_of_a_line(check, right, wrong, name):
    objective = T3 if check is optimisation.loss_and_parts else Objective()
    assert check(record(objective=objective, config=CONFIG, **right)) is None
    finding = check(record(objective=objective, config=CONFIG, **wrong))
    assert finding.name == name and re.search(r"\d", finding.evidence)


def test_the_soft_part_against_the_kl():
    def of(soft, objective=None, **more):
        objective = objective or Objective()
        made = record(objective=objective, soft=soft, kl=1.0, **more)
        finding = optimisation.soft_and_kl(made)
        return finding and finding.name

    assert of(1.0) is of(0.3) is of(3.9) is None
    assert of(0.2) == "padding_in_denominator"
    assert of(1e-3) == "mean_over_vocabulary"
    assert of(100.0) == "sum_for_mean"
    for other in (T3, Objective("reverse_kl"), Objective(reduction="sum")):
        assert of(1e-3, other) is None  # another number, or another temperature
        assert of(-1.0, other) == "wrong_sign"
    assert of(-1.0) == "wrong_sign"
    assert of(-0.04, T3) is None  # an estimate from samples may be below 0


def test_a_scale_is_one_number_for_the_run():
    """Beside a loss of other targets the KL goes its own way."""
    moving = record(objective=Objective(), soft=lambda x: 9 - 8 * x, kl=0.5)
    assert optimisation.soft_and_kl(moving) is None
    steady = record(objective=Objective(), soft=lambda x: 9 - x, kl=0.5)
    assert optimisation.soft_and_kl(steady).name == "sum_for_mean"


def test_a_loss_that_is_minus_its_parts():
    made = record(objective=T3, soft=1.0, loss=-9.0)
    assert optimisation.loss_and_parts(made).name == "wrong_sign"
    made = record(objective=T3, soft=1.0, loss=-8.0)
    assert optimisation.loss_and_parts(made).name == "wrong_scale"


def test_the_kl_of_two_events_is_no_more_than_the_kl():
    """The inequality itself: no bucket, however far the student is, is a finding."""
    generator = torch.Generator().manual_seed(0)
    for sharp in (0.1, 1.0, 5.0, 20.0):
        teacher, student = torch.randn(2, 64, 30, generator=generator) * sharp
        for k in (1, 4, 29):
            for t in (1.0, 3.0):
                targets = top_k_targets(teacher, k, temperature=t)
                line = {n: float(x) for n, x in measured(student, targets).items()}
                line |= {"step": 1, "loss": 1.0}
                assert fidelity.support(Record([line])) is None, (sharp, k, t)


def test_targets_without_their_tail_are_told_by_the_mass_off_support():
    teacher = torch.zeros(4, 10)
    teacher[:, 0] = 3.0  # 0.69 of the probability
    student = torch.zeros(4, 10)  # 0.1
    student[:, 0] = 9.0  # nearly all
    for logits, tail, name in (
        (torch.zeros(4, 10), "renormalize", "top_k_renormalised"),
        (student, "zero", "top_k_tail_cut"),
        (torch.zeros(4, 10), "bucket", None),
        (student, "bucket", None),
    ):
        line = measured(logits, top_k_targets(teacher, 1, tail))
        line = {n: float(x) for n, x in line.items()} | {"step": 1, "loss": 1.0}
        finding = fidelity.support(Record([line]))
        assert (finding and finding.name) == name


def test_hard_labels_and_a_seeker_of_modes_may_leave_the_tail():
    numbers = {"teacher_mass": 0.9, "off_support": 0.01, "kl": 0.2}
    for objective in (None, Objective("reverse_kl"), Objective(hard_weight=0.5)):
        assert fidelity.support(record(objective=objective, **numbers)) is None
    assert fidelity.support(record(objective=Objective(), **numbers)) is not None


def test_late_positions_that_are_behind():
    def of(late, **more):
        made = record(kl_quarter_1=falling, kl_quarter_4=late, **more)
        finding = fidelity.late_positions(made)
        return finding and finding.name

    assert of(lambda x: 1 - 0.1 * x) == "late_positions_stuck"
    assert of(lambda x: 1 - 0.7 * x) is None  # it falls, if slowly
    assert of(0.2) is None  # it stands where the beginning will
    assert of(0.04) is None  # nothing to learn
    # Steps that the student writes are other texts, and no trend.
    where = {"kl_quarter_4": lambda x: 1 + (x > 0.5)}
    mixed = record(kl_quarter_1=falling, **where)
    for i, line in enumerate(mixed.lines):
        line["student_written"] = float(i >= 60)
        line["kl_quarter_4"] = 1.0 if i >= 60 else 1.0 - i / 60
    assert fidelity.late_positions(mixed) is None


def test_what_writers_unlike_each_other_give_is_no_trend():
    """A run that is half on-policy, and ends with the student's own texts."""
    lines = record(100, loss=falling, kl=falling, learning_rate=1.0).lines
    for i, line in enumerate(lines):
        if i % 5 == 0 or i > 90:
            line.update(student_written=1.0, loss=3.0, kl=3.0)
        else:
            line["student_written"] = 0.0
    mixed = Record(lines)
    assert len(mixed.of_one_writer.lines) == 72
    assert optimisation.not_learning(mixed) is None
    assert optimisation.diverging(mixed) is None
    assert optimisation.warmup(Record(lines[1:])) is None
    assert fidelity.fidelity_stuck(mixed) is None
    assert fidelity.against_floor(mixed, 0.0) == []
    short = Record(lines[:20])
    assert optimisation.not_learning(short) is None


def test_an_agreement_that_rises_is_no_standstill():
    """Total variation, say: its student may well go away from its teacher in KL."""
    rising = record(kl=1.0, agreement=lambda x: 0.1 + 0.3 * x)
    assert fidelity.fidelity_stuck(rising) is None
    finding = fidelity.fidelity_stuck(record(kl=1.0, agreement=lambda x: 0.1 * x))
    assert finding.evidence.endswith("the agreement from 0.01 to 0.08")


def test_a_spike_beside_next_to_nothing_is_none():
    """A student that begins as its teacher: every gradient is rounding, but one."""
    quiet = record(grad_norm=lambda x: 3.0 if x == 0.5 else 1e-3)
    assert optimisation.spikes(quiet) is None
    loud = record(grad_norm=lambda x: 30.0 if x == 0.5 else 1e-3)
    assert optimisation.spikes(loud).name == "gradient_spikes"


COLUMNS = (
    "loss", "soft", "hard", "kl", "agreement", "entropy_gap", "teacher_mass",
    "off_support", "kl_quarter_1", "kl_quarter_4", "grad_norm", "learning_rate",
    "tokens_per_s", "peak_memory", "unfinished", "student_written",
)  # fmt: skip


@hypothesis.settings(max_examples=150)
@hypothesis.given(
    columns=st.dictionaries(
        st.sampled_from(COLUMNS),
        st.lists(st.sampled_from([None, 0.0, -1.0, 1e-9, 0.5, 1.0, 1e6]), max_size=9),
    ),
    steps=st.sampled_from([1, 2, 5, 19, 20, 21, 60]),
    objective=st.sampled_from([None, Objective(), T3, Objective("reverse_kl")]),
)
def test_no_check_raises_whatever_a_record_lacks(columns, steps, objective):
    lines = []
    for i in range(steps):
        line = {"step": i + 1, "loss": None}
        line |= {name: x[i % len(x)] for name, x in columns.items() if x}
        lines.append(line)
    made = Record(lines, CONFIG if objective else None, objective, 100, {"a": 1})
    for check in runs.CHECKS:
        check(made)
    fidelity.against_floor(made, 0.0)


def test_a_start_that_is_worse_than_a_guess():
    made = record(kl=12.0)
    assert optimisation.starts_too_high(made) is None  # the vocabulary is not known
    made = replace(made, vocabulary=1000)
    assert optimisation.starts_too_high(made) is None  # 2 log 1000 = 13.8
    assert (
        optimisation.starts_too_high(replace(made, vocabulary=100)).name
        == "starts_too_high"
    )


def test_hard_labels_and_reverse_kl_may_be_sure():
    for objective in (Objective(hard_weight=1.0), Objective("reverse_kl")):
        assert fidelity.sureness(record(objective=objective, entropy_gap=-1.0)) is None


def test_the_floor():
    def of(kl, floor):
        return names(fidelity.against_floor(record(kl=kl), floor))

    settled = lambda x: max(0.4, 2 - 8 * x)  # noqa: E731
    assert of(settled, 0.0) == {"plateau_above_floor"}
    assert of(settled, 0.38) == set()
    assert of(falling, 0.0) == set()  # it is still on its way
    assert of(settled, 0.5) == {"below_floor"}
    assert of(settled, 0.44) == set()
    assert fidelity.against_floor(record(), 0.0) == []


def test_validation_elsewhere():
    made = record(kl=0.1)
    for kl, name in ((0.4, None), (0.5, "validation_far")):
        validated = replace(made, validation={"student": {"kl": kl}})
        finding = fidelity.validation(validated)
        assert (finding and finding.name) == name


def test_short_runs_have_no_trend():
    assert optimisation.not_learning(record(19, loss=1.0)) is None
    assert optimisation.diverging(record(19, loss=lambda x: 1 + 9 * x)) is None


def test_what_one_finding_explains_is_left_out(tmp_path):
    lines = record(40, loss=1.0, learning_rate=1e-9).lines
    (tmp_path / "metrics.jsonl").write_text("\n".join(map(json.dumps, lines)))
    assert names(examine_run(tmp_path)) == {"learning_rate_zero"}
    assert optimisation.not_learning(Record(lines)) is not None


def test_tenths():
    made = record(30, loss=lambda x: x)
    assert made.tenths("loss") == pytest.approx([(3 * i + 1) / 30 for i in range(10)])
    assert record(3, kl=2.0).tenths("kl") == [2.0] * 3
    assert made.tenths("none") == []


def test_a_folder_that_is_no_run(tmp_path):
    with pytest.raises(DataError, match="metrics.jsonl does not exist"):
        examine_run(tmp_path)
    file = tmp_path / "metrics.jsonl"
    line = '{"step": 1, "loss": 2.0}\n'
    for text, said in (
        ("", "no whole line"),
        ('{"step": 1', "no whole line"),  # cut off by a kill
        ('{"step": 1}\n', "line 1"),
        ("{\n" + line, "line 1"),
        (line + "3\n" + line, "line 2"),
        (line + '{"step": 2, "loss": "low"}\n', "line 2(.|\n)*'low'"),
    ):
        file.write_text(text)
        with pytest.raises(DataError, match=said):
            examine_run(tmp_path)
    file.write_text("[1, 2]\n")
    with pytest.raises(DataError, match="has no names"):
        examine_run(tmp_path)
    file.write_bytes(bytes(range(256)))
    with pytest.raises(DataError, match="cannot be read as text"):
        examine_run(tmp_path)
    file.write_text('{"step": 1, "loss": 2.0}\n')
    assert examine_run(tmp_path) == []
    (tmp_path / "result.json").write_text("[")
    with pytest.raises(DataError, match="result.json"):
        examine_run(tmp_path)
    (tmp_path / "result.json").write_text('{"settings": {"train": {"stepz": 3}}}')
    with pytest.raises(DataError, match="not kdlib's"):
        examine_run(tmp_path)


def test_a_line_that_is_being_written_is_left_out(tmp_path):
    text = '{"step": 1, "loss": 2.0}\n{"step": 2, "loss": 1.0}'
    (tmp_path / "metrics.jsonl").write_text(text[:-1])
    assert Record.read(tmp_path).values("loss") == [2.0]
    (tmp_path / "metrics.jsonl").write_text(text)  # whole, but for its end of line
    assert Record.read(tmp_path).values("loss") == [2.0, 1.0]


def test_what_may_not_be_read_is_named(tmp_path, monkeypatch, capsys):
    read = Path.read_text

    def refuse(self, *args, **options):
        if self.name == "metrics.jsonl":
            raise PermissionError(13, "Permission denied")
        return read(self, *args, **options)

    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "loss": 2.0}\n')
    monkeypatch.setattr(Path, "read_text", refuse)
    assert main(["doctor", str(tmp_path / "metrics.jsonl")]) == 2
    said = capsys.readouterr().err
    assert "metrics.jsonl cannot be read" in said and "Remedy" in said


def test_nothing_found_is_no_verdict_where_nothing_can_be_seen(tmp_path, capsys):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "loss": 2.0}\n')
    assert main(["doctor", str(tmp_path)]) == 0
    said = capsys.readouterr()
    assert said.out.strip() == NOTHING
    assert "trends (1 steps of at least 20), scale (no settings" in said.err
    assert record(20, kl=1.0, objective=Objective()).unseen == []
    assert len(record(19, kl=1.0, objective=Objective()).unseen) == 1


def test_a_run_is_examined_without_what_another_version_left(tmp_path):
    """Its numbers are there: settings and validation are left out, not the run."""
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "loss": null}\n\n')
    for text in ('{"validation": {"kl": 3}}', '{"validation": [1]}', "{}"):
        (tmp_path / "result.json").write_text(text)
        assert names(examine_run(tmp_path)) == {"loss_not_finite"}
    place = tmp_path / "checkpoints" / "step-00000001"
    place.mkdir(parents=True)
    (place / "manifest.json").write_text('{"format": "kdlib checkpoint 7"}')
    with pytest.warns(UserWarning, match="step-00000001"):
        assert names(examine_run(tmp_path)) == {"loss_not_finite"}


def test_nan_in_the_metrics_of_another_writer(tmp_path):
    text = '{"step": 1, "loss": 2.0, "kl": NaN}\n{"step": 2, "loss": -Infinity}\n'
    (tmp_path / "metrics.jsonl").write_text(text)
    (finding,) = examine_run(tmp_path)
    assert finding.name == "loss_not_finite"
    assert finding.evidence == "no loss at 1 steps, first 2"


@pytest.mark.slow
@pytest.mark.parametrize("run", RUNS, ids=lambda run: run.name)
def test_every_run_gets_its_finding(run, tmp_path, run_bench):
    run.make(run_bench, tmp_path / "run")
    findings = examine_run(tmp_path / "run", floor=run.floor)
    findings = [f for f in findings if f.name not in MACHINE or f.name in run.expected]
    assert names(findings) == run.expected, report(findings)


# How fast the machine is, and what else it does, is no business of this test.
MACHINE = {"throughput_collapses", "memory_grows"}


@pytest.fixture(scope="module")
def run_bench():
    return doctor_runs.Bench()


# --- The command ---


@pytest.fixture
def settings(tmp_path):
    """Write a settings file and its data."""

    def write(rows, **data):
        lines = (json.dumps(vars(row)) for row in rows)
        (tmp_path / "data.jsonl").write_text("\n".join(lines))
        tables = {
            "train": {"steps": 2, "batch_size": 4, "checkpoint_every": 1},
            "data": {"source": str(tmp_path / "data.jsonl"), **data},
            "teacher": {"model": "teacher"},
            "student": {"first_layers": 1},
        }
        text = ""
        for name, table in tables.items():
            text += f"[{name}]\n"
            text += "".join(f"{k} = {json.dumps(v)}\n" for k, v in table.items())
        (tmp_path / "run.toml").write_text(text)
        return str(tmp_path / "run.toml")

    return write


def rows():
    return localize.examples("test", locales=["fr"], formats=["long"], limit=12)


def test_the_command_on_settings_and_on_their_run(settings, tmp_path, capsys):
    file = settings(rows())
    assert main(["doctor", file]) == 0
    assert capsys.readouterr().out.strip() == NOTHING
    assert main(["train", file, "--out", str(tmp_path / "out")]) == 0
    capsys.readouterr()
    assert main(["doctor", str(tmp_path / "out"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == []
    made = Record.read(tmp_path / "out")
    assert made.vocabulary == 1024 and made.config.steps == 2
    (tmp_path / "out" / "result.json").unlink()  # as of a run that is under way
    assert Record.read(tmp_path / "out").config.steps == 2


def test_the_command_counts_what_all_examples_lose(settings, capsys):
    longest = replace(rows()[0], context="x " * 50 + rows()[0].context)
    file = settings([*rows(), longest], teacher_max_length=60)
    assert main(["doctor", file, "--json"]) == 1
    (finding,) = json.loads(capsys.readouterr().out)
    assert finding["name"] == "truncated_teacher_context"
    assert "1 of 13 examples" in finding["evidence"]
    assert main(["doctor", file]) == 1
    assert "truncated_teacher_context" in capsys.readouterr().out


def test_the_command_refuses_what_it_cannot_read(settings, tmp_path, capsys):
    for arguments, said in (
        ([str(tmp_path / "none")], "does not exist"),
        ([str(tmp_path)], "metrics.jsonl does not exist"),
        ([str(tmp_path / "metrics.jsonl")], "metrics.jsonl does not exist"),
        ([str(tmp_path), "--floor", "nan"], "floor=nan"),
        ([str(tmp_path), "--floor", "-0.1"], "floor=-0.1"),
        ([settings(rows()), "--floor", "0"], "leave it out"),
        ([str(tmp_path / "data.jsonl")], "no settings file"),
    ):
        assert main(["doctor", *arguments]) == 2
        assert said in capsys.readouterr().err


def test_the_command_s_teacher_prompt_ends_where_answers_begin(
    settings, monkeypatch, capsys
):
    """A template without its generation prompt, as a settings file can have it."""
    plain = PairCollator.encode

    def encode(self, example, example_id=0):
        pair = plain(self, example, example_id)
        return replace(pair, teacher_prompt_ids=pair.teacher_prompt_ids[:-1])

    file = settings(rows())
    monkeypatch.setattr(PairCollator, "encode", encode)
    assert main(["doctor", file, "--json"]) == 1
    assert "unexpected_start" in capsys.readouterr().out
