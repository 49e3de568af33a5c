//! What a worker tells about its batches: events for the control planes, drops for the statistics.

use arrayvec::ArrayVec;
use esplane_api::{DropCounters, DropReason, SaEvent};

/// Events one report can hold. More in one turn of a worker are lost; each is raised again while
/// its cause lasts.
pub const EVENTS_MAX: usize = 64;

/// Events and drops of one worker since it last handed them over. Allocates nothing.
#[derive(Debug, Default)]
pub struct Report {
    events: ArrayVec<SaEvent, EVENTS_MAX>,
    /// Packets dropped, by reason.
    pub drops: DropCounters,
}

impl Report {
    /// An empty one.
    pub fn new() -> Self {
        Self::default()
    }

    /// The events, oldest first; no two with the same cause.
    pub fn events(&self) -> &[SaEvent] {
        &self.events
    }

    /// Takes the events out, oldest first.
    pub fn drain_events(&mut self) -> impl Iterator<Item = SaEvent> + '_ {
        self.events.drain(..)
    }

    /// Forgets events and drops.
    pub fn clear(&mut self) {
        self.events.clear();
        self.drops = DropCounters::default();
    }

    /// Adds an event. One with the same cause is replaced: the newer one knows more. `false` if
    /// there was no room for it.
    pub fn raise(&mut self, event: SaEvent) -> bool {
        // Newest first: under load the same event comes again and again.
        if let Some(known) = self.events.iter_mut().rev().find(|e| same_cause(e, &event)) {
            *known = event;
            true
        } else {
            self.events.try_push(event).is_ok()
        }
    }

    /// Counts one dropped packet.
    pub fn count_drop(&mut self, reason: DropReason) {
        self.drops.add(reason, 1);
    }
}

/// Whether two events ask for the same thing, whatever figures they carry.
fn same_cause(a: &SaEvent, b: &SaEvent) -> bool {
    use SaEvent::{EndpointMoved, SequenceLow};
    match (a, b) {
        (SequenceLow { sa: a, .. }, SequenceLow { sa: b, .. }) => a == b,
        (EndpointMoved { tunnel: a, .. }, EndpointMoved { tunnel: b, .. }) => a == b,
        _ => a == b,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use esplane_api::TunnelId;

    #[test]
    fn a_repeated_cause_is_told_once_with_its_newest_figures() {
        let mut report = Report::new();
        let tunnel = TunnelId(1);
        for port in [1, 2] {
            report.raise(SaEvent::SaNeeded { tunnel });
            report.raise(SaEvent::EndpointMoved {
                tunnel,
                remote: ([192, 0, 2, 1], port).into(),
            });
        }
        assert_eq!(report.events().len(), 2);
        assert_eq!(
            report.events()[1],
            SaEvent::EndpointMoved {
                tunnel,
                remote: ([192, 0, 2, 1], 2).into()
            }
        );
        assert_eq!(report.drain_events().count(), 2);
        assert!(report.events().is_empty());
    }

    #[test]
    fn a_flood_of_events_is_bounded() {
        let mut report = Report::new();
        for number in 0..1000 {
            report.raise(SaEvent::SaNeeded {
                tunnel: TunnelId(number),
            });
        }
        assert_eq!(report.events().len(), EVENTS_MAX);
    }
}
