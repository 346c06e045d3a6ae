"""A student's answers, laid into the notebook that was released.

Answers are known by the name that they define, and else by their cell's id. What a
student added goes along and is run in the student's own order. Checks and setup are
always the released ones.

Knows: cells, ids, names. Does not know: whether an answer is right; nothing is run.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from nbformat import NotebookNode

from instructor import booked, tampering
from instructor.cells import PART, Remark, bare, code, defined, grade_id, plain
from kdlib.progress import CHECK

_SETUP = 'find_spec("kdlib")'


@dataclass(frozen=True)
class Step:
    """A cell to run, or a question to grade at this place."""

    source: str = ""
    name: str = ""
    question: str | None = None


@dataclass
class Laid:
    """notebook: the released one with the student's answers, without outputs
    steps:    cells and questions in the order in which they take place
    cells:    question -> the name of the step that answers it
    called:   question -> the name that the student gave to the answer, if another
    """

    notebook: NotebookNode
    steps: list[Step] = field(default_factory=list)
    remarks: list[Remark] = field(default_factory=list)
    cells: dict[str, str] = field(default_factory=dict)
    called: dict[str, str] = field(default_factory=dict)


def lay(
    handed: NotebookNode | None,
    released: NotebookNode,
    familiar: frozenset[str] = frozenset(),
) -> Laid:
    """`handed`: what the student handed in, or None for nothing.

    familiar: texts (cells.bare) that are no student's own, beside the released ones
    """
    laid = Laid(booked.pruned(released))
    if handed is not None:
        _Layer(handed, released, laid, familiar).lay()
    return laid


class _Layer:
    def __init__(self, handed, released, laid: Laid, familiar: frozenset[str]):
        self.cells, self.laid = handed.cells, laid
        self.released = released.cells
        self.texts = familiar | {bare(cell.source) for cell in self.released}
        self.by_id = {grade_id(cell): cell for cell in self.released if grade_id(cell)}
        found = [CHECK.search(cell.source) for cell in self.released]
        self.names = {match[1]: match[2] for match in found if match}
        self.answers: dict[str, list[int]] = {id: [] for id in self.names}
        self.checks: dict[str, list[int]] = {id: [] for id in self.names}
        self.extra: list[int] = []
        self.foreign: list[str] = []

    def lay(self) -> None:
        for place, cell in enumerate(self.cells):
            self._sort(place, cell)
        self._about_the_whole()
        places = {id: self._place(id) for id in self.names}
        self._steps(places)
        self._fill(places)
        sources = {
            place: plain(self.cells[place].source)
            for place in range(len(self.cells))
            if self.cells[place].cell_type == "code"
        }
        self.laid.remarks += tampering.found(sources.values(), self.texts)

    # --- What each cell is ---

    def _sort(self, place: int, cell: NotebookNode) -> None:
        id, source = grade_id(cell), cell.source
        match = PART.fullmatch(id)
        question = f"{match[1]}.{match[2]}" if match else None
        part = match[3] if match else None
        if match and question not in self.names:
            self.foreign.append(question)
        if part == "task":
            if question in self.names and not self._is_released(id, source):
                self.foreign.append(question)
            return
        if cell.cell_type != "code" and part != "answer":
            self._keep_if_new(place, cell)
            return
        here = defined(source)
        mine = [q for q, name in self.names.items() if name in here]
        if not mine and part == "answer" and question in self.names:
            mine = [question]
            self._other_name(question, here)
        if mine:
            for q in mine:
                self.answers[q].append(place)
            self._about_an_answer(mine, id, question, part, cell)
        checked = {m[1] for m in CHECK.finditer(source)} & set(self.names)
        if part == "check" and question in self.names:
            checked.add(question)
        for q in checked:
            self.checks[q].append(place)
        if mine:
            return
        if checked:
            self._about_a_check(sorted(checked), cell)
        elif _SETUP in source or id.endswith("-setup"):
            if not self._is_released("", source):
                self._say("edited setup", "Its setup cell is another; ours was run.")
        elif id.endswith("-imports") and not self._is_released(id, source):
            self._say("edited imports", "It edited the imports; ours were run first.")
            self.extra.append(place)
        else:
            self._keep_if_new(place, cell)

    def _is_released(self, id: str, source: str) -> bool:
        if id in self.by_id:
            return bare(self.by_id[id].source) == bare(source)
        return bare(source) in self.texts

    def _keep_if_new(self, place: int, cell: NotebookNode) -> None:
        text = cell.source if cell.cell_type != "code" else code(plain(cell.source))
        if text.strip() and bare(cell.source) not in self.texts:
            self.extra.append(place)

    def _other_name(self, question: str, here: set[str]) -> None:
        if len(here) == 1:
            (name,) = here
            self.laid.called[question] = name
            told = f"{question} is called `{name}` there, not `{self.names[question]}`."
            self._say("renamed", told, question)

    # --- What there is to say ---

    def _say(self, kind: str, said: str, question: str | None = None) -> None:
        remark = Remark(kind, said, question)
        if remark not in self.laid.remarks:
            self.laid.remarks.append(remark)

    def _about_the_whole(self) -> None:
        lost = not any(grade_id(cell) for cell in self.cells)
        if lost and any(self.answers.values()):
            told = "All of nbgrader's metadata is lost; answers were found by name."
            self._say("lost metadata", told)
        if self.foreign:
            listed = ", ".join(dict.fromkeys(self.foreign))
            told = (
                f"Its text of {listed} is not what was released: another year's "
                "notebook, or an edited one. Today's checks were run."
            )
            self._say("another version", told)

    def _about_an_answer(self, mine, id, question, part, cell) -> None:
        whole = any(grade_id(other) for other in self.cells)
        for q in mine:
            if whole and not id:
                told = f"The cell of {q} lost its metadata; it was found by its name."
                self._say("lost metadata", told, q)
            elif id and (question, part) != (q, "answer"):
                told = f"The cell of {q} bears the id {id[:40]!r}; found by its name."
                self._say("renamed", told, q)
        if cell.cell_type != "code":
            told = f"The answer to {mine[0]} is a {cell.cell_type} cell; taken as code."
            self._say("renamed", told, mine[0])

    def _about_a_check(self, checked, cell) -> None:
        for q in checked:
            ours = self.by_id.get(f"ex-{q.replace('.', '-')}-check")
            if ours is None or code(cell.source) != code(ours.source):
                told = f"It edited the check of {q}; ours was run."
                self._say("tampering", told, q)

    # --- What counts, and when ---

    def _place(self, id: str) -> tuple[int | None, int]:
        """The cell that counts, and the cell after which the question is graded."""
        answers, end = self.answers[id], len(self.cells)
        if not answers:
            return None, end
        if len(answers) > 1:
            told = (
                f"{id} is answered in {len(answers)} cells; the one that stands when "
                "its check runs counts."
            )
            self._say("duplicated", told, id)
        checked = self.checks[id]
        before = [place for place in answers if checked and place <= checked[-1]]
        if len(checked) > 1:
            self._say("duplicated", f"The check of {id} is there twice.", id)
        if before:
            return before[-1], checked[-1]
        if checked:
            told = f"The check of {id} stands above its answer; the answer counts."
            self._say("moved", told, id)
            return answers[-1], end
        others = [
            place
            for q in self.names
            if q != id
            for place in self.answers[q] + self.checks[q]
            if place > answers[-1]
        ]
        return answers[-1], min(others, default=end) - 1

    def _steps(self, places: dict) -> None:
        steps = self.laid.steps
        for cell in self.released:
            if cell.cell_type == "code" and grade_id(cell).endswith("-imports"):
                steps.append(Step(cell.source, "imports"))
        run = {place for found in self.answers.values() for place in found}
        run |= {p for p in self.extra if self.cells[p].cell_type == "code"}
        for place in range(len(self.cells) + 1):
            if place in run:
                steps.append(Step(plain(self.cells[place].source), booked.name(place)))
            steps += [Step(question=q) for q, (_, at) in places.items() if at == place]
        for q, (counted, _) in places.items():
            if counted is not None:
                self.laid.cells[q] = booked.name(counted)

    def _fill(self, places: dict) -> None:
        counted = {q: place for q, (place, _) in places.items() if place is not None}
        own = set(self.extra) | {p for found in self.answers.values() for p in found}
        own = sorted(own - set(counted.values()))
        booked.fill(self.laid.notebook, self.cells, counted, own)
