"""Bytewax and Pathway over the rows of a table: the tumbling question of `weir bench views`, its answers and what they cost.

Arguments: the directory of a table, the seconds of a window, and which of the two; it needs pyarrow, too. It runs with one worker
over all rows in the order of event time, as fast as it goes: `cpu_s` are CPU-seconds of the process between the moment at which
all rows are in memory (for Pathway: in a CSV file, which it reads itself) and the last answer. Bytewax is given rows as Python
tuples, its ordinary way. The last line is JSON: windows as [beginning in µs, count, mean speed, most vehicles]; null when the
peer is not installed.
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


def main():
    directory, window_us, peer = sys.argv[1], int(float(sys.argv[2]) * 1e6), sys.argv[3]
    if importlib.util.find_spec(peer) is None:
        print(json.dumps(None))
        return
    rows = table(directory)
    cpu_s, windows = {"bytewax": bytewax_peer, "pathway": pathway_peer}[peer](rows, window_us)
    windows.sort()
    print(json.dumps({"rows": rows.num_rows, "cpu_s": cpu_s, "windows": windows}))


main()
