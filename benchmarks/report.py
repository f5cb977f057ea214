"""Tables and a plot from the JSON of a run."""

NO_PEERS = ("ours 1 thread", "read", "copy", "add", "products")  # in "seconds" beside the providers


def roof_of(row):
    """Seconds that the row's bytes cost at least: each tensor that must be read or written, once."""
    return row["seconds"][row["roof"]]


def dtype_name(row):
    return {"float32": "fp32", "bfloat16": "bf16", "float16": "fp16", "float64": "fp64"}[row["dtype"]]


def duration(seconds):
    return f"{seconds * 1e6:.1f} µs" if seconds < 1e-3 else f"{seconds * 1e3:.1f} ms"


def markdown(run):
    e = run["environment"]
    names = [n for row in run["rows"] for n in row["seconds"] if n not in ("ours", *NO_PEERS)]
    others = list(dict.fromkeys(names))
    lines = [
        f"{e['cpu']}, {e['threads']} threads, {e['isa']}, torch {e['torch']}, {e['allocator']} allocator, {e['date']}. "
        "Medians of interleaved runs; peak memory, ours : eager, in units of the logits.",
        "",
        f"| operator | shape | mode | ours | × roof | {' | '.join(n + ' / ours' for n in others)} | peak |",
        "|---|---|---|--:|--:|" + "--:|" * len(others) + "--:|",
    ]  # fmt: skip
    for row in run["rows"]:
        s = row["seconds"]
        roof = f"{s['ours'] / roof_of(row):.2f}" if row["bytes"] > 1 << 20 else "–"
        ratios = [f"{s[n] / s['ours']:.1f}" if n in s else "–" for n in others]
        memory = row["peak_bytes"]
        peak = "–"
        if "eager" in memory:
            peak = f"{memory['ours'] / row['bytes']:.2f} : {memory['eager'] / row['bytes']:.2f}"
        shape = "×".join(map(str, row["shape"])) + " " + dtype_name(row)
        shape += "" if row["scale"] == 1 else f", σ = {row['scale']}"
        shape += f", {row['label']}" if row.get("label") else ""
        cells = [row["operator"], shape, row["mode"], duration(s["ours"]), roof, *ratios, peak]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def compare(before, after):
    """Two runs side by side, row by row."""
    old = {r["name"]: r for r in before["rows"]}
    lines = ["| row | before | after | before / after | × roof before | × roof after |", "|---|--:|--:|--:|--:|--:|"]
    for row in after["rows"]:
        if row["name"] not in old:
            continue
        a, b = old[row["name"]], row
        sa, sb = a["seconds"]["ours"], b["seconds"]["ours"]
        roofs = f"{sa / roof_of(a):.2f} | {sb / roof_of(b):.2f}"
        lines.append(f"| {row['name']} | {duration(sa)} | {duration(sb)} | {sa / sb:.2f} | {roofs} |")
    return "\n".join(lines) + "\n"


def plot(run, path):
    """Achieved share of the roof's bandwidth per row and provider."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    rows = [r for r in run["rows"] if r["bytes"] > 1 << 20]
    providers = list(dict.fromkeys(n for r in rows for n in r["seconds"] if n not in NO_PEERS))
    figure, axis = plt.subplots(figsize=(11, 0.5 * len(rows) + 1.5))
    height = 0.8 / max(1, len(providers))
    for i, provider in enumerate(providers):
        share = [roof_of(r) / r["seconds"][provider] if provider in r["seconds"] else 0 for r in rows]
        axis.barh([y + i * height for y in range(len(rows))], share, height, label=provider)
    axis.set_yticks([y + 0.4 - height / 2 for y in range(len(rows))], [r["name"] for r in rows], fontsize=8)
    axis.invert_yaxis()
    axis.axvline(1, color="black", linewidth=0.8)
    axis.set_xlabel("bandwidth achieved / the machine's own (1 = the roof)")
    e = run["environment"]
    axis.set_title(f"{e['cpu']}, {e['threads']} threads, {e['allocator']} allocator, {e['date']}", fontsize=9)
    axis.legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=110)
