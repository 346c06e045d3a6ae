"""Writing cached targets: ask the teacher once, keep k entries of every position.

    write_cache    one file, from batches
    write_shards   a folder, from examples: resumable, one shard at a time in memory

Both write what cached.py reads. Token ids take two bytes (four from a vocabulary of
32,768 up), log-probabilities two (float16), counts of sampled targets one.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from kdlib import __version__
from kdlib.cached import fingerprint, input_hash
from kdlib.errors import ArgumentError, DataError, ModelError, StorageError
from kdlib.files import digest
from kdlib.lock import LOCK, only_process_in
from kdlib.pairs import EncodedPair, PairCollator, PairedExample
from kdlib.shards import (
    FORMAT,
    SCRATCH,
    read_manifest,
    shard_fault,
    write_manifest,
    write_shard,
)
from kdlib.sparse_targets import TAILS, SparseTargets, sampled_targets, top_k_targets
from kdlib.views import PairedBatch

if TYPE_CHECKING:
    from torch import Tensor

# "sampled" keeps k tokens drawn at random, counted, instead of the k likeliest.
TAILS_AND_SAMPLED = (*TAILS, "sampled")


def write_cache(
    path: str | Path,
    teacher,
    batches: Iterable[PairedBatch],
    tokenizer,
    *,
    k: int = 8,
    tail: str = "bucket",
    temperature: float = 1.0,
    seed: int = 0,
    facts: dict | None = None,
) -> Path:
    """Write the targets of all batches to one file.

    teacher:   anything with `targets(batch)`
    tokenizer: the one that wrote the teacher's prompts
    k, tail:   the k likeliest tokens and what becomes of the rest (see sparse.py), or
               tail="sampled": k tokens drawn at random with `seed`
    facts:     kept with the file: who made it, from what

    Raises ArgumentError where `batches` is empty or an option cannot work, ModelError
    for a teacher that says NaN, StorageError where the file cannot be written; then
    nothing is left of it.
    """
    path, kind = Path(path), _kind(k, tail, temperature, seed)
    tensors, vocab = _ask(teacher, batches, kind, place=0)
    metadata = {**(facts or {}), "format": FORMAT, **kind, "vocab_size": vocab}
    metadata |= fingerprint(tokenizer)
    if hasattr(teacher, "fingerprint"):
        metadata["teacher"] = teacher.fingerprint()
    write_shard(path, tensors, metadata)
    return path


def write_shards(
    folder: str | Path,
    teacher,
    examples: Sequence[PairedExample],
    collator: PairCollator,
    *,
    k: int = 8,
    tail: str = "bucket",
    temperature: float = 1.0,
    seed: int = 0,
    shard_size: int = 1000,
    batch_size: int = 16,
    facts: dict | None = None,
    on_shard: Callable[[dict], None] = lambda manifest: None,
) -> dict:
    """Write a cache to a folder, or finish one that was begun; return its manifest.

    teacher:    anything with `targets(batch)` and `fingerprint()`
    shard_size: examples in a shard; a run that is killed loses the shard it was at
    batch_size: examples, of like length, that the teacher reads at a time
    on_shard:   called with the manifest after every shard that is written
    The other options are those of write_cache.

    All examples are encoded once before the teacher is asked, so that one that cannot
    be used is found at once. Finished shards of an earlier run with the same plan
    (teacher, tokenizer, template, data, options) are kept; damaged ones are written
    anew. The manifest is complete only once all shards are there.

    Raises, besides what write_cache does, DataError for an example that cannot be
    encoded, and for a folder that holds something else, naming what differs;
    StorageError where another process is at it.
    """
    folder, kind = Path(folder), _kind(k, tail, temperature, seed)
    for name, value in (("shard_size", shard_size), ("batch_size", batch_size)):
        if value < 1:
            raise ArgumentError(f"{name}={value}", f"use 1 or more for {name}")
    if not len(examples):
        raise ArgumentError("examples is empty", "give at least one example to cache")
    data = hashlib.sha256()
    for number, example in enumerate(examples):
        pair = collator.encode(example, number)
        data.update(json.dumps([pair.teacher_prompt_ids, pair.response_ids]).encode())
    starts = range(0, len(examples), shard_size)
    plan = {
        **kind,
        **fingerprint(collator.teacher_side.tokenizer),
        "teacher": teacher.fingerprint(),
        "data": data.hexdigest(),
        "examples": len(examples),
        "shard_size": shard_size,
    }
    libraries = ("torch", "transformers", "safetensors")
    versions = {"kdlib": __version__} | {name: version(name) for name in libraries}
    about = {"facts": facts or {}, "versions": versions}
    with only_process_in(folder):
        done = _finished(folder, plan)
        for number, start in enumerate(starts):
            file = f"targets-{number:05}.safetensors"
            if file in done:
                continue
            numbers = range(start, min(start + shard_size, len(examples)))
            pairs = [collator.encode(examples[i], i) for i in numbers]
            tensors, vocab = _ask(
                teacher, _batches(pairs, collator, batch_size), kind, number
            )
            # Before the shard: a folder of shards without a manifest would be nobody's.
            _save(folder, plan, done, len(starts), about)
            metadata = {"format": FORMAT, **plan, "vocab_size": vocab}
            metadata |= {"plan": digest(plan), "shard": number}
            written = write_shard(folder / file, tensors, metadata)
            tokens = len(tensors["response_ids"])
            done[file] = {
                "file": file,
                "examples": len(pairs),
                "tokens": tokens,
                **written,
            }
            on_shard(_save(folder, plan, done, len(starts), about))
    return read_manifest(folder)


def _finished(folder: Path, plan: dict) -> dict[str, dict]:
    """The entries of good shards of an earlier run, by file."""
    try:
        names = [path.name for path in folder.iterdir() if path.name != LOCK]
    except OSError as error:
        raise StorageError(
            f"{folder} is not a folder to write to: {error}", "name another folder"
        ) from error
    left_over = [name for name in names if name.startswith(SCRATCH)]
    manifest = read_manifest(folder) if names else None
    if manifest is None and (others := sorted(set(names) - set(left_over))):
        raise DataError(
            f"the folder {folder} is not empty and not a cache (it holds {others[0]})",
            "name a new folder",
        )
    manifest = manifest or {"plan": plan, "shards": []}
    for name, value in plan.items():
        if (begun := manifest["plan"].get(name)) != value:
            raise DataError(
                f"the cache {folder} was begun with another {name} "
                f"({str(begun)[:12]}, now {str(value)[:12]})",
                f"use the same {name}, or name a new folder",
            )
    for name in left_over:
        with suppress(OSError):
            (folder / name).unlink()
    entries = manifest["shards"]
    return {e["file"]: e for e in entries if not shard_fault(folder, e, verify=True)}


def _save(folder: Path, plan: dict, done: dict, n_shards: int, about: dict) -> dict:
    # By number: the 100,000th name is longer, and would come before the second.
    shards = [done[file] for file in sorted(done, key=lambda file: (len(file), file))]
    tokens, size = (
        sum(entry[name] for entry in shards) for name in ("tokens", "bytes")
    )
    manifest = {
        "format": FORMAT,
        "complete": len(shards) == n_shards,
        "plan": plan,
        **about,
        "tokens": tokens,
        "bytes": size,
        "bytes_per_token": round(size / tokens, 2) if tokens else None,
        "n_shards": n_shards,
        "shards": shards,
    }
    write_manifest(folder, manifest)
    return manifest


def _batches(
    pairs: list[EncodedPair], collator: PairCollator, size: int
) -> Iterator[PairedBatch]:
    """Batches of like length, so that little is padding."""
    pairs.sort(key=lambda p: len(p.teacher_prompt_ids) + len(p.response_ids))
    for start in range(0, len(pairs), size):
        yield collator.collate(pairs[start : start + size])


def _kind(k: int, tail: str, temperature: float, seed: int) -> dict:
    if k < 1:
        raise ArgumentError(f"k={k}", "keep at least one token of every position")
    if tail not in TAILS_AND_SAMPLED:
        raise ArgumentError(f"tail={tail!r}", f"choose one of {TAILS_AND_SAMPLED}")
    if not 0 < temperature < math.inf:
        raise ArgumentError(f"temperature={temperature}", "use a positive number")
    kind = {"k": k, "tail": tail, "temperature": float(temperature)}
    return kind | ({"seed": seed} if tail == "sampled" else {})


def _ask(
    teacher, batches: Iterable[PairedBatch], kind: dict, place: int
) -> tuple[dict[str, Tensor], int | None]:
    """The tensors of one shard, and the teacher's vocabulary."""
    parts: dict[str, list[Tensor]] = defaultdict(list)
    device, generator, vocab = getattr(teacher, "device", "cpu"), None, 0
    for batch in batches:
        batch = batch.to(device)  # so that the choice of k is made there, too
        targets = teacher.targets(batch)
        if kind["tail"] == "sampled" and generator is None:
            # A shard's draws are its own: the same whether or not the run was resumed.
            name = f"{kind['seed']}/{place}".encode()
            start = int.from_bytes(hashlib.sha256(name).digest()[:7], "big")
            generator = torch.Generator(targets.device).manual_seed(start)
        served = isinstance(targets, SparseTargets)  # and proven sound by remote.py
        if not served and not targets.logsumexp(-1).isfinite().all():
            raise ModelError(
                f"the teacher says NaN among examples {batch.example_ids.tolist()}",
                "run the teacher in bfloat16 or float32, and check its weights",
            )
        kept = _keep(targets, kind, generator)
        vocab = kept.vocab_size
        view = batch.teacher.to("cpu")
        rows = range(len(batch.example_ids))
        read = [view.input_ids[i, view.attention_mask[i]].tolist() for i in rows]
        said = [view.input_ids[i, view.completion_mask[i]].tolist() for i in rows]
        parts["example_ids"].append(batch.example_ids)
        parts["inputs"].append(torch.tensor([*map(input_hash, read, said)]))
        parts["lengths"].append(torch.tensor([*map(len, said)]))
        parts["response_ids"].append(batch.response_ids)
        parts["indices"].append(kept.indices)
        parts["log_probs"].append(kept.log_probs.half())
        if kept.weights is not None:
            parts["counts"].append((kept.weights * kind["k"]).round())
    if not parts:
        raise ArgumentError("batches is empty", "give at least one batch to cache")
    return _packed({n: torch.cat(p).cpu() for n, p in parts.items()}, vocab), vocab


def _packed(tensors: dict[str, Tensor], vocab: int | None) -> dict[str, Tensor]:
    """A shard's tensors in as few bytes as they need."""
    if len(tensors["example_ids"].unique()) < len(tensors["example_ids"]):
        raise ArgumentError(
            "two examples have the same number",
            "encode(example, number) with a number of its own for each example",
        )
    start = tensors.pop("lengths").cumsum(0)
    tensors["start"] = torch.cat([start.new_zeros(1), start])
    ids = torch.int16 if vocab and vocab < 2**15 else torch.int32
    for name in ("response_ids", "indices"):
        tensors[name] = tensors[name].to(ids)
    if "counts" in tensors:
        small = tensors["counts"].max() < 2**8
        tensors["counts"] = tensors["counts"].to(torch.uint8 if small else torch.int32)
    return tensors


def _keep(targets, kind: dict, generator) -> SparseTargets:
    k, tail, temperature = kind["k"], kind["tail"], kind["temperature"]
    if isinstance(targets, SparseTargets):  # a server's: they are chosen already
        seen = {
            "k": targets.indices.shape[1],
            "tail": targets.tail if targets.weights is None else "sampled",
            "temperature": targets.temperature,
        }
        if any(seen[name] != kind[name] for name in seen):
            raise ArgumentError(
                f"the teacher gives {seen}, not {kind}",
                "ask for what the teacher gives, or make the teacher give that",
            )
        return targets
    if tail == "sampled":
        return sampled_targets(targets, k, generator, temperature=temperature)
    return top_k_targets(targets, k, temperature=temperature)
