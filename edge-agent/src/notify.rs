//! Tells systemd that the agent runs, goes on, and stops: datagrams to the socket that `NOTIFY_SOCKET` names
//! (sd_notify(3)), without its library. Without the variable there is nobody to tell.
//!
//! The watchdog (`WatchdogSec=` of the unit) is answered only while the engine goes on, so that an agent which stands still
//! is started again. What cannot be sent is passed over: systemd then sees what it must see, that nothing comes.

use std::convert::Infallible;
use std::ffi::OsStr;
use std::io;
use std::os::linux::net::SocketAddrExt;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::net::{SocketAddr, UnixDatagram};
use std::time::Duration;

/// Who is told, and how often it waits to hear.
#[derive(Debug)]
pub struct Notifier {
    socket: UnixDatagram,
    address: SocketAddr,
    watchdog: Option<Duration>,
}

impl Notifier {
    /// As the environment says; None when nobody asked to be told.
    pub fn from_environment() -> Option<Self> {
        let address = std::env::var_os("NOTIFY_SOCKET")?;
        let number = |name: &str| std::env::var(name).ok()?.parse::<u64>().ok();
        // A variable that is meant for another process may have been passed on.
        let own = number("WATCHDOG_PID").is_none_or(|pid| pid == u64::from(std::process::id()));
        let watchdog = number("WATCHDOG_USEC").filter(|us| own && *us > 0).map(Duration::from_micros);
        let told = Self::new(&address, watchdog);
        told.inspect_err(|error| tracing::warn!(%error, ?address, "systemd cannot be told")).ok()
    }

    /// `address`: a path, or `@` and a name without one. `watchdog`: how long systemd waits for the next sign of life.
    ///
    /// # Errors
    /// When it is no address of a socket.
    pub fn new(address: &OsStr, watchdog: Option<Duration>) -> io::Result<Self> {
        let address = match address.as_bytes() {
            [b'@', name @ ..] => SocketAddr::from_abstract_name(name)?,
            _ => SocketAddr::from_pathname(address)?,
        };
        Ok(Self { socket: UnixDatagram::unbound()?, address, watchdog })
    }

    /// The start is over.
    pub fn ready(&self) {
        self.tell("READY=1");
    }

    /// The stop has begun.
    pub fn stopping(&self) {
        self.tell("STOPPING=1");
    }

    /// Answers the watchdog as long as `beats` gives other numbers; never ends.
    pub async fn watch(&self, beats: impl Fn() -> u64) -> Infallible {
        let Some(within) = self.watchdog else { return std::future::pending().await };
        let mut before = None;
        loop {
            self.answer(&mut before, beats());
            tokio::time::sleep(within / 4).await;
        }
    }

    fn answer(&self, before: &mut Option<u64>, now: u64) {
        if before.replace(now) != Some(now) {
            self.tell("WATCHDOG=1");
        }
    }

    fn tell(&self, what: &str) {
        if let Err(error) = self.socket.send_to_addr(what.as_bytes(), &self.address) {
            tracing::warn!(%error, what, "systemd was not told");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn told(socket: &UnixDatagram) -> String {
        let mut bytes = [0; 64];
        let len = socket.recv(&mut bytes).unwrap();
        String::from_utf8(bytes[..len].to_vec()).unwrap()
    }

    #[test]
    fn systemd_is_told_at_a_path_and_at_an_abstract_name() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("notify");
        let name = format!("weir-notify-{}", std::process::id());
        let at_path = (UnixDatagram::bind(&path).unwrap(), path.clone().into_os_string());
        let abstract_name = SocketAddr::from_abstract_name(&name).unwrap();
        let at_name = (UnixDatagram::bind_addr(&abstract_name).unwrap(), format!("@{name}").into());
        for (socket, address) in [at_path, at_name] {
            let notifier = Notifier::new(&address, None).unwrap();
            notifier.ready();
            notifier.stopping();
            assert_eq!((told(&socket), told(&socket)), ("READY=1".into(), "STOPPING=1".into()));
        }
        // Nobody listens any more: nothing happens.
        Notifier::new(path.as_os_str(), None).unwrap().ready();
    }

    #[test]
    fn the_watchdog_is_answered_only_while_the_engine_goes_on() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("notify");
        let socket = UnixDatagram::bind(&path).unwrap();
        socket.set_nonblocking(true).unwrap();
        let notifier = Notifier::new(path.as_os_str(), None).unwrap();
        let mut before = None;
        for (beat, expected) in [(7, 1), (8, 1), (8, 0), (8, 0), (20, 1), (20, 0)] {
            notifier.answer(&mut before, beat);
            let heard = std::iter::from_fn(|| socket.recv(&mut [0; 64]).ok()).count();
            assert_eq!(heard, expected, "at {beat}");
        }
    }
}
