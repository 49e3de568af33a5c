//! Numbers are stored in the kernel before an outbound SA is installed or goes on; see [`super::numbers`].

use super::{
    charon::unique_id,
    engine::Importer,
    kernel::{OutboundStage, Serial},
    notice::ImportEvent,
    numbers::{Chunk, esn},
    output::ImportOutput,
};
use crate::{
    vici::ViciRequest,
    xfrm::{Progress, XfrmReply, XfrmRequest},
};
use esplane_api::{Direction, Now, SaCommand, SaId};
use std::time::Duration;

/// How long a Store may take until it is sent again.
const STORE_PATIENCE: Duration = Duration::from_secs(2);
/// How long charon may take for a successor until it is asked again.
const REKEY_PATIENCE: Duration = Duration::from_secs(30);

impl Importer {
    /// Asks the kernel to store the numbers an outbound SA is to begin with.
    pub(super) fn reserve(&mut self, now: Now, serial: Serial) {
        let Some(sa) = self.kernel.get(serial) else {
            return;
        };
        let Some(name) = sa.name else {
            return;
        };
        let start = self.numbers.reserve(name, esn(&sa.fact), 0);
        let stage = match start {
            Some(start) => OutboundStage::Reserving {
                start,
                since: now.monotonic,
            },
            None => OutboundStage::Unusable { asked: None },
        };
        let past_unknown = self
            .numbers
            .get(name)
            .is_some_and(|known| known.used_until.is_none());
        let (spi, label) = (sa.fact.key.spi, self.label(sa.child, sa.tunnel));
        if let Some(sa) = self.kernel.get_mut(serial) {
            sa.outbound = stage;
        }
        if start.is_some() {
            self.store(serial, true);
            self.wake(now.monotonic + STORE_PATIENCE);
        } else {
            if past_unknown {
                self.notice(label, ImportEvent::PastUnknown { spi });
            }
            self.ask_for_successor(now, serial);
        }
    }

    /// Has the kernel store what an SA has carried, and with `numbers` what is reserved for it.
    pub(super) fn store(&mut self, serial: Serial, numbers: bool) {
        let Some(sa) = self.kernel.get(serial) else {
            return;
        };
        let Some(known) = sa.name.and_then(|name| self.numbers.get(name)) else {
            return;
        };
        let outbound = sa.direction == Some(Direction::Outbound);
        let request = XfrmRequest::Store {
            key: sa.fact.key,
            progress: Progress {
                sent: (outbound && numbers).then_some(known.requested_until),
                received: (!outbound).then_some(known.received),
                packets: sa.stored.0,
                bytes: sa.stored.1,
            },
        };
        self.outputs.push_back(ImportOutput::Xfrm(request));
    }

    /// The kernel's copy of an outbound SA may have been replaced by one with a lower number: store again what is used.
    pub(super) fn lift_stored_number(&mut self, now: Now, serial: Serial) {
        let Some(sa) = self.kernel.get_mut(serial) else {
            return;
        };
        let path = match sa.outbound {
            OutboundStage::Installed { path } | OutboundStage::Extending { path, .. } => path,
            // An answer under way is about what was there before.
            OutboundStage::Reserving { .. } | OutboundStage::Ready { .. } => {
                sa.outbound = OutboundStage::New;
                return;
            }
            OutboundStage::New | OutboundStage::Unusable { .. } => return,
        };
        let Some(name) = sa.name else {
            return;
        };
        let used = self.numbers.get(name).and_then(|known| known.used_until);
        if used.is_none_or(|used| sa.fact.sequence_sent >= used) {
            return;
        }
        let further = self.numbers.reserve(name, esn(&sa.fact), 0);
        if let Some(until) = further.and_then(|start| start.reserved_until) {
            sa.outbound = OutboundStage::Extending {
                path,
                until,
                since: now.monotonic,
            };
            self.wake(now.monotonic + STORE_PATIENCE);
        }
        self.store(serial, true);
    }

    /// The kernel's answer to a Store.
    pub(super) fn stored(&mut self, now: Now, serial: Serial, reply: &XfrmReply) {
        let Some(sa) = self.kernel.get_mut(serial) else {
            return;
        };
        let Some(name) = sa.name else {
            return;
        };
        let stored = reply.sequence_sent.filter(|_| reply.done);
        match sa.outbound {
            OutboundStage::Reserving { start, .. } => {
                let until = start.reserved_until.unwrap_or(u64::MAX);
                if stored.is_some_and(|stored| stored >= until) {
                    sa.outbound = OutboundStage::Ready { start };
                    self.dirty.extend(sa.tunnel);
                } else if !reply.done {
                    self.not_stored(now, serial);
                }
            }
            OutboundStage::Extending { path, until, .. } => {
                if stored.is_some_and(|stored| stored >= until) {
                    sa.outbound = OutboundStage::Installed { path };
                    self.numbers.hand_over(name, until);
                    self.command_extension(serial, until);
                } else if !reply.done {
                    self.not_stored(now, serial);
                }
            }
            OutboundStage::New
            | OutboundStage::Ready { .. }
            | OutboundStage::Installed { .. }
            | OutboundStage::Unusable { .. } => {}
        }
    }

    pub(super) fn not_stored(&mut self, now: Now, serial: Serial) {
        let Some(sa) = self.kernel.get_mut(serial) else {
            return;
        };
        // Mostly its DELSA is on its way; only a second failure is worth a word.
        sa.store_failures += 1;
        let told = sa.store_failures == 2;
        let (spi, child, tunnel) = (sa.fact.key.spi, sa.child, sa.tunnel);
        if told {
            self.notice(self.label(child, tunnel), ImportEvent::NotStored { spi });
        }
        self.wake(now.monotonic + STORE_PATIENCE);
    }

    /// Has further numbers stored for an SA that has used half of its own.
    pub(super) fn extend(&mut self, now: Now, sa: SaId, next: u64) {
        let Some(serial) = self.serial_of(sa) else {
            return;
        };
        let Some(sa) = self.kernel.get_mut(serial) else {
            return;
        };
        let (OutboundStage::Installed { path }, Some(name)) = (sa.outbound, sa.name) else {
            return;
        };
        let width = esn(&sa.fact);
        if let Some(start) = self.numbers.reserve(name, width, 0)
            && let Some(until) = start.reserved_until
        {
            sa.outbound = OutboundStage::Extending {
                path,
                until,
                since: now.monotonic,
            };
            self.store(serial, true);
            self.wake(now.monotonic + STORE_PATIENCE);
        }
        if next > Chunk::nearly_all(width) {
            self.tell_limit(now, serial, false);
        }
    }

    pub(super) fn command_extension(&mut self, serial: Serial, reserved_until: u64) {
        let Some(tunnel) = self.kernel.get(serial).and_then(|sa| sa.tunnel) else {
            return;
        };
        let mirror = self.tunnels.get(&tunnel).map(|tunnel| &tunnel.mirror);
        let has = mirror.and_then(|mirror| mirror.outbound.iter().find(|has| has.serial == serial));
        if let Some(has) = has {
            let sa = SaId {
                tunnel,
                direction: Direction::Outbound,
                spi: has.spi,
            };
            let command = SaCommand::ExtendSequence { sa, reserved_until };
            self.commands(Vec::new(), vec![command]);
        }
    }

    /// Asks charon for a successor of an SA that cannot send.
    pub(super) fn ask_for_successor(&mut self, now: Now, serial: Serial) {
        let Some(sa) = self.kernel.get_mut(serial) else {
            return;
        };
        sa.outbound = OutboundStage::Unusable {
            asked: Some(now.monotonic),
        };
        let (key, child) = (sa.fact.key, sa.child);
        let output =
            match child.filter(|child| self.charon.connected && self.charon.is_there(*child)) {
                Some(child) => ImportOutput::Vici(ViciRequest::RekeyChild {
                    unique_id: unique_id(child),
                }),
                None => ImportOutput::Xfrm(XfrmRequest::Expire { key, hard: false }),
            };
        self.outputs.push_back(output);
        self.wake(now.monotonic + REKEY_PATIENCE);
    }

    /// Repeats what has had no effect for long.
    pub(super) fn retry(&mut self, now: Now) {
        let overdue = |since: Duration, patience| now.monotonic >= since + patience;
        let mut stores = Vec::new();
        let mut rekeys = Vec::new();
        let mut later = Vec::new();
        for (serial, sa) in self.kernel.iter() {
            let (since, patience, due) = match sa.outbound {
                OutboundStage::Reserving { since, .. } | OutboundStage::Extending { since, .. } => {
                    (since, STORE_PATIENCE, &mut stores)
                }
                OutboundStage::Unusable { asked: Some(since) } => {
                    (since, REKEY_PATIENCE, &mut rekeys)
                }
                _ => continue,
            };
            if overdue(since, patience) {
                due.push(serial);
            } else {
                later.push(since + patience);
            }
        }
        for serial in stores {
            if let Some(sa) = self.kernel.get_mut(serial) {
                match &mut sa.outbound {
                    OutboundStage::Reserving { since, .. }
                    | OutboundStage::Extending { since, .. } => {
                        *since = now.monotonic;
                    }
                    _ => {}
                }
            }
            self.store(serial, true);
            later.push(now.monotonic + STORE_PATIENCE);
        }
        for serial in rekeys {
            self.ask_for_successor(now, serial);
        }
        for at in later {
            self.wake(at);
        }
    }
}
