"""Measures the operators against eager PyTorch, torch.compile and entmax, on CPU.

python -m benchmarks                       everything, with the default and with a warm allocator
python -m benchmarks --only 32000          rows whose name contains this
python -m benchmarks compare A.json B.json two runs side by side
python -m benchmarks goals A.json          the goals on CPU, what was reached, and why not more
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
    parser.add_argument("--name", default="cpu", help="of the files in benchmarks/results/")
    args = parser.parse_args()

    from benchmarks import goals, measure, report

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
        table = report.markdown(json.loads(Path(args.files[0]).read_text()))
        readme.write_text(f"{head}<!-- speed -->\n{table}<!-- end of speed -->{tail}")
        return
    if args.allocator == "both":
        for allocator in ("default", "warm"):
            env = {**os.environ, **(measure.WARM_ALLOCATOR if allocator == "warm" else {})}
            command = [sys.executable, "-m", "benchmarks", *sys.argv[1:], "--allocator", allocator]
            subprocess.run(command, env=env, check=True)
        return

    from torch_softmax_ext.testing import SPECS

    run = measure.measure(SPECS, args.threads, args.rounds, args.only, args.skip)
    measure.RESULTS.mkdir(exist_ok=True)
    stem = measure.RESULTS / f"{args.name}-{args.allocator}"
    stem.with_suffix(".json").write_text(json.dumps(run, indent=1) + "\n")
    table = report.markdown(run) + "\n" + goals.table(run)
    stem.with_suffix(".md").write_text(table)
    report.plot(run, stem.with_suffix(".png"))
    print(table)


if __name__ == "__main__":
    main()
