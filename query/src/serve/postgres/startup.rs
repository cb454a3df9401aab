//! Who may come in: SCRAM-SHA-256 when readers are set, otherwise callers on this machine.
//!
//! An unknown name goes through the same exchange with a password that nobody knows, so that names cannot be probed.

use std::fmt::Debug;
use std::sync::Arc;

use async_trait::async_trait;
use futures::Sink;
use pgwire::api::auth::noop::NoopStartupHandler;
use pgwire::api::auth::sasl::SASLAuthStartupHandler;
use pgwire::api::auth::sasl::scram::{SCRAM_ITERATIONS, ScramAuth, gen_salted_password};
use pgwire::api::auth::{AuthSource, DefaultServerParameterProvider, LoginInfo, Password, StartupHandler};
use pgwire::api::{ClientInfo, ConnectionManager};
use pgwire::error::{PgWireError, PgWireResult};
use pgwire::messages::{PgWireBackendMessage, PgWireFrontendMessage};

use super::refusal;
use crate::caller::Door;
use crate::serve::Readers;

pub(super) struct Startup {
    readers: Readers,
    needs_tls: bool,
    trust: Trust,
    scram: SASLAuthStartupHandler<DefaultServerParameterProvider>,
}

impl Startup {
    pub(super) fn new(readers: Readers, needs_tls: bool, manager: Arc<ConnectionManager>) -> Self {
        let mut scram = ScramAuth::new(Arc::new(Passwords(readers.clone())));
        scram.set_iterations(SCRAM_ITERATIONS);
        let scram = SASLAuthStartupHandler::new(Arc::new(DefaultServerParameterProvider::default()))
            .with_scram(scram)
            .with_connection_manager(Arc::clone(&manager));
        Self { readers, needs_tls, trust: Trust(manager), scram }
    }
}

#[async_trait]
impl StartupHandler for Startup {
    async fn on_startup<C>(&self, client: &mut C, message: PgWireFrontendMessage) -> PgWireResult<()>
    where
        C: ClientInfo + Sink<PgWireBackendMessage> + Unpin + Send + Sync,
        C::Error: Debug,
        PgWireError: From<<C as Sink<PgWireBackendMessage>>::Error>,
    {
        if self.needs_tls && !client.is_secure() {
            return Err(refusal("FATAL", "28000", "this door speaks TLS only: sslmode=require, or verify-full"));
        }
        if self.readers.are_set() {
            return self.scram.on_startup(client, message).await;
        }
        if self.readers.accept_unnamed(client.socket_addr().ip(), Door::Postgres).is_none() {
            let message = "no reader is set, so only this machine may ask: add a [[reader]] to the configuration";
            return Err(refusal("FATAL", "28000", message));
        }
        self.trust.on_startup(client, message).await
    }
}

/// Lets in without a proof; asked only once the caller is known to be on this machine.
struct Trust(Arc<ConnectionManager>);

impl NoopStartupHandler for Trust {
    fn connection_manager(&self) -> Option<Arc<ConnectionManager>> {
        Some(Arc::clone(&self.0))
    }
}

#[derive(Debug)]
struct Passwords(Readers);

#[async_trait]
impl AuthSource for Passwords {
    async fn get_password(&self, login: &LoginInfo) -> PgWireResult<Password> {
        let salt = rand::random::<[u8; 16]>().to_vec();
        let salted = match login.user().and_then(|name| self.0.find(name)) {
            Some(reader) => gen_salted_password(&reader.password, &salt, SCRAM_ITERATIONS),
            None => rand::random::<[u8; 32]>().to_vec(),
        };
        Ok(Password::new(Some(salt), salted))
    }
}
