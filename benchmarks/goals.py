"""The goals of the CPU operators: fields of the specs' bench_shapes. Here is how they are measured."""

from collections.abc import Callable
from dataclasses import dataclass

from benchmarks.rows import rows_of

# Entries of "seconds" that are no providers. In cache: every row is the first one. Plain: grad_output is 1, not 1/4.
# relu: its backward moves the same bytes as ours. engine and roofs: providers.py.
NO_PEERS = ("ours 1 thread", "ours in cache", "plain backward", "σ = 1", "relu", "engine")
NO_PEERS += ("our cross_entropy", "read", "copy", "add", "products")


def duration(seconds):
    """In three digits."""
    factor, unit = next((f, u) for f, u in ((1e6, "µs"), (1e3, "ms"), (1, "s")) if seconds * f < 1000 or u == "s")
    value = seconds * factor
    return f"{value:.{0 if value >= 100 else 1 if value >= 10 else 2}f} {unit}"


def roof_of(row):
    """Seconds to read or write once each tensor that must be."""
    return row["seconds"][row["roof"]]


def peers(row):
    return {n: s for n, s in row["seconds"].items() if n != "ours" and n not in NO_PEERS}


def extra_memory(row):
    """Peak memory beyond the gradients (the input's and the weight's), in units of the logits."""
    return (row["peak_bytes"]["ours"] - row["gradient_bytes"]) / row["bytes"]


def over(name):
    return lambda row: row["seconds"]["ours"] / row["seconds"][name]


def under(name):
    return lambda row: row["seconds"][name] / row["seconds"]["ours"]


@dataclass(frozen=True)
class Measure:
    value: Callable  # (row) -> number; a KeyError where the run did not measure it
    text: str
    at_least: bool = False


MEASURES = {
    "roof": Measure(lambda row: row["seconds"]["ours"] / roof_of(row), "{:.2f} × roof"),
    "eager": Measure(over("eager"), "{:.2f} × eager"),
    "our cross_entropy": Measure(over("our cross_entropy"), "{:.2f} × our cross_entropy"),
    "plain backward": Measure(over("plain backward"), "{:.2f} × plain backward"),
    "σ = 1": Measure(over("σ = 1"), "{:.1f} × the time at σ = 1"),
    "memory": Measure(extra_memory, "{:.3f} logits of memory"),
    "faster": Measure(lambda row: min(peers(row).values()) / row["seconds"]["ours"], "{:.1f} × faster", True),
    "one thread": Measure(under("ours 1 thread"), "{:.2f} × one thread", True),
}


def goals_of(specs):
    """{name of a row: [(measure, limit)]}."""
    return {
        name: [(measure, limit) for m, measure, limit in shape.goals if m == mode]
        for name, _, shape, mode in rows_of(specs)
    }


def beside(row):
    """Measurements of the same run that may explain a missed goal."""
    s, parts = row["seconds"], []
    if s.get("ours in cache", s["ours"]) < s["ours"]:
        parts.append(f"{s['ours in cache'] / roof_of(row):.2f} × {row['roof']} where every row is the first one")
    if "ours 1 thread" in s:
        parts.append(f"{duration(s['ours'])}, one thread {duration(s['ours 1 thread'])}")
    if row.get("page_faults", {}).get("ours", 0) >= 1:
        parts.append(f"{row['page_faults']['ours']:.0f} page faults a call")
    if s.get("engine", 0) > 0.05 * s["ours"]:
        parts.append(f"torch's shortest backward pass {duration(s['engine'])}")
    if "relu" in s:
        parts.append(f"relu's backward, of the same bytes, {s['relu'] / roof_of(row):.2f} × {row['roof']}")
    return parts


def table(run, specs):
    """Markdown: every goal, the value reached, and what may explain the missed ones."""
    goals = goals_of(specs)
    lines = ["| row | goal | reached | |", "|---|--:|--:|---|"]
    for row in run["rows"]:
        for name, limit in goals.get(row["name"], ()):
            measure = MEASURES[name]
            try:
                value = measure.value(row)
            except KeyError:
                continue
            reached = value >= limit if measure.at_least else value <= limit
            outcome = "✓" if reached else "; ".join(["✗", *beside(row)])
            sign = "≥" if measure.at_least else "≤"
            cells = [row["name"], f"{sign} {measure.text.format(limit)}", measure.text.format(value), outcome]
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"
