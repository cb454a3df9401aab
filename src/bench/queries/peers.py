"""DuckDB (with pytz) and chDB over the Parquet files of a table, two threads each: answers and times as JSON.

Arguments: the table's directory, the file of statements, how often each is asked; the first time does not count.
"""

import datetime
import glob
import json
import re
import sys
import time

directory, statements, repeat = sys.argv[1], sys.argv[2], int(sys.argv[3])
queries = re.findall(r"-- \[(\w+)\]\n(.*?);", open(statements).read(), re.S)
files = f"{directory}/*/*.parquet"
assert glob.glob(files), "no file"


def plain(value):
    if isinstance(value, (datetime.datetime, datetime.date)):
        return value.isoformat()
    return value


def measure(ask, dialect):
    answers = {}
    for name, statement in queries:
        statement = dialect(statement)
        times = []
        for turn in range(repeat + 1):
            started = time.perf_counter()
            names, rows = ask(statement)
            if turn:
                times.append((time.perf_counter() - started) * 1e3)
        times.sort()
        # By name, as in an object of JSON.
        order = sorted(range(len(names)), key=lambda column: names[column])
        answers[name] = {
            "rows": [[plain(row[column]) for column in order] for row in rows],
            "ms": {"min": times[0], "p50": times[len(times) // 2], "max": times[-1]},
        }
    return answers


def duckdb_peer():
    import duckdb

    db = duckdb.connect(config={"threads": 2})
    db.execute("SET TimeZone = 'UTC'")
    db.execute("SET enable_object_cache = true")
    db.execute(f"CREATE VIEW traffic AS SELECT * FROM read_parquet('{files}', hive_partitioning = true)")
    sketch = re.compile(r"approx_percentile_cont\(0.95\) WITHIN GROUP \(ORDER BY (\w+)\)")

    def ask(statement):
        answer = db.execute(statement)
        return [column[0] for column in answer.description], answer.fetchall()

    return measure(ask, lambda s: sketch.sub(r"approx_quantile(\1, 0.95)", s))


def chdb_peer():
    from chdb import session

    db = session.Session()
    db.query("SET max_threads = 2")
    db.query("CREATE DATABASE IF NOT EXISTS b")
    db.query("USE b")
    db.query(f"CREATE VIEW traffic AS SELECT * FROM file('{files}', Parquet)")
    sketch = re.compile(r"approx_percentile_cont\(0.95\) WITHIN GROUP \(ORDER BY (\w+)\)")

    def ask(statement):
        answer = json.loads(str(db.query(statement, "JSONCompact")))
        return [column["name"] for column in answer["meta"]], answer["data"]

    settings = " SETTINGS max_threads = 2, output_format_json_quote_64bit_integers = 0"
    return measure(ask, lambda s: sketch.sub(r"quantileTDigest(0.95)(\1)", s) + settings)


print(json.dumps({"duckdb": duckdb_peer(), "chdb": chdb_peer()}))
