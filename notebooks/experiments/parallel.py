"""Runs of an experiment, one after another or in several processes."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from multiprocessing import get_context


def runs_of(run: Callable, jobs: Iterable[tuple], workers: int) -> Iterator:
    """run(*job) of each job as it comes: in this process, or from several.

    run must be a function of a module, so that another process finds it.
    """
    if workers == 1:
        yield from (run(*job) for job in jobs)
        return
    with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
        for done in as_completed([pool.submit(run, *job) for job in jobs]):
            yield done.result()
