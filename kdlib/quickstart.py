"""The first distillation, from data to verdict in two minutes at most.

A phone whose user reads French. The app has 300 labelled French examples and 2,000
inputs that nobody has labelled. The teacher reads an instruction in plain words (the
context c) before every input; the student reads the input alone (x' = z), because on
this phone the instruction never changes.

    teacher            reads c and z
    untrained          the student before training
    hard labels        trained on the 300 labels, with as many tokens as the distilled
                       student, and once more with as many FLOPs (the teacher's counted)
    distilled          trained on the teacher's answers and distributions for the 2,000

The teacher was trained on 20,000 datums with labels in every locale: that is what it
knows and the student's labels do not. Its targets for the 2,000 inputs, which it has
never seen, are shipped in a file, so that nobody waits for it.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from tqdm import tqdm

from kdlib import __version__, localize, models
from kdlib.errors import ArgumentError, StorageError
from kdlib.evaluate import (
    Fidelity,
    evaluate,
    measure_speed,
    one_core,
    parameter_count,
    teacher_reference,
)
from kdlib.ledger import write_json
from kdlib.objective import Objective
from kdlib.pairs import EncodedPair, PairCollator, PairedExample
from kdlib.sampling import complete
from kdlib.teachers import CachedTeacher, LiveTeacher
from kdlib.train import TrainConfig, train

LOCALE, FORM = "fr", "long"
LABELLED = 300
# Of 6,000 in the file. Each one costs the teacher's FLOPs, which the baseline gets too.
UNLABELLED = 2_000
STUDENT = {"hidden_size": 64, "layers": 2, "heads": 4}
# Small batches: at this size an update counts for more than a smoother gradient.
CONFIG = TrainConfig(steps=1000, batch_size=16, learning_rate=4e-3)
TARGETS = models.DATA / "quickstart_targets.safetensors"
SHOWN = 3
SECONDS = 110

TEACHER = "teacher"
UNTRAINED = "untrained student"
HARD_TOKENS = "hard labels, equal tokens"
HARD_FLOPS = "hard labels, equal FLOPs"
DISTILLED = "distilled student"
ROWS = (TEACHER, UNTRAINED, HARD_TOKENS, HARD_FLOPS, DISTILLED)


@dataclass(frozen=True)
class Row:
    """One line of the table. `tokens` and `flops` are what its training cost."""

    name: str
    exact_match: float
    agreement: float
    kl: float
    parameters: int
    bytes: int
    latency_ms: float
    requests_per_s: float
    tokens: int
    flops: float


class Data:
    """The quickstart's models, examples and cached teacher, loaded once."""

    def __init__(self):
        self.teacher, self.tokenizer = models.load("teacher")
        self.collator = PairCollator(
            self.tokenizer, teacher_max_length=128, student_max_length=128
        )
        self.cache = CachedTeacher(TARGETS, self.tokenizer)
        self.labelled = self.encode(labels("train", LABELLED))
        self.unlabelled = self.encode(self.answered())
        self.test = self.encode(labels("test"))

    def encode(self, numbered: dict[int, PairedExample]) -> list[EncodedPair]:
        return [self.collator.encode(e, number) for number, e in numbered.items()]

    def answered(self) -> dict[int, PairedExample]:
        """The unlabelled inputs with the teacher's answers from the cache."""
        inputs = localize.load_split("unlabelled")
        return {
            number: pair(
                inputs[number].english,
                self.tokenizer.decode(self.cache.response_ids(number)[:-1]),
            )
            for number in range(UNLABELLED)
            if number in self.cache
        }

    def batches(self, pairs: list[EncodedPair], size: int = 250):
        return [
            self.collator.collate(pairs[i : i + size])
            for i in range(0, len(pairs), size)
        ]


def pair(user_input: str, response: str) -> PairedExample:
    """The teacher reads the instruction first, the student nothing."""
    context = localize.instruction(LOCALE, FORM)
    return PairedExample(user_input, response, context, simplified_context="")


def labels(split: str, limit: int | None = None) -> dict[int, PairedExample]:
    found = localize.examples(split, locales=[LOCALE], formats=[FORM], limit=limit)
    return dict(enumerate(found))


# Models this small gain little from a second thread, and lose a hundredfold by it where
# another program wants the core.
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

    out:     folder for the student, the figure and the result. Finished rows are kept
             there, and a run with the same settings goes on from them
    seconds: shorten training so that the whole run takes about this long; None trains
             in full whatever it takes
    say:     gets a line of text at each stage

    Raises ArgumentError for seconds that are not positive, StorageError where `out`
    cannot be written.
    """
    if seconds is not None and not seconds > 0:
        raise ArgumentError(f"seconds={seconds}", "use a positive number of seconds")
    start = time.perf_counter()
    out = Path(out)
    try:
        out.mkdir(parents=True, exist_ok=True)
        (out / ".writable").touch()
        (out / ".writable").unlink()
    except OSError as error:
        raise StorageError(
            f"cannot write to {out}: {error}", "name another folder with --out"
        ) from error
    data = Data()
    state = _resume(out, {"version": __version__, "seed": seed, "seconds": seconds})
    # A run that goes on trains as many steps as it did before, whatever fits today.
    steps = state.get("steps") or _steps(data, seed, seconds, start)
    state["steps"] = steps
    plan = _plan(data, steps)
    reference = teacher_reference(LiveTeacher(data.teacher), data.batches(data.test))
    total = sum(p["steps"] for name, p in plan.items() if name not in state["rows"])
    with tqdm(
        total=total,
        unit="step",
        disable=not show_progress,
        bar_format="{l_bar}{bar}| {n_fmt}/{total_fmt} steps, {remaining} left",
    ) as bar:
        for name in ROWS:
            if name in state["rows"]:
                say(f"{name}: done in an earlier run")
                continue
            bar.set_description(name)
            row = _row(name, data, reference, plan.get(name), seed, out, bar)
            state["rows"][name] = asdict(row)
            write_json(out / "rows.json", state)
            say(f"{name}: exact match {row.exact_match:.3f}")
    without = evaluate(data.teacher, data.batches(data.test), reference, side="student")
    facts = {
        "rows": [state["rows"][name] for name in ROWS],
        "teacher_without_context": {"exact_match": without.exact_match},
        "examples": _show(data, out / "student"),
        "labelled": len(data.labelled),
        "unlabelled": len(data.unlabelled),
        "test": len(data.test),
        "seed": seed,
        "steps": steps,
        "student": str(out / "student"),
        "figure": str(out / "quickstart.png"),
        "seconds": round(time.perf_counter() - start, 1),
    }
    from kdlib.plots import exact_match_bars

    exact_match_bars(facts["rows"]).savefig(out / "quickstart.png")
    write_json(out / "result.json", facts)
    return facts


def _row(name, data: Data, reference, plan, seed, out: Path, bar) -> Row:
    """Train one row's model where it needs training, measure it and save it."""
    batches = data.batches(data.test)
    if name == TEACHER:
        model, side, prompts = data.teacher, "teacher", "teacher_prompt_ids"
        folder, plan = models.TEACHER, {"tokens": 0, "flops": 0.0}
    else:
        model = models.build(data.tokenizer, **STUDENT, seed=seed)
        side, prompts = "student", "student_prompt_ids"
        folder = out / ("student" if name == DISTILLED else f"baselines/{slug(name)}")
        plan = plan or {"tokens": 0, "flops": 0.0}
        if name != UNTRAINED:
            fit(model, name, data, plan["steps"], seed, lambda done, loss: bar.update())
        models.save(model, data.tokenizer, folder)
    fidelity: Fidelity = evaluate(model, batches, reference, side=side)
    requests = [getattr(p, prompts) for p in data.test[:256]]
    speed = measure_speed(model, data.tokenizer, requests)
    return Row(
        name=name,
        exact_match=fidelity.exact_match,
        agreement=fidelity.agreement,
        kl=fidelity.kl,
        parameters=parameter_count(model),
        bytes=sum(f.stat().st_size for f in folder.glob("*.safetensors")),
        latency_ms=speed.latency_ms,
        requests_per_s=speed.requests_per_s,
        tokens=plan["tokens"],
        flops=plan["flops"],
    )


def fit(model, name: str, data: Data, steps: int, seed: int, on_step=None):
    """Train a student for one row of the table."""
    soft = name == DISTILLED
    return train(
        model,
        data.unlabelled if soft else data.labelled,
        data.collator,
        Objective("forward_kl", hard_weight=0.0 if soft else 1.0),
        replace(CONFIG, steps=steps, seed=seed),
        teacher=data.cache if soft else None,
        on_step=on_step,
    )


def _plan(data: Data, steps: int) -> dict[str, dict]:
    """Steps, tokens and FLOPs of every trained row.

    A forward pass costs 2 FLOPs a parameter and token, a training step three times as
    much. The teacher reads every unlabelled input twice: to answer it, and to give its
    distributions.
    """
    student = parameter_count(models.build(data.tokenizer, **STUDENT))
    teacher = parameter_count(data.teacher)
    batch = CONFIG.batch_size
    distilled_tokens = steps * batch * _mean_length(data.unlabelled)
    asked = 2 * len(data.unlabelled) * _mean_length(data.unlabelled, "teacher")
    flops = 6 * student * distilled_tokens + 2 * teacher * asked
    labelled_step = batch * _mean_length(data.labelled)
    plan = {DISTILLED: {"steps": steps, "tokens": distilled_tokens, "flops": flops}}
    for name, tokens in (
        (HARD_TOKENS, distilled_tokens),
        (HARD_FLOPS, flops / (6 * student)),
    ):
        count = round(tokens / labelled_step)
        plan[name] = {
            "steps": count,
            "tokens": count * labelled_step,
            "flops": 6 * student * count * labelled_step,
        }
    return {name: {**row, "tokens": round(row["tokens"])} for name, row in plan.items()}


def _mean_length(pairs: list[EncodedPair], side: str = "student") -> float:
    prompts = (getattr(p, f"{side}_prompt_ids") for p in pairs)
    tokens = sum(map(len, prompts)) + sum(len(p.response_ids) for p in pairs)
    return tokens / len(pairs)


def _steps(data: Data, seed: int, seconds: float | None, start: float) -> int:
    """As many steps as fit: a few are timed on a student that is thrown away."""
    if seconds is None:
        return CONFIG.steps
    trial = models.build(data.tokenizer, **STUDENT, seed=seed)
    fit(trial, DISTILLED, data, 3, seed)  # the first steps are slower
    history = fit(trial, DISTILLED, data, 20, seed)
    spent = time.perf_counter() - start
    # All rows' steps together are linear in the distilled student's: the teacher's
    # FLOPs are a constant.
    fixed, full = (
        sum(row["steps"] for row in _plan(data, n).values()) for n in (0, CONFIG.steps)
    )
    # Measuring the five rows takes about a fifth of the whole.
    affordable = (0.8 * seconds - spent) / (history.seconds / 20)
    fitting = CONFIG.steps * (affordable - fixed) / (full - fixed)
    return max(20, min(CONFIG.steps, int(fitting)))


def _resume(out: Path, settings: dict) -> dict:
    """The rows of an earlier run with the same settings, or none."""
    try:
        state = json.loads((out / "rows.json").read_text())
        if state["settings"] == settings and set(state["rows"]) <= set(ROWS):
            return state
    except (OSError, ValueError, KeyError, TypeError):
        pass  # no earlier run, or not one of ours: start afresh
    return {"settings": settings, "rows": {}}


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


def slug(name: str) -> str:
    return name.lower().replace(",", "").replace(" ", "-")


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
        "teacher. ms: one input alone; req/s: a batch of 256; both on one core.",
        "",
        f"The labelled rows saw {facts['labelled']} labels. The distilled student saw",
        f"no label: the teacher answered {facts['unlabelled']} inputs for it, and the",
        "teacher had learned from 20,000 labelled datums. Without its instruction the",
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
