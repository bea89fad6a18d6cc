"""CPython's own tests of multiprocessing.Queue, run over ours: python cpython_queues.py fork|spawn|forkserver.

A program of its own, because those tests fork, set the start method and leave helpers of multiprocessing.
"""

import multiprocessing
import sys
import unittest

from test import _test_multiprocessing as theirs

from ipckit import queues

# What multiprocessing's queues do, and ours don't, on purpose:
NOT_OURS = {
    "test_queue_feeder_donot_stop_onexc": (
        "expects that put() hides what can't be pickled, which the feeder thread finds: here put() raises"
    ),
    "test_queue_feeder_on_queue_feeder_error": "is about a hook of the feeder thread, which there is none of",
    "test_closed_queue_empty_exceptions": (
        "expects close() to do nothing to a queue that was not used yet: here closed is closed"
    ),
}


class OursMixin(theirs.ProcessesMixin):
    Queue = staticmethod(queues.Queue)
    JoinableQueue = staticmethod(queues.JoinableQueue)


class TestQueue(theirs._TestQueue, OursMixin, unittest.TestCase):
    @classmethod
    def setUpClass(cls):
        super().setUpClass()
        # Some tests ask the module itself for a queue.
        multiprocessing.Queue = queues.Queue
        multiprocessing.JoinableQueue = queues.JoinableQueue


for name, reason in NOT_OURS.items():
    if hasattr(TestQueue, name):
        setattr(TestQueue, name, unittest.skip(reason)(getattr(TestQueue, name)))


if __name__ == "__main__":
    multiprocessing.set_start_method(sys.argv.pop(1), force=True)
    unittest.main(verbosity=2)
