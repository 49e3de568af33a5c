//! Outbound: clear packets in, ESP out. Steps 3 to 7 of a packet's path.

use crate::{
    Batch, OuterHeaders, PacketBuf, Report, Verdict,
    batch::Outer,
    esp::{Jobs, encap},
    spd::{AnyEnds, Decision},
    tables::{Sender, Tables, Tunnel},
    wire::{Flow, FlowKey, Head, protocol},
};
use arrayvec::ArrayVec;
use esplane_api::{DropReason, SaEvent, TunnelId};
use std::{net::IpAddr, ptr, sync::atomic::Ordering::Relaxed};

/// Packets that go through the steps together, at most: bounds what lies on the stack.
pub(crate) const CHUNK_PACKETS: usize = 64;

/// One worker's outbound side.
#[derive(Debug)]
pub struct Outbound {
    chunk_packets: usize,
}

/// A packet on its way into a tunnel.
struct Leaving<'t> {
    /// Its place in the chunk.
    at: usize,
    tunnel: &'t Tunnel,
    sender: &'t Sender,
    payload_bytes: usize,
    next_header: u8,
}

/// A packet that waits for the AEAD, beside its job.
struct Numbered<'t> {
    at: usize,
    sender: &'t Sender,
    number: u64,
}

/// What becomes of a packet by its flow alone; kept for the next packet of the same flow.
#[derive(Clone, Copy)]
enum Route<'t> {
    Send(&'t Tunnel, &'t Sender),
    Other(Verdict),
}

type Chunk<T> = ArrayVec<T, CHUNK_PACKETS>;

impl Outbound {
    /// Takes up to `capacity` packets (and at most 64) through the steps at once.
    pub fn new(capacity: usize) -> Self {
        Self {
            chunk_packets: capacity.clamp(1, CHUNK_PACKETS),
        }
    }

    /// Decides over every packet whose verdict is pending: it is sealed in place and goes on, is
    /// held until its tunnel has an SA, passes in clear, or is dropped and counted. Data starts at
    /// the inner IP header.
    pub fn process(&mut self, tables: &Tables, batch: &mut Batch, report: &mut Report) {
        let (arena, packets) = batch.parts_mut();
        for chunk in packets.chunks_mut(self.chunk_packets) {
            // 3, 4: classify, look up
            let mut leaving = Chunk::new();
            classify(tables, arena, chunk, &mut leaving, report);
            // 5: sequence; 6: crypt; 7: finish
            seal(tables, arena, chunk, &leaving, report);
        }
    }

    /// Pushes one sealed dummy packet (RFC 4303 §2.6) of the tunnel's SA, ready to be sent. `false`
    /// if the tunnel has none that can send, or the batch has no room.
    pub fn dummy(
        &mut self,
        tables: &Tables,
        tunnel: TunnelId,
        batch: &mut Batch,
        report: &mut Report,
    ) -> bool {
        let Some(tunnel) = tables.tunnel_by_id(tunnel) else {
            return false;
        };
        let Some(sender) = &tunnel.sender else {
            report.raise(SaEvent::SaNeeded { tunnel: tunnel.id });
            return false;
        };
        if !batch.push(&[], Outer::NONE) {
            return false;
        }
        let (arena, packets) = batch.parts_mut();
        let Some(packet) = packets.last_mut() else {
            return false;
        };
        sender.header.fill(&mut packet.outer, 0, false);
        let leaving = Leaving {
            at: 0,
            tunnel,
            sender,
            payload_bytes: 0,
            next_header: protocol::NO_NEXT_HEADER,
        };
        let chunk = std::slice::from_mut(packet);
        seal(tables, arena, chunk, &[leaving], report);
        packet.verdict == Verdict::Forward
    }
}

/// Steps 3 and 4: which packets leave, in which tunnel. All others get their verdict here.
fn classify<'t>(
    tables: &'t Tables,
    arena: &[u8],
    chunk: &mut [PacketBuf],
    leaving: &mut Chunk<Leaving<'t>>,
    report: &mut Report,
) {
    let mut last: Option<(FlowKey, Route<'t>)> = None;
    for (at, packet) in chunk.iter_mut().enumerate() {
        if packet.verdict != Verdict::Pending {
            continue;
        }
        let data = arena.get(packet.data_range()).unwrap_or_default();
        let Some((head, route)) = look_up(tables, data, &mut last) else {
            drop_packet(packet, DropReason::InnerMalformed, report);
            continue;
        };
        match route {
            Route::Send(tunnel, sender) => {
                let fits = sender.header.can_carry(head.total_bytes)
                    && encap::has_room(packet, head.total_bytes, sender.header.bytes());
                if !fits {
                    drop_packet(packet, DropReason::InnerTooBig, report);
                    continue;
                }
                sender.header.fill(&mut packet.outer, head.tos, head.df);
                leaving.push(Leaving {
                    at,
                    tunnel,
                    sender,
                    payload_bytes: head.total_bytes,
                    next_header: head.next_header,
                });
            }
            Route::Other(Verdict::Drop(reason)) => drop_packet(packet, reason, report),
            Route::Other(verdict) => {
                packet.verdict = verdict;
                if let Verdict::Hold(tunnel) = verdict {
                    report.raise(SaEvent::SaNeeded { tunnel });
                }
            }
        }
    }
}

/// Runs of one flow are looked up once.
#[inline]
fn look_up<'t>(
    tables: &'t Tables,
    data: &[u8],
    last: &mut Option<(FlowKey, Route<'t>)>,
) -> Option<(Head, Route<'t>)> {
    if let Some(head) = Head::parse(data) {
        return match *last {
            Some((key, route)) if head.key == key => Some((head, route)),
            _ => {
                let route = route(tables, &AnyEnds::of_key(&head.key));
                *last = Some((head.key, route));
                Some((head, route))
            }
        };
    }
    let flow = Flow::parse(data)?;
    Some((flow.head(), route(tables, &AnyEnds::of_flow(&flow)?)))
}

fn route<'t>(tables: &'t Tables, ends: &AnyEnds) -> Route<'t> {
    let drop = |reason| Route::Other(Verdict::Drop(reason));
    match tables.spd.decide_ends(ends) {
        // RFC 4301 §5.1: no policy is discard. What the kernel says to its link by itself is no
        // mistake of anyone's.
        None if stays_on_link(ends.destination()) => drop(DropReason::LinkLocal),
        None => drop(DropReason::NoPolicy),
        Some(Decision::Discard) => drop(DropReason::PolicyDiscard),
        Some(Decision::Bypass) => Route::Other(Verdict::Bypass),
        Some(Decision::Protect(slot)) => match tables.tunnel(slot) {
            None => drop(DropReason::NoPolicy), // cannot be: both come from one snapshot
            Some(tunnel) => match &tunnel.sender {
                Some(sender) => Route::Send(tunnel, sender),
                None => Route::Other(Verdict::Hold(tunnel.id)),
            },
        },
    }
}

/// Whether routers never forward to there (RFC 3927 §2.7, RFC 5771 §4, RFC 4291 §2.5.6 and §2.7).
fn stays_on_link(destination: IpAddr) -> bool {
    match destination {
        IpAddr::V4(v4) => {
            v4.is_link_local() || v4.is_broadcast() || v4.octets()[..3] == [224, 0, 0]
        }
        IpAddr::V6(v6) => {
            v6.is_unicast_link_local() || (v6.is_multicast() && v6.octets()[1] & 0x0f <= 2)
        }
    }
}

/// Steps 5 to 7 for all packets of a chunk that leave.
fn seal(
    tables: &Tables,
    arena: &mut [u8],
    chunk: &mut [PacketBuf],
    leaving: &[Leaving<'_>],
    report: &mut Report,
) {
    // 5: numbers and lifetimes, once per run of packets with one SA
    let mut numbered = Chunk::new();
    let mut jobs = Jobs::new();
    for run in leaving.chunk_by(|a, b| ptr::eq(a.sender, b.sender)) {
        number(arena, chunk, run, &mut numbered, &mut jobs, report);
    }
    // 6: the whole chunk in one call
    tables.aead.seal(arena, &mut jobs);
    // 7: outer headers
    for (numbered, job) in numbered.iter().zip(&jobs) {
        let packet = &mut chunk[numbered.at];
        let written = tables.settings.outer_headers == OuterHeaders::ByKernel
            || numbered.sender.header.write(arena, packet, numbered.number);
        if job.ok && written {
            packet.verdict = Verdict::Forward;
        } else {
            drop_packet(packet, DropReason::InnerTooBig, report); // cannot be: room was checked
        }
    }
}

/// Step 5 for one run, and all of step 6 that is not the AEAD's.
fn number<'t>(
    arena: &mut [u8],
    chunk: &mut [PacketBuf],
    run: &[Leaving<'t>],
    numbered: &mut Chunk<Numbered<'t>>,
    jobs: &mut Jobs<'t>,
    report: &mut Report,
) {
    let Some(Leaving { tunnel, sender, .. }) = run.first() else {
        return;
    };
    let sa = &sender.sa;
    let within_lifetime = sa
        .usage
        .room_for(run.iter().map(|packet| packet.payload_bytes));
    let numbers = sa.sequence.reserve(within_lifetime as u32);
    let sent = (numbers.end - numbers.start) as usize;

    for (packet, number) in run.iter().zip(numbers) {
        let buf = &mut chunk[packet.at];
        let sealable = encap::encap(
            arena,
            buf,
            sa,
            number,
            packet.payload_bytes,
            packet.next_header,
            jobs,
        );
        match sealable {
            Some(()) => numbered.push(Numbered {
                at: packet.at,
                sender: packet.sender,
                number,
            }),
            None => drop_packet(buf, DropReason::InnerTooBig, report), // cannot be: room was checked
        }
    }
    for (place, packet) in run.iter().enumerate().skip(sent) {
        let reason = if place < within_lifetime {
            DropReason::SequenceExhausted
        } else {
            DropReason::OutboundLifetimeExpired
        };
        drop_packet(&mut chunk[packet.at], reason, report);
    }

    if within_lifetime < run.len()
        && let Some(unit) = sa.usage.ended_by()
    {
        report.raise(SaEvent::HardExpired { sa: sa.id, unit }); // as long as packets want to use it
    }
    if sent < within_lifetime && sa.sequence.is_exhausted() {
        report.raise(SaEvent::SequenceExhausted { sa: sa.id });
    }
    if sa.sequence.is_low() {
        let next = sa.sequence.next();
        report.raise(SaEvent::SequenceLow { sa: sa.id, next });
    }
    account(tunnel, sender, &run[..sent], report);
}

/// Counts what a run has carried.
fn account(tunnel: &Tunnel, sender: &Sender, carried: &[Leaving<'_>], report: &mut Report) {
    let sa = &sender.sa;
    let bytes: usize = carried.iter().map(|packet| packet.payload_bytes).sum();
    sa.usage.add(carried.len() as u64, bytes as u64, |reached| {
        report.raise(reached.event(sa.id));
    });
    let data = carried
        .iter()
        .filter(|packet| packet.next_header != protocol::NO_NEXT_HEADER);
    let sent = &tunnel.activity.sent_data_packets;
    sent.fetch_add(data.count() as u64, Relaxed);
}

fn drop_packet(packet: &mut PacketBuf, reason: DropReason, report: &mut Report) {
    packet.verdict = Verdict::Drop(reason);
    report.count_drop(reason);
}
