"""Work done in threads ahead of the step that asks for it."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Generic, TypeVar

Result = TypeVar("Result")


class Prefetcher(Generic[Result]):
    """Results by step, made up to `depth` steps before they are asked for.

    Any step may be asked for; asking for another than the next one drops what was made ahead. An error of a step is
    raised when that step is asked for, and asking again tries again.

    Args:
        plan: called in the asking thread, in order of steps; returns the work of a step, done in a thread.
        depth: 0 does the work when it is asked for, in the asking thread.
        end: the first step that is not made ahead; None: there is none. It may be asked for all the same.
    """

    def __init__(self, plan: Callable[[int], Callable[[], Result]], depth: int, end: int | None = None) -> None:
        self._plan, self._depth, self._end = plan, depth, end
        self._pool = ThreadPoolExecutor(min(2, depth)) if depth else None
        self._ahead: deque[Future[Result]] = deque()
        self._next = 0
        """The step of the first result in `_ahead`."""

    def __call__(self, step: int) -> Result:
        if self._pool is None:
            return self._plan(step)()
        if step != self._next:
            self._drop()
        self._next = step
        try:
            while len(self._ahead) <= self._depth and self._wanted(step, step + len(self._ahead)):
                self._ahead.append(self._pool.submit(self._plan(step + len(self._ahead))))
            result = self._ahead.popleft().result()
        except BaseException:
            self._drop()
            raise
        self._next = step + 1
        return result

    def _wanted(self, asked: int, step: int) -> bool:
        return step == asked or self._end is None or step < self._end

    def _drop(self) -> None:
        for future in self._ahead:
            future.cancel()
        self._ahead.clear()
