# What Python users and the tools around them do: ADBC over Flight SQL, SQLAlchemy's reflection, pandas, COPY, and the
# catalogue questions of Grafana, DBeaver and psql. argv: ports of Postgres and Flight SQL, password, fixtures; prints
# "ok" at the end. `analyst` sees all of `load`, `few` the rows with n < 10.
import pathlib
import sys
import threading

import adbc_driver_flightsql.dbapi as flight_sql
import pandas
import psycopg
import sqlalchemy

postgres, flight, password, fixtures = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3], pathlib.Path(sys.argv[4])


def check(found, expected):
    assert found == expected, f"{found!r} is not {expected!r}"


def adbc(user="analyst", password=password, **headers):
    options = {"username": user, "password": password}
    options.update({f"adbc.flight.sql.rpc.call_header.{name}": value for name, value in headers.items()})
    return flight_sql.connect(f"grpc://127.0.0.1:{flight}", db_kwargs=options, autocommit=True)


def refused(words, run):
    try:
        run()
    except Exception as refusal:
        assert words.lower() in str(refusal).lower(), refusal
    else:
        raise AssertionError(f"not refused: {words}")


# ADBC: statements, parameters, types, streams, errors, the catalogue.
refused("unauthenticated", lambda: adbc(password="wrong").cursor().execute("SELECT 1"))
with adbc() as connection, connection.cursor() as cursor:
    cursor.execute("SELECT n, device, ts, n / 4.0 AS quarter, n > 1 AS more, CAST(NULL AS BIGINT) AS nothing "
                   "FROM load WHERE n < 3 ORDER BY n")
    table = cursor.fetch_arrow_table()
    check(table.column_names, ["n", "device", "ts", "quarter", "more", "nothing"])
    check([str(kind) for kind in table.schema.types], ["int64", "string", "timestamp[us, tz=UTC]", "double", "bool", "int64"])
    check(table["n"].to_pylist(), [0, 1, 2])
    for least in (90, 0, 5_000_000_000):
        cursor.execute("SELECT n FROM load WHERE n >= $1 AND device = $2 ORDER BY n", (least, "dev-3"))
        check([row[0] for row in cursor.fetchall()], [n for n in range(100) if n >= least and n % 7 == 3])
    cursor.execute("SELECT count(*) FROM generate_series(1, 1000000)")
    check(cursor.fetchone(), (1_000_000,))
    cursor.execute("SELECT v, v * 2 AS w FROM generate_series(1, 3000000) AS a(v)")
    rows = sum(batch.num_rows for batch in cursor.fetch_record_batch())
    check(rows, 3_000_000)
    refused("did you mean `load`?", lambda: cursor.execute("SELECT * FROM laod"))
    refused("questions only", lambda: cursor.execute("DROP TABLE load"))
    refused("ivide", lambda: (cursor.execute("SELECT 1 / 0 FROM load"), cursor.fetchall()))
    frame = pandas.read_sql("SELECT device, count(*) AS rows FROM load GROUP BY 1 ORDER BY 1", connection)
    check(list(frame["rows"]), [15, 15] + [14] * 5)
    objects = connection.adbc_get_objects(depth="tables", db_schema_filter="public").read_all().to_pylist()
    names = [table["table_name"] for schema in objects[0]["catalog_db_schemas"] for table in schema["db_schema_tables"]]
    check(names, ["load"])
    check(connection.adbc_get_table_schema("load").names[:3], ["ts", "device", "n"])
    check(connection.adbc_get_info()["vendor_name"], "Weir")
    # A cancel ends a statement that would run for hours.
    timer = threading.Timer(0.5, cursor.adbc_cancel)
    timer.start()
    refused("cancel", lambda: (
        cursor.execute("SELECT sum(a.v) FROM generate_series(1, 1000000) AS a(v), generate_series(1, 1000000) AS b(w)"),
        cursor.fetchall(),
    ))
    timer.join()
    cursor.execute("SELECT sum(n) FROM load")
    check(cursor.fetchone(), (4950,))
with adbc("few") as connection, connection.cursor() as cursor:
    cursor.execute("SELECT count(*) FROM load")
    check(cursor.fetchone(), (10,))
with adbc(**{"x-weir-lane": "nosuch"}) as connection, connection.cursor() as cursor:
    refused("may not run in lane", lambda: cursor.execute("SELECT 1"))

# SQLAlchemy: reflection and a question, and pandas over it.
engine = sqlalchemy.create_engine(f"postgresql+psycopg://analyst:{password}@127.0.0.1:{postgres}/weir")
inspector = sqlalchemy.inspect(engine)
assert "public" in inspector.get_schema_names(), inspector.get_schema_names()
check(inspector.get_table_names(), ["load"])
columns = {column["name"]: (str(column["type"]), column["nullable"]) for column in inspector.get_columns("load")}
check(columns["ts"], ("TIMESTAMP", False))
check((columns["n"], columns["device"]), (("BIGINT", True), ("TEXT", True)))
load = sqlalchemy.Table("load", sqlalchemy.MetaData(), autoload_with=engine)
check(list(load.columns.keys())[:3], ["ts", "device", "n"])
with engine.connect() as connection:
    check(list(pandas.read_sql(sqlalchemy.text("SELECT n FROM load WHERE n < 3 ORDER BY n"), connection)["n"]), [0, 1, 2])

# COPY, as psycopg reads it.
with psycopg.connect(host="127.0.0.1", port=postgres, user="analyst", password=password, dbname="weir", autocommit=True) as connection:
    with connection.cursor() as cursor:
        with cursor.copy("COPY (SELECT n, device, quality FROM load WHERE n < 2 ORDER BY n) TO STDOUT") as copy:
            check(list(copy.rows()), [("0", "dev-0", "good"), ("1", "dev-1", "good")])
        with cursor.copy("COPY (SELECT n, ts FROM load ORDER BY n) TO STDOUT (FORMAT BINARY)") as copy:
            copy.set_types(["int8", "timestamptz"])
            check([row[0] for row in copy.rows()], list(range(100)))
        with cursor.copy("COPY (SELECT n FROM load WHERE n < 2 ORDER BY n) TO STDOUT (FORMAT csv, HEADER)") as copy:
            check(b"".join(bytes(part) for part in copy), b"n\n0\n1\n")
    # What clients ask about the catalogue: none of it may fail.
    for client in ("grafana", "dbeaver", "psql"):
        text = (fixtures / f"{client}.sql").read_text()
        for question in text.split("-- next\n"):
            sql = "\n".join(line for line in question.splitlines() if not line.startswith("--")).rstrip().rstrip(";")
            try:
                cursor = connection.execute(sql)
                rows = cursor.fetchall() if cursor.description else []
            except psycopg.Error as error:
                raise AssertionError(f"{client}: {error}: {sql[:200]}") from error
            if "AS \"table\"" in sql:
                assert ("public.load",) in rows or ("load",) in rows, rows
            if "AS metric" in sql:
                check(len(rows), 7)
            if "relname OPERATOR" in sql:
                check([row[2] for row in rows], ["load"])

# The reader with a scope, through Postgres.
with psycopg.connect(host="127.0.0.1", port=postgres, user="few", password=password, dbname="weir", autocommit=True) as connection:
    check(connection.execute("SELECT count(*) FROM load").fetchone(), (10,))
    check(connection.execute("SELECT count(*) FROM load WHERE 1 / (n - 42) < 2").fetchone()[0] <= 10, True)
    with connection.cursor().copy("COPY load (n) TO STDOUT") as copy:
        check(sorted(int(row[0]) for row in copy.rows()), list(range(10)))
print("ok")
