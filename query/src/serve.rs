//! The doors: who may ask, and how answers leave.
//!
//! With no reader set, only callers on this machine may ask. With readers set, every door asks for name and password. Each
//! door speaks TLS when a certificate is set, and then nothing else.

pub mod alerts;
pub mod flight_sql;
pub mod http;
pub mod links;
pub mod postgres;
pub mod tls;
pub mod views;

use std::net::IpAddr;
use std::sync::Arc;

use subtle::ConstantTimeEq;
use tokio_rustls::rustls::ServerConfig;

use crate::caller::{Caller, Door, Right};
use crate::engine::Engine;
use crate::scope::Scope;

/// Who asks without a name.
const UNNAMED: &str = "local";

/// What every door stands on.
#[derive(Debug, Clone)]
pub struct House {
    pub engine: Arc<Engine>,
    pub readers: Readers,
    /// With it, the door speaks TLS only.
    pub tls: Option<Arc<ServerConfig>>,
    /// Connections at one time; one more is closed at once.
    pub connections_max: usize,
}

/// Someone who may ask.
#[derive(Clone)]
pub struct Reader {
    pub name: String,
    pub password: String,
    /// What it may see; everything when there is none.
    pub scope: Option<Arc<Scope>>,
    /// The lanes that it may use, its own first.
    pub lanes: Arc<[String]>,
    /// What it may do beside asking.
    pub rights: Arc<[Right]>,
}

impl std::fmt::Debug for Reader {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Reader").field("name", &self.name).finish_non_exhaustive()
    }
}

impl Reader {
    /// This reader at a door.
    pub fn at(&self, door: Door) -> Caller {
        let caller = Caller::new(&self.name, door, self.scope.clone(), Arc::clone(&self.lanes));
        caller.with_rights(Arc::clone(&self.rights))
    }
}

/// All who may ask.
#[derive(Debug, Clone, Default)]
pub struct Readers {
    readers: Arc<[Reader]>,
    /// The lanes of callers on this machine.
    lanes: Arc<[String]>,
}

impl Readers {
    /// These readers; an empty list stands for callers on this machine, who may use these lanes.
    pub fn new(readers: Vec<Reader>, lanes: Vec<String>) -> Self {
        Self { readers: readers.into(), lanes: lanes.into() }
    }

    /// Whether name and password are asked for.
    pub fn are_set(&self) -> bool {
        !self.readers.is_empty()
    }

    /// The reader of this name.
    pub fn find(&self, name: &str) -> Option<&Reader> {
        self.readers.iter().find(|reader| reader.name == name)
    }

    /// The reader whose name and password these are.
    pub fn accept(&self, name: &str, password: &str) -> Option<&Reader> {
        self.find(name).filter(|reader| reader.password.as_bytes().ct_eq(password.as_bytes()).into())
    }

    /// A caller without a name: when no reader is set, and it is on this machine.
    pub fn accept_unnamed(&self, peer: IpAddr, door: Door) -> Option<Caller> {
        let local = !self.are_set() && peer.to_canonical().is_loopback();
        // Whoever is on the machine of a node without readers keeps it.
        local.then(|| Caller::new(UNNAMED, door, None, Arc::clone(&self.lanes)).with_rights(Arc::new(Right::ALL)))
    }
}
