"""Where the site's parts lie, and what pyproject.toml says of the project."""

import tomllib
from pathlib import Path

DOCS = Path(__file__).resolve().parent
ROOT = DOCS.parent
RESULTS = ROOT / "notebooks" / "results"
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))
# One setting names the repository; the badges of the notebooks are tested against it.
REPOSITORY = f"https://github.com/{PROJECT['tool']['kdlib']['repository']}"
