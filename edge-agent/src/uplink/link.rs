//! How much may be under way: pure, like `state`, which asks it before each request.
//!
//! A request carries about what the link and the node take in the time that a small one needs, of live data alone: it grows
//! while it is over sooner, and shrinks when it takes more than three times as long. So what is live waits a few times its
//! usual, however slow the link is and however much backlog goes with it. Until a small one went it is [`TARGET_MS`], or a
//! round trip when that is longer. While live data flows, a request that carried more than that is followed by a rest as long
//! as it took, [`REST_MAX_MS`] at most, in which only what is live goes: over a fast link a backlog would else take all of this
//! machine, and of the node's. What is under way for lanes behind one's own does not count: alerts go at once. But however
//! much a lane has to send, one behind it gets one request for each [`TURN_AFTER`] of those before it. The streams of a lane
//! share its part, and take turns when that is little. A lane's `bandwidth` is a bucket of one second, which a batch that is
//! larger may overdraw.

/// No request is made smaller for a slow link: what a batch has around its rows would become most of it.
pub const REQUEST_BYTES_MIN: usize = 16 << 10;
/// A request of live data alone, whose time is that of the way and of the node's disk, and not of its bytes.
const SMALL_BYTES_MAX: usize = 4 << 10;
/// How long the bytes of a request may take on their way, apart from the round trip.
const TARGET_MS: f64 = 25.0;
/// The same when small ones take less: what a request costs by itself is to stay a small part of it.
const TARGET_MIN_MS: f64 = 4.0;
/// A round trip that is longer than this is a node that does not answer well, not distance.
const TARGET_MAX_MS: f64 = 2_000.0;
/// After so many requests of lanes before it a lane's own goes, though they fill the link.
pub const TURN_AFTER: u32 = 8;
/// The longest rest, so that a slow link is full of the backlog: there it takes little of anybody's time.
const REST_MAX_MS: f64 = 10.0;
/// Live data flows when some came in this time.
const FLOWS_MS: u64 = 1_000;
/// The mean of round trips and of small requests falls at once and rises by this part.
const RISE: f64 = 1.0 / 8.0;

/// What the link has taken, and what is under way.
#[derive(Debug)]
pub struct Link {
    bytes_max: usize,
    /// What may be under way.
    window: usize,
    /// Of requests without batches.
    round_ms: Option<f64>,
    /// Of small requests.
    small_ms: Option<f64>,
    /// Of the last request with batches.
    last_ms: f64,
    /// By lane.
    under_way: Vec<usize>,
    /// Requests of the lanes before, since the last of this lane.
    passed: Vec<u32>,
    /// Until then, by lane, only what is live goes.
    rests_until_ms: Vec<u64>,
    /// When live data was seen last.
    live_ms: Option<u64>,
    buckets: Vec<Option<Bucket>>,
}

#[derive(Debug)]
struct Bucket {
    bytes_per_s: f64,
    bytes: f64,
    at_ms: u64,
}

impl Link {
    /// For requests of up to `bytes_max`; `bandwidths` are those of the lanes, bytes a second.
    pub fn new(bytes_max: usize, bandwidths: &[Option<u64>]) -> Self {
        let bucket = |bandwidth: &Option<u64>| {
            bandwidth.map(|rate| Bucket { bytes_per_s: rate as f64, bytes: rate as f64, at_ms: 0 })
        };
        Self {
            bytes_max,
            window: (4 * REQUEST_BYTES_MIN).min(bytes_max),
            round_ms: None,
            small_ms: None,
            last_ms: 0.0,
            under_way: vec![0; bandwidths.len()],
            passed: vec![0; bandwidths.len()],
            rests_until_ms: vec![0; bandwidths.len()],
            live_ms: None,
            buckets: bandwidths.iter().map(bucket).collect(),
        }
    }

    /// For other limits and other lanes. What is under way counts for no lane any more.
    pub fn change(&mut self, bytes_max: usize, bandwidths: &[Option<u64>]) {
        let (window, round_ms, small_ms) = (self.window.min(bytes_max), self.round_ms, self.small_ms);
        *self = Self { window, round_ms, small_ms, last_ms: self.last_ms, ..Self::new(bytes_max, bandwidths) };
    }

    /// How long the last request with batches took.
    pub fn last_ms(&self) -> u64 {
        self.last_ms as u64
    }

    /// How many bytes a request of a lane may have when `streams` of it have something to send, and `live` data waits in this
    /// one; else when to ask again.
    pub fn room(&mut self, lane: usize, streams: usize, live: bool, now_ms: u64) -> Result<usize, u64> {
        let before = self.under_way.iter().take(lane + 1).sum::<usize>();
        if live {
            self.live_ms = Some(now_ms);
        }
        let rest_ms = self.rests_until_ms.get(lane).copied().filter(|until_ms| *until_ms > now_ms);
        let share = match (rest_ms, live) {
            (Some(until_ms), false) => return Err(until_ms),
            (Some(_), true) => SMALL_BYTES_MAX.min(self.bytes_max),
            (None, _) => (self.window / streams.max(1)).max(REQUEST_BYTES_MIN).min(self.bytes_max),
        };
        let has_turn = self.under_way.get(lane) == Some(&0) && self.passed[lane] >= TURN_AFTER;
        if before > 0 && before + share > self.window && !has_turn {
            return Err(u64::MAX);
        }
        let Some(Some(bucket)) = self.buckets.get_mut(lane) else { return Ok(share) };
        bucket.fill(now_ms);
        if bucket.bytes < 1.0 {
            let wait_ms = (1.0 - bucket.bytes) / bucket.bytes_per_s * 1e3;
            return Err(now_ms.saturating_add(wait_ms.ceil() as u64));
        }
        Ok(share.min(bucket.bytes as usize))
    }

    /// A request of so many bytes goes.
    pub fn sent(&mut self, lane: usize, bytes: usize) {
        if let Some(under_way) = self.under_way.get_mut(lane) {
            *under_way += bytes;
        }
        for (index, passed) in self.passed.iter_mut().enumerate().skip(lane) {
            *passed = if index == lane { 0 } else { passed.saturating_add(1) };
        }
        if let Some(Some(bucket)) = self.buckets.get_mut(lane) {
            bucket.bytes -= bytes as f64;
        }
    }

    /// It has ended after so long; `taken`: with acks.
    pub fn landed(&mut self, lane: usize, bytes: usize, elapsed_ms: f64, taken: bool, now_ms: u64) {
        if let Some(under_way) = self.under_way.get_mut(lane) {
            *under_way = under_way.saturating_sub(bytes);
        }
        self.last_ms = elapsed_ms;
        if !taken {
            self.window = (self.window / 2).max(REQUEST_BYTES_MIN).min(self.bytes_max);
            return;
        }
        if bytes <= SMALL_BYTES_MAX {
            self.small_ms = Some(mean(self.small_ms, elapsed_ms));
            return;
        }
        let flows = self.live_ms.is_some_and(|live_ms| live_ms + FLOWS_MS > now_ms);
        // What went in a rest makes it no longer, or live data that need more than a small request would keep all else away.
        let sent_ms = now_ms.saturating_sub(elapsed_ms as u64);
        if let Some(rests_until_ms) =
            self.rests_until_ms.get_mut(lane).filter(|until_ms| flows && **until_ms <= sent_ms)
        {
            *rests_until_ms = now_ms + elapsed_ms.min(REST_MAX_MS).ceil() as u64;
        }
        let round_ms = self.round_ms.unwrap_or(0.0);
        let (alone_ms, least_ms) = match self.small_ms {
            Some(small_ms) => (small_ms.max(round_ms), TARGET_MIN_MS),
            None => (round_ms, TARGET_MS),
        };
        let target_ms = alone_ms.clamp(least_ms, TARGET_MAX_MS);
        let transfer_ms = elapsed_ms - alone_ms;
        if transfer_ms > 2.0 * target_ms && bytes > REQUEST_BYTES_MIN {
            let fits = (bytes as f64 * target_ms / transfer_ms) as usize;
            self.window = fits.max(self.window / 2).max(REQUEST_BYTES_MIN).min(self.window);
        } else if transfer_ms < target_ms && bytes >= self.window / 4 {
            self.window = (self.window * 2).min(self.bytes_max);
        }
    }

    /// A request without batches was answered.
    pub fn answered(&mut self, elapsed_ms: f64) {
        self.round_ms = Some(mean(self.round_ms, elapsed_ms));
    }

    /// Another node, another way to it.
    pub fn forget(&mut self) {
        (self.round_ms, self.small_ms) = (None, None);
        self.window = (4 * REQUEST_BYTES_MIN).min(self.bytes_max);
    }
}

fn mean(of: Option<f64>, elapsed_ms: f64) -> f64 {
    match of {
        Some(mean_ms) if mean_ms < elapsed_ms => mean_ms + (elapsed_ms - mean_ms) * RISE,
        _ => elapsed_ms,
    }
}

impl Bucket {
    fn fill(&mut self, now_ms: u64) {
        let elapsed_ms = now_ms.saturating_sub(self.at_ms);
        self.at_ms = now_ms;
        self.bytes = (self.bytes + self.bytes_per_s * elapsed_ms as f64 / 1e3).min(self.bytes_per_s);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A link of a round trip and a rate: how large requests become, and how long the last took (ms).
    fn settled(round_ms: f64, bytes_per_s: f64) -> (usize, f64) {
        let mut link = Link::new(4 << 20, &[None]);
        link.answered(round_ms);
        for _ in 0..50 {
            let bytes = link.room(0, 1, false, 0).unwrap();
            link.sent(0, bytes);
            link.landed(0, bytes, round_ms + bytes as f64 / bytes_per_s * 1e3, true, 0);
        }
        (link.room(0, 1, false, 0).unwrap(), link.last_ms)
    }

    #[test]
    fn requests_become_as_large_as_the_link_takes_in_a_moment() {
        assert_eq!(settled(1.0, 1e9).0, 4 << 20);
        let (bytes, took_ms) = settled(2.0, 5e6);
        assert!((64 << 10..=512 << 10).contains(&bytes) && took_ms < 120.0, "{bytes} in {took_ms} ms");
        assert_eq!(settled(40.0, 10e3).0, REQUEST_BYTES_MIN);
        // A satellite: what is one round trip long fills half of it at least.
        let (bytes, took_ms) = settled(600.0, 1e6);
        assert!(bytes >= 300_000 && took_ms < 2_500.0, "{bytes} in {took_ms} ms");
    }

    /// A node that is near and takes 40 MB/s: requests of live data alone take 5 ms, or 30 where its disk is slow.
    #[test]
    fn what_is_live_waits_a_few_times_its_usual_while_a_backlog_goes() {
        for (alone_ms, usual) in [(5.0, 100), (30.0, 100), (5.0, 0)] {
            let mut link = Link::new(4 << 20, &[None]);
            link.answered(1.0);
            for _ in 0..usual {
                link.sent(0, 900);
                link.landed(0, 900, alone_ms, true, 0);
            }
            let (mut longest_ms, mut sent) = (0.0_f64, 0);
            for turn in 0..1_000 {
                let bytes = link.room(0, 1, false, 0).unwrap();
                let took_ms = alone_ms + bytes as f64 / 40e3;
                link.sent(0, bytes);
                link.landed(0, bytes, took_ms, true, 0);
                // At first it is found out.
                longest_ms = if turn < 10 { 0.0 } else { longest_ms.max(took_ms) };
                sent += bytes;
            }
            if usual > 0 {
                assert!(longest_ms <= 3.5 * alone_ms, "{longest_ms} ms beside {alone_ms}");
            }
            // No more than half of the time goes to what each request costs.
            assert!(sent > 1_000 * (alone_ms * 40e3) as usize / 2, "{sent} bytes beside {alone_ms} ms");
        }
    }

    /// A near node: what is live goes between, and the backlog has half of the time, or all when nothing is live.
    #[test]
    fn a_backlog_leaves_half_of_the_time_to_what_is_live() {
        // Live requests that are not small, too, of 3 ms each.
        for (live, took_ms, live_bytes, least, most) in
            [(true, 5, 900, 40, 60), (true, 200, 900, 90, 97), (false, 5, 0, 100, 100), (true, 6, 90_000, 40, 60)]
        {
            let mut link = Link::new(4 << 20, &[None]);
            let (mut now_ms, mut large_ms, mut waited_ms) = (10_000, 0, 0);
            while now_ms < 20_000 {
                match link.room(0, 1, live, now_ms) {
                    Ok(bytes) => {
                        let rests = bytes <= SMALL_BYTES_MAX;
                        let (bytes, elapsed_ms) = if rests { (live_bytes, 3) } else { (bytes, took_ms) };
                        large_ms += if rests { 0 } else { elapsed_ms };
                        now_ms += elapsed_ms;
                        link.sent(0, bytes);
                        link.landed(0, bytes, elapsed_ms as f64, true, now_ms);
                    }
                    Err(until_ms) => {
                        waited_ms += until_ms - now_ms;
                        now_ms = until_ms;
                    }
                }
            }
            let share = large_ms / 100;
            assert!((least..=most).contains(&share), "{share} % of the time to requests of {took_ms} ms");
            assert_eq!(waited_ms, 0, "what is live waits for nothing");
        }
        // A live batch came, and none waits: the backlog rests.
        let mut link = Link::new(4 << 20, &[None]);
        link.room(0, 1, true, 0).unwrap();
        link.sent(0, 100_000);
        link.landed(0, 100_000, 5.0, true, 5);
        assert_eq!(link.room(0, 1, false, 5), Err(10));
        assert!(link.room(0, 1, false, 10).unwrap() >= REQUEST_BYTES_MIN);
        // None came for a while.
        link.landed(0, 100_000, 5.0, true, 2_000);
        assert!(link.room(0, 1, false, 2_000).unwrap() >= REQUEST_BYTES_MIN);
    }

    #[test]
    fn what_is_urgent_does_not_wait_for_the_backlog() {
        let mut link = Link::new(4 << 20, &[None, None]);
        let bytes = link.room(1, 1, false, 0).unwrap();
        link.sent(1, bytes);
        assert_eq!(link.room(1, 1, false, 0), Err(u64::MAX));
        assert_eq!(link.room(0, 1, false, 0), Ok(bytes));
        link.sent(0, bytes);
        assert_eq!(link.room(0, 1, false, 0), Err(u64::MAX));
        link.landed(0, bytes, 10.0, false, 0);
        assert_eq!(link.room(0, 1, false, 0), Ok(bytes / 2));
        assert_eq!(link.room(0, 3, false, 0), Ok(REQUEST_BYTES_MIN));
    }

    /// The lane before has something under way at every moment.
    #[test]
    fn a_lane_behind_a_busy_one_gets_its_share() {
        let mut link = Link::new(4 << 20, &[None, None, None]);
        let mut sent = [0, 0, 0];
        link.sent(0, 1_000);
        for _ in 0..900 {
            link.sent(0, 1_000);
            link.landed(0, 1_000, 5.0, true, 0);
            sent[0] += 1;
            for lane in [1, 2] {
                if let Ok(bytes) = link.room(lane, 1, false, 0) {
                    link.sent(lane, bytes);
                    link.landed(lane, bytes, 5.0, true, 0);
                    sent[lane] += 1;
                }
            }
        }
        assert!((100..=120).contains(&sent[1]) && (100..=140).contains(&sent[2]), "{sent:?}");
    }

    #[test]
    fn a_lane_with_a_bandwidth_sends_no_more_than_that() {
        let mut link = Link::new(4 << 20, &[Some(10_000)]);
        let (mut sent, mut now_ms) = (0, 0);
        while now_ms < 60_000 {
            match link.room(0, 1, false, now_ms) {
                // A batch is larger than what is left now and then.
                Ok(bytes) => {
                    let bytes = bytes.max(3_000);
                    link.sent(0, bytes);
                    link.landed(0, bytes, 1.0, true, 0);
                    sent += bytes;
                }
                Err(until_ms) => {
                    assert!(until_ms > now_ms);
                    now_ms = until_ms;
                }
            }
        }
        assert!((590_000..=620_000).contains(&sent), "{sent} bytes in a minute");
    }
}
