"""Reading ahead: the order, how far, errors in their place, and no thread that stays."""

import contextlib
import gc
import threading
import time

import pytest

from dis_ssm.system.prefetch import prefetch


def readers():
    return [thread for thread in threading.enumerate() if thread.name.startswith("prefetch")]


def until(condition):
    deadline = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.001)


@pytest.mark.parametrize("ahead", [1, 2, 30])
def test_results_come_in_order_from_one_thread(ahead):
    threads = set()

    def read(item):
        threads.add(threading.current_thread())
        time.sleep(0.002 * (item % 3))
        return item * item

    assert list(prefetch(read, range(20), ahead)) == [item * item for item in range(20)]
    assert len(threads) == 1 and threading.current_thread() not in threads
    assert not readers()
    assert list(prefetch(read, [], ahead)) == []


@pytest.mark.parametrize("ahead", [1, 3])
def test_no_more_is_read_than_asked(ahead):
    begun, asked = [], []

    def items():
        for item in range(20):
            asked.append(item)
            yield item

    with contextlib.closing(prefetch(begun.append, items(), ahead)) as results:
        time.sleep(0.05)
        assert not asked  # nothing before the first result is wanted
        for wanted in range(1, 6):
            next(results)
            until(lambda n=wanted: len(begun) == n + ahead)
            time.sleep(0.01)
            assert begun == asked == list(range(wanted + ahead))


def test_an_error_comes_after_the_results_before_it():
    def read(item):
        if item == 3:
            raise OSError("no item 3")
        return item

    found, results = [], prefetch(read, range(9), 2)
    with pytest.raises(OSError, match="no item 3"):
        found.extend(iter(lambda: next(results), None))
    assert found == [0, 1, 2] and not readers()
    with pytest.raises(StopIteration):
        next(results)


def test_an_error_of_the_items_ends_the_thread():
    def items():
        yield from range(3)
        raise KeyError("items")

    with pytest.raises(KeyError):
        list(prefetch(abs, items()))
    assert not readers()


def test_a_caller_that_stops_leaves_no_thread_and_no_reading():
    begun, go_on = [], threading.Event()

    def read(item):
        begun.append(item)
        if item:
            go_on.wait(10)
        return item

    results = prefetch(read, range(99), 5)
    assert next(results) == 0
    until(lambda: len(begun) == 2)
    threading.Timer(0.05, go_on.set).start()
    results.close()
    assert begun == [0, 1] and not readers()

    dropped = prefetch(abs, range(9))
    assert next(dropped) == 0 and readers()
    del dropped
    gc.collect()
    assert not readers()


def test_ahead_of_nothing_is_refused():
    with pytest.raises(ValueError, match="ahead is 0"):
        prefetch(abs, range(3), 0)
