//! The machine's own clocks.

use std::time::{SystemTime, UNIX_EPOCH};

use rand::Rng;
use rustix::time::{ClockId, clock_gettime};

use super::{BootId, Time};

#[cfg(target_os = "linux")]
const SINCE_BOOT: ClockId = ClockId::Boottime;
#[cfg(not(target_os = "linux"))]
const SINCE_BOOT: ClockId = ClockId::Monotonic;
const BOOT_FILE: &str = "/proc/sys/kernel/random/boot_id";

/// This machine.
#[derive(Debug)]
pub struct Machine {
    boot: BootId,
}

impl Machine {
    /// Where the kernel does not tell a boot from another, each run is one.
    #[allow(clippy::new_without_default, reason = "it reads a file")]
    pub fn new() -> Self {
        let told = std::fs::read_to_string(BOOT_FILE).ok().and_then(|text| read_id(&text));
        Self { boot: told.unwrap_or_else(|| rand::rng().random()) }
    }
}

/// As in `b5a6f5d0-7b0a-4a3c-9a2e-0f5b7f1f2d10`.
fn read_id(text: &str) -> Option<BootId> {
    let digits = text.trim().replace('-', "");
    u128::from_str_radix(&digits, 16).ok().filter(|_| digits.len() == 32).map(u128::to_be_bytes)
}

impl Time for Machine {
    fn monotonic_us(&self) -> i64 {
        let time = clock_gettime(SINCE_BOOT);
        time.tv_sec.saturating_mul(1_000_000).saturating_add(time.tv_nsec / 1_000)
    }

    fn wall_us(&self) -> i64 {
        let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        i64::try_from(since.as_micros()).unwrap_or(i64::MAX)
    }

    fn is_synchronised(&self) -> Option<bool> {
        kernel_clock::is_synchronised()
    }

    fn boot(&self) -> BootId {
        self.boot
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_boot_has_one_id_and_its_clock_goes_on() {
        let (one, two) = (Machine::new(), Machine::new());
        #[cfg(target_os = "linux")]
        assert_eq!(one.boot(), two.boot());
        let before = one.monotonic_us();
        assert!(before > 0 && two.monotonic_us() >= before);
        assert!(one.wall_us() > super::super::EARLIEST_US, "the clock of the machine that tests this");
        let id = read_id("00000000-0000-0000-0000-0000000000ff\n").unwrap();
        assert_eq!(id[14..], [0, 255]);
        assert_eq!(read_id("ff"), None);
    }
}
