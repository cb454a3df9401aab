//! The names of all metrics of the agent, and how a status becomes Prometheus text. Each name stands here once.

use std::fmt::Write;

use crate::agent::Status;

/// The status as Prometheus text, format 0.0.4.
pub fn render(status: &Status) -> String {
    let mut out = Text::default();
    let sources = &status.sources;
    out.family("weir_edge_messages_received_total", "counter", "Messages decided on: journalled or redelivered");
    sources.iter().for_each(|s| out.value(&[("source", &s.name)], s.received as f64));
    out.family("weir_edge_messages_journalled_total", "counter", "Messages applied from the journal");
    sources.iter().for_each(|s| out.value(&[("source", &s.name)], s.totals.journalled as f64));
    out.family("weir_edge_messages_redelivered_total", "counter", "Messages that the journal had already");
    sources.iter().for_each(|s| out.value(&[("source", &s.name)], s.totals.redelivered as f64));
    out.family("weir_edge_messages_missed_total", "counter", "Messages that came while the journal was full");
    sources.iter().for_each(|s| out.value(&[("source", &s.name)], s.totals.missed as f64));
    out.family("weir_edge_source_connected", "gauge", "1 while the source is connected");
    sources.iter().for_each(|s| out.value(&[("source", &s.name)], f64::from(u8::from(s.connected))));
    out.family("weir_edge_readings_total", "counter", "Readings of journalled messages, by what became of them");
    for source in sources {
        let totals = &source.totals;
        let results = [
            ("accepted", totals.accepted),
            ("quarantined", totals.quarantined),
            ("duplicate", totals.duplicate),
            ("waiting", totals.waiting),
            ("filtered", totals.filtered),
        ];
        for (result, count) in results {
            out.value(&[("source", &source.name), ("result", result)], count as f64);
        }
    }
    out.family("weir_edge_quarantined_total", "counter", "Readings in quarantine, by reason");
    status.quarantined.iter().for_each(|(reason, count)| out.value(&[("reason", reason)], *count as f64));
    out.family("weir_edge_stream_rows_total", "counter", "Rows of each stream, those that wait for a cut included");
    status.streams.iter().for_each(|s| out.value(&[("stream", &s.name)], s.totals.rows as f64));
    out.family("weir_edge_stream_late_rows_total", "counter", "Rows that came too late for their windows");
    status.streams.iter().for_each(|s| out.value(&[("stream", &s.name)], s.totals.late as f64));
    out.family("weir_edge_stream_watermark_seconds", "gauge", "Event time up to which windows are closed");
    for stream in &status.streams {
        if let Some(watermark_us) = stream.watermark_us {
            out.value(&[("stream", &stream.name)], watermark_us as f64 / 1e6);
        }
    }
    out.family("weir_edge_stream_lag_seconds", "gauge", "How far the watermark is behind the gateway's clock");
    for stream in &status.streams {
        if let Some(lag_s) = stream.lag_s {
            out.value(&[("stream", &stream.name)], lag_s);
        }
    }
    out.family("weir_edge_stream_rows_uncommitted", "gauge", "Rows that the cloud has not called committed");
    status.streams.iter().for_each(|s| out.value(&[("stream", &s.name)], s.uncommitted as f64));
    out.family("weir_edge_rows_total", "counter", "Rows by where they are: sealed is the sum of the others");
    let rows = &status.rows;
    let places = [
        ("sealed", rows.sealed),
        ("committed", rows.committed),
        ("spooled", rows.spooled),
        ("lost", rows.lost),
        ("voided", rows.voided),
    ];
    places.iter().for_each(|(place, count)| out.value(&[("place", place)], *count as f64));
    out.family("weir_edge_lane_bytes", "gauge", "Bytes on disk of a lane of the spool");
    status.lanes.iter().for_each(|lane| out.value(&[("lane", &lane.name)], lane.bytes as f64));
    out.family("weir_edge_lane_bytes_max", "gauge", "The cap of a lane");
    status.lanes.iter().for_each(|lane| out.value(&[("lane", &lane.name)], lane.bytes_max as f64));
    out.family("weir_edge_lane_bytes_written_total", "counter", "Bytes written since the start or the last fork");
    status.lanes.iter().for_each(|lane| out.value(&[("lane", &lane.name)], lane.bytes_written as f64));
    out.family("weir_edge_lane_batches_waiting", "gauge", "Batches that were never sent");
    status.lanes.iter().for_each(|lane| out.value(&[("lane", &lane.name)], lane.batches_waiting as f64));
    out.family("weir_edge_lane_full", "gauge", "1 while a lane has no room");
    status.lanes.iter().for_each(|lane| out.value(&[("lane", &lane.name)], f64::from(u8::from(lane.full))));
    let journal = &status.journal;
    out.single("weir_edge_journal_bytes", "gauge", "Bytes on disk of the journal", journal.bytes as f64);
    out.single("weir_edge_journal_bytes_max", "gauge", "The cap of the journal", journal.bytes_max as f64);
    out.single("weir_edge_journal_lag_bytes", "gauge", "Journalled and not applied yet", journal.lag_bytes as f64);
    out.single("weir_edge_journal_full", "gauge", "1 while the journal has no room", f64::from(u8::from(journal.full)));
    out.single(
        "weir_edge_journal_syncs_total",
        "counter",
        "Syncs of the journal since the start",
        journal.syncs as f64,
    );
    let uplink = &status.uplink;
    let connected = f64::from(u8::from(uplink.node.is_some()));
    out.single("weir_edge_uplink_connected", "gauge", "1 while a node of the cloud answers", connected);
    out.single("weir_edge_uplink_bytes_total", "counter", "Bytes sent since the start", uplink.bytes_sent as f64);
    let clock = &status.clock;
    let known = f64::from(u8::from(clock.by.is_some()));
    out.single("weir_edge_clock_known", "gauge", "1 while somebody says what time it is", known);
    out.single(
        "weir_edge_clock_machine_ahead_seconds",
        "gauge",
        "The machine's clock before the time by which the agent goes",
        clock.machine_ahead_s,
    );
    if let (Some(skew_s), Some(error_s)) = (clock.skew_s, clock.skew_error_s) {
        out.single("weir_edge_clock_skew_seconds", "gauge", "The machine's clock before the cloud's", skew_s);
        out.single("weir_edge_clock_skew_error_seconds", "gauge", "At most how wrong the skew is", error_s);
    }
    out.single("weir_edge_clock_changes_total", "counter", "Times that were known anew", clock.steps as f64);
    let configuration = &status.configuration;
    out.family("weir_edge_reloads_total", "counter", "Changes of the configuration's file since the start");
    out.value(&[("result", "taken")], configuration.reloads as f64);
    out.value(&[("result", "refused")], configuration.refused as f64);
    out.single("weir_edge_problems", "gauge", "What does not go on for now", status.problems.len() as f64);
    let rules = &status.rules;
    out.family("weir_edge_alerts_firing", "gauge", "Alerts that fire");
    rules.iter().for_each(|rule| out.value(&[("rule", &rule.name)], rule.firing as f64));
    out.family("weir_edge_alerts_pending", "gauge", "Alerts whose condition does not last long enough yet");
    rules.iter().for_each(|rule| out.value(&[("rule", &rule.name)], rule.pending as f64));
    out.family("weir_edge_alerts_total", "counter", "What became of alerts, and what kept rules from judging");
    for rule in rules {
        let totals = &rule.totals;
        let states = [
            ("firing", totals.fired),
            ("resolved", totals.resolved),
            ("backfill", totals.backfilled),
            ("refused", totals.refused),
            ("failed_row", totals.failed),
        ];
        for (state, count) in states {
            out.value(&[("rule", &rule.name), ("state", state)], count as f64);
        }
    }
    if let Some(publisher) = &status.publisher {
        let connected = f64::from(u8::from(publisher.connected));
        out.single("weir_edge_publisher_connected", "gauge", "1 while the broker for alerts is connected", connected);
        out.single("weir_edge_published_total", "counter", "Handed to that broker", publisher.published as f64);
        out.single(
            "weir_edge_publish_dropped_total",
            "counter",
            "Given up: the queue was full",
            publisher.dropped as f64,
        );
        out.single("weir_edge_commands_total", "counter", "Of those, to actuators", publisher.commands as f64);
        out.single("weir_edge_publish_waiting", "gauge", "Waits for that broker", publisher.waiting as f64);
    }
    let commands = &status.commands;
    out.single(
        "weir_edge_commands_asking",
        "gauge",
        "Nodes of the cloud that are asked for commands",
        commands.asking as f64,
    );
    out.family("weir_edge_remote_commands_total", "counter", "Commands of the cloud, by what became of them");
    let became = [
        ("done", commands.done),
        ("refused", commands.refused),
        ("expired", commands.expired),
        ("unknown", commands.unknown),
        ("repeated", commands.repeated),
    ];
    became.iter().for_each(|(became, count)| out.value(&[("result", became)], *count as f64));
    out.single("weir_edge_incidents", "gauge", "Damage found since the start", status.incidents.len() as f64);
    out.out
}

#[derive(Default)]
struct Text {
    out: String,
    /// The family that was named last.
    name: &'static str,
}

impl Text {
    fn family(&mut self, name: &'static str, kind: &str, help: &str) {
        self.name = name;
        // Writing to a string cannot fail.
        let _ = writeln!(self.out, "# HELP {name} {help}\n# TYPE {name} {kind}");
    }

    /// A sample of the family that was named last.
    fn value(&mut self, labels: &[(&str, &str)], value: f64) {
        let label = |(key, value): &(&str, &str)| {
            let value = value.replace('\\', "\\\\").replace('"', "\\\"").replace('\n', "\\n");
            format!("{key}=\"{value}\"")
        };
        let labels = labels.iter().map(label).collect::<Vec<_>>().join(",");
        let labels = if labels.is_empty() { labels } else { format!("{{{labels}}}") };
        let _ = writeln!(self.out, "{}{labels} {value}", self.name);
    }

    fn single(&mut self, name: &'static str, kind: &str, help: &str, value: f64) {
        self.family(name, kind, help);
        self.value(&[], value);
    }
}
