//! From one configuration to the next while the engine runs.
//!
//! What concerns the uplink, the cuts and the sizes of lanes counts when the order comes. The pipeline changes at the entry
//! of the journal that tells the configuration: all before it is cut, and a snapshot of the new one is written. A crash at
//! any moment finds the old snapshot with the old configuration and comes to the same entry, or the new one.

use segment_log::{Disk, Position};

use super::super::{bandwidths, spool_settings_with};
use super::{Engine, EngineError, Order, incident, spool_directory};
use crate::config::Settings;

impl Engine {
    pub(super) fn obey(&mut self, order: Order) -> Result<(), EngineError> {
        // Those of sources that go would be forgotten.
        self.count_redelivered();
        let Order { settings, cloud, sources } = order;
        let now_ms = self.now_ms();
        let parts = &mut self.parts;
        if let Some(cloud) = cloud {
            parts.uplink.readdress(cloud.urls().len(), now_ms);
            parts.cloud = cloud;
        }
        parts.stop_within = settings.edge.stop_within.0;
        parts.cut = settings.cut.clone();
        (parts.settings, parts.sources) = (settings, sources);
        // A full lane would hold back the entry that makes it larger.
        let in_force = parts.in_force.clone();
        self.change_spool(&in_force)
    }

    /// The journal tells a configuration at `position`; whether it is another one.
    pub(super) fn is_told(&mut self, position: Position, version: u64, text: &str) -> bool {
        let parts = &mut self.parts;
        if version == self.next.as_ref().unwrap_or(&parts.in_force).version {
            return false;
        }
        let next = if version == parts.settings.version {
            parts.settings.clone()
        } else {
            Settings::parse_kept(version, text).unwrap_or_else(|error| {
                let text =
                    format!("journal {position}: a configuration of another agent, which is passed over: {error}");
                incident(&mut parts.incidents, text);
                parts.settings.clone()
            })
        };
        parts.pipeline.end_for(position, &next);
        self.next = Some(next);
        true
    }

    /// Cuts, and goes on by the next configuration; while a lane is full it waits. True when there may be more to read.
    pub(super) fn change(&mut self) -> Result<bool, EngineError> {
        self.cut()?;
        if !self.held.is_empty() {
            return Ok(false);
        }
        let Some(next) = self.next.take() else { return Ok(true) };
        self.change_spool(&next)?;
        let parts = &mut self.parts;
        parts.pipeline = parts.pipeline.changed(&next, &parts.spool.cut_positions())?;
        // With streams in other lanes a restart from the old snapshot would look for rows where they are not.
        parts.snapshot.needed = !parts.pipeline.as_stored();
        tracing::info!(from = parts.in_force.version, to = next.version, "the pipeline goes by the new configuration");
        parts.in_force = next;
        self.full_lanes.clear();
        self.snapshot()?;
        Ok(true)
    }

    fn change_spool(&mut self, of: &Settings) -> Result<(), EngineError> {
        let parts = &mut self.parts;
        let settings = spool_settings_with(of, &parts.settings);
        for damage in parts.spool.change(&Disk, &spool_directory(&parts.data_dir), settings)? {
            incident(&mut parts.incidents, format!("spool: {damage:?}"));
        }
        let bandwidths = bandwidths(&parts.settings, &parts.spool);
        parts.uplink.link.change(parts.settings.cloud.request_bytes.bytes(), &bandwidths);
        Ok(())
    }
}
