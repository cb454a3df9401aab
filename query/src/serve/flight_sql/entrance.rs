//! Who may come in: name and password by `authorization: Basic` with each call, or once for a token that stands for them.
//!
//! A token is 32 random bytes. It is forgotten when it was not used for [`TOKEN_IDLE_MAX`], when [`TOKENS_MAX`] younger
//! ones are there, or when the node ends; the caller then proves itself again.

use std::collections::HashMap;
use std::fmt;
use std::net::{IpAddr, Ipv4Addr};
use std::time::{Duration, Instant};

use parking_lot::Mutex;
use tonic::metadata::MetadataMap;
use tonic::{Request, Status};

use crate::as_of::AsOf;
use crate::caller::{Caller, Door};
use crate::serve::{Readers, basic};

const TOKEN_IDLE_MAX: Duration = Duration::from_secs(24 * 60 * 60);
const TOKENS_MAX: usize = 10_000;

#[derive(Debug)]
struct Held {
    reader: String,
    used: Instant,
}

/// See the module.
pub(super) struct Entrance {
    readers: Readers,
    tokens: Mutex<HashMap<String, Held>>,
}

impl fmt::Debug for Entrance {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Entrance").field("readers", &self.readers).finish_non_exhaustive()
    }
}

fn header<'a>(headers: &'a MetadataMap, name: &str) -> Option<&'a str> {
    headers.get(name).and_then(|value| value.to_str().ok())
}

impl Entrance {
    pub(super) fn new(readers: Readers) -> Self {
        Self { readers, tokens: Mutex::default() }
    }

    /// A token for who proves itself, by header or by what the handshake carried.
    pub(super) fn admit(
        &self,
        headers: &MetadataMap,
        peer: IpAddr,
        said: Option<(String, String)>,
    ) -> Result<String, Status> {
        let proof = header(headers, "authorization").and_then(basic).or(said);
        let reader = match proof {
            _ if self.readers.accept_unnamed(peer, Door::FlightSql).is_some() => String::new(),
            Some((name, password)) => match self.readers.accept(&name, &password) {
                Some(reader) => reader.name.clone(),
                None => return Err(self.refused()),
            },
            None => return Err(self.refused()),
        };
        let token: String = rand::random::<[u8; 32]>().iter().map(|byte| format!("{byte:02x}")).collect();
        let now = Instant::now();
        let mut tokens = self.tokens.lock();
        if tokens.len() >= TOKENS_MAX {
            tokens.retain(|_, held| now.duration_since(held.used) < TOKEN_IDLE_MAX);
        }
        if tokens.len() >= TOKENS_MAX {
            let oldest = tokens.iter().min_by_key(|(_, held)| held.used).map(|(token, _)| token.clone());
            oldest.map(|oldest| tokens.remove(&oldest));
        }
        tokens.insert(token.clone(), Held { reader, used: now });
        Ok(token)
    }

    /// Who makes a call.
    pub(super) fn caller<T>(&self, request: &Request<T>) -> Result<Caller, Status> {
        let peer = peer(request);
        let headers = request.metadata();
        let caller = match self.readers.accept_unnamed(peer, Door::FlightSql) {
            Some(caller) => caller,
            None => self.named(headers).ok_or_else(|| self.refused())?,
        };
        match header(headers, "x-weir-lane") {
            Some(lane) => caller.in_lane(lane).map_err(Status::permission_denied),
            None => Ok(caller),
        }
    }

    fn named(&self, headers: &MetadataMap) -> Option<Caller> {
        let proof = header(headers, "authorization")?;
        if let Some((name, password)) = basic(proof) {
            return self.readers.accept(&name, &password).map(|reader| reader.at(Door::FlightSql));
        }
        let token = proof.split_at_checked(7).filter(|(scheme, _)| scheme.eq_ignore_ascii_case("Bearer "))?.1;
        let mut tokens = self.tokens.lock();
        let held = tokens.get_mut(token).filter(|held| held.used.elapsed() < TOKEN_IDLE_MAX)?;
        held.used = Instant::now();
        self.readers.find(&held.reader).map(|reader| reader.at(Door::FlightSql))
    }

    fn refused(&self) -> Status {
        Status::unauthenticated(if self.readers.are_set() {
            "name and password of a reader are needed"
        } else {
            "no reader is set, so only this machine may ask: add a [[reader]] to the configuration"
        })
    }
}

/// Where a call comes from; who does not tell is a stranger.
pub(super) fn peer<T>(request: &Request<T>) -> IpAddr {
    request.remote_addr().map_or(IpAddr::V4(Ipv4Addr::UNSPECIFIED), |address| address.ip())
}

/// The time that a call asks as of.
pub(super) fn as_of<T>(request: &Request<T>) -> Result<Option<AsOf>, Status> {
    let wanted = header(request.metadata(), "x-weir-as-of").map(AsOf::parse).transpose();
    wanted.map_err(|error| Status::invalid_argument(error.to_string()))
}
