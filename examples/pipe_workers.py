# SPDX-License-Identifier: MIT
"""Four workers report to one parent over one pipe; one of them is killed in the middle."""

import os
import signal

import ipckit.pipes


def work(writer: ipckit.pipes.Writer, number: int) -> None:
    for job in range(3):
        writer.send(f"worker {number} did job {job}".encode())
    if number == 3:
        os.kill(os.getpid(), signal.SIGKILL)  # what it has sent arrives, whole


def main() -> None:
    reader, writer = ipckit.pipes.pipe()
    for number in range(4):
        if os.fork() == 0:
            work(writer.keep(), number)
            os._exit(0)
    reader.keep()  # or this process's own writing end would keep the stream open
    reports = sorted(message.decode() for message in reader)
    print("\n".join(reports))
    print(f"{reader.stats().messages} reports, {reader.stats().torn} torn")
    for _ in range(4):
        os.wait()


if __name__ == "__main__":
    main()
