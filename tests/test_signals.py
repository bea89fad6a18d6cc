import os
import signal

from ipckit import signals
from ipckit.signals import sigaction

RT = signal.SIGRTMIN


def test_each_of_a_thousand_real_time_signals_is_handled_once_and_in_order():
    got = []
    with sigaction(RT, got.append, info=True), signals.blocked():
        for value in range(1000):
            signals.sigqueue(os.getpid(), RT, value)
    assert [info.value for info in got] == list(range(1000))
    assert {(info.signo, info.pid, info.uid) for info in got} == {(RT, os.getpid(), os.getuid())}
