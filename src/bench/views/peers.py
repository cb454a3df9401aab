"""Bytewax, Pathway and Flink over the rows of a table: the tumbling question of `weir bench views`, its answers and what they cost.

Arguments: the directory of a table, the seconds of a window, and which of the three (bytewax, pathway, pyflink); it needs pyarrow,
too. It runs with one worker over all rows in the order of event time, as fast as it goes: `cpu_s` are CPU-seconds of the process
between the moment at which all rows are in memory (for Pathway and Flink: in a CSV file, which they read themselves) and the last
answer. Bytewax is given rows as Python tuples, its ordinary way. Flink's are those of its Java machine, which has started before
and has compiled nothing yet. The last line is JSON: windows as [beginning in µs, count, mean speed, most vehicles]; null when
the peer is not installed.
"""

import glob
import importlib.util
import json
import os
import sys
import tempfile
import time


def table(directory):
    import pyarrow.parquet

    files = sorted(glob.glob(f"{directory}/*/*.parquet"))
    assert files, "no file"
    rows = pyarrow.concat_tables(pyarrow.parquet.read_table(file, columns=["ts", "speed", "vehicles"]) for file in files)
    rows = rows.set_column(0, "ts", rows["ts"].cast("int64")).sort_by("ts")
    return rows.combine_chunks()


def bytewax_peer(rows, window_us):
    import datetime

    import bytewax.operators as op
    from bytewax.dataflow import Dataflow
    from bytewax.operators import windowing
    from bytewax.testing import TestingSink, TestingSource, run_main

    epoch = datetime.datetime(1970, 1, 1, tzinfo=datetime.timezone.utc)
    items = [
        ("all", (epoch + datetime.timedelta(microseconds=ts), speed, vehicles))
        for ts, speed, vehicles in zip(*(rows[name].to_pylist() for name in ("ts", "speed", "vehicles")))
    ]
    answers = []
    began = time.process_time()
    flow = Dataflow("windows")
    stream = op.input("rows", flow, TestingSource(items, batch_size=1_000))
    # Its watermark goes on with the clock of the machine: without a wait some rows of a batch would be late, and left out.
    clock = windowing.EventClock(lambda row: row[0], wait_for_system_duration=datetime.timedelta(seconds=2))
    windower = windowing.TumblingWindower(length=datetime.timedelta(microseconds=window_us), align_to=epoch)

    def add(sums, row):
        sums[0] += 1
        sums[1] += row[1]
        sums[2] = max(sums[2], row[2])
        return sums

    def merge(one, other):
        return [one[0] + other[0], one[1] + other[1], max(one[2], other[2])]

    folded = windowing.fold_window("fold", stream, clock, windower, lambda: [0, 0.0, -1], add, merge)
    op.output("answers", folded.down, TestingSink(answers))
    run_main(flow)
    cpu_s = time.process_time() - began
    return cpu_s, [[window * window_us, n, total / n, most] for _, (window, (n, total, most)) in answers]


def pathway_peer(rows, window_us):
    import pathway as pw
    import pyarrow.csv

    with tempfile.TemporaryDirectory() as directory:
        pyarrow.csv.write_csv(rows, os.path.join(directory, "rows.csv"))

        class Row(pw.Schema):
            ts: int
            speed: float
            vehicles: int

        answers = []
        began = time.process_time()
        stream = pw.io.csv.read(directory, schema=Row, mode="static")
        windows = stream.windowby(stream.ts, window=pw.temporal.tumbling(duration=window_us)).reduce(
            b=pw.this._pw_window_start,
            n=pw.reducers.count(),
            speed=pw.reducers.avg(pw.this.speed),
            most=pw.reducers.max(pw.this.vehicles),
        )

        def tell(key, row, time, is_addition):
            assert is_addition, "a file is read at once"
            answers.append([row["b"], row["n"], row["speed"], row["most"]])

        pw.io.subscribe(windows, on_change=tell)
        pw.run(monitoring_level=pw.MonitoringLevel.NONE)
        return time.process_time() - began, answers


def java_cpu_s():
    """CPU-seconds of the processes that this one has started."""
    pids, known = [os.getpid()], set()
    while pids:
        pid = pids.pop()
        known.add(pid)
        for tasks in glob.glob(f"/proc/{pid}/task/*/children"):
            with open(tasks) as file:
                pids.extend(int(child) for child in file.read().split())
    ticks = 0
    for pid in known - {os.getpid()}:
        with open(f"/proc/{pid}/stat") as file:
            fields = file.read().rpartition(")")[2].split()
        ticks += int(fields[11]) + int(fields[12])
    return ticks / os.sysconf("SC_CLK_TCK")


def pyflink_peer(rows, window_us):
    import pyarrow.csv
    from pyflink.table import EnvironmentSettings, TableEnvironment

    assert window_us % 1_000_000 == 0
    environment = TableEnvironment.create(EnvironmentSettings.in_streaming_mode())
    environment.get_config().set("parallelism.default", "1")
    environment.get_config().set("table.local-time-zone", "UTC")
    with tempfile.TemporaryDirectory() as directory:
        options = pyarrow.csv.WriteOptions(include_header=False)
        pyarrow.csv.write_csv(rows, os.path.join(directory, "rows.csv"), options)
        began = java_cpu_s()
        environment.execute_sql(
            f"""CREATE TABLE load_rows (ts BIGINT, speed DOUBLE, vehicles BIGINT, t AS TO_TIMESTAMP_LTZ(ts / 1000, 3),
                WATERMARK FOR t AS t) WITH ('connector' = 'filesystem', 'path' = 'file://{directory}', 'format' = 'csv')"""
        )
        told = environment.execute_sql(
            f"""SELECT UNIX_TIMESTAMP(CAST(window_start AS STRING)) AS b, COUNT(*), AVG(speed), MAX(vehicles)
                FROM TABLE(TUMBLE(TABLE load_rows, DESCRIPTOR(t), INTERVAL '{window_us // 1_000_000}' SECONDS))
                GROUP BY window_start, window_end"""
        )
        with told.collect() as answers:
            windows = [[row[0] * 1_000_000, row[1], row[2], row[3]] for row in answers]
        return java_cpu_s() - began, windows


def main():
    directory, window_us, peer = sys.argv[1], int(float(sys.argv[2]) * 1e6), sys.argv[3]
    if importlib.util.find_spec(peer) is None:
        print(json.dumps(None))
        return
    rows = table(directory)
    cpu_s, windows = {"bytewax": bytewax_peer, "pathway": pathway_peer, "pyflink": pyflink_peer}[peer](rows, window_us)
    windows.sort()
    print(json.dumps({"rows": rows.num_rows, "cpu_s": cpu_s, "windows": windows}))


main()
