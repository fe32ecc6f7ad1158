"""Background prefetching by step."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Generic, TypeVar

Result = TypeVar("Result")


class Prefetcher(Generic[Result]):
    """Results by step, computed in threads up to `depth` steps before they are requested.

    Any step may be requested; one out of sequence drops the prefetched results. An error is raised when its step is
    requested, and requesting the step again tries again.

    Args:
        plan: called in the requesting thread, in order of steps; returns the function that a thread calls.
        depth: 0 computes a step when it is requested, in the requesting thread.
        end: the first step that is not prefetched; None: there is none. It may be requested all the same.
    """

    def __init__(self, plan: Callable[[int], Callable[[], Result]], depth: int, end: int | None = None) -> None:
        self._plan, self._depth, self._end = plan, depth, end
        self._pool = ThreadPoolExecutor(min(2, depth)) if depth else None
        self._pending: deque[Future[Result]] = deque()
        self._next = 0
        """The step of the first result in `_pending`."""

    def __call__(self, step: int) -> Result:
        if self._pool is None:
            return self._plan(step)()
        if step != self._next:
            self._drop()
        self._next = step
        try:
            while len(self._pending) <= self._depth:
                following = step + len(self._pending)
                if following != step and self._end is not None and following >= self._end:
                    break
                self._pending.append(self._pool.submit(self._plan(following)))
            result = self._pending.popleft().result()
        except BaseException:
            self._drop()
            raise
        self._next = step + 1
        return result

    def _drop(self) -> None:
        for future in self._pending:
            future.cancel()
        self._pending.clear()
