//! Named places where a test ends the process, as `kill -9` would.
//!
//! `WEIR_FAILPOINT=compact.file` aborts at the first pass of that place, `compact.file@3` at the third. It is read once. A
//! release build has none of it. An abort runs no destructor and flushes nothing, so what is on disk is what a kill leaves.
//! The names are those of the crates that stand on this one.

/// Ends the process if this place was named.
#[cfg(debug_assertions)]
pub fn reach(name: &'static str) {
    use std::sync::LazyLock;
    use std::sync::atomic::{AtomicU64, Ordering};

    static WANTED: LazyLock<Option<(String, u64)>> = LazyLock::new(|| {
        let text = std::env::var("WEIR_FAILPOINT").ok()?;
        let (name, pass) = text.split_once('@').map_or((text.as_str(), 1), |(name, pass)| {
            (name, pass.parse().expect("WEIR_FAILPOINT is NAME or NAME@PASS"))
        });
        Some((name.to_owned(), pass))
    });
    static PASSES: AtomicU64 = AtomicU64::new(0);

    if let Some((wanted, pass)) = WANTED.as_ref()
        && wanted == name
        && PASSES.fetch_add(1, Ordering::Relaxed) + 1 == *pass
    {
        std::process::abort();
    }
}

/// Nothing, in a release build.
#[cfg(not(debug_assertions))]
pub fn reach(_: &'static str) {}
