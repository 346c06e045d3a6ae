"""Make kdlib/data/quickstart_targets.safetensors with the shipped teacher.

    python notebooks/experiments/make_quickstart_targets.py [--out FILE]

The teacher, reading its instruction, answers the 6,000 unlabelled inputs greedily;
then it reads its answers once more, and the 8 likeliest tokens of every position are
kept with their log-probabilities. No label is used.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from kdlib import localize, models, phone
from kdlib.errors import DataError
from kdlib.ledger import provenance
from kdlib.pairs import PairCollator
from kdlib.sampling import complete
from kdlib.teachers import LiveTeacher, write_cache

K = 8
MAX_ANSWER = 40


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=phone.TARGETS)
    out = parser.parse_args().out
    teacher, tokenizer = models.load("teacher")
    collator = PairCollator(tokenizer, teacher_max_length=128, student_max_length=128)
    data = localize.load_split("unlabelled")
    prompts = [
        # The response is not known yet; any text will do for the prompt's ids.
        collator.encode(phone.pair(d.english, "?")).teacher_prompt_ids
        for d in data
    ]
    answers = complete(teacher, tokenizer, prompts, max_new_tokens=MAX_ANSWER)
    pairs, cut = [], 0
    for number, (datum, ids) in enumerate(zip(data, answers, strict=True)):
        if len(ids) == MAX_ANSWER:
            cut += 1  # it never ended: no answer to learn from
            continue
        try:
            example = phone.pair(datum.english, tokenizer.decode(ids))
            pairs.append(collator.encode(example, number))
        except DataError:
            cut += 1  # an empty answer
    batches = (collator.collate(pairs[i : i + 100]) for i in range(0, len(pairs), 100))
    facts = provenance("python notebooks/experiments/make_quickstart_targets.py")
    write_cache(out, LiveTeacher(teacher), batches, tokenizer, k=K, facts=facts)
    print(f"{len(pairs)} answers kept, {cut} without an end or empty left out")
    print(f"{out.stat().st_size} bytes")


if __name__ == "__main__":
    main()
