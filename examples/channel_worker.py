# SPDX-License-Identifier: MIT
"""A worker behind a channel; it is killed in the middle of its work, and the next one takes over."""

import os
import signal

from ipckit import PeerDied, fork
from ipckit.channel import channel


def square(numbers: range, clumsy: bool) -> list[int]:
    here, there = channel()

    def worker() -> None:
        with there.claim() as end:
            for message in end:
                if clumsy and message == b"3":
                    os.kill(os.getpid(), signal.SIGKILL)
                end.send(b"%d" % int(message) ** 2)

    with fork(worker), here.claim() as end:
        end.send_many([b"%d" % number for number in numbers])
        end.close_write()
        done = []
        try:
            done.extend(int(message) for message in end)
        except PeerDied as died:
            print(died)
        return done


first = square(range(6), clumsy=True)
rest = square(range(len(first), 6), clumsy=False)
print(f"the first worker did {first}, the second {rest}")
