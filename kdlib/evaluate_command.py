"""`python -m kdlib evaluate STUDENT DATA`: a saved student, and how faithful it is."""

from __future__ import annotations

import shlex
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch

from kdlib import __version__, models
from kdlib.build_cache import OWN_DTYPES
from kdlib.errors import ArgumentError, ModelError
from kdlib.evaluate import fidelity_report
from kdlib.examples import read_examples
from kdlib.ledger import provenance
from kdlib.pairs import PairCollator
from kdlib.precision import Precision
from kdlib.shards import MANIFEST
from kdlib.teachers import CachedTeacher, LiveTeacher


def run(
    student: str | Path,
    data: str | Path | Iterable[Mapping],
    *,
    teacher: str | Path | None = None,
    tokenizer: str | None = None,
    teacher_max_length: int = 1024,
    student_max_length: int = 1024,
    truncate_context: str = "left",
    precision: str = "auto",
    batch_size: int = 32,
) -> dict:
    """The fidelity report (evaluate.py) of a saved student, and what it is of.

    student:   what models.load takes, say the folder student/ of a run
    data:      what read_examples takes
    teacher:   what models.load takes, or cached targets (`kdlib cache`) made for these
               data. Without one, the student is compared with the answers alone
    tokenizer: of a cached teacher, where its chat template is not the student's
    precision: of the teacher's weights, as build_cache.build has it; the student's are
               float32, as in training
    batch_size: examples at a time
    The lengths and truncate_context are PairCollator's; take those of the training.

    Raises what models.load, read_examples, PairCollator and CachedTeacher raise;
    ArgumentError for a tokenizer without cached targets and for a bad option;
    ModelError where the GPU's memory is too small.
    """
    cached = teacher is not None and is_cache(teacher)
    if tokenizer is not None and not cached:
        raise ArgumentError(
            f"tokenizer={tokenizer!r} with teacher={str(teacher)!r}",
            "leave it out: only cached targets come without a tokenizer",
        )
    if batch_size < 1:
        raise ArgumentError(f"batch_size={batch_size}", "use 1 or more for batch_size")
    if precision not in ("auto", *OWN_DTYPES):
        raise ArgumentError(
            f"precision={precision!r}", f"choose auto, {', '.join(OWN_DTYPES)}"
        )
    examples = read_examples(data)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model, words = models.load(student)
    teacher_words, source = words, None
    if cached:
        if tokenizer is not None:
            teacher_words = models.load_tokenizer(tokenizer)
        source = CachedTeacher(teacher, teacher_words)
    elif teacher is not None:
        dtype = OWN_DTYPES[Precision.choose(precision, device).name]
        loaded, teacher_words = models.load(teacher, dtype=dtype)
        source = LiveTeacher(loaded)
    collator = PairCollator(
        words,
        teacher_tokenizer=teacher_words,
        teacher_max_length=teacher_max_length,
        student_max_length=student_max_length,
        truncate_context=truncate_context,
    )
    pairs = [collator.encode(example, i) for i, example in enumerate(examples)]
    if cached:
        source.check(pairs)
    try:
        if isinstance(source, LiveTeacher):
            source.model.to(device)
        found = fidelity_report(
            model.to(device), source, collator, pairs, batch_size=batch_size
        )
    except torch.OutOfMemoryError as error:
        other = "cache the teacher's targets first (python -m kdlib cache)"
        raise ModelError(
            f"the GPU's memory is too small: {error}",
            "lower batch_size" + (f", or {other}" if teacher and not cached else ""),
        ) from error
    origin = str(data) if isinstance(data, (str, Path)) else f"{len(examples)} rows"
    command = ["python", "-m", "kdlib", "evaluate", str(student), origin]
    command += [] if teacher is None else ["--teacher", str(teacher)]
    return {
        "student": str(student),
        "data": origin,
        "teacher": None if teacher is None else str(teacher),
        "validation": found,
        "kdlib": __version__,
        **provenance(shlex.join(command)),
    }


def is_cache(name: str | Path) -> bool:
    """Whether cached targets are meant: a folder with a manifest, or a single file."""
    return Path(name).is_file() or (Path(name) / MANIFEST).is_file()
