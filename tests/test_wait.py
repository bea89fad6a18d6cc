import asyncio
import errno
import math
import os
import select
import signal
import time

import pytest

from ipckit import wait


def test_none_is_for_ever_and_zero_is_now():
    assert wait.deadline(None) == wait.FOREVER
    assert wait.deadline(math.inf) == wait.FOREVER
    assert wait.deadline(0) == wait.NOW
    assert wait.remaining(wait.FOREVER) is None
    assert wait.remaining(wait.NOW) == 0


@pytest.mark.parametrize("bad", [-1, -0.001, math.nan, -math.inf])
def test_a_bad_timeout_names_its_value(bad):
    with pytest.raises(ValueError, match=f"not {bad!r}"):
        wait.deadline(bad)


def test_a_timeout_runs_out_on_the_monotonic_clock(tmp_path):
    reader, writer = os.pipe()
    try:
        start = time.monotonic()
        with pytest.raises(TimeoutError) as caught:
            wait.until_ready(reader, wait.READ, wait.deadline(0.05), "pipe p")
        assert time.monotonic() - start >= 0.05
        assert caught.value.errno == errno.ETIMEDOUT
        assert "pipe p" in str(caught.value)
    finally:
        os.close(reader)
        os.close(writer)


def test_ready_hang_up_and_bad_descriptor():
    reader, writer = os.pipe()
    os.write(writer, b"x")
    assert wait.until_ready(reader, wait.READ, wait.NOW) & select.POLLIN
    os.read(reader, 1)
    os.close(writer)
    assert wait.until_ready(reader, wait.READ, wait.NOW) & select.POLLHUP
    os.close(reader)
    with pytest.raises(OSError, match="descriptor") as caught:
        wait.until_ready(reader, wait.READ, wait.NOW)
    assert caught.value.errno == errno.EBADF


def test_signals_run_their_handlers_and_do_not_extend_the_deadline(forked):
    """Each signal comes sooner than the deadline, and they never end."""

    def storm(ready, pid):
        ready()
        while True:
            os.kill(pid, signal.SIGUSR1)
            time.sleep(0.001)

    seen = []
    former = signal.signal(signal.SIGUSR1, lambda *_: seen.append(1))
    reader, writer = os.pipe()
    try:
        child = forked(storm, os.getpid())
        child.wait_ready()
        while len(seen) < 3:
            seen.clear()
            start = time.monotonic()
            with pytest.raises(TimeoutError):
                wait.until_ready(reader, wait.READ, wait.deadline(0.05))
            assert time.monotonic() - start >= 0.05
        child.kill()
        child.wait()
    finally:
        os.close(reader)
        os.close(writer)
        signal.signal(signal.SIGUSR1, former)


def test_several_tasks_wait_for_one_descriptor_and_one_times_out():
    reader, writer = os.pipe()

    async def main():
        waiting = [asyncio.create_task(wait.ready(reader, wait.READ, wait.FOREVER)) for _ in range(3)]
        with pytest.raises(TimeoutError):
            await wait.ready(reader, wait.READ, wait.deadline(0.01), "pipe")
        os.write(writer, b"x")
        await asyncio.gather(*waiting)
        cancelled = asyncio.create_task(wait.ready(writer, wait.WRITE, wait.FOREVER))
        cancelled.cancel()
        with pytest.raises(asyncio.CancelledError):
            await cancelled

    asyncio.run(main())
    os.close(reader)
    os.close(writer)
