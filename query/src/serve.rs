//! The doors: who may ask, and how answers leave.
//!
//! With no reader set, only callers on this machine may ask. With readers set, every door asks for name and password.

pub mod http;
pub mod postgres;

use std::net::IpAddr;
use std::sync::Arc;

use subtle::ConstantTimeEq;

/// Someone who may ask.
#[derive(Clone)]
pub struct Reader {
    pub name: String,
    pub password: String,
}

impl std::fmt::Debug for Reader {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Reader").field("name", &self.name).finish_non_exhaustive()
    }
}

/// All who may ask.
#[derive(Debug, Clone, Default)]
pub struct Readers(Arc<[Reader]>);

impl Readers {
    /// These readers; an empty list stands for callers on this machine.
    pub fn new(readers: Vec<Reader>) -> Self {
        Self(readers.into())
    }

    /// Whether name and password are asked for.
    pub fn are_set(&self) -> bool {
        !self.0.is_empty()
    }

    /// The reader of this name.
    pub fn find(&self, name: &str) -> Option<&Reader> {
        self.0.iter().find(|reader| reader.name == name)
    }

    /// Whether name and password are a reader's.
    pub fn accept(&self, name: &str, password: &str) -> bool {
        self.find(name).is_some_and(|reader| reader.password.as_bytes().ct_eq(password.as_bytes()).into())
    }

    /// Whether a caller may ask without a name: no reader is set, and it is on this machine.
    pub fn accept_unnamed(&self, peer: IpAddr) -> bool {
        !self.are_set() && peer.to_canonical().is_loopback()
    }
}
