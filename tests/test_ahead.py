"""train/ahead.py."""
import threading
import time

import pytest

from train.ahead import ahead


def test_results_come_in_order_and_a_few_ahead() -> None:
    """The first item is the slowest; never are more than three results unused."""
    made = []

    def make(i: int) -> int:
        time.sleep(0.02 if i == 0 else 0)
        made.append(i)
        return i * i
    for i, result in enumerate(ahead(make, iter(range(9)))):
        assert result == i * i
        time.sleep(0.005)
        assert len(made) <= i + 3
    assert sorted(made) == list(range(9))
    assert list(ahead(make, [])) == []


def test_an_error_is_raised_at_its_item_and_ends_the_rest() -> None:
    started = []

    def make(i: int) -> int:
        started.append(i)
        if i == 2:
            raise ValueError("item 2")
        return i
    results = []
    with pytest.raises(ValueError, match="item 2"):
        for result in ahead(make, range(100)):
            results.append(result)
    assert results == [0, 1] and len(started) <= 4


def test_no_thread_outlives_a_loop_that_ends_early() -> None:
    before = threading.active_count()
    results = ahead(str, range(100))
    assert next(results) == "0"
    results.close()
    assert threading.active_count() == before
