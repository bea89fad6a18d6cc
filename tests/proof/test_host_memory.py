"""A program that opens a log is left alone: its memory may do what it likes, and every fork of it is whole.

By default a slice; the whole with IPCKIT_PROOF=1.
"""

import subprocess
import sys
from pathlib import Path

import pytest
from fire import WHOLE, slice_of

pytestmark = [pytest.mark.proof, *([pytest.mark.timeout(3000)] if WHOLE else [])]

CHILDREN = slice_of(10_000, 150)
MIB = slice_of(1024, 64)


def test_no_child_of_a_program_that_grows_and_shrinks_crashes(tmp_path):
    program = Path(__file__).with_name("growing_host.py")
    command = [sys.executable, "-W", "ignore", str(program), str(CHILDREN), str(MIB), str(tmp_path / "log")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    print("\n" + done.stdout.strip())
