"""One student's notebook, run in a room and judged outside of it.

The verdict is kdlib.checks' own, made in this process: it sends arguments to the room
and compares what comes back. A room that dies costs the question at hand; the next ones
go on in a new room, in which the cells before are run again.

Knows: steps, rooms, verdicts. Does not know: files, nbgrader.
"""

from __future__ import annotations

import contextlib
import time
from dataclasses import dataclass, field

from nbformat import NotebookNode

from instructor import booked, tampering
from instructor.cells import Remark, minutes
from instructor.intake import Submission
from instructor.laying import Laid, Step
from instructor.room import Dead, Function, Room, Rooms
from kdlib.checks.frame import RAISED, Question, Verdict

FLOOD = 100_000  # characters of output that get a remark
ROOMS = 12  # that one student may wear out
BUDGET = 240.0  # seconds on the wall for one student


@dataclass
class Result:
    """What is known of a student after grading.

    verdicts: question -> the verdict
    notebook: what nbgrader records, with outputs
    seconds:  question -> how long grading it took, "cells" for the rest
    stand:    the walls around this student's code
    minutes:  at work, where the notebook tells (cells.minutes)
    """

    student: str
    where: str
    verdicts: dict[str, Verdict]
    remarks: list[Remark]
    notebook: NotebookNode
    seconds: dict[str, float]
    stand: list[str] = field(default_factory=list)
    minutes: float | None = None


def grade(
    rooms: Rooms,
    submission: Submission,
    laid: Laid,
    questions: dict[str, Question],
) -> Result:
    """Grade one submission; whatever it holds, a Result comes back.

    laid:      the submission's answers in the released notebook (laying.lay)
    questions: those of the released notebook, by number
    """
    sitting = _Sitting(rooms, laid, questions)
    if submission.notebook is not None:
        with sitting:
            sitting.run()
    else:
        sitting.leave_out()
    remarks = list(
        dict.fromkeys([*submission.remarks, *laid.remarks, *sitting.remarks])
    )
    booked.judge(laid.notebook, sitting.verdicts, remarks, sitting.printed)
    handed = submission.notebook
    return Result(
        submission.student,
        submission.where,
        sitting.verdicts,
        remarks,
        laid.notebook,
        sitting.seconds,
        sitting.stand,
        None if handed is None else minutes(handed),
    )


class _Sitting(contextlib.AbstractContextManager):
    """One student's steps. A context: leaving it ends the room."""

    def __init__(self, rooms: Rooms, laid: Laid, questions: dict[str, Question]):
        self.rooms, self.laid, self.questions = rooms, laid, questions
        self.verdicts: dict[str, Verdict] = {}
        self.remarks: list[Remark] = []
        self.printed: dict[str, str] = {}  # step -> what the feedback page shows
        self.failed: dict[str, str] = {}  # step -> its error
        self.seconds: dict[str, float] = {}
        self.stand: list[str] = []
        self.ran: list[Step] = []
        self.room: Room | None = None
        self.opened = 0
        self.end = time.monotonic() + BUDGET

    def __exit__(self, *_: object) -> None:
        self._close()

    def run(self) -> None:
        for step in self.laid.steps:
            begin = time.monotonic()
            if step.question:
                self.verdicts[step.question] = self._grade(step.question)
            else:
                self._cell(step)
            key = step.question or "cells"
            spent = self.seconds.get(key, 0.0) + time.monotonic() - begin
            self.seconds[key] = round(spent, 2)
        self._close()

    def leave_out(self) -> None:
        """Nothing was handed in that could be graded."""
        self.verdicts = {id: q.grade(None) for id, q in self.questions.items()}

    # --- Rooms ---

    def _ready(self) -> Room:
        """A room in which all cells so far have been run. Raises Dead."""
        while self.room is None:
            self.opened += 1
            if self.opened > ROOMS or time.monotonic() > self.end:
                raise Dead("this notebook used up the time that one student has")
            self.room = self.rooms.open()
            self.stand = self.room.stand
            for step in list(self.ran):
                try:
                    self.room.cell(step.source, step.name)
                except Dead:
                    self.ran.remove(step)
                    self._close()
                    break
        return self.room

    def _close(self) -> None:
        if self.room is not None:
            self.remarks += tampering.opened(self.room.saw)
            self.room.__exit__()
        self.room = None

    # --- Cells ---

    def _cell(self, step: Step) -> None:
        try:
            tried = self._ready().cell(step.source, step.name)
        except Dead as dead:
            self._close()
            self.failed[step.name] = f"The kernel died: {dead}."
            self._say("dead kernel", f"In {step.name}: {dead}. It was left out.")
            return
        text = tried.printed
        self._about_output(f"In {step.name} it", tried.wrote)
        if tried.failure == "late":
            self.failed[step.name] = tried.error
            told = f"{step.name} was stopped: {_first(tried.error)}"
            self._say("endless loop", told)
        else:
            self.ran.append(step)
        if tried.failure in ("raised", "not written"):
            error = tried.error or "NotImplementedError"
            self.failed[step.name] = error
            self._say("cell raised", f"{step.name} raised {_first(error)}")
        if step.name in self.failed:
            text = f"{text.rstrip()}\n{self.failed[step.name]}".lstrip("\n")
        if step.name != "imports":
            self.printed[step.name] = text

    # --- Questions ---

    def _grade(self, id: str) -> Verdict:
        question = self.questions[id]
        try:
            answer = self._look(id)
        except LookupError:
            return self._without_answer(question)
        except Dead as dead:
            self._close()
            return self._raised(question, f"The kernel died: {dead}.", "dead kernel")
        try:
            verdict = question.grade(answer)
        except Exception as error:  # a fault of ours must not look like the student's
            told = f"The grader failed at {id} ({type(error).__name__}: {error})."
            self._say("grade by hand", told, id)
            return self._raised(question, told, "grade by hand")
        if isinstance(answer, Function):
            self._about_output(f"At {id} it", answer.wrote, id)
        if verdict.bug == "endless loop":
            self._say("endless loop", f"{id} did not come back in time.", id)
        if "MemoryError" in verdict.message or "allocate memory" in verdict.message:
            self._say("out of memory", f"{id} asked for more memory than it has.", id)
        if self.room is not None and self.room.dead:
            self._say("dead kernel", f"{id}: {self.room.dead}.", id)
            self._close()
        return verdict

    def _look(self, id: str) -> object:
        room = self._ready()
        try:
            return room.look(self.questions[id].name)
        except LookupError:
            if id not in self.laid.called:
                raise
            return room.look(self.laid.called[id])

    def _without_answer(self, question: Question) -> Verdict:
        cell = self.laid.cells.get(question.id)
        if cell is None:
            told = f"No cell defines `{question.name}`."
            self._say("no answer", f"{question.id}: {told}", question.id)
            return question._verdict("not attempted", 0, [told])
        error = self.failed.get(cell)
        if error is None:
            error = f"It was run, and `{question.name}` is still not defined."
        return self._raised(question, f"Your answer's cell: {error}", "raised")

    def _raised(self, question: Question, told: str, bug: str) -> Verdict:
        return question._verdict(RAISED, 0, [told], bug)

    # --- Remarks ---

    def _say(self, kind: str, said: str, question: str | None = None) -> None:
        self.remarks.append(Remark(kind, said, question))

    def _about_output(self, where: str, wrote: tuple, question: str | None = None):
        whole, errors = wrote
        if whole > FLOOD:
            told = f"{where} printed {whole:,} characters; the first ones were kept."
            self._say("huge output", told, question)
        if errors:
            told = f"{where} wrote to stderr. That costs no points."
            self._say("stderr", told, question)


def _first(text: str) -> str:
    return text.partition("\n")[0][:160]
