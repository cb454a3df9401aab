//! `/`: the status as a page for people, HTML without script, read anew every five seconds. Pure: from a [`Status`] to text.
//!
//! Names, errors, values and reasons come from outside and are escaped, every one of them, where they are written.

use std::fmt::Write;

use chrono::{DateTime, SecondsFormat};

use crate::agent::{Status, StreamStatus};
use crate::clock::Trust;

/// Reasons of quarantine that are shown.
const REASONS_MAX: usize = 10;

const HEAD: &str = "<!doctype html><html lang=\"en\"><head><meta charset=\"utf-8\"><meta http-equiv=\"refresh\" content=\"5\">\
    <meta name=\"viewport\" content=\"width=device-width\"><style>body{font:14px/1.4 sans-serif;margin:1.5em;max-width:75em}\
    table{border-collapse:collapse;margin:0 0 1.5em}th,td{text-align:left;padding:.2em 1em .2em 0;border-bottom:1px solid #ccc;\
    vertical-align:top}td.n{text-align:right;font-variant-numeric:tabular-nums}.bad{color:#b00020;font-weight:bold}\
    h2{font-size:1.1em;margin:0 0 .3em}svg{vertical-align:middle;margin-left:.3em}polyline{fill:none;stroke:#06c}</style>";

/// Of a line, in pixels.
const LINE_WIDTH: f64 = 120.0;
const LINE_HEIGHT: f64 = 20.0;

/// The page.
pub(super) fn render(status: &Status, now_us: i64) -> String {
    let mut page = Page { out: HEAD.to_owned() };
    let edge = escape(&status.edge);
    page.raw(&format!("<title>{edge}</title></head><body><h1>{edge}</h1><p>"));
    page.text(&format!("{}, spool {}, up {}. ", status.agent, status.spool, span(status.uptime_s)));
    page.raw("<a href=\"/status\">status</a> <a href=\"/metrics\">metrics</a></p>");
    page.list("What does not go on for now", &status.problems);
    page.sources(status, now_us);
    page.streams(status, now_us);
    page.alerts(status, now_us);
    page.rules(status);
    page.lanes(status);
    page.cloud(status);
    page.clock(status);
    page.configuration(status);
    page.quarantine(status);
    page.errors(status);
    page.list("Damage since the start", &status.incidents);
    page.out.push_str("</body></html>\n");
    page.out
}

struct Page {
    out: String,
}

impl Page {
    fn raw(&mut self, html: &str) {
        self.out.push_str(html);
    }

    fn text(&mut self, text: &str) {
        self.out.push_str(&escape(text));
    }

    fn table(&mut self, title: &str, columns: &[&str]) {
        self.raw("<h2>");
        self.text(title);
        self.raw("</h2><table><tr>");
        for column in columns {
            self.raw("<th>");
            self.text(column);
            self.raw("</th>");
        }
        self.raw("</tr>");
    }

    /// A row; a cell of `true` is bad news.
    fn row(&mut self, cells: &[(&str, bool)]) {
        self.raw("<tr>");
        for (text, bad) in cells {
            let number = text.starts_with(|first: char| first.is_ascii_digit());
            self.raw(match (bad, number) {
                (true, _) => "<td class=\"bad\">",
                (_, true) => "<td class=\"n\">",
                _ => "<td>",
            });
            self.text(text);
            self.raw("</td>");
        }
        self.raw("</tr>");
    }

    fn sources(&mut self, status: &Status, now_us: i64) {
        self.table(
            "Sources",
            &["source", "state", "messages", "a second", "in quarantine", "missed", "last", "last error"],
        );
        for source in &status.sources {
            let state = if source.connected { "connected" } else { "not connected" };
            let (totals, error) = (&source.totals, source.last_error.as_deref());
            self.row(&[
                (&source.name, false),
                (state, !source.connected),
                (&source.received.to_string(), false),
                (&format!("{:.1}", source.rate), false),
                (&totals.quarantined.to_string(), false),
                (&totals.missed.to_string(), totals.missed > 0),
                (&ago(source.last_arrival_us, now_us), false),
                (error.unwrap_or_default(), error.is_some()),
            ]);
        }
        self.raw("</table>");
    }

    fn streams(&mut self, status: &Status, now_us: i64) {
        let last = "last values, of any device, and those of five minutes";
        let columns = ["stream", "rows", "a second", "", "late", "wait for the cloud", "event time", last];
        self.table("Streams", &columns);
        for stream in &status.streams {
            let watermark = stream.watermark_us.map(|us| format!("{} ({})", time(us), ago(us, now_us)));
            self.raw("<tr><td>");
            self.text(&stream.name);
            self.raw("</td>");
            self.number(&stream.totals.rows.to_string());
            self.number(&format!("{:.1}", stream.rate));
            self.raw("<td>");
            self.line(&stream.rates);
            self.raw("</td>");
            self.number(&stream.totals.late.to_string());
            self.number(&stream.uncommitted.to_string());
            self.raw("<td>");
            self.text(&watermark.unwrap_or_default());
            self.raw("</td><td>");
            self.last_values(stream);
            self.raw("</td></tr>");
        }
        self.raw("</table>");
    }

    fn alerts(&mut self, status: &Status, now_us: i64) {
        if status.firing.is_empty() {
            return;
        }
        let all = status.rules.iter().map(|rule| rule.firing).sum::<usize>().max(status.firing.len());
        let title = match all - status.firing.len() {
            0 => "Alerts".to_owned(),
            more => format!("Alerts, and {more} more"),
        };
        self.table(&title, &["severity", "rule", "device", "message", "since"]);
        for alert in &status.firing {
            let since = format!("{} ({})", time(alert.from_us), ago(alert.from_us, now_us));
            self.row(&[
                (&alert.severity, true),
                (&alert.rule, false),
                (&alert.device, false),
                (&alert.message, false),
                (&since, false),
            ]);
        }
        self.raw("</table>");
    }

    fn rules(&mut self, status: &Status) {
        if status.rules.is_empty() {
            return;
        }
        let columns = ["rule", "pending", "firing", "fired", "resolved", "backfilled", "rows that failed", "refused"];
        self.table("Rules", &columns);
        for rule in &status.rules {
            let totals = &rule.totals;
            self.row(&[
                (&rule.name, false),
                (&rule.pending.to_string(), false),
                (&rule.firing.to_string(), rule.firing > 0),
                (&totals.fired.to_string(), false),
                (&totals.resolved.to_string(), false),
                (&totals.backfilled.to_string(), false),
                (&totals.failed.to_string(), totals.failed > 0),
                (&totals.refused.to_string(), totals.refused > 0),
            ]);
        }
        self.raw("</table>");
        if let Some(publisher) = &status.publisher {
            let state = if publisher.connected { "connected" } else { "not connected" };
            self.table("Broker that gets alerts", &["state", "last error"]);
            let error = publisher.last_error.as_deref();
            self.row(&[(state, !publisher.connected), (error.unwrap_or_default(), error.is_some())]);
            self.raw("</table>");
        }
    }

    fn configuration(&mut self, status: &Status) {
        let configuration = &status.configuration;
        self.table("Configuration", &["version", "taken over", "changes", "refused", "why the last was refused"]);
        let error = configuration.last_error.as_deref();
        self.row(&[
            (&format!("{:016x}", configuration.version), false),
            (&time(configuration.loaded_at_us), false),
            (&configuration.reloads.to_string(), false),
            (&configuration.refused.to_string(), false),
            (error.unwrap_or_default(), error.is_some()),
        ]);
        self.raw("</table>");
    }

    fn number(&mut self, text: &str) {
        self.raw("<td class=\"n\">");
        self.text(text);
        self.raw("</td>");
    }

    fn last_values(&mut self, stream: &StreamStatus) {
        for (index, last) in stream.last.iter().enumerate() {
            if index > 0 {
                self.raw("<br>");
            }
            self.text(&last.name);
            self.raw(" <b>");
            self.text(&last.value);
            self.raw("</b>");
            self.line(&last.samples);
        }
    }

    /// The values as a line from left to right, the least at the bottom and the greatest at the top.
    fn line(&mut self, values: &[f64]) {
        let (min, max) =
            values.iter().fold((f64::INFINITY, f64::NEG_INFINITY), |(min, max), v| (min.min(*v), max.max(*v)));
        let span = max - min;
        if values.len() < 2 || !span.is_finite() {
            return;
        }
        self.raw(&format!("<svg width=\"{LINE_WIDTH}\" height=\"{LINE_HEIGHT}\"><polyline points=\""));
        for (index, value) in values.iter().enumerate() {
            let x = index as f64 / (values.len() - 1) as f64 * LINE_WIDTH;
            let share = if span > 0.0 { (value - min) / span } else { 0.5 };
            let y = 1.0 + (1.0 - share) * (LINE_HEIGHT - 2.0);
            self.raw(&format!("{x:.1},{y:.1} "));
        }
        self.raw("\"/></svg>");
    }

    fn lanes(&mut self, status: &Status) {
        self.table("On disk", &["", "MiB", "of", "batches never sent", ""]);
        let mib = |bytes: u64| format!("{:.1}", bytes as f64 / f64::from(1 << 20));
        let full = |full: bool| if full { "full" } else { "" };
        let journal = &status.journal;
        let (bytes, max) = (mib(journal.bytes), mib(journal.bytes_max));
        self.row(&[("journal", false), (&bytes, false), (&max, false), ("", false), (full(journal.full), true)]);
        for lane in &status.lanes {
            self.row(&[
                (&format!("lane {}", lane.name), false),
                (&mib(lane.bytes), false),
                (&mib(lane.bytes_max), false),
                (&lane.batches_waiting.to_string(), false),
                (full(lane.full), true),
            ]);
        }
        self.raw("</table>");
    }

    fn cloud(&mut self, status: &Status) {
        self.table("Cloud", &["url", "node", "rows committed", "in the spool", "lost", "refused", "last error"]);
        let (uplink, rows) = (&status.uplink, &status.rows);
        let error = uplink.last_error.as_deref();
        self.row(&[
            (&uplink.url, false),
            (uplink.node.as_deref().unwrap_or("does not answer"), uplink.node.is_none()),
            (&rows.committed.to_string(), false),
            (&rows.spooled.to_string(), false),
            (&rows.lost.to_string(), rows.lost > 0),
            (&rows.voided.to_string(), rows.voided > 0),
            (error.unwrap_or_default(), error.is_some()),
        ]);
        self.raw("</table>");
    }

    fn clock(&mut self, status: &Status) {
        self.table("Clock", &["known by", "time", "the machine is ahead by", "ahead of the cloud by"]);
        let clock = &status.clock;
        let by = match clock.by {
            Some(Trust::Ntp) => "NTP",
            Some(Trust::Cloud) => "the cloud",
            Some(_) => "not checked",
            None => "nobody",
        };
        let skew = clock.skew_s.zip(clock.skew_error_s);
        let skew = skew.map_or("not heard yet".to_owned(), |(skew, error)| format!("{skew:.1} s, within {error:.1} s"));
        self.row(&[
            (by, clock.by.is_none()),
            (&time(clock.time_us), false),
            (&format!("{:.1} s", clock.machine_ahead_s), clock.machine_ahead_s.abs() >= 1.0),
            (&skew, clock.is_off),
        ]);
        self.raw("</table>");
    }

    fn quarantine(&mut self, status: &Status) {
        let mut reasons = status.quarantined.iter().collect::<Vec<_>>();
        reasons.sort_by_key(|(_, count)| std::cmp::Reverse(**count));
        self.table("Quarantine", &["reason", "readings"]);
        for (reason, count) in reasons.into_iter().take(REASONS_MAX) {
            self.row(&[(reason, false), (&count.to_string(), false)]);
        }
        self.raw("</table>");
    }

    /// Why readings of each stream went to quarantine last; those of sources and cloud stand beside them.
    fn errors(&mut self, status: &Status) {
        let errors = status.streams.iter().filter_map(|stream| Some((&stream.name, stream.last_error.as_deref()?)));
        let errors = errors.collect::<Vec<_>>();
        if errors.is_empty() {
            return;
        }
        self.table("Last reading in quarantine", &["stream", "why"]);
        errors.into_iter().for_each(|(stream, error)| self.row(&[(stream, false), (error, false)]));
        self.raw("</table>");
    }

    fn list(&mut self, title: &str, lines: &[String]) {
        if lines.is_empty() {
            return;
        }
        self.table(title, &[]);
        lines.iter().for_each(|line| self.row(&[(line, true)]));
        self.raw("</table>");
    }
}

/// Text as HTML, safe in an element and in a quoted attribute; control characters are shown.
fn escape(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    for sign in text.chars() {
        match sign {
            '&' => out.push_str("&amp;"),
            '<' => out.push_str("&lt;"),
            '>' => out.push_str("&gt;"),
            '"' => out.push_str("&quot;"),
            '\'' => out.push_str("&#39;"),
            sign if sign.is_control() => {
                // Writing to a string cannot fail.
                let _ = write!(out, "{}", sign.escape_default());
            }
            sign => out.push(sign),
        }
    }
    out
}

fn time(us: i64) -> String {
    DateTime::from_timestamp_micros(us)
        .map_or_else(|| us.to_string(), |time| time.to_rfc3339_opts(SecondsFormat::Secs, true))
}

fn ago(us: i64, now_us: i64) -> String {
    match us {
        0 => "never".to_owned(),
        _ if us > now_us => "in the future".to_owned(),
        _ => format!("{} ago", span((now_us - us).unsigned_abs() / 1_000_000)),
    }
}

fn span(seconds: u64) -> String {
    match seconds {
        0..120 => format!("{seconds} s"),
        120..7_200 => format!("{} min", seconds / 60),
        7_200..172_800 => format!("{} h", seconds / 3_600),
        _ => format!("{} days", seconds / 86_400),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::agent::{FiringStatus, LastValue, RuleStatus, SourceStatus, StreamStatus};
    use crate::publish::PublisherStatus;

    #[test]
    fn nothing_from_outside_is_html() {
        let evil = "<script>\"'&\n</script>".to_owned();
        let mut status = Status {
            edge: evil.clone(),
            incidents: vec![evil.clone()],
            problems: vec![evil.clone()],
            ..Status::default()
        };
        let (name, last_error) = (evil.clone(), Some(evil.clone()));
        status.sources.push(SourceStatus { name: name.clone(), last_error, ..SourceStatus::default() });
        let last = vec![LastValue { name: evil.clone(), value: evil.clone(), samples: Vec::new() }];
        let last_error = Some(evil.clone());
        status.streams.push(StreamStatus { name, last, last_error, ..StreamStatus::default() });
        status.quarantined.insert(evil.clone(), 3);
        let rule = RuleStatus { name: evil.clone(), ..RuleStatus::default() };
        let (severity, device, message) = (evil.clone(), evil.clone(), evil.clone());
        status.firing.push(FiringStatus { rule: evil.clone(), severity, device, message, ..FiringStatus::default() });
        status.rules.push(rule);
        status.publisher = Some(PublisherStatus { last_error: Some(evil.clone()), ..PublisherStatus::default() });
        status.configuration.last_error = Some(evil.clone());
        status.uplink.url = evil.clone();
        status.uplink.last_error = Some(evil);
        let page = render(&status, 0);
        assert!(!page.contains("<script"), "{page}");
        let escaped = "&lt;script&gt;&quot;&#39;&amp;\\n&lt;/script&gt;";
        assert_eq!(page.matches(escaped).count(), 21, "{page}");
        assert_eq!(page.matches("<table>").count(), page.matches("</table>").count());
    }

    #[test]
    fn the_page_says_what_is_wrong_and_how_long_ago() {
        let mut status = Status::default();
        let source = SourceStatus { name: "s".into(), last_arrival_us: 1_000_000, ..SourceStatus::default() };
        status.sources.push(source);
        for n in 0..20 {
            status.quarantined.insert(format!("reason{n}"), n);
        }
        let page = render(&status, 301_000_000);
        assert!(page.contains("<td class=\"bad\">not connected</td>") && page.contains("5 min ago"), "{page}");
        assert!(page.contains("reason19") && !page.contains("reason9<"), "the most frequent ones");
    }

    #[test]
    fn what_fires_is_shown_and_how_many_more() {
        let mut status = Status::default();
        assert!(!render(&status, 0).contains("Alerts"), "no heading over nothing");
        status.rules.push(RuleStatus { name: "high".into(), firing: 3, ..RuleStatus::default() });
        let (rule, device, message) = ("high".to_owned(), "a".to_owned(), "a: 212".to_owned());
        let alert = FiringStatus { rule, device, message, severity: "critical".into(), ..FiringStatus::default() };
        status.firing.push(FiringStatus { from_us: 60_000_000, ..alert });
        let page = render(&status, 361_000_000);
        assert!(page.contains("<h2>Alerts, and 2 more</h2>") && page.contains("a: 212"), "{page}");
        assert!(page.contains("1970-01-01T00:01:00Z (5 min ago)"), "{page}");
    }

    #[test]
    fn values_are_a_line() {
        let mut page = Page { out: String::new() };
        page.line(&[1.0]);
        page.line(&[]);
        assert_eq!(page.out, "", "one value is no line");
        page.line(&[1.0, 3.0, 2.0]);
        assert!(page.out.contains("points=\"0.0,19.0 60.0,1.0 120.0,10.0 \""), "{}", page.out);
        page.out.clear();
        page.line(&[5.0, 5.0]);
        assert!(page.out.contains("points=\"0.0,10.0 120.0,10.0 \""), "{}", page.out);
        page.out.clear();
        page.line(&[f64::MAX, f64::MIN]);
        assert_eq!(page.out, "", "nothing that is no number");
    }
}
