"""Questions as analysts ask them, made at random, each in two dialects: Weir's and DuckDB's.

A question is a `Pair`. Where the dialects write one thing in two ways, `two` makes the pair; all else is written once.
What differs on purpose (docs/sql-differences.md) is not generated. Numbers in the data are multiples of a quarter, so
that sums do not depend on the order of adding, and (device, ts) is unique, so that "the newest" is one row.
"""

from typing import NamedTuple

START = "2024-03-01 00:00:00"
NOTES = ["dry", "wet", "Snow", "icy road", "50%", "a_b", "", "smørrebrød", "Æble", "x,y", "it''s", " padded "]
UNITS = ["minute", "hour", "day", "week", "month", "quarter", "year"]
WIDTHS = ["1 minute", "5 minutes", "90 minutes", "2 hours", "1 day", "7 days", "1 month", "3 months"]
READINGS = {"n": "int", "speed": "float", "passed": "int", "wet": "bool", "note": "text", "device": "text", "ts": "ts"}
WEATHER = {"m": "int", "rain": "float", "level": "int", "device": "text", "ts": "ts"}


class Pair(NamedTuple):
    weir: str
    duck: str


def two(weir, duck, *parts):
    return Pair(weir.format(*(part.weir for part in parts)), duck.format(*(part.duck for part in parts)))


def both(text, *parts):
    parts = [part if isinstance(part, Pair) else Pair(str(part), str(part)) for part in parts]
    return two(str(text), str(text), *parts)


def listed(parts, between=", "):
    return Pair(between.join(part.weir for part in parts), between.join(part.duck for part in parts))


class Generator:
    """Makes question after question out of one random sequence."""

    def __init__(self, random):
        self.random = random
        self.kinds = [
            (10, self.rows), (10, self.grouped), (5, self.whole), (8, self.bucketed), (9, self.joined),
            (6, self.related), (9, self.windowed), (6, self.chained), (6, self.united), (4, self.distinct),
            (3, self.newest), (4, self.asof), (3, self.sets_of_groups), (3, self.gapfilled), (3, self.courses),
            (3, self.lists), (3, self.qualified), (2, self.counted_on), (2, self.values),
        ]

    def one_in(self, n):
        return self.random.randrange(n) == 0

    def pick(self, *choices):
        return self.random.choice(choices)

    def question(self):
        """The name of a kind, a pair, and how many leading columns order the answer wholly (None: no order)."""
        kind = self.random.choices([kind for _, kind in self.kinds], [weight for weight, _ in self.kinds])[0]
        pair, ordered = kind()
        return kind.__name__, pair, ordered

    # Expressions. `scope` is a dictionary from column to type.

    def column(self, scope, kind):
        names = [name for name, of in scope.items() if of == kind]
        return both(self.random.choice(names)) if names else None

    def expression(self, scope, kind, depth=2):
        return getattr(self, "some_" + kind)(scope, depth)

    def leaf(self, scope, kind, literal):
        column = self.column(scope, kind)
        return column if column and not self.one_in(4) else both(literal)

    def either(self, scope, kind, depth):
        """What there is of every type."""
        a, b = self.expression(scope, kind, depth - 1), self.expression(scope, kind, depth - 1)
        condition = self.some_bool(scope, depth - 1)
        return self.pick(
            lambda: both("CASE WHEN {} THEN {} ELSE {} END", condition, a, b),
            lambda: both("CASE WHEN {} THEN {} END", condition, a),
            lambda: both("coalesce({}, {})", a, b),
            lambda: both("nullif({}, {})", a, b),
        )()

    def some_int(self, scope, depth=2):
        if depth <= 0 or self.one_in(3):
            return self.leaf(scope, "int", self.random.randint(-5, 60))
        a, b = self.some_int(scope, depth - 1), self.some_int(scope, depth - 1)
        return self.pick(
            lambda: both("({} {} {})", a, self.pick("+", "-"), b),
            lambda: both("({} * {})", a, self.random.randint(-3, 9)),
            lambda: both("({} % {})", a, self.random.randint(2, 9)),
            lambda: two("({} / {})", "({} // {})", a, both(self.random.randint(2, 9))),
            lambda: both("{}({}, {})", self.pick("greatest", "least"), a, b),
            lambda: both("abs({})", a),
            lambda: both("CAST(floor({}) AS BIGINT)", self.some_float(scope, depth - 1)),
            lambda: both("CAST({} AS BIGINT)", self.some_bool(scope, depth - 1)),
            lambda: both("CAST({}({}) AS BIGINT)", self.pick("length", "character_length"), self.some_text(scope, depth - 1)),
            lambda: both("CAST(strpos({}, {}) AS BIGINT)", self.some_text(scope, depth - 1), self.pick("'e'", "'o'", "''")),
            lambda: both(
                "CAST({}({} FROM {}) AS BIGINT)", "extract",
                self.pick("year", "month", "day", "hour", "minute", "dow", "doy", "week", "quarter"),
                self.some_ts(scope, depth - 1)),
            lambda: self.either(scope, "int", depth),
        )()

    def some_float(self, scope, depth=2):
        if depth <= 0 or self.one_in(3):
            return self.leaf(scope, "float", f"CAST({self.random.randint(-20, 200) / 4} AS DOUBLE)")
        a, b = self.some_float(scope, depth - 1), self.some_float(scope, depth - 1)
        return self.pick(
            lambda: both("({} {} {})", a, self.pick("+", "-", "*"), b),
            lambda: both("({} / nullif({}, 0))", a, b),
            lambda: both("CAST({} AS DOUBLE)", self.some_int(scope, depth - 1)),
            lambda: both("({} * {})", self.some_int(scope, depth - 1), a),
            lambda: both("{}({})", self.pick("abs", "floor", "ceil", "round", "trunc", "-"), a),
            lambda: both("sqrt(abs({}))", a),
            lambda: both("ln(1 + abs({}))", a),
            lambda: both("power(least(abs({}), 9), 2)", a),
            lambda: both("{}({}, {})", self.pick("greatest", "least"), a, b),
            lambda: self.either(scope, "float", depth),
        )()

    def some_text(self, scope, depth=2):
        if depth <= 0 or self.one_in(3):
            return self.leaf(scope, "text", f"'{self.random.choice(NOTES)}'")
        a, b = self.some_text(scope, depth - 1), self.some_text(scope, depth - 1)
        return self.pick(
            lambda: both("{}({})", self.pick("upper", "lower", "trim", "ltrim", "rtrim", "reverse"), a),
            lambda: both("({} || {})", a, b),
            lambda: both("concat({}, '-', {})", a, b),
            lambda: both("substr({}, {}, {})", a, self.random.randint(1, 4), self.random.randint(0, 5)),
            lambda: both("{}({}, {})", self.pick("left", "right"), a, self.random.randint(0, 5)),
            lambda: both("replace({}, '{}', '{}')", a, self.pick("e", "d", "ø"), self.pick("", "E", "..")),
            lambda: both("lpad({}, {}, '*')", a, self.random.randint(1, 9)),
            lambda: both("split_part({}, ' ', {})", a, self.random.randint(1, 2)),
            lambda: both("repeat({}, {})", a, self.random.randint(0, 2)),
            lambda: both("regexp_replace({}, '[aeo]+', '{}', 'g')", a, self.pick("", "#")),
            lambda: both("CAST({} AS VARCHAR)", self.some_int(scope, depth - 1)),
            lambda: two("to_char({}, '%Y-%m-%d %H:%M')", "strftime({}, '%Y-%m-%d %H:%M')", self.some_ts(scope, depth - 1)),
            lambda: self.either(scope, "text", depth),
        )()

    def some_ts(self, scope, depth=2):
        if depth <= 0 or self.one_in(3):
            return self.leaf(scope, "ts", f"TIMESTAMP '{self.moment()}'")
        a = self.some_ts(scope, depth - 1)
        return self.pick(
            lambda: both("date_trunc('{}', {})", self.random.choice(UNITS), a),
            lambda: both("time_bucket(INTERVAL '{}', {})", self.random.choice(WIDTHS), a),
            lambda: both("({} {} INTERVAL '{}')", a, self.pick("+", "-"), self.pick("1 hour", "3 days", "1 month", "10 seconds")),
            lambda: both("coalesce({}, TIMESTAMP '{}')", a, self.moment()),
            lambda: both("CASE WHEN {} THEN {} END", self.some_bool(scope, depth - 1), a),
        )()

    def moment(self):
        return f"2024-{self.random.randint(3, 4):02}-{self.random.randint(1, 30):02} {self.random.randint(0, 23):02}:{self.pick(0, 15, 30, 59):02}:00"

    def some_bool(self, scope, depth=2):
        if depth <= 0:
            column = self.column(scope, "bool")
            return column if column and self.one_in(3) else self.compared(scope, 0)
        a, b = self.some_bool(scope, depth - 1), self.some_bool(scope, depth - 1)
        text = self.some_text(scope, depth - 1)
        return self.pick(
            lambda: self.compared(scope, depth),
            lambda: self.compared(scope, depth),
            lambda: both("({} {} {})", a, self.pick("AND", "OR"), b),
            lambda: both("(NOT {})", a),
            lambda: both("({} IS {})", a, self.pick("NULL", "NOT NULL", "TRUE", "NOT TRUE", "NOT FALSE")),
            lambda: both("({} {} {})", text, self.pick("LIKE", "NOT LIKE", "ILIKE"), self.pick("'%e%'", "'d__'", "'_c%'", "'%'", "'S%'", "'%ø%'", "''")),
            lambda: both("({} {} ({}))", text, self.pick("IN", "NOT IN"), ", ".join(f"'{note}'" for note in self.random.sample(NOTES, 3))),
            lambda: two("regexp_like({}, '^[a-z]+ ?')", "regexp_matches({}, '^[a-z]+ ?')", text),
            lambda: both("starts_with({}, '{}')", text, self.pick("d", "", "wet")),
            lambda: both("({} {} ({}, {}, {}))", self.some_int(scope, depth - 1), self.pick("IN", "NOT IN"), self.random.randint(0, 9), self.random.randint(10, 60), self.pick("NULL", "7")),
            lambda: both("({} IS {} NULL)", self.expression(scope, self.pick("int", "float", "text"), depth - 1), self.pick("", "NOT")),
        )()

    def compared(self, scope, depth):
        kind = self.pick("int", "int", "float", "float", "text", "ts", "ts")
        a, b = self.expression(scope, kind, depth - 1), self.expression(scope, kind, depth - 1)
        if self.one_in(5):
            return both("({} BETWEEN {} AND {})", a, b, self.expression(scope, kind, 0))
        if self.one_in(8):
            return both("({} IS {} DISTINCT FROM {})", a, self.pick("", "NOT"), b)
        return both("({} {} {})", a, self.pick("=", "<>", "<", "<=", ">", ">="), b)

    def some_distinct(self, scope, kind, depth):
        """For places where values are told apart: -0.0 and 0.0 are two there for Weir, and one for DuckDB."""
        made = self.expression(scope, kind, depth)
        return both("CASE WHEN {0} = 0 THEN CAST(0 AS DOUBLE) ELSE {0} END", made) if kind == "float" else made

    def where(self, scope):
        return both("") if self.one_in(5) else both(" WHERE {}", self.some_bool(scope, self.pick(1, 1, 2)))

    def some(self, scope, depth=2):
        return self.expression(scope, self.pick("int", "float", "text", "bool", "ts", "float"), depth)

    def aggregate(self, scope, exact=False):
        """Exact ones are equal to the last bit whatever the order."""
        numbers = [name for name, kind in scope.items() if kind in ("int", "float")]
        number = both(self.random.choice(numbers))
        choices = [
            lambda: both("count(*)"),
            lambda: both("count({})", self.some(scope, 1)),
            lambda: both("sum({})", number),
            lambda: both("{}({})", self.pick("min", "max"), self.expression(scope, self.pick("int", "float", "text", "ts"), 1)),
            lambda: both("count(DISTINCT {})", self.some_distinct(scope, self.pick("int", "text", "float", "ts"), 1)),
        ]
        if not exact:
            choices += [
                lambda: both("avg({})", number),
                lambda: both("avg({})", self.some_float(scope, 1)),
                lambda: both("sum({})", self.some_float(scope, 1)),
                lambda: both("sum(DISTINCT {})", self.some_int(scope, 1)),
                lambda: both("{}({})", self.pick("stddev", "stddev_pop", "var_pop", "var_samp"), number),
                lambda: both("median(CAST({} AS DOUBLE))", number),
                lambda: both("{}({})", self.pick("bool_and", "bool_or"), self.some_bool(scope, 1)),
                lambda: both("{}({}, {})", self.pick("covar_pop", "covar_samp"), number, self.random.choice(numbers)),
            ]
        made = self.random.choice(choices)()
        return both("{} FILTER (WHERE {})", made, self.some_bool(scope, 1)) if self.one_in(5) else made

    def columns(self, expressions):
        return listed([both("{} AS c{}", expression, index) for index, expression in enumerate(expressions)])

    def order(self, count):
        keys = [f"{index + 1} {self.pick('ASC', 'DESC')} NULLS {self.pick('FIRST', 'LAST')}" for index in range(count)]
        return both(" ORDER BY {}", ", ".join(keys))

    # Kinds of questions.

    def rows(self):
        scope = READINGS
        chosen = [self.some(scope) for _ in range(self.random.randint(1, 4))]
        question = both("SELECT {} FROM readings{}", self.columns(chosen + [both("n")]), self.where(scope))
        if self.one_in(2):
            return question, None
        limit = f" LIMIT {self.random.randint(0, 40)}" + (f" OFFSET {self.random.randint(0, 20)}" if self.one_in(2) else "")
        return both("{}{}{}", question, self.order(len(chosen) + 1), limit), len(chosen) + 1

    def grouped(self, table="readings", scope=READINGS):
        keys = [self.pick(
            lambda: both("device"), lambda: both("date_trunc('{}', ts)", self.random.choice(UNITS)),
            lambda: self.some_int(scope, 1), lambda: self.some_bool(scope, 1), lambda: self.some_text(scope, 1),
        )() for _ in range(self.random.randint(1, 3))]
        aggregates = [self.aggregate(scope) for _ in range(self.random.randint(1, 3))]
        having = both("")
        if self.one_in(3):
            having = both(" HAVING {} {} {}", self.pick("count(*)", "max(n)" if "n" in scope else "max(m)", "count(*) + 1"), self.pick(">", "<=", "<>"), self.random.randint(0, 60))
        by = ", ".join(str(index + 1) for index in range(len(keys)))
        question = both("SELECT {} FROM {}{} GROUP BY {}{}", self.columns(keys + aggregates), table, self.where(scope), by, having)
        if self.one_in(2):
            return question, None
        question = both("{}{}", question, self.order(len(keys)))
        return (both("{} LIMIT {}", question, self.random.randint(0, 20)) if self.one_in(2) else question), len(keys)

    def whole(self):
        aggregates = [self.aggregate(READINGS) for _ in range(self.random.randint(1, 5))]
        return both("SELECT {} FROM readings{}", self.columns(aggregates), self.where(READINGS)), None

    def bucketed(self):
        width = self.random.choice(WIDTHS)
        more = self.pick("", "", f", TIMESTAMP '{self.moment()}'" if "month" not in width else "")
        bucket = both("time_bucket(INTERVAL '{}', ts{})", width, more)
        aggregates = [self.aggregate(READINGS) for _ in range(self.random.randint(1, 3))]
        aggregates.append(self.end())
        keys, by = ([bucket, both("device")], "1, 2")
        question = both("SELECT {} FROM readings{} GROUP BY {}", self.columns(keys + aggregates), self.where(READINGS), by)
        if self.one_in(3):
            condition = both("time_bucket(INTERVAL '{}', ts) {} TIMESTAMP '{}'", width, self.pick("=", "<", ">=", ">"), self.moment())
            question = both("SELECT {} FROM readings WHERE {} GROUP BY {}", self.columns(keys + aggregates), condition, by)
        return both("{}{}", question, self.order(2)), 2

    def end(self):
        """first and last of a device's group: its times differ."""
        value = self.pick("speed", "passed", "note", "wet", "n")
        if self.one_in(2):
            return two("last({}, ts)", "arg_max_null({}, ts)", both(value))
        return two("first({}, ts)", "arg_min_null({}, ts)", both(value))

    def joined(self):
        scope = {f"a.{name}": kind for name, kind in READINGS.items()} | {f"b.{name}": kind for name, kind in WEATHER.items()}
        on = self.pick(
            "a.device = b.device AND date_trunc('day', a.ts) = date_trunc('day', b.ts)",
            "a.device = b.device AND a.ts > b.ts AND a.ts < b.ts + INTERVAL '3 hours'",
            "a.passed = b.level", "a.passed = b.level AND a.speed > b.rain", "a.n = b.m",
        )
        left = both("(SELECT * FROM readings WHERE n % {} = 0)", self.random.randint(2, 5))
        kind = self.pick("JOIN", "LEFT JOIN", "RIGHT JOIN", "FULL JOIN")
        source = both("{} a {} weather b ON {}", left, kind, on)
        if self.one_in(3):
            chosen = [self.some(scope, 1) for _ in range(2)]
            columns = self.columns(chosen + [both("a.n"), both("b.m")])
            question = both("SELECT {} FROM {}{}", columns, source, self.where(scope))
            return both("{}{} LIMIT 50", question, self.order(4)), 4
        keys = [self.pick(both("a.device"), both("b.device"), both("b.level"), self.some_bool(scope, 1))]
        aggregates = [self.aggregate(scope) for _ in range(2)]
        return both("SELECT {} FROM {}{} GROUP BY 1", self.columns(keys + aggregates), source, self.where(scope)), None

    def related(self):
        """Subqueries in conditions and in the SELECT list."""
        inner = self.some_bool(WEATHER, 1)
        condition = self.pick(
            lambda: both("device {} (SELECT device FROM weather WHERE {})", self.pick("IN", "NOT IN"), inner),
            lambda: both("passed {} (SELECT level FROM weather WHERE {})", self.pick("IN", "NOT IN"), inner),
            lambda: both("{} (SELECT 1 FROM weather w WHERE w.device = r.device AND w.ts > r.ts AND w.level > {})", self.pick("EXISTS", "NOT EXISTS"), self.random.randint(0, 40)),
            lambda: both("speed {} (SELECT avg(rain) * {} FROM weather WHERE {})", self.pick(">", "<"), self.random.randint(1, 30), inner),
            lambda: both("speed > (SELECT {}(s.speed) FROM readings s WHERE s.device = r.device)", self.pick("avg", "min")),
        )()
        if self.one_in(3):
            chosen = both("n, (SELECT {}(w.rain) FROM weather w WHERE w.device = r.device) AS of_device, (SELECT count(*) FROM weather) AS of_all", self.pick("max", "min", "sum"))
        else:
            chosen = both("n, device, speed")
        return both("SELECT {} FROM readings r WHERE {}", chosen, condition), None

    def windowed(self):
        partition = self.pick("PARTITION BY device ", "PARTITION BY wet ", "PARTITION BY device, wet ", "")
        # A total order: n is unique.
        order = self.pick("ORDER BY n", "ORDER BY ts, n", "ORDER BY speed NULLS FIRST, n", "ORDER BY passed DESC NULLS LAST, n")
        frame = self.pick(
            "", "", "ROWS BETWEEN 3 PRECEDING AND CURRENT ROW", "ROWS BETWEEN UNBOUNDED PRECEDING AND UNBOUNDED FOLLOWING",
            "ROWS BETWEEN 2 PRECEDING AND 2 FOLLOWING", "ROWS BETWEEN CURRENT ROW AND UNBOUNDED FOLLOWING",
            "ROWS BETWEEN 5 PRECEDING AND 2 PRECEDING",
        )
        ranged = f"{partition}ORDER BY ts RANGE BETWEEN INTERVAL '{self.pick('1 hour', '6 hours', '2 days')}' PRECEDING AND CURRENT ROW"
        column = self.pick("speed", "passed", "n")
        functions = [
            lambda: f"row_number() OVER ({partition}{order})",
            lambda: f"{self.pick('rank', 'dense_rank', 'percent_rank', 'cume_dist')}() OVER ({partition}ORDER BY {self.pick('passed', 'speed', 'device')} {self.pick('ASC', 'DESC')} NULLS LAST)",
            lambda: f"{self.pick('lag', 'lead')}({column}, {self.random.randint(0, 3)}) OVER ({partition}{order})",
            lambda: f"{self.pick('lag', 'lead')}(passed, 1, -1) OVER ({partition}{order})",
            lambda: f"{self.pick('first_value', 'last_value')}({column}) OVER ({partition}{order} {frame})",
            lambda: f"nth_value({column}, {self.random.randint(1, 3)}) OVER ({partition}{order} {frame})",
            lambda: f"ntile({self.random.randint(1, 5)}) OVER ({partition}{order})",
            lambda: f"{self.pick('sum', 'min', 'max', 'count', 'avg')}({column}) OVER ({partition}{order} {frame})",
            lambda: f"{self.pick('sum', 'count', 'max')}({column}) OVER ({ranged})",
            lambda: f"count(*) OVER ({partition})" if partition else "count(*) OVER ()",
        ]
        chosen = [both("{}", self.random.choice(functions)()) for _ in range(self.random.randint(1, 3))]
        return both("SELECT {} FROM readings{}", self.columns(chosen + [both("n")]), self.where(READINGS)), None

    def chained(self):
        first = both("SELECT device, time_bucket(INTERVAL '{}', ts) AS b, sum(passed) AS passed, max(speed) AS speed, count(*) AS n FROM readings{} GROUP BY 1, 2", self.random.choice(WIDTHS), self.where(READINGS))
        scope = {"device": "text", "b": "ts", "passed": "int", "speed": "float", "n": "int"}
        second = self.pick(
            lambda: both("SELECT device, {} AS x, {} AS y FROM per{} GROUP BY device", self.aggregate(scope), self.aggregate(scope), self.where(scope)),
            lambda: both("SELECT p.device, p.b, p.n, q.n AS after FROM per p LEFT JOIN per q ON p.device = q.device AND p.b < q.b AND q.n > p.n"),
            lambda: both("SELECT *, passed - lag(passed) OVER (PARTITION BY device ORDER BY b) AS step FROM per"),
            lambda: both("SELECT count(*) AS x FROM per WHERE n > (SELECT avg(n) FROM per)"),
            lambda: both("SELECT per.device, b, n, total FROM per JOIN (SELECT device, sum(n) AS total FROM per GROUP BY device) USING (device)"),
        )()
        return both("WITH per AS ({}) {}", first, second), None

    def united(self):
        kinds = [self.pick("int", "float", "text", "bool", "ts") for _ in range(self.random.randint(1, 3))]
        sides = []
        for _ in range(self.random.randint(2, 3)):
            table, scope = self.pick(("readings", READINGS), ("weather", WEATHER))
            sides.append(both("SELECT {} FROM {}{}", self.columns([self.some_distinct(scope, kind, 1) for kind in kinds]), table, self.where(scope)))
        word = self.pick("UNION", "UNION ALL", "INTERSECT", "EXCEPT", "UNION")
        question = listed(sides, f" {word} ")
        if self.one_in(3) and word != "UNION ALL":
            return both("{}{} LIMIT {}", question, self.order(len(kinds)), self.random.randint(1, 30)), len(kinds)
        return question, None

    def distinct(self):
        if self.one_in(2):
            chosen = [self.some_distinct(READINGS, self.pick("int", "float", "text", "bool", "ts"), 1) for _ in range(self.random.randint(1, 2))]
            return both("SELECT DISTINCT {} FROM readings{}", self.columns(chosen), self.where(READINGS)), None
        order = self.pick("ts DESC", "ts ASC", "n DESC", "speed DESC NULLS LAST, n")
        where = self.pick(both(""), both(" WHERE device IN ('d1', 'd2', 'nobody')"), self.where(READINGS))
        return both("SELECT DISTINCT ON (device) device, n, speed, note, ts FROM readings{} ORDER BY device, {}", where, order), None

    def newest(self):
        where = self.pick(both(""), both(" WHERE device = 'd3'"), both(" WHERE device IN ('d0', 'd1', 'nobody')"), self.where(READINGS))
        question = two(
            "SELECT device, n, speed, passed, wet, note, ts FROM latest('readings'){}",
            "SELECT device, n, speed, passed, wet, note, ts FROM (SELECT DISTINCT ON (device) * FROM readings ORDER BY device, ts DESC){}", where)
        if self.one_in(3):
            question = two(
                "SELECT l.device, l.n, w.m FROM latest('readings') l LEFT JOIN latest('weather') w ON l.device = w.device",
                "SELECT l.device, l.n, w.m FROM (SELECT DISTINCT ON (device) * FROM readings ORDER BY device, ts DESC) l "
                "LEFT JOIN (SELECT DISTINCT ON (device) * FROM weather ORDER BY device, ts DESC) w ON l.device = w.device")
        return question, None

    def asof(self):
        kind = self.pick("ASOF JOIN", "ASOF LEFT JOIN")
        compared = self.pick(">=", ">", "<=", "<")
        right = both("(SELECT * FROM weather{})", self.where(WEATHER))
        scope = {f"a.{name}": kind for name, kind in READINGS.items()} | {f"b.{name}": kind for name, kind in WEATHER.items()}
        question = both(
            "SELECT a.n, b.m, b.rain, {} AS x FROM readings a {} {} b ON a.device = b.device AND a.ts {} b.ts",
            self.some(scope, 1), kind, right, compared)
        return question, None

    def sets_of_groups(self):
        groups = self.pick("ROLLUP (device, wet)", "CUBE (device, wet)", "GROUPING SETS ((device), (wet), ())", "GROUPING SETS ((device, wet), (device))")
        aggregates = [self.aggregate(READINGS) for _ in range(2)]
        return both("SELECT device, wet, grouping(device) AS g, {} FROM readings{} GROUP BY {}", self.columns(aggregates), self.where(READINGS), groups), None

    def gapfilled(self):
        width, day = self.pick("30 minutes", "1 hour", "6 hours", "1 day"), self.random.randint(1, 20)
        begin, end = f"TIMESTAMP '2024-03-{day:02} 00:00:00'", f"TIMESTAMP '2024-03-{day + self.random.randint(1, 8):02} 00:00:00'"
        value = self.pick("avg(speed)", "sum(passed)", "max(speed)", "count(speed)")
        parts = [both(text) for text in (width, begin, end, value)]
        weir = ("SELECT time_bucket_gapfill('{0}', ts) AS b, device, {3} AS v, locf({3}) AS held FROM readings "
                "WHERE ts >= {1} AND ts < {2} GROUP BY 1, 2")
        duck = ("WITH found AS (SELECT time_bucket(INTERVAL '{0}', ts) AS b, device, {3} AS v FROM readings WHERE ts >= {1} AND ts < {2} GROUP BY 1, 2), "
                "grid AS (SELECT unnest(generate_series(time_bucket(INTERVAL '{0}', {1}), {2} - INTERVAL '1 microsecond', INTERVAL '{0}')) AS b) "
                "SELECT grid.b, d.device, v, last_value(v IGNORE NULLS) OVER (PARTITION BY d.device ORDER BY grid.b ROWS UNBOUNDED PRECEDING) AS held "
                "FROM grid CROSS JOIN (SELECT DISTINCT device FROM found) d LEFT JOIN found ON found.b = grid.b AND found.device IS NOT DISTINCT FROM d.device")
        return two(weir, duck, *parts), None

    def courses(self):
        """delta, increase, rate and the average over time, beside what they mean."""
        name = self.pick("delta", "increase", "rate", "time_weighted_avg")
        value, where = self.pick("passed", "speed"), self.pick(both(""), self.where(READINGS))
        weir = "SELECT device, {0}({1}, ts) AS x FROM readings{2} GROUP BY device"
        steps = ("WITH p AS (SELECT device, ts, CAST({1} AS DOUBLE) AS v, lead(CAST({1} AS DOUBLE)) OVER w AS next, lead(ts) OVER w AS until "
                 "FROM (SELECT * FROM readings{2}) WHERE {1} IS NOT NULL WINDOW w AS (PARTITION BY device ORDER BY ts)) ")
        of = {
            "delta": "CASE WHEN count(*) > 1 THEN arg_max(v, ts) - arg_min(v, ts) END",
            "increase": "sum(CASE WHEN next < v THEN next ELSE next - v END)",
            "rate": "sum(CASE WHEN next < v THEN next ELSE next - v END) / (epoch_us(max(ts)) - epoch_us(min(ts))) * 1e6",
            "time_weighted_avg": "CASE WHEN count(*) = 1 THEN any_value(v) ELSE sum(v * (epoch_us(until) - epoch_us(ts))) / (epoch_us(max(ts)) - epoch_us(min(ts))) END",
        }[name]
        duck = steps + "SELECT d.device, x FROM (SELECT DISTINCT device FROM readings{2}) d LEFT JOIN (SELECT device, " + of + " AS x FROM p GROUP BY device) p USING (device)"
        return two(weir, duck, both(name), both(value), where), None

    def lists(self):
        made = self.pick(
            lambda: both("string_agg({}, '{}' ORDER BY n)", self.some_text(READINGS, 1), self.pick(",", "")),
            lambda: both("array_agg({} ORDER BY n)", self.expression(READINGS, self.pick("int", "float", "text"), 1)),
        )()
        return both("SELECT device, {} AS x FROM readings WHERE n % 11 = {} GROUP BY device", made, self.random.randint(0, 10)), None

    def qualified(self):
        order = self.pick("ts DESC", "speed DESC NULLS LAST, n", "passed NULLS FIRST, n")
        return both("SELECT n, device, speed FROM readings{} QUALIFY row_number() OVER (PARTITION BY device ORDER BY {}) <= {}", self.where(READINGS), order, self.random.randint(1, 4)), None

    def counted_on(self):
        return both("WITH RECURSIVE days AS (SELECT TIMESTAMP '2024-03-01 00:00:00' AS day UNION ALL SELECT day + INTERVAL '1 day' FROM days WHERE day < TIMESTAMP '2024-03-{}') "
                    "SELECT day, {} AS x FROM days LEFT JOIN readings ON ts >= day AND ts < day + INTERVAL '1 day' GROUP BY day",
                    f"{self.random.randint(2, 28):02} 00:00:00", self.pick("count(n)", "sum(passed)", "max(speed)", "avg(speed)")), None

    def values(self):
        limits = ", ".join(f"('d{index}', {self.random.randint(10, 60)})" for index in range(4))
        return both("SELECT r.device, v.most, count(*) AS x, sum(r.passed) AS y FROM readings r JOIN (VALUES {}) AS v(device, most) "
                    "ON r.device = v.device WHERE r.speed > v.most GROUP BY 1, 2", limits), None
