//! Outbound: clear packets in, ESP out. Steps 3 to 7 of a packet's path.

use crate::{
    Arena, Batch, OuterHeaders, PacketBuf, Report, Verdict,
    aead::{Job, Keyed, Work, on_newer_cpus},
    batch::Outer,
    esp::{
        Jobs, Keys,
        encap::{self, Encap},
    },
    outer::OuterSides,
    spd::{AnyEnds, Decision},
    tables::{Sender, Tables},
    tunnel::{self, OuterHeader},
    usage::Scribe,
    wire::{Flow, Head, KeyV4, KeyV6, protocol},
};
use arrayvec::ArrayVec;
use esplane_api::{DropReason, SaEvent, TunnelId};
use std::{iter::Zip, net::IpAddr, ops::Range, ptr, slice, sync::atomic::Ordering::Relaxed};

/// Packets that go through the steps together, at most: bounds what lies on the stack.
pub(crate) const CHUNK_PACKETS: usize = 64;

/// One worker's outbound side.
#[derive(Debug)]
pub struct Outbound {
    chunk_packets: usize,
    worker: u16,
    scribe: Scribe,
}

/// A packet on its way into a tunnel. Small: a chunk of them stays in a few cache lines.
#[derive(Clone, Copy)]
struct Leaving {
    /// Its place in the chunk.
    at: u8,
    next_header: u8,
    payload_bytes: u16,
}

/// Packets in a row that leave with one SA.
struct Run<'t> {
    sender: &'t Sender,
    /// Where they end among the packets that leave.
    end: u32,
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
    fn push(&mut self, sender: &'t Sender, packet: Leaving) {
        let bytes = u32::from(packet.payload_bytes);
        self.packets.push(packet);
        let end = self.packets.len() as u32;
        match self.runs.last_mut() {
            Some(run) if ptr::eq(run.sender, sender) => {
                run.end = end;
                run.bytes += bytes;
            }
            _ => {
                // On its way while the chunk's other packets are looked at.
                sender.sa.prefetch();
                self.runs.push(Run { sender, end, bytes });
            }
        }
    }

    /// For a chunk of several SAs: each SA's packets become one run, in the order in which they came, and what a run needs of
    /// its SA is asked for.
    #[inline]
    fn group(&mut self) {
        if self.runs.len() > 2 {
            self.merge_runs();
        }
        if self.runs.len() > 1 {
            self.runs
                .iter()
                .for_each(|run| run.sender.sa.prefetch_rest());
        }
    }

    /// Finds the runs of one SA by a table of its own, and sorts packets by run.
    #[inline(never)]
    fn merge_runs(&mut self) {
        const PLACES: usize = 8 * CHUNK_PACKETS; // so that few runs ask for the same
        const FREE: u8 = u8::MAX;
        let (mut places, mut merged) = ([FREE; PLACES], Chunk::<Run<'t>>::new());
        let mut merged_into = [0_u8; CHUNK_PACKETS];
        let mut begin = 0;
        for (run, into) in self.runs.iter().zip(&mut merged_into) {
            let packets = run.end - begin;
            begin = run.end;
            let address = ptr::from_ref(run.sender).addr() as u32;
            let mut at = (address.wrapping_mul(0x9e37_79b9) >> 23) as usize;
            loop {
                *into = places[at % PLACES];
                match merged.get_mut(usize::from(*into)) {
                    Some(known) if ptr::eq(known.sender, run.sender) => {
                        known.end += packets;
                        known.bytes += run.bytes;
                        break;
                    }
                    Some(_) => at += 1,
                    None => {
                        *into = merged.len() as u8;
                        places[at % PLACES] = *into;
                        let (sender, bytes) = (run.sender, run.bytes);
                        merged.push(Run {
                            sender,
                            end: packets,
                            bytes,
                        });
                        break;
                    }
                }
            }
        }
        if merged.len() == self.runs.len() {
            return; // each SA had one run
        }
        // So far an end is a length.
        let (mut next, mut end) = ([0_usize; CHUNK_PACKETS], 0);
        for (run, next) in merged.iter_mut().zip(&mut next) {
            *next = end as usize;
            end += run.end;
            run.end = end;
        }
        let mut sorted = self.packets.clone();
        for ((_, packets), into) in self.runs().zip(merged_into) {
            let next = &mut next[usize::from(into)];
            if let Some(place) = sorted.get_mut(*next..*next + packets.len()) {
                place.copy_from_slice(packets);
            }
            *next += packets.len();
        }
        (self.runs, self.packets) = (merged, sorted);
    }

    /// The runs with their packets.
    fn runs(&self) -> impl Iterator<Item = (&Run<'t>, &[Leaving])> {
        let mut begin = 0;
        self.runs.iter().map(move |run| {
            let packets = begin..run.end as usize;
            begin = packets.end;
            (run, self.packets.get(packets).unwrap_or_default())
        })
    }
}

/// What becomes of a packet by its flow alone; kept for the next packet of the same flow. No enum, and handed out by
/// reference: a copy is made in some pieces and read back in others, for which a CPU waits a dozen cycles a packet.
#[derive(Clone, Copy)]
struct Route<'t> {
    /// Into a tunnel.
    send: Option<&'t Sender>,
    /// Or else.
    other: Verdict,
}

impl<'t> Route<'t> {
    #[inline(always)]
    fn send(sender: &'t Sender) -> Self {
        let (send, other) = (Some(sender), Verdict::Pending);
        Self { send, other }
    }

    #[inline(always)]
    fn other(other: Verdict) -> Self {
        Self { send: None, other }
    }
}

type Chunk<T> = ArrayVec<T, CHUNK_PACKETS>;

impl Outbound {
    /// Takes up to `capacity` packets (and at most 64) through the steps at once.
    pub fn new(capacity: usize) -> Self {
        Self {
            chunk_packets: capacity.clamp(1, CHUNK_PACKETS),
            worker: 0,
            scribe: Scribe::new(),
        }
    }

    /// Of the worker with this number: it sends with the SAs that are its own ([`esplane_api::SaParams::worker`]).
    pub fn of_worker(mut self, number: u16) -> Self {
        self.worker = number;
        self
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
            on_newer_cpus(Classify {
                tables,
                worker: self.worker,
                arena,
                chunk,
                departure: &mut departure,
                report,
            });
            departure.group();
            // 5: sequence; 6: crypt; 7: finish
            let departure = (&departure, &self.scribe);
            seal(tables, arena, chunk, outers, departure, report);
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
            next_header: protocol::NO_NEXT_HEADER,
            payload_bytes: 0,
        };
        departure.push(sender, dummy);
        packet.outer_df = sender.header.df(false);
        let chunk = std::slice::from_mut(packet);
        // A worker will send the rest.
        let departure = (&departure, &Scribe::GUEST);
        seal(tables, arena, chunk, outers, departure, report);
        packet.verdict == Verdict::Forward
    }
}

/// Bytes of outer headers that are ours to write before ESP.
#[inline]
fn bytes_before(tables: &Tables, header: &OuterHeader) -> usize {
    match tables.settings.outer_headers {
        OuterHeaders::Written => header.bytes(),
        OuterHeaders::ByKernel => tunnel::BY_KERNEL,
    }
}

/// Steps 3 and 4: which packets leave, in which tunnel. All others get their verdict here.
struct Classify<'b, 't> {
    tables: &'t Tables,
    worker: u16,
    arena: &'b Arena<'b>,
    chunk: &'b mut [PacketBuf],
    departure: &'b mut Departure<'t>,
    report: &'b mut Report,
}

impl Work for Classify<'_, '_> {
    #[inline(always)]
    fn run(self) {
        let mut recent = Recent::none(self.worker);
        for (at, packet) in self.chunk.iter_mut().enumerate() {
            if !matches!(packet.verdict, Verdict::Pending) {
                continue;
            }
            let Some(data) = self.arena.get(packet.data_range()) else {
                drop_packet(packet, DropReason::InnerMalformed, self.report);
                continue; // cannot be
            };
            let Some((head, route)) = recent.look_up(self.tables, data) else {
                drop_packet(packet, DropReason::InnerMalformed, self.report);
                continue;
            };
            match (route.send, route.other) {
                (Some(sender), _)
                    if sender.header.can_carry(head.total_bytes)
                        && encap::has_room(
                            packet,
                            head.total_bytes,
                            bytes_before(self.tables, &sender.header),
                        ) =>
                {
                    packet.outer_tos = head.tos;
                    packet.outer_df = sender.header.df(head.df);
                    let leaving = Leaving {
                        at: at as u8,
                        next_header: head.next_header,
                        payload_bytes: head.total_bytes as u16,
                    };
                    self.departure.push(sender, leaving);
                }
                (Some(_), _) => drop_packet(packet, DropReason::InnerTooBig, self.report),
                (None, Verdict::Drop(reason)) => drop_packet(packet, reason, self.report),
                (None, verdict) => {
                    packet.verdict = verdict;
                    if let Verdict::Hold(tunnel) = verdict {
                        self.report.raise(SaEvent::SaNeeded { tunnel });
                    }
                }
            }
        }
    }
}

/// What the last packet of each family was and where it went: runs of one flow are looked up once.
struct Recent<'t> {
    worker: u16,
    v4: (KeyV4, Route<'t>),
    v6: (KeyV6, Route<'t>),
    /// Of a packet that is not plain.
    closer: Route<'t>,
}

impl<'t> Recent<'t> {
    fn none(worker: u16) -> Self {
        Self {
            worker,
            v4: (KeyV4::NONE, Route::other(Verdict::Pending)),
            v6: (KeyV6::NONE, Route::other(Verdict::Pending)),
            closer: Route::other(Verdict::Pending),
        }
    }

    /// Finds the packet's route. `None` if it is malformed.
    #[inline(always)]
    fn look_up(&mut self, tables: &'t Tables, data: &[u8]) -> Option<(Head, &Route<'t>)> {
        if let Some((key, head)) = KeyV4::parse(data) {
            if self.v4.0 != key {
                let plain = tables.spd.protects_v4(key.ends().1);
                let plain = plain.and_then(|slot| tables.sender_of(slot, self.worker));
                let route = plain.map_or_else(
                    || route(tables, self.worker, &AnyEnds::of_v4(&key)),
                    Route::send,
                );
                self.v4 = (key, route);
            }
            Some((head, &self.v4.1))
        } else if let Some((key, head)) = KeyV6::parse(data) {
            if self.v6.0 != key {
                let plain = tables.spd.protects_v6(key.ends().1);
                let plain = plain.and_then(|slot| tables.sender_of(slot, self.worker));
                let route = plain.map_or_else(
                    || route(tables, self.worker, &AnyEnds::of_v6(&key)),
                    Route::send,
                );
                self.v6 = (key, route);
            }
            Some((head, &self.v6.1))
        } else {
            let head;
            (head, self.closer) = look_closer(tables, self.worker, data)?;
            Some((head, &self.closer))
        }
    }
}

#[cold]
fn look_closer<'t>(tables: &'t Tables, worker: u16, data: &[u8]) -> Option<(Head, Route<'t>)> {
    let flow = Flow::parse(data)?;
    Some((
        flow.head(),
        route(tables, worker, &AnyEnds::of_flow(&flow)?),
    ))
}

/// By all that policies may ask.
#[inline(never)]
fn route<'t>(tables: &'t Tables, worker: u16, ends: &AnyEnds) -> Route<'t> {
    let drop = |reason| Route::other(Verdict::Drop(reason));
    match tables.spd.decide_ends(ends) {
        // RFC 4301 §5.1: no policy is discard. What the kernel says to its link by itself is no
        // mistake of anyone's.
        None if stays_on_link(ends.destination()) => drop(DropReason::LinkLocal),
        None => drop(DropReason::NoPolicy),
        Some(Decision::Discard) => drop(DropReason::PolicyDiscard),
        Some(Decision::Bypass) => Route::other(Verdict::Bypass),
        Some(Decision::Protect(slot)) => match tables.tunnel(slot) {
            None => drop(DropReason::NoPolicy), // cannot be: both come from one snapshot
            Some(tunnel) => match tunnel.sender_of(worker) {
                Some(sender) => Route::send(sender),
                None => Route::other(Verdict::Hold(tunnel.id)),
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
    arena: &mut Arena<'_>,
    chunk: &mut [PacketBuf],
    mut outers: OuterSides<'_>,
    (departure, scribe): (&Departure<'_>, &Scribe),
    report: &mut Report,
) {
    let (mut jobs, mut keys) = (Jobs::new(), Keys::new());
    let mut sums = false;
    for (run, packets) in departure.runs() {
        // 5: numbers and lifetimes, once per run of packets with one SA
        let numbers = number(chunk, (run, packets), scribe, report);
        // 6, 7: all but the AEAD's work
        let header = &run.sender.header;
        let first = packets.first().map_or(0, |packet| packet.at.into());
        let outer_at = outers.set(first, *header.outer());
        let written = tables.settings.outer_headers == OuterHeaders::Written;
        sums |= written && header.has_sum();
        let wrap = match bytes_before(tables, header) {
            tunnel::V4_UDP => wrap::<{ tunnel::V4_UDP }>,
            tunnel::V4 => wrap::<{ tunnel::V4 }>,
            tunnel::V6_UDP => wrap::<{ tunnel::V6_UDP }>,
            tunnel::V6 => wrap::<{ tunnel::V6 }>,
            _ => wrap::<{ tunnel::BY_KERNEL }>,
        };
        let encap = Encap::new(run.sender);
        wrap(
            arena,
            chunk,
            &encap,
            packets.iter().zip(numbers),
            outer_at,
            &mut jobs,
        );
        keys.push(Keyed {
            key: &run.sender.sa.key,
            end: jobs.len(),
        });
    }
    // 6: the whole chunk in one call
    let sealed = tables.aead.seal(arena, &keys, &jobs);
    if !sealed.has_all(0..jobs.len()) {
        let lost = (0..jobs.len()).filter(|job| !sealed.has(*job));
        lost.for_each(|job| unsealed(chunk, &jobs[job], report));
    }
    // 7: what needs the ciphertext
    if sums {
        sum_up(arena, chunk, departure);
    }
}

/// Steps 6 and 7 for one run, but for the AEAD: trailer, ESP header, outer headers.
fn wrap<const HEADERS: usize>(
    arena: &mut Arena<'_>,
    chunk: &mut [PacketBuf],
    encap: &Encap<'_>,
    numbered: Zip<slice::Iter<'_, Leaving>, Range<u64>>,
    outer_at: u16,
    jobs: &mut Jobs,
) {
    for (packet, number) in numbered {
        let Some(buf) = chunk.get_mut(usize::from(packet.at)) else {
            continue;
        };
        let payload = (packet.payload_bytes.into(), packet.next_header);
        if let Some(job) = encap.put_around::<HEADERS>(arena, buf, payload, number) {
            buf.outer_at = outer_at;
            buf.verdict = Verdict::Forward;
            jobs.push(job);
        }
    }
}

/// Cannot be: room was checked.
#[cold]
fn unsealed(chunk: &mut [PacketBuf], job: &Job, report: &mut Report) {
    let lost = chunk.iter_mut().filter(|packet| {
        packet.verdict == Verdict::Forward && packet.data_range().contains(&(job.start as usize))
    });
    lost.for_each(|packet| drop_packet(packet, DropReason::InnerTooBig, report));
}

/// Step 5 for one run: numbers for the packets that may go, from the first on. The others are dropped.
#[inline]
fn number(
    chunk: &mut [PacketBuf],
    (run, packets): (&Run<'_>, &[Leaving]),
    scribe: &Scribe,
    report: &mut Report,
) -> Range<u64> {
    let sa = &*run.sender.sa;
    let (all, mut bytes) = (packets.len(), u64::from(run.bytes));
    let within_lifetime = if sa.usage.has_room_for_all(all as u64, bytes) {
        all
    } else {
        let sizes = packets.iter().map(|packet| packet.payload_bytes.into());
        sa.usage.room_for(sizes)
    };
    let numbers = sa.sequence.reserve(within_lifetime as u32);
    let sent = (numbers.end - numbers.start) as usize;
    if sent < all {
        refuse(chunk, run, packets, (sent, within_lifetime), report);
        let sizes = packets.iter().map(|packet| u64::from(packet.payload_bytes));
        bytes = sizes.take(sent).sum();
    }
    if sa.sequence.is_low() {
        let next = sa.sequence.next();
        report.raise(SaEvent::SequenceLow { sa: sa.id, next });
    }
    // A dummy leaves alone. It is noted before it counts: seen between, it is not taken for data.
    let is_dummy = |packet: &Leaving| packet.next_header == protocol::NO_NEXT_HEADER;
    if packets.first().is_some_and(is_dummy) {
        sa.dummies.fetch_add(sent as u64, Relaxed);
    }
    sa.usage.add(scribe, sent as u64, bytes, |reached| {
        report.raise(reached.event(sa.id));
    });
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

/// Checksums over what is sealed now.
#[cold]
fn sum_up(arena: &mut Arena<'_>, chunk: &[PacketBuf], departure: &Departure<'_>) {
    for (run, packets) in departure.runs() {
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
