"""Measures the operators against eager PyTorch, torch.compile and installed peers.

python -m benchmarks                       everything, with the default and with a warm allocator
python -m benchmarks --only 32000          rows whose name contains this
python -m benchmarks --device cuda         on a GPU, beside Liger, Quack and flash-attn where they are installed
python -m benchmarks --device cuda --list  the rows that would be measured; needs no GPU
python -m benchmarks compare --base DIR    this tree against another built one, interleaved; CPU
python -m benchmarks docs                  writes the tables of README.md and docs/benchmarks.md from all results
"""

import argparse
import os
import subprocess
import sys

os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # silences the memory profiler


def finish(args, run, name, table):
    """Prints the table. A run of all rows replaces the last one of such a machine, in the documents' tables, too."""
    from benchmarks import report
    from torch_softmax_ext.testing import SPECS

    print(table)
    if args.only and not args.name:
        return
    report.write(run, report.RESULTS / (args.name or name))
    report.write_documents(SPECS)


def main():
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("command", nargs="?", choices=["run", "compare", "docs"], default="run")
    parser.add_argument("--base", help="compare: the folder of the other tree")
    parser.add_argument("--only", default="", help="rows whose name contains this")
    parser.add_argument("--skip", nargs="*", default=[], help="providers to leave out")
    parser.add_argument("--threads", type=int, default=min(2, os.cpu_count()))
    parser.add_argument("--rounds", type=int, default=7, help="times that every provider is timed")
    parser.add_argument("--allocator", choices=["both", "default", "warm"], default="both")
    parser.add_argument("--name", help="of the file in benchmarks/results/; with --only there is none without it")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--seconds", type=float, default=100, help="on a GPU: what does not fit is left out")
    parser.add_argument("--list", action="store_true", help="on a GPU: print the plan")
    args = parser.parse_args()

    from benchmarks import compare, cuda, goals, measure, report
    from torch_softmax_ext.testing import SPECS

    if args.command == "compare":
        if args.base is None:
            parser.error("compare: expected --base, the folder of the other tree")
        sys.exit(1 if compare.compare(SPECS, args.base, args.threads, args.rounds, args.only) else 0)
    if args.command == "docs":
        report.write_documents(SPECS)
        return
    if args.device == "cuda":
        if args.list:
            print("\n".join(row.name for row in cuda.plan(SPECS, args.only)))
            return
        cuda.require_device()
        run = cuda.measure(SPECS, args.seconds, args.only, args.skip)
        finish(args, run, cuda.file_name(run["environment"]), report.markdown(run))
        return
    if args.allocator == "both":
        for allocator in ("default", "warm"):
            env = {**os.environ, **(measure.WARM_ALLOCATOR if allocator == "warm" else {})}
            command = [sys.executable, "-m", "benchmarks", *sys.argv[1:], "--allocator", allocator]
            subprocess.run(command, env=env, check=True)
        return

    run = measure.measure(SPECS, args.threads, args.rounds, args.only, args.skip)
    table = report.markdown(run) + "\n" + goals.table(run, SPECS)
    args.name = args.name and f"{args.name}-{args.allocator}"
    finish(args, run, measure.file_name(run["environment"]), table)


if __name__ == "__main__":
    main()
