use bytes::Bytes;

use super::*;

const SECOND: i64 = 1_000_000;
/// When all of this happens: a whole number of hours.
const NOW: i64 = 1_699_999_200 * SECOND;

fn settings(rules: &str) -> Result<Settings, String> {
    Settings::parse(&format!(
        "[edge]\nid = \"e\"\ndata_dir = \"x\"\n[cloud]\nurls = [\"http://h\"]\ntoken = \"t\"\n\
         [[source]]\nkind = \"mqtt\"\nurl = \"mqtt://h\"\ntopics = [\"#\"]\nstream = \"s\"\n[source.map]\n\
         device = \"topic:1\"\nts = \"arrival\"\nv = \"/v\"\nt = \"/t\"\n\
         [stream.s]\nlateness = \"10s\"\n[stream.s.fields]\nv = {{ type = \"int64\" }}\nt = {{ type = \"text\" }}\n\
         [stream.s.window.10s]\nsize = \"10s\"\n{rules}"
    ))
}

/// Rules with a hand on them: rows come in when they happen, and what was found comes out as short texts.
struct Hand(Rules);

impl Hand {
    fn new(rules: &str) -> Self {
        Self(Rules::new(&settings(rules).unwrap()).unwrap())
    }

    /// A reading at so many seconds, arriving `late` seconds after that.
    fn late(&mut self, device: &str, at: i64, late: i64, v: Option<i64>, t: Option<&str>) -> Vec<String> {
        let ts = NOW + at * SECOND;
        let arrival = ts + late * SECOND;
        self.0.tick(arrival);
        let input = self.0.input(&"s".parse().unwrap()).unwrap();
        let values = [v.map(Value::Int), t.map(|t| Value::Text(t.to_owned()))];
        self.0.row(input, Of::device(device), When { from: ts, to: ts, arrival }, &values);
        self.0.look_for_silence();
        self.found()
    }

    fn row(&mut self, at: i64, v: i64) -> Vec<String> {
        self.late("d", at, 0, Some(v), None)
    }

    fn tick(&mut self, at: i64) -> Vec<String> {
        self.0.tick(NOW + at * SECOND);
        self.0.look_for_silence();
        self.found()
    }

    fn found(&mut self) -> Vec<String> {
        let short = |alert: Transition| {
            let seconds = |us: i64| (us - NOW) / SECOND;
            let to = alert.to.map_or(String::new(), |to| format!("{}", seconds(to)));
            format!("{} {} {} [{},{to}]", seconds(alert.ts), alert.device, alert.turn.word(), seconds(alert.from))
        };
        self.0.take().into_iter().map(short).collect()
    }

    fn totals(&self) -> RuleTotals {
        self.0.status().next().unwrap().totals
    }

    /// Another run with these rules.
    fn restarted(&self, rules: &str) -> Self {
        let mut state = Vec::new();
        self.0.write(&mut state);
        let mut other = Self::new(rules);
        other.0.restore(&Bytes::from(state.clone())).unwrap();
        other
    }
}

fn rule(more: &str) -> String {
    format!("[[rule]]\nname = \"r\"\non = \"s\"\n{more}\n")
}

const NONE: [&str; 0] = [];

#[test]
fn an_alert_fires_and_ends_with_its_condition() {
    let mut hand = Hand::new(&rule("when = \"v > 10\""));
    assert_eq!(hand.row(0, 5), NONE);
    assert_eq!(hand.row(1, 11), ["1 d firing [1,]"]);
    assert_eq!(hand.row(2, 12), NONE);
    assert_eq!(hand.late("d", 3, 0, None, None), NONE, "NULL does not say");
    assert_eq!(hand.row(4, 10), ["4 d resolved [1,4]"]);
    assert_eq!(hand.row(5, 20), ["5 d firing [5,]"]);
    assert_eq!(hand.late("e", 5, 0, Some(20), None), ["5 e firing [5,]"]);
}

#[test]
fn for_wants_the_condition_to_last() {
    let mut hand = Hand::new(&rule("when = \"v > 10\"\nfor = \"10s\""));
    assert_eq!(hand.row(0, 11), NONE);
    assert_eq!(hand.row(9, 11), NONE);
    assert_eq!(hand.row(9, 1), NONE, "it did not last");
    assert_eq!(hand.row(10, 11), NONE);
    assert_eq!(hand.late("d", 19, 0, None, None), NONE);
    assert_eq!(hand.row(20, 11), ["20 d firing [10,]"]);
    assert_eq!(hand.row(21, 1), ["21 d resolved [10,21]"]);
}

#[test]
fn until_keeps_an_alert_from_flapping() {
    let mut hand = Hand::new(&rule("when = \"v > 10\"\nuntil = \"v < 5\""));
    assert_eq!(hand.row(0, 11), ["0 d firing [0,]"]);
    assert_eq!(hand.row(1, 7), NONE);
    assert_eq!(hand.row(2, 11), NONE);
    assert_eq!(hand.row(3, 4), ["3 d resolved [0,3]"]);
    let mut both = Hand::new(&rule("when = \"v > 10\"\nuntil = \"v > 20\""));
    assert_eq!(both.row(0, 11), ["0 d firing [0,]"]);
    assert_eq!(both.row(1, 30), NONE, "while it holds it does not end");
}

#[test]
fn an_episode_has_one_id_which_follows_from_rule_labels_and_start() {
    let ids = |name: &str, device: &str, start: i64| {
        let mut hand = Hand::new(&rule("when = \"v > 10\"").replace("\"r\"", &format!("\"{name}\"")));
        hand.0.tick(NOW);
        let input = hand.0.input(&"s".parse().unwrap()).unwrap();
        for (at, v) in [(start, 11), (start + 1, 1)] {
            let ts = NOW + at * SECOND;
            hand.0.row(input, Of::device(device), When { from: ts, to: ts, arrival: ts }, &[Some(Value::Int(v)), None]);
        }
        let ids = hand.0.take().into_iter().map(|alert| alert.id).collect::<Vec<_>>();
        assert_eq!(ids[0], ids[1]);
        ids[0].clone()
    };
    assert_eq!(ids("r", "d", 0), ids("r", "d", 0));
    assert_eq!(ids("r", "d", 0), "3801ccd97ce7dc8f32b506e808acfc36", "the id of this version never changes");
    for other in [ids("r", "d", 1), ids("r", "e", 0), ids("q", "d", 0)] {
        assert_ne!(ids("r", "d", 0), other);
    }
}

#[test]
fn rows_out_of_order_change_nothing() {
    let mut hand = Hand::new(&rule("when = \"v > 10\""));
    assert_eq!(hand.row(10, 5), NONE);
    assert_eq!(hand.row(9, 11), NONE);
    assert_eq!(hand.row(10, 11), ["10 d firing [10,]"], "an equal time is no older one");
    assert_eq!(hand.row(9, 5), NONE);
}

#[test]
fn prev_is_the_row_before_of_the_same_device() {
    let mut hand = Hand::new(&rule("when = \"v - prev(v) > 10\""));
    assert_eq!(hand.row(0, 100), NONE);
    assert_eq!(hand.late("e", 1, 0, Some(200), None), NONE);
    assert_eq!(hand.row(2, 105), NONE);
    assert_eq!(hand.row(1, 0), NONE);
    let mut again = hand.restarted(&rule("when = \"v - prev(v) > 10\""));
    assert_eq!(again.row(3, 116), ["3 d firing [3,]"]);
    assert_eq!(hand.row(3, 116), ["3 d firing [3,]"]);
}

#[test]
fn what_is_old_is_backfill_until_the_present_finds_it() {
    let mut hand = Hand::new(&rule("when = \"v > 10\""));
    assert_eq!(hand.late("d", 0, 3_601, Some(11), None), ["0 d backfill [0,]"]);
    assert_eq!(hand.late("d", 1, 3_601, Some(11), None), NONE);
    assert_eq!(hand.late("d", 2, 3_601, Some(1), None), ["2 d backfill [0,2]"]);
    assert_eq!(hand.late("d", 3, 3_601, Some(11), None), ["3 d backfill [3,]"]);
    assert_eq!(hand.late("d", 4, 3_600, Some(11), None), ["4 d firing [3,]"]);
    assert_eq!(hand.late("d", 5, 3_601, Some(1), None), ["5 d resolved [3,5]"], "what was told is ended");
    assert_eq!(hand.totals(), RuleTotals { fired: 1, resolved: 1, backfilled: 3, ..RuleTotals::default() });
}

#[test]
fn a_device_is_absent_by_event_time() {
    let mut hand = Hand::new(&rule("absent = \"60s\""));
    assert_eq!(hand.late("d", 0, 70, None, None), NONE);
    for at in 1..69 {
        assert_eq!(hand.late("e", at, 70 - at, None, None), NONE, "{at}");
    }
    // The watermark is 10 s behind; silence is looked for each eighth of it.
    let found = (69..90).flat_map(|at| hand.late("e", at, 0, None, None)).collect::<Vec<_>>();
    assert_eq!(found, ["60 d firing [0,]"]);
    let mut again = hand.restarted(&rule("absent = \"60s\""));
    for hand in [&mut hand, &mut again] {
        assert_eq!(hand.late("d", 15, 76, None, None), NONE, "that is still too long ago");
        assert_eq!(hand.late("d", 91, 0, None, None), ["91 d resolved [0,91]"]);
    }
}

#[test]
fn a_device_is_absent_by_the_journals_ticks() {
    let mut hand = Hand::new(&rule("absent = \"60s\""));
    assert_eq!(hand.late("d", 0, 0, None, None), NONE);
    assert_eq!((1..60).flat_map(|at| hand.tick(at)).collect::<Vec<_>>(), NONE);
    assert_eq!(hand.tick(60), ["60 d firing [0,]"]);
    assert_eq!(hand.tick(70), NONE);
    assert_eq!(hand.late("d", 71, 0, None, None), ["71 d resolved [0,71]"]);
    // The agent was off, or the clock was set: at most a minute of it was listened to.
    assert_eq!(hand.tick(100_000), ["131 d firing [71,]"]);
    let mut hand = Hand::new(&rule("absent = \"120s\""));
    assert_eq!(hand.late("d", 0, 0, None, None), NONE);
    assert_eq!(hand.tick(100_000), NONE);
    assert_eq!(hand.tick(50), NONE);
    assert_eq!(hand.tick(109), NONE);
    assert_eq!(hand.tick(110), ["120 d firing [0,]"]);
}

#[test]
fn a_window_lasts_from_its_start_to_its_end() {
    let mut hand =
        Hand::new("[[rule]]\nname = \"r\"\non = \"s_10s\"\nwhen = \"v_max > 10 AND count = 1\"\nfor = \"20s\"\n");
    let input = hand.0.input(&"s_10s".parse().unwrap()).unwrap();
    let columns = hand.0.inputs[0].columns.names().map(str::to_owned).collect::<Vec<_>>();
    let mut window = |start: i64, v: i64| {
        let value = |name: &String| match name.as_str() {
            "count" | "revision" => Some(Value::Int(1)),
            "v_max" => Some(Value::Int(v)),
            _ => None,
        };
        let values = columns.iter().map(value).collect::<Vec<_>>();
        let (from, to) = (NOW + start * SECOND, NOW + (start + 10) * SECOND);
        hand.0.tick(to);
        hand.0.row(input, Of::device("d"), When { from, to, arrival: to }, &values);
        hand.found()
    };
    assert_eq!(window(0, 11), NONE);
    assert_eq!(window(10, 11), ["20 d firing [0,]"]);
    assert_eq!(window(10, 5), ["20 d resolved [0,10]"], "a revision of the same window");
    assert_eq!(window(0, 11), NONE, "a revision of an older one");
}

const BY_T: &str = "[stream.s.window.g]\nsize = \"10s\"\nby = [\"t\"]\n";

impl Hand {
    /// Windows that end at so many seconds: of each group its `v_max`. What was found, with its labels.
    fn groups(&mut self, end: i64, groups: &[(&str, i64)]) -> Vec<String> {
        let input = self.0.input(&"s_g".parse().unwrap()).unwrap();
        let columns = self.0.inputs[input.0].columns.names().map(str::to_owned).collect::<Vec<_>>();
        let to = NOW + end * SECOND;
        self.0.tick(to);
        for (t, v) in groups {
            let value = |name: &String| match name.as_str() {
                "count" | "revision" => Some(Value::Int(1)),
                "t" => Some(Value::Text((*t).to_owned())),
                "v_max" => Some(Value::Int(*v)),
                _ => None,
            };
            let values = columns.iter().map(value).collect::<Vec<_>>();
            let of = Of { device: "*", group: Some(t) };
            self.0.row(input, of, When { from: to - 10 * SECOND, to, arrival: to }, &values);
        }
        let found = self.0.take().into_iter();
        found.map(|alert| format!("{} {} {}", alert.device, alert.labels, alert.turn.word())).collect()
    }
}

#[test]
fn groups_of_windows_have_alerts_and_rows_before_of_their_own() {
    let over =
        |when: &str, more: &str| format!("{BY_T}[[rule]]\nname = \"r\"\non = \"s_g\"\nwhen = \"{when}\"\n{more}\n");
    let (x, y) = (r#"* {"t":"x"}"#, r#"* {"t":"y"}"#);
    let text = over("v_max > 10", "topic = \"a/{t}\"");
    let mut hand = Hand::new(&text);
    assert_eq!(hand.groups(10, &[("x", 11), ("y", 1)]), [format!("{x} firing")]);
    assert_eq!(hand.groups(20, &[("x", 11), ("y", 1)]), NONE, "one group does not end what another began");
    assert_eq!(hand.groups(30, &[("x", 11), ("y", 11)]), [format!("{y} firing")]);
    let told = hand.0.firing().map(|alert| (alert.device, alert.labels, alert.topic)).collect::<Vec<_>>();
    let expected = |t: &str| ("*".to_owned(), format!(r#"{{"t":"{t}"}}"#), Some(format!("a/{t}")));
    assert_eq!(told, [expected("x"), expected("y")]);
    let mut again = hand.restarted(&text);
    assert_eq!(again.0.firing().collect::<Vec<_>>(), hand.0.firing().collect::<Vec<_>>());
    for hand in [&mut hand, &mut again] {
        assert_eq!(hand.groups(40, &[("x", 1), ("y", 11)]), [format!("{x} resolved")]);
    }
    // Windows of other groups: what fires over the old ones ends.
    let other = text.replace("by = [\"t\"]", "by = [\"device\", \"t\"]").replace("a/{t}", "a/{device}/{t}");
    assert_eq!(hand.restarted(&other).groups(50, &[]), [format!("{y} resolved")]);
    // As an agent wrote it that took all groups for one device: the alert of that device ends.
    let mut old = Hand::new(&text.replace("by = [\"t\"]", "by = \"device\"").replace("a/{t}", "a/{device}"));
    let columns = old.0.inputs[0].columns.names().map(|name| (name == "v_max").then_some(Value::Int(11)));
    let (columns, input) = (columns.collect::<Vec<_>>(), old.0.input(&"s_g".parse().unwrap()).unwrap());
    old.0.row(input, Of::device("*"), When { from: NOW, to: NOW, arrival: NOW }, &columns);
    assert_eq!(old.found(), ["0 * firing [0,]"]);
    let mut bytes = Vec::new();
    old.0.write(&mut bytes);
    assert_eq!(bytes[0], 1, "windows by device are as they were");
    let mut new = Hand::new(&text);
    new.0.restore(&Bytes::from(bytes.clone())).unwrap();
    assert_eq!(new.groups(10, &[("x", 11)]), ["* {} resolved".to_owned(), format!("{x} firing")]);
    bytes.clear();
    again.0.write(&mut bytes);
    assert_eq!(bytes[0], 2);
    for cut in 0..bytes.len() {
        let restored = Hand::new(&text).0.restore(&Bytes::copy_from_slice(&bytes[..cut]));
        assert_eq!(restored, Err(StateError), "{cut}");
    }

    let mut rises = Hand::new(&over("v_max - prev(v_max) > 10", ""));
    assert_eq!(rises.groups(10, &[("x", 100), ("y", 1)]), NONE);
    assert_eq!(rises.groups(20, &[("x", 105), ("y", 2)]), NONE, "the row before is of the same group");
    assert_eq!(rises.groups(30, &[("x", 116), ("y", 3)]), [format!("{x} firing")]);

    for (more, refused) in [
        ("topic = \"a/{device}\"", true),
        ("topic = \"a/{id}\"", false),
        ("labels = { t = \"{t}\" }", false),
        ("labels = { t = \"{device}\" }", true),
    ] {
        assert_eq!(settings(&over("v_max > 10", more)).is_err(), refused, "{more}");
    }
}

#[test]
fn labels_make_alerts_of_their_own() {
    let text = rule("when = \"v > 10\"\nlabels = { part = \"{t}\", place = \"hall\" }\ntopic = \"a/{device}/{t}\"");
    let mut hand = Hand::new(&text);
    assert_eq!(hand.late("d", 0, 0, Some(11), Some("b")), ["0 d firing [0,]"]);
    assert_eq!(hand.late("d", 1, 0, Some(11), Some("a/+")), ["1 d firing [1,]"]);
    assert_eq!(hand.late("d", 2, 0, Some(12), Some("b")), NONE);
    let firing = hand.0.firing().collect::<Vec<_>>();
    assert_eq!(firing.iter().map(|alert| alert.topic.as_deref().unwrap()).collect::<Vec<_>>(), ["a/d/a__", "a/d/b"]);
    assert_eq!(firing[1].labels, r#"{"part":"b","place":"hall"}"#);
    let mut again = hand.restarted(&text);
    for hand in [&mut hand, &mut again] {
        assert_eq!(hand.late("d", 3, 0, Some(1), Some("b")), ["3 d resolved [0,3]"]);
        assert_eq!(hand.late("d", 4, 0, Some(1), Some("c")), NONE);
    }
}

#[test]
fn messages_show_what_the_row_has() {
    let mut hand = Hand::new(&rule("when = \"v > 10\"\nmessage = \"{{{rule}}} {device} {v} {t} {severity} at {ts}\""));
    hand.0.tick(NOW);
    let input = hand.0.input(&"s".parse().unwrap()).unwrap();
    hand.0.row(input, Of::device("d"), When { from: NOW, to: NOW, arrival: NOW }, &[Some(Value::Int(11)), None]);
    assert_eq!(hand.0.take()[0].message, "{r} d 11 NULL warning at 2023-11-14T22:00:00Z");
}

#[test]
fn alerts_and_devices_are_bounded_and_what_does_not_fit_is_counted() {
    let mut hand = Hand::new(&rule("when = \"v > 10\"\nmax_instances = 2"));
    for device in ["a", "b", "c", "d"] {
        hand.late(device, 0, 0, Some(11), None);
    }
    assert_eq!((hand.totals().fired, hand.totals().refused), (2, 2));
    hand.late("a", 1, 0, Some(1), None);
    assert_eq!(hand.late("c", 1, 0, Some(11), None), ["1 c firing [1,]"]);

    let mut hand = Hand::new(&format!("[alerts]\ndevices_max = 16\n{}", rule("when = \"v > 10\"")));
    for device in 0..16 {
        hand.late(&format!("d{device}"), device, 0, Some(if device < 2 { 11 } else { 1 }), None);
    }
    hand.late("one", 20, 0, Some(1), None);
    let devices = hand.0.inputs[0].devices.keys().cloned().collect::<Vec<_>>();
    assert_eq!(devices.len(), 15, "the two that were silent longest and have no alert are forgotten");
    assert!(
        devices.contains(&"d0".to_owned())
            && !devices.contains(&"d2".to_owned())
            && !devices.contains(&"d3".to_owned())
    );
    let mut hand = Hand::new(&format!("[alerts]\ndevices_max = 1\n{}", rule("when = \"v > 10\"")));
    hand.late("a", 0, 0, Some(11), None);
    assert_eq!(hand.late("b", 0, 0, Some(11), None), NONE);
    assert_eq!(hand.0.inputs[0].devices_refused, 1);
}

#[test]
fn rows_that_fail_are_counted_and_change_nothing() {
    let mut hand = Hand::new(&rule("when = \"100 / v > 10\""));
    assert_eq!(hand.row(0, 5), ["0 d firing [0,]"]);
    assert_eq!(hand.row(1, 0), NONE);
    assert_eq!((hand.totals().failed, hand.0.status().next().unwrap().firing), (1, 1));
}

#[test]
fn a_command_is_filled_in_by_the_row_that_fires_and_the_same_to_its_end() {
    let text = rule(
        "when = \"v > 10\"\ncommand = { topic = \"set/{device}/{t}\", firing = '{{\"text\":\"{t}\",\"v\":{v}}}', resolved = \"off {v}\" }",
    );
    let mut hand = Hand::new(&text);
    let mut commands = Vec::new();
    let mut row = |hand: &mut Hand, at: i64, late: i64, v: i64| {
        let input = hand.0.input(&"s".parse().unwrap()).unwrap();
        let (ts, t) = (NOW + at * SECOND, Value::Text("a/\",\"x".to_owned()));
        hand.0.tick(ts + late * SECOND);
        let when = When { from: ts, to: ts, arrival: ts + late * SECOND };
        hand.0.row(input, Of::device("d"), when, &[Some(Value::Int(v)), Some(t)]);
        commands.extend(hand.0.take().into_iter().map(|alert| (alert.turn, alert.command)));
    };
    row(&mut hand, 0, 3_601, 11);
    row(&mut hand, 1, 0, 12);
    let told = hand.0.firing().collect::<Vec<_>>();
    // After a restart it is told as it was.
    let mut hand = hand.restarted(&text);
    assert_eq!(hand.0.firing().collect::<Vec<_>>(), told);
    row(&mut hand, 2, 0, 1);
    let command = Command {
        topic: "set/d/a_\",\"x".to_owned(),
        firing: r#"{"text":"a/_,_x","v":12}"#.to_owned(),
        resolved: Some("off 12".to_owned()),
        every_us: SECOND,
    };
    assert_eq!(told[0].command.as_ref(), Some(&command));
    let expected = [(Turn::Backfill, None), (Turn::Firing, Some(command.clone())), (Turn::Resolved, Some(command))];
    assert_eq!(commands, expected);
}

#[test]
fn alerts_of_a_rule_that_changed_end_with_the_next_entry() {
    let (was, is) =
        (rule("when = \"v > 10\"\ntopic = \"a/{device}\""), rule("when = \"v > 20\"\ntopic = \"a/{device}\""));
    let mut hand = Hand::new(&was);
    hand.row(0, 11);
    let mut other = hand.restarted(&is);
    // A crash before the next entry forgets nothing.
    other = other.restarted(&is);
    assert_eq!(other.found(), NONE);
    assert_eq!(other.row(5, 11), ["0 d resolved [0,0]"]);
    assert_eq!(other.row(6, 21), ["6 d firing [6,]"]);
    let mut gone = other.restarted("");
    assert_eq!(gone.tick(7), ["6 d resolved [6,6]"]);
    let mut same = hand.restarted(&was.replace("a/{device}", "b/{device}"));
    assert_eq!(same.row(5, 1), ["5 d resolved [0,5]"], "a topic is no part of what it means");
}

#[test]
fn the_bytes_of_version_1_never_change() {
    let text = rule(
        "when = \"v > prev(v) OR t = 'x'\"\nlabels = { t = \"{t}\" }\ntopic = \"a/{id}\"\n\
         command = { topic = \"c\", firing = \"1\", resolved = \"0\" }",
    );
    let mut hand = Hand::new(&text);
    hand.late("d", 0, 0, Some(1), Some("x"));
    hand.late("e", 1, 0, None, None);
    let mut bytes = Vec::new();
    hand.0.write(&mut bytes);
    assert_eq!(crc32c::crc32c(&bytes), 135_774_820, "{} bytes", bytes.len());
    let mut again = Vec::new();
    hand.restarted(&text).0.write(&mut again);
    assert_eq!(again, bytes);
    for cut in 0..bytes.len() {
        let mut rules = Hand::new(&text).0;
        assert_eq!(rules.restore(&Bytes::copy_from_slice(&bytes[..cut])), Err(StateError), "{cut}");
    }
}

#[test]
fn what_is_wrong_in_a_rule_is_refused_with_the_rule() {
    let check = |rules: &str, expected: &str| {
        let error = settings(rules).expect_err(rules);
        assert!(error.contains(expected), "{rules}: {error}");
    };
    check(&rule("when = \"w > 1\""), "[[rule]] `r` when: at its character 1: there is no column `w`");
    check(&rule("when = \"v + 1\""), "this is int64, and a condition belongs here");
    check(&rule("when = \"v > 1\"\nuntil = \"v <\""), "[[rule]] `r` until: ");
    check(&rule(""), "either `when`, a condition, or `absent`");
    check(&rule("when = \"v > 1\"\nabsent = \"5m\""), "either `when`");
    check(&rule("absent = \"5m\"\nfor = \"5m\""), "goes without");
    check(&rule("absent = \"5m\"\nmessage = \"{v}\""), "{v} has no value here");
    check(&rule("when = \"v > 1\"\nmessage = \"{w}\""), "{w} is none of v, t, device");
    check(&rule("when = \"v > 1\"\nmessage = \"{v\""), "a place is written");
    check(&rule("when = \"v > 1\"\ntopic = \"a/b\""), "two alerts would share `a/b`");
    check(&rule("when = \"v > 1\"\ntopic = \"a/{device}\"\nlabels = { x = \"{t}\" }"), "two alerts would share");
    check(&rule("when = \"v > 1\"\ntopic = \"a/+/{device}\""), "no topic to publish to");
    let commanded = |command: &str| rule(&format!("when = \"v > 1\"\ncommand = {{ {command} }}"));
    check(&commanded("topic = \"a/#\", firing = \"x\""), "[[rule]] `r` command: `a/#` is no topic to publish to");
    check(&commanded("topic = \"a\", firing = \"{w}\""), "command: `{w}`: {w} is none of v, t, device");
    check(&commanded("topic = \"a\""), "missing field `firing`");
    check(&rule("when = \"v > 1\"\nwen = \"v\""), "unknown field `wen`");
    check(&rule("when = \"v > 1\"").replace("\"s\"", "\"z\""), "there is no stream `z`; there are s, s_10s");
    check(&rule("absent = \"5m\"").replace("\"s\"", "\"s_10s\""), "absent is of readings");
    check(&rule("when = \"v > 1\"").repeat(2), "two [[rule]] are called `r`");
    let two = rule("when = \"v > 1\"\ntopic = \"a/{device}\"");
    check(&format!("{two}{}", two.replace("\"r\"", "\"q\"")), "another rule has `a/{device}`");
    check(
        &format!("[alerts]\nalert_horizon = \"5s\"\n{}", rule("when = \"v_max > 1\"").replace("\"s\"", "\"s_10s\"")),
        "backfill",
    );
    check(&format!("[publish]\nsource = \"x\"\n{two}"), "there is no MQTT source `x`");
    check(&format!("[publish]\nurl = \"http://h\"\n{two}"), "is no broker");
}
