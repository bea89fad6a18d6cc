"""The blocks of the Markdown pages, run as a reader would run them.

A ``python`` block is a script; the ``text`` block right below it is what it prints. In a ``console`` block each
line after ``$ `` is a command, and the lines up to the next one are what it prints, if any are shown.
"""

import os
import re
import signal
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import pytest
from conftest import PATIENCE

ROOT = Path(__file__).resolve().parent.parent
START_METHODS = ("fork", "spawn", "forkserver")
_PYTHON = re.compile(r"^```python\n(.*?)^```\n(?:\n```text\n(.*?)^```\n)?", re.MULTILINE | re.DOTALL)
_CONSOLE = re.compile(r"^```console\n(.*?)^```\n", re.MULTILINE | re.DOTALL)
_COMMAND = re.compile(r"^\$ (.*?)(?: +# .*)?\n((?:(?!\$ ).*\n)*)", re.MULTILINE)
# As a user's script does it: only in the main process, before anything else.
_SET_START_METHOD = """\
if __name__ == "__main__":
    __import__("multiprocessing").set_start_method("{}")
"""


class Command(NamedTuple):
    line: str
    shown: str


def scripts(page: Path) -> Iterator[object]:
    """Parameters of a test: code, output or None, start method or None for what starts no processes by it."""
    text = page.read_text()
    for block in _PYTHON.finditer(text):
        name = f"{page.relative_to(ROOT)}:{text.count(chr(10), 0, block.start()) + 2}"
        if re.search(r"\b(multiprocessing|concurrent\.futures)\b", block[1]):
            for method in START_METHODS:
                yield pytest.param(block[1], block[2], method, id=f"{name}-{method}")
        else:
            yield pytest.param(block[1], block[2], None, id=name)


def consoles(page: Path) -> list[list[Command]]:
    """The commands of each console block."""
    found = _CONSOLE.findall(page.read_text())
    return [[Command(*command) for command in _COMMAND.findall(block)] for block in found]


def run(
    command: Sequence[object] | str, folder: Path, environment: Mapping[str, str] | None = None
) -> tuple[int, str, str]:
    """Run a command, or a line by the shell, to its end: its status, what it printed, what it complained."""
    process = subprocess.Popen(
        command if isinstance(command, str) else [str(part) for part in command],
        shell=isinstance(command, str),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=folder,
        env=environment,
        start_new_session=True,
    )
    try:
        printed, complaint = process.communicate(timeout=PATIENCE)
    except BaseException:
        os.killpg(process.pid, signal.SIGKILL)  # what it forked, too
        process.communicate()
        raise
    return process.returncode, printed, complaint


def assert_prints(
    python: str,
    code: str,
    output: str | None,
    method: str | None,
    folder: Path,
    environment: Mapping[str, str] | None = None,
) -> None:
    """The block runs as a script of its own, without a warning, and prints that."""
    script = folder / "block.py"
    script.write_text((_SET_START_METHOD.format(method) if method else "") + code)
    status, printed, complaint = run([python, "-W", "error", script], folder, environment)
    assert (status, complaint) == (0, "")
    if output is not None:
        assert printed == output
