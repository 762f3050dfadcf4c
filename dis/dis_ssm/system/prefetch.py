"""Reading ahead: what comes next is read by a thread while what came last is used."""

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")


def prefetch(
    read: Callable[[Item], Result], items: Iterable[Item], ahead: int = 1
) -> Iterator[Result]:
    """`read(item)` for each of `items`, in their order, as `map` gives it.

    One thread reads, one item after another. An error of `read` is raised in place of its result,
    after all results before it; nothing is read beyond it but what was under way. Closing the
    iterator (`contextlib.closing`, or dropping it) cancels what has not begun and ends the thread.

    Args:
        read: what the thread calls.
        items: what to read; taken from as it is needed, by the caller's own thread.
        ahead: how many results may be read, or waiting, while the caller uses the last one.

    Raises:
        ValueError: `ahead` is below 1.
    """
    if ahead < 1:
        raise ValueError(f"ahead is {ahead}: it must be at least 1")
    return _prefetch(read, items, ahead)


def _prefetch(
    read: Callable[[Item], Result], items: Iterable[Item], ahead: int
) -> Iterator[Result]:
    pending: deque[Future[Result]] = deque()
    with ThreadPoolExecutor(1, "prefetch") as pool:
        try:
            for item in items:
                pending.append(pool.submit(read, item))
                if len(pending) > ahead:
                    yield pending.popleft().result()
            while pending:
                yield pending.popleft().result()
        finally:
            pool.shutdown(cancel_futures=True)
