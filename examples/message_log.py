# SPDX-License-Identifier: MIT
"""Four workers append to one log; two loggers are killed meanwhile; nothing is missing.

python examples/message_log.py [FILE]
"""

import os
import signal
import sys
import tempfile
from collections import Counter

import ipckit

WORKERS, MESSAGES = 4, 2000


def work(log: ipckit.MessageLog, number: int) -> None:
    for message in range(MESSAGES):
        log.append(b"message %d" % message, peer=f"worker {number}")


def main(path: str) -> None:
    with ipckit.MessageLog(path, format="record") as log, ipckit.Reaper() as reaper:
        for number in range(WORKERS):
            reaper.fork(work, log, number)
        for _ in range(2):
            os.kill(log.logger.pid, signal.SIGKILL)
            log.logger.wait()
            log.supervise()  # a server does this when log.fileno() is readable
        reaper.wait(30)
    count = Counter(record.peer for record in ipckit.records(path))
    for peer, messages in sorted(count.items()):
        print(f"{peer}: {messages} messages")


if __name__ == "__main__":
    main(sys.argv[1] if len(sys.argv) > 1 else os.path.join(tempfile.mkdtemp(), "log.jsonl"))
