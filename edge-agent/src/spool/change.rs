//! Other settings for an open spool.

use std::path::Path;

use segment_log::FileLayer;

use super::{Incident, LaneSettings, Spool, SpoolError, SpoolSettings};

impl<L: FileLayer> Spool<L> {
    /// Goes on with other settings. What they change of the lanes needs all of them read again.
    ///
    /// # Errors
    /// As of [`Spool::open`]; then this one has no lanes any more.
    pub fn change(
        &mut self,
        layer: &L,
        directory: &Path,
        settings: SpoolSettings,
    ) -> Result<Vec<Incident>, SpoolError> {
        // Behind those of the settings stand lanes that are only on disk.
        let of = |lane: &LaneSettings| (lane.name.clone(), lane.max_bytes, lane.segment_bytes);
        let same = settings.lanes.iter().zip(&self.settings.lanes).all(|(one, two)| of(one) == of(two));
        if same && settings.lanes.len() <= self.settings.lanes.len() {
            for (index, lane) in settings.lanes.into_iter().enumerate() {
                super::put::keep_spare(&mut self.lanes[index].log, &lane, directory)?;
                self.lanes[index].settings = lane.clone();
                self.settings.lanes[index] = lane;
            }
            let lanes = std::mem::take(&mut self.settings.lanes);
            self.settings = SpoolSettings { lanes, ..settings };
            return Ok(Vec::new());
        }
        self.mark()?;
        // Their locks go with them.
        self.lanes.clear();
        let incidents;
        (*self, incidents) = Self::open_as(layer, directory, settings, self.id)?;
        Ok(incidents)
    }
}
