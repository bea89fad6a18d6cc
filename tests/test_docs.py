"""Every Python block of the documentation runs, and prints the text block that follows it.

A block that starts processes by multiprocessing runs under each of its start methods.
"""

import sys

import pytest
from pages import ROOT, assert_prints, scripts

BLOCKS = [block for page in sorted((ROOT / "docs").rglob("*.md")) for block in scripts(page)]


@pytest.mark.parametrize("code, output, method", BLOCKS)
def test_a_block_runs(code, output, method, tmp_path):
    assert_prints(sys.executable, code, output, method, tmp_path)
