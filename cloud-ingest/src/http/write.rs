//! The doors for senders without an agent: Influx line protocol (`POST /write`, `POST /api/v2/write`) and OTLP metrics
//! (`POST /v1/metrics`), and what Telegraf and the clients of InfluxDB ask before they write (`/ping`, `/query`).
//!
//! Who may write is who is an `[[edge]]`: its token as `Authorization: Token …` or `Bearer …`, or its id and token as name
//! and password (HTTP Basic, or `u` and `p`). The answer is 204 (OTLP: 200) when all rows are durable and to be seen, not
//! before. Lines that are no rows are answered 400 with the number of the first, when the others are durable: they are rows
//! of `quarantine`. What cannot be taken now is answered 429 or 503 with `Retry-After`, and nothing of it is there; a sender
//! that sends it again, after that or after an answer that was lost, stores it once ([`crate::repeats`]).

use std::io::Read;
use std::sync::Arc;

use axum::Router;
use axum::body::{Body, Bytes};
use axum::http::{HeaderMap, HeaderName, HeaderValue, StatusCode, header};
use axum::response::Response;
use axum::routing::{get, post};
use flate2::read::MultiGzDecoder;
use subtle::{Choice, ConstantTimeEq};
use tokio::sync::oneshot;
use wire::line::Precision;
use wire::{EdgeId, RefusedRequest};

use super::{Door, ROOM_UNIT, length, on_a_thread, room, whole};
use crate::doors::rows::{Gathered, Gathering, RowsError};
use crate::doors::{self, Told};
use crate::ingest::write::{Writing, Written};
use crate::ingest::{Job, RETRY_AFTER_MS};
use crate::metrics::Tally;
use crate::repeats::WriteId;

mod influx;
mod otlp;

/// Rows may take so many times their text, and so much at least and at most.
const ROWS_TIMES: usize = 16;
const ROWS_BYTES: std::ops::RangeInclusive<usize> = 1 << 20..=64 << 20;

/// The routes.
pub(super) fn routes() -> Router<Arc<Door>> {
    Router::new()
        .route("/write", post(influx::write_v1))
        .route("/api/v2/write", post(influx::write_v2))
        .route("/v1/metrics", post(otlp::metrics))
        .route("/ping", get(influx::ping).head(influx::ping))
        .route("/query", get(influx::query).post(influx::query))
}

/// Why a request of these doors is not taken.
#[derive(Debug, thiserror::Error)]
enum Refused {
    #[error("no edge has this token: add an [[edge]] to the configuration of Weir, and send its token")]
    Unauthorized,
    #[error("{0}")]
    Wrong(String),
    #[error("a body is sent as it is or as gzip, not as `{0}`")]
    Encoding(String),
    #[error("{0}")]
    TooLarge(String),
    #[error("{0}; try again")]
    Later(String),
}

impl Refused {
    fn status(&self) -> StatusCode {
        match self {
            Self::Unauthorized => StatusCode::UNAUTHORIZED,
            Self::Wrong(_) => StatusCode::BAD_REQUEST,
            Self::Encoding(_) => StatusCode::UNSUPPORTED_MEDIA_TYPE,
            Self::TooLarge(_) => StatusCode::PAYLOAD_TOO_LARGE,
            Self::Later(_) => StatusCode::TOO_MANY_REQUESTS,
        }
    }

    /// InfluxDB's word for it, and ours in `/metrics`.
    fn code(&self) -> (&'static str, &'static str) {
        match self {
            Self::Unauthorized => ("unauthorized", "unauthorized"),
            Self::Wrong(_) => ("invalid", "damaged"),
            Self::Encoding(_) => ("invalid", "encoding_unknown"),
            Self::TooLarge(_) => ("request too large", "too_large"),
            Self::Later(_) => ("too many requests", "pushed_back"),
        }
    }
}

impl From<RefusedRequest> for Refused {
    fn from(refused: RefusedRequest) -> Self {
        match refused {
            RefusedRequest::TooLarge { .. } => Self::TooLarge(refused.to_string()),
            RefusedRequest::Damaged { detail } => Self::Wrong(detail),
            other => Self::Later(other.to_string()),
        }
    }
}

impl From<RowsError> for Refused {
    fn from(error: RowsError) -> Self {
        match error {
            RowsError::Cut(_) => Self::Wrong(error.to_string()),
            _ => Self::TooLarge(error.to_string()),
        }
    }
}

/// What the address says.
#[derive(Debug, Default)]
struct Parameters {
    precision: Option<String>,
    /// Database and retention policy, or organisation and bucket: told in `quarantine`.
    place: String,
    user: Option<String>,
    password: Option<String>,
}

impl Parameters {
    fn read(query: Option<&str>) -> Self {
        let mut read = Self::default();
        for (name, value) in url::form_urlencoded::parse(query.unwrap_or_default().as_bytes()) {
            match &*name {
                "precision" => read.precision = Some(value.into_owned()),
                "u" => read.user = Some(value.into_owned()),
                "p" => read.password = Some(value.into_owned()),
                "db" | "rp" | "org" | "bucket" if !value.is_empty() => {
                    let separator = if read.place.is_empty() { "" } else { "/" };
                    read.place.push_str(separator);
                    read.place.extend(value.chars().take(200));
                }
                _ => {}
            }
        }
        read
    }

    fn precision(&self) -> Result<Precision, Refused> {
        match self.precision.as_deref() {
            None | Some("" | "ns" | "n") => Ok(Precision::Ns),
            Some("us" | "u" | "µ" | "µs") => Ok(Precision::Us),
            Some("ms") => Ok(Precision::Ms),
            Some("s") => Ok(Precision::S),
            Some(other) => {
                let other: String = other.chars().take(20).collect();
                Err(Refused::Wrong(format!("precision `{other}` is not known: ns, us, ms or s")))
            }
        }
    }
}

/// Whose request this is. Every token is compared, and each in constant time.
fn sender(door: &Door, headers: &HeaderMap, parameters: &Parameters) -> Result<EdgeId, Refused> {
    let value = headers.get(header::AUTHORIZATION).and_then(|value| value.to_str().ok());
    let named = match value {
        Some(value) => wire::basic::credentials(value),
        None => parameters.user.clone().zip(parameters.password.clone()),
    };
    let scheme = value.and_then(|value| value.split_once(' '));
    let token = scheme.filter(|(scheme, _)| ["token", "bearer"].iter().any(|known| scheme.eq_ignore_ascii_case(known)));
    let mut found = None;
    for edge in &door.edges {
        let own = edge.token.as_bytes();
        let by_name = named.as_ref().map_or(Choice::from(0), |(name, password)| {
            name.as_bytes().ct_eq(edge.id.as_str().as_bytes()) & password.as_bytes().ct_eq(own)
        });
        let by_token = token.map_or(Choice::from(0), |(_, token)| token.trim().as_bytes().ct_eq(own));
        if bool::from(by_name | by_token) {
            found.get_or_insert(&edge.id);
        }
    }
    found.cloned().ok_or(Refused::Unauthorized)
}

/// A body, and the room that it and its rows have until the answer is known.
struct Text {
    packed: Bytes,
    is_gzip: bool,
    bytes_max: usize,
    _room: tokio::sync::OwnedSemaphorePermit,
}

impl Text {
    async fn read(door: &Door, headers: &HeaderMap, body: Body, bytes_max: usize) -> Result<Self, Refused> {
        let encoding = headers.get(header::CONTENT_ENCODING).map_or(Ok("identity"), HeaderValue::to_str);
        let is_gzip = match encoding.unwrap_or("?").trim() {
            "" | "identity" => false,
            gzip if gzip.eq_ignore_ascii_case("gzip") || gzip.eq_ignore_ascii_case("x-gzip") => true,
            other => return Err(Refused::Encoding(other.chars().take(80).collect())),
        };
        let length = length(headers).unwrap_or(bytes_max);
        if length > bytes_max {
            return Err(too_large(bytes_max));
        }
        // What gzip unpacks to is not known before: room for the most that is read.
        let _room = room(door, if is_gzip { length + bytes_max } else { length }.min(door.request_bytes_max))?;
        let packed = whole(body, bytes_max).await?;
        Ok(Self { packed, is_gzip, bytes_max, _room })
    }

    fn unpack(&self) -> Result<Bytes, Refused> {
        if !self.is_gzip {
            return Ok(self.packed.clone());
        }
        let mut text = Vec::new();
        let limit = self.bytes_max as u64 + 1;
        let read = MultiGzDecoder::new(&self.packed[..]).take(limit).read_to_end(&mut text);
        read.map_err(|error| Refused::Wrong(format!("the body is no gzip: {error}")))?;
        if text.len() > self.bytes_max { Err(too_large(self.bytes_max)) } else { Ok(text.into()) }
    }
}

fn too_large(bytes_max: usize) -> Refused {
    Refused::TooLarge(format!(
        "the request has more than the {bytes_max} bytes of write.max_bytes: send less at a time"
    ))
}

fn now_us() -> i64 {
    chrono::Utc::now().timestamp_micros()
}

/// Reads a body into batches, has them made durable, and says what of it was taken.
async fn take(
    door: &Arc<Door>,
    edge: EdgeId,
    source: &'static str,
    text: Text,
    read: impl FnOnce(&[u8], &EdgeId, &mut Gathering) -> Result<(Told, String), Refused> + Send + 'static,
) -> Result<Told, Refused> {
    // Unpacked bytes are not known yet where it matters little: packed text gets the room of text of that size.
    let bytes_max = (text.packed.len().saturating_mul(if text.is_gzip { 8 * ROWS_TIMES } else { ROWS_TIMES }))
        .clamp(*ROWS_BYTES.start(), *ROWS_BYTES.end());
    let units = u32::try_from(bytes_max.div_ceil(ROOM_UNIT)).unwrap_or(u32::MAX);
    let stops = |_| Refused::Later("the node stops".to_owned());
    let _rows = Arc::clone(&door.decoded).acquire_many_owned(units).await.map_err(stops)?;
    let writer = edge.clone();
    let reading = on_a_thread(door, move || {
        let body = text.unpack()?;
        let mut rows = doors::gathering(source, bytes_max);
        let (told, how) = read(&body, &writer, &mut rows)?;
        let parts = [source.as_bytes(), writer.as_str().as_bytes(), how.as_bytes(), &body];
        let batches = with_ids(rows.finish()?, told.by_arrival, &parts);
        Ok::<_, Refused>((told, batches, text))
    });
    let (told, batches, _text) = reading.await??;
    if batches.is_empty() {
        return Ok(told);
    }
    let rows: u64 = batches.iter().map(|(_, batch)| u64::from(batch.cut.rows)).sum();
    let (reply, answered) = oneshot::channel();
    let writing = Box::new(Writing::new(edge, batches, reply));
    let Ok(_place) = Arc::clone(&door.places[writing.class()]).try_acquire_owned() else {
        door.metrics.came_in(writing.class(), &Tally { pushed_back: rows, ..Tally::default() });
        return Err(Refused::Later("too many requests at once".to_owned()));
    };
    door.jobs.send(Job::Write { writing, _place }).map_err(|_| Refused::Later("the node stops".to_owned()))?;
    let Written { .. } = answered.await.map_err(|_| Refused::Later("the node stops".to_owned()))??;
    Ok(told)
}

/// An id for each batch. The same request has the same ones, unless its rows have the time of their arrival.
fn with_ids(batches: Vec<Gathered>, by_arrival: bool, parts: &[&[u8]]) -> Vec<(Option<WriteId>, Gathered)> {
    let request = if by_arrival { WriteId(random()) } else { doors::request_id(parts) };
    let id = |(number, batch): (usize, Gathered)| {
        let id = doors::request_id(&[&request.0, batch.cut.stream.as_str().as_bytes(), &number.to_le_bytes()]);
        (Some(id), batch)
    };
    batches.into_iter().enumerate().map(id).collect()
}

/// Unlike any other of this process and of those before it.
fn random() -> [u8; 16] {
    use std::hash::{BuildHasher, Hasher, RandomState};
    let half = || RandomState::new().build_hasher().finish().to_le_bytes();
    let time = chrono::Utc::now().timestamp_nanos_opt().unwrap_or_default().to_le_bytes();
    doors::request_id(&[&half(), &half(), &time]).0
}

fn add_headers(response: &mut Response, refused: &Refused, message: &str) {
    add_error(response, message);
    match refused {
        Refused::Later(_) => {
            let seconds = HeaderValue::from(RETRY_AFTER_MS.div_ceil(1_000));
            response.headers_mut().insert(header::RETRY_AFTER, seconds);
        }
        Refused::Unauthorized => {
            let challenge = HeaderValue::from_static("Token, Basic realm=\"weir\"");
            response.headers_mut().insert(header::WWW_AUTHENTICATE, challenge);
        }
        _ => {}
    }
}

fn add_error(response: &mut Response, message: &str) {
    let shown: String = message.chars().filter(|c| c.is_ascii_graphic() || *c == ' ').take(300).collect();
    if let Ok(value) = HeaderValue::from_str(&shown) {
        response.headers_mut().insert(HeaderName::from_static("x-influxdb-error"), value);
    }
}

/// Which names are others here: `weir-renamed: CPU Load=cpu_load`.
fn add_renamed(response: &mut Response, told: &Told) {
    let shown = |name: &str| name.chars().filter(|c| c.is_ascii_graphic() || *c == ' ').take(80).collect::<String>();
    let pairs: Vec<String> = told.renamed.iter().map(|(from, to)| format!("{}={to}", shown(from))).collect();
    if let Ok(value) = HeaderValue::from_str(&pairs.join(", "))
        && !pairs.is_empty()
    {
        response.headers_mut().insert(HeaderName::from_static("weir-renamed"), value);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::doors::Origin;
    use crate::own_names::OwnNames;

    #[test]
    fn the_same_request_has_the_same_ids_and_one_by_arrival_has_none_of_them() {
        let batches = || {
            let mut rows = doors::gathering("line", 1 << 20);
            let edge = "gw".parse().unwrap();
            let own_names = &OwnNames::default();
            let origin = Origin { edge: &edge, own_names, source: "line", topic: "", arrival_us: now_us() };
            let body = b"a v=1 1700000000000000000\nb v=1 1700000000000000000\nb v=1i 1700000000000000000\n";
            doors::line::read(body, Precision::Ns, &[], origin, &mut rows).unwrap();
            rows.finish().unwrap()
        };
        let ids = |by_arrival, body: &[u8]| {
            with_ids(batches(), by_arrival, &[b"gw", body]).into_iter().map(|(id, _)| id).collect::<Vec<_>>()
        };
        let first = ids(false, b"x");
        assert_eq!(first.len(), 3);
        assert!(first[0] != first[1] && first[1] != first[2]);
        assert_eq!(first, ids(false, b"x"));
        for other in [ids(false, b"y"), ids(true, b"x")] {
            assert!(first.iter().all(|id| !other.contains(id)));
        }
        assert_ne!(ids(true, b"x"), ids(true, b"x"));
    }

    #[test]
    fn the_address_says_what_influxdb_clients_say() {
        let read = Parameters::read(Some("db=telegraf&rp=&precision=ms&u=gw&p=a%26b"));
        assert_eq!(
            (read.place.as_str(), read.user.as_deref(), read.password.as_deref()),
            ("telegraf", Some("gw"), Some("a&b"))
        );
        assert_eq!(read.precision().unwrap(), Precision::Ms);
        assert_eq!(Parameters::read(Some("org=o&bucket=b/c")).place, "o/b/c");
        assert!(Parameters::read(Some("precision=h")).precision().is_err());
    }
}
