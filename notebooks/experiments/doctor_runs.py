"""Training runs for the doctor: healthy ones, and broken ones with their cause.

Each is a real run of kdlib.train with the shipped teacher, a hundred steps or so, in a
folder of its own. A broken one has one thing wrong, in its settings or in a part that
`train` is given. Four faults (a machine that slows down, memory that leaks, a bad
batch, NaN) are written into the metrics of a healthy run.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch

from kdlib import localize, models, train_command
from kdlib.objective import Objective
from kdlib.pairs import EncodedPair, PairCollator
from kdlib.target_cache import write_cache
from kdlib.teachers import CachedTeacher, LiveTeacher
from kdlib.train import TrainConfig, train

CONFIG = TrainConfig(steps=120, batch_size=8, learning_rate=4e-3, log_every=4)


@dataclass(frozen=True)
class Run:
    """name: of the run; expected: the findings that the doctor has to make
    make: (Bench, folder) -> leaves the run there
    floor: for examine_run
    """

    name: str
    expected: frozenset[str]
    make: Callable[[Bench, Path], None]
    floor: float | None = None
    seen: str = ""


HEALTHY: list[Run] = []
BROKEN: list[Run] = []


def healthy(name: str):
    def register(make):
        HEALTHY.append(Run(name, frozenset(), make))
        return make

    return register


def broken(*expected: str, name: str, floor: float | None = None, seen: str = ""):
    def register(make):
        BROKEN.append(Run(name, frozenset(expected), make, floor, seen))
        return make

    return register


@dataclass
class Bench:
    """Models and data, loaded once."""

    examples: int = 256
    encoded: dict[str, list[EncodedPair]] = field(default_factory=dict)

    def __post_init__(self):
        self.teacher, self.tokenizer = models.load("teacher")
        self.collator = PairCollator(self.tokenizer)
        rows = localize.examples(
            "train", locales=["fr"], formats=["long"], limit=self.examples
        )
        self.rows = rows
        bare = [replace(row, context="") for row in rows]
        both = [replace(row, simplified_context=row.context) for row in rows]
        for name, some in (("context", rows), ("none", bare), ("both", both)):
            pairs = [self.collator.encode(e, i) for i, e in enumerate(some)]
            self.encoded[name] = pairs

    def student(self, seed=0, **changes):
        shape = {"hidden_size": 48, "layers": 2, "heads": 2} | changes
        return models.build(self.tokenizer, **shape, seed=seed)

    def train(
        self,
        folder: Path,
        objective: Objective | None = None,
        *,
        data: str | list[EncodedPair] = "context",
        student=None,
        teacher="live",
        **config,
    ) -> None:
        pairs = self.encoded[data] if isinstance(data, str) else data
        train(
            self.student() if student is None else student,
            pairs,
            self.collator,
            Objective() if objective is None else objective,
            replace(CONFIG, **config),
            teacher=LiveTeacher(self.teacher) if teacher == "live" else teacher,
            folder=folder,
        )

    def cached(self, folder: Path, **options) -> CachedTeacher:
        folder.mkdir(parents=True, exist_ok=True)
        batches = [self.collator.collate(self.encoded["context"])]
        teacher = LiveTeacher(self.teacher)
        path = folder / "targets.safetensors"
        write_cache(path, teacher, batches, self.tokenizer, **options)
        return CachedTeacher(path, self.tokenizer)


# --- Healthy --------------------------------------------------------------------------


@healthy("ordinary distillation")
def _(b, folder):
    b.train(folder, data="both")


@healthy("context distillation")
def _(b, folder):
    b.train(folder)


@healthy("hard labels")
def _(b, folder):
    b.train(folder, Objective(hard_weight=1.0), teacher=None)


@healthy("soft and hard, T = 2")
def _(b, folder):
    b.train(folder, Objective(temperature=2.0, hard_weight=0.5), seed=1)


@healthy("cached top-k targets")
def _(b, folder):
    b.train(folder, teacher=b.cached(folder, k=16))


@healthy("on-policy, reverse KL")
def _(b, folder):
    b.train(
        folder,
        Objective("reverse_kl"),
        student=copy.deepcopy(b.teacher),
        learning_rate=1e-4,
        lmbda=1.0,
        max_new_tokens=24,
        steps=40,
    )


@healthy("reverse KL")
def _(b, folder):
    b.train(folder, Objective("reverse_kl"), data="both", seed=2)


@healthy("JSD, T = 3")
def _(b, folder):
    objective = Objective(
        "generalized_jsd", temperature=3.0, divergence_params={"beta": 0.5}
    )
    b.train(folder, objective, micro_batch_size=4)


@healthy("skew KL, sequence mean")
def _(b, folder):
    b.train(folder, Objective("skew_kl", reduction="sequence_mean"))


@healthy("the teacher's own context, distilled into itself")
def _(b, folder):
    student = copy.deepcopy(b.teacher)
    b.train(folder, student=student, learning_rate=3e-4, steps=60)


@healthy("total variation, flat where the student starts")
def _(b, folder):
    b.train(folder, Objective("tvd"), data="both")


@healthy("half on-policy, thirty steps")
def _(b, folder):
    student = copy.deepcopy(b.teacher)
    on_policy = {"lmbda": 0.5, "max_new_tokens": 32}
    b.train(folder, student=student, steps=30, learning_rate=1e-4, **on_policy)


@healthy("a student that is its teacher already")
def _(b, folder):
    student = copy.deepcopy(b.teacher)
    b.train(folder, student=student, data="both", learning_rate=1e-4, steps=40)


# --- Broken: the optimiser ------------------------------------------------------------


@broken("diverging", name="a rate a hundred times too high")
def _(b, folder):
    student = copy.deepcopy(b.teacher)
    b.train(folder, student=student, learning_rate=5e-2, steps=60)


@broken("no_warmup", name="the full rate at once")
def _(b, folder):
    student = copy.deepcopy(b.teacher)
    b.train(folder, student=student, learning_rate=3e-2, warmup=0.0, steps=40)


@broken("learning_rate_zero", name="a rate that moves nothing")
def _(b, folder):
    b.train(folder, learning_rate=1e-9, steps=40)


@broken("not_learning", name="a student that is frozen but for its last norm")
def _(b, folder):
    student = b.student().requires_grad_(False)
    student.model.norm.requires_grad_(True)
    b.train(folder, student=student, learning_rate=1e-4, steps=40)


@broken("gradient_vanishes", name="total variation from a saturated student")
def _(b, folder):
    student = b.student()
    with torch.no_grad():
        student.model.norm.weight.mul_(1e5)
    b.train(folder, Objective("tvd"), student=student, steps=40)


@broken("always_clipped", name="a sum, with the limit of a mean")
def _(b, folder):
    b.train(folder, Objective(reduction="sum"), steps=60)


# --- Broken: the loss -----------------------------------------------------------------


def scaled(b, folder, factor, parts_too=False, **settings):
    """The loss that is differentiated and reported is `factor` times what it should be.

    The run's record names the Objective that was meant.
    """

    class Scaled(Objective):
        def __call__(self, student_logits, *arguments, **options):
            loss = super().__call__(student_logits, *arguments, **options)
            times, parts = factor(student_logits), loss.parts
            if parts_too:
                parts = {name: times * part for name, part in parts.items()}
            return loss._replace(total=times * loss.total, parts=parts)

    b.train(folder, Scaled(**settings), steps=40)


@broken(
    "t2_missing",
    name="T^2 left out",
    seen="TropComplique/knowledge-distillation-keras#2",
)
def _(b, folder):
    scaled(b, folder, lambda logits: 1 / 9, temperature=3.0)


@broken("wrong_scale", name="times the world size")
def _(b, folder):
    scaled(b, folder, lambda logits: 8.0)


@broken(
    "mean_over_vocabulary",
    name="torch's mean",
    seen="haitongli/knowledge-distillation-pytorch#2, NVIDIA ModelOpt",
)
def _(b, folder):
    scaled(b, folder, lambda logits: 1 / logits.shape[-1], True)


@broken("sum_for_mean", name="a sum where a mean is declared")
def _(b, folder):
    scaled(b, folder, lambda logits: float(len(logits)), True)


@broken(
    "padding_in_denominator",
    name="divided by all positions",
    seen="huggingface/trl#7024",
)
def _(b, folder):
    scaled(b, folder, lambda logits: 1 / 6, True)


@broken("wrong_sign", name="the sign")
def _(b, folder):
    scaled(b, folder, lambda logits: -1.0, True)


@broken("wrong_sign", name="the sign of the total alone, T = 3")
def _(b, folder):
    scaled(b, folder, lambda logits: -1.0, temperature=3.0)


class Beginnings(Objective):
    """The first five tokens of each response alone."""

    def __call__(self, student_logits, targets, response_ids, *, row_ids, num_items):
        place = torch.arange(len(row_ids)) - torch.searchsorted(row_ids, row_ids)
        few = place < 5
        return super().__call__(
            student_logits[few], targets[few], response_ids[few], row_ids=row_ids[few]
        )


@broken("late_positions_stuck", name="a length limit in the loss")
def _(b, folder):
    b.train(folder, Beginnings(), data="both")


@broken("top_k_renormalised", name="both sides renormalised on the top k")
def _(b, folder):
    teacher = b.cached(folder, k=16, tail="renormalize")
    b.train(folder, teacher=teacher)


@broken("top_k_tail_cut", name="forward KL cut off after the top k")
def _(b, folder):
    objective = Objective(temperature=2.0)
    teacher = b.cached(folder, k=32, tail="zero", temperature=2.0)
    b.train(folder, objective, student=copy.deepcopy(b.teacher), teacher=teacher)


def mistaken(change) -> Objective:
    """Forward KL by its name, from targets that are not the teacher's."""

    class Mistaken(Objective):
        def _soft(self, student_logits, targets):
            return super()._soft(student_logits, change(targets))

    return Mistaken()


@broken("too_flat", name="the teacher alone is softened")
def _(b, folder):
    objective = mistaken(lambda logits: logits / 4)
    student = copy.deepcopy(b.teacher)
    b.train(
        folder, objective, student=student, data="both", learning_rate=1e-3, steps=40
    )


@broken("overconfident", name="the teacher's likeliest token as the target")
def _(b, folder):
    objective = mistaken(lambda logits: 20 * logits)
    student = copy.deepcopy(b.teacher)
    b.train(
        folder, objective, student=student, data="none", learning_rate=1e-3, steps=100
    )


@broken("fidelity_stuck", name="targets of a vocabulary that is numbered otherwise")
def _(b, folder):
    objective = mistaken(lambda logits: logits.roll(7, -1))
    b.train(folder, objective, data="both")


@broken("teacher_mass_low", name="k too small for the temperature")
def _(b, folder):
    teacher = b.cached(folder, k=2, temperature=4.0)
    b.train(folder, Objective(temperature=4.0), teacher=teacher, steps=60)


@broken("unfinished_responses", name="on-policy with room for two tokens")
def _(b, folder):
    b.train(
        folder,
        Objective("reverse_kl"),
        student=copy.deepcopy(b.teacher),
        learning_rate=1e-4,
        lmbda=1.0,
        max_new_tokens=2,
        steps=30,
    )


# --- Broken: student and data ---------------------------------------------------------


def from_file(b, folder, rows, validation, student, **config):
    """A run of `python -m kdlib train`, with its result.json."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, some in (("data", rows), ("validation", validation)):
        lines = (json.dumps(vars(row)) for row in some)
        (folder / f"{name}.jsonl").write_text("\n".join(lines))
    settings = {"steps": 30, "batch_size": 16, "log_every": 2, **config}
    tables = {
        "train": settings,
        "data": {"source": str(folder / "data.jsonl")},
        "teacher": {"model": "teacher"},
        "student": {"model": str(student)},
        "validation": {"source": str(folder / "validation.jsonl")},
    }
    lines = []
    for name, table in tables.items():
        lines += [f"[{name}]", *(f"{k} = {json.dumps(v)}" for k, v in table.items())]
    (folder / "run.toml").write_text("\n".join(lines))
    train_command.run(folder / "run.toml", folder)


@broken("validation_far", name="trained on D, used on D'")
def _(b, folder):
    rows = [replace(row, simplified_context=row.context) for row in b.rows]
    from_file(b, folder, rows, b.rows[:64], "teacher", learning_rate=1e-5)


@broken("starts_too_high", name="a head ten times too large")
def _(b, folder):
    student = b.student()
    with torch.no_grad():
        student.model.norm.weight.mul_(10.0)
    models.save(student, b.tokenizer, folder / "start")
    rows = b.rows[:64]
    from_file(b, folder, rows, rows, folder / "start", learning_rate=1e-3)


@broken("plateau_above_floor", name="a last norm that trains alone", floor=0.0)
def _(b, folder):
    student = b.student().requires_grad_(False)
    student.model.norm.requires_grad_(True)
    b.train(folder, student=student, data="both", learning_rate=0.3, final_rate=0.5)


@broken("below_floor", name="a student that reads the context", floor=0.8)
def _(b, folder):
    student = copy.deepcopy(b.teacher)
    b.train(folder, student=student, data="both", learning_rate=1e-5, steps=30)


# --- Broken: the machine --------------------------------------------------------------


def rewritten(b, folder, change):
    """A healthy run's metrics with one number changed: change(0 .. 1, line)."""
    b.train(folder, data="both", steps=60)
    path = folder / "metrics.jsonl"
    lines = [json.loads(text) for text in path.read_text().splitlines()]
    for i, line in enumerate(lines):
        change(i / len(lines), line)
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))


@broken("throughput_collapses", name="a machine that slows down")
def _(b, folder):
    rewritten(
        b, folder, lambda at, x: x.update(tokens_per_s=1e4 if at < 0.6 else 500.0)
    )


@broken("memory_grows", name="logits kept alive", seen="modelscope/ms-swift#10097")
def _(b, folder):
    rewritten(b, folder, lambda at, x: x.update(peak_memory=int(2**30 * (1 + 9 * at))))


@broken("gradient_spikes", name="one bad batch")
def _(b, folder):
    rewritten(
        b, folder, lambda at, x: x.update(grad_norm=x["grad_norm"] * 1e3 ** (at == 0.5))
    )


@broken("loss_not_finite", name="a loss that is NaN", seen="linkedin/Liger-Kernel#769")
def _(b, folder):
    rewritten(b, folder, lambda at, x: x.update(loss=None if at > 0.9 else x["loss"]))
