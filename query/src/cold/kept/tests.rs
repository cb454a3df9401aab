use datafusion::parquet::basic::Encoding;

use super::*;

fn place(offset: i64) -> Place {
    Place { file: Arc::from("a"), part: Part::Page(offset) }
}

fn page(bytes: usize) -> Kept {
    let buf = Bytes::from(vec![0; bytes - ENTRY_BYTES]);
    Kept::Page(Page::DictionaryPage { buf, num_values: 1, encoding: Encoding::PLAIN, is_sorted: false })
}

fn bytes(kept: &KeptPages) -> usize {
    let halves = kept.halves.lock();
    let pages = halves.young.values().chain(halves.old.values());
    pages.map(Kept::bytes).sum()
}

#[test]
fn what_is_not_asked_for_goes_and_no_more_is_kept_than_may_be() {
    let kept = KeptPages::new(10_000);
    for offset in 0..1_000 {
        kept.put(&place(offset), page(1_000));
        assert!(bytes(&kept) <= 10_000);
        // The first is asked for again and again.
        assert!(kept.get(&place(0)).is_some(), "{offset}");
        assert!(kept.get(&place(offset)).is_some(), "{offset}");
    }
    assert!(kept.get(&place(1)).is_none());
    assert!(kept.get(&place(998)).is_some());
    kept.put(&place(-1), page(5_001));
    assert!(kept.get(&place(-1)).is_none(), "a page that would take half of it");
    // The same page twice is one.
    for _ in 0..100 {
        kept.put(&place(999), page(1_000));
    }
    assert!(kept.get(&place(998)).is_some());
    assert!(bytes(&kept) <= 10_000);
}

#[test]
fn the_rows_of_a_selection() {
    let selection = RowSelection::from_consecutive_ranges([3..5, 5..6, 9..10].into_iter(), 20);
    assert_eq!(ranges(&selection), [3..6, 9..10]);
    assert_eq!(pieces(&selection), iter::once(3..10).collect::<Vec<_>>());
    let selection = RowSelection::from_consecutive_ranges([300..500, 900..1_000].into_iter(), 2_000);
    assert_eq!(pieces(&selection), [300..500, 900..1_000]);
}
