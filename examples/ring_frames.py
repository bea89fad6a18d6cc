# SPDX-License-Identifier: MIT
"""Frames through shared memory, written and read in place; then the writer is killed."""

import os
import signal

from ipckit import Ring, fork

FRAME = 640 * 480

with Ring(4 * FRAME, many_senders=True) as ring:

    def camera(frames: int) -> None:
        for number in range(frames):
            frame = ring.reserve(FRAME)  # waits while the reader is behind
            frame[0] = number
            frame[-1] = number
            ring.commit()
        ring.reserve(FRAME)[0] = 255  # and is killed before the commit
        os.kill(os.getpid(), signal.SIGKILL)

    with fork(camera, 30) as child:
        for expected in range(30):
            frame = ring.peek(timeout=60)
            assert frame[0] == frame[-1] == expected
            ring.release()
    ring.send(b"still in order", timeout=60)
    print(f"30 frames of {FRAME} bytes, then {bytes(ring.recv())!r}; camera {child.status}")
