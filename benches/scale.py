#!/usr/bin/env python3
"""Measures what does not show in small databases: snapshots, restarts, idling, and many databases.

Starts primaries and replicas of its own in a new directory, on free ports, and ends them.

usage: scale.py [--litefs BINARY] [--dir DIRECTORY] [--mib 1024] [--databases 1000]
"""
import argparse
import os
import shutil
import signal
import socket
import sqlite3
import statistics
import subprocess
import sys
import tempfile
import threading
import time

PATIENCE = 120


def free_port():
    with socket.create_server(("127.0.0.1", 0)) as server:
        return server.getsockname()[1]


def wait(what, condition, pause=0.002):
    end = time.monotonic() + PATIENCE
    while not condition():
        if time.monotonic() > end:
            raise TimeoutError(f"waited in vain for {what}")
        time.sleep(pause)


class Node:
    """A litefs process; a context manager."""

    def __init__(self, litefs, directory, primary=None):
        self.litefs, self.directory = litefs, directory
        self.port = free_port()
        self.mount = os.path.join(directory, "mnt")
        os.makedirs(self.mount)
        to = primary.port if primary else self.port
        with open(os.path.join(directory, "litefs.yml"), "w") as config:
            config.write(
                f'data: {{dir: "{directory}/data"}}\nfuse: {{dir: "{self.mount}"}}\n'
                f'http: {{addr: "127.0.0.1:{self.port}"}}\n'
                f"lease: {{type: static, candidate: {str(primary is None).lower()}, hostname: primary, "
                f'advertise-url: "http://127.0.0.1:{to}"}}\n'
            )
        self.process = None

    def __enter__(self):
        self.start()
        return self

    def __exit__(self, *_):
        self.stop()

    def start(self):
        """Returns after how many seconds the node was ready."""
        log = open(os.path.join(self.directory, "log"), "w")
        begin = time.monotonic()
        self.process = subprocess.Popen(
            [self.litefs, "mount", "--config", os.path.join(self.directory, "litefs.yml")],
            stdin=subprocess.DEVNULL, stdout=log, stderr=log,
        )
        wait(f"{self.directory} to be ready", lambda: ": ready " in self.log() or self.process.poll() is not None)
        if self.process.poll() is not None:
            raise RuntimeError(f"the node ended:\n{self.log()}")
        return time.monotonic() - begin

    def stop(self, how=signal.SIGTERM):
        if self.process:
            self.process.send_signal(how)
            self.process.wait()
            self.process = None

    def log(self):
        with open(os.path.join(self.directory, "log")) as log:
            return log.read()

    def path(self, name):
        return os.path.join(self.mount, name)

    def pos(self, name):
        try:
            with open(self.path(name) + "-pos") as pos:
                return pos.read()
        except FileNotFoundError:
            return None

    def cpu_seconds(self):
        """CPU time of all threads, by the scheduler's nanoseconds: the ticks of /proc/PID/stat are too coarse."""
        tasks = f"/proc/{self.process.pid}/task"
        total = 0
        for task in os.listdir(tasks):
            with open(f"{tasks}/{task}/schedstat") as stat:
                total += int(stat.read().split()[0])
        return total / 1e9


def connect(path):
    db = sqlite3.connect(path, isolation_level=None, timeout=30)
    db.execute("PRAGMA journal_mode=wal")
    db.execute("PRAGMA synchronous=normal")
    return db


def make_large(path, mib):
    db = connect(path)
    db.execute("CREATE TABLE t(id INTEGER PRIMARY KEY, v BLOB)")
    for _ in range(mib // 8):
        db.execute("BEGIN")
        for _ in range(8):
            db.execute("INSERT INTO t(v) VALUES(randomblob(1048000))")
        db.execute("COMMIT")
    db.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    db.close()


class Writer(threading.Thread):
    """Commits one row after the other, and notes when; `rate` is commits a second in a span of time."""

    def __init__(self, path):
        super().__init__()
        self.path, self.times, self.stop = path, [], False

    def run(self):
        db = connect(self.path)
        db.execute("CREATE TABLE IF NOT EXISTS w(id INTEGER PRIMARY KEY, v)")
        while not self.stop:
            db.execute("INSERT INTO w(v) VALUES('something of a usual length, as rows have it')")
            self.times.append(time.monotonic())
        db.close()

    def rate(self, begin, end):
        return sum(begin <= t < end for t in self.times) / (end - begin)


def snapshot(litefs, top, mib):
    """A new replica copies a large database while a program writes to it."""
    with Node(litefs, os.path.join(top, "primary")) as primary:
        make_large(primary.path("large.db"), mib)
        size = os.path.getsize(primary.path("large.db"))
        os.sync()
        rates, ratios = [], []
        for i in range(3):
            writer = Writer(primary.path("large.db"))
            writer.start()
            time.sleep(3)
            replica = Node(litefs, os.path.join(top, f"replica{i}"), primary)
            begin = time.monotonic()
            with replica:
                wait("the copy", lambda: "page copy is in place" in replica.log(), 0.01)
                end = time.monotonic()
                writer.stop = True
                writer.join()
                wait("the replica", lambda: replica.pos("large.db") == primary.pos("large.db"))
            shutil.rmtree(replica.directory)
            os.sync()
            rates.append(size / (end - begin) / 1e6)
            ratios.append(writer.rate(begin, end) / writer.rate(begin - 2, begin))
            print(f"  snapshot {i + 1}: {rates[-1]:.0f} MB/s, writer at {ratios[-1]:.2f} of its rate before", flush=True)
        print(f"snapshot of {size / 1e9:.2f} GB to a new replica: {statistics.median(rates):.0f} MB/s, "
              f"writer at {statistics.median(ratios):.2f}", flush=True)
        primary.stop()
        clean = primary.start()
        primary.stop(signal.SIGKILL)
        killed = primary.start()
        print(f"restart with it: ready after {clean:.2f} s; after kill -9: {killed:.2f} s", flush=True)


def many(litefs, top, count):
    """Many databases on one node and its replica."""
    with Node(litefs, os.path.join(top, "primary")) as primary:
        with Node(litefs, os.path.join(top, "replica"), primary) as replica:
            names = [f"d{n}.db" for n in range(count)]
            begin = time.monotonic()
            for n, name in enumerate(names):
                db = connect(primary.path(name))
                db.execute("CREATE TABLE t(x)")
                db.execute("INSERT INTO t VALUES(?)", (n,))
                db.close()
            made = time.monotonic() - begin
            for name in names:
                wait(name, lambda: primary.pos(name) and primary.pos(name) == replica.pos(name))
            for n in range(0, count, max(1, count // 50)):
                db = sqlite3.connect(f"file:{replica.path(names[n])}?mode=ro", uri=True)
                assert db.execute("SELECT x FROM t").fetchall() == [(n,)]
                db.close()
            time.sleep(15)
            idle(f"idle with {count} databases", (("primary", primary), ("replica", replica)))
        primary.stop()
        print(f"{count} databases: made in {made:.1f} s, on the replica as well; "
              f"restart: ready after {primary.start():.2f} s", flush=True)


def idle(what, nodes, seconds=20):
    before = [node.cpu_seconds() for _, node in nodes]
    time.sleep(seconds)
    used = [(node.cpu_seconds() - b) / seconds * 100 for (_, node), b in zip(nodes, before)]
    shares = ", ".join(f"{name} {share:.2f} %" for (name, _), share in zip(nodes, used))
    print(f"{what}: {shares} of a core", flush=True)


def main():
    parser = argparse.ArgumentParser(description="measures snapshots, restarts, idling, many databases")
    parser.add_argument("--litefs", default="target/release/litefs")
    parser.add_argument("--dir", help="on which disk (default: TMPDIR or /tmp)")
    parser.add_argument("--mib", type=int, default=1024)
    parser.add_argument("--databases", type=int, default=1000)
    args = parser.parse_args()
    litefs = os.path.abspath(args.litefs)
    if not os.access(litefs, os.X_OK):
        sys.exit(f"{litefs} is missing; run: make bench")
    for measure, size in ((snapshot, args.mib), (many, 100), (many, args.databases)):
        with tempfile.TemporaryDirectory(prefix="litefs-scale.", dir=args.dir) as top:
            measure(litefs, top, size)


if __name__ == "__main__":
    main()
