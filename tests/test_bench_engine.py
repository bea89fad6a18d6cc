"""A tiny run of each row of bench_engine.py, and what its parts do when a contender fails."""

import csv
import importlib
import os
import signal
import subprocess
import sys
import tempfile
import time
from array import array
from pathlib import Path

import pytest
from conftest import PATIENCE, children, eventually

ROOT = Path(__file__).parent.parent
BENCH = ROOT / "bench" / "bench_engine.py"
TRIPS = ["round trip 64 B, busy", "round trip 64 B, asleep"]
SIZES = ["64 B", "1 KiB", "64 KiB", "1 MiB"]


@pytest.fixture
def bench(monkeypatch):
    """bench.race is bench/race.py, and so on."""
    monkeypatch.syspath_prepend(str(ROOT / "bench"))

    class Modules:
        def __getattr__(self, name):
            return importlib.import_module(name)

    return Modules()


@pytest.fixture
def folder():
    """Of a short name, because sockets are made in it, and empty at the end."""
    with tempfile.TemporaryDirectory() as name:
        yield Path(name)
        assert not list(Path(name).iterdir())


def run(folder, *arguments):
    command = [sys.executable, BENCH, *map(str, arguments)]
    environment = {**os.environ, "TMPDIR": str(folder)}
    return subprocess.run(command, capture_output=True, text=True, timeout=2 * PATIENCE, env=environment)


@pytest.mark.slow
@pytest.mark.serial
def test_each_row_has_its_contenders_and_nothing_is_left(tmp_path, folder):
    figures = tmp_path / "figures.csv"
    done = run(folder, "--quick", "--unpinned", "--csv", figures)
    assert (done.returncode, done.stderr) == (0, "")
    assert not [line for line in done.stdout.splitlines() if line.startswith("skipped: ") and ", " in line]
    with figures.open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert {row["cpus"] for row in rows} == {str(os.cpu_count())}
    for name in [*TRIPS, *(f"one way {size}" for size in SIZES), "64 B from 8 producers"]:
        who = {row["contender"] for row in rows if row["row"] == name}
        assert {"mp.SimpleQueue", "mp.Queue"} <= who, name
    trips = [row for row in rows if row["row"] in TRIPS]
    assert all(float(row["p50"]) <= float(row["p99"]) <= float(row["p99.9"]) for row in trips)
    assert {row["kind"] for row in trips} == {"C", "ours", "peer"}
    assert all(float(row["value"]) > 0 for row in rows if row["unit"] == "us")
    assert "target: round trip 64 B, busy: Ring: 1.6 x the C loop: " in done.stdout


def test_a_picture(tmp_path, folder):
    pytest.importorskip("matplotlib", reason="the extra bench is not installed")
    picture = tmp_path / "picture.png"
    done = run(folder, "--quick", "--row", "asleep", "--picture", picture)
    assert done.returncode == 0, done.stderr
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_one_row_on_one_cpu(folder):
    done = run(folder, "--quick", "--pinned", "--row", "one way 1 KiB")
    assert (done.returncode, done.stderr) == (0, "")
    tables = [line for line in done.stdout.splitlines() if line.endswith("ratio")]
    assert len(tables) == 1 and tables[0].startswith("one way 1 KiB, one CPU")
    assert "polling" not in done.stdout


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_run_shows_what_it_has(signum):
    command = [sys.executable, BENCH, "--rounds", "1", "--seconds", "60", "--row", "one way 64 B"]
    bench = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        running = Path(f"/proc/{bench.pid}/task/{bench.pid}/children")
        eventually(running.read_text)  # somebody measures
        bench.send_signal(signum)
        _, err = bench.communicate(timeout=PATIENCE)
    finally:
        bench.kill()
        bench.wait()
    assert (bench.returncode, err) == (0, "\ninterrupted; this is what was measured\n")
    assert not children()


# --- the parts


def fails(ready):
    raise OSError("no luck")


def dies(ready):
    ready()
    os.kill(os.getpid(), signal.SIGKILL)


def hangs(ready):
    ready()
    time.sleep(PATIENCE)


def succeeds(ready):
    ready()
    return 7


@pytest.mark.parametrize(
    "works, why",
    [
        ([fails], "OSError: no luck"),
        ([hangs, fails], "OSError: no luck"),
        ([hangs, dies], "a process ended"),
        ([hangs, succeeds], "hung"),
    ],
)
def test_a_race_that_fails_says_why_and_leaves_nobody(bench, works, why):
    with pytest.raises(bench.race.Failed) as failed:
        bench.race.race(*works, patience=PATIENCE if why != "hung" else 0.2)
    assert str(failed.value) == why
    assert not children()


def test_the_first_decides_a_race(bench):
    assert bench.race.race(succeeds, hangs) == 7


def test_a_contender_that_fails_is_named_and_out(bench, capsys):
    engine, failed = bench.bench_engine, bench.race.Failed

    def breaks(count):
        raise failed("no luck")

    def works(count):
        return bench.race.Turn(5.0, 1.0, array("q", [3, 1, 2]))

    contenders = [engine.Contender("good", "peer", works), engine.Contender("bad", "peer", breaks)]
    (only,) = engine.compete(engine.Row("a row", contenders), 2, 0)
    assert (only.name, only.value, only.samples) == ("good", 5.0, [1, 1, 2, 2, 3, 3])
    assert capsys.readouterr().out == "skipped: bad, a row: no luck\n"


def test_what_is_not_reached_says_by_how_much(bench, capsys):
    report, targets = bench.engine_report, bench.engine_targets
    measured = [
        report.Measured("C on the ring", report.FLOOR, 100),
        report.Measured("Ring", report.OURS, 200),
        report.Measured("mp.Pipe", report.PEER, 6000),
    ]
    targets.print_targets([report.Result(cpus, targets.BUSY, "us", measured) for cpus in (2, 1)])
    assert capsys.readouterr().out.splitlines() == [
        "",
        "target: round trip 64 B, busy: Ring: 1.6 x the C loop: not reached: 0.80 of the target",
        "target: round trip 64 B, busy: Ring: 20 x the best peer: reached",
        "target: round trip 64 B, busy, one CPU: Ring: 0.8 x the best peer: reached",
    ]


def test_flat_is_against_the_smallest_of_the_same_cpus(bench):
    report, flat = bench.engine_report, bench.engine_targets.flat

    def in_place(size, ns):
        return report.Result(2, f"in place {size}", "us", [report.Measured("Ring", report.OURS, ns)])

    done = [in_place("64 B", 1000), in_place("64 MiB", 3000)]
    assert flat(done, done[1], done[1].measured[0]) == 0.5
    assert flat(done[1:], done[1], done[1].measured[0]) is None


@pytest.mark.parametrize(
    "arguments, complaint",
    [
        ([], "usage: engine trip|way SIZE COUNT CAPACITY"),
        (["way", "64", "10"], "usage: engine"),
        (["way", "64", "10", "1x"], "not a number up to 2**30: '1x'"),
        (["memcpy", "-1", "10"], "not a number up to 2**30: '-1'"),
    ],
)
def test_the_c_program_refuses(arguments, complaint):
    done = subprocess.run([ROOT / "build" / "bench" / "engine", *arguments], capture_output=True, text=True)
    assert done.returncode == 2
    assert complaint in done.stderr
