"""A live run: its curves move while it trains, and it can be stopped and resumed.

The run is `kdlib.train` in a thread, with checkpoints in a folder of its own. Stop
ends it between two steps, as a crash would: nothing more is saved. Resume builds a new
student and lets `train` go on from the newest checkpoint.
"""

from __future__ import annotations

import atexit
import tempfile
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from kdlib import checkpoints, models
from kdlib.errors import ArgumentError
from kdlib.evaluate import evaluate, teacher_reference
from kdlib.explorers.frame import Explorer, axes_of, buttons, new_figure, slider
from kdlib.objective import Objective
from kdlib.phone import CONFIG, STUDENT, Data
from kdlib.plots import BLUE, GREY, ORANGE
from kdlib.teachers import LiveTeacher
from kdlib.train import train

RATES = [2.5e-4, 5e-4, 1e-3, 2e-3, 4e-3, 8e-3, 1.6e-2]
STEPS, SAVE_EVERY, MEASURE_EVERY = 400, 20, 10
HELD_OUT = 100  # test inputs that the student is measured on


class StopAsked(Exception):
    """Leaves `train` between two steps."""


class Run:
    """A run of STEPS steps, in a thread while it is on.

    loss:     of every step done
    measured: [(steps done, Fidelity on held-out inputs)]
    state:    "new", "on", "stopped", "done" or "failed"
    error:    in words, of a run that failed
    saved:    the step of the newest checkpoint, of a run that is not on
    """

    def __init__(self, data: Data, held_out, rate: float, steps: int):
        self.data, self.held_out, self.rate = data, held_out, rate
        self.config = replace(
            CONFIG, steps=steps, learning_rate=rate, checkpoint_every=SAVE_EVERY
        )
        self.loss, self.measured, self.state, self.error = [], [], "new", ""
        self.saved = 0
        self._folder = tempfile.TemporaryDirectory(prefix="kdlib-live-run-")
        self._stop, self._thread = threading.Event(), None

    def go(self, seen: Callable[[], None]) -> None:
        """Begin, or go on from the newest checkpoint; `seen` is called on the way.

        Another run is stopped: it would take this one's core.
        """
        global _current
        stop_current()
        _current = self
        self.seen = seen
        self._stop.clear()
        self.state = "on"
        self._thread = threading.Thread(target=self._train, daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """Ask for the end, and wait for it."""
        self._stop.set()
        if self._thread is not None:
            self._thread.join()

    def _train(self) -> None:
        student = models.build(self.data.tokenizer, **STUDENT, seed=0)

        def after(done: int, loss: float) -> None:
            # A resumed run does the steps after its checkpoint once more.
            self.loss[done - 1 :] = [loss]
            if done % MEASURE_EVERY == 0 or done == self.config.steps:
                self._measure(student, done)
                self.seen()
            if self._stop.is_set() and done < self.config.steps:
                raise StopAsked

        try:
            if not self.measured:
                self._measure(student, 0)
            train(
                student,
                self.data.unlabelled,
                self.data.collator,
                Objective("forward_kl"),
                self.config,
                teacher=self.data.cache,
                folder=self._folder.name,
                on_step=after,
            )
            self.state = "done"
        except StopAsked:
            self.state = "stopped"
        except Exception as error:  # a thread has nobody else to tell
            self.state, self.error = "failed", f"{type(error).__name__}: {error}"
        newest = checkpoints.newest_good(Path(self._folder.name) / "checkpoints")
        self.saved = newest.step if newest else 0
        self.seen()

    def _measure(self, student, done: int) -> None:
        student.eval()
        found = evaluate(student, *self.held_out)
        student.train()
        kept = [one for one in self.measured if one[0] < done]
        self.measured = [*kept, (done, found)]


def live_run(data: Data, steps: int = STEPS) -> Explorer:
    """A student of the running example, trained on the teacher's cached targets.

    An earlier run of this process is stopped: nobody looks at it any more.

    Raises ArgumentError for steps that are not positive.
    """
    if steps < 1:
        raise ArgumentError(f"steps={steps}", "train for one step at least")
    stop_current()
    batches = data.batches(data.test[:: len(data.test) // HELD_OUT][:HELD_OUT])
    held_out = batches, teacher_reference(LiveTeacher(data.teacher), batches)

    shape = {"left": 0.08, "right": 0.93, "top": 0.88, "bottom": 0.17, "wspace": 0.25}
    figure = new_figure(3.3, **shape)
    left, right = axes_of(figure, 1, 2)
    (losses,) = left.plot([], [], color=ORANGE, linewidth=1, label="each step's batch")
    (kls,) = left.plot([], [], "o-", color=BLUE, markersize=4, label="held-out inputs")
    left.set(xlim=(0, steps), ylim=(0.02, 10), yscale="log", xlabel="steps")
    left.set_yticks([0.1, 1, 10], ["0.1", "1", "10"])
    left.set_title("KL from the teacher, nats a token", loc="left", fontsize=10)
    left.legend(frameon=False, fontsize=9, loc="lower left")
    (plan,) = right.plot([], [], "--", color=GREY, label="learning rate (right scale)")
    (hits,) = right.plot([], [], "o-", color=BLUE, markersize=4, label="exact match")
    (same,) = right.plot([], [], "s-", color=ORANGE, markersize=3, label="agreement")
    right.set(xlim=(0, steps), ylim=(0, 1.02), xlabel="steps")
    scale = right.twinx()
    scale.set(ylim=(0, 1.02 * RATES[-1]), yticks=[0, 4e-3, 8e-3, 1.6e-2])
    scale.tick_params(labelsize=8, colors="#666666")
    right.set_title("share of held-out inputs, of tokens", loc="left", fontsize=10)
    right.legend(
        handles=[hits, same, plan], frameon=False, fontsize=8, loc="center right"
    )
    run: Run | None = None
    note = ""

    def draw(rate: float) -> str:
        config = replace(CONFIG, steps=steps, learning_rate=rate)
        every = range(0, steps + 1, 5)
        plan.set_data(every, [config.rate(i) / RATES[-1] for i in every])
        if run is None:
            return (
                f"{note}Nothing has been trained yet. Start trains {steps} steps with "
                f"a learning rate of up to {rate:g}."
            )
        loss, measured = list(run.loss), list(run.measured)
        losses.set_data(range(1, len(loss) + 1), loss)
        at = [done for done, _ in measured]
        kls.set_data(at, [found.kl for _, found in measured])
        hits.set_data(at, [found.exact_match for _, found in measured])
        same.set_data(at, [found.agreement for _, found in measured])
        return note + told(run, steps, rate)

    def press(name: str) -> None:
        nonlocal run, note
        note = ""
        state = "new" if run is None else run.state
        if name == "start":
            rate = explorer.controls["rate"].value
            run = Run(data, held_out, rate, steps)
            run.go(explorer.update)
        elif name == "stop" and state == "on":
            run.stop()
        elif name == "resume" and state in GOES_ON:
            run.go(explorer.update)
        elif name == "stop":
            note = "There is no run to stop. "
        else:
            note = "It is running. " if state == "on" else "There is none to resume. "
        explorer.update()

    explorer = Explorer(
        "live_run",
        "What does a run lose when it is stopped and resumed?",
        {"rate": slider("learning rate", [(f"{x:g}", x) for x in RATES], 4e-3)},
        figure,
        [plan, losses, kls, hits, same],
        draw,
        buttons(("start", "stop", "resume"), press),
    )
    return explorer


GOES_ON = ("stopped", "failed")


def told(run: Run, steps: int, rate: float) -> str:
    """A run in words; `rate` is what the slider says for the next one."""
    done = len(run.loss)
    rated = f"at a learning rate of up to {run.rate:g}"
    said = {
        "on": f"Step {done} of {steps}, {rated}.",
        "stopped": f"Stopped after step {done} of {steps}, {rated}.",
        "done": f"All {steps} steps are done, {rated}.",
        "failed": f"The run failed after step {done} of {steps}. {run.error}.",
    }[run.state]
    if run.measured:
        at, found = run.measured[-1]
        said += (
            f" On held-out inputs after step {at}: {found.kl:.3f} nats a token from "
            f"the teacher, {found.exact_match:.0%} answered exactly, "
            f"{found.agreement:.0%} of the tokens agree."
        )
    if run.state in GOES_ON:
        place = f"the checkpoint of step {run.saved}" if run.saved else "the beginning"
        said += f" Resume goes on from {place}."
    if rate != run.rate:
        said += f" The next start takes {rate:g}."
    return said


_current: Run | None = None


def stop_current() -> None:
    if _current is not None and _current.state == "on":
        _current.stop()


atexit.register(stop_current)  # a thread that computes while Python ends may crash it
