"""Weir beside DuckDB: the same rows, the same questions, the same answers.

Arguments: the address of Weir's HTTP door, the ports of Flight SQL and Postgres, a token, a seed, how many questions. Rows go to
Weir as line protocol, a few before every couple of questions, so that each question finds some of them hot, some cold,
and files that are being compacted; DuckDB gets them as they are made. A question goes through one of the three doors.
Prints what differs and how to ask it again, and "ok" when nothing does.
"""

import collections
import datetime
import decimal
import gzip
import math
import os
import random
import sys
import urllib.error
import urllib.request

import adbc_driver_flightsql.dbapi as flight_sql
import duckdb
import psycopg
import pyarrow
import pyarrow.ipc

import queries

HTTP, FLIGHT, POSTGRES, TOKEN, SEED, COUNT = sys.argv[1], sys.argv[2], sys.argv[3], sys.argv[4], int(sys.argv[5]), int(sys.argv[6])
QUESTIONS_A_CHUNK = 20
ROWS_FIRST, ROWS_A_CHUNK = 2_000, 40
DEVICES, DAYS = 12, 14
SHOWN_MAX = 20
# A column and its cast in one GROUP BY (docs/sql-differences.md).
SAME_NAME = "Projections require unique expression names"
EPOCH = datetime.datetime.fromisoformat(queries.START)


class Rows:
    """The rows of both tables as they come."""

    def __init__(self, chance):
        self.chance, self.n, self.m = chance, 0, 0
        self.instants = {"readings": set(), "weather": set()}

    def place(self, table):
        """A device and an instant of its own; now and then one of long ago."""
        while True:
            device = f"d{self.chance.randrange(DEVICES)}"
            second = self.chance.randrange(DAYS * 86_400) if self.chance.random() < 0.3 else self.chance.randrange(DAYS * 1_440) * 60
            if (device, second) not in self.instants[table]:
                self.instants[table].add((device, second))
                return device, EPOCH + datetime.timedelta(seconds=second)

    def reading(self):
        device, ts = self.place("readings")
        self.n += 1
        maybe = lambda value: None if self.chance.random() < 0.15 else value
        return {
            "n": self.n, "speed": maybe(self.chance.randint(-40, 480) / 4), "passed": maybe(self.chance.randint(0, 60)),
            "wet": maybe(self.chance.random() < 0.4), "note": maybe(self.chance.choice(queries.NOTES).replace("''", "'")),
            "device": device, "ts": ts,
        }

    def weather(self):
        device, ts = self.place("weather")
        self.m += 1
        maybe = lambda value: None if self.chance.random() < 0.1 else value
        return {"m": self.m, "rain": maybe(self.chance.randint(0, 80) / 4), "level": maybe(self.chance.randint(0, 40)), "device": device, "ts": ts}


def field(value):
    if isinstance(value, bool):
        return "t" if value else "f"
    if isinstance(value, int):
        return f"{value}i"
    if isinstance(value, str):
        return '"' + value.replace("\\", "\\\\").replace('"', '\\"') + '"'
    return repr(value)


def line(table, row):
    fields = ",".join(f"{name}={field(row[name])}" for name in row if name not in ("device", "ts") and row[name] is not None)
    return f"{table},device={row['device']} {fields} {int((row['ts'] - datetime.datetime(1970, 1, 1)).total_seconds())}"


def post(path, body, **headers):
    request = urllib.request.Request(HTTP + path, body, headers)
    with urllib.request.urlopen(request) as answer:
        return answer.read()


class Peers:
    def __init__(self):
        self.duck = duckdb.connect(config={"threads": 1})
        self.duck.execute("SET TimeZone = 'UTC'")
        self.duck.execute("CREATE TABLE readings (n BIGINT, speed DOUBLE, passed BIGINT, wet BOOLEAN, note VARCHAR, device VARCHAR, ts TIMESTAMP)")
        self.duck.execute("CREATE TABLE weather (m BIGINT, rain DOUBLE, level BIGINT, device VARCHAR, ts TIMESTAMP)")
        self.flight = flight_sql.connect(f"grpc://127.0.0.1:{FLIGHT}", autocommit=True)
        self.postgres = psycopg.connect(host="127.0.0.1", port=int(POSTGRES), user="reader", dbname="weir", autocommit=True)

    def add(self, rows):
        for table, made in rows.items():
            text = "\n".join(line(table, row) for row in made).encode()
            post("/api/v2/write?precision=s", gzip.compress(text), Authorization=f"Token {TOKEN}", **{"Content-Encoding": "gzip"})
            chunk = pyarrow.Table.from_pylist(made)
            self.duck.execute(f"INSERT INTO {table} BY NAME SELECT * FROM chunk")

    def http_rows(self, sql):
        body = post("/v1/sql", sql.encode(), Accept="application/vnd.apache.arrow.stream")
        table = pyarrow.ipc.open_stream(body).read_all()
        return [list(row) for row in zip(*(column.to_pylist() for column in table.columns))] if table.num_columns else []

    def flight_rows(self, sql):
        with self.flight.cursor() as cursor:
            cursor.execute(sql)
            table = cursor.fetch_arrow_table()
            return [list(row) for row in zip(*(column.to_pylist() for column in table.columns))]

    def postgres_rows(self, sql):
        # Percent signs are not parameters here.
        return [list(row) for row in self.postgres.execute(sql.encode()).fetchall()]

    def weir_rows(self, door, sql):
        return {"http": self.http_rows, "flight_sql": self.flight_rows, "postgres": self.postgres_rows}[door](sql)


def plain(value):
    if isinstance(value, datetime.datetime):
        return value.astimezone(datetime.timezone.utc).replace(tzinfo=None) if value.tzinfo else value
    if isinstance(value, decimal.Decimal):
        return float(value)
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    return value


def same(a, b):
    if isinstance(a, list) and isinstance(b, list):
        return len(a) == len(b) and all(map(same, a, b))
    if isinstance(a, float) or isinstance(b, float):
        if isinstance(a, (int, float)) and isinstance(b, (int, float)):
            return a == b or math.isnan(a) and math.isnan(b) or math.isclose(a, b, rel_tol=1e-9, abs_tol=1e-7)
        return False
    if isinstance(a, bool) != isinstance(b, bool):
        return False
    return a == b


def key(value):
    """An order in which numbers that are nearly equal lie beside each other."""
    if isinstance(value, bool) or value is None:
        return (0, str(value))
    if isinstance(value, (int, float)):
        return (1, "nan") if math.isnan(value) else (2, float(f"{value:.7g}") + 0.0)
    return (3, str(value))


def difference(ours, theirs, ordered):
    if len(ours) != len(theirs):
        return f"{len(ours)} rows, and {len(theirs)} in DuckDB"
    if ordered is None:
        ours, theirs = (sorted(rows, key=lambda row: [key(value) for value in row]) for rows in (ours, theirs))
    for index, (a, b) in enumerate(zip(ours, theirs)):
        # Of an ordered answer the keys decide the place; equal keys leave it open which row comes first.
        if not same(a, b):
            return f"row {index}: {a!r}, and {b!r} in DuckDB"
    return None


def main():
    chance = random.Random(SEED)
    peers, made, generator = Peers(), Rows(chance), queries.Generator(chance)
    counts, refused, differ, hot = collections.Counter(), collections.Counter(), [], []
    for number in range(COUNT):
        if number % QUESTIONS_A_CHUNK == 0:
            size = ROWS_A_CHUNK if number else ROWS_FIRST
            peers.add({"readings": [made.reading() for _ in range(size)], "weather": [made.weather() for _ in range(size // 4)]})
        if number % QUESTIONS_A_CHUNK == QUESTIONS_A_CHUNK // 2:
            hot.append(peers.http_rows("SELECT sum(rows), sum(hot_rows) FROM system.streams")[0])
        kind, question, ordered = generator.question()
        door = chance.choice(["http", "flight_sql", "postgres"])
        try:
            theirs = [plain(list(row)) for row in peers.duck.execute(question.duck).fetchall()]
        except duckdb.Error as error:
            theirs = error
        try:
            ours = [plain(row) for row in peers.weir_rows(door, question.weir)]
        except Exception as error:
            ours = error if not isinstance(error, urllib.error.HTTPError) else RuntimeError(error.read().decode())
        counts[kind] += 1
        if isinstance(ours, Exception) and isinstance(theirs, Exception):
            refused[kind] += 1
            continue
        if isinstance(ours, Exception) and SAME_NAME in str(ours):
            refused["of one name"] += 1
            continue
        if isinstance(ours, Exception) or isinstance(theirs, Exception):
            found = f"Weir: {ours}" if isinstance(ours, Exception) else f"DuckDB: {theirs}"
        else:
            found = difference(ours, theirs, ordered)
        if found:
            differ.append(number)
            if len(differ) <= SHOWN_MAX:
                print(f"-- {number} ({kind}, {door}): {found}\n{question.weir}\n-- DuckDB:\n{question.duck}\n", flush=True)
    print(f"seed {SEED}: {COUNT} questions over {made.n} and {made.m} rows, {len(differ)} differ, both refuse {sum(refused.values())}: {dict(counts)}")
    both = sum(cold > 0 and warm > 0 for cold, warm in hot)
    share = sum(warm for _, warm in hot) / sum(cold + warm for cold, warm in hot)
    print(f"{both} of {len(hot)} times there were rows of both kinds, {share:.0%} of all were hot")
    assert both * 2 > len(hot), "cold and hot rows hardly ever met"
    assert sum(refused.values()) * 20 < COUNT, f"too many questions are no questions: {refused}"
    if differ:
        sys.exit(f"{len(differ)} answers differ: {differ}")
    print("ok", flush=True)
    # Threads of the drivers may be at work still, and end the interpreter badly when it waits for them.
    os._exit(0)


main()
