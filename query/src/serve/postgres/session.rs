//! What a connection is between its statements: who asks, and the place in the lane that its statements share.
//!
//! Statements of one connection that are open at a time (portals that are read in pieces) share one place: they would wait
//! for each other otherwise.

use std::sync::{Arc, Weak};

use parking_lot::Mutex;
use pgwire::api::{ClientInfo, METADATA_USER};
use pgwire::error::PgWireResult;

use super::{refusal, sql_error};
use crate::caller::{Caller, Door};
use crate::engine::Engine;
use crate::lanes::Place;
use crate::serve::Readers;
use crate::statements::Running;

/// See the module.
#[derive(Debug)]
pub(super) struct Session {
    caller: Mutex<Caller>,
    place: Mutex<Weak<Place>>,
}

impl Session {
    /// That of a client that has come in.
    pub(super) fn of<C: ClientInfo>(client: &C, readers: &Readers) -> PgWireResult<Arc<Self>> {
        if let Some(session) = client.session_extensions().get::<Self>() {
            return Ok(session);
        }
        let reader = client.metadata().get(METADATA_USER).and_then(|name| readers.find(name));
        // The name is proven: start-up lets no one else through.
        let caller = match reader {
            Some(reader) => Some(reader.at(Door::Postgres)),
            None => readers.accept_unnamed(client.socket_addr().ip(), Door::Postgres),
        };
        let caller = caller.ok_or_else(|| refusal("FATAL", "28000", "no reader has this name"))?;
        let session = || Self { caller: Mutex::new(caller), place: Mutex::default() };
        Ok(client.session_extensions().get_or_insert_with(session))
    }

    /// The lane of its next statements.
    pub(super) fn lane(&self) -> String {
        self.caller.lock().lane().to_owned()
    }

    /// Its next statements run in this lane.
    pub(super) fn change_lane(&self, lane: &str) -> PgWireResult<()> {
        let mut caller = self.caller.lock();
        *caller = caller.in_lane(lane).map_err(|message| refusal("ERROR", "42501", message))?;
        *self.place.lock() = Weak::new();
        Ok(())
    }

    /// A statement begins, in the connection's place or when there is one.
    pub(super) async fn begin(&self, engine: &Engine, text: &str) -> PgWireResult<Arc<Running>> {
        let caller = self.caller.lock().clone();
        let own = self.place.lock().upgrade();
        let place = match own {
            Some(place) => place,
            None => engine.enter(&caller).await.map_err(|error| sql_error(&error))?,
        };
        *self.place.lock() = Arc::downgrade(&place);
        Ok(engine.begin(&caller, &place, text))
    }
}
