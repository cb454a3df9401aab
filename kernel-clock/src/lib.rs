//! Whether somebody keeps this machine's clock right: what the kernel was told by chronyd, ntpd, timesyncd, ptp4l, and all
//! others that discipline it. A clock that is set by hand, or that nobody has corrected for long, is not synchronised.

/// None where the kernel does not say.
#[cfg(target_os = "linux")]
#[allow(unsafe_code, reason = "adjtimex(2) is in none of the safe libraries that the agent has")]
pub fn is_synchronised() -> Option<bool> {
    // SAFETY: `timex` is plain numbers, of which all zero is one; with `modes` 0 the kernel changes nothing and only
    // writes into it.
    let (state, told) = unsafe {
        let mut told = std::mem::zeroed::<libc::timex>();
        (libc::adjtimex(&raw mut told), told)
    };
    (state >= 0).then_some(told.status & libc::STA_UNSYNC == 0)
}

/// None where the kernel does not say.
#[cfg(not(target_os = "linux"))]
pub fn is_synchronised() -> Option<bool> {
    None
}

#[cfg(all(test, target_os = "linux"))]
mod tests {
    use super::*;

    #[test]
    fn asking_changes_nothing() {
        let first = is_synchronised();
        assert!((0..100).all(|_| is_synchronised() == first));
    }
}
