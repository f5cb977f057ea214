"""Measures the operators against eager PyTorch, torch.compile and the peers that are installed.

python -m benchmarks                       everything, with the default and with a warm allocator
python -m benchmarks --only 32000          rows whose name contains this
python -m benchmarks --device cuda         on a GPU, beside Liger, Quack and flash-attn where they are installed
python -m benchmarks --device cuda --list  the rows that would be measured; needs no GPU
python -m benchmarks compare A.json B.json two runs side by side
python -m benchmarks goals A.json          the goals on CPU, what was reached, and why not more
python -m benchmarks readme A.json B.json  the README's tables: A's rows, and of B those that A lacks
"""

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path

os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # the memory profiler's greetings


def main():
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("command", nargs="?", choices=["run", "compare", "goals", "readme"], default="run")
    parser.add_argument("files", nargs="*", help="the JSON files of compare, goals and readme")
    parser.add_argument("--only", default="", help="rows whose name contains this")
    parser.add_argument("--skip", nargs="*", default=[], help="providers to leave out")
    parser.add_argument("--threads", type=int, default=min(2, os.cpu_count()))
    parser.add_argument("--rounds", type=int, default=7, help="times that every provider is timed")
    parser.add_argument("--allocator", choices=["both", "default", "warm"], default="both")
    parser.add_argument("--name", help="of the files in benchmarks/results/")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--seconds", type=float, default=100, help="on a GPU: what does not fit is left out")
    parser.add_argument("--list", action="store_true", help="on a GPU: print the plan")
    args = parser.parse_args()

    from benchmarks import cuda, goals, measure, report
    from torch_softmax_ext.testing import SPECS

    if args.command == "compare":
        before, after = (json.loads(Path(f).read_text()) for f in args.files)
        print(report.compare(before, after))
        return
    if args.command == "goals":
        print(goals.table(json.loads(Path(args.files[0]).read_text())))
        return
    if args.command == "readme":
        readme = Path(__file__).parent.parent / "README.md"
        head, _, rest = readme.read_text().partition("<!-- speed -->\n")
        tail = rest.partition("<!-- end of speed -->")[2]
        if not args.files:
            parser.error("readme: expected the JSON files of its tables")
        tables, shown = [], set()
        for file in args.files:
            run = json.loads(Path(file).read_text())
            run["rows"] = [r for r in run["rows"] if r["name"] not in shown]
            shown |= {r["name"] for r in run["rows"]}
            tables.append(report.markdown(run))
        readme.write_text(head + "<!-- speed -->\n" + "\n".join(tables) + "<!-- end of speed -->" + tail)
        return
    if args.device == "cuda":
        if args.list:
            print("\n".join(row.name for row in cuda.plan(SPECS, args.only)))
            return
        cuda.require_device()
        run = cuda.measure(SPECS, args.seconds, args.only, args.skip)
        report.write(run, measure.RESULTS / (args.name or cuda.file_name(run["environment"])), report.markdown(run))
        return
    if args.allocator == "both":
        for allocator in ("default", "warm"):
            env = {**os.environ, **(measure.WARM_ALLOCATOR if allocator == "warm" else {})}
            command = [sys.executable, "-m", "benchmarks", *sys.argv[1:], "--allocator", allocator]
            subprocess.run(command, env=env, check=True)
        return

    run = measure.measure(SPECS, args.threads, args.rounds, args.only, args.skip)
    table = report.markdown(run) + "\n" + goals.table(run)
    report.write(run, measure.RESULTS / f"{args.name or 'cpu'}-{args.allocator}", table)


if __name__ == "__main__":
    main()
