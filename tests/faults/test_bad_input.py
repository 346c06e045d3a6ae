"""Bad input: a clear error each time, and the folder is as it was before."""

from __future__ import annotations

import errno
import inspect
import json
import os
import pickle
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from kdlib import checkpoints, localize, models, training_state
from kdlib.distributed import ALONE, Ranks
from kdlib.errors import (
    ArgumentError,
    DataError,
    KdlibError,
    StorageError,
    TrainingError,
)
from kdlib.memory import way_out
from kdlib.metrics import Record
from kdlib.objective import Objective
from kdlib.pairs import EncodedPair, PairCollator
from kdlib.settings import MAY_CHANGE
from kdlib.teachers import CachedTeacher, LiveTeacher
from kdlib.train import TrainConfig, train

CONFIG = TrainConfig(steps=6, batch_size=4, learning_rate=1e-2, checkpoint_every=2)
HARD = Objective(hard_weight=1.0)


def contents(folder):
    """Every path below a folder with its bytes, hidden ones too."""
    return {
        path.relative_to(folder): path.read_bytes() if path.is_file() else None
        for path in folder.rglob("*")
    }


def refused(error, match, folder, action):
    """`action` raises `error`, says something about it, and changes nothing."""
    before = contents(folder)
    with pytest.raises(error, match=match) as raised:
        action()
    assert isinstance(raised.value, KdlibError) and raised.value.remedy
    assert contents(folder) == before


# --- Settings ---


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("steps", 0),
        ("steps", -1),
        ("steps", 10.5),
        ("steps", "10"),
        ("steps", None),
        ("steps", True),
        ("batch_size", 0),
        ("batch_size", 1.0),
        ("micro_batch_size", 0),
        ("micro_batch_size", "all"),
        ("learning_rate", 0.0),
        ("learning_rate", float("nan")),
        ("learning_rate", float("inf")),
        ("learning_rate", "fast"),
        ("warmup", -0.1),
        ("warmup", 100),
        ("final_rate", 1.5),
        ("weight_decay", -0.01),
        ("weight_decay", float("nan")),
        ("max_grad_norm", 0),
        ("max_grad_norm", None),
        ("seed", 0.5),
        ("precision", "bf61"),
        ("precision", 16),
        ("compile", "yes"),
        ("fused", 1),
        ("checkpoint_every", 0),
        ("keep_checkpoints", 0),
        ("log_every", -5),
    ],
)
def test_a_setting_that_cannot_work(tmp_path, name, value):
    options = {"steps": 6} | {name: value}
    refused(ArgumentError, name, tmp_path, lambda: TrainConfig(**options))


@pytest.mark.parametrize(
    ("name", "text", "error", "match"),
    [
        ("a.toml", "steps = 3\nlearnig_rate = 1", ArgumentError, "'learning_rate'"),
        ("a.yaml", "steps: 3\nbatchsize: 4", ArgumentError, "'batch_size'"),
        ("a.toml", "batch_size = 4", ArgumentError, "'steps' is missing"),
        ("a.toml", "steps = '3'", ArgumentError, "a.toml: steps='3'"),
        ("a.yaml", "steps: 3\nlearning_rate: 3e", ArgumentError, "learning_rate='3e'"),
        ("a.yaml", "steps: 3\nseed: 1e3", ArgumentError, "seed='1e3'"),
        ("a.yaml", "steps: 3\nfused: maybe", ArgumentError, "fused='maybe'"),
        ("a.toml", "steps = ", DataError, "a.toml cannot be read"),
        ("a.yaml", "steps: [3", DataError, "a.yaml cannot be read"),
        ("a.yaml", "- steps", DataError, "holds list"),
        ("a.yaml", "", DataError, "holds NoneType"),
        ("a.json", "{}", DataError, "no settings file"),
        ("a.toml", b"\xff\xfe", DataError, "a.toml cannot be read"),
        ("a.yaml", "!!python/object/apply:os.getcwd []", DataError, "cannot be read"),
    ],
)
def test_a_settings_file_that_cannot_be_used(tmp_path, name, text, error, match):
    path = tmp_path / name
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    refused(error, match, tmp_path, lambda: TrainConfig.read(path))


def test_a_settings_file_that_is_not_there(tmp_path):
    missing = tmp_path / "none.toml"
    refused(DataError, "none.toml", tmp_path, lambda: TrainConfig.read(missing))


# --- What train is given ---


class House:
    """Everything a run needs, and `train` with some of it replaced."""

    def __init__(self):
        self.tokenizer = models.load("teacher")[1]
        self.collator = PairCollator(self.tokenizer)
        examples = localize.examples("train", locales=["fr"], limit=4)
        self.pairs = [self.collator.encode(e, i) for i, e in enumerate(examples)]
        self.teacher = LiveTeacher(self.model(seed=1))

    def model(self, seed=0, width=8):
        return models.build(
            self.tokenizer, hidden_size=width, layers=1, heads=1, seed=seed
        )

    def train(self, folder, **changes):
        options = {
            "student": changes.pop("student", None) or self.model(),
            "pairs": self.pairs,
            "collator": self.collator,
            "objective": Objective(),
            "config": CONFIG,
            "teacher": self.teacher,
            "folder": folder,
        }
        return train(**options | changes)


@pytest.fixture(scope="module")
def house():
    return House()


def made(changes, house):
    """With the house given to every function among the values."""
    return {k: v(house) if inspect.isfunction(v) else v for k, v in changes.items()}


class Elsewhere:
    """A teacher whose targets come from nowhere, but with facts about them."""

    def __init__(self, tail):
        self.facts = {"tail": tail}

    def targets(self, batch):
        return torch.zeros(len(batch.response_ids), 8)


def half(house):
    return house.model().half()


def frozen(house):
    return house.model().requires_grad_(False)


def empty_response(house):
    return [*house.pairs, EncodedPair(77, [5, 6], [5], [])]


@pytest.mark.parametrize(
    ("changes", "error", "match"),
    [
        ({"pairs": []}, ArgumentError, "pairs is empty"),
        ({"pairs": empty_response}, DataError, "example 77 has no response"),
        ({"teacher": None}, ArgumentError, "no teacher"),
        ({"student": half}, ArgumentError, "is torch.float16"),
        ({"student": frozen}, ArgumentError, "no parameter of the student"),
        (
            {"config": replace(CONFIG, fused=True), "teacher": Elsewhere("zero")},
            ArgumentError,
            "fused=True with teacher Elsewhere",
        ),
        (
            {"config": replace(CONFIG, fused=True), "teacher": None, "objective": HARD},
            ArgumentError,
            "fused=True with teacher NoneType",
        ),
        (
            {"config": replace(CONFIG, fused=True), "objective": HARD},
            ArgumentError,
            "fused=True with hard_weight=1",
        ),
    ],
)
def test_pieces_that_do_not_fit(house, tmp_path, changes, error, match):
    changes = made(changes, house)
    folder = tmp_path / "run"
    refused(error, match, tmp_path, lambda: house.train(folder, **changes))


def test_a_folder_in_the_place_of_which_there_is_a_file(house, tmp_path):
    (tmp_path / "run").write_text("in the way")
    refused(
        StorageError,
        "cannot write",
        tmp_path,
        lambda: house.train(tmp_path / "run"),
    )


# --- Another run's folder ---


@pytest.fixture(scope="module")
def finished(house, tmp_path_factory):
    folder = tmp_path_factory.mktemp("finished") / "run"
    house.train(folder)
    return folder


@pytest.fixture
def copy(finished, tmp_path):
    return shutil.copytree(finished, tmp_path / "run")


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"config": replace(CONFIG, learning_rate=2e-2)}, ["config.learning_rate"]),
        ({"config": replace(CONFIG, steps=12)}, ["config.steps was 6, now 12"]),
        (
            {"config": replace(CONFIG, seed=5, warmup=0.5)},
            ["config.seed", "config.warmup"],
        ),
        ({"config": replace(CONFIG, precision="bf16")}, ["config.precision"]),
        ({"objective": Objective("reverse_kl")}, ["objective.divergence"]),
        (
            {"objective": Objective("skew_kl", divergence_params={"alpha": 0.2})},
            ["objective.divergence_params", "objective.divergence "],
        ),
        ({"pairs": lambda h: h.pairs[:-1]}, ["data.examples", "data.sha256"]),
        ({"pairs": lambda h: h.pairs[::-1]}, ["data.sha256"]),
        ({"student": lambda h: h.model(width=12)}, ["student.parameters"]),
        (
            {"teacher": lambda h: LiveTeacher(h.model(width=12))},
            ["teacher.parameters", "teacher.shapes"],
        ),
        ({"teacher": lambda h: LiveTeacher(h.model(seed=2))}, ["teacher.signs was"]),
        (
            {"teacher": Elsewhere("zero")},
            ["teacher.kind was 'LiveTeacher', now 'Elsewhere'"],
        ),
    ],
)
def test_a_resumed_run_with_other_settings_names_them(house, copy, changes, named):
    changes = made(changes, house)
    before = contents(copy)
    with pytest.raises(ArgumentError) as raised:
        house.train(copy, **changes)
    message = raised.value.what
    for name in named:
        assert name in message
    unnamed = {"config", "objective", "data", "student", "teacher"}
    parts = {name.split(".")[0] for name in named}
    for part in unnamed - parts:
        assert f"{part}." not in message
    same = "the teacher that" if parts == {"teacher"} else "the same settings"
    assert f"go on with {same}" in raised.value.remedy
    assert contents(copy) == before


def test_targets_of_another_making_are_refused(house, tmp_path):
    house.train(tmp_path, teacher=Elsewhere("zero"))
    house.train(tmp_path, teacher=Elsewhere("zero"))
    refused(
        ArgumentError,
        "teacher.tail was 'zero', now 'bucket'",
        tmp_path,
        lambda: house.train(tmp_path, teacher=Elsewhere("bucket")),
    )


def test_a_student_is_not_changed_before_its_checkpoint_is_found_to_fit(house, copy):
    student = house.model(width=12)
    before = [p.clone() for p in student.parameters()]
    with pytest.raises(ArgumentError):
        house.train(copy, student=student)
    for new, old in zip(student.parameters(), before, strict=True):
        assert torch.equal(new, old)


# --- Damaged checkpoints ---


def flip(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def cut(path):
    path.write_bytes(path.read_bytes()[:-7])


def empty(path):
    path.write_bytes(b"")


def remove(path):
    path.unlink()


def another_step(path):
    """A checkpoint that was copied to another step's name."""
    older = path.parent.parent / "step-00000004"
    shutil.rmtree(path.parent)
    shutil.copytree(older, path.parent)


def another_format(path):
    stored = json.loads(path.read_text())
    stored["content"]["format"] = "kdlib checkpoint 0"
    stored["sha256"] = checkpoints.digest(stored["content"])
    path.write_text(json.dumps(stored))


DAMAGES = [
    (file, damage)
    for file in (training_state.WEIGHTS, training_state.REST, checkpoints.MANIFEST)
    for damage in (flip, cut, empty, remove)
]
DAMAGES += [
    (checkpoints.MANIFEST, another_step),
    (checkpoints.MANIFEST, another_format),
]


@pytest.mark.parametrize(("file", "damage"), DAMAGES)
def test_a_damaged_checkpoint_is_named_and_the_one_before_is_taken(
    house, finished, copy, file, damage
):
    newest, older = (copy / "checkpoints" / f"step-0000000{n}" for n in (6, 4))
    damage(newest / file)
    damaged = contents(newest)
    with pytest.warns(
        UserWarning, match=f"{newest.name} is damaged: .*{file}"
    ) as warned:
        found = checkpoints.newest_good(copy / "checkpoints")
    assert found.folder == older and found.step == 4
    if damage is cut and file != checkpoints.MANIFEST:
        assert f"{file} has " in str(warned[0].message)
        assert " bytes, not " in str(warned[0].message)
    assert contents(newest) == damaged  # left to be looked at

    done = []
    student = house.model(seed=9)
    with pytest.warns(UserWarning, match="it is skipped"):
        house.train(copy, student=student, on_step=lambda step, loss: done.append(step))
    assert done == [5, 6]
    # Written again, to the same weights.
    weights = "checkpoints/step-00000006/" + training_state.WEIGHTS
    assert (copy / weights).read_bytes() == (finished / weights).read_bytes()


def test_where_all_checkpoints_are_damaged_nothing_begins_anew(house, copy):
    for step in (copy / "checkpoints").iterdir():
        flip(step / training_state.WEIGHTS)
    with pytest.warns(UserWarning):
        refused(
            DataError,
            "no checkpoint .* is good: .*step-00000006.*step-00000004",
            copy,
            lambda: house.train(copy),
        )


class Trap:
    """Unpickled, it leaves a mark."""

    def __init__(self, mark):
        self.mark = mark

    def __reduce__(self):
        return Path.touch, (self.mark,)


def test_a_checkpoint_that_runs_code_is_refused(house, copy, tmp_path):
    newest = copy / "checkpoints" / "step-00000006"
    torch.save({"optimizer": Trap(tmp_path / "mark")}, newest / training_state.REST)
    facts = json.loads((newest / checkpoints.MANIFEST).read_text())["content"]["facts"]
    (newest / checkpoints.MANIFEST).unlink()
    checkpoints._write_manifest(newest, 6, facts)  # as a forger would
    assert checkpoints.read(newest)
    refused(DataError, "does not fit", tmp_path, lambda: house.train(copy))
    assert not (tmp_path / "mark").exists()
    with pytest.raises(pickle.UnpicklingError):  # that is why
        torch.load(newest / training_state.REST, weights_only=True)


def test_other_files_in_the_folder_are_left_alone(house, copy):
    folder = copy / "checkpoints"
    (folder / "notes.txt").write_text("mine")
    (folder / "step-final").mkdir()
    before = contents(copy)
    house.train(copy)
    assert contents(copy) == before


# --- A full disk ---


@pytest.fixture
def four_steps(house, tmp_path):
    """A run that ended after step 4, by an error of its caller."""

    def on_step(step, loss):
        if step == 5:
            raise ZeroDivisionError

    folder = tmp_path / "run"
    with pytest.raises(ZeroDivisionError):
        house.train(folder, on_step=on_step)
    return folder


def checkpoint_files(folder):
    return contents(folder / "checkpoints")


@pytest.mark.skipif(os.name != "posix", reason="limits are POSIX's")
@pytest.mark.parametrize("limit", [100, 5_000, 60_000])
def test_a_file_that_grows_too_large(house, four_steps, limit, finished):
    """The system refuses to write on in the midst of a file: EFBIG."""
    import resource

    before = checkpoint_files(four_steps)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
    try:
        with pytest.raises(StorageError) as raised:
            house.train(four_steps)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert "free disk space" in raised.value.remedy
    assert checkpoint_files(four_steps) == before
    weights = f"checkpoints/step-00000006/{training_state.WEIGHTS}"
    house.train(four_steps)
    assert (four_steps / weights).read_bytes() == (finished / weights).read_bytes()


@pytest.mark.parametrize("call", ["fsync", "replace", "mkdir"])
def test_a_disk_that_fills_up_at_another_moment(house, four_steps, monkeypatch, call):
    before = checkpoint_files(four_steps)

    def full(*arguments, **options):
        raise OSError(errno.ENOSPC, "No space left on device")

    def fill_up(step, loss):
        if step == 6:
            monkeypatch.setattr(os, call, full)

    with pytest.raises(StorageError, match="No space left") as raised:
        house.train(four_steps, on_step=fill_up)
    monkeypatch.undo()
    assert "free disk space" in raised.value.remedy
    assert checkpoint_files(four_steps) == before


def test_metrics_that_cannot_be_written(house, tmp_path, monkeypatch):
    class Full:
        def write(self, text):
            raise OSError(errno.ENOSPC, "No space left on device")

        def close(self):
            pass

    opened = Record.__init__

    def with_full_disk(self, *arguments):
        opened(self, *arguments)
        self._file.close()
        self._file = Full()

    monkeypatch.setattr(Record, "__init__", with_full_disk)
    with pytest.raises(StorageError, match="metrics.jsonl: .*No space left"):
        house.train(tmp_path / "run")


# --- Memory, and numbers that are none ---


HALF = "micro_batch_size=2 (the loss stays the same), "
SAVED = "; started again with the same folder, the run goes on from its last checkpoint"
ALL_ON = {
    "micro_batch_size": 1,
    "activation_checkpointing": True,
    "fused": True,
    "teacher_offload": True,
}


@pytest.mark.parametrize(
    ("changes", "advice"),
    [
        ({}, f"try {HALF}activation_checkpointing=True, fused=True, teacher_offload="),
        (
            {"micro_batch_size": 1, "activation_checkpointing": True},
            f"try fused=True, teacher_offload=True{SAVED}",
        ),
        (ALL_ON, "start a new run with a GPU with more memory or a smaller model or t"),
    ],
)
def test_a_gpu_whose_memory_is_too_small(house, four_steps, changes, advice):
    def large(module, arguments):
        if module.training:
            raise torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate")

    student = house.model()
    student.model.register_forward_pre_hook(large)
    before = checkpoint_files(four_steps)
    config = replace(CONFIG, **changes)
    with pytest.raises(TrainingError, match="step 4: .*Tried to allocate") as raised:
        house.train(four_steps, student=student, config=config)
    assert raised.value.remedy.startswith(advice)
    assert checkpoint_files(four_steps) == before
    with pytest.raises(TrainingError) as raised:
        house.train(None, student=student, config=replace(CONFIG, fused=True))
    assert raised.value.remedy.endswith("; nothing was saved")


FULL = replace(CONFIG, micro_batch_size=1, activation_checkpointing=True)
NEW = "start a new run with a GPU with more memory or a smaller model"
CACHED = " or targets that are cached first (python -m kdlib cache)"
CACHED_TEACHER = CachedTeacher.__new__(CachedTeacher)  # its kind is all that is asked


@pytest.mark.parametrize(
    ("changes", "config", "advice"),
    [
        # Targets from elsewhere: no teacher to move, no head to fuse with.
        ({"teacher": Elsewhere("zero")}, CONFIG, f"try {HALF}activation_checkpo"),
        ({"teacher": Elsewhere("zero")}, FULL, NEW),
        ({"teacher": None}, FULL, NEW),
        # Sparse targets have a fused loss as well, and no teacher to move.
        ({"teacher": CACHED_TEACHER}, FULL, f"try fused=True{SAVED}"),
        ({"teacher": CACHED_TEACHER}, replace(FULL, fused=True), NEW),
        ({"objective": HARD}, FULL, f"try teacher_offload=True{SAVED}"),
        # A teacher that writes stays where it is; sharded, it is everywhere.
        ({}, replace(FULL, sequence_level=True), f"try fused=True{SAVED}"),
        ({"ranks": Ranks(0, 2, shard=True)}, FULL, f"try fused=True{SAVED}"),
        ({"ranks": Ranks(0, 2, shard=True)}, replace(CONFIG, **ALL_ON), NEW + CACHED),
        ({"ranks": Ranks(0, 2)}, replace(CONFIG, **ALL_ON), f"{NEW}{CACHED} or shard"),
        ({}, replace(CONFIG, **ALL_ON, lmbda=0.5), NEW),
        # Four examples on two ranks are two on each.
        ({"ranks": Ranks(0, 2)}, CONFIG, "try micro_batch_size=1 (the loss"),
        ({"ranks": Ranks(0, 4)}, CONFIG, "try activation_checkpointing=True"),
        (
            {"ranks": Ranks(0, 2)},
            replace(CONFIG, micro_batch_size=3),
            "try micro_batch_size=1 (the loss",
        ),
    ],
)
def test_the_way_out_fits_the_run(house, changes, config, advice):
    run = {"objective": Objective(), "teacher": house.teacher, "ranks": ALONE}
    found = way_out(config, saved=True, **run | changes)
    assert found.startswith(advice)
    if advice.startswith(NEW):
        assert found.removeprefix(advice) in ("", "=True")
    for way in found.partition(";")[0].removeprefix("try ").split(", "):
        if found.startswith("try"):  # the same run, then: it may go on
            assert way.partition("=")[0] in MAY_CHANGE


def test_a_loss_that_is_no_number(house, four_steps, monkeypatch):
    targets = LiveTeacher.targets

    def broken(self, batch):
        return targets(self, batch) * float("nan")

    before = checkpoint_files(four_steps)
    monkeypatch.setattr(LiveTeacher, "targets", broken)
    with pytest.raises(TrainingError, match="step 4: loss=nan"):
        house.train(four_steps)
    assert checkpoint_files(four_steps) == before
