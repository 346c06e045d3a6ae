"""The inverse question: the student writes tests, and wrong losses are put to them.

A test suite is a function of a loss that raises where the loss is wrong, as pytest's
tests do, or returns False. It earns a point for each wrong loss that it rejects, and
nothing at all if it rejects a right one.

Knows: how to run a suite. Does not know the losses, nor what would expose them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from kdlib.checks import frame
from kdlib.checks.attempt import SECONDS, Attempt, Elsewhere, attempt
from kdlib.checks.frame import Question, Verdict, _wrap

ALL_SECONDS = 60.0  # of computing, for all losses together


@dataclass(frozen=True, repr=False)
class Suite(Question):
    """right:  gives name -> a right loss
    wrong:  gives the wrong ones: objects with idea, name, does, seen and loss
    ideas:  gives idea -> what a test of it looks at, in the order of the report
    """

    parameters: tuple[str, ...]
    right: Callable[[], Mapping[str, Callable]]
    wrong: Callable[[], list]
    ideas: Callable[[], Mapping[str, str]]

    @property
    def out_of(self) -> float:
        return float(len(self.wrong()))

    def grade(self, answer: object) -> Verdict:
        if answer is None or answer is ...:
            return self._verdict(
                frame.NOT_ATTEMPTED, 0, ["Write the function of tests first."]
            )
        if not callable(answer):
            line = f"Give the function itself, not a {type(answer).__name__}."
            return self._verdict(frame.WRONG, 0, [line], "not a function")
        spent, killed = 0.0, []
        right = list(self.right().items())
        # One right loss again at the end: a suite must not depend on what came before.
        order = [(name, loss, None) for name, loss in right]
        order += [(x.name, x.loss, x) for x in self.wrong()]
        order += [(f"{right[0][0]}, a second time", right[0][1], None)]
        accepted = []
        for name, loss, wrong in order:
            tried = put(answer, loss)
            spent += tried.seconds
            stop = self._unfit(tried, spent)
            if stop:
                return stop
            rejected = _rejected(tried)
            if wrong is None:
                accepted += [] if rejected else [name]
                if rejected:
                    return self._rejects_right(answer, name, tried, accepted)
            elif rejected:
                killed.append(wrong)
        return self._score(killed)

    def _unfit(self, tried: Attempt, seconds: float) -> Verdict | None:
        if tried.failure == "not written":
            line = "The stub still raises NotImplementedError."
            return self._verdict(frame.NOT_ATTEMPTED, 0, [line])
        if tried.failure == "late":
            line = f"It did not come back within {SECONDS:g} seconds for one loss."
            return self._verdict(frame.RAISED, 0, [line], "endless loop")
        if seconds > ALL_SECONDS:
            line = f"All losses together took longer than {ALL_SECONDS:g} seconds."
            return self._verdict(frame.RAISED, 0, [line], "too slow")
        if tried.failure is None and not _is_answer(tried.value):
            kind = type(tried.value).__name__
            line = (
                f"It returned a {kind}. Raise where a loss is wrong (an assert will "
                "do), or return False; else return True or nothing."
            )
            return self._verdict(frame.WRONG, 0, [_wrap(line)], "wrong type")
        return None

    def _rejects_right(self, answer, name, tried, accepted) -> Verdict:
        lines = [_wrap(f"It rejects a right loss: {name}.")]
        if tried.error:
            lines.append(tried.error)
        bug = "rejects a right loss"
        if not accepted and all(
            _rejected(put(answer, loss)) for loss in self.right().values()
        ):
            bug = "rejects every loss"
            lines.append("It rejects all the right ones. Run it on one of your own.")
        elif "second time" in name:
            bug = "depends on what came before"
            lines.append("It accepted the same loss at first: it keeps something.")
        return self._verdict(frame.WRONG, 0, lines, bug)

    def _score(self, killed: list) -> Verdict:
        wrong = self.wrong()
        if not killed:
            line = "It accepts every loss, the wrong ones too."
            return self._verdict(frame.WRONG, 0, [line], "accepts every loss")
        alive = [x for x in wrong if x not in killed]
        lines, worst = [], None
        for idea, looks_at in self.ideas().items():
            mine = [x for x in wrong if x.idea == idea]
            rest = [x for x in mine if x in alive]
            said = f"{idea} ({looks_at}): {len(mine) - len(rest)} of {len(mine)}"
            lines.append(_wrap(said))
            if rest and (worst is None or len(rest) / len(mine) > worst[0]):
                worst = len(rest) / len(mine), idea, rest[0]
        if worst is None:
            return self._verdict(frame.RIGHT, len(killed), lines)
        _, idea, loss = worst
        seen = f" Seen in {loss.seen}." if loss.seen else ""
        lines.append(_wrap(f"One that passes: {loss.name}, {loss.does}.{seen}"))
        return self._verdict(frame.WRONG, len(killed), lines, f"{idea} untested")


def put(suite: Callable, loss: Callable) -> Attempt:
    """A suite's answer to one loss, the same every time.

    The loss comes without its name, and torch's random numbers begin anew.
    """
    if isinstance(suite, Elsewhere):
        return suite.put(loss)
    import torch

    def loss_of_unknown_origin(student_logits, teacher_logits, labels, temperature=1.0):
        return loss(student_logits, teacher_logits, labels, temperature)

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        with torch.enable_grad():
            return attempt(suite, (loss_of_unknown_origin,))


def _rejected(tried: Attempt) -> bool:
    return tried.failure == "raised" or _is_false(tried.value)


def _is_false(value: object) -> bool:
    """False, numpy's and torch's too."""
    if hasattr(value, "dtype") and hasattr(value, "item"):
        return "bool" in str(value.dtype) and value.ndim == 0 and not value.item()
    return value is False


def _is_answer(value: object) -> bool:
    if hasattr(value, "dtype") and hasattr(value, "ndim"):
        return "bool" in str(value.dtype) and value.ndim == 0
    return value is None or value is True or value is False
