"""Every experiment runs at a small scale, and its result file holds what is claimed.

Nothing is learned at the sizes here: `python -m kdlib ledger CLAIM` looks whether a
claim holds. Its own small sizes are in notebooks/claims.toml.
"""

from __future__ import annotations

import ast
import importlib
import json
import subprocess
import sys

import pytest

from kdlib import claims, ledger
from kdlib.errors import ArgumentError, DataError

FOLDER = claims.FOLDER / "experiments"
KNOWN = claims.load()
SMALL = {
    "boxed_targets.py": "--seeds 2 --share 0.001",
    "clinic.py": "--seeds 2 --share 0.01 --tests 4",
    "capstone_example.py": "--seeds 2 --share 0.001",
    "context_distillation.py": "--seeds 2 --share 0.01",
    "dark_knowledge.py": "--seeds 2 --share 0.001",
    "data_size.py": "--seeds 2 --share 0.001",
    "data_teachers.py": "--seeds 2 --share 0.001",
    "forgetting.py": "--seeds 2 --share 0.001 --tests 5",
    "hard_and_soft.py": "--seeds 2 --share 0.001",
    "hinton_digits.py": "--seeds 2 --share 0.001",
    "own_mistakes.py": "--seeds 2 --share 0.001 --inputs 4",
    "phone_students.py": "--seeds 2 --share 0.001",
    "precision_and_split.py": "--seeds 2 --steps 2",
    "probe_students.py": "--seeds 2 --share 0.001",
    "quickstart_seeds.py": "--seeds 2 --share 0.001",
    "smollm2_floor.py": "--seeds 2 --questions 2 --inputs 2 --new-tokens 4 --steps 1 "
    "--model kdlib/data/teacher",  # a hundredth of SmolLM2
    "student_sizes.py": "--seeds 2 --share 0.001 --widths 48",
    "torn_teacher.py": "--seeds 2 --share 0.001 --inputs 32",
}
# Scripts without a run here, and what stands for it.
ELSEWHERE = {
    "doctor_runs.py": "no command; tests/test_doctor.py makes its runs",
    "doctor_table.py": "tests/test_doctor.py goes through the same faults",
    "doctor_zoo.py": "no command; tests/test_doctor.py makes its batches",
    "gpu_loop.py": "needs a GPU",
    "hf_trainer.py": "writes no result; tests/test_ecosystem.py trains with it",
    "laws_by_hand.py": "needs five other libraries",
    "laws_peers.py": "needs five other libraries",
    "make_corpus.py": "tests/test_localize.py makes the corpus again",
    "make_quickstart_targets.py": "an hour of a core, and writes data, no result",
    "make_teacher.py": "hours of a core; tests/test_repository.py reads its scores",
    "own_mistakes_gpu.py": "needs a GPU",
    "parallel.py": "no command; three experiments above run through it",
    "phone_latency.py": "a clock, no seeds; what it runs is held to torch by "
    "tests/test_onnx_model.py and tests/test_quantised.py",
    "smollm2_common.py": "no command; tests/test_ecosystem.py runs it",
    "smollm2_context.py": "tests/test_ecosystem.py runs it with a smaller model",
    "smollm2_first_layers.py": "tests/test_ecosystem.py runs it with a smaller model",
}
# Claims that `ledger` cannot rerun on a CPU within minutes, each with its reason.
NOT_SMALL: dict[str, str] = {}


def test_no_experiment_is_forgotten():
    scripts = {path.name for path in FOLDER.glob("*.py")}
    assert scripts == set(SMALL) | set(ELSEWHERE)
    assert not set(SMALL) & set(ELSEWHERE)


def test_every_claim_has_a_small_scale_and_a_script_that_is_run_here():
    assert {claim.script for claim in KNOWN.values()} <= set(SMALL)
    assert {name for name, claim in KNOWN.items() if not claim.small} == set(NOT_SMALL)


def test_a_claim_without_a_small_scale_is_not_rerun_in_full_by_mistake():
    claim = claims.Claim("a", "b", "c.json", ("d",), "e.py", (), "above")
    with pytest.raises(ArgumentError, match="no small scale(.|\n)*--scale full"):
        claims.rerun(claim)


@pytest.mark.slow
@pytest.mark.parametrize("script", SMALL)
def test_an_experiment_runs_and_writes_what_its_claims_read(script, tmp_path):
    out = tmp_path / "result.json"
    command = [sys.executable, str(FOLDER / script), *SMALL[script].split()]
    done = subprocess.run([*command, "--out", str(out)], capture_output=True, text=True)
    assert not done.returncode, done.stderr
    facts = json.loads(out.read_text())
    assert facts["command"].startswith(f"python notebooks/experiments/{script} ")
    assert "--seeds 2" in facts["command"] and str(tmp_path) not in facts["command"]
    for name in ("date", "device", "python", "torch", "transformers"):
        assert facts[name], name
    assert facts.get("minutes", facts.get("core_minutes")) is not None
    for claim in (c for c in KNOWN.values() if c.script == script):
        found = claim.interval(out)
        assert found is None or found.low <= found.mean <= found.high, claim.id


@pytest.mark.slow
def test_what_one_share_made_is_not_gone_on_with_by_another(tmp_path):
    out = tmp_path / "result.json"

    def run(*options):
        command = [sys.executable, str(FOLDER / "hinton_digits.py"), "--out", str(out)]
        return subprocess.run([*command, *options], capture_output=True, text=True)

    assert not run("--seeds", "1", "--share", "0.001").returncode
    before = out.read_bytes()
    refused = run("--seeds", "2", "--share", "0.002")
    assert refused.returncode and out.read_bytes() == before
    assert "steps = 2 there, 4 now" in refused.stderr and "--out FILE" in refused.stderr


def test_every_experiment_that_goes_on_asks_whether_it_may():
    """None reads the runs of its file by itself."""
    for script in SMALL:
        text = (FOLDER / script).read_text()
        asks = "resume" in {
            getattr(node.func, "id", None)
            for node in ast.walk(ast.parse(text))
            if isinstance(node, ast.Call)
        }
        starts_anew = ("quickstart_seeds.py", "precision_and_split.py")
        assert asks or script in starts_anew, script
        assert "out.read_text" not in text, script


# --- Going on, and what a file says of its making ---

RUNS = [{"seed": 0, "row": "a"}, {"seed": 1, "row": "a"}]
SETTINGS = {"steps": {48: 3}, "rates": (0.1, 0.2)}


@pytest.fixture
def file(tmp_path):
    out = tmp_path / "one.json"
    ledger.write_json(out, {**SETTINGS, "runs": RUNS, "core_minutes": 1.5})
    return out


def test_the_same_experiment_goes_on(file, tmp_path):
    assert ledger.resume(file, SETTINGS, seeds=2) == (RUNS, 1.5)
    assert ledger.resume(file, {"rates": [0.1, 0.2]}) == (RUNS, 1.5)
    assert ledger.resume(tmp_path / "none.json", SETTINGS, seeds=1) == ([], 0.0)


@pytest.mark.parametrize(
    "settings, says",
    [
        ({"steps": {48: 4}}, r"steps = \{'48': 3\} there, \{'48': 4\} now"),
        ({"steps": {48: 3}, "rates": (0.1,)}, r"rates = \[0.1, 0.2\] there"),
        ({"batch": 8}, "batch = None there, 8 now"),
        ({"batch": None}, "batch = None there, None now"),
    ],
)
def test_another_experiment_is_refused(file, settings, says):
    with pytest.raises(DataError, match=says) as refused:
        ledger.resume(file, settings, seeds=2)
    assert str(file) in refused.value.what and "--out FILE" in refused.value.remedy


def test_fewer_seeds_than_there_are_would_lose_some(file):
    with pytest.raises(DataError, match="2 seeds, and 1 were asked for"):
        ledger.resume(file, SETTINGS, seeds=1)


@pytest.mark.parametrize("text", ["{", "[]", '{"runs": 3}'])
def test_what_is_no_result_file_is_refused(file, text):
    file.write_text(text)
    with pytest.raises(DataError, match="no result file"):
        ledger.resume(file, SETTINGS)


def test_a_file_whose_first_run_was_not_finished_decides_nothing(file):
    ledger.write_json(file, {"steps": 1, "runs": [], "core_minutes": 0.5})
    assert ledger.resume(file, {"steps": 2}) == ([], 0.5)


def test_the_command_that_a_file_names():
    options = {"seeds": 2, "batch_size": 4, "widths": [32, 48], "rows": ["a b"]}
    rest = {"out": "/somewhere/else.json", "model": None, "quiet": False, "all": True}
    assert ledger.command_of("one.py", options | rest) == (
        "python notebooks/experiments/one.py --seeds 2 --batch-size 4 "
        "--widths 32 48 --rows 'a b' --all"
    )


def test_languages_at_an_equal_share_of_right_answers(monkeypatch):
    """By hand: between T = 0.9 and 0.8, half way."""
    monkeypatch.syspath_prepend(str(FOLDER))
    torn = importlib.import_module("torn_teacher")
    right, kept = (0.2, 0.3, 0.4, 0.5, 0.6, 0.7), (4.0, 3.0, 2.0, 1.5, 1.2, 1.1)
    places = zip(map(str, torn.COOLED), right[1:], kept[1:], strict=True)
    cooled = {t: {"valid": v, "languages": n} for t, v, n in places}
    run = {"valid": right[0], "languages": kept[0], "cooled": cooled}
    assert torn.languages_at(0.35, run) == pytest.approx(2.5)
    assert torn.languages_at(0.2, run) == 4.0
    assert torn.reaches(0.7, run) and not torn.reaches(0.71, run)
    assert not torn.reaches(0.19, run)
