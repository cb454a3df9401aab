//! The examples of `docs/sql-functions.md`: each statement gives the answer that stands below it.

use arrow::util::pretty::pretty_format_batches;

use super::*;

/// Blocks of a language, with the line that each begins in.
fn blocks(page: &str) -> Vec<(usize, &str, String)> {
    let mut blocks = Vec::new();
    let mut open: Option<(usize, &str, String)> = None;
    for (index, line) in page.lines().enumerate() {
        match (line.strip_prefix("```"), &mut open) {
            (Some(language), None) => open = Some((index + 1, language, String::new())),
            (Some(_), Some(_)) => blocks.extend(open.take()),
            (None, Some((_, _, text))) => {
                text.push_str(line);
                text.push('\n');
            }
            (None, None) => {}
        }
    }
    blocks
}

#[tokio::test]
async fn the_page_tells_the_truth() {
    let page = std::fs::read_to_string(concat!(env!("CARGO_MANIFEST_DIR"), "/../docs/sql-functions.md")).unwrap();
    let blocks = blocks(&page);
    let mut tables = Vec::new();
    let mut told = 0;
    let mut wrong = Vec::new();
    for (index, (line, language, text)) in blocks.iter().enumerate() {
        if *language != "sql" {
            continue;
        }
        let sql = text.trim().trim_end_matches(';');
        // The tables that the page begins with.
        if let Some(view) = sql.strip_prefix("CREATE VIEW ") {
            let (name, rows) = view.split_once(" AS\n").unwrap();
            tables.push((name, rows));
            continue;
        }
        let Some((_, "text", answer)) = blocks.get(index + 1) else {
            continue;
        };
        for partitions in [1, 7] {
            let session = session(partitions);
            for (name, rows) in &tables {
                let rows = batches(&session, rows).await.unwrap_or_else(|error| panic!("{name}: {error}"));
                let table = MemTable::try_new(rows[0].schema(), vec![rows]).unwrap();
                session.register_table(*name, Arc::new(table)).unwrap();
            }
            let rows = batches(&session, sql).await.unwrap_or_else(|error| panic!("line {line}: {error}"));
            let pretty = pretty_format_batches(&rows).unwrap().to_string();
            if pretty.trim() != answer.trim() {
                wrong.push(format!("line {line}, with {partitions} partitions, gave\n{pretty}"));
            }
        }
        told += 1;
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
    assert!(told >= 15, "{told} examples");
}
