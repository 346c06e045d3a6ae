"""on_policy.py: who writes, for which prompt, and what the training then minimises.

The students here know four tokens and write three at most, so that what they can write
is listed, and sampled numbers are held to exact ones.
"""

from __future__ import annotations

import copy
import json
import math
import random
from contextlib import contextmanager
from dataclasses import replace

import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import PreTrainedTokenizerFast

from kdlib import batching, models, on_policy
from kdlib.errors import ArgumentError
from kdlib.objective import Objective
from kdlib.on_policy import Author, write_responses
from kdlib.pairs import PairCollator, PairedExample
from kdlib.precision import Precision
from kdlib.remote import RemoteTeacher
from kdlib.sampling import complete
from kdlib.settings import TrainConfig
from kdlib.teachers import CachedTeacher, LiveTeacher
from kdlib.train import train

PAD, END, A, B = range(4)
REVERSE = Objective("reverse_kl")
CONFIG = TrainConfig(
    steps=6,
    batch_size=4,
    learning_rate=1e-2,
    checkpoint_every=2,
    lmbda=1.0,
    max_new_tokens=3,
)


@pytest.fixture(scope="module")
def tokenizer():
    words = {"<pad>": PAD, "<end>": END, "a": A, "b": B}
    backend = Tokenizer(WordLevel(words, unk_token="a"))
    backend.pre_tokenizer = WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="<pad>", eos_token="<end>"
    )


@pytest.fixture(scope="module")
def collator(tokenizer):
    return PairCollator(tokenizer)


@pytest.fixture(scope="module")
def pairs(collator):
    examples = [
        PairedExample("a", "b a", context="b b b"),
        PairedExample("b a", "a", context="b a b"),
        PairedExample("b", "b b b", context="a"),
        PairedExample("a a b", "a", context="b b a a"),
    ]
    return [collator.encode(e, 10 + i) for i, e in enumerate(examples)]


def small(tokenizer, seed=0, scale=1.0):
    model = models.build(tokenizer, hidden_size=16, layers=1, heads=2, seed=seed)
    with torch.no_grad():
        model.lm_head.weight.mul_(scale)
    return model.double()


@pytest.fixture
def student(tokenizer):
    return small(tokenizer)


@pytest.fixture
def teacher(tokenizer):
    return LiveTeacher(small(tokenizer, seed=1))


def weights(model):
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def author(config, collator, student, teacher, objective=REVERSE):
    return Author(config, objective, collator, student, teacher, Precision())


class Spy(LiveTeacher):
    """A teacher that keeps the responses it was asked about."""

    def __init__(self, model, look=lambda: None):
        super().__init__(model)
        self.asked, self.look = [], look

    def targets(self, batch):
        rows = batch.row_ids.tolist()
        responses = [[] for _ in batch.example_ids]
        for row, token in zip(rows, batch.response_ids.tolist(), strict=True):
            responses[row].append(token)
        ids = batch.example_ids.tolist()
        found = dict(zip(ids, responses, strict=True))
        self.asked.append((found, self.look()))
        return super().targets(batch)


# --- Who writes ---------------------------------------------------------------------


def test_the_share_of_student_written_steps_is_lmbda(
    collator, student, teacher, pairs, monkeypatch
):
    monkeypatch.setattr(on_policy, "complete", lambda *a, **k: [[A]] * len(pairs))
    n = 2000
    by_seed = []
    for lmbda, seed in ((0.25, 0), (0.25, 0), (0.25, 1), (0.8, 0)):
        config = replace(CONFIG, lmbda=lmbda, seed=seed)
        who = author(config, collator, student, teacher)
        written = [who.rewrite(step, pairs) != pairs for step in range(n)]
        assert abs(sum(written) - n * lmbda) < 5 * math.sqrt(n * lmbda * (1 - lmbda))
        by_seed.append(written)
    assert by_seed[0] == by_seed[1] != by_seed[2]
    # More of them with a greater lmbda, and the same ones.
    assert all(
        late for early, late in zip(by_seed[0], by_seed[3], strict=True) if early
    )


def test_without_on_policy_steps_nothing_changes(
    tokenizer, collator, pairs, teacher, monkeypatch
):
    """lmbda=0 is the loop as it was; and the die itself leaves no trace."""
    monkeypatch.setattr(on_policy, "complete", None)
    assert author(replace(CONFIG, lmbda=0.0), collator, None, None).rewrite is None
    ends = []
    for lmbda in (0.0, 1e-12):
        torch.manual_seed(5)
        config, student = replace(CONFIG, lmbda=lmbda), small(tokenizer)
        history = train(student, pairs, collator, REVERSE, config, teacher=teacher)
        ends.append((history.loss, weights(student), torch.get_rng_state()))
    assert ends[0][0] == ends[1][0]
    assert torch.equal(ends[0][1], ends[1][1])
    assert torch.equal(ends[0][2], ends[1][2])


def test_every_response_is_the_students_own_of_that_moment(
    tokenizer, collator, pairs, student
):
    spy = Spy(small(tokenizer, seed=1), look=lambda: copy.deepcopy(student))
    train(student, pairs, collator, REVERSE, CONFIG, teacher=spy)
    assert len(spy.asked) == CONFIG.steps
    for step, (responses, then) in enumerate(spy.asked):
        assert responses.keys() == {pair.example_id for pair in pairs}
        (expected,) = [
            complete(
                then,
                tokenizer,
                [pair.student_prompt_ids for pair in pairs],
                max_new_tokens=3,
                temperature=1.0,
                seeds=[f"0 {step} {pair.example_id}" for pair in pairs],
                keep_end=True,
            )
        ]
        assert [responses[pair.example_id] for pair in pairs] == expected
    # As the student changes, and the seed with the step, so do its words.
    assert len({json.dumps(responses) for responses, _ in spy.asked}) > 3


def test_both_sides_hold_the_new_response_behind_their_own_prompts(
    collator, student, teacher, pairs
):
    written = author(CONFIG, collator, student, teacher).rewrite(0, pairs)
    batch = collator.collate(written)
    for row, (old, new) in enumerate(zip(pairs, written, strict=True)):
        assert old.response_ids != new.response_ids
        for view, prompt in (
            (batch.teacher, old.teacher_prompt_ids),
            (batch.student, old.student_prompt_ids),
        ):
            ids = view.input_ids[row, view.attention_mask[row]].tolist()
            assert ids == prompt + new.response_ids


@pytest.mark.parametrize(
    ("options", "side"),
    [({"lmbda": 1.0}, "student"), ({"lmbda": 0.0, "sequence_level": True}, "teacher")],
)
def test_each_writer_reads_its_own_prompts(
    tokenizer, collator, student, teacher, pairs, options, side
):
    config = replace(CONFIG, sampling_temperature=0.0, **options)
    who = author(config, collator, student, teacher)
    written = who.rewrite(0, pairs)
    model = {"student": student, "teacher": teacher.model}[side]
    expected = complete(
        model,
        tokenizer,
        [getattr(pair, f"{side}_prompt_ids") for pair in pairs],
        max_new_tokens=3,
        keep_end=True,
    )
    assert [pair.response_ids for pair in written] == expected
    cut = sum(ids[-1] != END for ids in expected) / 4
    other = "teacher" if side == "student" else "student"
    told = {f"{side}_written": 1.0, f"{other}_written": 0.0, "unfinished": cut}
    assert who.told == told


def test_student_and_teacher_share_the_steps(
    collator, student, teacher, pairs, monkeypatch
):
    writers = []

    def note(model, *args, **options):
        writers.append(model)
        return [[A, END]] * len(pairs)

    monkeypatch.setattr(on_policy, "complete", note)
    config = replace(CONFIG, lmbda=0.5, sequence_level=True)
    who = author(config, collator, student, teacher)
    for step in range(40):
        assert who.rewrite(step, pairs)[0].response_ids == [A, END]
    assert len(writers) == 40
    assert 8 < sum(model is student for model in writers) < 32
    assert {id(model) for model in writers} == {id(student), id(teacher.model)}


# --- What is written ----------------------------------------------------------------


@pytest.mark.parametrize("ends", [False, True])
def test_only_a_response_that_ended_has_an_end_token(
    tokenizer, collator, teacher, pairs, ends, tmp_path
):
    student = small(tokenizer)
    bias = torch.zeros(4, dtype=torch.float64)
    bias[END] = 50.0 if ends else -50.0
    student.lm_head.register_forward_hook(lambda module, args, output: output + bias)
    written = write_responses(
        student, pairs, collator, side="student", max_new_tokens=3
    )
    for pair in written:
        if ends:
            assert pair.response_ids == [END]
        else:
            assert len(pair.response_ids) == 3 and END not in pair.response_ids
    folder = tmp_path / "run"
    train(student, pairs, collator, REVERSE, CONFIG, teacher=teacher, folder=folder)
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["unfinished"] for line in lines] == [1.0 - ends] * 6
    assert {json.loads(line)["student_written"] for line in lines} == {1.0}


def test_a_response_is_cut_where_a_budget_ends(tokenizer, student, pairs):
    def widths(**budgets):
        collator = PairCollator(tokenizer, **budgets)
        written = write_responses(
            student, pairs, collator, side="student", max_new_tokens=20
        )
        batch = collator.collate(written)
        assert batch.teacher.input_ids.shape[1] <= collator.teacher_side.max_length
        assert batch.student.input_ids.shape[1] <= collator.student_side.max_length
        return [pair.response_ids for pair in written]

    whole = widths()
    assert max(map(len, whole)) > 5
    prompts = [len(pair.teacher_prompt_ids) for pair in pairs]
    cut = widths(teacher_max_length=8)
    assert (
        cut == [ids[: 8 - n] for ids, n in zip(whole, prompts, strict=True)]
        and cut != whole
    )
    prompts = [len(pair.student_prompt_ids) for pair in pairs]
    cut = widths(student_max_length=5)
    assert (
        cut == [ids[: 5 - n] for ids, n in zip(whole, prompts, strict=True)]
        and cut != whole
    )


def test_the_temperature_of_sampling_is_not_the_divergences(
    collator, student, teacher, pairs, monkeypatch
):
    seen = []

    def note(*args, temperature, **options):
        seen.append(temperature)
        return [[A]] * len(pairs)

    monkeypatch.setattr(on_policy, "complete", note)
    config = replace(CONFIG, sampling_temperature=0.7)
    objective = Objective("reverse_kl", temperature=2.0)
    author(config, collator, student, teacher, objective).rewrite(0, pairs)
    assert seen == [0.7]


# --- What is minimised --------------------------------------------------------------


def sequence_kl(student, teacher, pair, length=3) -> float:
    """KL(p_s || p_t) between whole responses, by summation over all of them."""
    total, prefixes = 0.0, {(): 1.0}
    for _ in range(length):
        longer = {}
        for ids, probability in prefixes.items():
            log_p, log_q = (
                model(input_ids=torch.tensor([[*prompt, *ids]]))
                .logits[0, -1]
                .log_softmax(-1)
                for model, prompt in (
                    (student, pair.student_prompt_ids),
                    (teacher, pair.teacher_prompt_ids),
                )
            )
            p = log_p.exp()
            total += probability * float((p * (log_p - log_q)).sum())
            for token in (PAD, A, B):
                longer[*ids, token] = probability * float(p[token])
        prefixes = longer
    return total


def test_the_mean_loss_is_the_exact_divergence_of_whole_responses(
    tokenizer, collator, pairs, student, teacher
):
    """The chain rule: prefixes drawn from the student, and a reverse KL at each."""
    config = replace(CONFIG, steps=400, learning_rate=1e-12)
    objective = Objective("reverse_kl", reduction="sum")
    history = train(student, pairs, collator, objective, config, teacher=teacher)
    losses = torch.tensor(history.loss)
    with torch.no_grad():
        exact = sum(sequence_kl(student, teacher.model, pair) for pair in pairs)
        # What data drawn from somebody else would give.
        swapped = sum(sequence_kl(teacher.model, student, pair) for pair in pairs)
    error = losses.std() / math.sqrt(len(losses))
    assert abs(losses.mean() - exact) < 4 * error < 0.1 * exact
    assert abs(losses.mean() - swapped) > 8 * error


@torch.no_grad()
def mean_kl(student, teacher, pairs):
    return sum(sequence_kl(student, teacher.model, p) for p in pairs) / len(pairs)


def test_reverse_kl_falls(tokenizer, collator, pairs, student, teacher):
    before = mean_kl(student, teacher, pairs)
    config = replace(CONFIG, steps=60)
    train(student, pairs, collator, REVERSE, config, teacher=teacher)
    assert mean_kl(student, teacher, pairs) < 0.5 * before


def test_the_mean_is_over_the_tokens_that_were_written(
    collator, student, teacher, pairs
):
    """Museum 9: a loss divided by the number of the data's tokens."""
    spy = Spy(teacher.model)
    before = copy.deepcopy(student)
    config = replace(CONFIG, steps=1, micro_batch_size=3, seed=1)
    history = train(student, pairs, collator, REVERSE, config, teacher=spy)
    responses = spy.asked[0][0] | spy.asked[1][0]
    total, n = 0.0, 0
    with torch.no_grad():
        for pair in pairs:
            prefix = []
            for token in responses[pair.example_id]:
                log_p, log_q = (
                    model(input_ids=torch.tensor([[*prompt, *prefix]]))
                    .logits[0, -1]
                    .log_softmax(-1)
                    for model, prompt in (
                        (before, pair.student_prompt_ids),
                        (teacher.model, pair.teacher_prompt_ids),
                    )
                )
                total += float((log_p.exp() * (log_p - log_q)).sum())
                n += 1
                prefix.append(token)
    assert n != sum(len(pair.response_ids) for pair in pairs)
    assert history.loss == pytest.approx([total / n], rel=1e-6)


def test_sequence_level_is_training_on_what_the_teacher_wrote(
    tokenizer, collator, pairs, teacher
):
    hard = Objective(hard_weight=1.0)
    config = replace(
        CONFIG, lmbda=0.0, sequence_level=True, sampling_temperature=0.0, batch_size=4
    )
    student, ends = small(tokenizer), []
    losses = train(student, pairs, collator, hard, config, teacher=teacher).loss
    ends.append(weights(student))
    written = write_responses(
        teacher.model,
        pairs,
        collator,
        side="teacher",
        max_new_tokens=3,
        temperature=0.0,
    )
    student = small(tokenizer)
    config = replace(config, sequence_level=False)
    again = train(student, written, collator, hard, config, teacher=None).loss
    # The rows may stand in another order: the data's responses had other lengths.
    assert losses == pytest.approx(again)
    assert torch.allclose(ends[0], weights(student), rtol=1e-9)
    on_data = train(small(tokenizer), pairs, collator, hard, config, teacher=None).loss
    assert on_data != pytest.approx(again, rel=1e-2)


# --- Within the loop ----------------------------------------------------------------


@pytest.mark.parametrize("lmbda", [0.5, 1.0])
@pytest.mark.parametrize("killed_after", [3, 4, 5])
def test_a_resumed_run_writes_the_same(
    tokenizer, collator, pairs, teacher, tmp_path, lmbda, killed_after
):
    config = replace(CONFIG, lmbda=lmbda, batch_size=3)

    class Killed(BaseException):
        pass

    def kill(step, loss):
        if step == killed_after:
            raise Killed

    def run(folder, student, on_step=None):
        return train(
            student,
            pairs,
            collator,
            REVERSE,
            config,
            teacher=teacher,
            folder=folder,
            on_step=on_step,
        )

    unbroken = small(tokenizer)
    whole = run(tmp_path / "unbroken", unbroken)
    with pytest.raises(Killed):
        run(tmp_path / "killed", small(tokenizer), kill)
    torch.manual_seed(123)
    random.seed(123)
    resumed = small(tokenizer, seed=9)
    again = run(tmp_path / "killed", resumed)
    assert again.loss == whole.loss
    assert torch.equal(weights(resumed), weights(unbroken))


def test_what_is_written_does_not_depend_on_micro_batches(
    tokenizer, collator, pairs, teacher
):
    found = []
    for size in (None, 1, 3):
        config = replace(CONFIG, micro_batch_size=size)
        history = train(
            small(tokenizer), pairs, collator, REVERSE, config, teacher=teacher
        )
        found.append(history.loss)
    assert found[1] == pytest.approx(found[0]) and found[2] == pytest.approx(found[0])


def test_a_gpu_does_not_write_ahead(collator, pairs, monkeypatch):
    """What the student writes must wait for the step before."""
    asked = []

    def rewrite(step, batch):
        asked.append(step)
        return batch

    monkeypatch.setattr(batching.PairedBatch, "to", lambda self, device: self)
    steps = batching.batches_of_steps(
        pairs, collator, CONFIG, torch.device("cuda"), skip=3, rewrite=rewrite
    )
    for n in range(1, 4):
        next(steps)
        assert asked == list(range(3, 3 + n))


def test_the_student_writes_in_the_precision_of_its_training(
    tokenizer, collator, pairs, teacher
):
    student, dtypes = small(tokenizer).float(), []

    def note(module, args, output):
        dtypes.append((module.training, output.dtype))

    student.lm_head.register_forward_hook(note)
    teacher = LiveTeacher(teacher.model.float())
    for precision, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
        config = replace(CONFIG, steps=1, precision=precision)
        train(student, pairs, collator, REVERSE, config, teacher=teacher)
        assert set(dtypes) == {(False, dtype), (True, dtype)}
        dtypes.clear()


def test_a_compiled_model_writes_uncompiled(
    collator, student, teacher, pairs, monkeypatch
):
    stances = []

    @contextmanager
    def stance(name):
        stances.append(name)
        yield
        stances.append("over")

    monkeypatch.setattr(torch.compiler, "set_stance", stance)
    for compiled in (False, True):
        config = replace(CONFIG, compile=compiled)
        author(config, collator, student, teacher).rewrite(0, pairs)
    assert stances == ["force_eager", "over"]


def test_activation_checkpointing_does_not_stand_in_the_way(
    tokenizer, collator, pairs, teacher
):
    ends = []
    for checkpointed in (False, True):
        student = small(tokenizer)
        config = replace(CONFIG, activation_checkpointing=checkpointed)
        train(student, pairs, collator, REVERSE, config, teacher=teacher)
        ends.append(weights(student))
    assert torch.equal(*ends)


# --- What is refused ----------------------------------------------------------------


class Stored(CachedTeacher):
    def __init__(self):
        pass


def test_a_teacher_that_cannot_answer_or_write_is_refused(
    tokenizer, collator, student, teacher
):
    on = replace(CONFIG, lmbda=0.1)
    level = replace(CONFIG, lmbda=0.0, sequence_level=True)
    remote = RemoteTeacher("http://localhost:1", tokenizer)
    for config, bad, what in (
        (on, Stored(), "lmbda=0.1 with teacher Stored"),
        (on, None, "lmbda=0.1 with teacher NoneType"),
        (level, Stored(), "sequence_level=True with teacher Stored"),
        (level, remote, "sequence_level=True with teacher RemoteTeacher"),
        (level, None, "sequence_level=True with teacher NoneType"),
    ):
        with pytest.raises(ArgumentError, match=what) as caught:
            author(config, collator, student, bad)
        assert "LiveTeacher" in caught.value.remedy

    class Own:
        def targets(self, batch): ...

    for able in (remote, Own(), teacher):
        assert author(on, collator, student, able).rewrite


def test_a_refused_run_leaves_no_folder(collator, student, pairs, tmp_path):
    with pytest.raises(ArgumentError, match="lmbda=1.0 with teacher Stored"):
        folder = tmp_path / "run"
        train(
            student, pairs, collator, REVERSE, CONFIG, teacher=Stored(), folder=folder
        )
    assert not folder.exists()


def test_labels_that_the_student_writes_are_refused(collator, student, teacher):
    with pytest.raises(ArgumentError, match="hard_weight=0.5"):
        author(CONFIG, collator, student, teacher, Objective(hard_weight=0.5))


@pytest.mark.parametrize(
    "options",
    [
        {"lmbda": -0.1},
        {"lmbda": 1.1},
        {"lmbda": math.nan},
        {"sampling_temperature": -1.0},
        {"sampling_temperature": math.inf},
        {"max_new_tokens": 0},
        {"sequence_level": True, "teacher_offload": True},
        {"sequence_level": 1},
    ],
)
def test_bad_settings_are_refused(options):
    with pytest.raises(ArgumentError, match=next(iter(options))):
        TrainConfig(steps=1, **options)


def test_an_unknown_side_is_refused(collator, student, pairs):
    with pytest.raises(ArgumentError, match="side='pupil'"):
        write_responses(student, pairs, collator, side="pupil")
