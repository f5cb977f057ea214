"""Tables and plots from the JSON of a run."""

import json

# In "seconds" beside the providers. In cache: every row is the first one. Plain: with a gradient of 1 instead of 1/4.
# relu: its backward moves the same bytes as ours. engine, roofs: see providers.py.
NO_PEERS = ("ours 1 thread", "ours in cache", "plain backward", "σ = 1", "relu", "engine")
NO_PEERS += ("read", "copy", "add", "products")


def roof_of(row):
    """Seconds that the row's bytes cost at least: each tensor that must be read or written, once."""
    return row["seconds"][row["roof"]]


def dtype_name(row):
    return {"float32": "fp32", "bfloat16": "bf16", "float16": "fp16", "float64": "fp64"}[row["dtype"]]


def duration(seconds):
    return f"{seconds * 1e6:.1f} µs" if seconds < 1e-3 else f"{seconds * 1e3:.1f} ms"


def machine(environment):
    e = environment
    if "device" in e:
        return f"{e['device']}, torch {e['torch']}, CUDA {e['cuda']}, {e['date']}"
    return (
        f"{e['cpu']}, {e['threads']} threads, {e['isa']}, torch {e['torch']}, {e['allocator']} allocator, {e['date']}"
    )


def write(run, stem, table):
    """The run as JSON, its table as Markdown, its plot as PNG, and the table on the terminal."""
    stem.parent.mkdir(exist_ok=True)
    stem.with_suffix(".json").write_text(json.dumps(run, indent=1) + "\n")
    stem.with_suffix(".md").write_text(table)
    (plot_roofline if "device" in run["environment"] else plot)(run, stem.with_suffix(".png"))
    print(table)


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
    failed = [f"- {row['name']}: {n}: {e}" for row in run["rows"] for n, e in row.get("errors", {}).items()]
    return "\n".join(lines + (["", "Could not be measured:", *failed] if failed else [])) + "\n"


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
    axis.set_title(machine(run["environment"]), fontsize=9)
    axis.legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=110)


TRAFFIC = {"read": 1, "copy": 2, "add": 3}  # of a roof, in units of the logits


def plot_roofline(run, path):
    """Bytes that must be moved over time, by the length of a row, beside what a copy of the same logits reaches."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    panels = {}
    for row in run["rows"]:
        if row["bytes"] > 1 << 20:
            panel = f"{row['operator']} {row['mode']}" + (f", {row['label']}" if row["label"] else "")
            panels.setdefault(f"{panel}, {dtype_name(row)}, σ = {row['scale']:g}", []).append(row)
    panels = {name: sorted(rows, key=lambda r: r["shape"][-1]) for name, rows in panels.items()}
    lines = max(1, -(-len(panels) // 3))
    figure, axes = plt.subplots(lines, 3, figsize=(13, 3 * lines), squeeze=False)
    for axis in axes.flat[len(panels) :]:
        axis.remove()
    for axis, (name, rows) in zip(axes.flat, panels.items(), strict=False):
        for provider in dict.fromkeys(n for r in rows for n in r["seconds"] if n not in ("read", "add")):
            have = [r for r in rows if provider in r["seconds"]]
            moved = [2 if provider == "copy" else TRAFFIC[r["roof"]] for r in have]
            speed = [m * r["bytes"] / r["seconds"][provider] / 1e9 for m, r in zip(moved, have, strict=True)]
            style = {"color": "black", "linestyle": "--"} if provider == "copy" else {"marker": "o", "markersize": 3}
            axis.plot([r["shape"][-1] for r in have], speed, label=provider, **style)
        axis.set_xscale("log", base=2)
        axis.set_ylim(bottom=0)
        axis.set_title(name, fontsize=8)
        axis.set_xlabel("elements of a row", fontsize=7)
        axis.set_ylabel("GB/s", fontsize=7)
        axis.tick_params(labelsize=7)
        axis.legend(fontsize=6)
    figure.suptitle(machine(run["environment"]), fontsize=9)
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    plt.close(figure)
