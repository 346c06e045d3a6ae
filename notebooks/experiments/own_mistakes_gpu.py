"""Section 5 of chapter 12 on a GPU: the notebook's own cells, with KD_PROFILE=gpu.

    python notebooks/experiments/own_mistakes_gpu.py

Writes notebooks/results/own_mistakes_gpu.json. Runs the cells between the headings of
sections 5 and 6 as they stand in notebooks/src/12_own_mistakes.py, but for figures: a
teacher of 32^4 answers instead of 8^4, and 8,192 samples a step instead of 64.
"""

from __future__ import annotations

import os
from pathlib import Path

SOURCE = Path(__file__).parents[1] / "src" / "12_own_mistakes.py"


def cells() -> list[str]:
    """The imports and section 5, without what draws."""
    parts = SOURCE.read_text("utf-8").split("\n# %%")
    (start,) = (i for i, part in enumerate(parts) if "\n# ## 5 ·" in part)
    (stop,) = (i for i, part in enumerate(parts) if "\n# ## 6 ·" in part)
    (imports,) = (part for part in parts if "import matplotlib" in part)
    (names,) = (part for part in parts if "\nWORDS = [" in part)
    chosen = [imports, names, *parts[start:stop]]
    code = [part for part in chosen if not part.startswith(" [markdown]")]
    code = [part for part in code if "plt.show()" not in part]
    return [
        "\n".join(line for line in part.splitlines() if "plt" not in line)
        for part in code
    ]


def main() -> None:
    os.environ["KD_PROFILE"] = "gpu"
    import kdlib

    names = {"kdlib": kdlib, "PROFILE": "gpu"}
    for cell in cells():
        exec(compile(cell, str(SOURCE), "exec"), names)


if __name__ == "__main__":
    main()
