//! Outbound: clear packets in, ESP out. Steps 3 to 7 of a packet's path.

use crate::{
    Batch, OuterHeaders, PacketBuf, Report, Verdict,
    aead::Job,
    batch::Outer,
    esp::{Jobs, encap},
    outer::OuterSides,
    spd::{AnyEnds, Decision},
    tables::{Sender, Tables, Tunnel},
    wire::{Flow, FlowKey, Head, protocol},
};
use arrayvec::ArrayVec;
use esplane_api::{DropReason, SaEvent, TunnelId};
use std::{net::IpAddr, ops::Range, ptr, sync::atomic::Ordering::Relaxed};

/// Packets that go through the steps together, at most: bounds what lies on the stack.
pub(crate) const CHUNK_PACKETS: usize = 64;

/// One worker's outbound side.
#[derive(Debug)]
pub struct Outbound {
    chunk_packets: usize,
}

/// A packet on its way into a tunnel. Small: a chunk of them stays in a few cache lines.
#[derive(Clone, Copy)]
struct Leaving {
    /// Its place in the chunk.
    at: u8,
    tos: u8,
    df: bool,
    next_header: u8,
    payload_bytes: u16,
}

/// Packets in a row that leave with one SA.
struct Run<'t> {
    tunnel: &'t Tunnel,
    sender: &'t Sender,
    packets: u32,
    bytes: u32,
}

/// Everything of a chunk that leaves: runs one after the other, and their packets.
#[derive(Default)]
struct Departure<'t> {
    runs: Chunk<Run<'t>>,
    packets: Chunk<Leaving>,
}

impl<'t> Departure<'t> {
    #[inline]
    fn push(&mut self, tunnel: &'t Tunnel, sender: &'t Sender, packet: Leaving) {
        let bytes = u32::from(packet.payload_bytes);
        self.packets.push(packet);
        match self.runs.last_mut() {
            Some(run) if ptr::eq(run.sender, sender) => {
                run.packets += 1;
                run.bytes += bytes;
            }
            _ => self.runs.push(Run {
                tunnel,
                sender,
                packets: 1,
                bytes,
            }),
        }
    }
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
        let (arena, packets, outers, mut slot) = batch.parts_mut();
        for chunk in packets.chunks_mut(self.chunk_packets) {
            let outers = OuterSides::new(outers, slot);
            slot += chunk.len();
            // 3, 4: classify, look up
            let mut departure = Departure::default();
            classify(tables, arena, chunk, &mut departure, report);
            // 5: sequence; 6: crypt; 7: finish
            seal(tables, arena, chunk, outers, &departure, report);
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
        let (arena, packets, outers, slot) = batch.parts_mut();
        let outers = OuterSides::new(outers, slot + packets.len() - 1);
        let Some(packet) = packets.last_mut() else {
            return false;
        };
        let mut departure = Departure::default();
        let dummy = Leaving {
            at: 0,
            tos: 0,
            df: false,
            next_header: protocol::NO_NEXT_HEADER,
            payload_bytes: 0,
        };
        departure.push(tunnel, sender, dummy);
        let chunk = std::slice::from_mut(packet);
        seal(tables, arena, chunk, outers, &departure, report);
        packet.verdict == Verdict::Forward
    }
}

/// Steps 3 and 4: which packets leave, in which tunnel. All others get their verdict here.
fn classify<'t>(
    tables: &'t Tables,
    arena: &[u8],
    chunk: &mut [PacketBuf],
    departure: &mut Departure<'t>,
    report: &mut Report,
) {
    let mut recent = Recent {
        key: FlowKey::NONE,
        route: Route::Other(Verdict::Pending),
    };
    for (at, packet) in chunk.iter_mut().enumerate() {
        if !matches!(packet.verdict, Verdict::Pending) {
            continue;
        }
        let data = arena.get(packet.data_range()).unwrap_or_default();
        let Some(head) = recent.look_up(tables, data) else {
            drop_packet(packet, DropReason::InnerMalformed, report);
            continue;
        };
        match recent.route {
            Route::Send(tunnel, sender)
                if sender.header.can_carry(head.total_bytes)
                    && encap::has_room(packet, head.total_bytes, sender.header.bytes()) =>
            {
                let leaving = Leaving {
                    at: at as u8,
                    tos: head.tos,
                    df: head.df,
                    next_header: head.next_header,
                    payload_bytes: head.total_bytes as u16,
                };
                departure.push(tunnel, sender, leaving);
            }
            Route::Send(..) => drop_packet(packet, DropReason::InnerTooBig, report),
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

/// What the last packet was and where it went: runs of one flow are looked up once.
struct Recent<'t> {
    key: FlowKey,
    route: Route<'t>,
}

impl<'t> Recent<'t> {
    /// Finds the packet's route, which is the most recent one then. `None` if it is malformed.
    #[inline]
    fn look_up(&mut self, tables: &'t Tables, data: &[u8]) -> Option<Head> {
        let Some(head) = Head::parse(data) else {
            return self.look_closer(tables, data);
        };
        if head.key != self.key {
            self.route = route(tables, &AnyEnds::of_key(&head.key));
            self.key = head.key;
        }
        Some(head)
    }

    #[cold]
    fn look_closer(&mut self, tables: &'t Tables, data: &[u8]) -> Option<Head> {
        let flow = Flow::parse(data)?;
        self.route = route(tables, &AnyEnds::of_flow(&flow)?);
        self.key = FlowKey::NONE;
        Some(flow.head())
    }
}

#[inline]
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
    mut outers: OuterSides<'_>,
    departure: &Departure<'_>,
    report: &mut Report,
) {
    let mut jobs = Jobs::new();
    // Places in the chunk, beside the jobs.
    let mut places: Chunk<u8> = Chunk::new();
    let mut rest = &departure.packets[..];
    let mut sums = false;
    for run in &departure.runs {
        let (packets, others) = rest.split_at(run.packets as usize);
        rest = others;
        // 5: numbers and lifetimes, once per run of packets with one SA
        let numbers = number(chunk, run, packets, report);
        // 6, 7: all but the AEAD's work
        sums |= run.sender.header.has_sum();
        let first = packets.first().map_or(0, |packet| packet.at.into());
        let outer_at = outers.set(first, *run.sender.header.outer());
        for (packet, number) in packets.iter().zip(numbers) {
            let buf = &mut chunk[usize::from(packet.at)];
            match wrap(tables, arena, buf, run.sender, packet, number, outer_at) {
                Some(job) => {
                    jobs.push(job);
                    places.push(packet.at);
                }
                None => drop_packet(buf, DropReason::InnerTooBig, report), // cannot be: room was checked
            }
        }
    }
    // 6: the whole chunk in one call
    tables.aead.seal(arena, &mut jobs);
    for (at, job) in places.iter().zip(&jobs) {
        if !job.ok {
            let packet = &mut chunk[usize::from(*at)];
            drop_packet(packet, DropReason::InnerTooBig, report); // cannot be: room was checked
        }
    }
    // 7: what needs the ciphertext
    if sums && tables.settings.outer_headers == OuterHeaders::Written {
        sum_up(arena, chunk, departure);
    }
}

/// Step 5 for one run: numbers for the packets that may go, from the first on. The others are dropped.
#[inline]
fn number(
    chunk: &mut [PacketBuf],
    run: &Run<'_>,
    packets: &[Leaving],
    report: &mut Report,
) -> Range<u64> {
    let sa = &*run.sender.sa;
    let sizes = packets.iter().map(|packet| packet.payload_bytes.into());
    let all = u64::from(run.packets);
    let within_lifetime = if sa.usage.has_room_for_all(all, u64::from(run.bytes)) {
        packets.len()
    } else {
        sa.usage.room_for(sizes)
    };
    let numbers = sa.sequence.reserve(within_lifetime as u32);
    let sent = (numbers.end - numbers.start) as usize;
    if sent < packets.len() {
        refuse(chunk, run, packets, (sent, within_lifetime), report);
    }
    if sa.sequence.is_low() {
        let next = sa.sequence.next();
        report.raise(SaEvent::SequenceLow { sa: sa.id, next });
    }
    account(run, &packets[..sent], report);
    numbers
}

/// Packets of a run for which there is no number, or no lifetime.
#[cold]
fn refuse(
    chunk: &mut [PacketBuf],
    run: &Run<'_>,
    packets: &[Leaving],
    (sent, within_lifetime): (usize, usize),
    report: &mut Report,
) {
    for (place, packet) in packets.iter().enumerate().skip(sent) {
        let reason = if place < within_lifetime {
            DropReason::SequenceExhausted
        } else {
            DropReason::OutboundLifetimeExpired
        };
        drop_packet(&mut chunk[usize::from(packet.at)], reason, report);
    }
    let sa = &run.sender.sa;
    if within_lifetime < packets.len()
        && let Some(unit) = sa.usage.ended_by()
    {
        report.raise(SaEvent::HardExpired { sa: sa.id, unit }); // as long as packets want to use it
    }
    if sent < within_lifetime && sa.sequence.is_exhausted() {
        report.raise(SaEvent::SequenceExhausted { sa: sa.id });
    }
}

/// Counts what a run carries.
#[inline]
fn account(run: &Run<'_>, carried: &[Leaving], report: &mut Report) {
    let sa = &run.sender.sa;
    let bytes: u64 = carried
        .iter()
        .map(|packet| u64::from(packet.payload_bytes))
        .sum();
    sa.usage.add(carried.len() as u64, bytes, |reached| {
        report.raise(reached.event(sa.id));
    });
    let data = |packet: &&Leaving| packet.next_header != protocol::NO_NEXT_HEADER;
    let data_packets = carried.iter().filter(data).count() as u64;
    let sent = &run.tunnel.activity.sent_data_packets;
    sent.fetch_add(data_packets, Relaxed);
}

/// Steps 6 and 7 for one packet, but for the AEAD: trailer, ESP header, outer headers. What is left to the AEAD is the
/// answer.
#[inline]
fn wrap<'t>(
    tables: &Tables,
    arena: &mut [u8],
    buf: &mut PacketBuf,
    sender: &'t Sender,
    packet: &Leaving,
    number: u64,
    outer_at: u16,
) -> Option<Job<'t>> {
    let payload_bytes = usize::from(packet.payload_bytes);
    let (sa, header) = (&*sender.sa, &sender.header);
    let job = encap::encap(arena, buf, sa, number, payload_bytes, packet.next_header)?;
    buf.outer_at = outer_at;
    (buf.outer_tos, buf.outer_df) = (packet.tos, header.df(packet.df));
    if tables.settings.outer_headers == OuterHeaders::Written && !header.write(arena, buf, number) {
        return None;
    }
    buf.verdict = Verdict::Forward;
    Some(job)
}

/// Checksums over what is sealed now.
#[cold]
fn sum_up(arena: &mut [u8], chunk: &[PacketBuf], departure: &Departure<'_>) {
    let mut rest = &departure.packets[..];
    for run in &departure.runs {
        let (packets, others) = rest.split_at(run.packets as usize);
        rest = others;
        for packet in packets {
            let buf = &chunk[usize::from(packet.at)];
            if buf.verdict == Verdict::Forward
                && let Some(whole) = arena.get_mut(buf.data_range())
            {
                run.sender.header.sum_up(whole);
            }
        }
    }
}

fn drop_packet(packet: &mut PacketBuf, reason: DropReason, report: &mut Report) {
    packet.verdict = Verdict::Drop(reason);
    report.count_drop(reason);
}
