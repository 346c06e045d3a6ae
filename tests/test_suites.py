"""Questions whose answer is a test suite, and the losses that are put to it.

The right losses are held to closed forms that stand here, in plain Python; each wrong
one has to differ from them, and from every other wrong one.
"""

from __future__ import annotations

import itertools
from functools import cache
from math import exp, fsum, log

import pytest
import torch

from kdlib.checks import losses, suite
from kdlib.checks.losses import IDEAS, RIGHT, WRONG

V, RESPONSES = 11, [(2, 2), (4, 4), (3, 1)]  # each row's first place and length
CASES = [(2.0, 1.0), (2.0, 3.0), (10.0, 1.0), (900.0, 1.0)]  # the logits' size, T


def batch(size, *, vocab=V):
    generator = torch.Generator().manual_seed(0)
    labels = torch.full((len(RESPONSES), 9), -100)
    for row, (first, n) in enumerate(RESPONSES):
        labels[row, first : first + n] = 1 + torch.arange(n)
    labels[1, 5] = 0  # a token like any other
    shape = (2, *labels.shape, vocab)
    s, t = size * torch.randn(shape, generator=generator, dtype=torch.float64)
    return s, t, labels


def log_softmax(logits):
    top = max(logits)
    return [x - top - log(fsum(exp(y - top) for y in logits)) for x in logits]


def closed_form(s, t, labels, temperature):
    """T^2 KL(p_t || p_s), its mean over the tokens, and its slope T (p_s - p_t) / N."""
    places = [
        (row, at - 1)
        for row, at in itertools.product(range(len(labels)), range(1, labels.shape[1]))
        if labels[row, at] != -100
    ]
    terms, slope = [], torch.zeros_like(s)
    for row, at in places:
        log_q, log_p = (
            log_softmax([x / temperature for x in logits[row, at].tolist()])
            for logits in (s, t)
        )
        pairs = list(zip(log_p, log_q, strict=True))
        terms += [exp(a) * (a - b) for a, b in pairs]
        slope[row, at] = torch.tensor(
            [temperature * (exp(b) - exp(a)) / len(places) for a, b in pairs],
            dtype=torch.float64,
        )
    return temperature**2 * fsum(terms) / len(places), slope


@cache
def truth(size, temperature):
    return closed_form(*batch(size), temperature)


def asked(loss, s, t, labels, temperature):
    s = s.clone().requires_grad_()
    value = loss(s, t, labels, temperature=temperature)
    return value.item(), torch.autograd.grad(value, s)[0].double()


def agrees(loss, size, temperature, rtol, atol=1e-12):
    value, slope = asked(loss, *batch(size), temperature)
    wanted, right_slope = truth(size, temperature)
    return abs(value - wanted) <= rtol * abs(wanted) + atol and torch.allclose(
        slope, right_slope, rtol=rtol, atol=atol
    )


def test_the_closed_form_of_this_file_by_hand():
    """Two words: p = (3/4, 1/4), q = (1/2, 1/2), one token."""
    t = torch.tensor([[[log(3.0), 0.0], [0.0, 0.0]]], dtype=torch.float64)
    value, slope = closed_form(torch.zeros_like(t), t, torch.tensor([[-100, 1]]), 1.0)
    assert value == pytest.approx(0.75 * log(1.5) + 0.25 * log(0.5), abs=1e-15)
    assert slope[0].tolist() == [pytest.approx([-0.25, 0.25]), [0, 0]]


@pytest.mark.parametrize("size, temperature", CASES)
@pytest.mark.parametrize("name", RIGHT)
def test_a_right_loss_has_the_value_and_gradient_of_its_formula(
    name, size, temperature
):
    close = {"rtol": 1e-5, "atol": 1e-7} if "float32" in name else {"rtol": 1e-10}
    assert agrees(RIGHT[name], size, temperature, **close)


@pytest.mark.parametrize("wrong", WRONG, ids=lambda x: x.name)
def test_a_wrong_loss_is_wrong_by_more_than_rounding(wrong):
    """A test that allows what the task allows, 1e-4, finds it."""
    assert not all(agrees(wrong.loss, *case, rtol=1e-3, atol=1e-4) for case in CASES)


def test_no_two_wrong_losses_are_one():
    shown = []
    for wrong in WRONG:
        answers = [asked(wrong.loss, *batch(size), t) for size, t in CASES]
        values = torch.tensor([value for value, _ in answers], dtype=torch.float64)
        shown.append((wrong.name, values, torch.stack([x for _, x in answers])))

    def same(a, b):
        return torch.allclose(a, b, rtol=1e-6, atol=1e-9, equal_nan=True)

    for (name, *mine), (other, *theirs) in itertools.combinations(shown, 2):
        assert not all(map(same, mine, theirs)), f"{name} is {other}"


def test_there_are_thirty_under_six_ideas():
    """The exercise's text says thirty, and that each has one mistake."""
    assert len(WRONG) == 30 and len({x.name for x in WRONG}) == 30
    assert {x.idea for x in WRONG} == set(IDEAS)
    assert len(RIGHT) == 6 and all(x.does for x in WRONG)


# --- Grading a suite ---


def reference(loss):
    for size, temperature in CASES:
        assert agrees(loss, size, temperature, rtol=1e-4, atol=1e-6)


QUESTION = suite.Suite(
    "9.6", "test_loss", ("loss",), lambda: RIGHT, lambda: WRONG, lambda: IDEAS
)


def test_a_suite_that_kills_all_is_right():
    verdict = QUESTION.grade(reference)
    assert (verdict.outcome, verdict.points, verdict.bug) == ("right", 30, None)


@pytest.mark.parametrize("wrong", WRONG, ids=lambda x: x.name)
def test_the_reference_suite_kills_each_by_a_failed_assertion(wrong):
    with pytest.raises(AssertionError):
        reference(wrong.loss)


def few(right=("masked after the divergence",), wrong=("sign", "sum")):
    """A question of few losses."""
    return suite.Suite(
        "9.6",
        "test_loss",
        ("loss",),
        lambda: {name: RIGHT[name] for name in right},
        lambda: [x for x in WRONG if x.name in wrong],
        lambda: IDEAS,
    )


def value(loss):
    s, t, labels = batch(2.0)
    return loss(s, t, labels).item()


def test_a_point_for_each_that_is_killed_and_the_survivor_is_named():
    verdict = few().grade(lambda loss: value(loss) >= 0)
    assert (verdict.outcome, verdict.points, verdict.out_of) == ("wrong", 1, 2)
    assert verdict.bug == "mean untested"
    assert "One that passes: sum, not divided." in verdict.message


def test_one_right_loss_rejected_costs_everything():
    def strict(loss):
        right, _ = closed_form(*batch(2.0), 1.0)
        assert abs(value(loss) - right) < 1e-13

    verdict = few(right=tuple(RIGHT)).grade(strict)
    assert (verdict.points, verdict.bug) == (0, "rejects a right loss")
    assert "It rejects a right loss: computed in float32." in verdict.message
    assert "AssertionError" in verdict.message and "in line" in verdict.message


def test_an_error_of_the_suite_itself_is_shown_with_its_line():
    def broken(loss):
        loss(undefined)  # noqa: F821

    verdict = few().grade(broken)
    assert (verdict.points, verdict.bug) == (0, "rejects every loss")
    assert "NameError: name 'undefined' is not defined" in verdict.message
    assert "loss(undefined)" in verdict.message


@pytest.mark.parametrize("leave", [SystemExit, GeneratorExit, RecursionError])
def test_nothing_that_a_suite_raises_gets_out(leave):
    def suite_that_leaves(loss):
        raise leave()

    assert few().grade(suite_that_leaves).bug == "rejects every loss"


def test_a_suite_without_end_is_told_so(monkeypatch):
    monkeypatch.setitem(suite.attempt.__globals__, "SECONDS", 0.2)

    def endless(loss):
        while True:
            pass

    verdict = few().grade(endless)
    assert (verdict.outcome, verdict.points) == ("raised", 0)
    assert verdict.bug == "endless loop" and "did not come back" in verdict.message


def test_a_suite_without_end_for_a_wrong_loss_alone_is_told_so(monkeypatch):
    monkeypatch.setitem(suite.attempt.__globals__, "SECONDS", 0.2)

    def until_it_is_positive(loss):
        while value(loss) < 0:
            pass

    verdict = few().grade(until_it_is_positive)
    assert (verdict.outcome, verdict.bug) == ("raised", "endless loop")


def test_a_suite_too_slow_for_all_is_told_so(monkeypatch):
    monkeypatch.setattr(suite, "ALL_SECONDS", 0.0)
    verdict = few().grade(reference)
    assert (verdict.outcome, verdict.bug) == ("raised", "too slow")
    assert "All losses together" in verdict.message


@pytest.mark.parametrize("answer", [..., None])
def test_not_attempted(answer):
    assert few().grade(answer).outcome == "not attempted"


@pytest.mark.parametrize("answer", [3, "tests", torch.ones(2)])
def test_what_is_no_function_is_told_so(answer):
    assert few().grade(answer).bug == "not a function"


@pytest.mark.parametrize("given", [1.0, "right", torch.ones(()), torch.ones(2) > 0])
def test_what_is_no_answer_is_told_so(given):
    verdict = few().grade(lambda loss: given)
    assert (verdict.points, verdict.bug) == (0, "wrong type")


def test_false_rejects_in_python_torch_and_numpy():
    def kinds(loss):
        return torch.tensor(value(loss) >= 0)

    def numpy_kinds(loss):
        return kinds(loss).numpy()[()]

    for answer in (kinds, numpy_kinds):
        assert few(wrong=("sign",)).grade(answer).outcome == "right"


def test_a_suite_that_counts_its_calls_is_found_out():
    calls = []

    def first_is_right(loss):
        calls.append(loss)
        assert len(calls) == 1

    assert few().grade(first_is_right).bug == "depends on what came before"


def test_a_suite_sees_the_same_random_numbers_and_disturbs_none():
    seen = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        before = torch.random.get_rng_state()
        with torch.no_grad():
            few().grade(lambda loss: seen.append(torch.rand(1).item()))
        assert torch.equal(before, torch.random.get_rng_state())
    assert len(seen) == 8 and len(set(seen)) == 1  # right, two wrong, right; twice


def test_the_loss_does_not_tell_its_name():
    names = set()
    few().grade(lambda loss: names.add((loss.__name__, loss.__doc__)))
    assert len(names) == 1


def test_a_loss_is_assembled_of_right_parts_but_for_one():
    assert agrees(losses.assembled(), 2.0, 3.0, rtol=1e-12)
