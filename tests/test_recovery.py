"""Gain, floor and recovery: against enumeration, and against one forward pass a row."""

from __future__ import annotations

import math

import pytest
import torch

from kdlib import exact, localize, models
from kdlib.divergences import forward_kl
from kdlib.errors import ArgumentError, DataError
from kdlib.ledger import mean_interval, ratio_interval, t95
from kdlib.pairs import PairCollator
from kdlib.recovery import best_student, measure_recovery
from kdlib.sampling import complete

INPUTS = [datum.english for datum in localize.load_split("validation")[:40:8]]


@pytest.fixture(scope="module")
def teacher():
    return models.load()


@pytest.fixture(scope="module")
def collator(teacher):
    return PairCollator(teacher[1])


@pytest.fixture(scope="module")
def contexts():
    return [localize.instruction(locale, "long") for locale in ("fr", "de", "es")]


# --- The best student, by enumeration ---


def tables(contexts=3, vocab=4, length=3, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return exact.ExactLM(
        [
            2 * torch.randn(contexts, vocab**t, vocab, generator=generator).double()
            for t in range(length)
        ]
    )


@pytest.mark.parametrize("prior", [[1 / 3] * 3, [0.6, 0.3, 0.1]])
def test_the_mixture_s_loss_is_the_information_that_the_context_has(prior):
    """sum_c Pr(c) sum_y Pr_t(y | c) sum_i KL_i  =  I(Y; C)."""
    teacher = tables()
    everything = exact.sequences(teacher.vocab, teacher.length)
    joint = teacher.log_probs().exp()  # [C, V^L]
    log_prior = torch.tensor(prior, dtype=torch.float64).log()
    total = 0.0
    for number, y in enumerate(everything):
        prefix, rows = 0, []
        for table, token in zip(teacher.tables, y, strict=True):
            rows.append(table[:, prefix].log_softmax(-1))
            prefix = prefix * teacher.vocab + int(token)
        log_p = torch.stack(rows, 1)  # [C, L, V]
        best = best_student(log_p, y, log_prior)
        for c, weight in enumerate(prior):
            total += weight * joint[c, number] * forward_kl(best, log_p[c]).sum()
    floor, _ = exact.context_floor(teacher, prior)
    information = sum(
        w * (joint[c] * (joint[c] / (log_prior.exp() @ joint)).log()).sum()
        for c, w in enumerate(prior)
    )
    assert abs(total - floor) < 1e-10
    assert abs(total - information) < 1e-10


def test_the_mixture_is_a_distribution_and_forgets_nothing():
    log_p = torch.randn(3, 5, 7).double().log_softmax(-1)
    best = best_student(log_p, torch.tensor([0, 6, 3, 3, 1]), torch.zeros(3).double())
    assert torch.allclose(best.exp().sum(-1), torch.ones(5).double(), atol=1e-12)
    assert torch.allclose(best[0].exp(), log_p[:, 0].exp().mean(0), atol=1e-12)
    # By Bayes, token by token.
    weights = torch.full((3,), 1 / 3).double()
    for i, token in enumerate([0, 6, 3, 3, 1]):
        wanted = (weights[:, None] * log_p[:, i].exp()).sum(0)
        assert torch.allclose(best[i].exp(), wanted, atol=1e-12)
        weights = weights * log_p[:, i, token].exp()
        weights = weights / weights.sum()


# --- On the shipped teacher ---


def by_hand(model, tokenizer, collator, contexts, prior):
    """The sums of the definition, each row on its own, without padding."""
    floor = gain = tokens = 0.0
    for number, z in enumerate(INPUTS):
        full = [collator.teacher_side.prompt_ids(c, z, 16, 0)[0] for c in contexts]
        short = collator.student_side.prompt_ids("", z, 16, 0)[0]
        for own, prompt in enumerate(full):
            (y,) = complete(
                model,
                tokenizer,
                [prompt],
                max_new_tokens=16,
                temperature=1.0,
                seeds=[f"0 {number} {own}"],
                keep_end=True,
            )

            def probabilities(prompt, y=y):
                with torch.no_grad():
                    logits = model(torch.tensor([prompt + y])).logits[0]
                return logits[len(prompt) - 1 : -1].double().softmax(-1)

            p = torch.stack([probabilities(x) for x in full])
            weights = torch.tensor(prior, dtype=torch.float64)
            for i, token in enumerate(y):
                mixture = (weights[:, None] * p[:, i]).sum(0) / weights.sum()
                floor += prior[own] * (p[own, i] * (p[own, i] / mixture).log()).sum()
                weights = weights * p[:, i, token]
            alone = probabilities(short)
            gain += prior[own] * (p[own] * (p[own] / alone).log()).sum()
            tokens += prior[own] * len(y)
    return float(gain / tokens), float(floor / tokens)


@pytest.mark.parametrize("prior", [None, [0.5, 0.3, 0.2]])
def test_gain_and_floor_are_those_of_the_definition(teacher, collator, contexts, prior):
    found = measure_recovery(
        teacher[0], collator, INPUTS, contexts, prior=prior, max_new_tokens=16
    )
    gain, floor = by_hand(*teacher, collator, contexts, prior or [1 / 3] * 3)
    assert found.gain.mean == pytest.approx(gain, rel=1e-4)
    assert found.floor.mean == pytest.approx(floor, rel=1e-4)
    assert found.kl is found.recovery is None


def test_three_languages_are_told_apart_and_one_is_not(teacher, collator, contexts):
    def floor(contexts):
        return measure_recovery(teacher[0], collator, INPUTS, contexts)

    many, same, one = floor(contexts), floor(contexts[:1] * 3), floor(contexts[:1])
    assert 0 < many.floor.mean < min(many.floor_above.mean, many.gain.mean)
    # The languages part within a token or two: nearly log 3 nats a response.
    assert many.floor.mean < math.log(3)
    assert abs(same.floor.mean) < 1e-6 and abs(same.floor_above.mean) < 1e-6
    assert abs(one.floor.mean) < 1e-6 and one.floor_above is None


def test_a_teacher_without_its_context_recovers_nothing(teacher, collator, contexts):
    model = teacher[0]
    found = measure_recovery(model, collator, INPUTS, contexts, student=model)
    assert found.kl.mean == pytest.approx(found.gain.mean, rel=1e-9)
    assert found.recovery.mean == pytest.approx(0, abs=1e-9)


def test_a_student_that_sees_the_one_context_recovers_all(teacher, collator, contexts):
    """Its x' is given the context through its own side of the collator."""

    class Seeing(torch.nn.Module):
        """The teacher, which puts the context in front of what it reads."""

        def __init__(self, model, prompt, short):
            super().__init__()
            self.model, self.prompt, self.short = model, prompt, short

        def forward(self, input_ids, attention_mask, use_cache):
            more = torch.tensor([self.prompt[: len(self.prompt) - len(self.short)]])
            output = self.model(torch.cat([more, input_ids], 1))
            output.logits = output.logits[:, more.shape[1] :]
            return output

    z = INPUTS[0]
    full = collator.teacher_side.prompt_ids(contexts[0], z, 64, 0)[0]
    short = collator.student_side.prompt_ids("", z, 64, 0)[0]
    assert full[-len(short) + 1 :] == short[1:]  # all but the first token
    student = Seeing(teacher[0], full, short)
    found = measure_recovery(
        teacher[0], collator, [z, z], contexts[:1], student=student
    )
    assert found.recovery.mean == pytest.approx(1, abs=1e-5)


def test_nothing_to_take_in_is_no_recovery(teacher, collator, contexts):
    model = teacher[0]
    found = measure_recovery(
        model, collator, INPUTS, contexts[:1], simplified=contexts[0], student=model
    )
    assert abs(found.gain.mean) < 1e-6 and found.recovery is None


def test_draws_depend_on_the_seed_alone(teacher, collator, contexts):
    def floor(seed):  # without an instruction the teacher is in doubt
        return measure_recovery(
            teacher[0], collator, INPUTS[:2], ["", *contexts], draws=2, seed=seed
        ).floor

    assert floor(0) == floor(0) != floor(1)


@pytest.mark.parametrize(
    "inputs, options, error, says",
    [
        (INPUTS[:1], {}, ArgumentError, "1 user inputs"),
        (INPUTS, {"draws": 0}, ArgumentError, "draws=0"),
        (INPUTS, {"prior": [1.0]}, ArgumentError, "3 contexts, 1 prior"),
        (INPUTS, {"prior": [0.5, 0.5, 0.5]}, ArgumentError, "sum 1"),
        (INPUTS, {"prior": [1.5, -0.25, -0.25]}, ArgumentError, "positive"),
    ],
)
def test_bad_input_is_named(teacher, collator, contexts, inputs, options, error, says):
    with pytest.raises(error, match=says):
        measure_recovery(teacher[0], collator, inputs, contexts, **options)


def test_a_context_that_must_be_cut_is_refused(teacher, contexts):
    narrow = PairCollator(teacher[1], teacher_max_length=40)
    with pytest.raises(DataError, match="find no room on the teacher's side"):
        measure_recovery(teacher[0], narrow, INPUTS, contexts, max_new_tokens=16)


def test_no_context_is_named(teacher, collator):
    with pytest.raises(ArgumentError, match="0 contexts"):
        measure_recovery(teacher[0], collator, INPUTS, [])


# --- Intervals ---


@pytest.mark.parametrize(
    "freedom, known", [(1, 12.706), (10, 2.228), (11, 2.20099), (30, 2.04227)]
)
def test_student_s_t(freedom, known):
    assert t95(freedom) == pytest.approx(known, abs=2e-4)


def test_a_ratio_of_equal_denominators_is_the_mean():
    values = [0.1, 0.4, 0.35, 0.2]
    plain, ratio = (
        mean_interval(values),
        ratio_interval([2 * v for v in values], [2] * 4),
    )
    assert ratio.mean == pytest.approx(plain.mean)
    assert (ratio.low, ratio.high) == pytest.approx((plain.low, plain.high))
    assert plain.high - plain.mean == pytest.approx(3.182 * 0.13768926 / 2, rel=1e-6)


def test_a_ratio_s_interval_covers_as_often_as_it_says():
    generator = torch.Generator().manual_seed(0)
    hits, rounds = 0, 2000
    for _ in range(rounds):
        length = torch.randint(2, 12, (60,), generator=generator).double()
        noise = torch.randn(60, generator=generator).double() * length.sqrt()
        found = ratio_interval((0.3 * length + noise).tolist(), length.tolist())
        hits += found.low <= 0.3 <= found.high
    assert abs(hits / rounds - 0.95) < 0.02


def test_a_ratio_of_nothing_is_refused():
    for values, sizes in ([], []), ([1.0], [1.0]), ([1.0, 2.0], [0.0, 0.0]):
        with pytest.raises(ArgumentError):
            ratio_interval(values, sizes)
