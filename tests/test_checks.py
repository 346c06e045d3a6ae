"""The checkers' frame: four outcomes, and nothing that a student does gets through."""

from __future__ import annotations

import contextlib
import io
import re
import signal
import sys
import threading
import time
import warnings
from dataclasses import replace
from decimal import Decimal
from fractions import Fraction

import numpy as np
import pytest
import torch

from kdlib import checks
from kdlib.checks import _answers as answers
from kdlib.checks import attempt, frame, values
from kdlib.errors import ArgumentError


def cases(rng):
    for _ in range(3):
        yield [rng.randint(2, 9) for _ in range(4)], rng.randint(2, 9)


def tensors(rng):
    yield torch.tensor([float(rng.randint(2, 9)) for _ in range(4)]), 2


SUM = frame.Code(
    "9.1",
    "scaled_sum",
    ("numbers", "factor"),
    (frame.Test("lists", 2, cases), frame.Test("tensors", 1, tensors)),
    lambda numbers, factor: factor * sum(map(float, numbers)),
    (
        frame.Bug(
            "not scaled", "the factor.", lambda n, f: sum(map(float, n)), "a/b#1"
        ),
        frame.Bug("mean", "the mean.", lambda n, f: f * sum(map(float, n)) / len(n)),
    ),
)
SQUARES = frame.Code(
    "9.2",
    "squares",
    ("numbers",),
    (
        frame.Test(
            "all", 1, lambda rng: [(torch.tensor([1.0, 2.0, 3.0]),)], lambda x: (3,)
        ),
    ),
    lambda numbers: numbers**2,
    (),
)


def right(numbers, factor):
    return factor * sum(numbers)


def returns(change):
    return lambda numbers, factor: change(right(numbers, factor))


def test_right():
    verdict = SUM.grade(right)
    assert (verdict.outcome, verdict.points, verdict.bug) == ("right", 3, None)
    assert verdict.message == "9.1 scaled_sum: right (3 of 3 points)"


@pytest.mark.parametrize(
    "change",
    [
        float,
        lambda x: int(x),
        lambda x: Fraction(int(x)),
        lambda x: Decimal(int(x)),
        np.float64,
        np.float32,
        np.array,
        lambda x: torch.tensor(float(x), requires_grad=True),
        lambda x: torch.tensor(int(x)),
        lambda x: x * (1 + 1e-12),
        lambda x: np.float32(x * (1 + 1e-6)),
    ],
)
def test_any_kind_of_number_is_right(change):
    assert SUM.grade(returns(change)).outcome == "right"


@pytest.mark.parametrize("answer", [None, ...])
def test_nothing_is_not_attempted(answer):
    assert SUM.grade(answer).outcome == "not attempted"


def test_a_stub_is_not_attempted():
    def stub(numbers, factor):
        raise NotImplementedError

    def calls_a_stub(numbers, factor):
        return 1 + stub(numbers, factor)

    for answer in (stub, calls_a_stub):
        verdict = SUM.grade(answer)
        assert (verdict.outcome, verdict.points) == ("not attempted", 0)
        assert "points" not in verdict.message


def test_a_library_s_not_implemented_error_is_raised():
    def answer(numbers, factor):
        return torch.nn.Module()(numbers)

    assert SUM.grade(answer).outcome == "raised"


# --- Raised ---


def divides(numbers, factor):
    nothing = 0
    return factor / nothing


def test_raised_shows_the_input_and_the_student_s_line_and_none_of_ours():
    verdict = SUM.grade(divides)
    assert (verdict.outcome, verdict.points) == ("raised", 0)
    line = divides.__code__.co_firstlineno + 2
    lines = verdict.message.splitlines()
    assert lines[0] == "9.1 scaled_sum: raised (0 of 3 points)"
    assert lines[1] == "  Test: lists"
    assert lines[2].startswith("  Input: numbers=[") and "factor=" in lines[2]
    assert lines[3] == "  ZeroDivisionError: division by zero"
    assert lines[4] == f"      in line {line}: return factor / nothing"
    assert len(lines) == 5
    assert "attempt" not in verdict.message and "Traceback" not in verdict.message


def test_an_error_in_a_library_is_told_by_the_student_s_line():
    def answer(numbers, factor):
        return torch.tensor(numbers) @ torch.ones(7)

    message = SUM.grade(answer).message
    assert "return torch.tensor(numbers) @ torch.ones(7)" in message
    assert "torch/" not in message


class Evil(Exception):
    def __str__(self):
        raise RuntimeError


class Long(Exception):
    def __str__(self):
        return "x" * 10_000


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (SystemExit(3), "SystemExit: 3"),
        (Evil(), "Evil"),
        (Long(), "Long: xxx"),
        (ValueError(""), "ValueError"),
        (ValueError("two\nlines"), "ValueError: two lines"),
        (GeneratorExit(), "GeneratorExit"),
    ],
)
def test_every_error_is_caught(error, said):
    def answer(numbers, factor):
        raise error

    verdict = SUM.grade(answer)
    assert verdict.outcome == "raised" and said in verdict.message
    assert len(verdict.message) < 1000


def test_the_interrupt_key_still_works():
    def answer(numbers, factor):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        SUM.grade(answer)


def test_wrong_arguments_are_told():
    verdict = SUM.grade(lambda numbers: numbers)
    assert verdict.outcome == "raised" and "positional argument" in verdict.message


def test_endless_recursion():
    def answer(numbers, factor):
        return answer(numbers, factor)

    verdict = SUM.grade(answer)
    assert verdict.outcome == "raised"
    assert "RecursionError: the function calls itself without end" in verdict.message


def forever(numbers, factor):
    while True:
        pass


def forever_and_stubborn(numbers, factor):
    while True:
        try:
            sum(range(100))
        except Exception:
            pass


def forever_and_deaf(numbers, factor):
    while True:
        try:
            sum(range(100))
        except:  # noqa: E722
            pass


def forever_printing(numbers, factor):
    while True:
        print("spam")


@pytest.mark.skipif(not hasattr(signal, "setitimer"), reason="no such signal here")
@pytest.mark.parametrize(
    "answer", [forever, forever_and_stubborn, forever_and_deaf, forever_printing]
)
def test_an_endless_loop(answer, monkeypatch):
    monkeypatch.setattr(attempt, "SECONDS", 0.2)
    before = signal.getsignal(signal.SIGALRM)
    verdict = SUM.grade(answer)
    assert (verdict.outcome, verdict.bug) == ("raised", "endless loop")
    assert "did not come back within" in verdict.message
    assert signal.getsignal(signal.SIGALRM) is before
    assert signal.getitimer(signal.ITIMER_REAL) == (0, 0)


def burn(seconds):
    """Computing, not waiting: as long on a machine that others use."""
    begin = time.thread_time()
    while time.thread_time() - begin < seconds:
        sum(range(100))


@pytest.mark.skipif(not hasattr(signal, "setitimer"), reason="no such signal here")
def test_a_right_answer_on_a_busy_machine_is_right(monkeypatch):
    """It waits for its turn, longer than the limit, and computes for less."""
    monkeypatch.setattr(attempt, "SECONDS", 0.3)

    def answer(numbers, factor):
        time.sleep(0.4)
        burn(0.05)
        return right(numbers, factor)

    assert SUM.grade(answer).outcome == "right"


@pytest.mark.skipif(not hasattr(signal, "setitimer"), reason="no such signal here")
@pytest.mark.parametrize("imports, failure", [(True, None), (False, "late")])
def test_a_slow_import_does_not_count(imports, failure, monkeypatch, tmp_path):
    """A module that computes for 0.6 s when it is read, by the import or by us."""
    monkeypatch.setattr(attempt, "SECONDS", 0.3)
    text = "import time\nbegin = time.thread_time()\n"
    text += "while time.thread_time() - begin < 0.6:\n    pass\nvalue = 3\n"
    (tmp_path / "slow_to_read.py").write_text(text)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "slow_to_read", raising=False)

    def answer():
        if imports:
            import slow_to_read

            return slow_to_read.value
        found = {}
        exec(text, found)
        return found["value"]

    tried = attempt.attempt(answer, ())
    assert tried.failure == failure and tried.value == (3 if imports else None)


@pytest.mark.skipif(not hasattr(signal, "setitimer"), reason="no such signal here")
def test_who_waits_for_ever_is_late(monkeypatch):
    monkeypatch.setattr(attempt, "WAITING", 0.3)
    tried = attempt.attempt(lambda: threading.Event().wait(), ())
    assert tried.failure == "late" and "still waits for something" in tried.error


@pytest.mark.skipif(not hasattr(signal, "setitimer"), reason="no such signal here")
def test_after_an_import_the_limit_holds(monkeypatch):
    monkeypatch.setattr(attempt, "SECONDS", 0.3)

    def answer():
        import kdlib  # noqa: F401

        burn(30)

    assert attempt.attempt(answer, ()).failure == "late"


@pytest.mark.skipif(not hasattr(signal, "setitimer"), reason="no such signal here")
def test_another_s_timer_is_put_back():
    signal.setitimer(signal.ITIMER_REAL, 1000)
    try:
        SUM.grade(right)
        assert 900 < signal.getitimer(signal.ITIMER_REAL)[0] <= 1000
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)


def test_another_thread_has_no_time_limit_and_works():
    found = []
    thread = threading.Thread(target=lambda: found.append(SUM.grade(right)))
    thread.start()
    thread.join()
    assert found[0].outcome == "right"


# --- Output ---


def test_prints_and_warnings_reach_nobody(capfd):
    def answer(numbers, factor):
        print("spam " * 100_000)
        print("err", file=sys.stderr)
        warnings.warn("careful", stacklevel=1)
        np.float64(1) / np.float64(0)
        sys.stdout.writelines(["a", "b"])
        sys.stdout.flush()
        return right(numbers, factor) + 1

    verdict = SUM.grade(answer)
    out, err = capfd.readouterr()
    assert (out, err) == ("", "")
    assert "It printed:\n    spam spam" in verdict.message
    assert len(verdict.message) < 1500


def test_a_flood_is_not_kept():
    def floods():
        for _ in range(2000):
            print("spam")

    assert len(attempt.attempt(floods, ()).printed) <= 2 * attempt.KEPT + 2


def test_warnings_are_errors_neither_before_nor_after():
    with warnings.catch_warnings():
        warnings.simplefilter("error")

        def answer(numbers, factor):
            warnings.warn("careful", stacklevel=1)
            return right(numbers, factor)

        assert SUM.grade(answer).outcome == "right"
        with pytest.raises(UserWarning):
            warnings.warn("still an error", stacklevel=1)


def test_the_same_text_every_time():
    answers_ = [right, divides, returns(str), returns(lambda x: 2 * x), lambda n: n]
    answers_ += [lambda n, f: print, lambda n, f: object(), lambda n, f: (x for x in n)]
    for answer in answers_:
        assert SUM.grade(answer).message == SUM.grade(answer).message
        assert "0x" not in SUM.grade(answer).message


# --- Wrong ---


def adds_in_place(numbers, factor):
    numbers[0] += 1
    return right(numbers, factor) - factor


def within_itself():
    loop = []
    loop.append(loop)
    return loop


class Stubborn:
    def tolist(self):
        raise RuntimeError

    __repr__ = tolist


def appends(numbers, factor):
    if isinstance(numbers, list):
        numbers.append(0)
    return right(numbers, factor)


@pytest.mark.parametrize(
    ("answer", "bug", "points"),
    [
        (adds_in_place, "changes its input", 0),
        (appends, "changes its input", 1),
        (lambda n, f: None, "no return", 0),
        (returns(str), "wrong type", 0),
        (returns(bool), "wrong type", 0),
        (returns(complex), "wrong type", 0),
        (lambda n, f: print, "wrong type", 0),
        (lambda n, f: (x for x in n), "wrong type", 0),
        (lambda n, f: {"a": 1}, "wrong type", 0),
        (returns(lambda x: [float(x)]), "wrong shape", 0),
        (returns(lambda x: torch.tensor([float(x)])), "wrong shape", 0),
        (lambda n, f: np.array(n) * f, "wrong shape", 0),
        (lambda n, f: float("nan"), "not finite", 0),
        (lambda n, f: torch.tensor(float("inf")), "not finite", 0),
        (returns(lambda x: torch.tensor(float(x)).half()), "half precision", 0),
        (lambda n, f: right(n, 1), "not scaled", 0),
        (lambda n, f: right(n, f) / len(n), "mean", 0),
        (returns(lambda x: -x), "constant factor", 0),
        (returns(lambda x: 4 * x), "constant factor", 0),
        (returns(lambda x: float(x) * (1 + 1e-4)), "constant factor", 0),
        (lambda n, f: 7.0, "constant", 0),
        (lambda n, f: within_itself(), "wrong type", 0),
        (lambda n, f: Stubborn(), "wrong type", 0),
        (lambda n, f: torch.empty(2, device="meta"), "wrong type", 0),
        (lambda n, f: 10**400, "not finite", 0),
        (returns(lambda x: x + 1), None, 0),
    ],
)
def test_wrong(answer, bug, points):
    verdict = SUM.grade(answer)
    assert (verdict.outcome, verdict.bug, verdict.points) == ("wrong", bug, points)
    assert "Input: numbers=" in verdict.message


def test_wrong_in_one_test_only_keeps_the_other_s_points():
    def answer(numbers, factor):
        return right(numbers, factor) + (not isinstance(numbers, list))

    verdict = SUM.grade(answer)
    assert (verdict.outcome, verdict.points) == ("wrong", 2)
    assert "(2 of 3 points)" in verdict.message


def test_a_bug_is_named_with_its_size_and_its_sighting():
    message = SUM.grade(lambda n, f: right(n, 1)).message
    assert "Likely bug: the factor." in message and "Seen in a/b#1." in message
    factor = re.search(r"factor=(\d)", message)[1]
    assert f"{factor} times too small here" in message
    message = SUM.grade(returns(lambda x: 4 * x)).message
    assert "4 times too large on every input tried" in message
    assert "of the wrong sign" in SUM.grade(returns(lambda x: -x)).message


def test_a_bug_must_explain_all_values():
    """Equal to a known bug on one input only: no name, for it would mislead."""

    def answer(numbers, factor):
        return right(numbers, 1) if isinstance(numbers, list) else 3.0

    assert SUM.grade(answer).bug is None


def test_a_result_instead_of_the_function():
    verdict = SUM.grade(12.0)
    assert (verdict.outcome, verdict.bug) == ("wrong", "not a function")


@pytest.mark.parametrize(
    "answer",
    [
        lambda x: x * x,
        lambda x: [a * a for a in x.tolist()],
        lambda x: tuple(a**2 for a in x),
        lambda x: (x.double() ** 2).numpy(),
        lambda x: x.clone().requires_grad_() ** 2,
    ],
)
def test_a_vector_may_be_a_tensor_an_array_or_a_list(answer):
    assert SQUARES.grade(answer).outcome == "right"


@pytest.mark.parametrize(
    ("answer", "bug"),
    [
        (lambda x: (x * x)[:, None], "wrong shape"),
        (lambda x: (x * x).sum(), "wrong shape"),
        (lambda x: [[1.0, 4.0], [9.0]], "wrong shape"),
        (lambda x: ["1", "4", "9"], "wrong type"),
        (lambda x: x.mul_(x), "changes its input"),
        (lambda x: x.numpy().__imul__(x.numpy()), "changes its input"),
        (lambda x: x**3, None),
    ],
)
def test_a_wrong_vector(answer, bug):
    verdict = SQUARES.grade(answer)
    assert (verdict.outcome, verdict.bug) == ("wrong", bug)


def test_what_rounding_leaves_of_a_zero_passes_where_the_question_says_so():
    wanted = lambda numbers: [x - 1.0 for x in numbers]  # noqa: E731
    strict = frame.Code(
        "9.2",
        "less_one",
        ("numbers",),
        SQUARES.tests,
        wanted,
        (frame.Bug("zero", "all 0.", lambda x: [0.0] * 3),),
    )
    lenient = replace(strict, zero=1e-9)

    def rounded(numbers):
        return [1e-16, 1.0, 2.0]

    def nothing(numbers):
        return [1e-16, -1e-16, 0.0]

    assert strict.grade(rounded).outcome == "wrong"
    assert lenient.grade(rounded).outcome == "right"
    assert strict.grade(nothing).bug is None
    assert lenient.grade(nothing).bug == "zero"
    assert lenient.grade(lambda numbers: [1e-8, 1.0, 2.0]).outcome == "wrong"


def test_values_say_how_far_they_are_off():
    assert values.times(4) == "4 times too large"
    assert values.times(0.25) == "4 times too small"
    assert values.ratio([2.0, 4.0], [1.0, 2.0], 1e-9) == 2
    assert values.ratio([2.0, 4.001], [1.0, 2.0], 1e-3) == 2
    assert values.ratio([2.0, 4.001], [1.0, 2.0], 1e-9) is None
    assert values.ratio([2.0, 5.0], [1.0, 2.0], 1e-3) is None
    assert values.ratio([0.0], [0.0], 1e-9) is None


@pytest.mark.parametrize("give", [lambda x: x.tolist(), lambda x: x.double()])
def test_numbers_computed_in_float32_may_come_as_a_list(give):
    def answer(numbers):  # numbers are float32
        return give((numbers * (1 + 2e-7)) ** 2)

    assert SQUARES.grade(answer).outcome == "right"
    assert SQUARES.grade(lambda x: give(x**2 + 1e-3)).outcome == "wrong"


def test_a_bug_that_has_no_number_here_explains_nothing():
    bugs = (frame.Bug("nan", "nan.", lambda x: x * float("nan")),)
    question = replace(SQUARES, bugs=bugs)
    verdict = question.grade(lambda x: x**3)
    assert (verdict.outcome, verdict.bug) == ("wrong", None)


@pytest.mark.parametrize("factor, said", [(3, "3 times too large"), (-1, "wrong sign")])
def test_a_constant_factor_is_seen_in_float32_as_well(factor, said):
    def answer(numbers):
        return (factor * (numbers**2) * torch.tensor([1, 1 + 3e-7, 1 - 3e-7])).float()

    verdict = SQUARES.grade(answer)
    assert verdict.bug == "constant factor" and said in verdict.message


# --- The three commands ---


def said(command, *arguments):
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        value = command(*arguments)
    assert err.getvalue() == ""
    return out.getvalue(), value


def test_check_prints_and_returns_nothing(monkeypatch):
    monkeypatch.delenv("NBGRADER_EXECUTION", raising=False)
    text, value = said(checks.check, "1.1", None)
    assert text.startswith("1.1 kv_cache_bytes: not attempted\n") and value is None


@pytest.mark.parametrize("mode", ["autograde", "validate"])
def test_when_graded_check_returns_points(monkeypatch, mode):
    monkeypatch.setenv("NBGRADER_EXECUTION", mode)
    for answer in (None, divides, lambda *_: 1):
        assert said(checks.check, "1.1", answer)[1] == 0.0
    key = {item: "A" for item in "abcd"}
    assert said(checks.check, "1.5", key)[1] == 1.0


def test_hints_come_one_by_one(monkeypatch):
    monkeypatch.setattr(checks, "_shown", {})
    first, second = answers.of("1.1")["hints"]
    texts = [said(checks.hint, "1.1")[0] for _ in range(3)]
    assert texts[0].startswith("Hint 1 of 2") and first.split()[0] in texts[0]
    assert texts[1].startswith("Hint 2 of 2") and second.split()[0] in texts[1]
    assert texts[2] == texts[1]
    assert said(checks.hint, "1.2")[0].startswith("Hint 1 of 2")


def test_a_solution_is_printed_with_its_reason():
    text, value = said(checks.solution, "1.3")
    entry = answers.of("1.3")
    assert entry["solution"] in text and entry["note"] in text and value is None


@pytest.mark.parametrize("command", [checks.hint, checks.solution, checks.grade])
def test_an_unknown_question_is_told(command):
    with pytest.raises(
        ArgumentError, match="no question '1.11'.*\n.*did you mean '1.1'"
    ):
        command("1.11", *([None] if command is checks.grade else []))


def test_nothing_is_given_away():
    """Not by completion, help or repr."""
    from kdlib.checks import ch01

    assert dir(checks) == ["check", "for_class", "hint", "solution"] and dir(ch01) == []
    for question in checks._questions().values():
        shown = [repr(question), str(question), *map(str, dir(question))]
        shown += [command.__doc__ for command in map(checks.__dict__.get, dir(checks))]
        entry = answers.of(question.id)
        for text in [entry["solution"], entry["note"], *entry["hints"]]:
            for line in text.splitlines():
                assert len(line) < 12 or not any(line in x for x in shown)
    raw = "".join(path.read_text() for path in answers.FOLDER.glob("*.txt"))
    assert "def " not in raw and "hints" not in raw


def test_the_data_survive_their_encoding():
    content = {"1.1": {"solution": "π = 3\n", "hints": ["a", "b"]}}
    assert answers.decode(answers.encode(content)) == content
    assert max(map(len, answers.encode(content).splitlines())) <= 76
