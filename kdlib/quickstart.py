"""The first distillation, from data to verdict in two minutes at most.

The story and its five rows are in phone.py. Here they are trained, two at a time,
measured and shown.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable
from pathlib import Path

from tqdm import tqdm

from kdlib import __version__, localize, models
from kdlib.beside import Beside
from kdlib.errors import ArgumentError, StorageError
from kdlib.evaluate import (
    evaluate,
    measure_speed,
    one_core,
    parameter_count,
    teacher_reference,
)
from kdlib.ledger import write_json
from kdlib.phone import (
    DISTILLED,
    FORM,
    HARD_FLOPS,
    HARD_TOKENS,
    LOCALE,
    ROWS,
    STUDENT,
    TEACHER,
    UNTRAINED,
    Budget,
    Data,
    budgets,
    fit,
    folder_of,
    labels,
)
from kdlib.sampling import complete
from kdlib.teachers import LiveTeacher

SHOWN = 3
SECONDS = 110
HERE, BESIDE = (DISTILLED, HARD_TOKENS), (HARD_FLOPS,)  # who trains what
# All that is not training takes about as long as this many steps.
OVERHEAD = 400


@one_core()
def run(
    out: str | Path = "quickstart",
    *,
    seed: int = 0,
    seconds: float | None = SECONDS,
    show_progress: bool = True,
    say: Callable[[str], None] = lambda text: None,
) -> dict:
    """Train and compare the five rows; return the facts that `--json` prints.

    out:     folder for the students, the figure and the result. Trained rows are kept
             there, and a run with the same settings goes on from them
    seconds: shorten training so that the whole run takes about this long; None trains
             in full whatever it takes
    say:     gets a line of text at each stage

    Raises ArgumentError for seconds that are not positive, StorageError where `out`
    cannot be written, TrainingError where the second process ends early.
    """
    if seconds is not None and not seconds > 0:
        raise ArgumentError(f"seconds={seconds}", "use a positive number of seconds")
    start = time.perf_counter()
    out = Path(out)
    _check_writable(out)
    data = Data()
    state = _resume(out, {"version": __version__, "seed": seed, "seconds": seconds})
    # A run that goes on trains as long as it did before, whatever fits today.
    if state["share"] is None:
        state["share"] = _share(data, seed, seconds, start)
    plan = budgets(data, state["share"])
    for name in state["trained"]:
        say(f"{name}: trained in an earlier run")
    _train_rows(plan, data, state, seed, out, show_progress, say)

    reference = teacher_reference(LiveTeacher(data.teacher), data.batches(data.test))
    rows = _measure(data, reference, plan, out)
    without = evaluate(data.teacher, data.batches(data.test), reference, side="student")
    facts = {
        "rows": rows,
        "teacher_without_context": {"exact_match": without.exact_match},
        "examples": _show(data, out / "student"),
        "labelled": len(data.labelled),
        "unlabelled": plan[DISTILLED].unlabelled,
        "test": len(data.test),
        "seed": seed,
        "share": state["share"],
        "student": str(out / "student"),
        "figure": str(out / "quickstart.png"),
        "seconds": round(time.perf_counter() - start, 1),
    }
    from kdlib.plots import exact_match_bars

    exact_match_bars(facts["rows"]).savefig(out / "quickstart.png")
    write_json(out / "result.json", facts)
    return facts


def _check_writable(out: Path) -> None:
    try:
        out.mkdir(parents=True, exist_ok=True)
        (out / ".writable").touch()
        (out / ".writable").unlink()
    except OSError as error:
        raise StorageError(
            f"cannot write to {out}: {error}", "name another folder with --out"
        ) from error


# --- Training: two rows at a time ---


def cores() -> int:
    """Cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _train_rows(plan, data: Data, state: dict, seed, out: Path, show, say) -> None:
    """Train what is not trained yet; the state on disk follows."""
    todo = [name for name in (*HERE, *BESIDE) if name not in state["trained"]]
    beside = None

    def finished(name: str) -> None:
        state["trained"].append(name)
        write_json(out / "state.json", state)
        bar.clear()  # or the line would follow the bar's text
        say(f"{name}: trained")

    with tqdm(
        total=sum(plan[name].steps for name in todo),
        unit="step",
        disable=not show,
        bar_format="{l_bar}{bar}| {n_fmt}/{total_fmt} steps, {remaining} left",
    ) as bar:
        try:
            if cores() > 1 and set(todo) & set(BESIDE) and set(todo) & set(HERE):
                name = BESIDE[0]
                todo.remove(name)
                beside = Beside(name, plan[name], seed, folder_of(name, out))

            def step(done: int, loss: float) -> None:
                bar.update(1 + (beside.steps() if beside else 0))

            for name in todo:
                bar.set_description(name)
                student = fit(name, data, plan[name], seed, step)
                models.save(student, data.tokenizer, folder_of(name, out))
                finished(name)
            while beside and not beside.done:
                bar.set_description(beside.name)
                bar.update(beside.steps(wait=True))
            if beside:
                finished(beside.name)
        finally:
            if beside:
                beside.stop()


def _share(data: Data, seed: int, seconds: float | None, start: float) -> float:
    """How much of the full training fits: a few steps are timed and thrown away."""
    if seconds is None:
        return 1.0
    loading = time.perf_counter() - start
    fit(DISTILLED, data, Budget(3, 0, 0, 200), seed)  # the first steps are slower
    before = time.perf_counter()
    fit(DISTILLED, data, Budget(15, 0, 0, len(data.unlabelled)), seed)
    now = time.perf_counter()
    step = (now - before) / 15
    affordable = (seconds - (now - start)) / step - OVERHEAD
    plan = budgets(data)
    here, beside = (sum(plan[name].steps for name in lane) for lane in (HERE, BESIDE))
    if cores() > 1:
        share = min(affordable / here, (affordable - loading / step) / beside)
    else:
        share = affordable / (here + beside)
    return round(min(1.0, max(0.02, share)), 3)


def _resume(out: Path, settings: dict) -> dict:
    """What an earlier run with the same settings has done; otherwise a clean folder."""
    try:
        state = json.loads((out / "state.json").read_text())
        if (
            state["settings"] == settings
            and 0 < state["share"] <= 1
            and set(state["trained"]) <= set(ROWS)
            and all(folder_of(n, out).is_dir() for n in state["trained"])
        ):
            return state
    except (OSError, ValueError, KeyError, TypeError):
        pass  # no earlier run, or not one of ours: start afresh
    return {"settings": settings, "share": None, "trained": []}


# --- The verdict ---


def _measure(data: Data, reference, plan: dict[str, Budget], out: Path) -> list[dict]:
    """The table's rows. Speed is measured once for each of the two architectures."""
    models.save(
        models.build(data.tokenizer, **STUDENT, seed=0),
        data.tokenizer,
        folder_of(UNTRAINED, out),
    )
    batches, rows, speeds = data.batches(data.test), [], {}
    new_tokens = round(len(reference[0]) / len(batches[0].example_ids))
    for name in ROWS:
        side = "teacher" if name == TEACHER else "student"
        model, _ = models.load(folder_of(name, out))
        if side not in speeds:
            requests = [getattr(p, f"{side}_prompt_ids") for p in data.test[:256]]
            speeds[side] = measure_speed(
                model, data.tokenizer, requests, new_tokens=new_tokens
            )
        fidelity = evaluate(model, batches, reference, side=side)
        budget = plan.get(name, Budget(0, 0, 0.0))
        weights = folder_of(name, out).glob("*.safetensors")
        rows.append(
            {
                "name": name,
                "exact_match": fidelity.exact_match,
                "agreement": fidelity.agreement,
                "kl": fidelity.kl,
                "parameters": parameter_count(model),
                "bytes": sum(file.stat().st_size for file in weights),
                "latency_ms": speeds[side].latency_ms,
                "requests_per_s": speeds[side].requests_per_s,
                "steps": budget.steps,
                "tokens": budget.tokens,
                "flops": budget.flops,
            }
        )
    return rows


def _show(data: Data, folder: Path) -> list[dict[str, str]]:
    """Load the student as any user of transformers would; let it answer."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    shown = list(labels("test").items())[:SHOWN]
    prompts = [data.test[number].student_prompt_ids for number, _ in shown]
    answers = [tokenizer.decode(ids) for ids in complete(model, tokenizer, prompts)]
    return [
        {"input": e.user_input, "answer": answer, "reference": e.response}
        for (_, e), answer in zip(shown, answers, strict=True)
    ]


def report(facts: dict) -> str:
    """The facts as text for a terminal."""
    lines = [
        f"Test set: {facts['test']} English inputs, wanted in "
        f"{localize.LOCALES[LOCALE]} ({FORM} form). Seed {facts['seed']}.",
        "",
        f"{'':26}{'exact':>7}{'agree':>7}{'KL':>8}{'params':>11}"
        f"{'MB':>7}{'ms':>7}{'req/s':>8}",
    ]
    for row in facts["rows"]:
        lines.append(
            f"{row['name']:26}{row['exact_match']:7.3f}{row['agreement']:7.3f}"
            f"{row['kl']:8.3f}{row['parameters']:11,}{row['bytes'] / 1e6:7.2f}"
            f"{row['latency_ms']:7.1f}{row['requests_per_s']:8.0f}"
        )
    lines += [
        "",
        "exact: share of inputs answered exactly. agree: share of tokens where the",
        "teacher's likeliest token is the student's. KL: nats per token from the",
        "teacher. ms: one input alone; req/s: a batch of 256; both on one core, with",
        "answers of mean length; the four students are one architecture.",
        "",
        f"The labelled rows saw {facts['labelled']} labels. The distilled student saw",
        f"no label: the teacher answered {facts['unlabelled']} inputs for it, and the",
        "teacher had learned from 20,000 labelled values. Without its instruction the",
        f"teacher itself scores {facts['teacher_without_context']['exact_match']:.3f}.",
        "",
        "The student, loaded with plain transformers:",
    ]
    for shown in facts["examples"]:
        verdict = "" if shown["answer"] == shown["reference"] else "   (wrong)"
        lines.append(f"  {shown['input']} -> {shown['answer']}{verdict}")
    lines += [
        "",
        f"Student: {facts['student']}   figure: {facts['figure']}   "
        f"{facts['seconds']:.0f} s",
    ]
    return "\n".join(lines)
