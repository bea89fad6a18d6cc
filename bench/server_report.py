# SPDX-License-Identifier: MIT
"""How bench_server.py shows what it measured: a table, the targets, a CSV file, a picture."""

import csv
import statistics
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from engine_report import COLOURS, machine
from server_turns import MODES, Server

FIELDS = ["server", "kind", "log", "mode", "round", "clients", "per_second", "x_c"]
PERCENTILES = ["p50", "p90", "p99", "p99.9", "max"]


class Target(NamedTuple):
    ours: str
    mode: str
    factor: float
    against: str
    beside: str = ""
    """shown as well"""


def ratios(server: Server, other: Server, mode: str) -> list[float]:
    """Of each round that both have."""
    theirs = other.rates(mode)
    return [rate / theirs[number] for number, rate in server.rates(mode).items() if theirs.get(number)]


def median(values: Sequence[float], width: int, digits: int) -> str:
    return f"{statistics.median(values):{width},.{digits}f}" if values else f"{'-':>{width}}"


def print_table(servers: Sequence[Server], yardstick: Server) -> None:
    """Medians of the rounds; the ratios are medians of those of the rounds."""
    print(f"{'server':<32} {'connections/s':>13} {'x C':>6} {'echoes/s':>9} {'x C':>6}  log")
    for server in servers:
        cells = []
        for mode, width in zip(MODES, (13, 9), strict=True):
            cells.append(median([*server.rates(mode).values()], width, 0))
            cells.append(median(ratios(server, yardstick, mode), 6, 2))
        log = server.trouble or ("complete" if server.logs else "none")
        print(f"{server.name:<32} {' '.join(cells)}  {log}", end="")
        print(" (echoes: 1 client at a time)" if server.clients == 1 and not server.trouble else "")


def print_targets(targets: Sequence[Target], named: "dict[str, Server]") -> None:
    for target in targets:
        print(f"{target.ours}, {target.mode}/s: target {target.factor:g} x {target.against}", end="")
        server = named.get(target.ours)
        each = ratios(server, named[target.against], target.mode) if server else []
        if not each:
            print(": NOT MEASURED")
            continue
        verdict = "REACHED" if statistics.median(each) >= target.factor else "NOT REACHED"
        rounds = " ".join(f"{ratio:.2f}" for ratio in each)
        print(f", median {statistics.median(each):.2f}: {verdict} ({rounds})", end="")
        if target.beside and (too := ratios(server, named[target.beside], target.mode)):
            print(f"; {statistics.median(too):.2f} x {target.beside}", end="")
        print()


def csv_rows(servers: Sequence[Server], yardstick: Server) -> Iterator[dict[str, object]]:
    for server in servers:
        for (mode, number), report in server.done.items():
            theirs = yardstick.rates(mode).get(number)
            latencies = {f"{name}_us": round(value) for name, value in report.latency_us.items()}
            yield {
                "server": server.name,
                "kind": server.kind,
                "log": server.logs,
                "mode": mode,
                "round": number,
                "clients": report.connections,
                "per_second": f"{report.rate:.1f}",
                "x_c": f"{report.rate / theirs:.3f}" if theirs else "",
                **latencies,
            }


def write_csv(servers: Sequence[Server], yardstick: Server, path: Path) -> None:
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, [*FIELDS, *(f"{name}_us" for name in PERCENTILES)])
        writer.writeheader()
        writer.writerows(csv_rows(servers, yardstick))


def draw(servers: Sequence[Server], path: Path) -> None:
    """A panel of bars for each mode, the server at the top of the table at the top."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    shown = [server for server in servers if server.done]
    figure = pyplot.figure(figsize=(13, 1.5 + 0.3 * len(shown)), layout="constrained")
    for panel, mode in zip(figure.subplots(1, 2, sharey=True), MODES, strict=True):
        medians = [statistics.median([*server.rates(mode).values()] or [0]) for server in shown]
        names = [server.name + ("" if server.logs else " (no log)") for server in shown]
        bars = panel.barh(names, medians, color=[COLOURS[server.kind] for server in shown])
        panel.bar_label(bars, [f" {value:,.0f}" for value in medians], fontsize=9)
        panel.set(ylim=(len(shown) - 0.4, -0.6), xlim=(0, max(medians, default=1) * 1.15 or 1))
        panel.set_title(f"{mode} per second", loc="left")
        panel.spines[["top", "right"]].set_visible(False)
    head = "echo servers: ipckit (blue), its peers (grey), C (black); more is better"
    figure.suptitle(f"{head}\n{machine()}; one CPU makes the load", fontsize=10)
    figure.savefig(path, dpi=100)
    pyplot.close(figure)
