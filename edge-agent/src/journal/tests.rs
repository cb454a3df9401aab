use super::*;

fn entry(text: &str) -> Entry {
    Entry::Forgotten { client: text.to_owned() }
}

fn open(directory: &std::path::Path, max_bytes: u64) -> OpenJournal {
    let options = Options { segment_bytes: 8 << 10, max_bytes, reserve_bytes: 64 };
    OpenJournal::open(directory.join("journal"), options).unwrap().0
}

fn read_all(reader: &mut Reader<Disk>) -> Vec<Entry> {
    let mut entries = Vec::new();
    while let Some(record) = reader.next().unwrap() {
        entries.push(Entry::read(bytes::Bytes::copy_from_slice(record.payload)).unwrap());
    }
    entries
}

#[tokio::test]
async fn what_is_durable_is_read_back_in_order_after_a_restart() {
    let directory = tempfile::tempdir().unwrap();
    let journal = open(directory.path(), 1 << 20).run(Duration::from_millis(1), Arc::default()).unwrap();
    let (mut one, mut two) = (journal.sender(), journal.sender());
    for n in 0..200 {
        one.append(&entry(&format!("one {n}"))).await.unwrap();
        two.append(&entry(&format!("two {n}"))).await.unwrap();
    }
    one.durable().wait_for(|durable| *durable == 200).await.unwrap();
    two.durable().wait_for(|durable| *durable == 200).await.unwrap();
    let (_, _, syncs) = journal.bytes_and_syncs();
    assert!(syncs < 200, "{syncs} syncs for 400 entries: no group commit");
    journal.stop();
    let journal = open(directory.path(), 1 << 20);
    let entries = read_all(&mut journal.reader(Position(0)).unwrap());
    assert_eq!(entries.len(), 400);
    let of_one = entries.iter().filter(|e| matches!(e, Entry::Forgotten { client } if client.starts_with("one")));
    assert!(of_one.enumerate().all(|(n, e)| *e == entry(&format!("one {n}"))));
}

#[tokio::test]
async fn an_entry_that_comes_alone_waits_for_no_group_and_the_next_ones_share_a_sync() {
    let directory = tempfile::tempdir().unwrap();
    let journal = open(directory.path(), 1 << 20).run(Duration::from_secs(3_600), Arc::default()).unwrap();
    let mut sender = journal.sender();
    let mut durable = sender.durable();
    sender.append(&entry("alone")).await.unwrap();
    let alone = durable.wait_for(|durable| *durable == 1);
    tokio::time::timeout(Duration::from_secs(30), alone).await.expect("it waits for others").unwrap();
    for n in 0..100 {
        sender.append(&entry(&format!("{n}"))).await.unwrap();
    }
    journal.stop();
    assert_eq!(*durable.borrow(), 101);
    assert_eq!(journal.bytes_and_syncs().2, 2);
}

#[tokio::test]
async fn a_full_journal_makes_senders_wait_until_something_is_freed() {
    let directory = tempfile::tempdir().unwrap();
    let open = open(directory.path(), 16 << 10);
    let mut reader = open.reader(Position(0)).unwrap();
    let journal = open.run(Duration::from_millis(1), Arc::default()).unwrap();
    let mut sender = journal.sender();
    let text = "x".repeat(200);
    let mut sent = 0;
    while !journal.is_full() {
        match sender.try_append(&entry(&text)) {
            Ok(_) => sent += 1,
            Err(TryAppendError::Full) => {}
            Err(error) => panic!("{error}"),
        }
        tokio::task::yield_now().await;
    }
    assert_eq!(sender.try_append(&entry("refused")), Err(TryAppendError::Full));
    let durable = *sender.durable().borrow();
    assert!(durable < sent, "{durable} of {sent}");
    let mut read = read_all(&mut reader).len() as u64;
    assert_eq!(read, durable);
    let mut progress = sender.durable();
    while read < sent {
        progress.borrow_and_update();
        journal.free_before(reader.position());
        if read == *progress.borrow() {
            progress.changed().await.unwrap();
        }
        read += read_all(&mut reader).len() as u64;
    }
    assert_eq!(read, sent);
}
