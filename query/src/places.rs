//! Places for connections and for those who listen: so many at a time, and from one address at most half of them, so that nobody shuts out all others.
//! Addresses of this machine may have all: what forwards the connections of others stands there.

use std::collections::HashMap;
use std::net::IpAddr;
use std::sync::Arc;

use parking_lot::Mutex;

/// See the module.
#[derive(Debug, Clone)]
pub(crate) struct Places(Arc<Taken>);

#[derive(Debug)]
struct Taken {
    max: usize,
    held: Mutex<Held>,
}

#[derive(Debug, Default)]
struct Held {
    all: usize,
    by: HashMap<IpAddr, usize>,
}

/// A place; it is free again when this is dropped.
#[derive(Debug)]
pub(crate) struct Place {
    taken: Arc<Taken>,
    address: IpAddr,
}

impl Places {
    pub(crate) fn new(max: usize) -> Self {
        Self(Arc::new(Taken { max, held: Mutex::default() }))
    }

    /// A place for a connection from this address, when there is one.
    pub(crate) fn take(&self, address: IpAddr) -> Option<Place> {
        let address = address.to_canonical();
        let mut held = self.0.held.lock();
        let of_one = if address.is_loopback() { self.0.max } else { self.0.max.div_ceil(2) };
        let own = held.by.get(&address).copied().unwrap_or(0);
        if held.all >= self.0.max || own >= of_one {
            return None;
        }
        held.all += 1;
        held.by.insert(address, own + 1);
        Some(Place { taken: Arc::clone(&self.0), address })
    }

    /// How many are taken.
    pub(crate) fn taken(&self) -> usize {
        self.0.held.lock().all
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        let mut held = self.taken.held.lock();
        held.all -= 1;
        if let Some(own) = held.by.get_mut(&self.address) {
            *own -= 1;
            if *own == 0 {
                held.by.remove(&self.address);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_address_has_half_of_the_places_and_gives_them_back() {
        let places = Places::new(5);
        let take = |address: &str| places.take(address.parse().unwrap());
        let mut held: Vec<_> = (0..4).filter_map(|_| take("192.0.2.1")).collect();
        assert_eq!(held.len(), 3);
        assert!(take("::ffff:192.0.2.1").is_none(), "the same address in other words");
        held.extend([take("192.0.2.2").unwrap(), take("127.0.0.1").unwrap()]);
        assert!(take("192.0.2.3").is_none(), "there are no more");
        assert_eq!(places.taken(), 5);
        drop(held);
        assert_eq!(places.taken(), 0);
        let held: Vec<_> = (0..9).filter_map(|_| take("127.0.0.1")).collect();
        assert_eq!(held.len(), 5);
    }
}
