"""The environment of every test, and of every kernel and command that a test starts."""

import os
from pathlib import Path

ROOT = Path(__file__).parent
paths = [str(ROOT / "tests" / "offline"), str(ROOT)]
inherited = os.environ.get("PYTHONPATH", "").split(os.pathsep)

os.environ["PYTHONPATH"] = os.pathsep.join(
    paths + [path for path in inherited if path and path not in paths]
)
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TQDM_DISABLE"] = "1"  # nbval would compare the bars
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ["OMP_NUM_THREADS"] = "1"  # the workers already share out the cores
