#!/usr/bin/env python3
"""Runs the workloads of sqlbench in several directories and prints a table.

The directories take turns, so that what else the machine does hits all of them. A cell is the median rate of all
rounds, its ratio to the first directory, and the median of the median latencies in microseconds; lag has its 99th
percentile as well.

usage: compare.py [-n ROUNDS] [-s SECONDS] [-w WORKLOAD,...] NAME=DIR ...
"""
import argparse
import math
import os
import statistics
import subprocess
import sys
import tempfile

WORKLOADS = (
    "ins1-wal-normal,ins1-wal-full,ins100-wal-normal,upd1-wal-normal,ins1-delete,ins1-truncate,"
    "select,select-mmap,scan,open,mixed3"
)
FAILED = (math.nan, math.nan, math.nan)


def run(exe, name, directory, workload, seconds):
    """Returns what sqlbench printed: {workload: (ops per second, p50, p99)}."""
    done = subprocess.run([exe, directory, workload, str(seconds)], capture_output=True, text=True)
    if done.returncode:
        print(f"{name}: {done.stderr.strip()}", file=sys.stderr)
        return {}
    lines = (line.split() for line in done.stdout.splitlines())
    return {key: tuple(map(float, numbers)) for key, *numbers in lines}


def remove_databases(directory):
    """Removes what the writing workloads left, so that directories do not fill up."""
    for name in os.listdir(directory):
        if name.startswith(("ins", "upd")) and name.endswith(".db"):
            try:
                os.unlink(os.path.join(directory, name))
            except OSError:
                pass


def main():
    parser = argparse.ArgumentParser(description="compares directories by SQLite workloads")
    parser.add_argument("-n", type=int, default=3, metavar="ROUNDS")
    parser.add_argument("-s", type=float, default=2, metavar="SECONDS", help="of each run")
    parser.add_argument("-w", default=WORKLOADS, metavar="WORKLOAD,...")
    parser.add_argument("dirs", nargs="+", metavar="NAME=DIR")
    args = parser.parse_args()
    dirs = [each.split("=", 1) for each in args.dirs]
    failures = 0
    with tempfile.TemporaryDirectory(prefix="sqlbench.") as build:
        exe = os.path.join(build, "sqlbench")
        source = os.path.join(os.path.dirname(os.path.abspath(__file__)), "sqlbench.c")
        subprocess.run(["cc", "-O2", "-o", exe, source, "-lsqlite3"], check=True)
        print("workload".ljust(20), *(name.rjust(22) for name, _ in dirs), flush=True)
        for workload in args.w.split(","):
            results = {}  # workload as printed -> directory -> one tuple a round
            for _ in range(args.n):
                for name, directory in dirs:
                    got = run(exe, name, directory, workload, args.s)
                    failures += not got
                    for key, numbers in (got or {workload: FAILED}).items():
                        results.setdefault(key, {}).setdefault(name, []).append(numbers)
                    remove_databases(directory)
            for key, by_name in results.items():
                median = lambda name, i: statistics.median(r[i] for r in by_name.get(name, [FAILED]))
                base = median(dirs[0][0], 0)
                cells = (
                    f"{median(n, 0):9.0f}/s {median(n, 0) / base:5.2f}x {median(n, 1):5.0f}u".rjust(22)
                    + (f" 99%: {median(n, 2):.0f}u" if workload.startswith("lag:") else "")
                    for n, _ in dirs
                )
                print(key.split(":")[0].ljust(20), *cells, flush=True)
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
