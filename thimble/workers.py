"""Work in several processes, its results in the order of the tasks."""

from __future__ import annotations

import multiprocessing
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Executor, Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import ExitStack

from thimble.errors import EnvironmentProblem


def process_pool(workers: int) -> Executor | ExitStack:
    """Processes, or for one worker nothing: starting any takes longer than a small corpus."""
    if workers == 1:
        return ExitStack()
    # Not forked: threads of the tokenizer or of torch may hold locks in this process.
    return ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("spawn"))


def in_order(pool: Executor | ExitStack, function: Callable, tasks: Iterable[tuple]) -> Iterator:
    """``function(*task)`` of every task, in order, with only a few tasks under way at a time."""
    if not isinstance(pool, Executor):
        for task in tasks:
            yield function(*task)
        return
    under_way: deque[Future] = deque()
    ahead = 2 * pool._max_workers  # type: ignore[attr-defined]
    try:
        for task in tasks:
            under_way.append(pool.submit(function, *task))
            if len(under_way) > ahead:
                yield under_way.popleft().result()
        while under_way:
            yield under_way.popleft().result()
    except BrokenProcessPool:
        raise EnvironmentProblem(
            "A worker process died: out of memory, or a script that starts this outside of "
            "`if __name__ == '__main__':`. Mend that, or use one worker."
        ) from None
    finally:
        for future in under_way:
            future.cancel()
