"""Tables from the JSON of a run, README's table and docs/benchmarks.md from those of all runs."""

import json
from pathlib import Path

from benchmarks import goals
from benchmarks.goals import NO_PEERS, duration, peers, roof_of
from benchmarks.rows import rows_of

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results"


def dtype_name(row):
    return {"float32": "fp32", "bfloat16": "bf16", "float16": "fp16", "float64": "fp64"}[row["dtype"]]


def shape_name(row):
    text = "×".join(map(str, row["shape"])) + " " + dtype_name(row)
    text += "" if row["scale"] == 1 else f", σ = {row['scale']}"
    return text + (f", {row['label']}" if row.get("label") else "")


def ratio(row, name):
    return f"{row['seconds'][name] / row['seconds']['ours']:.1f}" if name in row["seconds"] else "–"


def roof_text(row):
    return f"{row['seconds']['ours'] / roof_of(row):.2f}" if row["bytes"] > 1 << 20 else "–"


def peak_text(row):
    memory = row["peak_bytes"]
    if "eager" not in memory:
        return "–"
    return f"{memory['ours'] / row['bytes']:.2f} : {memory['eager'] / row['bytes']:.2f}"


def machine(environment):
    e = environment
    if "device" in e:
        note = f"; {e['note']}" if "note" in e else ""  # added by hand: what has changed since
        return f"{e['device']}, torch {e['torch']}, CUDA {e['cuda']}, {e['date']}{note}"
    return (
        f"{e['cpu']}, {e['threads']} threads, {e['isa']}, torch {e['torch']}, {e['allocator']} allocator, {e['date']}"
    )


def write(run, stem):
    """The run as JSON, its plot as PNG."""
    from benchmarks import plots

    stem.parent.mkdir(exist_ok=True)
    stem.with_suffix(".json").write_text(json.dumps(run, indent=1) + "\n")
    draw = plots.plot_roofline if "device" in run["environment"] else plots.plot
    draw(run, stem.with_suffix(".png"))


def markdown(run):
    names = [n for row in run["rows"] for n in row["seconds"] if n not in ("ours", *NO_PEERS)]
    others = list(dict.fromkeys(names))
    how = "Medians of interleaved runs"
    if "device" in run["environment"]:
        how = "Medians of 3 to 15 calls, of one provider after the other, of compile after all rows"
    lines = [
        f"{machine(run['environment'])}. {how}; peak memory, ours : eager, in units of the logits.",
        "",
        f"| operator | shape | mode | ours | × roof | {' | '.join(n + ' / ours' for n in others)} | peak |",
        "|---|---|---|--:|--:|" + "--:|" * len(others) + "--:|",
    ]  # fmt: skip
    for row in run["rows"]:
        ratios = [ratio(row, n) for n in others]
        time = duration(row["seconds"]["ours"])
        cells = [row["operator"], shape_name(row), row["mode"], time, roof_text(row), *ratios, peak_text(row)]
        lines.append(f"| {' | '.join(cells)} |")
    failed = [f"- {row['name']}: {n}: {e}" for row in run["rows"] for n, e in row.get("errors", {}).items()]
    return "\n".join(lines + (["", "Could not be measured:", *failed] if failed else [])) + "\n"


# ---- README.md and docs/benchmarks.md --------------------------------------------------------------------------------


def runs():
    """All runs in results/, the newest first, by the name of their files. What tools/gpu_sweep.cu writes is none."""
    files = [path for path in sorted(RESULTS.glob("*.json")) if not path.name.startswith("sweep-")]
    found = {path.stem: json.loads(path.read_text()) for path in files}
    return dict(sorted(found.items(), key=lambda item: item[1]["environment"]["date"], reverse=True))


def front_table(specs, cuda):
    """What the README shows of a device: each row from the newest run that has it."""
    measured = [r for r in runs().values() if ("device" in r["environment"]) == cuda]
    measured = [r for r in measured if r["environment"].get("allocator") != "warm"]
    found = {row["name"]: (row, run["environment"]) for run in reversed(measured) for row in run["rows"]}
    shown = [name for name, _, shape, mode in rows_of(specs, cuda=cuda) if mode in shape.front and name in found]
    machines = list(dict.fromkeys(machine(found[name][1]) for name in shown))
    marks = dict(zip(machines, ("", "¹", "²", "³"), strict=False))
    lines = [" ".join(f"{mark} {name}.".strip() for name, mark in marks.items()), ""]
    lines.append("| | ours | × roof | eager / ours | compile / ours | best peer / ours | memory |")
    lines.append("|---|--:|--:|--:|--:|--:|--:|")
    for row, environment in map(found.get, shown):
        s, others = row["seconds"], {n: t for n, t in peers(row).items() if n not in ("eager", "compile")}
        best = min(others, key=others.get, default=None)
        name = f"{row['operator']} {shape_name(row)} {row['mode']}{marks[machine(environment)]}"
        cells = [name, duration(s["ours"]), roof_text(row), *(ratio(row, n) for n in ("eager", "compile"))]
        cells += [f"{ratio(row, best)} ({best})" if best else "–", peak_text(row)]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def between(text, mark, new):
    """The text with what stands between <!-- mark --> and <!-- end of mark --> replaced."""
    head, _, rest = text.partition(f"<!-- {mark} -->\n")
    _, end, tail = rest.partition(f"<!-- end of {mark} -->")
    return f"{head}<!-- {mark} -->\n{new}{end}{tail}"


def documents(specs):
    """{path: text} of what is generated from the results."""
    readme, page = ROOT / "README.md", ROOT / "docs" / "benchmarks.md"
    front = front_table(specs, cuda=False) + "\n" + front_table(specs, cuda=True)
    tables = []
    for stem, run in runs().items():
        tables.append(f"### {stem}\n\n{markdown(run)}")
        if "device" not in run["environment"]:
            tables.append(f"Goals of this run:\n\n{goals.table(run, specs)}")
    return {
        readme: between(readme.read_text(), "speed", front),
        page: between(page.read_text(), "tables", "\n".join(tables)),
    }


def write_documents(specs):
    for path, text in documents(specs).items():
        path.write_text(text)
