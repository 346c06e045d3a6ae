"""The explorers without a browser: what they draw, say and show.

What is drawn is read from the artists and held to numbers worked out here with NumPy in
float64. That a hand can move them is tests/browser's to show.
"""

from __future__ import annotations

import base64
import io
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from kdlib import localize, models, phone, plots
from kdlib.errors import ArgumentError
from kdlib.evaluate import response_logits
from kdlib.explorers.context import CONTEXTS, WORDS, context
from kdlib.explorers.directions import MODES, PLACES, directions
from kdlib.explorers.frame import WIDGET, Explorer, axes_of, new_figure, slider
from kdlib.explorers.landscape import landscape
from kdlib.explorers.live_run import SAVE_EVERY, live_run
from kdlib.explorers.microscope import microscope
from kdlib.explorers.mixtures import mixtures
from kdlib.explorers.sparse import SAMPLED, sparse
from kdlib.explorers.temperature import temperature
from kdlib.pairs import PairCollator

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def world():
    """The shipped teacher, one real example, and what both sides say of it."""
    teacher, tokenizer = models.load("teacher")
    collator = PairCollator(tokenizer, teacher_max_length=128, student_max_length=128)
    number, example = next(
        item
        for item in phone.labels("test").items()
        if item[1].user_input == "Spanish (Portugal)"
    )
    batch = collator.collate([collator.encode(example, number)])
    half = models.first_layers(teacher, 2)
    with torch.no_grad():
        told = response_logits(teacher, batch, "teacher")
        untold = response_logits(teacher, batch, "student")
        student = response_logits(half, batch, "student")
    return {
        "teacher": teacher,
        "tokenizer": tokenizer,
        "collator": collator,
        "batch": batch,
        "told": told,
        "untold": untold,
        "student": student,
    }


MAKERS = {
    "temperature": lambda w: temperature(
        w["tokenizer"], {"told": w["told"][0], "untold": w["untold"][0]}, 2.0
    ),
    "directions": lambda w: directions(),
    "mixtures": lambda w: mixtures(w["tokenizer"], w["student"][0], w["told"][0]),
    "landscape": lambda w: landscape(),
    "context": lambda w: context(
        w["teacher"],
        w["collator"],
        [d.english for d in localize.load_split("test", kinds=["date"])[:2]],
    ),
    "sparse": lambda w: sparse(w["tokenizer"], w["student"][0], w["told"][0]),
    "live_run": lambda w: live_run(phone.Data(), 30),
    "microscope": lambda w: microscope(
        w["tokenizer"],
        w["batch"],
        w["told"],
        {"without its instruction": w["untold"], "two layers": w["student"]},
    ),
}


@pytest.fixture(scope="module")
def made(world):
    """Each explorer once; a test that moves one puts nothing back."""
    found = {}

    def one(name):
        if name not in found:
            found[name] = MAKERS[name](world)
        return found[name]

    return one


def other_value(control):
    """A value of the control that is not the one it has."""
    if not hasattr(control, "options"):
        return not control.value
    options = [x[1] if isinstance(x, tuple) else x for x in control.options]
    at = options.index(control.value)
    return options[at + 1 if at + 1 < len(options) else at - 1]


def dead_controls(explorer):
    """The controls that change not both the picture and the sentence."""
    dead = []
    for name, control in explorer.controls.items():
        before = explorer.picture.value, explorer.words.value
        control.value = other_value(control)
        after = explorer.picture.value, explorer.words.value
        if before[0] == after[0] or before[1] == after[1]:
            dead.append(name)
    return dead


# --- The frame ---


@pytest.mark.parametrize("name", MAKERS)
def test_each_control_changes_the_picture_and_the_words(made, name):
    assert dead_controls(made(name)) == []


def small(draw, wired=True):
    """An explorer of one bar and two controls; the second one is wired or not."""
    figure = new_figure(2.0)
    (bar,) = axes_of(figure).bar([0], [1.0], color=plots.BLUE)

    def move(height, colour):
        bar.set_height(height)
        bar.set_color(colour if wired else plots.BLUE)
        return f"height {height}" + (f", {colour}" if wired else "")

    controls = {
        "height": slider("height", [0.2, 0.5, 1.0], 0.5),
        "colour": slider("colour", [plots.BLUE, plots.ORANGE], plots.BLUE),
    }
    return Explorer("small", "How high?", controls, figure, [bar], draw or move)


def test_a_control_that_does_nothing_is_found():
    assert dead_controls(small(None)) == []
    assert dead_controls(small(None, wired=False)) == ["colour"]
    explorer = small(None)
    explorer.controls["height"].unobserve(explorer.update, names="value")
    assert dead_controls(explorer) == ["height"]


@pytest.mark.parametrize("name", MAKERS)
def test_the_output_has_a_widget_a_picture_and_a_text_without_numbers(made, name):
    explorer = made(name)
    bundle = explorer._repr_mimebundle_()
    assert set(bundle) == {WIDGET, "image/png", "text/plain"}
    assert bundle[WIDGET]["model_id"] == explorer.widget.model_id
    image = Image.open(io.BytesIO(base64.b64decode(bundle["image/png"])))
    assert image.format == "PNG" and image.width > 700
    assert len(base64.b64decode(bundle["image/png"])) < 120_000
    assert explorer.question in bundle["text/plain"]
    assert not any(c.isdigit() for c in bundle["text/plain"])


@pytest.mark.parametrize("name", MAKERS)
def test_the_widget_holds_all_its_parts_and_each_control_has_a_name(made, name):
    explorer = made(name)
    parts = list(explorer.widget.children)
    buttons = [part for part in parts if type(part).__name__ == "HBox"]
    assert parts[1:] == [
        *explorer.controls.values(),
        *buttons,
        explorer.words,
        explorer.picture,
    ]
    assert explorer.question in parts[0].value
    assert all(c.description for c in explorer.controls.values())
    assert 'role="status"' in explorer.words.value
    assert 'aria-live="polite"' in explorer.words.value


def test_moving_there_and_back_gives_the_same_picture():
    explorer = small(None)
    first = explorer.picture.value, explorer.sentence
    explorer.controls["height"].value = 1.0
    explorer.controls["height"].value = 0.5
    assert (explorer.picture.value, explorer.sentence) == first


def test_what_is_drawn_is_what_matplotlib_draws_in_one_go():
    """The copy of the still part, and the moving one on it, are the whole figure."""
    explorer = small(None)
    explorer.controls["height"].value = 1.0
    seen = np.asarray(Image.open(io.BytesIO(explorer.picture.value)).convert("RGB"))
    for artist in explorer.moving:
        artist.set_animated(False)
    file = io.BytesIO()
    explorer.figure.savefig(file, format="png")
    file.seek(0)
    whole = np.asarray(Image.open(file).convert("RGB"))
    inside = np.abs(seen.astype(int) - whole).max(-1)
    assert (inside > 0).mean() < 0.01  # the bar's lower edge is over the axis


def test_words_are_escaped():
    explorer = small(lambda height, colour: f"<b>{height}</b> & more")
    assert "<b>0.5" not in explorer.words.value
    assert "&lt;b&gt;0.5&lt;/b&gt; &amp; more" in explorer.words.value


def test_an_explorer_without_controls_is_refused():
    with pytest.raises(ArgumentError, match="no controls"):
        Explorer("x", "?", {}, new_figure(1.0), [], lambda: "")


def test_importing_the_explorers_imports_neither_widgets_nor_matplotlib():
    rooms = sorted((ROOT / "kdlib" / "explorers").glob("*.py"))
    names = [f"kdlib.explorers.{p.stem}" for p in rooms if p.stem != "__init__"]
    code = f"import sys, {', '.join(names)}\n"
    code += "print([m for m in ('ipywidgets', 'matplotlib') if m in sys.modules])"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True
    )
    assert done.stdout.strip() == "[]", done.stdout + done.stderr


def test_every_explorer_is_listed():
    import kdlib.explorers

    rooms = {p.stem for p in (ROOT / "kdlib" / "explorers").glob("*.py")}
    rooms -= {"__init__", "frame"}
    assert rooms == set(MAKERS)
    for room in rooms:
        assert f"    {room} " in kdlib.explorers.__doc__


# --- What is drawn, against closed forms ---


def softmax(logits, temperature=1.0):
    z = np.asarray(logits, dtype=np.float64) / temperature
    p = np.exp(z - z.max(-1, keepdims=True))
    return p / p.sum(-1, keepdims=True)


def kl(p, q):
    return float((p * np.log(p / q)).sum(-1))


def move(explorer, **values):
    for name, value in values.items():
        explorer.controls[name].value = value


def artists(explorer, kind):
    return [a for a in explorer.moving if type(a).__name__ == kind]


def widths(explorer):
    return np.array([bar.get_width() for bar in artists(explorer, "Rectangle")])


def xy(line):
    both = line.get_xdata(), line.get_ydata()
    return tuple(np.array([float(x) for x in data]) for data in both)


@pytest.mark.parametrize("T", [0.5, 1.0, 4.0])
def test_temperature_draws_softmax_and_entropy(made, world, T):
    explorer = made("temperature")
    move(explorer, place="untold", temperature=T)
    z = world["untold"][0].numpy()
    order = np.argsort(-softmax(z), kind="stable")[:10]
    p = softmax(z, T)
    np.testing.assert_allclose(widths(explorer), p[order], rtol=1e-5)
    *_, point = artists(explorer, "Line2D")
    x, y = xy(point)
    entropy = -(p[p > 0] * np.log(p[p > 0])).sum()
    np.testing.assert_allclose((x[0], y[0]), (T, entropy), rtol=1e-5)
    assert f"{entropy:.2f} nats" in explorer.sentence


def gaussian(middle, width):
    return softmax(-((PLACES.numpy() - middle) ** 2) / (2 * width**2))


def test_directions_end_where_the_closed_forms_say(made):
    explorer = made("directions")
    teacher = sum(share * gaussian(m, w) for share, m, w in MODES)
    ends = {}
    for direction in ("forward KL", "reverse KL"):
        move(explorer, direction=direction, middle=-3.0, width=1.0)
        begin, end, path, stop = artists(explorer, "Line2D")
        np.testing.assert_allclose(xy(begin)[1], gaussian(-3.0, 1.0), rtol=1e-9)
        middle, log_width = (float(v[0]) for v in xy(stop))
        ends[direction] = student = gaussian(middle, np.exp(log_width))
        np.testing.assert_allclose(xy(end)[1], student, rtol=1e-9)
    # The best of an exponential family has the teacher's moments: forward KL's minimum.
    x = PLACES.numpy()
    for power in (1, 2):
        want = (teacher * x**power).sum()
        got = (ends["forward KL"] * x**power).sum()
        assert abs(got - want) < 0.02 * max(1, abs(want))
    # Reverse KL stays at the mode where it began: that mode alone, and log 1/0.6.
    assert ends["reverse KL"][x < 0].sum() > 0.99
    assert abs(kl(ends["reverse KL"], teacher) - np.log(1 / 0.6)) < 0.01
    move(explorer, middle=3.0)
    _, end, _, _ = artists(explorer, "Line2D")
    assert xy(end)[1][x > 0].sum() > 0.99
    assert "right mode" in explorer.sentence


def test_the_arrows_of_directions_point_down(made):
    explorer = made("directions")
    teacher = sum(share * gaussian(m, w) for share, m, w in MODES)
    for direction, arrows in zip(
        ("forward KL", "reverse KL"), artists(explorer, "Quiver"), strict=True
    ):

        def loss(m, s, direction=direction):
            student = gaussian(m, np.exp(s))
            pair = (teacher, student)
            return kl(*(pair if direction == "forward KL" else pair[::-1]))

        for i in (0, 37, 70):
            m, s = arrows.XY[i]
            h = 1e-5
            slope = np.array(
                [
                    loss(m + h, s) - loss(m - h, s),
                    loss(m, s + h) - loss(m, s - h),
                ]
            )
            down = -slope / np.linalg.norm(slope)
            np.testing.assert_allclose((arrows.U[i], arrows.V[i]), down, atol=1e-5)


@pytest.mark.parametrize("knob", [0.0, 0.1, 0.9, 1.0])
@pytest.mark.parametrize("rescaled", [False, True])
def test_mixtures_draw_the_gradients_of_both(made, world, knob, rescaled):
    explorer = made("mixtures")
    move(explorer, knob=knob, rescaled=rescaled)
    p, q = softmax(world["told"][0]), softmax(world["student"][0])

    def through_softmax(g):
        return q * (g - (q * g).sum())

    forward, reverse = q - p, through_softmax(np.log(q / p))
    mix = (1 - knob) * forward + knob * reverse
    jsd = {0.0: forward, 1.0: reverse}.get(knob)
    if jsd is None:
        jsd = (1 - knob) * through_softmax(np.log(q / (knob * p + (1 - knob) * q)))
        jsd = jsd / (knob * (1 - knob)) if rescaled else jsd
    order = np.argsort(-np.maximum(abs(forward), abs(reverse)), kind="stable")[:8]
    drawn = widths(explorer)
    np.testing.assert_allclose(drawn[:8], mix[order], rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(drawn[8:], jsd[order], rtol=1e-4, atol=1e-6)
    mine, theirs = artists(explorer, "Line2D")[2:]
    for point, gradient in ((mine, mix), (theirs, jsd)):
        length = np.linalg.norm(gradient)
        np.testing.assert_allclose(xy(point), [[knob], [length]], rtol=1e-4)


def test_landscape_ends_at_the_closed_forms(made):
    explorer = made("landscape")
    for objective, le in (
        ("whole answers", 0.6),
        ("tokens, on people's prefixes", 0.2),
    ):
        mai = 0.9 * le + 0.1 * (1 - le)
        move(explorer, objective=objective, le=3.0, mai=-3.0, steps=150)
        path, first, here, curve, _ = artists(explorer, "Line2D")
        np.testing.assert_allclose(xy(first), [[3.0], [-3.0]])
        # On people's prefixes the first word is still compared with the teacher's.
        want = [np.log(0.6 / 0.4), np.log(mai / (1 - mai))]
        np.testing.assert_allclose(np.ravel(xy(here)), want, atol=0.02)
        assert len(xy(path)[0]) == 151
        assert (np.diff(xy(curve)[1]) < 1e-12).all()
    move(explorer, objective="the likeliest answer alone", steps=0)
    *_, point = artists(explorer, "Line2D")
    le, mai = 1 / (1 + np.exp(-3.0)), 1 / (1 + np.exp(3.0))
    np.testing.assert_allclose(xy(point), [[0], [-np.log(le * mai)]], rtol=1e-9)


@pytest.mark.parametrize(
    ("targets", "k"),
    [
        ("top k, tail: bucket", 3),
        ("top k, tail: zero", 8),
        ("top k, tail: renormalize", 8),
        (SAMPLED, 64),
    ],
)
def test_sparse_draws_losses_and_gradients(made, world, targets, k):
    explorer = made("sparse")
    move(explorer, targets=targets, k=k)
    p, q = softmax(world["told"][0]), softmax(world["student"][0])
    order = np.argsort(-abs(q - p), kind="stable")[:9]
    top = np.argsort(-p, kind="stable")[:k]
    kept = np.zeros(len(p), bool)
    kept[top] = True
    drawn, dense = widths(explorer), kl(p, q)
    *_, point = artists(explorer, "Line2D")
    loss = xy(point)[1][0]
    if targets == SAMPLED:  # 400 draws of 64: right on average, within four errors
        spread = np.sqrt((p * np.log(p / q) ** 2).sum() - dense**2)
        assert abs(loss - dense) < 4 * spread / np.sqrt(400 * k)
        assert f"{loss:.2f} nats on the mean" in explorer.sentence
        return
    if targets.endswith("bucket"):
        rest = 1 - p[top].sum(), 1 - q[top].sum()
        want = kl(np.append(p[top], rest[0]), np.append(q[top], rest[1]))
        gradient = np.where(kept, q - p, q * (1 - rest[0] / rest[1]))
    elif targets.endswith("zero"):
        want = (p[top] * np.log(p[top] / q[top])).sum()
        gradient = q * p[top].sum() - np.where(kept, p, 0)
    else:
        few = p[top] / p[top].sum(), q[top] / q[top].sum()
        want = kl(*few)
        gradient = np.zeros(len(p))
        gradient[top] = few[1] - few[0]
    np.testing.assert_allclose(loss, want, rtol=1e-4)
    np.testing.assert_allclose(drawn, gradient[order], rtol=1e-3, atol=1e-5)
    off = np.linalg.norm(gradient - (q - p)) / np.linalg.norm(q - p)
    assert f"off by {off:.0%}" in explorer.sentence
    assert f"from all tokens it is {dense:.2f}" in explorer.sentence


def test_microscope_draws_each_token(made, world):
    explorer = made("microscope")
    token = 1
    move(explorer, student="two layers", loss="forward_kl", token=token)
    p, q = softmax(world["told"]), softmax(world["student"])
    n = len(p)
    losses = np.array([kl(a, b) for a, b in zip(p, q, strict=True)])
    bars = artists(explorer, "Rectangle")
    heights = np.array([bar.get_height() for bar in bars[:n]])
    np.testing.assert_allclose(heights / heights.max(), losses / losses.max(), 1e-4)
    likely = np.argsort(-np.maximum(p[token], q[token]), kind="stable")[:7]
    got = [bar.get_width() for bar in bars[n:]]
    np.testing.assert_allclose(got[:7], p[token][likely], rtol=1e-4)
    np.testing.assert_allclose(got[7:14], q[token][likely], rtol=1e-4)
    gradient = q[token] - p[token]
    strongest = np.argsort(-abs(gradient), kind="stable")[:7]
    np.testing.assert_allclose(got[14:], gradient[strongest], rtol=1e-3)
    assert f"{losses[token] / losses.sum():.0%} of the example" in explorer.sentence
    # Both inputs are shown, one under the other, and the answer begins in one column.
    theirs, ours = (t.get_text() for t in explorer.moving[:2])
    assert "Write it in French, long form" in theirs and "Write" not in ours
    assert theirs.index("y: ") == ours.index("y: ")
    decode = world["tokenizer"].decode
    written = world["batch"].response_ids
    assert theirs.endswith(f"{decode(written[:1])}  >  {decode(written[1:2])}")


def test_context_draws_what_bayes_says(made, world):
    """Along one answer, with the contexts' weights worked out by hand."""
    explorer = made("context")
    user_input = explorer.controls["user_input"].options[1]
    own, words = 1, 4
    move(explorer, user_input=user_input, context=own, words=words)
    collator, tokenizer = world["collator"], world["tokenizer"]

    def logits_after(text, answer):
        ids, _ = collator.teacher_side.prompt_ids(text, user_input, 40, 0)
        with torch.no_grad():
            out = world["teacher"](torch.tensor([ids + answer])).logits[0]
        return softmax(out[len(ids) - 1 : len(ids) - 1 + len(answer)])

    ids, _ = collator.teacher_side.prompt_ids(CONTEXTS[own], user_input, 40, 0)
    answer = []
    while not answer or answer[-1] != tokenizer.eos_token_id:
        with torch.no_grad():
            out = world["teacher"](torch.tensor([ids + answer])).logits[0, -1]
        answer.append(int(out.argmax()))

    def prefix(text):
        return " ".join(text.split()[:words])

    alike = [c for c in CONTEXTS if prefix(c) == prefix(CONTEXTS[own])]
    assert len(alike) == 2  # the two forms
    p = np.stack([logits_after(c, answer) for c in alike])
    student = logits_after(prefix(CONTEXTS[own]), answer)
    weight, floors, kls = np.ones(len(alike)) / len(alike), [], []
    for i, token in enumerate(answer):
        mixed = weight @ p[:, i]
        floors.append(
            sum(w * kl(a, mixed) for w, a in zip(weight, p[:, i], strict=True))
        )
        kls.append(
            sum(w * kl(a, student[i]) for w, a in zip(weight, p[:, i], strict=True))
        )
        weight = weight * p[:, i, token]
        weight = weight / weight.sum()
    bars = [bar.get_height() for bar in artists(explorer, "Rectangle")]
    half = len(bars) // 2
    np.testing.assert_allclose(bars[: len(answer)], kls, rtol=1e-3, atol=1e-6)
    np.testing.assert_allclose(
        bars[half : half + len(answer)], floors, rtol=1e-3, atol=1e-6
    )
    _, _, loss, floor = artists(explorer, "Line2D")
    np.testing.assert_allclose(xy(loss)[1][words], sum(kls), rtol=1e-3)
    assert (xy(loss)[1] > xy(floor)[1] - 1e-6).all()
    # All words: nothing is missing. No word: the student is the gain's own network.
    assert xy(loss)[1][WORDS] < 1e-6 and abs(xy(floor)[1][WORDS]) < 1e-6
    gain = artists(explorer, "Line2D")[1]
    assert xy(gain)[1][0] == xy(loss)[1][0]


# --- A live run ---


def press(explorer, name):
    row = next(x for x in explorer.widget.children if type(x).__name__ == "HBox")
    next(x for x in row.children if x.description == name).click()


def wait_for(explorer, text, seconds=240):
    end = time.monotonic() + seconds
    while text not in explorer.sentence:
        assert time.monotonic() < end, explorer.sentence
        time.sleep(0.01)


def curves(explorer):
    return [xy(line) for line in explorer.moving[1:]]  # without the planned rate


def equal(a, b):
    return all(
        np.array_equal(x, y) for x, y in zip(sum(a, ()), sum(b, ()), strict=True)
    )


@pytest.mark.slow
def test_a_run_that_was_stopped_ends_as_one_that_was_not(made):
    explorer = made("live_run")
    assert "Nothing has been trained" in explorer.sentence
    move(explorer, rate=4e-3)
    for name in ("stop", "resume"):
        press(explorer, name)
        assert explorer.sentence.startswith("There is no"), explorer.sentence
    pictures = {explorer.picture.value}
    press(explorer, "start")
    wait_for(explorer, "after step 20")
    pictures.add(explorer.picture.value)
    press(explorer, "resume")
    assert "It is running" in explorer.sentence or "All 30" in explorer.sentence
    wait_for(explorer, "All 30 steps are done")
    pictures.add(explorer.picture.value)
    assert len(pictures) == 3
    whole = curves(explorer)
    (steps, loss), (at, kl), (_, exact), (_, agreement) = whole
    np.testing.assert_array_equal(steps, range(1, 31))
    np.testing.assert_array_equal(at, [0, 10, 20, 30])
    assert kl[-1] < 0.7 * kl[0] and loss[-1] < 0.7 * loss[0]
    assert agreement[-1] > agreement[0] and (exact <= 1).all()

    press(explorer, "start")
    wait_for(explorer, "after step 20")
    press(explorer, "stop")
    if "All 30" not in explorer.sentence:  # it may have been faster than we
        assert f"the checkpoint of step {SAVE_EVERY}" in explorer.sentence or (
            "the beginning" in explorer.sentence
        )
        press(explorer, "resume")
        wait_for(explorer, "All 30 steps are done")
    assert equal(curves(explorer), whole)
    # The slider is for the next start.
    move(explorer, rate=1e-3)
    assert "The next start takes 0.001" in explorer.sentence
    press(explorer, "start")
    wait_for(explorer, "All 30 steps are done")
    assert not equal(curves(explorer), whole)


@pytest.mark.slow
def test_an_error_in_the_thread_is_shown_and_the_run_can_go_on(made, monkeypatch):
    explorer = made("live_run")
    room = sys.modules["kdlib.explorers.live_run"]
    with monkeypatch.context() as broken:

        def no_disk(*args, **kwargs):
            raise OSError(28, "No space left on device")

        broken.setattr(room, "train", no_disk)
        press(explorer, "start")
        wait_for(explorer, "The run failed after step 0")
    assert "No space left on device" in explorer.sentence
    assert "Resume goes on from the beginning" in explorer.sentence
    press(explorer, "resume")
    wait_for(explorer, "All 30 steps are done")


@pytest.mark.slow
def test_a_second_run_stops_the_first(made):
    first = made("live_run")
    press(first, "start")
    second = live_run(phone.Data(), 2)
    assert "Step" not in first.sentence, first.sentence
    press(second, "start")
    wait_for(second, "All 2 steps are done")
    with pytest.raises(ArgumentError, match="steps=0"):
        live_run(phone.Data(), 0)


@pytest.mark.slow
def test_python_ends_while_a_run_is_on():
    code = (
        "from kdlib import phone\n"
        "from kdlib.explorers.live_run import live_run\n"
        "explorer = live_run(phone.Data(), 100_000)\n"
        "explorer.widget.children[2].children[0].click()\n"
        "print('on')"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert (done.returncode, done.stdout) == (0, "on\n"), done.stderr
    assert "Traceback" not in done.stderr
