"""SmolLM2-135M-Instruct distilled into a student made of its own first layers.

    python notebooks/experiments/smollm2_first_layers.py [--steps 24] [--layers 8]

Ordinary distillation: both read the same prompt. Writes
notebooks/results/smollm2_first_layers.json.
"""

from __future__ import annotations

from pathlib import Path

from smollm2_common import RESULTS, parser, report

from kdlib import models


def main() -> None:
    arguments = parser(
        __doc__.splitlines()[0],
        layers=8,
        steps=24,
        questions=48,
        new_tokens=24,
        batch_size=4,
        seed=0,
        learning_rate=5e-4,
    )
    out = RESULTS / "smollm2_first_layers.json"
    arguments.add_argument("--out", type=Path, default=out)
    options = arguments.parse_args()
    report(
        "smollm2_first_layers",
        options,
        lambda teacher: models.first_layers(teacher, options.layers),
    )


if __name__ == "__main__":
    main()
