use super::*;

const MAP: &str = "device = \"/id\"\nts = \"/time\"\nf = \"/metrics/Temp/Inlet\"\ni = \"/metrics/Count\"\nb = \"/metrics/On\"\nt = \"/type\"";
/// The types of Sparkplug that the tests use.
const INT8: u32 = 1;
const INT32: u32 = 3;
const UINT64: u32 = 8;
const DOUBLE: u32 = 10;
const BOOLEAN: u32 = 11;

fn varint(out: &mut Vec<u8>, mut value: u64) {
    while value >= 0x80 {
        out.push(value as u8 | 0x80);
        value >>= 7;
    }
    out.push(value as u8);
}

fn field(out: &mut Vec<u8>, number: u64, value: u64) {
    varint(out, number << 3);
    varint(out, value);
}

fn bytes_field(out: &mut Vec<u8>, number: u64, bytes: &[u8]) {
    varint(out, number << 3 | 2);
    varint(out, bytes.len() as u64);
    out.extend_from_slice(bytes);
}

#[derive(Clone, Copy)]
pub(crate) enum Is {
    Int(u32),
    Long(u64),
    Double(f64),
    Bool(bool),
    Float(f32),
    Text(&'static str),
    /// Bytes, a data set or a template, by its field.
    Other(u64),
    Null,
}

/// A metric with what is not 0 or empty.
pub(crate) fn metric(name: &str, alias: u64, kind: u32, value: Is) -> Vec<u8> {
    let mut out = Vec::new();
    if !name.is_empty() {
        bytes_field(&mut out, 1, name.as_bytes());
    }
    for (number, value) in [(2, alias), (4, u64::from(kind))] {
        if value != 0 {
            field(&mut out, number, value);
        }
    }
    match value {
        Is::Int(value) => field(&mut out, 10, u64::from(value)),
        Is::Long(value) => field(&mut out, 11, value),
        Is::Double(value) => {
            varint(&mut out, 13 << 3 | 1);
            out.extend(value.to_le_bytes());
        }
        Is::Bool(value) => field(&mut out, 14, u64::from(value)),
        Is::Float(value) => {
            varint(&mut out, 12 << 3 | 5);
            out.extend(value.to_le_bytes());
        }
        Is::Text(text) => bytes_field(&mut out, 15, text.as_bytes()),
        Is::Other(number) => bytes_field(&mut out, number, b"\x01"),
        Is::Null => field(&mut out, 7, 1),
    }
    out
}

/// The same metric at another time, perhaps from a store of the device.
fn at(mut metric: Vec<u8>, after_ms: i64, historical: bool) -> Vec<u8> {
    field(&mut metric, 3, (ARRIVAL / 1_000 + after_ms) as u64);
    field(&mut metric, 5, u64::from(historical));
    metric
}

pub(crate) fn payload(seq: Option<u64>, metrics: &[Vec<u8>]) -> Vec<u8> {
    let mut out = Vec::new();
    field(&mut out, 1, (ARRIVAL / 1_000) as u64);
    metrics.iter().for_each(|metric| bytes_field(&mut out, 2, metric));
    seq.into_iter().for_each(|seq| field(&mut out, 3, seq));
    out
}

struct Host {
    decoder: Decoder,
    now_us: i64,
}

impl Host {
    fn new(map: &str) -> Self {
        Self { decoder: decoder("format = \"sparkplug\"", map), now_us: ARRIVAL }
    }

    /// What comes of a message, and which nodes are asked for their birth.
    fn take(&mut self, topic: &str, payload: &[u8]) -> Vec<String> {
        let mut out = Vec::new();
        let topic = format!("spBv1.0/{topic}");
        let filtered = self.decoder.decode(&topic, &Bytes::copy_from_slice(payload), self.now_us, &mut out);
        let mut texts = out.iter().map(super::formats::show).collect::<Vec<_>>();
        texts.extend((filtered > 0).then(|| "filtered".to_owned()));
        texts.extend(self.decoder.take_commands().into_iter().map(|command| command.topic));
        texts
    }

    fn born(map: &str) -> Self {
        let mut host = Self::new(map);
        let bd_seq = metric("bdSeq", 0, UINT64, Is::Long(4));
        let temp = metric("Temp/Inlet", 1, DOUBLE, Is::Double(20.5));
        let birth = payload(Some(0), &[bd_seq, temp, metric("Count", 2, INT32, Is::Int(7))]);
        let expected = if map == MAP { "g/n +0 20.5 7 - NBIRTH" } else { "g/n +0 20.5 7 false -" };
        assert_eq!(host.take("g/NBIRTH/n", &birth), [expected]);
        host
    }
}

fn temp(value: f64) -> Vec<u8> {
    metric("", 1, 0, Is::Double(value))
}

#[test]
fn data_are_told_by_the_names_and_aliases_of_births() {
    let mut host = Host::born(MAP);
    assert_eq!(host.take("g/NDATA/n", &payload(Some(1), &[temp(21.0)])), ["g/n +0 21.0 - - NDATA"]);
    let both = [temp(22.0), metric("", 2, 0, Is::Int(-3_i32 as u32))];
    assert_eq!(host.take("g/NDATA/n", &payload(Some(2), &both)), ["g/n +0 22.0 -3 - NDATA"]);
    let device = [metric("On", 1, BOOLEAN, Is::Bool(true)), metric("Count", 9, INT8, Is::Int(0xff))];
    assert_eq!(host.take("g/DBIRTH/n/d", &payload(Some(3), &device)), ["g/n/d +0 - -1 true DBIRTH"]);
    let data = [metric("", 1, 0, Is::Bool(false)), metric("", 9, 0, Is::Int(-128_i32 as u32))];
    assert_eq!(host.take("g/DDATA/n/d", &payload(Some(4), &data)), ["g/n/d +0 - -128 false DDATA"]);
    let null = [metric("", 1, 0, Is::Null), metric("Count", 0, UINT64, Is::Long(u64::MAX))];
    assert_eq!(host.take("g/DDATA/n/d", &payload(Some(5), &null)), ["wrong_type"]);
    assert_eq!(host.take("g/NDATA/n", &payload(Some(6), &[metric("Other", 0, INT32, Is::Int(1))])), ["filtered"]);
    assert_eq!(host.take("g/NCMD/n", b"\xff"), ["filtered"]);
    assert_eq!(host.take("STATE/host", b"\xff"), ["filtered"]);
    assert_eq!(host.take("g/NDATA/n/d", &payload(Some(7), &[])), ["bad_topic"]);
    assert_eq!(host.take("g/NDATA", &payload(Some(7), &[])), ["bad_topic"]);
}

#[test]
fn each_type_of_the_specification_is_the_value_that_it_says() {
    let map = "device = \"/id\"\nf = \"/metrics/f\"\ni = \"/metrics/i\"\nb = \"/metrics/b\"\nt = \"/metrics/t\"";
    let check = |name: &str, kind: u32, value: Is, expected: &str| {
        let expected = match name {
            _ if expected == "wrong_type" => expected.to_owned(),
            "f" => format!("g/n +0 {expected} - - -"),
            "i" => format!("g/n +0 - {expected} - -"),
            "b" => format!("g/n +0 - - {expected} -"),
            _ => format!("g/n +0 - - - {expected}"),
        };
        // By its name with its type, and by an alias whose type the birth has told.
        let mut host = Host::new(map);
        let birth = payload(Some(0), &[metric(name, 3, kind, value)]);
        assert_eq!(host.take("g/NBIRTH/n", &birth), [expected.as_str()], "{name} of type {kind}");
        let data = payload(Some(1), &[metric("", 3, 0, value)]);
        assert_eq!(host.take("g/NDATA/n", &data), [expected.as_str()], "{name} of type {kind} by its alias");
    };
    check("i", 1, Is::Int(0x80), "-128");
    check("i", 2, Is::Int(0xffff), "-1");
    check("i", 2, Is::Int(-32_768_i32 as u32), "-32768");
    check("i", 3, Is::Int(i32::MIN as u32), "-2147483648");
    check("i", 4, Is::Long(i64::MIN as u64), "-9223372036854775808");
    check("i", 5, Is::Int(255), "255");
    check("i", 6, Is::Int(65_535), "65535");
    check("i", 7, Is::Int(u32::MAX), "4294967295");
    check("i", 7, Is::Long(u64::from(u32::MAX)), "4294967295");
    check("i", 8, Is::Long(1 << 62), "4611686018427387904");
    check("f", 8, Is::Long(u64::MAX), "1.8446744073709552e19");
    check("f", 9, Is::Float(0.1), "0.10000000149011612");
    check("f", 10, Is::Double(0.1), "0.1");
    check("b", 11, Is::Bool(true), "true");
    check("t", 12, Is::Text("Hé"), "Hé");
    check("i", 13, Is::Long(1_700_000_000_123), "1700000000123000");
    check("t", 14, Is::Text("long"), "long");
    check("t", 15, Is::Text("f81d4fae-7dec-11d0-a765-00a0c91e6bf6"), "f81d4fae-7dec-11d0-a765-00a0c91e6bf6");
    for (kind, number) in [(16, 17), (17, 16), (18, 16), (19, 18)] {
        check("t", kind, Is::Other(number), "wrong_type");
    }
    // What nobody asks for is no fault.
    let mut host = Host::new(map);
    assert_eq!(host.take("g/NBIRTH/n", &payload(Some(0), &[metric("other", 0, 16, Is::Other(17))])), ["filtered"]);
}

#[test]
fn metrics_of_one_time_are_one_reading_also_when_they_are_old() {
    let map =
        "device = \"/id\"\nts = \"/time\"\nf = \"/metrics/Temp/Inlet\"\ni = \"/metrics/Count\"\nb = \"/is_historical\"";
    let mut host = Host::born(map);
    let old = |value, after_ms| at(temp(value), after_ms, true);
    let metrics =
        [old(1.0, -2_000), old(2.0, -1_000), at(metric("", 2, 0, Is::Int(5)), -1_000, true), temp(3.0), temp(4.0)];
    assert_eq!(
        host.take("g/NDATA/n", &payload(Some(1), &metrics)),
        ["g/n +-2000000 1.0 - true -", "g/n +-1000000 2.0 5 true -", "g/n +0 3.0 - false -", "g/n +0 4.0 - false -",]
    );
}

#[test]
fn a_gap_asks_for_the_birth_and_loses_nothing() {
    let mut host = Host::born(MAP);
    let ask = "spBv1.0/g/NCMD/n";
    for seq in (1..=255).chain(0..=2) {
        assert_eq!(host.take("g/NDATA/n", &payload(Some(seq), &[temp(1.0)])), ["g/n +0 1.0 - - NDATA"], "{seq}");
    }
    assert_eq!(host.take("g/NDATA/n", &payload(Some(4), &[temp(1.0)])), ["g/n +0 1.0 - - NDATA", ask]);
    assert_eq!(host.take("g/NDATA/n", &payload(Some(5), &[temp(1.0)])), ["g/n +0 1.0 - - NDATA"], "not again at once");
    host.now_us += 30_000_000;
    assert_eq!(host.take("g/NDATA/n", &payload(Some(6), &[temp(1.0)])), ["g/n +0 1.0 - - NDATA", ask]);
    let birth = payload(Some(0), &[metric("Temp/Inlet", 8, DOUBLE, Is::Double(0.5))]);
    assert_eq!(host.take("g/NBIRTH/n", &birth), ["g/n +0 0.5 - - NBIRTH"]);
    host.now_us += 60_000_000;
    assert_eq!(host.take("g/NDATA/n", &payload(Some(1), &[temp(1.0)])), ["unknown_alias", ask], "aliases are new");
    assert_eq!(host.take("g/NDATA/n", &payload(Some(300), &[])), ["filtered"], "a number that is none is a gap");
}

#[test]
fn nobody_is_asked_when_the_configuration_says_so() {
    let source = "format = \"sparkplug\"\noptions = { rebirth = false }";
    let mut host = Host { decoder: decoder(source, MAP), now_us: ARRIVAL };
    assert_eq!(host.take("g/NDATA/n", &payload(Some(17), &[temp(1.0)])), ["unknown_alias"]);
}

#[test]
fn what_was_never_born_is_asked_for() {
    let mut host = Host::new(MAP);
    let known = metric("Temp/Inlet", 0, DOUBLE, Is::Double(1.5));
    let message = payload(Some(17), &[temp(1.0), known.clone(), metric("", 77, 0, Is::Int(1))]);
    assert_eq!(host.take("g/NDATA/n", &message), ["g/n +0 1.5 - - NDATA", "unknown_alias", "spBv1.0/g/NCMD/n"]);
    let mut host = Host::born(MAP);
    assert_eq!(host.take("g/DDATA/n/d", &payload(Some(1), &[temp(1.0)])), ["unknown_alias", "spBv1.0/g/NCMD/n"]);
}

#[test]
fn a_death_ends_its_own_session() {
    let online = "device = \"/id\"\nf = \"/metrics/Temp/Inlet\"\nb = \"/online\"\nt = \"/type\"";
    let mut host = Host::new(online);
    let birth = payload(Some(0), &[metric("bdSeq", 0, UINT64, Is::Long(4))]);
    assert_eq!(host.take("g/NBIRTH/n", &birth), ["g/n +0 - - true NBIRTH"]);
    assert_eq!(host.take("g/DBIRTH/n/d", &payload(Some(1), &[])), ["g/n/d +0 - - true DBIRTH"]);
    assert_eq!(host.take("g/DDEATH/n/d", &payload(Some(2), &[])), ["g/n/d +0 - - false DDEATH"]);
    let death = |session| payload(None, &[metric("bdSeq", 0, UINT64, Is::Long(session))]);
    assert_eq!(host.take("g/NDEATH/n", &death(3)), ["filtered"], "of the session before");
    assert_eq!(host.take("g/NDATA/n", &payload(Some(3), &[])), ["filtered"]);
    assert_eq!(host.take("g/NDEATH/n", &death(4)), ["g/n +0 - - false NDEATH"]);
    assert_eq!(host.take("g/NDATA/n", &payload(Some(4), &[])), ["filtered", "spBv1.0/g/NCMD/n"]);
    let mut host = Host::born(MAP);
    assert_eq!(host.take("g/NDEATH/n", &death(4)), ["filtered"]);
    assert_eq!(host.take("g/NDATA/n", &payload(Some(1), &[temp(1.0)])), ["unknown_alias", "spBv1.0/g/NCMD/n"]);
}

#[test]
fn births_are_bounded() {
    let source = "format = \"sparkplug\"\noptions = { metrics_max = 10 }";
    let mut host = Host { decoder: decoder(source, MAP), now_us: ARRIVAL };
    let births = |count: u64| {
        let metrics = (0..count).map(|n| metric(&format!("m{n}"), n + 1, INT32, Is::Int(1))).collect::<Vec<_>>();
        payload(Some(0), &metrics)
    };
    assert_eq!(host.take("g/NBIRTH/a", &births(8)), ["filtered"]);
    assert_eq!(host.take("g/NBIRTH/a", &births(8)), ["filtered"], "a birth takes the place of the one before");
    assert_eq!(host.take("g/NBIRTH/b", &births(1)), ["too_many_metrics"]);
    assert_eq!(host.take("g/NDATA/b", &payload(Some(1), &[])), ["filtered"], "no room to remember that it was asked");
    assert_eq!(host.take("g/NDEATH/a", &payload(None, &[])), ["filtered"]);
    assert_eq!(host.take("g/NBIRTH/b", &births(8)), ["filtered"], "a death makes room");
    assert_eq!(host.take("g/NDEATH/b", &payload(None, &[])), ["filtered"]);
    let long = payload(Some(0), &[metric(&"m".repeat(64 * 9), 1, INT32, Is::Int(1))]);
    assert_eq!(host.take("g/NBIRTH/a", &long), ["too_many_metrics"], "a long name counts as several");
}

#[test]
fn the_state_is_the_same_after_a_restart() {
    let mut host = Host::born(MAP);
    host.take("g/DBIRTH/n/d", &payload(Some(1), &[metric("Count", 5, INT8, Is::Int(1))]));
    host.take("g/NDATA/n", &payload(Some(9), &[temp(1.0)]));
    let text = serde_json::to_string(host.decoder.births().unwrap()).unwrap();
    let mut again = Host::new(MAP);
    again.decoder.restore(serde_json::from_str(&text).unwrap());
    assert_eq!(again.decoder.births(), host.decoder.births());
    for host in [&mut host, &mut again] {
        let data = payload(Some(10), &[metric("", 5, 0, Is::Int(0xfe))]);
        assert_eq!(host.take("g/DDATA/n/d", &data), ["g/n/d +0 - -2 - DDATA"], "and it is not asked again");
    }
}

#[test]
fn a_request_for_a_birth_is_what_the_specification_says() {
    let mut decoder = decoder("format = \"sparkplug\"", MAP);
    decoder.decode("spBv1.0/g/NDATA/n", &Bytes::from(payload(Some(0), &[])), ARRIVAL, &mut Vec::new());
    let command = decoder.take_commands().remove(0);
    let rebirth = metric("Node Control/Rebirth", 0, 0, Is::Bool(true));
    // Name, timestamp, type and value, in this order.
    let mut expected = rebirth[..22].to_vec();
    field(&mut expected, 3, (ARRIVAL / 1_000) as u64);
    field(&mut expected, 4, u64::from(BOOLEAN));
    field(&mut expected, 14, 1);
    assert_eq!(command.payload, payload(None, &[expected]));
}
