# SPDX-License-Identifier: MIT
"""How bench_engine.py shows what it measured: a table, a CSV file, a picture."""

import csv
import os
import platform
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

OURS, PEER, FLOOR = "ours", "peer", "C"
COLOURS = {OURS: "#1f77b4", PEER: "#bbbbbb", FLOOR: "#444444"}
FIELDS = ["cpus", "row", "contender", "kind", "unit", "value", "p50", "p99", "p99.9", "worst", "per_second"]


class Measured(NamedTuple):
    """One contender in one row. Nanoseconds, but percent of a processor in the row of the idle."""

    name: str
    kind: str
    value: float
    samples: Sequence[int] = ()  # sorted

    def at(self, share: float) -> float:
        """The percentile, in nanoseconds."""
        return self.samples[min(len(self.samples) - 1, int(share * len(self.samples)))]


class Result(NamedTuple):
    """One row, done."""

    cpus: int
    row: str
    unit: str
    measured: list[Measured]

    @property
    def title(self) -> str:
        return f"{self.row}, one CPU" if self.cpus == 1 else self.row

    def named(self, name: str) -> Measured | None:
        return next((one for one in self.measured if one.name == name), None)

    def best(self, kind: str) -> Measured | None:
        return min(
            (one for one in self.measured if one.kind == kind), key=lambda one: one.value, default=None
        )


def machine() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    cpu = next((line for line in lines if line.startswith("model name")), platform.machine())
    return (
        f"{cpu.rpartition(':')[2].strip()}, {os.cpu_count()} CPUs, Linux {platform.release()}, "
        f"Python {platform.python_version()}"
    )


def shown(value: float) -> str:
    """Three digits, or all before the point."""
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"


def numbers(result: Result, one: Measured) -> dict[str, float]:
    if result.unit != "us":
        return {"value": one.value}
    values = {"value": one.value / 1e3, "per_second": 1e9 / one.value}
    if one.samples:
        shares = {"p50": 0.5, "p99": 0.99, "p99.9": 0.999, "worst": 1.0}
        values |= {name: one.at(share) / 1e3 for name, share in shares.items()}
    return values


def print_table(result: Result) -> None:
    """The last column is how many times the value of the best of ours it is."""
    best = result.best(OURS)
    heads = ["value", "p50", "p99", "p99.9", "worst", "per_second"]
    print(f"\n{result.title:34}", *(f"{head:>10}" for head in [result.unit, *heads[1:], "ratio"]))
    for one in result.measured:
        values = numbers(result, one)
        cells = [shown(values[head]) if head in values else "" for head in heads]
        ratio = f"{shown(one.value / best.value)} x" if best and best.value else ""
        mark = {OURS: "*", PEER: " ", FLOOR: "-"}[one.kind]
        print(f"{mark} {one.name:32}", *(f"{cell:>10}" for cell in [*cells, ratio]), flush=True)


def csv_rows(results: Sequence[Result]) -> Iterator[dict[str, object]]:
    for result in results:
        for one in result.measured:
            named = {"cpus": result.cpus, "row": result.row, "contender": one.name, "kind": one.kind}
            values = {name: f"{value:.6g}" for name, value in numbers(result, one).items()}
            yield {**named, "unit": result.unit, **values}


def write_csv(results: Sequence[Result], path: Path) -> None:
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, FIELDS)
        writer.writeheader()
        writer.writerows(csv_rows(results))


def draw(results: Sequence[Result], path: Path) -> None:
    """A panel of bars for each row, on a logarithmic scale."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    heights = [1.2 + 0.28 * len(result.measured) for result in results]
    figure = pyplot.figure(figsize=(10, sum(heights)), layout="constrained")
    panels = figure.subplots(len(results), 1, height_ratios=heights, squeeze=False)
    for panel, result in zip(panels[:, 0], results, strict=True):
        measured = result.measured[::-1]
        values = [numbers(result, one)["value"] for one in measured]
        bars = panel.barh(
            [one.name for one in measured],
            [max(value, 1e-4) for value in values],
            color=[COLOURS[one.kind] for one in measured],
        )
        panel.bar_label(bars, [f" {shown(value)}" for value in values], fontsize=9)
        panel.set_xscale("log")
        panel.margins(x=0.15)
        panel.set_title(f"{result.title}: {result.unit}", loc="left")
        panel.spines[["top", "right"]].set_visible(False)
    figure.suptitle(f"ipckit (blue), its peers (grey), C (black); less is better\n{machine()}", fontsize=10)
    figure.savefig(path, dpi=110)
    pyplot.close(figure)
