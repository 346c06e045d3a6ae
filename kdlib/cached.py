"""The cached teacher: targets asked of a teacher once, kept on disk, read at training.

A cache is a folder (written by target_cache.py),

    manifest.json                what made the targets, and an entry for every shard
    targets-00000.safetensors    the targets of some examples; and so on

or, where there is little, one such file by itself (the quickstart ships one). A shard
holds E examples with N response tokens in all, and k entries for each token:

    example_ids [E], start [E+1]  the tokens of example e are start[e] .. start[e+1]
    inputs [E]                    hash of what the teacher read (`input_hash`)
    response_ids [N]              what it was asked to predict
    indices, log_probs [N, k]     as in sparse_targets.py; drawn ones add counts [N, k]
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch

from kdlib.errors import ArgumentError, DataError
from kdlib.files import digest
from kdlib.pairs import EncodedPair
from kdlib.prompts import tokenizer_content
from kdlib.shards import FORMAT, MANIFEST, Shard, read_manifest, shard_fault
from kdlib.sparse_targets import SparseTargets
from kdlib.views import PairedBatch

if TYPE_CHECKING:
    from torch import Tensor

AGAIN = "run the command that writes it again: "


class CachedTeacher:
    """Targets from disk, mapped into memory; no model is needed.

    path:        the folder, or the single file
    tokenizer:   the one that writes the teacher's prompts
    temperature: the temperature of the training to come, to be checked now
    teacher:     a teacher whose targets these should be, to be checked now
    verify:      read every shard once and compare its sha256 (sizes always are)

    Examples are found by their number (`PairedBatch.example_ids`), and every row of
    every batch is proven: what the teacher reads there, and the response, must be what
    the targets were made for.

    Raises DataError, naming what differs or the damaged file, for a cache that is
    missing, incomplete, damaged, or made with another tokenizer, chat template,
    temperature or teacher.
    """

    def __init__(
        self,
        path: str | Path,
        tokenizer,
        *,
        temperature: float | None = None,
        teacher=None,
        verify: bool = False,
    ):
        path = Path(path)
        if path.is_dir():
            shards = _open_folder(path, verify)
        elif verify:
            raise ArgumentError(
                f"verify=True for the single file {path}",
                "only a cache in a folder has a manifest to compare with",
            )
        else:
            shards = [_open_shard(path)]
        self.facts = shards[0].facts
        wanted = dict(fingerprint(tokenizer))
        if temperature is not None:
            wanted["temperature"] = temperature
        if teacher is not None:
            wanted["teacher"] = teacher.fingerprint()
        for name, seen in wanted.items():
            if (made := self.facts.get(name)) != seen:
                raise DataError(
                    f"cached targets {path} were made with another {name} "
                    f"({str(made)[:12]}, here {str(seen)[:12]})",
                    f"take the {name} that made the cache, or write the cache again",
                )
        self._shards = [shard.tensors for shard in shards]
        # For each example, in the order of their numbers: shard, row in the shard,
        # first token, last token. A dict of a million examples would take 0.3 GB.
        places = []
        for number, tensors in enumerate(self._shards):
            start = tensors["start"].long()
            rows = torch.arange(len(start) - 1)
            shard = torch.full_like(rows, number)
            places.append(torch.stack([shard, rows, start[:-1], start[1:]], dim=1))
        ids = torch.cat([tensors["example_ids"] for tensors in self._shards])
        self._ids, order = ids.sort()
        self._places = torch.cat(places)[order]
        twice = self._ids[1:] == self._ids[:-1]
        if twice.any():
            raise DataError(
                f"cached targets {path} hold example {self._ids[1:][twice][0]} twice",
                "number the examples apart and write the cache again",
            )

    def __len__(self) -> int:
        return len(self._ids)

    def __contains__(self, example_id: int) -> bool:
        place = int(torch.searchsorted(self._ids, example_id))
        return place < len(self) and int(self._ids[place]) == example_id

    def response_ids(self, example_id: int) -> list[int]:
        """The response that the targets of an example were made for, end included."""
        shard, _, start, stop = self._place(example_id)
        return self._shards[shard]["response_ids"][start:stop].tolist()

    def check(self, pairs: Iterable[EncodedPair]) -> None:
        """Prove, before training, that the cache was made for all these examples.

        Raises DataError naming the first that it was not made for.
        """
        for pair in pairs:
            read = pair.teacher_prompt_ids + pair.response_ids
            self._proven(pair.example_id, read, pair.response_ids)

    def targets(self, batch: PairedBatch) -> SparseTargets:
        """[N, k] the targets of each response token, row after row."""
        view, places = batch.teacher.to("cpu"), []
        for row, example_id in enumerate(batch.example_ids.tolist()):
            read = view.input_ids[row, view.attention_mask[row]].tolist()
            response = view.input_ids[row, view.completion_mask[row]].tolist()
            places.append(self._proven(example_id, read, response))

        def gather(name: str) -> Tensor:
            return torch.cat(
                [self._shards[shard][name][start:stop] for shard, start, stop in places]
            )

        tail, weights = self.facts["tail"], None
        if tail == "sampled":
            tail, weights = "zero", gather("counts").float() / self.facts["k"]
        return SparseTargets(
            gather("indices"),
            gather("log_probs"),
            tail,
            self.facts["temperature"],
            weights,
            self.facts["vocab_size"],
        ).to(batch.response_ids.device)

    def _place(self, example_id: int) -> list[int]:
        if example_id not in self:
            raise DataError(
                f"example {example_id} has no cached targets ({len(self)} have)",
                "write the cache for all examples, in the same order",
            )
        return self._places[torch.searchsorted(self._ids, example_id)].tolist()

    def _proven(
        self, example_id: int, read: list[int], response: list[int]
    ) -> tuple[int, int, int]:
        """Shard, first and last token of an example, if the cache was made for it."""
        shard, row, start, stop = self._place(example_id)
        tensors = self._shards[shard]
        if tensors["response_ids"][start:stop].tolist() != response:
            raise DataError(
                f"the response tokens of example {example_id} are not those of the "
                "cached targets",
                "train on the responses that the cache was made for, numbered alike",
            )
        # The file that the quickstart ships is older than this hash.
        if "inputs" in tensors:
            if int(tensors["inputs"][row]) != input_hash(read, response):
                raise DataError(
                    f"example {example_id}: the teacher's prompt is not the one that "
                    "the cached targets were made for",
                    "take the same contexts and teacher_max_length, or write the cache "
                    "again (where the chat template writes the date, PairCollator says "
                    "how to stop it)",
                )
        return shard, start, stop


def _open_folder(folder: Path, verify: bool) -> list[Shard]:
    manifest = read_manifest(folder)
    if manifest is None:
        raise DataError(
            f"the folder {folder} has no {MANIFEST}", "name a folder of cached targets"
        )
    if not manifest["complete"]:
        raise DataError(
            f"the cache {folder} is not complete: {len(manifest['shards'])} shards of "
            f"{manifest['n_shards']} are written",
            f"{AGAIN}it goes on where it stopped",
        )
    shards = []
    for number, entry in enumerate(manifest["shards"]):
        if fault := shard_fault(folder, entry, verify):
            raise DataError(fault, f"{AGAIN}it mends what is damaged")
        shard = _open_shard(folder / entry["file"])
        place = shard.facts.get("plan"), shard.facts.get("shard")
        if place != (digest(manifest["plan"]), number):
            raise DataError(
                f"the shard {folder / entry['file']} belongs to another cache or place",
                "get the whole folder again, or write the cache again",
            )
        shards.append(shard)
    return shards


def _open_shard(path: Path) -> Shard:
    shard = Shard.open(path)
    if shard.facts.get("format") != FORMAT:
        raise DataError(
            f"{path} is not a file of cached targets", "name one of write_cache"
        )
    tensors, sampled = shard.tensors, shard.facts.get("tail") == "sampled"
    by_token = ["response_ids", "indices", "log_probs", *["counts"] * sampled]
    fits = (
        {"tail", "temperature", "vocab_size"} <= shard.facts.keys()
        and {"example_ids", "start", *by_token} <= tensors.keys()
        and len(tensors["start"]) == len(tensors["example_ids"]) + 1
        and all(len(tensors[name]) == tensors["start"][-1] for name in by_token)
    )
    if not fits:
        raise DataError(
            f"the parts of {path} do not fit together", "write the cache again"
        )
    return shard


# --- What must match ---


def fingerprint(tokenizer) -> dict[str, str]:
    """Hashes of what decides the token ids of a prompt: tokenizer and template."""
    template = tokenizer.chat_template or ""
    return {
        "tokenizer": digest(tokenizer_content(tokenizer)),
        "template": hashlib.sha256(str(template).encode()).hexdigest(),
    }


def input_hash(read: Sequence[int], response: Sequence[int]) -> int:
    """64 bits that stand for one row of the teacher's view.

    read: prompt and response as ids; the response's length says where it begins
    """
    numbers = np.array([len(response), *read], "<i8")
    short = hashlib.blake2b(numbers.tobytes(), digest_size=8).digest()
    return int.from_bytes(short, "little", signed=True)
