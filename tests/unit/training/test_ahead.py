"""Batches that are made while the model works."""

import threading
import weakref

import pytest

from qkv.errors import FileError
from qkv.training.ahead import Ahead


def test_what_is_made_is_that_of_the_step_whatever_was_asked_for_before():
    made = []

    def make(step):
        made.append(step)
        return step * 10

    ahead = Ahead(make, 6)
    assert [ahead(step) for step in (0, 1, 2, 4, 5, 0, 0, 9)] == [0, 10, 20, 40, 50, 0, 0, 90]
    assert max(step for step in made if step != 9) == 5, "nothing behind the last step"
    once = Ahead(lambda step: made.append(("once", step)), 100)
    for step in range(20):
        once(step)
    assert [each for each in made if isinstance(each, tuple)][:20] == [("once", step) for step in range(20)]


def test_the_next_is_made_meanwhile():
    there = threading.Event()
    ahead = Ahead(lambda step: there.set() if step == 1 else None, 5)
    ahead(0)
    assert there.wait(10)


def test_an_error_is_raised_where_its_step_is_asked_for():
    def make(step):
        if step == 2:
            raise FileError("x.png: cannot be read as a picture")
        return step

    ahead = Ahead(make, 9)
    assert (ahead(0), ahead(1)) == (0, 1)
    with pytest.raises(FileError, match=r"x\.png: cannot be read"):
        ahead(2)


def test_no_thread_is_left():
    before = set(threading.enumerate())
    ahead = Ahead(lambda step: step, 9)
    ahead(0)
    (thread,) = set(threading.enumerate()) - before
    gone = weakref.ref(ahead)
    del ahead
    assert gone() is None
    thread.join(10)
    assert not thread.is_alive()
