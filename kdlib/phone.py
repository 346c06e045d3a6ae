"""The running example: a phone whose user reads French.

The app has 300 labelled French examples and 6,000 inputs that nobody has labelled. The
teacher reads an instruction in plain words (the context c) before every input; the
student reads the input alone (x' = z), because on this phone the instruction never
changes.

    teacher            reads c and z
    untrained          the student before training
    hard labels        trained on the 300 labels, with as many tokens as the distilled
                       student, and once more with as many FLOPs (the teacher's counted)
    distilled          trained on the teacher's answers and distributions for the 6,000

The teacher was trained on 20,000 values with labels in every language: that is what it
knows and the student's labels do not. Its targets for the 6,000 inputs, which it has
never seen, are shipped in a file, so that nobody waits for it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from kdlib import localize, models
from kdlib.evaluate import parameter_count
from kdlib.objective import Objective
from kdlib.pairs import EncodedPair, PairCollator, PairedExample
from kdlib.teachers import CachedTeacher
from kdlib.train import TrainConfig, train

LOCALE, FORM = "fr", "long"
LABELLED = 300
STUDENT = {"hidden_size": 64, "layers": 2, "heads": 4}
# Small batches: at this size an update counts for more than a smoother gradient.
CONFIG = TrainConfig(steps=1100, batch_size=32, learning_rate=4e-3)
TARGETS = models.DATA / "quickstart_targets.safetensors"

TEACHER = "teacher"
UNTRAINED = "untrained student"
HARD_TOKENS = "hard labels, equal tokens"
HARD_FLOPS = "hard labels, equal FLOPs"
DISTILLED = "distilled student"
ROWS = (TEACHER, UNTRAINED, HARD_TOKENS, HARD_FLOPS, DISTILLED)


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
        return {
            number: pair(
                datum.english,
                self.tokenizer.decode(self.cache.response_ids(number)[:-1]),
            )
            for number, datum in enumerate(localize.load_split("unlabelled"))
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


@dataclass(frozen=True)
class Budget:
    """What training one row costs, and how many teacher's answers it reads."""

    steps: int
    tokens: int
    flops: float
    unlabelled: int = 0


def budgets(data: Data, share: float = 1.0) -> dict[str, Budget]:
    """Each trained row's budget; `share` shortens them all alike.

    A forward pass costs 2 FLOPs a parameter and token, a training step three times as
    much. The teacher reads every unlabelled input and its own answer once, for the
    distributions come with the answer.
    """
    student = parameter_count(models.build(data.tokenizer, **STUDENT))
    teacher = parameter_count(data.teacher)
    steps = max(1, round(share * CONFIG.steps))
    read = data.unlabelled[
        : max(CONFIG.batch_size, round(share * len(data.unlabelled)))
    ]
    tokens = steps * CONFIG.batch_size * _mean_length(read)
    asked = len(read) * _mean_length(read, "teacher")
    flops = 6 * student * tokens + 2 * teacher * asked
    found = {DISTILLED: Budget(steps, round(tokens), flops, len(read))}
    labelled_step = CONFIG.batch_size * _mean_length(data.labelled)
    for name, wanted in ((HARD_TOKENS, tokens), (HARD_FLOPS, flops / (6 * student))):
        steps = max(1, round(wanted / labelled_step))
        read_tokens = steps * labelled_step
        found[name] = Budget(steps, round(read_tokens), 6 * student * read_tokens)
    return found


def _mean_length(pairs: list[EncodedPair], side: str = "student") -> float:
    prompts = (getattr(p, f"{side}_prompt_ids") for p in pairs)
    tokens = sum(map(len, prompts)) + sum(len(p.response_ids) for p in pairs)
    return tokens / len(pairs)


def fit(
    name: str,
    data: Data,
    budget: Budget,
    seed: int,
    on_step: Callable[[int, float], None] | None = None,
    device: str = "cpu",
):
    """Train the student of one row; return it."""
    student = models.build(data.tokenizer, **STUDENT, seed=seed).to(device)
    soft = name == DISTILLED
    train(
        student,
        data.unlabelled[: budget.unlabelled] if soft else data.labelled,
        data.collator,
        Objective("forward_kl", hard_weight=0.0 if soft else 1.0),
        replace(CONFIG, steps=budget.steps, seed=seed),
        teacher=data.cache if soft else None,
        on_step=on_step,
    )
    return student


def folder_of(name: str, out: Path) -> Path:
    """Where a row's model lies."""
    if name == TEACHER:
        return models.TEACHER
    slug = name.lower().replace(",", "").replace(" ", "-")
    return out / ("student" if name == DISTILLED else f"baselines/{slug}")
