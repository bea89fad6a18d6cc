# SPDX-License-Identifier: MIT
"""Urgent data over TCP: one byte at a time, a mark in the stream, and what became of the older one."""

import os
import select
import socket

from ipckit import sockets


def sender(address):
    with socket.create_connection(address) as sock:
        for item in ("A", "B", "1 urgent", "C", "D", "2 urgent", "E", "F"):
            send = sockets.send_urgent if item.endswith("urgent") else sockets.send_all
            send(sock, item[:1].encode())


def receiver(sock):
    everything = select.poll()  # the end of the stream, so that no read comes in the middle of the sending
    everything.register(sock, select.POLLRDHUP)
    everything.poll(10_000)
    with sockets.UrgentWatcher(sock) as watcher:
        watcher.wait(timeout=10)
    print("urgent:", sockets.recv_urgent(sock).decode())
    while data := sockets.recv(sock, 100):
        print("read:", data.decode() + (", then the mark" if sockets.at_mark(sock) else ""))


with socket.create_server(("127.0.0.1", 0)) as server:
    child = os.fork()
    if child == 0:
        try:
            sender(server.getsockname())
        finally:
            os._exit(0)
    connection, _ = server.accept()
    with connection:
        receiver(connection)
    os.waitpid(child, 0)
