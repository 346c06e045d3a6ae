"""Where the teacher's targets come from: a live model, or a file.

A teacher is anything with `targets(batch)`: it reads the teacher's view of a
PairedBatch and returns one target a response token, in the batch's order: logits
[N, V], or SparseTargets. It gets no gradient and trains nothing.

    LiveTeacher    runs a model at every batch
    CachedTeacher  reads top-k targets written once by `write_cache`
"""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import torch

from kdlib.errors import ArgumentError, DataError, StorageError
from kdlib.pairs import PairedBatch, tokenizer_content
from kdlib.sparse import SparseTargets, top_k_targets

if TYPE_CHECKING:
    from jaxtyping import Float
    from torch import Tensor

CACHE_FORMAT = "kdlib targets 1"


class Teacher(Protocol):
    """What `train` and `evaluate` ask of a teacher."""

    def targets(self, batch: PairedBatch) -> Float[Tensor, "N V"] | SparseTargets:
        """The target of each response token, row after row."""
        ...


class LiveTeacher:
    """A causal language model that is asked at every batch.

    The model is put in eval mode (dropout in the teacher would be noise in the
    target) and stays frozen: targets carry no gradient.
    """

    def __init__(self, model):
        self.model = model.eval()

    @torch.no_grad()
    def targets(self, batch: PairedBatch) -> Float[Tensor, "N V"]:
        view = batch.teacher.to(next(self.model.parameters()).device)
        logits = self.model(
            input_ids=view.input_ids, attention_mask=view.attention_mask.long()
        ).logits
        return view.select(logits).to(batch.response_ids.device)


class CachedTeacher:
    """Targets read from a file of `write_cache`; no teacher in memory.

    Examples are found by their number (`PairedBatch.example_ids`), and every row is
    proven: its response tokens must be those that the targets were made for.

    Raises DataError for a file that is missing, damaged, or made with another
    tokenizer or chat template.
    """

    def __init__(self, path: str | Path, tokenizer):
        from safetensors import SafetensorError, safe_open

        path = Path(path)
        try:
            with safe_open(path, framework="pt") as file:
                facts = json.loads((file.metadata() or {}).get("kdlib", "{}"))
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        except (OSError, SafetensorError, json.JSONDecodeError) as error:
            raise DataError(
                f"cached targets {path} cannot be read: {error}",
                "write the cache again, or get the file again",
            ) from error
        if facts.get("format") != CACHE_FORMAT:
            raise DataError(
                f"{path} is not a file of cached targets", "name one of write_cache"
            )
        for name, seen in fingerprint(tokenizer).items():
            if facts[name] != seen:
                raise DataError(
                    f"cached targets {path} were made with another {name} "
                    f"({facts[name][:12]}, here {seen[:12]})",
                    "load the tokenizer that made the cache, or write the cache again",
                )
        self.facts = facts
        self._response_ids = tensors["response_ids"].long()
        # Row i of the cache is example_ids[i]; its tokens are start[i] .. start[i+1].
        rows = enumerate(tensors["example_ids"].tolist())
        self._row = {example: row for row, example in rows}
        self._start = tensors["start"]
        self._targets = SparseTargets(
            tensors["indices"],
            tensors["log_probs"],
            tail=facts["tail"],
            temperature=facts["temperature"],
            vocab_size=facts["vocab_size"],
        )

    def __len__(self) -> int:
        return len(self._row)

    def __contains__(self, example_id: int) -> bool:
        return example_id in self._row

    def response_ids(self, example_id: int) -> list[int]:
        """The response that the targets of an example were made for, end included."""
        return self._response_ids[self._tokens(example_id)].tolist()

    def targets(self, batch: PairedBatch) -> SparseTargets:
        parts = [self._tokens(i) for i in batch.example_ids.tolist()]
        places = torch.cat([torch.arange(part.start, part.stop) for part in parts])
        response_ids = batch.response_ids.cpu()
        if not torch.equal(self._response_ids[places], response_ids):
            raise DataError(
                "a batch's response tokens are not those of the cached targets",
                "train on the responses that the cache was made for, numbered alike",
            )
        return self._targets[places].to(batch.response_ids.device)

    def _tokens(self, example_id: int) -> slice:
        if example_id not in self._row:
            raise DataError(
                f"example {example_id} has no cached targets ({len(self)} have)",
                "write the cache for all examples, in the same order",
            )
        row = self._row[example_id]
        return slice(int(self._start[row]), int(self._start[row + 1]))


def write_cache(
    path: str | Path,
    teacher: LiveTeacher,
    batches: Iterable[PairedBatch],
    tokenizer,
    *,
    k: int = 8,
    tail: str = "bucket",
    temperature: float = 1.0,
    facts: dict | None = None,
) -> Path:
    """Ask the teacher once and keep the k likeliest tokens of every position.

    Four bytes a kept token (an int16 or, from 32,768 tokens up, int32 id, and a
    float16 log-probability). `facts` are kept with the file: who made it, from what.

    Raises ArgumentError where `batches` is empty, StorageError where the file cannot
    be written; then nothing is left of it.
    """
    from safetensors.torch import save_file

    path = Path(path)
    examples, lengths, responses, indices, log_probs, vocab = [], [], [], [], [], 0
    for batch in batches:
        kept = top_k_targets(teacher.targets(batch), k, tail, temperature=temperature)
        vocab = kept.vocab_size
        examples.append(batch.example_ids)
        lengths.append(torch.bincount(batch.row_ids, minlength=len(batch.example_ids)))
        responses.append(batch.response_ids)
        indices.append(kept.indices)
        log_probs.append(kept.log_probs.half())
    if not examples:
        raise ArgumentError("batches is empty", "give at least one batch to cache")
    small = torch.int16 if vocab < 2**15 else torch.int32
    start = torch.cat([torch.zeros(1, dtype=torch.long), torch.cat(lengths).cumsum(0)])
    tensors = {
        "example_ids": torch.cat(examples),
        "start": start,
        "response_ids": torch.cat(responses).to(small),
        "indices": torch.cat(indices).to(small),
        "log_probs": torch.cat(log_probs),
    }
    metadata = {
        **(facts or {}),
        "format": CACHE_FORMAT,
        "tail": tail,
        "temperature": temperature,
        "vocab_size": vocab,
        **fingerprint(tokenizer),
    }
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, scratch = tempfile.mkstemp(prefix=f".{path.name}-", dir=path.parent)
        os.close(handle)
    except OSError as error:
        raise StorageError(
            f"cannot write to {path.parent}: {error}", "name a folder you may write"
        ) from error
    try:
        save_file(tensors, scratch, {"kdlib": json.dumps(metadata)})
        os.replace(scratch, path)
    except Exception as error:  # safetensors reports a full disk in its own class
        raise StorageError(
            f"could not write {path}: {error}",
            "free disk space or name another folder; nothing was left half-written",
        ) from error
    finally:
        Path(scratch).unlink(missing_ok=True)
    return path


def fingerprint(tokenizer) -> dict[str, str]:
    """Hashes of what decides the token ids of a prompt: tokenizer and template."""
    content = json.dumps(tokenizer_content(tokenizer), sort_keys=True)
    template = tokenizer.chat_template or ""
    return {
        "tokenizer": hashlib.sha256(content.encode()).hexdigest(),
        "template": hashlib.sha256(str(template).encode()).hexdigest(),
    }
