use std::sync::atomic::Ordering;

use super::*;
use crate::catalog::TableState;
use crate::delta::tests::{rows, span, speed};
use crate::hot::HotSet;
use crate::store::unkind::Unkind;

const LIMIT: Duration = Duration::from_secs(30);

#[tokio::test(flavor = "multi_thread")]
async fn a_table_whose_store_hangs_holds_up_no_other() {
    let objects = Arc::new(Unkind::default());
    let store = Store::on_objects("memory:///tables/".parse().unwrap(), objects.clone());
    let catalogue = Arc::new(Catalogue::default());
    let show = |catalogue: &Catalogue, name: &StreamName, table: &DeltaTable| {
        let snapshot = table.snapshot();
        let hot = HotSet::new(snapshot.version);
        catalogue.replace(name, TableState { snapshot, hot });
    };
    // The one that hangs comes first, and is the neediest.
    for (name, commits) in [("a_stuck", 5), ("fine", 3)] {
        let name: StreamName = name.parse().unwrap();
        let mut table = DeltaTable::create(&store, &name, &speed()).await.unwrap();
        for seq in 1..=commits {
            table.commit(&[rows(1, seq, &speed())], &[span(1, seq, seq)]).await.unwrap();
        }
        show(&catalogue, &name, &table);
    }
    let settings = "data_dir = \"x\"\n[lake]\npatience = \"300ms\"\n[compact]\nmin_files = 2\n";
    let (settings, metrics) = (Settings::parse(settings).unwrap(), Arc::new(Metrics::default()));
    let shown = Arc::clone(&catalogue);
    let adopt: Adopt = Box::new(move |name, table| show(&shown, &name, &table));
    objects.hangs.store(true, Ordering::Relaxed);
    let maintenance = Maintenance::new(settings, store, Arc::clone(&catalogue), Arc::clone(&metrics), adopt);
    let files = |name: &str| catalogue.state(&name.parse().unwrap()).unwrap().snapshot.files.len();
    let watch = async {
        let started = Instant::now();
        // Files of three days, one each.
        while files("fine") > 3 {
            assert!(started.elapsed() < LIMIT, "{} files", files("fine"));
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    };
    tokio::select! {
        () = maintenance.run(CancellationToken::new()) => unreachable!("nobody stops it"),
        () = watch => {}
    }
    assert_eq!(files("a_stuck"), 15);
    assert!(metrics.maintenance_failed.get() >= 2, "neither its upkeep nor its merge was given up");
}

#[test]
fn what_was_given_up_for_silence_may_be_silent_for_longer_the_next_time() {
    let (mut backoff, second) = (Backoff::default(), Duration::from_secs(1));
    backoff.failed(&Failure::from("the store says no"), second);
    assert_eq!(backoff.patience(second), second);
    for times in [2, 4, 8, 16, 16] {
        backoff.failed(&Failure::from(Silent(second)), second);
        assert_eq!(backoff.patience(second), times * second);
    }
    backoff.silences = 40;
    assert_eq!(backoff.patience(second), 16 * second);
    assert!(backoff.waits());
}
