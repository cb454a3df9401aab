//! What one statement may take: time, memory, rows, and how it is ended.

use tokio::time::Instant;

use super::*;

/// Ten thousand million rows, none of which is kept.
const HEAVY: &str = "SELECT count(*) FROM generate_series(1, 100000) AS a(v), generate_series(1, 100000) AS b(w) \
                     WHERE a.v + b.w = -1";

#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn a_heavy_statement_ends_in_time_and_holds_up_nobody() {
    let (engine, _) = engine(4, 0, Duration::from_millis(500)).await;
    let ticks = Arc::new(AtomicUsize::new(0));
    let counting = Arc::clone(&ticks);
    let ticker = tokio::spawn(async move {
        loop {
            tokio::time::sleep(Duration::from_millis(10)).await;
            counting.fetch_add(1, Ordering::Relaxed);
        }
    });
    let started = Instant::now();
    let error = engine.rows(HEAVY).await.unwrap_err();
    let took = started.elapsed();
    ticker.abort();
    assert!(matches!(error, QueryError::Timeout { .. }), "{error}");
    assert!(took < Duration::from_secs(2), "{took:?}");
    // The doors share this thread: it was free to count.
    assert!(ticks.load(Ordering::Relaxed) > 20, "{ticks:?} ticks in {took:?}");
}

#[tokio::test]
async fn a_statement_that_is_hard_to_plan_ends_in_time() {
    let (engine, traffic) = engine(1, 0, Duration::from_millis(300)).await;
    traffic.hold_ms.store(3_000, Ordering::SeqCst);
    let started = Instant::now();
    let error = engine.rows("SELECT count(*) FROM traffic").await.unwrap_err();
    let took = started.elapsed();
    assert!(matches!(error, QueryError::Timeout { .. }), "{error}");
    assert!(took < Duration::from_secs(2), "{took:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn what_planning_took_is_missing_when_the_rows_are_computed() {
    let (engine, _) = engine(1, 0, Duration::from_millis(300)).await;
    let running = begin(&engine).await;
    let prepared = engine.prepare(&running, HEAVY, None).await.unwrap();
    tokio::time::sleep_until(running.deadline()).await;
    let error = match engine.execute(&running, &prepared, None).await {
        Err(error) => error,
        // It began before anyone looked at the clock: then its rows are late.
        Ok(mut rows) => engine.explain(rows.next().await.unwrap().unwrap_err()),
    };
    assert!(matches!(error, QueryError::Timeout { .. }), "{error}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn a_dropped_result_ends_its_statement() {
    let (engine, _) = engine(4, 0, MINUTE).await;
    for _ in 0..8 {
        let running = begin(&engine).await;
        let prepared = engine.prepare(&running, HEAVY, None).await.unwrap();
        let stream = engine.execute(&running, &prepared, None).await.unwrap();
        drop(stream);
    }
    // Eight that ran on would hold all threads for minutes.
    let started = Instant::now();
    engine.rows("SELECT count(*) FROM generate_series(1, 1000)").await.unwrap();
    assert!(started.elapsed() < Duration::from_secs(10), "{:?}", started.elapsed());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_reader_that_stops_reading_gets_no_more_time_and_no_silent_end() {
    let (engine, _) = engine(4, 0, Duration::from_millis(400)).await;
    let running = begin(&engine).await;
    let prepared = engine.prepare(&running, "SELECT v FROM generate_series(1, 100000000) AS a(v)", None).await.unwrap();
    let mut stream = engine.execute(&running, &prepared, None).await.unwrap();
    assert!(stream.next().await.unwrap().is_ok());
    let started = Instant::now();
    let mut last = None;
    while let Some(item) = stream.next().await {
        last = Some(item.map(|_| ()));
        // A slow reader; rows are always ready for it.
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    assert!(started.elapsed() < Duration::from_secs(2), "{:?}", started.elapsed());
    let error = engine.explain(last.unwrap().unwrap_err());
    assert!(matches!(error, QueryError::Timeout { .. }), "{error}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_statement_whose_rows_nobody_takes_is_over_with_its_time_and_by_a_word() {
    for (timeout, word, expected) in [(Duration::from_secs(2), false, "failed"), (MINUTE, true, "cancelled")] {
        let (engine, _) = engine(4, 0, timeout).await;
        let running = begin(&engine).await;
        let prepared =
            engine.prepare(&running, "SELECT v FROM generate_series(1, 100000000) AS a(v)", None).await.unwrap();
        let mut stream = engine.execute(&running, &prepared, None).await.unwrap();
        assert!(stream.next().await.unwrap().is_ok());
        if word {
            assert!(engine.cancel(running.id(), &Caller::node()));
        }
        let started = Instant::now();
        let ended = format!("SELECT count(*) FROM system.queries WHERE id = {} AND state = '{expected}'", running.id());
        while integer_as(&engine, &Caller::node(), &ended).await == 0 || running.place().is_some() {
            assert!(started.elapsed() < Duration::from_secs(20), "it is not {expected}, or keeps its place");
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
        // Whoever reads on hears of it.
        let error = engine.explain(stream.next().await.unwrap().unwrap_err());
        assert_eq!(matches!(error, QueryError::Cancelled), word, "{error}");
        assert_eq!(matches!(error, QueryError::Timeout { .. }), !word, "{error}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_long_chain_ends_no_process() {
    let (engine, _) = engine(1, 0, MINUTE).await;
    let chain = |terms: usize, term: &str| format!("SELECT 1 {}", term.repeat(terms));
    // The longest that is planned. To be freed, too, on the small stack of this thread.
    engine.prepare(&begin(&engine).await, &chain(4_990, "+ 1 "), None).await.unwrap();
    engine.prepare(&begin(&engine).await, &chain(2_400, ":: int "), None).await.unwrap();
    engine.prepare(&begin(&engine).await, &chain(1_600, "UNION ALL SELECT 1 "), None).await.unwrap();
    for sql in
        [chain(500_000, "+1"), chain(5_000, "+ 1"), chain(40_000, "UNION ALL SELECT 1 "), chain(9_000, ":: int ")]
    {
        let error = engine.prepare(&begin(&engine).await, &sql, None).await.unwrap_err();
        assert!(error.to_string().contains("words and operators"), "{error}");
    }
    let long_list = format!("SELECT count(*) FROM traffic WHERE vehicle_count IN (0{})", ", 1".repeat(20_000));
    assert_eq!(numbers(&engine, &long_list).await, [2]);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_statement_has_limits_of_its_own() {
    let traffic = Traffic::new(10, 0).await;
    let lane =
        |name: &str, memory_bytes_max| LaneSettings { name: name.into(), memory_bytes_max, ..LaneSettings::default() };
    let settings = EngineSettings {
        result_rows_max: 1_000,
        result_bytes_max: 1 << 20,
        lanes: vec![lane("default", 1 << 20), lane("wide", 512 << 20), lane("narrow", 24 << 20)],
        ..EngineSettings::default()
    };
    let engine = Engine::new(Arc::new(Handle(traffic)), settings).unwrap();
    let long = engine.rows("SELECT v FROM generate_series(1, 1001) AS a(v)").await.unwrap_err();
    assert!(matches!(long, QueryError::TooMuch { .. }), "{long}");
    let wide = engine.rows("SELECT repeat('x', 3000) FROM generate_series(1, 900)").await.unwrap_err();
    assert!(matches!(wide, QueryError::TooMuch { .. }), "{wide}");
    let hungry = "SELECT count(l) FROM (SELECT array_agg(a.v) AS l FROM generate_series(1, 2000000) AS a(v))";
    let memory = engine.rows(hungry).await.unwrap_err();
    assert!(matches!(memory, QueryError::Memory { .. }), "{memory:?}");
    // Sorting spills.
    let sort = "SELECT CAST(max(r) AS BIGINT) FROM (SELECT row_number() OVER (ORDER BY v DESC) AS r FROM generate_series(1, 300000) AS a(v))";
    let lanes: Arc<[String]> = Arc::new(["wide".to_owned()]);
    let roomy = Caller::new("roomy", Door::Http, None, lanes);
    assert_eq!(integer_as(&engine, &roomy, sort).await, 300_000);
    // Sorts side by side, far beyond what they have together.
    let many = "SELECT CAST(sum(r) AS BIGINT) FROM (SELECT row_number() OVER (PARTITION BY v % 7 ORDER BY v * 7919 % 1000003) AS r \
                FROM generate_series(1, 3000000) AS a(v))";
    let narrow = Caller::new("narrow", Door::Http, None, Arc::new(["narrow".to_owned()]));
    assert_eq!(integer_as(&engine, &narrow, many).await, 642_858_642_858);
    let told = text_as(&engine, &Caller::node(), "SELECT state, lane FROM system.queries WHERE memory_bytes > 0").await;
    assert!(told.contains("failed") && told.contains("wide"), "{told}");
}

#[tokio::test(flavor = "multi_thread")]
async fn what_does_not_fit_into_memory_lies_in_the_directory_that_was_named() {
    let directory = std::env::temp_dir().join(format!("weir-spill-{:032x}", rand::random::<u128>()));
    let settings = EngineSettings { spill_directory: Some(directory.clone()), ..EngineSettings::default() };
    let engine = Engine::new(Arc::new(Handle(Traffic::new(1, 0).await)), settings).unwrap();
    let file = engine.session().runtime_env().disk_manager.create_tmp_file("a sort").unwrap();
    assert!(file.path().is_some_and(|path| path.starts_with(&directory)), "{:?}", file.path());
    drop(file);
    std::fs::remove_dir_all(&directory).unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn memory_that_nobody_counts_is_not_offered() {
    let (engine, _traffic) = engine(1, 0, MINUTE).await;
    for (sql, words) in [
        ("SELECT array_agg(v) OVER () FROM generate_series(1, 1000000) AS a(v)", "window function"),
        ("SELECT string_agg(device, ',') OVER (ORDER BY ts) FROM traffic", "window function"),
        ("SELECT histogram(vehicle_count, 0, 1, 10000) OVER () FROM traffic", "window function"),
        ("SELECT (SELECT length(repeat('x', 2000000000)))", "more than"),
        ("SELECT lpad('x', CAST(4000000000 AS BIGINT))", "more than"),
        ("SELECT range(1, 100000000000)", "more than"),
        ("SELECT repeat(device, vehicle_count * 1000000000) FROM traffic", "constant"),
    ] {
        let error = engine.rows(sql).await.unwrap_err();
        assert!(error.to_string().contains(words), "{sql}: {error}");
    }
    assert_eq!(numbers(&engine, "SELECT CAST(length(repeat('ab', 500)) AS BIGINT)").await, [1_000]);
    assert_eq!(numbers(&engine, "SELECT count(*) FROM (SELECT unnest(range(0, 1000)))").await, [1_000]);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_statement_is_cancelled_by_its_id() {
    let (engine, _traffic) = engine(1, 0, MINUTE).await;
    let running = begin(&engine).await;
    let prepared = engine.prepare(&running, HEAVY, None).await.unwrap();
    let mut rows = engine.execute(&running, &prepared, None).await.unwrap();
    let seen = "SELECT id FROM system.queries WHERE state = 'running' AND text = 'a statement' ORDER BY id LIMIT 1";
    assert_eq!(integer_as(&engine, &Caller::node(), seen).await, running.id() as i64);
    assert!(!engine.cancel(running.id(), &reader(None, None)));
    assert!(engine.cancel(running.id(), &Caller::node()));
    let error = engine.explain(rows.next().await.unwrap().unwrap_err());
    assert!(matches!(error, QueryError::Cancelled), "{error}");
    drop((rows, running));
    let ended = "SELECT count(*) FROM system.queries WHERE state = 'cancelled'";
    assert_eq!(integer_as(&engine, &Caller::node(), ended).await, 1);
}
