"""`python -m kdlib cache`: from the names of a teacher and of data to a cache."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

import torch

from kdlib import models
from kdlib.errors import ArgumentError, ModelError
from kdlib.examples import read_examples
from kdlib.pairs import PairCollator
from kdlib.precision import DTYPES, Precision
from kdlib.teachers import LiveTeacher, RemoteTeacher, write_shards

# The student's side is not cached: its length must not stop anyone here.
ANY_LENGTH = 2**31
# The teacher is not trained: its weights themselves may be in 16 bits.
OWN_DTYPES = {"fp32": torch.float32, **DTYPES}


def build(
    teacher: str,
    data: str | Path | Iterable[Mapping],
    out: str | Path,
    *,
    tokenizer: str | None = None,
    server: dict | None = None,
    max_length: int = 1024,
    truncate_context: str = "left",
    precision: str = "auto",
    say: Callable[[str], None] = print,
    **options,
) -> dict:
    """Write the targets of `teacher` for `data` to the folder `out`; its manifest.

    teacher:    what models.load takes, or the URL of a server ("http://HOST:PORT")
    data:       what read_examples takes
    tokenizer:  folder or name of the served model's tokenizer, for a URL alone
    server:     options of RemoteTeacher (model, api_key, timeout, ...), for a URL
    max_length: tokens of the teacher's prompt and response; training from the cache
                must use the same as teacher_max_length, and the same truncate_context
    precision:  of the teacher's weights on the GPU, or the CPU where there is none:
                "auto" (see precision.py), "fp32", "bf16" or "fp16"
    say:        gets a line of text after every shard
    options:    k, tail, temperature, seed, shard_size, batch_size of write_shards

    Raises what models.load, read_examples and write_shards raise, ArgumentError where
    a server's tokenizer is not named, ModelError where the GPU's memory is too small.
    """
    examples = read_examples(data)
    served = teacher.startswith(("http://", "https://"))
    if served and tokenizer is None:
        raise ArgumentError(
            f"teacher={teacher!r} without a tokenizer",
            "name the served model's tokenizer, a folder or a hub id",
        )
    if tokenizer is not None and not served:
        raise ArgumentError(
            f"tokenizer={tokenizer!r} with teacher={teacher!r}",
            "leave it out: the teacher's folder has its tokenizer",
        )
    if precision not in ("auto", *OWN_DTYPES):
        raise ArgumentError(
            f"precision={precision!r}", f"choose auto, {', '.join(OWN_DTYPES)}"
        )
    if served:
        words = models.load_tokenizer(tokenizer)
        kind = {name: options[name] for name in ("k", "tail") if name in options}
        model = RemoteTeacher(teacher, words, **kind, **(server or {}))
    else:
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        chosen = Precision.choose(precision, device)
        loaded, words = models.load(teacher, dtype=OWN_DTYPES[chosen.name])
        model = LiveTeacher(loaded.to(device))
    collator = PairCollator(
        words,
        teacher_max_length=max_length,
        student_max_length=ANY_LENGTH,
        truncate_context=truncate_context,
    )

    origin = str(data) if isinstance(data, (str, Path)) else f"{len(examples)} rows"

    def report(manifest: dict) -> None:
        say(
            f"{len(manifest['shards'])} of {manifest['n_shards']} shards, "
            f"{manifest['tokens']:,} tokens, "
            f"{manifest['bytes_per_token']:.1f} bytes per token"
        )

    try:
        manifest = write_shards(
            out,
            model,
            examples,
            collator,
            facts={"teacher": teacher, "data": origin, "max_length": max_length},
            on_shard=report,
            **options,
        )
    except torch.cuda.OutOfMemoryError as error:
        raise ModelError(
            f"the GPU's memory is too small: {error}",
            "lower batch_size; the same command goes on with the shards that are done",
        ) from error
    say(f"{out} is complete.")
    return manifest
