"""Prepares items in threads, a few ahead of the loop that uses them."""
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from typing import Any


def ahead(make: Callable[[Any], Any], items: Iterable[Any], threads: int = 2) -> Iterator[Any]:
    """Yields make(item) for each item, in order; an error of make is raised at its item.
    While one result is in use, each thread prepares or holds one more. Decoding and resizing an
    image release the GIL, so threads are enough."""
    items = iter(items)
    pool = ThreadPoolExecutor(threads)
    try:
        pending = deque(pool.submit(make, item) for item in islice(items, threads))
        while pending:
            result = pending.popleft().result()
            pending.extend(pool.submit(make, item) for item in islice(items, 1))
            yield result
    finally:
        pool.shutdown(cancel_futures=True)
