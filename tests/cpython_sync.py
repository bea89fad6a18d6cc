"""CPython's own tests of multiprocessing's locks, run over ours; a program, because they fork and use threads.

Left out is nothing. One thing of the tests is about their own implementation, and is replaced:
check_invariant() looks at the semaphores inside multiprocessing.Condition, which ours has not.
"""

import unittest

from test import _test_multiprocessing as theirs

from ipckit import sync


class Ours(theirs.ProcessesMixin):
    Lock = sync.Lock
    RLock = sync.RLock
    Semaphore = sync.Semaphore
    BoundedSemaphore = sync.BoundedSemaphore
    Condition = sync.Condition
    Event = sync.Event
    Barrier = sync.Barrier

    def check_invariant(self, condition):
        with condition:
            condition.notify_all()
            self.assertFalse(condition.wait(0))


class TestLock(Ours, theirs._TestLock, unittest.TestCase): ...


class TestSemaphore(Ours, theirs._TestSemaphore, unittest.TestCase): ...


class TestCondition(Ours, theirs._TestCondition, unittest.TestCase): ...


class TestEvent(Ours, theirs._TestEvent, unittest.TestCase): ...


class TestBarrier(Ours, theirs._TestBarrier, unittest.TestCase): ...


if __name__ == "__main__":
    unittest.main()
