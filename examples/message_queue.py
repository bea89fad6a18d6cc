# SPDX-License-Identifier: MIT
"""The message queue of the textbook: a thread waits for type 1, a sender fills until nothing fits.

The messages of type 2 stay in the queue, however long the receiver waits: nobody asks for them.
"""

import threading

from ipckit.sysv import MessageQueue

queue = MessageQueue()  # IPC_PRIVATE: a new one
received = []


def receive() -> None:
    received.append(queue.recv(type=1))


receiver = threading.Thread(target=receive)
receiver.start()

sent = 0
try:
    while True:  # timeout=0 is IPC_NOWAIT
        queue.send(bytes(1024), type=2, timeout=0)
        sent += 1
except TimeoutError:
    print(f"full after {sent} messages, {queue.stat().bytes} of {queue.stat().max_bytes} bytes")

print("the receiver still waits" if receiver.is_alive() else "the receiver has ended")
queue.recv(type=2)
queue.send(b"for you", type=1, timeout=5)
receiver.join()
print(f"received {received[0].decode()!r}, {queue.stat().messages} messages are left")

queue.remove()
queue.close()
