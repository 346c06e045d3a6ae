"""Cached targets: what is read is what the teacher said, or an error says why not."""

from __future__ import annotations

import hashlib
import json
import os
import random
import shutil
import signal
import time

import psutil
import pytest
import torch
from safetensors.torch import load_file, save_file

from kdlib import build_cache, localize, models, shards, target_cache
from kdlib.errors import ArgumentError, DataError, KdlibError, ModelError, StorageError
from kdlib.objective import Objective
from kdlib.pairs import PairCollator, PairedExample
from kdlib.sparse_targets import top_k_targets
from kdlib.teachers import CachedTeacher, LiveTeacher, write_cache, write_shards

KINDS = ["bucket", "zero", "renormalize", "sampled"]


class Counted(LiveTeacher):
    """A live teacher; `read` lists the examples that it was asked about."""

    def __init__(self, model):
        super().__init__(model)
        self.read = []
        self._known = None

    def targets(self, batch):
        self.read += batch.example_ids.tolist()
        return super().targets(batch)

    def fingerprint(self):
        self._known = self._known or super().fingerprint()
        return self._known


@pytest.fixture(scope="module")
def small():
    """A small model in float64, where no rounding decides which token comes first."""
    _, tokenizer = models.load("teacher")
    model = models.build(tokenizer, hidden_size=16, layers=1, heads=2, seed=3)
    return model.double(), tokenizer


@pytest.fixture
def teacher(small):
    return Counted(small[0])


@pytest.fixture(scope="module")
def collator(small):
    return PairCollator(small[1], teacher_max_length=128, student_max_length=128)


@pytest.fixture(scope="module")
def examples():
    return localize.examples("unlabelled", locales=["fr"], limit=5)


@pytest.fixture(scope="module")
def whole(small, collator, examples, tmp_path_factory):
    """A finished cache of 10 examples in 4 shards. Tests that spoil it take a copy."""
    folder = tmp_path_factory.mktemp("whole") / "cache"
    write_shards(
        folder, Counted(small[0]), examples, collator, shard_size=3, batch_size=2
    )
    return folder


@pytest.fixture
def copy(whole, tmp_path):
    return shutil.copytree(whole, tmp_path / "copy")


def disk(folder):
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


def encode(collator, examples, numbers):
    return [collator.encode(examples[i], i) for i in numbers]


# --- What is read ---


@pytest.mark.parametrize("form", ["file", "folder"])
@pytest.mark.parametrize("tail", KINDS[:3])
def test_targets_are_the_live_teachers(
    teacher, small, collator, examples, tmp_path, tail, form
):
    path = tmp_path / "cache"
    if form == "folder":
        write_shards(path, teacher, examples, collator, k=5, tail=tail, shard_size=4)
    else:
        pairs = encode(collator, examples, range(len(examples)))
        batches = [collator.collate(pairs[:3]), collator.collate(pairs[3:])]
        write_cache(path, teacher, batches, small[1], k=5, tail=tail)
    cached = CachedTeacher(path, small[1])
    batch = collator.collate(encode(collator, examples, [9, 0, 5, 2]))
    seen = cached.targets(batch)
    live = top_k_targets(teacher.targets(batch), 5, tail)
    assert torch.equal(seen.indices.long(), live.indices)
    assert torch.equal(seen.log_probs, live.log_probs.half())
    assert (seen.tail, seen.temperature, seen.weights) == (tail, 1.0, None)
    assert seen.vocab_size == len(small[1])
    assert len(cached) == 10 and 9 in cached and 10 not in cached and -1 not in cached
    assert cached.response_ids(2) == collator.encode(examples[2]).response_ids


def test_temperature_is_that_of_the_targets(
    teacher, small, collator, examples, tmp_path
):
    write_shards(tmp_path / "c", teacher, examples, collator, temperature=2.0)
    cached = CachedTeacher(tmp_path / "c", small[1], temperature=2.0)
    batch = collator.collate(encode(collator, examples, [1, 0]))
    live = top_k_targets(teacher.targets(batch), 8, temperature=2.0)
    assert torch.equal(cached.targets(batch).log_probs, live.log_probs.half())
    student = torch.zeros(len(live), len(small[1]))
    losses = [
        Objective(temperature=2.0)(student, t, batch.response_ids).total
        for t in (cached.targets(batch), live)
    ]
    torch.testing.assert_close(*losses, rtol=1e-3, atol=1e-3)
    with pytest.raises(ArgumentError, match="temperature = 1.0"):
        Objective()(student, cached.targets(batch), batch.response_ids)


@pytest.mark.parametrize("k", [3, 300])
def test_sampled_targets_are_draws_from_the_teacher(small, collator, tmp_path, k):
    teacher = LiveTeacher(models.load("teacher", dtype=torch.float64)[0])
    # One example many times over: every copy draws from the same distributions.
    example = localize.examples("unlabelled", context="nothing", limit=1)[0]
    copies = [example] * 40
    options = {"k": k, "tail": "sampled", "shard_size": 20}
    write_shards(tmp_path / "c", teacher, copies, collator, **options)
    batch = collator.collate(encode(collator, copies, range(40)))
    seen = CachedTeacher(tmp_path / "c", small[1]).targets(batch)
    log_p = teacher.targets(batch).log_softmax(-1)
    assert seen.tail == "zero"
    torch.testing.assert_close(seen.weights.sum(-1), torch.ones(len(seen)))
    counts = seen.weights * k
    torch.testing.assert_close(counts, counts.round(), rtol=0, atol=1e-4)
    gathered = log_p.gather(-1, seen.indices.long()).half()
    assert torch.equal(seen.log_probs[seen.weights > 0], gathered[seen.weights > 0])
    # Mean weight over the copies, against p: within five standard errors everywhere.
    length = len(collator.encode(example).response_ids)
    drawn = torch.zeros_like(log_p).scatter_add_(
        -1, seen.indices.long(), seen.weights.double()
    )
    mean, p = (x.view(40, length, -1).mean(0) for x in (drawn, log_p.exp()))
    error = (p * (1 - p) / (40 * k)).sqrt()
    assert ((mean - p).abs() <= 5 * error + 1 / (40 * k)).all()
    # Another shard, other draws: the first 20 copies and the last 20.
    assert not torch.equal(*seen.weights.chunk(2))


def test_the_seed_decides_the_draws(teacher, small, collator, examples, tmp_path):
    seen = []
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        options = {"tail": "sampled", "seed": seed, "shard_size": 5}
        write_shards(tmp_path / name, teacher, examples, collator, **options)
        held = load_file(tmp_path / name / "targets-00001.safetensors")
        seen.append(held["indices"])
    assert torch.equal(seen[0], seen[1]) and not torch.equal(seen[0], seen[2])


def test_the_teacher_reads_rows_of_like_length_together(
    teacher, collator, examples, tmp_path
):
    write_shards(tmp_path / "c", teacher, examples, collator, batch_size=2)
    pairs = encode(collator, examples, teacher.read)
    lengths = [len(p.teacher_prompt_ids) + len(p.response_ids) for p in pairs]
    assert lengths == sorted(lengths) and len(set(lengths)) > 2


def test_a_batch_reads_its_rows_alone(small, collator, examples, tmp_path):
    """200 MB on disk, and a reader that takes in a batch's pages only."""
    pairs = encode(collator, examples, range(2))
    path = tmp_path / "c"
    write_cache(path, Counted(small[0]), [collator.collate(pairs)], small[1])
    little = shards.Shard.open(path)
    rows = 6_000_000
    tensors = {name: tensor.clone() for name, tensor in little.tensors.items()}
    for name in ("response_ids", "indices", "log_probs"):
        filler = torch.ones(rows, *tensors[name].shape[1:], dtype=tensors[name].dtype)
        tensors[name] = torch.cat([filler, tensors[name]])
    tensors["start"] = torch.cat([torch.zeros(1).long(), tensors["start"] + rows])
    tensors["example_ids"] = torch.tensor([7, *tensors["example_ids"].tolist()])
    tensors["inputs"] = torch.cat([torch.zeros(1).long(), tensors["inputs"]])
    shards.write_shard(path, tensors, little.facts)
    del tensors, filler
    assert path.stat().st_size > 200e6
    batch, process = collator.collate(pairs), psutil.Process()
    before = process.memory_info().rss
    cached = CachedTeacher(path, small[1])
    targets = cached.targets(batch)
    assert process.memory_info().rss - before < 50e6
    assert len(targets) == len(batch.response_ids)


def test_a_shard_is_a_cache_by_itself(whole, small, collator, examples):
    part = CachedTeacher(whole / "targets-00001.safetensors", small[1])
    batch = collator.collate(encode(collator, examples, [3, 5, 4]))
    assert len(part) == 3
    assert torch.equal(
        part.targets(batch).indices,
        CachedTeacher(whole, small[1]).targets(batch).indices,
    )


def test_the_manifest_says_what_is_there(whole, teacher, small, collator, examples):
    manifest = json.loads((whole / "manifest.json").read_text())
    assert manifest["complete"] and manifest["n_shards"] == 4
    sizes, tokens = [], 0
    for number, entry in enumerate(manifest["shards"]):
        path = whole / entry["file"]
        held = load_file(path)
        assert path.name == f"targets-{number:05}.safetensors"
        assert entry["sha256"] == hashlib.sha256(path.read_bytes()).hexdigest()
        assert entry["bytes"] == path.stat().st_size
        assert entry["examples"] == len(held["example_ids"]) == min(3, 10 - 3 * number)
        assert entry["tokens"] == len(held["response_ids"])
        sizes.append(entry["bytes"])
        tokens += entry["tokens"]
    assert tokens == sum(len(collator.encode(e).response_ids) for e in examples)
    assert (manifest["tokens"], manifest["bytes"]) == (tokens, sum(sizes))
    assert manifest["bytes_per_token"] == pytest.approx(sum(sizes) / tokens, abs=0.005)
    # 8 entries of 2 + 2 bytes and the response's own 2, apart from what an example and
    # a file cost.
    assert held["indices"].element_size() == held["log_probs"].element_size() == 2
    assert manifest["plan"]["teacher"] == teacher.fingerprint()
    assert manifest["versions"]["torch"] == torch.__version__
    names = {path.name for path in whole.iterdir()}
    assert names == {"manifest.json", *(e["file"] for e in manifest["shards"])}


def test_reading_changes_nothing(copy, small, teacher, collator, examples):
    before = disk(copy)
    pairs = encode(collator, examples, range(10))
    cached = CachedTeacher(copy, small[1], teacher=teacher, verify=True)
    cached.check(pairs)
    cached.targets(collator.collate(pairs))
    assert disk(copy) == before


# --- Never lose work, never take half a cache for a whole one ---


def run_and_die(work):
    """Run in a process of its own; return the signal that ended it."""
    child = os.fork()
    if child == 0:
        try:
            torch.set_num_threads(1)  # the parent's threads are not here
            work()
            os._exit(0)
        finally:
            os._exit(1)
    status = os.waitpid(child, 0)[1]
    return os.WTERMSIG(status) if os.WIFSIGNALED(status) else 0


def die(*_, **__):
    os.kill(os.getpid(), signal.SIGKILL)


def die_at_second(name, module, monkeypatch):
    """The second call of a function kills the process before it does anything."""
    calls, real = [], getattr(module, name)

    def deadly(*args, **kwargs):
        calls.append(name)
        return die() if len(calls) == 2 else real(*args, **kwargs)

    monkeypatch.setattr(module, name, deadly)


def half_a_file(tensors, path, metadata):
    save_file(tensors, path, metadata)
    if "00001" in str(path):
        os.truncate(path, os.path.getsize(path) // 2)
        die()


MOMENTS = {
    "asking": lambda m: die_at_second("_ask", target_cache, m),
    "in a file": lambda m: m.setattr("safetensors.torch.save_file", half_a_file),
    "before the shard": lambda m: die_at_second("write_shard", target_cache, m),
    "after the shard": lambda m: die_at_second("file_sha256", shards, m),
    "at the manifest": lambda m: die_at_second("write_manifest", target_cache, m),
    "before a rename": lambda m: die_at_second("flush", shards, m),
}


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.parametrize("moment", MOMENTS)
def test_a_run_that_is_killed_goes_on(
    teacher, small, collator, examples, whole, tmp_path, moment
):
    folder = tmp_path / "c"

    def work():
        with pytest.MonkeyPatch.context() as patch:
            MOMENTS[moment](patch)
            write_shards(
                folder, teacher, examples, collator, shard_size=3, batch_size=2
            )

    assert run_and_die(work) == signal.SIGKILL
    check_half_done_then_finish(folder, teacher, small, collator, examples, whole)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.parametrize("seed", range(6))
def test_a_run_that_is_killed_at_any_instant_goes_on(
    teacher, small, collator, examples, whole, tmp_path, seed
):
    child = os.fork()
    if child == 0:
        torch.set_num_threads(1)
        for number in range(10**6):  # one cache after another, until it is killed
            folder = tmp_path / f"{number:07}"
            write_shards(
                folder, teacher, examples, collator, shard_size=3, batch_size=2
            )
    time.sleep(random.Random(seed).uniform(0.2, 1.0))
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    folder = max(tmp_path.iterdir(), default=tmp_path / "none")
    check_half_done_then_finish(folder, teacher, small, collator, examples, whole)


def check_half_done_then_finish(folder, teacher, small, collator, examples, whole):
    manifest = folder / "manifest.json"
    done = json.loads(manifest.read_text())["shards"] if manifest.exists() else []
    if len(done) < 4:
        with pytest.raises(DataError, match="not complete|has no manifest|cannot be"):
            CachedTeacher(folder, small[1])
    for entry in done:  # whatever has a name is whole
        path = folder / entry["file"]
        assert entry["sha256"] == hashlib.sha256(path.read_bytes()).hexdigest()
    teacher.read.clear()
    write_shards(folder, teacher, examples, collator, shard_size=3, batch_size=2)
    finished = {int(e["file"][8:13]) for e in done}
    assert set(teacher.read) == {i for i in range(10) if i // 3 not in finished}
    assert disk(folder) == disk(whole)


def test_a_file_is_on_the_disk_before_it_has_its_name(tmp_path, monkeypatch):
    calls, inodes = [], {}

    def fsync(handle):
        calls.append(("fsync", os.fstat(handle).st_ino))

    def replace(source, target):
        inodes[target] = os.stat(source).st_ino
        calls.append(("replace", inodes[target]))
        os.rename(source, target)

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(os, "replace", replace)
    path = tmp_path / "shard"
    shards.write_shard(path, {"a": torch.zeros(3)}, {})
    file, folder = inodes[path], os.stat(tmp_path).st_ino
    wanted = [("fsync", file), ("replace", file), ("fsync", folder)]
    assert calls == wanted[: 3 if os.name == "posix" else 2]


def test_a_full_disk_keeps_the_finished_shards(
    teacher, small, collator, examples, whole, tmp_path, monkeypatch
):
    def full_at_the_third(tensors, path, metadata):
        if "00002" in str(path):
            path.write_bytes(b"half")
            raise OSError(28, "No space left on device")
        save_file(tensors, path, metadata)

    with monkeypatch.context() as patch:
        patch.setattr("safetensors.torch.save_file", full_at_the_third)
        with pytest.raises(StorageError, match="free disk space"):
            write_shards(tmp_path / "c", teacher, examples, collator, shard_size=3)
    names = [path.name for path in (tmp_path / "c").iterdir()]
    assert sorted(names) == ["manifest.json", *sorted(disk(whole))[1:3]]
    teacher.read.clear()
    write_shards(tmp_path / "c", teacher, examples, collator, shard_size=3)
    assert sorted(teacher.read) == [6, 7, 8, 9]


@pytest.mark.parametrize("spoil", ["cut", "altered", "missing"])
def test_a_damaged_shard_alone_is_written_again(
    copy, whole, teacher, collator, examples, spoil
):
    damage(copy / "targets-00002.safetensors", spoil)
    options = {"shard_size": 3, "batch_size": 2}
    write_shards(copy, teacher, examples, collator, **options)
    assert sorted(set(teacher.read)) == [6, 7, 8]
    assert disk(copy) == disk(whole)
    teacher.read.clear()
    write_shards(copy, teacher, examples, collator, **options)
    assert teacher.read == [] and disk(copy) == disk(whole)


def damage(path, how):
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    if how == "missing":
        path.unlink()
    elif how == "altered":
        path.write_bytes(content)
    else:
        path.write_bytes(content[:-100])


# --- What does not match is refused ---


def swap(folder):
    a, b = (folder / f"targets-0000{n}.safetensors" for n in (0, 1))
    content = a.read_bytes()
    a.write_bytes(b.read_bytes())
    b.write_bytes(content)
    manifest = json.loads((folder / "manifest.json").read_text())
    first, second, *rest = manifest["shards"]
    first, second = ({**y, "file": x["file"]} for x, y in ((first, second),) * 2)
    manifest["shards"] = [first, {**second, "file": "targets-00001.safetensors"}, *rest]
    for entry in manifest["shards"]:
        path = folder / entry["file"]
        entry["bytes"] = path.stat().st_size
    (folder / "manifest.json").write_text(json.dumps(manifest))


def edit_manifest(**changes):
    def edit(folder):
        path = folder / "manifest.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))

    return edit


def rewrite_shard(change):
    """Another content, with a manifest that says so: only the content is wrong."""

    def edit(folder):
        path = folder / "targets-00000.safetensors"
        shard = shards.Shard.open(path)
        tensors = {name: tensor.clone() for name, tensor in shard.tensors.items()}
        facts = dict(shard.facts)
        change(tensors, facts)
        entry = shards.write_shard(path, tensors, facts)
        manifest = json.loads((folder / "manifest.json").read_text())
        manifest["shards"][0].update(entry)
        (folder / "manifest.json").write_text(json.dumps(manifest))

    return edit


SPOILT = {
    "cut": (lambda f: damage(f / "targets-00001.safetensors", "cut"), "has .* bytes"),
    "gone": (
        lambda f: damage(f / "targets-00001.safetensors", "missing"),
        "is missing",
    ),
    "altered": (
        lambda f: damage(f / "targets-00001.safetensors", "altered"),
        "targets-00001.safetensors was altered",
    ),
    "swapped": (swap, "another cache or place"),
    "no manifest": (lambda f: (f / "manifest.json").unlink(), "has no manifest.json"),
    "cut manifest": (
        lambda f: (f / "manifest.json").write_text("{"),
        "the manifest .* cannot be read",
    ),
    "odd manifest": (
        lambda f: (f / "manifest.json").write_text("[]"),
        "the manifest .* cannot be read",
    ),
    "other format": (edit_manifest(format="other"), "its format is 'other'"),
    "not complete": (edit_manifest(complete=False), "is not complete: 4 shards of 4"),
    "another plan": (edit_manifest(plan={"k": 8}), "another cache or place"),
    "no indices": (rewrite_shard(lambda t, f: t.pop("indices")), "do not fit together"),
    "no tail": (rewrite_shard(lambda t, f: f.pop("tail")), "do not fit together"),
    "no counts": (
        rewrite_shard(lambda t, f: f.update(tail="sampled")),
        "do not fit together",
    ),
    "a row less": (
        rewrite_shard(lambda t, f: t.update(indices=t["indices"][1:].clone())),
        "do not fit together",
    ),
    "twice": (
        rewrite_shard(lambda t, f: t.update(example_ids=t["example_ids"] * 0 + 3)),
        "hold example 3 twice",
    ),
}


@pytest.mark.parametrize("name", SPOILT)
def test_a_spoilt_cache_is_refused(copy, small, name):
    spoil, match = SPOILT[name]
    spoil(copy)
    before = disk(copy)
    with pytest.raises(DataError, match=match) as caught:
        CachedTeacher(copy, small[1], verify=name == "altered")
    assert caught.value.remedy and disk(copy) == before


def test_another_tokenizer_template_temperature_or_teacher(whole, small):
    _, tokenizer = models.load("teacher")
    tokenizer.chat_template += " "
    with pytest.raises(DataError, match="another template"):
        CachedTeacher(whole, tokenizer)
    words = [datum.english for datum in localize.load_split("validation")]
    with pytest.raises(DataError, match="another tokenizer"):
        CachedTeacher(whole, models.train_tokenizer(words, 600))
    with pytest.raises(DataError, match="another temperature .1.0, here 2.0"):
        CachedTeacher(whole, small[1], temperature=2.0)
    other = models.build(small[1], hidden_size=16, layers=1, heads=2)
    with pytest.raises(DataError, match="another teacher"):
        CachedTeacher(whole, small[1], teacher=LiveTeacher(other))
    with pytest.raises(ArgumentError, match="verify=True"):
        CachedTeacher(whole / "targets-00000.safetensors", small[1], verify=True)


OTHER_DATA = {
    "context": ({"context": "Answer in Polish."}, "teacher's prompt is not the one"),
    "input": ({"user_input": "Monday"}, "teacher's prompt is not the one"),
    "response": ({"response": "lundi"}, "response tokens of example 4 are not"),
}


@pytest.mark.parametrize("name", [*OTHER_DATA, "number", "unknown"])
def test_other_data_are_refused(whole, small, collator, examples, name):
    changes, match = OTHER_DATA.get(name, ({}, ""))
    pair = collator.encode(PairedExample(**{**vars(examples[4]), **changes}), 4)
    if name == "number":
        pair, match = collator.encode(examples[4], 6), "of example 6 are not"
    if name == "unknown":
        pair, match = collator.encode(examples[4], 10), "example 10 has no cached"
    good = encode(collator, examples, range(4))
    cached = CachedTeacher(whole, small[1])
    for refuse in (
        lambda: cached.targets(collator.collate([*good, pair])),
        lambda: cached.check([*good, pair]),
    ):
        with pytest.raises(DataError, match=match) as caught:
            refuse()
        assert caught.value.remedy
    # The student's side is another matter: one cache serves any simplified context.
    fewer = PairedExample(**{**vars(examples[4]), "simplified_context": "fr"})
    cached.check([collator.encode(fewer, 4)])


def test_a_shorter_budget_for_the_prompt_is_other_data(whole, small, examples):
    pair = PairCollator(small[1]).encode(examples[4], 4)
    length = len(pair.teacher_prompt_ids) + len(pair.response_ids)
    short = PairCollator(small[1], teacher_max_length=length - 2)
    pair = short.encode(examples[4], 4)
    assert pair.truncated_teacher
    with pytest.raises(DataError, match="teacher's prompt is not the one"):
        CachedTeacher(whole, small[1]).check([pair])


class Broken(Counted):
    def targets(self, batch):
        logits = super().targets(batch)
        logits[-1, 3] = float("nan")
        return logits


LONG = PairedExample("word " * 200, "x")
BAD_RUNS = {
    "k 0": ({"k": 0}, ArgumentError, "k=0"),
    "k too large": ({"k": 1025}, ArgumentError, "k = 1025 of a vocabulary of 1024"),
    "tail": ({"tail": "buckets"}, ArgumentError, "tail='buckets'"),
    "temperature 0": ({"temperature": 0.0}, ArgumentError, "temperature=0.0"),
    "temperature nan": (
        {"temperature": float("nan")},
        ArgumentError,
        "temperature=nan",
    ),
    "shard size": ({"shard_size": 0}, ArgumentError, "shard_size=0"),
    "batch size": ({"batch_size": 0}, ArgumentError, "batch_size=0"),
    "nothing": ({"examples": []}, ArgumentError, "examples is empty"),
    "too long": ({"more": [LONG]}, DataError, "example 10, teacher's side"),
    "empty": ({"more": [PairedExample("x", "")]}, DataError, "example 10: response"),
    "nan": ({"broken": True}, ModelError, "NaN among examples"),
    "nan, sampled": ({"broken": True, "tail": "sampled"}, ModelError, "NaN"),
}
OTHER_RUNS = {
    "k": ({"k": 4}, DataError, "another k .8, now 4"),
    "tail": ({"tail": "zero"}, DataError, "another tail .bucket, now zero"),
    "temperature": ({"temperature": 2.0}, DataError, "another temperature"),
    "shard size": ({"shard_size": 5}, DataError, "another shard_size"),
    "fewer": ({"fewer": True}, DataError, "another data"),
    "other teacher": ({"other": True}, DataError, "another teacher"),
    "template": ({"template": True}, DataError, "another template"),
}


@pytest.mark.parametrize("name", [*BAD_RUNS, *(f"begun: {n}" for n in OTHER_RUNS)])
def test_bad_runs_leave_the_disk_as_it_was(
    small, collator, examples, copy, tmp_path, name
):
    begun = name.startswith("begun: ")
    options, error, match = (
        OTHER_RUNS[name.removeprefix("begun: ")] if begun else BAD_RUNS[name]
    )
    options = {"shard_size": 3, **options}
    data = options.pop("examples", examples) + options.pop("more", [])
    data = data[:-1] if options.pop("fewer", False) else data
    model, tokenizer = small
    if options.pop("other", False):
        model = models.build(tokenizer, hidden_size=16, layers=1, heads=2)
    if options.pop("template", False):
        _, tokenizer = models.load("teacher")
        tokenizer.chat_template += "\n"
        collator = PairCollator(tokenizer)
    teacher = (Broken if options.pop("broken", False) else Counted)(model)
    (copy / f"{shards.SCRATCH}left-over").write_text("of a run that was killed")
    folder, before = copy if begun else tmp_path / "new", disk(tmp_path)
    with pytest.raises(error, match=match) as caught:
        write_shards(folder, teacher, data, collator, **options)
    assert isinstance(caught.value, KdlibError) and caught.value.remedy
    assert disk(tmp_path) == before and not (tmp_path / "new").exists()


def test_a_place_that_is_no_cache_is_refused(teacher, collator, examples, tmp_path):
    (tmp_path / "file").write_text("in the way")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.txt").write_text("years of work")
    before = disk(tmp_path)
    for place, error, match in (
        ("file", StorageError, "cannot write to"),
        ("file/c", StorageError, "cannot write to|not a folder"),
        ("full", DataError, "not empty and not a cache .it holds thesis.txt"),
    ):
        with pytest.raises(error, match=match):
            write_shards(tmp_path / place, teacher, examples, collator)
    assert disk(tmp_path) == before


def test_batches_numbered_alike_are_refused(
    teacher, small, collator, examples, tmp_path
):
    batches = [collator(examples[:2]), collator(examples[2:4])]  # both 0 and 1
    with pytest.raises(ArgumentError, match="same number"):
        write_cache(tmp_path / "c", teacher, batches, small[1])
    with pytest.raises(ArgumentError, match="batches is empty"):
        write_cache(tmp_path / "c", teacher, [], small[1])
    assert not list(tmp_path.iterdir())


# --- The command ---


def test_the_command_from_a_file_and_from_the_corpus(small, tmp_path):
    examples = localize.examples("test", locales=["it"], formats=["short"], limit=7)
    path = tmp_path / "data.jsonl"
    path.write_text("\n".join(json.dumps(vars(e)) for e in examples))
    said = []
    options = {"k": 4, "shard_size": 4, "max_length": 30}
    manifest = build_cache.build(
        "teacher", path, tmp_path / "c", say=said.append, **options
    )
    size, tokens = manifest["bytes"], manifest["tokens"]
    assert said[-2:] == [
        f"2 of 2 shards, {tokens:,} tokens, {size / tokens:.1f} bytes per token",
        f"{tmp_path / 'c'} is complete.",
    ]
    collator = PairCollator(small[1], teacher_max_length=30)
    cached = CachedTeacher(tmp_path / "c", small[1])
    pairs = encode(collator, examples, range(7))
    cached.check(pairs)
    assert any(pair.truncated_teacher for pair in pairs)
    assert manifest["facts"] == {
        "teacher": "teacher",
        "data": str(path),
        "max_length": 30,
    }
    rows = [vars(e) for e in examples]
    options["say"] = said.append
    again = build_cache.build("teacher", rows, tmp_path / "d", **options)
    assert again["shards"] == manifest["shards"]


def test_a_command_that_cannot_work(tmp_path, monkeypatch):
    data, out = "localize:fr:long:test", tmp_path / "c"
    for options, error, match in (
        ({"teacher": "http://localhost:1"}, ArgumentError, "without a tokenizer"),
        ({"tokenizer": "teacher"}, ArgumentError, "leave it out"),
        ({"teacher": "no/such/model"}, ModelError, "no/such/model"),
        ({"data": tmp_path / "none.jsonl"}, DataError, "none.jsonl"),
        ({"precision": "int8"}, ArgumentError, "precision='int8'"),
        ({"k": 0}, ArgumentError, "k=0"),
    ):
        with pytest.raises(error, match=match):
            build_cache.build(
                **{"teacher": "teacher", "data": data, **options}, out=out
            )

    def full(*args, **kwargs):
        raise torch.cuda.OutOfMemoryError("tried to allocate 9 GiB")

    monkeypatch.setattr(build_cache, "write_shards", full)
    with pytest.raises(ModelError, match="9 GiB(.|\n)*lower batch_size"):
        build_cache.build("teacher", data, out)
    assert not list(tmp_path.iterdir())
