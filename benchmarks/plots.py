"""Plots of a run as PNG; needs matplotlib."""

from benchmarks.goals import NO_PEERS, roof_of
from benchmarks.report import dtype_name, machine


def plot(run, path):
    """Bandwidth as a share of the roof's, per row and provider."""
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


TRAFFIC = {"read": 1, "copy": 2, "add": 3}  # tensors of the logits' size that a roof moves


def plot_roofline(run, path):
    """Necessary bytes over time, by row length, beside a copy of the same logits."""
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
