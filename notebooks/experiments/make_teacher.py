"""Make the shipped teacher, kdlib/data/teacher.

    python notebooks/experiments/make_teacher.py train   (about an hour)
    python notebooks/experiments/make_teacher.py score   (ten minutes)

The teacher is a small Llama trained from scratch on the training split. It
reads every kind of context: an instruction, worked examples, both, or nothing.
Answers inside the worked examples count in the loss too: that is what teaches
it to read the task from them. `score` gives it every kind of context on the whole test
split, in all languages and formats, and writes notebooks/results/teacher_scores.json.
"""

from __future__ import annotations

import argparse
import json
import math
import platform
import random
import time
from pathlib import Path

import torch
import torch.nn.functional as F
import transformers

from kdlib import localize, models
from kdlib.evaluate import evaluate, teacher_reference
from kdlib.ledger import provenance, write_json
from kdlib.pairs import PairCollator
from kdlib.teachers import LiveTeacher

RESULT = Path(__file__).parents[1] / "results" / "teacher_scores.json"
SEED = 0
VOCABULARY = 1024
SHAPE = {"hidden_size": 160, "layers": 4, "heads": 5, "intermediate_size": 480}
TOKENS = 15_000_000
BATCH_TOKENS = 4096
PEAK_RATE = 2e-3
WARMUP = 0.02  # share of the tokens
TASKS = [(locale, form) for locale in localize.LOCALES for form in localize.FORMATS]


def tokenizer_for(data) -> object:
    texts = [d.english for d in data] + [text for d in data for text in d.renderings]
    # Instructions are rarer than answers in this list, but not in use.
    for locale, form in TASKS:
        for variant in range(len(localize.INSTRUCTIONS)):
            texts += [localize.instruction(locale, form, variant)] * 100
    return models.train_tokenizer(texts, VOCABULARY)


def episode(rng: random.Random, data) -> tuple[str, list[tuple[int, int]]]:
    """A training text and the character spans that count in the loss."""
    locale, form = rng.choice(TASKS)
    mode = rng.choices(["words", "examples", "both", "nothing"], [45, 30, 10, 15])[0]
    shots = rng.randrange(1, 5) if mode in ("examples", "both") else 0
    *shown, asked = rng.sample(data, shots + 1)
    text, spans = "", []
    if mode != "nothing":
        text += models.CONTEXT
    if mode in ("words", "both"):
        variant = rng.randrange(len(localize.INSTRUCTIONS))
        text += localize.instruction(locale, form, variant)
    for datum in shown:
        if not text.endswith(models.CONTEXT):
            text += "\n"
        line = localize.worked_examples([datum], locale, form)
        answer = len(datum.rendering(locale, form)) + 1  # with the space before it
        text += line
        spans.append((len(text) - answer, len(text)))
    text += models.INPUT + asked.english + models.ANSWER
    answer = asked.rendering(locale, form) + models.END
    return text + answer, [*spans, (len(text), len(text) + len(answer))]


def batches(rng: random.Random, data, tokenizer):
    """Endless batches of about BATCH_TOKENS tokens, rows of like length."""
    while True:
        texts, spans = zip(*(episode(rng, data) for _ in range(1024)), strict=True)
        encoded = tokenizer(
            list(texts), add_special_tokens=False, return_offsets_mapping=True
        )
        rows = []
        for ids, offsets, parts in zip(
            encoded["input_ids"], encoded["offset_mapping"], spans, strict=True
        ):
            counts = [any(s <= a and b <= e for s, e in parts) for a, b in offsets]
            labels = [i if c else -100 for i, c in zip(ids, counts, strict=True)]
            rows.append((ids, labels))
        rows.sort(key=lambda row: len(row[0]))
        found, batch = [], []
        for row in rows:
            if batch and (len(batch) + 1) * len(row[0]) > BATCH_TOKENS:
                found.append(batch)
                batch = []
            batch.append(row)
        rng.shuffle(found)
        for batch in found:
            width = max(len(ids) for ids, _ in batch)
            yield (
                torch.tensor([i + [0] * (width - len(i)) for i, _ in batch]),
                torch.tensor([k + [-100] * (width - len(k)) for _, k in batch]),
            )


def rate(done: float) -> float:
    """Warm-up, then a cosine to 2 % of the peak; `done` is a share."""
    if done < WARMUP:
        return PEAK_RATE * done / WARMUP
    return PEAK_RATE * (0.02 + 0.49 * (1 + math.cos(math.pi * done)))


@torch.no_grad()
def quick_score(model, tokenizer, context: str) -> float:
    """Share of validation answers whose every token is the argmax."""
    right = []
    for number, datum in enumerate(localize.load_split("validation")[:120]):
        locale, form = TASKS[number % len(TASKS)]
        rng = random.Random(number)
        shown = rng.sample(localize.load_split("train"), 3)
        text = {
            "words": models.CONTEXT + localize.instruction(locale, form),
            "examples": models.CONTEXT + localize.worked_examples(shown, locale, form),
            "nothing": "",
        }[context]
        prompt = tokenizer.encode(text + models.INPUT + datum.english + models.ANSWER)
        answer = tokenizer.encode(datum.rendering(locale, form) + models.END)
        logits = model(torch.tensor([prompt + answer])).logits[0]
        predicted = logits[len(prompt) - 1 : -1].argmax(-1)
        right.append(predicted.tolist() == answer)
    return sum(right) / len(right)


def train(out: Path, threads: int) -> None:
    torch.set_num_threads(threads)
    data = localize.load_split("train")
    tokenizer = tokenizer_for(data)
    model = models.build(tokenizer, **SHAPE, seed=SEED).train()
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=PEAK_RATE, betas=(0.9, 0.98), weight_decay=0.01
    )
    start, seen, shown, steps = time.perf_counter(), 0, 0, 0
    for ids, labels in batches(random.Random(SEED), data, tokenizer):
        for group in optimizer.param_groups:
            group["lr"] = rate(seen / TOKENS)
        # Rows are padded on the right, so the causal mask hides the padding.
        logits = model(ids).logits[:, :-1]
        counts = labels[:, 1:] != -100
        loss = F.cross_entropy(logits[counts], labels[:, 1:][counts])
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        seen, steps = seen + ids.numel(), steps + 1
        if seen * 12 // TOKENS > shown or seen >= TOKENS:
            shown = seen * 12 // TOKENS
            model.eval()
            scores = {
                c: round(quick_score(model, tokenizer, c), 3)
                for c in ("words", "examples", "nothing")
            }
            model.train()
            minutes = (time.perf_counter() - start) / 60
            print(
                f"{minutes:5.1f} min  {seen / 1e6:5.1f} M tokens  {scores}", flush=True
            )
            models.save(model, tokenizer, out)
        if seen >= TOKENS:
            break
    facts = {
        "command": "python notebooks/experiments/make_teacher.py train",
        "seed": SEED,
        "steps": steps,
        "tokens": seen,
        "minutes": round((time.perf_counter() - start) / 60, 1),
        "device": f"CPU ({platform.machine()}), {threads} threads",
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "date": time.strftime("%Y-%m-%d"),
    }
    (out / "training.json").write_text(json.dumps(facts, indent=1) + "\n")


def score(out: Path, threads: int) -> None:
    """Exact match by context; KL from the teacher that reads the instruction."""
    torch.set_num_threads(threads)
    teacher, tokenizer = models.load("teacher")
    collator = PairCollator(tokenizer, teacher_max_length=400, student_max_length=400)
    scores: dict[str, dict] = {}
    for locale, form in TASKS:
        for name, shots in [
            ("instruction", 0),
            *(("examples", k) for k in (1, 2, 3, 4)),
            ("nothing", 0),
        ]:
            found = localize.examples(
                "test",
                locales=[locale],
                formats=[form],
                simplified=name,
                shots=max(1, shots),
            )
            pairs = [collator.encode(e, number) for number, e in enumerate(found)]
            pairs.sort(key=lambda p: len(p.student_prompt_ids))
            batches = [
                collator.collate(pairs[i : i + 100]) for i in range(0, len(pairs), 100)
            ]
            reference = teacher_reference(LiveTeacher(teacher), batches)
            fidelity = evaluate(teacher, batches, reference)
            label = f"{name}, {shots} shown" if shots else name
            entry = scores.setdefault(label, {"exact_match": {}, "kl": {}})
            entry["exact_match"][f"{locale} {form}"] = fidelity.exact_match
            entry["kl"][f"{locale} {form}"] = fidelity.kl
            print(locale, form, label, round(fidelity.exact_match, 3), flush=True)
    for entry in scores.values():
        for measure in ("exact_match", "kl"):
            values = entry[measure].values()
            entry[f"mean_{measure}"] = sum(values) / len(values)
    facts = provenance("python notebooks/experiments/make_teacher.py score")
    write_json(out, {**facts, "test": len(pairs), "scores": scores})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("step", choices=["train", "score"])
    parser.add_argument("--out", type=Path, help="another folder, or file of scores")
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    if arguments.step == "train":
        train(arguments.out or models.TEACHER, arguments.threads)
    else:
        score(arguments.out or RESULT, arguments.threads)


if __name__ == "__main__":
    main()
