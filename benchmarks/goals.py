"""What the CPU operators are measured against: the goal of each row, what was reached, what the best peer does."""

from collections.abc import Callable
from dataclasses import dataclass

from benchmarks.reasons import REASONS
from benchmarks.report import NO_PEERS, duration, roof_of


@dataclass(frozen=True)
class Goal:
    operator: str
    mode: str
    shapes: tuple[str, ...]
    value: Callable  # (row, rows by name) -> number
    text: str  # "{:.2f} × the read roof"
    goal: float
    at_least: bool = False
    reason: str = ""  # of REASONS; shown where the goal is missed

    def reached(self, value):
        return value >= self.goal if self.at_least else value <= self.goal


def roof(row, rows):
    return row["seconds"]["ours"] / roof_of(row)


def eager(row, rows):
    return row["seconds"]["ours"] / row["seconds"]["eager"]


def peers(row):
    return {n: s for n, s in row["seconds"].items() if n != "ours" and n not in NO_PEERS}


def faster(row, rows):
    return min(peers(row).values()) / row["seconds"]["ours"]


def one_thread(row, rows):
    return row["seconds"]["ours 1 thread"] / row["seconds"]["ours"]


def extra(row, rows):
    """Peak memory beyond the gradients (the input's and the weight's), in units of the logits."""
    return (row["peak_bytes"]["ours"] - row["gradient_bytes"]) / row["bytes"]


def variant(name, replaced, by):
    """Against our own time in a variant of the row; in older runs, in another row."""

    def value(row, rows):
        other = row["seconds"].get(name) or rows[row["name"].replace(replaced, by)]["seconds"]["ours"]
        return row["seconds"]["ours"] / other

    return value


LARGE = ("1024x32000", "256x128256")
SPARSE = ("1024x512", "256x8192", "64x32000", "16x131072")
FP32 = tuple(f"{s} float32" for s in LARGE)
BF16 = tuple(f"{s} bfloat16" for s in LARGE)
GOALS = (
    Goal("cross_entropy", "forward", FP32, roof, "{:.2f} × read", 1.25),
    Goal("cross_entropy", "forward", BF16, roof, "{:.2f} × read", 1.8, reason="half"),
    Goal("cross_entropy", "forward+backward", FP32, roof, "{:.2f} × copy", 2.5, reason="pages"),
    Goal("cross_entropy", "forward+backward", BF16, roof, "{:.2f} × copy", 3.5, reason="pages"),
    Goal(
        "cross_entropy",
        "in place",
        FP32,
        roof,
        "{:.2f} × copy",
        1.4,
        reason="in place",
    ),
    Goal("cross_entropy", "in place", BF16, roof, "{:.2f} × copy", 2.5),
    Goal(
        "cross_entropy",
        "accumulation",
        FP32 + BF16,
        variant("plain backward", "accumulation", "forward+backward"),
        "{:.2f} × plain backward",
        1.05,
        reason="accumulation",
    ),
    Goal("cross_entropy", "forward", ("8x10 float32", "4096x10 float32"), eager, "{:.2f} × eager", 0.7),
    Goal(
        "cross_entropy",
        "forward+backward",
        ("8x10 float32", "4096x10 float32"),
        eager,
        "{:.2f} × eager",
        0.8,
        reason="engine",
    ),
    Goal(
        "cross_entropy",
        "forward+backward",
        ("256x1000 float32", "4096x1000 float32", "8x21x256x256 float32"),
        faster,
        "{:.1f} × faster",
        3,
        at_least=True,
        reason="medium",
    ),
    Goal(
        "cross_entropy",
        "forward",
        ("1x128256 float32",),
        one_thread,
        "{:.2f} × one thread",
        1.6,
        at_least=True,
        reason="one row",
    ),
    Goal(
        "linear_cross_entropy",
        "forward+backward",
        ("4096x1024 float32 32000 classes",),
        faster,
        "{:.2f} × faster",
        1,
        at_least=True,
    ),
    Goal(
        "linear_cross_entropy", "forward+backward", ("4096x1024 float32 32000 classes",), extra, "{:.3f} logits", 0.125
    ),
    Goal("selective_log_softmax", "forward", ("512x151936 bfloat16",), eager, "{:.2f} × eager", 0.25),
    Goal(
        "sparsemax",
        "forward",
        tuple(f"{s} float32" for s in SPARSE),
        roof,
        "{:.2f} × copy",
        2,
        reason="shared cache",
    ),
    Goal(
        "sparsemax",
        "forward",
        ("4096x64 float32",),
        roof,
        "{:.2f} × copy",
        4,
        reason="short rows",
    ),
    Goal(
        "sparsemax",
        "forward",
        tuple(f"{s} float32 x0.01" for s in ("4096x64", *SPARSE)),
        variant("σ = 1", " x0.01", ""),
        "{:.1f} × the time at σ = 1",
        2,
        reason="steps",
    ),
    Goal(
        "sparsemax",
        "backward",
        tuple(f"{s} float32" for s in ("4096x64", *SPARSE)),
        roof,
        "{:.2f} × add",
        1.5,
        reason="short backward",
    ),
)


def reason(row, rows, goal, environment):
    """Why a goal was missed: what was measured beside it in the same run, then what reasons.py knows."""
    s, parts, threads = row["seconds"], [], environment["threads"]
    if goal.value is roof and s.get("ours in cache", s["ours"]) < s["ours"]:
        parts.append(f"{s['ours in cache'] / roof_of(row):.2f} × {row['roof']} where every row is the first one")
    if "ours 1 thread" in s:
        parts.append(f"{duration(s['ours'])}, one thread {duration(s['ours 1 thread'])}")
    if goal.value is one_thread and (small := rows.get("cross_entropy 8x10 float32 forward")):
        call = small["seconds"]["ours"]
        least = call + (s["ours 1 thread"] - call) / threads
        parts.append(f"the call itself {duration(call)} (8×10): with the rest divided {duration(least)}")
    if row.get("page_faults", {}).get("ours", 0) >= 1:
        parts.append(f"{row['page_faults']['ours']:.0f} page faults a call")
    if s.get("engine", 0) > 0.05 * s["ours"]:
        parts.append(f"the least of torch's own with a backward pass {duration(s['engine'])}")
    if "relu" in s:
        parts.append(f"relu's backward, of the same bytes, {s['relu'] / roof_of(row):.2f} × {row['roof']}")
    known, kind = REASONS.get(goal.reason, {}), kind_of_cpu(environment)
    text = known.get(f"{kind} {'x'.join(map(str, row['shape']))}") or known.get(kind)
    return "; ".join(parts + ([text] if text else []))


def kind_of_cpu(environment):
    return " ".join([v for v in ("AMD", "Intel") if v in environment["cpu"]] + [environment["isa"]])


def table(run):
    """Markdown: every goal with the measured value of the best peer and of ours."""
    rows = {r["name"]: r for r in run["rows"]}
    lines = ["| operator | shape | mode | best peer | goal | reached | |", "|---|---|---|--:|--:|--:|---|"]
    isa = run["environment"]["isa"]
    if isa != "avx512":
        lines.insert(0, f"The goals are those of a machine with AVX-512; this one has {isa}.\n")
    for goal in GOALS:
        for shape in goal.shapes:
            row = rows.get(f"{goal.operator} {shape} {goal.mode}")
            if row is None:
                continue
            value = goal.value(row, rows)
            best = peers(row)
            name = min(best, key=best.get, default=None)
            peer = f"{name} {best[name] / roof_of(row):.1f} × {row['roof']}" if name else "–"
            if goal.value is eager or goal.value is faster:
                peer = f"{name} {duration(best[name])}"
            sign = "≥" if goal.at_least else "≤"
            ok = "✓" if goal.reached(value) else f"✗ {reason(row, rows, goal, run['environment'])}"
            limit = goal.text.format(goal.goal)
            cells = [goal.operator, shape, goal.mode, peer, f"{sign} {limit}", goal.text.format(value), ok]
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"
