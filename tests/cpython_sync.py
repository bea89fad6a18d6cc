"""CPython's own tests of multiprocessing's locks, run over ours; a program, because they fork and use threads.

Things of the tests that are about their own implementation, or about how fast the machine is, are replaced:
check_invariant() looks at the semaphores inside multiprocessing.Condition, which ours has not; what they
look for after 0.1 s is waited for here. What they expect of a process that is late by a second is expected in
test_sync.py of one that is seen to be.
"""

import time
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

    def assertReachesEventually(self, func, value):
        while func() != value:
            time.sleep(0.001)

    def assertReturnsIfImplemented(self, value, func, *args):
        self.assertReachesEventually(lambda: func(*args), value)


class TestLock(Ours, theirs._TestLock, unittest.TestCase): ...


class TestSemaphore(Ours, theirs._TestSemaphore, unittest.TestCase): ...


late = unittest.skip("test_sync.py waits until the other is as far as this expects after a second")


class TestCondition(Ours, theirs._TestCondition, unittest.TestCase):
    test_wait_result = late(theirs._TestCondition.test_wait_result)


class TestEvent(Ours, theirs._TestEvent, unittest.TestCase): ...


class TestBarrier(Ours, theirs._TestBarrier, unittest.TestCase):
    defaultTimeout = 600.0
    test_timeout = late(theirs._TestBarrier.test_timeout)
    test_default_timeout = late(theirs._TestBarrier.test_default_timeout)


if __name__ == "__main__":
    unittest.main()
