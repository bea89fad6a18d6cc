# SPDX-License-Identifier: MIT
"""How bench_engine.py shows what it measured: a table, a CSV file, a picture."""

import csv
import math
import os
import platform
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

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
    print(f"\n{result.title:44}", *(f"{head:>10}" for head in [result.unit, *heads[1:], "ratio"]))
    for one in result.measured:
        values = numbers(result, one)
        cells = [shown(values[head]) if head in values else "" for head in heads]
        ratio = f"{shown(one.value / best.value)} x" if best and best.value else ""
        mark = {OURS: "*", PEER: " ", FLOOR: "-"}[one.kind]
        print(f"{mark} {one.name:42}", *(f"{cell:>10}" for cell in [*cells, ratio]), flush=True)


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
    """A panel of bars for each row, those on one CPU in a column of their own, on a logarithmic scale."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    rows, columns = dict.fromkeys(one.row for one in results), dict.fromkeys(one.cpus for one in results)
    longest = [max(len(one.measured) for one in results if one.row == row) for row in rows]
    heights = [1 + 0.27 * most for most in longest]
    figure = pyplot.figure(figsize=(9 * len(columns), sum(heights)), layout="constrained")
    panels = figure.subplots(len(rows), len(columns), height_ratios=heights, squeeze=False)
    for panel in panels.flat:
        panel.set_axis_off()
    for result in results:
        at = [*rows].index(result.row)
        draw_row(panels[at][[*columns].index(result.cpus)], result, longest[at])
    figure.suptitle(f"ipckit (blue), its peers (grey), C (black); less is better\n{machine()}", fontsize=10)
    figure.savefig(path, dpi=100)
    pyplot.close(figure)


def draw_row(panel: Any, result: Result, most: int) -> None:
    values = [numbers(result, one)["value"] for one in result.measured]
    positive = [value for value in values if value > 0] or [1.0]
    left, right = 10 ** math.floor(math.log10(min(positive) / 2)), max(positive) * 5
    bars = panel.barh(
        [one.name for one in result.measured],
        [max(value, left) for value in values],
        color=[COLOURS[one.kind] for one in result.measured],
    )
    panel.bar_label(bars, [f" {shown(value)}" for value in values], fontsize=9)
    panel.set(xscale="log", xlim=(left, right), ylim=(most - 0.4, -0.6))
    panel.set_title(f"{result.title}: {result.unit}", loc="left")
    panel.set_axis_on()
    panel.tick_params(which="minor", labelbottom=False)
    panel.spines[["top", "right"]].set_visible(False)
