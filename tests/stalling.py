"""A file system with one file that stops answering, or answers with an error, when it is told to; see fuse(4).

Spoken on /dev/fuse by a process of its own, which takes one request after the other, as a dead disk does.
"""

import contextlib
import errno
import os
import shutil
import struct
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import PATIENCE

# Operations, from linux/fuse.h.
LOOKUP, FORGET, GETATTR, SETATTR, OPEN, READ, WRITE, RELEASE, FSYNC, FLUSH = (
    1,
    2,
    3,
    4,
    14,
    15,
    16,
    18,
    20,
    25,
)
INIT, OPENDIR, RELEASEDIR, FSYNCDIR, CREATE, INTERRUPT, BATCH_FORGET = 26, 27, 29, 30, 35, 36, 42
FOLDER, FILE = 1, 2


class StallingFileSystem:
    """Mounted at *folder*; *control* is the file by which it is told."""

    def __init__(self, folder, control):
        self._folder, self._control = folder, control
        folder.mkdir()
        self.tell("")
        device = os.open("/dev/fuse", os.O_RDWR)
        options = f"fd={device},rootmode=40000,user_id=0,group_id=0,allow_other"
        mount = ["mount", "-i", "-t", "fuse", "-o", options, "stalling", str(folder)]
        mounted = subprocess.run(mount, pass_fds=[device], capture_output=True, text=True, timeout=PATIENCE)
        command = [sys.executable, __file__, str(device), str(control)]
        self._server = None if mounted.returncode else subprocess.Popen(command, pass_fds=[device])
        os.close(device)
        if self._server is None:
            pytest.skip(f"no file system to be mounted: {mounted.stderr}")

    def tell(self, what):
        """ "stall": do not answer; "WRITE 5", "FSYNC 5": answer that operation with that errno; "": serve."""
        new = self._control.with_suffix(".new")
        new.write_text(what)
        new.rename(self._control)

    def close(self):
        self.tell("")
        subprocess.run(["umount", "-l", str(self._folder)], check=True, timeout=PATIENCE)
        self._server.kill()
        self._server.wait()


@pytest.fixture
def stalling(nothing_left_behind, tmp_path):
    """A StallingFileSystem at ``tmp_path / "disk"``."""
    if os.geteuid() or not os.path.exists("/dev/fuse") or not shutil.which("mount"):
        pytest.skip("no /dev/fuse, or not root")
    disk = StallingFileSystem(tmp_path / "disk", tmp_path / "control")
    yield disk
    disk.close()


# --- the process that is the file system ---------------------------------------------------------


class _Disk:
    def __init__(self, device, control):
        self.device, self.control = device, control
        self.exists, self.data = False, bytearray()

    def attributes(self, node):
        now, size = int(time.time()), 4096 if node == FOLDER else len(self.data)
        mode, links = (0o40755, 2) if node == FOLDER else (0o100600, 1)
        return struct.pack("<6Q10I", node, size, 8, now, now, now, 0, 0, 0, mode, links, 0, 0, 0, 4096, 0)

    def entry(self):
        return struct.pack("<4QII", FILE, 0, 0, 0, 0, 0) + self.attributes(FILE)

    def failure(self, operation):
        """Wait while it is told to stall; the errno that it is told to give."""
        while (told := Path(self.control).read_text().split()) == ["stall"]:
            time.sleep(0.01)
        return int(told[1]) if told and {"WRITE": WRITE, "FSYNC": FSYNC}[told[0]] == operation else 0

    def answer(self, operation, node, body):
        """Data, or an errno; None: no answer is expected."""
        if operation in (FORGET, BATCH_FORGET, INTERRUPT):
            return None
        if operation == INIT:
            return struct.pack("<4IHHIIHHI7I", 7, 31, 65536, 0x20, 16, 12, 131072, 1, 32, 0, 0, *[0] * 7)
        if failure := self.failure(operation):
            return failure
        if operation == LOOKUP:
            return self.entry() if self.exists else errno.ENOENT
        if operation in (GETATTR, SETATTR):
            if operation == SETATTR and struct.unpack_from("<I", body)[0] & 8:
                del self.data[struct.unpack_from("<Q", body, 16)[0] :]
            return struct.pack("<QII", 0, 0, 0) + self.attributes(node)
        if operation == CREATE:
            self.exists = True
            return self.entry() + struct.pack("<QII", 1, 0, 0)
        if operation in (OPEN, OPENDIR):
            return struct.pack("<QII", 1, 0, 0)
        if operation == READ:
            _, offset, size = struct.unpack_from("<QQI", body)
            return bytes(self.data[offset : offset + size])
        if operation == WRITE:
            _, offset, size = struct.unpack_from("<QQI", body)
            self.data[offset : offset + size] = body[40 : 40 + size]
            return struct.pack("<II", size, 0)
        return b"" if operation in (RELEASE, FSYNC, FLUSH, RELEASEDIR, FSYNCDIR) else errno.ENOSYS

    def serve(self):
        while True:
            try:
                request = os.read(self.device, 1 << 20)
            except OSError as error:
                if error.errno in (errno.ENOENT, errno.EINTR):
                    continue
                return  # unmounted
            _, operation, unique, node = struct.unpack_from("<IIQQ", request)
            answer = self.answer(operation, node, request[40:])
            if answer is None:
                continue
            failure, data = (-answer, b"") if isinstance(answer, int) else (0, answer)
            with contextlib.suppress(OSError):  # who asked was killed meanwhile
                os.write(self.device, struct.pack("<IiQ", 16 + len(data), failure, unique) + data)


if __name__ == "__main__":
    _Disk(int(sys.argv[1]), sys.argv[2]).serve()
