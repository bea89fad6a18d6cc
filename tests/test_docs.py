"""Every Python block of the documentation runs, and prints the text block that follows it."""

import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import PATIENCE

DOCS = Path(__file__).resolve().parent.parent / "docs"
BLOCK = re.compile(r"^```python\n(.*?)^```\n(?:\n```text\n(.*?)^```\n)?", re.MULTILINE | re.DOTALL)


def blocks():
    for page in [DOCS.parent / "README.md", *sorted(DOCS.rglob("*.md"))]:
        text = page.read_text()
        for block in BLOCK.finditer(text):
            line = text.count("\n", 0, block.start()) + 2
            yield pytest.param(block[1], block[2], id=f"{page.relative_to(DOCS.parent)}:{line}")


@pytest.mark.parametrize("code, output", list(blocks()))
def test_a_block_runs(code, output, tmp_path):
    script = tmp_path / "block.py"
    script.write_text(code)
    process = subprocess.Popen(
        [sys.executable, "-W", "error", script],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=tmp_path,
        start_new_session=True,
    )
    try:
        printed, complaint = process.communicate(timeout=PATIENCE)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)  # what it forked, too
        process.communicate()
        raise
    assert (process.returncode, complaint) == (0, "")
    if output is not None:
        assert printed == output
