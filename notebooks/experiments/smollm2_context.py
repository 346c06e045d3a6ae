"""SmolLM2-135M-Instruct distilled into itself, with its instruction taken away.

    python notebooks/experiments/smollm2_context.py [--steps 20]

Context distillation: the teacher reads an instruction and a question, the student, the
same weights at first, the question alone. Writes
notebooks/results/smollm2_context.json.
"""

from __future__ import annotations

import copy
from pathlib import Path

from smollm2_common import RESULTS, parser, report

INSTRUCTION = (
    "You are a pirate. Answer in one short sentence, and talk like a pirate: "
    "begin with Arrr!"
)


def main() -> None:
    arguments = parser(
        __doc__.splitlines()[0],
        steps=20,
        questions=40,
        new_tokens=24,
        batch_size=4,
        seed=0,
        learning_rate=5e-5,
    )
    arguments.add_argument("--out", type=Path, default=RESULTS / "smollm2_context.json")
    options = arguments.parse_args()
    report("smollm2_context", options, copy.deepcopy, context=INSTRUCTION)


if __name__ == "__main__":
    main()
