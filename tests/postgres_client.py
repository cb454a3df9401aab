# What a Python user does over the Postgres door: argv is port and password; prints "ok" at the end.
import datetime
import sys
import threading

import psycopg
from psycopg import errors

port, password = int(sys.argv[1]), sys.argv[2]


def connect(password=password, **more):
    return psycopg.connect(
        host="127.0.0.1", port=port, user="analyst", password=password, dbname="weir", autocommit=True, **more
    )


def check(found, expected):
    assert found == expected, f"{found!r} is not {expected!r}"


def refused(error, words, run):
    """The statement fails with this class of SQLSTATE, says why, and the connection goes on."""
    try:
        run()
    except error as refusal:
        assert refusal.sqlstate == error.sqlstate, f"{refusal.sqlstate}: {refusal}"
        assert words in str(refusal), refusal
    else:
        raise AssertionError(f"not refused: {words}")


try:
    connect(password="wrong")
except psycopg.OperationalError as refusal:
    assert "authentication failed" in str(refusal), refusal
else:
    raise AssertionError("a wrong password is let in")

START = datetime.datetime(2024, 1, 1, tzinfo=datetime.timezone.utc)
connection = connect()

# Values and their types, in both formats.
for binary in (False, True):
    cursor = connection.cursor(binary=binary)
    cursor.execute(
        "SELECT n, device, ts, n / 4.0 AS quarter, n > 1 AS more, CAST(NULL AS BIGINT) AS nothing "
        "FROM load WHERE n < 3 ORDER BY n"
    )
    check([column.name for column in cursor.description], ["n", "device", "ts", "quarter", "more", "nothing"])
    names = [connection.adapters.types[column.type_code].name for column in cursor.description]
    check(names, ["int8", "text", "timestamptz", "float8", "bool", "int8"])
    rows = [(n, f"dev-{n}", START + datetime.timedelta(milliseconds=n), n / 4, n > 1, None) for n in range(3)]
    check(cursor.fetchall(), rows)

# Parameters in both formats, results in both formats, prepared at the first execution.
for binary in (False, True):
    cursor = connection.cursor(binary=binary)
    for mark in ("%t", "%b"):
        statement = f"SELECT n FROM load WHERE n >= {mark} AND device = {mark} ORDER BY n"
        for least in (90, 0, 70_000, 5_000_000_000):
            cursor.execute(statement, (least, "dev-3"), prepare=True)
            check([row[0] for row in cursor], [n for n in range(100) if n >= least and n % 7 == 3])
        cursor.execute(f"SELECT count(*) FROM load WHERE ts < {mark}", (START + datetime.timedelta(milliseconds=10),))
        check(cursor.fetchall(), [(10,)])
        cursor.execute(f"SELECT count(*) FROM load WHERE n * 0.5 < {mark}", (10.25,))
        check(cursor.fetchall(), [(21,)])
        cursor.execute(f"SELECT count(*) FROM load WHERE (n > 49) = {mark}", (True,))
        check(cursor.fetchall(), [(50,)])
        cursor.execute(f"SELECT count(*) FROM load WHERE device = {mark}", (None,))
        check(cursor.fetchall(), [(0,)])
        cursor.executemany(f"SELECT n FROM load WHERE n = {mark}", [(n,) for n in range(5)], returning=True)
        found = []
        while True:
            found += cursor.fetchall()
            if not cursor.nextset():
                break
        check(found, [(n,) for n in range(5)])

# Errors have their class, and the connection goes on.
refused(errors.UndefinedTable, "did you mean `load`?", lambda: connection.execute("SELECT 1 FROM laod"))
refused(errors.UndefinedColumn, "did you mean `device`?", lambda: connection.execute("SELECT devise FROM load"))
refused(errors.SyntaxError, "SELEC", lambda: connection.execute("SELEC 1"))
refused(errors.ReadOnlySqlTransaction, "questions only", lambda: connection.execute("DROP TABLE load"))
check(connection.execute("SELECT count(*) FROM load").fetchall(), [(100,)])

# A cancel ends a statement that would run for hours.
timer = threading.Timer(0.2, connection.cancel)
timer.start()
refused(
    errors.QueryCanceled, "cancelled", lambda: connection.execute("SELECT sum(value) FROM generate_series(1, 1000000000000)")
)
timer.join()

check(connection.execute("SELECT sum(n) FROM load").fetchall(), [(4950,)])
print("ok")
