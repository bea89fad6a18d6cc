"""A program whose memory grows, shrinks and moves at random while it has a log open, and forks by every way there is.

    python growing_host.py CHILDREN MIB LOG

Each child looks at all of its memory and appends to the log. Prints how many children there were, and by what.
"""

import multiprocessing
import os
import subprocess
import sys
import threading
from collections import Counter

from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from ipckit import MessageLog, fork

WANTED, SIZE = (int(sys.argv[1]), int(sys.argv[2]) << 20) if __name__ == "__main__" else (0, 0)
BLOCKS = 16


def made(tag, size):
    return bytearray([tag]) * size


def is_whole():
    """Every block has its tag from the first byte to the last; a look at each page."""
    return all(block.count(tag, 0, 64) == min(64, len(block)) and set(block[::4096]) <= {tag} and block[-1] == tag
               for tag, block in blocks.items())  # fmt: skip


def look():
    if not is_whole():
        os._exit(1)
    log.append(b".")


def nothing():
    """What a fresh interpreter does."""


def by_os_fork():
    pid = os.fork()
    if pid == 0:
        look()
        os._exit(0)
    return [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])]


def by_threads():
    codes = []

    def work():
        with fork(look) as child:
            codes.append(child.wait().code)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return codes


def by_multiprocessing(method, target):
    process = multiprocessing.get_context(method).Process(target=target)
    process.start()
    process.join()
    return [process.exitcode]


def by_subprocess():
    with_preexec = subprocess.run(["true"], preexec_fn=lambda: None)
    return [subprocess.run(["true"]).returncode, with_preexec.returncode]


WAYS = {
    "os.fork": by_os_fork,
    "ipckit.fork from threads": by_threads,
    "multiprocessing, fork": lambda: by_multiprocessing("fork", look),
    "multiprocessing, spawn": lambda: by_multiprocessing("spawn", nothing),
    "multiprocessing, forkserver": lambda: by_multiprocessing("forkserver", nothing),
    "subprocess": by_subprocess,
}
# Two of them start an interpreter each time; a loop of the others gives the many.
OFTEN = ["os.fork", "ipckit.fork from threads", "multiprocessing, fork"]

change = st.tuples(
    st.integers(1, BLOCKS), st.sampled_from(["grow", "shrink", "new", "drop"]), st.floats(0.01, 1)
)


def apply(tag, what, share):
    block = blocks[tag]
    step = max(1, int(share * SIZE / BLOCKS))
    if what == "grow" and len(block) < 2 * SIZE // BLOCKS:
        block.extend(made(tag, step))  # realloc: mremap
    elif what == "shrink" and len(block) > step:
        del block[-step:]
    elif what == "new":
        blocks[tag] = made(tag, step)
    elif what == "drop":
        blocks[tag] = made(tag, 64)
    items.extend([None] * int(share * 100_000))
    if len(items) > 5_000_000:
        del items[1000:]


@settings(max_examples=20, deadline=None, database=None, phases=[Phase.generate],
          suppress_health_check=list(HealthCheck))  # fmt: skip
@given(st.lists(change, min_size=1, max_size=6), st.sampled_from(list(WAYS)), st.sampled_from(OFTEN))
def host(changes, seldom, often):
    if sum(children.values()) >= WANTED:
        return
    for one in changes:
        apply(*one)
    for way in [seldom] + [often] * 12:
        codes = WAYS[way]()
        children[way] += len(codes)
        assert set(codes) == {0}, (way, codes, changes)


if __name__ == "__main__":
    multiprocessing.set_forkserver_preload([])
    items = [None]
    blocks = {tag: made(tag, SIZE // BLOCKS) for tag in range(1, BLOCKS + 1)}
    children = Counter()
    with MessageLog(sys.argv[3]) as log:
        while sum(children.values()) < WANTED:
            host()
        appended = sum(children[way] for way in OFTEN)
    assert os.path.getsize(sys.argv[3]) == appended, "each of those appended a byte"
    print(f"{sum(children.values()):,} children of a host of {SIZE >> 20} MiB, 0 crashes: "
          + ", ".join(f"{way} {count:,}" for way, count in sorted(children.items())))  # fmt: skip
