"""Which examples form a step, and having the next batch ready in time.

The order follows from the seed alone, so the number of steps done is the position in
the data: to go on after step n, skip n batches.
"""

from __future__ import annotations

import hashlib
import itertools
import queue
import random
import threading
from array import array
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, TypeVar

import torch

from kdlib.distributed import ALONE, Ranks
from kdlib.errors import DataError
from kdlib.pairs import EncodedPair, PairCollator
from kdlib.settings import TrainConfig
from kdlib.views import PairedBatch, View

if TYPE_CHECKING:
    from kdlib.sparse_targets import SparseTargets

T = TypeVar("T")


def batches_of_steps(
    pairs: Sequence[EncodedPair],
    collator: PairCollator,
    config: TrainConfig,
    device: torch.device,
    *,
    skip: int = 0,
    rewrite: Callable[[int, list[EncodedPair]], list[EncodedPair]] | None = None,
    ask: Callable[[PairedBatch], SparseTargets] | None = None,
    ranks: Ranks = ALONE,
) -> Iterator[list[PairedBatch]]:
    """Endless: the micro-batches of this rank's share of each step, on the device.

    skip:    steps that are done already
    rewrite: given a step's number and this rank's examples, returns those to train on,
             when the step is asked for and not before (on_policy.py)
    ask:     says what the teacher says of a batch, where that takes no GPU

    All ranks get equally many, because they compute in step with each other: a rank
    with fewer rows gets batches without any (`without_rows`).

    For a GPU a second thread collates the next step into pinned memory while this one
    is computed, unless it has to be written first. On a CPU the computation needs that
    core itself.
    """
    steps = shuffled(pairs, config.batch_size, random.Random(config.seed))
    steps = itertools.islice(enumerate(steps), skip, None)

    def collated(number: int, step: list[EncodedPair]) -> list[PairedBatch]:
        mine = ranks.share(step)
        if rewrite is not None:  # all ranks together, also one without rows
            mine = rewrite(number, mine)
        parts = micro_batches(mine, config.micro_batch_size)
        batches = [collator.collate(part) for part in parts]
        if ask is not None:
            batches = [replace(batch, targets=ask(batch)) for batch in batches]
        most = micro_batches(step[:: ranks.world], config.micro_batch_size)  # rank 0's
        if len(parts) < len(most):
            none = without_rows(collator.collate(step[:1]))
            batches += [none] * (len(most) - len(parts))
        return batches

    if device.type != "cuda" or rewrite is not None:
        for step in steps:
            yield [batch.to(device) for batch in collated(*step)]
        return
    pinned = prefetched(
        [batch.map(torch.Tensor.pin_memory) for batch in collated(*s)] for s in steps
    )
    try:
        for step in pinned:
            # Pinned memory is copied while the GPU computes; its order of work is such
            # that nothing reads the copy before it is made.
            yield [
                batch.map(lambda x: x.to(device, non_blocking=True)) for batch in step
            ]
    finally:
        pinned.close()


def shuffled(
    pairs: Sequence[EncodedPair], batch_size: int, rng: random.Random
) -> Iterator[list[EncodedPair]]:
    """Endless batches; each pass shuffles anew and batches rows of like length.

    Rows are sorted by length within windows of 16 batches: little padding, and still
    a new mixture at every pass.
    """
    order = list(range(len(pairs)))

    def length(i: int) -> int:
        return len(pairs[i].student_prompt_ids) + len(pairs[i].response_ids)

    while True:
        rng.shuffle(order)
        batches = []
        for start in range(0, len(order), 16 * batch_size):
            window = sorted(order[start : start + 16 * batch_size], key=length)
            batches += [
                window[i : i + batch_size] for i in range(0, len(window), batch_size)
            ]
        rng.shuffle(batches)
        for batch in batches:
            yield [pairs[i] for i in batch]


def micro_batches(
    pairs: list[EncodedPair], size: int | None
) -> list[list[EncodedPair]]:
    size = size or max(1, len(pairs))  # a rank's share may be empty
    return [pairs[i : i + size] for i in range(0, len(pairs), size)]


def without_rows(batch: PairedBatch) -> PairedBatch:
    """The same inputs with nothing to predict: no row, no token, no loss."""

    def unasked(view: View) -> View:
        nowhere = torch.zeros_like(view.completion_mask)
        return View(view.input_ids, view.attention_mask, nowhere)

    none = batch.response_ids[:0]
    return PairedBatch(unasked(batch.teacher), unasked(batch.student), none, none, none)


def prefetched(items: Iterator[T]) -> Iterator[T]:
    """The same items; a second thread makes the next one while this one is in use.

    An exception of `items` is raised where its item would have come. Closing the
    iterator ends the thread.
    """
    # One place: the thread makes one more item while another waits here.
    ready: queue.Queue = queue.Queue(maxsize=1)
    closed = threading.Event()

    def put(message) -> bool:
        while not closed.is_set():
            try:
                ready.put(message, timeout=0.1)
                return True
            except queue.Full:
                continue
        return False

    def work():
        try:
            for item in items:
                if not put((item, None)):
                    return
            put((None, StopIteration()))
        except BaseException as error:  # whatever it is, the reader should see it
            put((None, error))

    thread = threading.Thread(target=work, name="kdlib-prefetch", daemon=True)
    thread.start()
    try:
        while True:
            item, error = ready.get()
            if isinstance(error, StopIteration):
                return
            if error is not None:
                raise error
            yield item
    finally:
        closed.set()
        thread.join()


def check_responses(pairs: Sequence[EncodedPair]) -> None:
    """Raise DataError for an example without a response token: it has no loss."""
    for pair in pairs:
        if not pair.response_ids:
            raise DataError(
                f"example {pair.example_id} has no response token",
                "leave out examples whose responses are empty or wholly cut off",
            )


def data_hash(pairs: Sequence[EncodedPair]) -> str:
    """SHA-256 of all ids, in order: other data or another order give another hash."""
    digest = hashlib.sha256()
    for pair in pairs:
        parts = pair.teacher_prompt_ids, pair.student_prompt_ids, pair.response_ids
        digest.update(array("q", [pair.example_id, *map(len, parts)]).tobytes())
        for part in parts:
            digest.update(array("q", part).tobytes())
    return digest.hexdigest()
