import subprocess
import sys
from pathlib import Path

from conftest import PATIENCE

BENCH = Path(__file__).parent.parent / "bench" / "bench_streams.py"


def test_the_bench_runs_and_judges_each_row():
    run = subprocess.run([sys.executable, BENCH, "--quick"], capture_output=True, text=True, timeout=PATIENCE)
    assert (run.returncode, run.stderr) == (0, "")
    header, *rows = run.stdout.splitlines()
    assert "fastest of 1 rounds" in header
    assert len(rows) == 10
    assert all("REACHED" in row for row in rows)
