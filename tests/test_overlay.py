"""Hidden checks and the class's seed: what changes, what stays, what is refused.

The example of a private overlay is tests/private_checks/ch04.py.
"""

from __future__ import annotations

import itertools
import json
import re
import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import nbformat
import pytest

from instructor import class_seed, overlay
from kdlib import checks
from kdlib.checks import _answers as answers
from kdlib.checks import frame, redraw, values
from kdlib.errors import DataError

ROOT = Path(__file__).parents[1]
QUESTIONS = checks._questions()
CODE = {id: q for id, q in QUESTIONS.items() if isinstance(q, frame.Code)}
CHOICE = {id: q for id, q in QUESTIONS.items() if isinstance(q, frame.Choice)}
PREDICT = {id: q for id, q in QUESTIONS.items() if isinstance(q, frame.Predict)}
VARIED = {id: q for id, q in PREDICT.items() if q.numbers}
CHAPTERS = answers.chapters()
SEEDS = [f"class {number}" for number in range(20)]


@pytest.fixture(autouse=True)
def alone(monkeypatch):
    """No overlay and no seed but the test's own, and none left behind."""
    monkeypatch.delenv("KD_PRIVATE", raising=False)
    monkeypatch.delenv("KD_CLASS_SEED", raising=False)
    yield
    checks.for_class("")


@pytest.fixture
def private(tmp_path, monkeypatch):
    """A folder with the example; its ch04.py."""
    folder = tmp_path / "private checks"
    folder.mkdir()
    shutil.copy(ROOT / "tests" / "private_checks" / "ch04.py", folder)
    monkeypatch.setenv("KD_PRIVATE", str(folder))
    return folder / "ch04.py"


def public_notebook(chapter):
    return nbformat.read(ROOT / "exercises" / f"{chapter}.ipynb", as_version=4)


def code_of(notebook):
    return "\n".join(c.source for c in notebook.cells if c.cell_type == "code")


# --- Functions: last year's inputs do not come again ----------------------------------


def solution(question):
    """The function that exercises/solutions gives."""
    chapter = f"ch{int(question.partition('.')[0]):02}"
    space: dict = {}
    for cell in public_notebook(chapter).cells:
        id = cell.metadata.get("nbgrader", {}).get("grade_id", "")
        if id.endswith(("-setup", "-imports")):
            exec(cell.source, space)
    exec(answers.of(question)["solution"], space)
    return space[QUESTIONS[question].name]


def memorised(question):
    """All inputs of a class and the right values: a function that looks them up."""
    known = {
        looks(arguments): question.truth(*arguments)
        for test in question.tests
        for arguments in test.cases(
            redraw.source(question.id, test.name, question.salt)
        )
    }

    def answer(*arguments):
        return known.get(looks(arguments), 0.0)

    return answer


def looks(arguments):
    return repr([vars(x) if hasattr(x, "__dict__") else x for x in plain(arguments)])


def plain(value):
    if isinstance(value, dict):
        return {key: plain(item) for key, item in value.items()}
    return values._plain(list(value) if isinstance(value, tuple) else value, set())


@pytest.mark.parametrize("id", CODE)
def test_a_memory_of_last_year_is_no_answer(id):
    last, this = (replace(CODE[id], salt=salt) for salt in ("2026", "2027"))
    answer = memorised(last)
    assert last.grade(answer).outcome == "right"
    assert this.grade(answer).points < this.out_of
    public = memorised(CODE[id])
    assert CODE[id].grade(public).outcome == "right"
    assert this.grade(public).points < this.out_of


@pytest.mark.slow
@pytest.mark.parametrize("id", CODE)
def test_the_solution_is_right_for_twenty_classes(id):
    answer = solution(id)
    for seed in SEEDS:
        verdict = replace(CODE[id], salt=seed).grade(answer)
        assert verdict.outcome == "right", f"{seed}\n{verdict.message}"


def test_float32_is_rounded_in_a_class_as_well():
    """5.2's gradient in float32, on inputs where little is left of large numbers."""
    from wrong_answers import ch05, ch07

    for module, id, name, seed in (
        (ch05, "5.2", "gradient_in_float32", "class 0"),
        (ch07, "7.3", "floor_in_float32", "class 3"),
    ):
        (answer,) = [a for _, a in module.HONEST if getattr(a, "__name__", "") == name]
        assert replace(CODE[id], salt=seed).grade(answer).outcome == "right"


def test_without_a_salt_the_inputs_are_those_of_before():
    """Every committed output hangs on them."""
    import random

    one, other = redraw.source("4.1", "a test"), random.Random("4.1 a test")
    assert one.random() == other.random()
    assert redraw.source("4.1", "a test", "x").random() != one.random()


# --- Choices: letters move ------------------------------------------------------------


def key(question):
    return {
        item: next(letter for letter, (right, _) in options.items() if right)
        for item, options in question.options().items()
    }


@pytest.mark.parametrize("id", CHOICE)
def test_published_letters_get_nothing_in_any_class(id):
    public = key(CHOICE[id])
    assert CHOICE[id].grade(public).outcome == "right"
    for seed in SEEDS:
        mine = replace(CHOICE[id], salt=seed)
        assert mine.grade(public).points == 0
        assert mine.grade(key(mine)).outcome == "right"


@pytest.mark.parametrize("id", CHOICE)
def test_letters_are_a_permutation_and_keep_their_reasons(id):
    own = answers.of(id)["options"]
    mine = replace(CHOICE[id], salt="2027")
    for item, moved in mine.letters().items():
        assert list(moved) == list(own[item]) and set(moved.values()) == set(own[item])
        for letter, before in moved.items():
            assert mine.options()[item][letter] == own[item][before]


def test_last_year_s_letters_lose_points_with_this_year_s():
    """Chance lets one item in three keep its right letter; over the course it shows."""
    last, this = (
        {id: replace(q, salt=class_seed.word(seed)) for id, q in CHOICE.items()}
        for seed in ("2026", "2027")
    )
    got = sum(this[id].grade(key(last[id])).points for id in CHOICE)
    out_of = sum(q.out_of for q in CHOICE.values())
    assert 0.15 * out_of < got < 0.55 * out_of


def test_every_order_that_moves_the_right_option_is_drawn():
    options = {"A": [True, ""], "B": [False, ""], "C": [False, ""]}
    seen = {
        "".join(redraw.letters("1.1", "a", options, f"{n}").values())
        for n in range(200)
    }
    orders = {"".join(order) for order in itertools.permutations("ABC")}
    assert seen == {order for order in orders if order[0] != "A"}


def test_the_notebook_shows_an_option_under_the_letter_that_is_graded():
    for id, question in CHOICE.items():
        chapter = f"ch{int(id.partition('.')[0]):02}"
        mine = replace(question, salt=class_seed.word("2027"))
        before, after = public_notebook(chapter), released(chapter, "2027")
        part = "-".join(["ex", *id.split(".")])
        old, new = (class_seed._options(book, part) for book in (before, after))
        assert len(old) == len(new) == len(question.items)
        for a, b in zip(old, new, strict=True):
            item, moved = a.source[2], mine.letters()[a.source[2]]
            shown, was = texts(b.source), texts(a.source)
            assert {letter: was[moved[letter]] for letter in moved} == shown, (id, item)
            assert a.source.split("- **")[0] == b.source.split("- **")[0]


def texts(source):
    parts = re.split(r"^- \*\*([A-Z])\*\* ", source, flags=re.M)[1:]
    return {a: b.strip() for a, b in zip(parts[::2], parts[1::2], strict=True)}


@pytest.mark.parametrize("chapter", CHAPTERS)
def test_no_move_leaves_the_text_as_it_is(chapter):
    for cell in public_notebook(chapter).cells:
        if re.match(r"\*\*[a-z]\.\*\* ", cell.source):
            same = {letter: letter for letter in texts(cell.source)}
            assert class_seed.relettered(cell.source, same) == cell.source


# --- Predictions: numbers change ------------------------------------------------------


def spreads(question):
    """Every set of numbers that a class may get."""
    listed = [[(k, v) for v in values[1:]] for k, values in question.numbers.items()]
    for drawn in itertools.product(*listed):
        found = {}
        for names, value in drawn:
            names = names.split()
            found |= zip(names, value if len(names) > 1 else [value], strict=True)
        yield SimpleNamespace(**found)


def near(a, b):
    return 1 / frame.FACTOR <= a / b <= frame.FACTOR


def test_these_predictions_change():
    assert list(VARIED) == "1.4 3.4 4.5 7.4 9.4 10.5 11.5 12.4 14.4".split()


@pytest.mark.parametrize("id", VARIED)
def test_published_numbers_lose_points_in_any_class(id):
    """And no mistake that has a name comes near the right number."""
    question, public = VARIED[id], VARIED[id].right()
    for numbers in spreads(question):
        right = question.truth(numbers)
        kept = [name for name in right if near(public[name], right[name])]
        assert len(kept) <= len(right) / 2, (numbers, kept)
        for name, bugs in question.beliefs.items():
            for bug in bugs:
                value = bug.returns(numbers)
                assert value <= 0 or not near(value, right[name]), (numbers, bug.name)


@pytest.mark.parametrize("id", VARIED)
def test_the_task_says_the_numbers_that_are_graded(id):
    chapter = f"ch{int(id.partition('.')[0]):02}"
    named = {name for names in VARIED[id].numbers for name in names.split()}
    said = set(re.findall(r"{(\w+)", "".join(VARIED[id].phrases)))
    silent = {"answers", "billions", "torn", "languages", "words", "ideas"} - said
    assert said <= named and named - said <= silent  # those are said in words
    for seed in SEEDS[:5]:
        mine = replace(VARIED[id], salt=class_seed.word(seed))
        task = class_seed._cell(
            released(chapter, seed), f"ex-{id.replace('.', '-')}-task"
        ).source
        for phrase in mine.phrases:
            assert phrase.format(**vars(mine.drawn())) in " ".join(task.split())
        assert mine.grade(mine.right()).outcome == "right"
        public = VARIED[id].right()
        assert mine.grade(public).points < mine.out_of


def test_a_told_mistake_has_the_class_s_numbers():
    mine = replace(PREDICT["4.5"], salt="2027")
    goal, right = mine.drawn().goal, mine.right()
    said = mine.grade(right | {"labels": right["noise"] / goal**2})
    assert said.bug == "variance against deviation"
    assert f"the root of the noise to {goal:g}." in " ".join(said.message.split())


# --- The release ----------------------------------------------------------------------


def released(chapter, seed, found=None):
    book = public_notebook(chapter)
    return class_seed.rewritten(book, chapter, seed, found or overlay.Overlay())


@pytest.mark.parametrize("chapter", CHAPTERS)
def test_equal_seeds_release_equal_bytes(chapter):
    one, two, other = (
        nbformat.writes(released(chapter, seed)) for seed in ("2027", "2027", "2028")
    )
    assert one == two != other
    assert "2027" not in one  # the secret itself is in no notebook
    plain = public_notebook(chapter)
    assert released(chapter, "") == plain
    nbformat.validate(released(chapter, "2027"))


def run_released(notebook):
    """The class's notebook as students run it, up to its first question."""
    space: dict = {}
    for cell in notebook.cells:
        id = cell.metadata.get("nbgrader", {}).get("grade_id", "")
        if id.endswith(("-setup", "-imports")):
            exec(cell.source, space)
    return space


def test_a_student_s_own_check_knows_the_class(capsys):
    run_released(released("ch04", "2027"))
    mine = replace(CHOICE["4.6"], salt=class_seed.word("2027"))
    assert checks.grade("4.6", key(mine)).outcome == "right"
    assert checks.grade("4.6", key(CHOICE["4.6"])).points == 0
    checks.solution("4.6")
    assert str(key(mine)) in capsys.readouterr().out
    checks.solution("4.5")
    told = re.search(r"losses_in_nats = ({.*})", capsys.readouterr().out)[1]
    assert checks.grade("4.5", json.loads(told.replace("'", '"'))).outcome == "right"
    # A function's inputs stay the public ones until the class is graded.
    assert checks._find("4.1") is QUESTIONS["4.1"]


# --- Hidden tests ---------------------------------------------------------------------


def test_public_and_hidden_tests_share_the_printed_points(private):
    question = overlay.load("ch04").question(CODE["4.1"])
    truth = question.grade(solution("4.1"))
    assert (truth.outcome, truth.points, truth.out_of) == ("right", 4, 4)
    clamped = overlay.load("ch04").hidden["4.1"].bugs[0].returns
    verdict = question.grade(clamped)
    assert verdict.bug == "clamped at 0.01" and 0 < verdict.points < 4
    assert CODE["4.1"].grade(clamped).bug is None


def test_who_passes_the_public_tests_alone_loses_the_hidden_share(private):
    import torch

    right = solution("4.1")

    def narrow(student, teacher):
        return right(student, teacher) * (1 if teacher.shape[-1] < 20 else 2)

    assert CODE["4.1"].grade(narrow).points == 4
    verdict = overlay.load("ch04").question(CODE["4.1"]).grade(narrow)
    assert verdict.points == round(4 * 5 / 6, 2)  # five of six tests of a point each
    assert "A hidden check failed." in verdict.message
    assert not re.search("Input|Yours|tensor|forty", verdict.message)
    assert isinstance(right(torch.zeros(1, 2), torch.zeros(1, 2)), torch.Tensor)


def test_the_notebook_says_that_hidden_checks_run_at_grading(private, capsys):
    book = released("ch04", "", overlay.load("ch04"))
    (note,) = [c.source for c in book.cells if "Hidden checks run" in c.source]
    assert "for 4.1." in note and "4.3, 4.6" in note
    assert "Hidden checks" not in nbformat.writes(released("ch04", "2027"))
    run_released(book)
    checks.check("4.1", solution("4.1"))
    assert "Hidden checks run at grading." in capsys.readouterr().out
    for command in (checks.hint, checks.solution, lambda id: checks.check(id, None)):
        command("4.3")
        assert "your class's own" in capsys.readouterr().out


def test_a_variant_stands_in_the_release_and_in_the_grading(private):
    found = overlay.load("ch04")
    book = released("ch04", "2027", found)
    text = nbformat.writes(book)
    assert "probability that they **agree**" in text and "Label smoothing" not in text
    assert "solution=" not in text and "> right" not in text and "square()" not in text
    points = [
        c.metadata.nbgrader.points
        for c in book.cells
        if c.metadata.get("nbgrader", {}).get("grade")
    ]
    assert sum(points) == sum(q.out_of for id, q in QUESTIONS.items() if id[:2] == "4.")
    part = class_seed._options(book, "ex-4-6")
    assert len(part) == 5
    mine = replace(found.question(CHOICE["4.6"]), salt=class_seed.word("2027"))
    for cell in part:  # with two options, the right one always moves
        letter = key(mine)[cell.source[2]]
        assert letter != key(replace(mine, salt=""))[cell.source[2]]
    assert mine.grade(key(mine)).outcome == "right"


# --- Both at release and at grading ---------------------------------------------------


def prepare(course, chapter="ch04"):
    course.mkdir(exist_ok=True)
    return class_seed.prepare(course, chapter, public_notebook(chapter))


def test_grading_needs_no_seed_once_it_was_released(tmp_path, monkeypatch):
    monkeypatch.setenv("KD_CLASS_SEED", "2027")
    prepare(tmp_path)
    monkeypatch.delenv("KD_CLASS_SEED")
    found = class_seed.questions(tmp_path, "ch04")
    assert found["4.1"].salt == "2027"
    assert found["4.6"].salt == found["4.5"].salt == class_seed.word("2027")
    monkeypatch.setenv("KD_CLASS_SEED", "2028")
    with pytest.raises(DataError, match="was not released with this KD_CLASS_SEED"):
        class_seed.questions(tmp_path, "ch04")


def test_without_a_seed_the_questions_are_the_course_s(tmp_path):
    assert prepare(tmp_path) == public_notebook("ch04")
    for found in (class_seed.questions(tmp_path, "ch04"), {}):
        assert all(question == QUESTIONS[id] for id, question in found.items())


def test_what_was_promised_must_be_there(tmp_path, monkeypatch, private):
    prepare(tmp_path)
    class_seed.questions(tmp_path, "ch04")
    monkeypatch.delenv("KD_PRIVATE")
    with pytest.raises(
        DataError, match="hidden checks for 4.1.*KD_PRIVATE now has none"
    ):
        class_seed.questions(tmp_path, "ch04")


BROKEN = {
    "HIDDEN = {": "line 1 cannot be read (SyntaxError",
    "import no_such_module": "ModuleNotFoundError",
    "x = 1": "defines neither HIDDEN nor VARIANTS",
    "HIDDEN = ()\nVARIANTS = ()": "HIDDEN is no dict",
    "HIDDEN = {'4.9': Hidden(tests=(T('a', 1, cases, rows),))}": "no such question",
    "HIDDEN = {'5.1': Hidden(tests=(T('a', 1, cases, rows),))}": "no such question",
    "HIDDEN = {'4.6': Hidden(tests=(T('a', 1, cases, rows),))}": "make it a Variant",
    "HIDDEN = {'4.1': Hidden()}": "a Test of some points",
    "HIDDEN = h(T('a', 0, cases, rows))": "a Test of some points",
    "HIDDEN = h(T('a', 1, cases))": "the right answer itself fails",
    "HIDDEN = h(T('a', 1, lambda r: [], rows))": "has no cases",
    "HIDDEN = h(T('a', 1, lambda r: [(1,)], rows))": "it fails (",
    "HIDDEN = h(T('a', 1, lambda r: 1 / 0, rows))": "ZeroDivision",
    "HIDDEN = {'4.1': Hidden(bugs=(Bug('b', '', truth),))}": "the bug 'b' is judged",
    "VARIANTS = (Variant(Predict('4.5', 'o', dict, {}), '', '', ''),)": "keep the name",
}
HEAD = """
import torch
from instructor.overlay import Hidden, Variant
from kdlib.checks import _questions
from kdlib.checks.frame import Bug, Predict
from kdlib.checks.frame import Test as T
truth = _questions()["4.1"].truth
rows = lambda a, *_: (len(a),)
h = lambda *tests: {"4.1": Hidden(tests=tests)}
def cases(rng):
    yield torch.ones(2, 3).double(), torch.ones(2, 3).double()
"""


@pytest.mark.parametrize("text", BROKEN)
def test_an_unsound_overlay_is_refused_before_anything_is_graded(text, private):
    private.write_text(text if "cannot be read" in BROKEN[text] else HEAD + text)
    with pytest.raises(DataError) as refused:
        overlay.load("ch04")
    assert BROKEN[text] in str(refused.value) and str(private) in str(refused.value)
    assert not list(private.parent.glob("__pycache__"))


def test_a_folder_that_is_missing_or_holds_a_stray_file_is_refused(
    private, monkeypatch
):
    assert overlay.load("ch05") == overlay.Overlay()  # nothing for this chapter
    private.rename(private.with_name("chapter4.py"))
    with pytest.raises(DataError, match="chapter4.py belongs to no chapter"):
        overlay.load("ch04")
    monkeypatch.setenv("KD_PRIVATE", str(private.parent / "none"))
    with pytest.raises(DataError, match="none is no folder\n.*unset KD_PRIVATE"):
        overlay.load("ch04")
