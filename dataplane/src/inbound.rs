//! Inbound: ESP in, clear packets out. Steps 3 to 7 of a packet's path.

use crate::{
    Arena, Batch, OuterHeaders, PacketBuf, Report, Verdict,
    aead::{Done, ICV_BYTES, Keyed, Work, on_newer_cpus},
    batch::Outer,
    esp::{
        Jobs, Keys,
        decap::{Accepted, Authentic, Gate, Sealed},
    },
    outbound::CHUNK_PACKETS,
    outer::OuterSides,
    sad::InboundSa,
    spd::AnyEnds,
    tables::{Tables, Tunnel},
    tunnel::carry_ecn,
    usage::Scribe,
    wire::{
        Esp, Flow, Head, KeyV4, KeyV6,
        esp::{self, BEFORE_PAYLOAD_BYTES},
    },
};
use arrayvec::ArrayVec;
use esplane_api::{DropReason, SaEvent, Spi};
use std::{
    net::{IpAddr, SocketAddr},
    sync::atomic::Ordering::Relaxed,
};

/// Bytes of the non-ESP marker: four zeros where ESP has its SPI (RFC 3948 §2.2).
const NON_ESP_MARKER_BYTES: i32 = 4;
/// The payload of a NAT keepalive (RFC 3948 §2.3).
const KEEPALIVE: [u8; 1] = [0xff];
/// The largest ESP packet there is.
const ESP_BYTES_MAX: usize = u16::MAX as usize;

/// One worker's inbound side.
#[derive(Debug)]
pub struct Inbound {
    chunk_packets: usize,
    scribe: Scribe,
    /// Where one packet's ciphertext is kept while an SA may be out of step.
    kept: Vec<u8>,
}

/// Everything of a chunk that is worth authenticating: packets, their jobs, and the runs that they are. A run is some in a row
/// of one SA.
#[derive(Default)]
struct Arrival<'t> {
    packets: Chunk<Sealed>,
    jobs: Jobs,
    /// Of each run.
    sas: Chunk<&'t InboundSa>,
    /// Of each run, and where it ends.
    keys: Keys<'t>,
    /// The first packet of the first SA that may be out of step.
    suspect: Option<(&'t InboundSa, usize)>,
}

/// What a run of packets of one SA has carried; counted when the run ends.
#[derive(Default)]
struct Carried {
    packets: u64,
    dummies: u64,
    bytes: u64,
}

type Chunk<T> = ArrayVec<T, CHUNK_PACKETS>;

impl Inbound {
    /// Takes up to `capacity` packets (and at most 64) through the steps at once.
    pub fn new(capacity: usize) -> Self {
        Self {
            chunk_packets: capacity.clamp(1, CHUNK_PACKETS),
            scribe: Scribe::new(),
            kept: Vec::with_capacity(ESP_BYTES_MAX),
        }
    }

    /// Decides over every packet whose verdict is pending: it is opened in place and goes on as an
    /// inner packet, is handed to the control plane, or is dropped and counted. Where data starts,
    /// [`OuterHeaders`] says.
    pub fn process(&mut self, tables: &Tables, batch: &mut Batch, report: &mut Report) {
        let (arena, packets, outers, mut slot) = batch.parts_mut();
        for chunk in packets.chunks_mut(self.chunk_packets) {
            let mut outers = OuterSides::new(outers, slot);
            slot += chunk.len();
            // 3, 4, 5: classify, look up, check
            let mut arrival = Arrival::default();
            on_newer_cpus(Check {
                tables,
                arena,
                chunk,
                outers: &mut outers,
                arrival: &mut arrival,
                report,
            });
            // 6: authenticate and decrypt, the whole chunk in one call
            let suspect = arrival
                .suspect
                .filter(|(_, first)| self.keep(arena, &arrival, *first));
            let mut opened = tables.aead.open(arena, &arrival.keys, &arrival.jobs);
            if let Some((sa, index)) = suspect
                && let Some(sealed) = arrival.packets.get_mut(index)
                && let Some(job) = arrival.jobs.get(index)
                && !opened.has(index)
                && sealed.resynchronise(sa, tables.aead, arena, *job, &self.kept)
            {
                opened = opened.with(index);
            }
            // 6, 7: commit, finish
            on_newer_cpus(Finish {
                tables,
                arena,
                chunk,
                outers: &outers,
                arrival: &mut arrival,
                opened,
                scribe: &self.scribe,
                report,
            });
        }
    }

    /// Where SAs have failed so often in a row that their high half may be lost, keeps the
    /// ciphertext of one packet of the chunk, to be tried with further high halves (RFC 4303
    /// Appendix A3).
    ///
    /// One packet a chunk: a flood of forgeries fills chunks, and so buys four more decryptions per
    /// 64.
    #[cold]
    fn keep(&mut self, arena: &Arena<'_>, arrival: &Arrival<'_>, packet: usize) -> bool {
        let ciphertext = arrival.jobs.get(packet).and_then(|job| {
            let start = job.start as usize;
            arena.get(start..start + job.bytes as usize + ICV_BYTES)
        });
        let Some(ciphertext) = ciphertext.filter(|bytes| bytes.len() <= ESP_BYTES_MAX) else {
            return false;
        };
        self.kept.clear();
        self.kept.extend_from_slice(ciphertext); // within the capacity it was made with
        true
    }
}

/// Steps 3 to 5: which packets are worth authenticating. All others get their verdict here.
struct Check<'b, 'o, 't> {
    tables: &'t Tables,
    arena: &'b Arena<'b>,
    chunk: &'b mut [PacketBuf],
    outers: &'b mut OuterSides<'o>,
    arrival: &'b mut Arrival<'t>,
    report: &'b mut Report,
}

impl Work for Check<'_, '_, '_> {
    #[inline(always)]
    fn run(self) {
        let Self {
            tables,
            arena,
            chunk,
            outers,
            arrival,
            report,
        } = self;
        let (mut classified, mut first) = (Chunk::new(), None);
        for (at, packet) in chunk.iter_mut().enumerate() {
            if !matches!(packet.verdict, Verdict::Pending) {
                continue;
            }
            // 3: classify
            let udp = match tables.settings.outer_headers {
                OuterHeaders::ByKernel => Some(outers.of(packet).udp),
                OuterHeaders::Written => outers.take_off(arena, at, packet),
            };
            let its = udp.and_then(|udp| Classified::of_esp(arena, packet, at as u8, udp));
            let Some(its) = its else {
                let verdict = classify_closely(tables, arena, packet, udp);
                decide(packet, verdict, report);
                continue;
            };
            // 4, 5: as long as all packets are of one SA, at once
            let find = || (its.spi, tables.sad.find(its.spi).map(Gate::of));
            let (spi, gate) = first.get_or_insert_with(find);
            if its.spi == *spi && classified.is_empty() {
                arrival.take(gate.as_ref(), packet, &its, report);
            } else {
                tables.sad.prefetch(its.spi);
                classified.push(its);
            }
        }
        if let Some((_, Some(gate))) = first {
            arrival.end_run(gate.sa());
        }
        if !classified.is_empty() {
            check_mixed(tables, chunk, &classified, arrival, report);
        }
    }
}

/// Steps 4 and 5 for packets of several SAs: each step for all of them before the next, so that what a packet will need of its
/// SA is on its way while the others are looked at.
#[inline(never)]
fn check_mixed<'t>(
    tables: &'t Tables,
    chunk: &mut [PacketBuf],
    classified: &Chunk<Classified>,
    arrival: &mut Arrival<'t>,
    report: &mut Report,
) {
    // Packets of one SA go together, in the order in which they came: they are one run.
    let (groups, next) = by_spi(classified);
    let mut sas: Chunk<Option<&'t InboundSa>> = Chunk::new();
    for group in &groups {
        let sa = tables.sad.find(group.spi);
        if let Some(sa) = sa {
            sa.prefetch();
        }
        sas.push(sa);
    }
    for sa in sas.iter().flatten() {
        sa.prefetch_rest();
    }
    for (group, sa) in groups.iter().zip(sas) {
        let gate = sa.map(Gate::of);
        let mut place = group.first;
        while let Some(its) = classified.get(usize::from(place)) {
            if let Some(packet) = chunk.get_mut(usize::from(its.at)) {
                arrival.take(gate.as_ref(), packet, its, report);
            }
            place = next[usize::from(place)];
        }
        if let Some(sa) = sa {
            arrival.end_run(sa);
        }
    }
}

/// Packets with one SPI: the first and, so far, the last of them.
struct Group {
    spi: u32,
    first: u8,
    last: u8,
}

/// No packet: there are fewer.
const NONE: u8 = u8::MAX;

/// Packets by SPI, and for each the next one with the same.
#[inline]
fn by_spi(classified: &Chunk<Classified>) -> (Chunk<Group>, [u8; CHUNK_PACKETS]) {
    const PLACES: usize = 8 * CHUNK_PACKETS; // so that few SPIs ask for the same
    let (mut places, mut groups) = ([NONE; PLACES], Chunk::<Group>::new());
    let mut next = [NONE; CHUNK_PACKETS];
    for (number, its) in (0_u8..).zip(classified) {
        let mut at = (its.spi.wrapping_mul(0x9e37_79b9) >> 23) as usize;
        loop {
            let place = &mut places[at % PLACES];
            match groups.get_mut(usize::from(*place)) {
                Some(group) if group.spi == its.spi => {
                    next[usize::from(group.last)] = number;
                    group.last = number;
                    break;
                }
                Some(_) => at += 1,
                None => {
                    *place = groups.len() as u8;
                    groups.push(Group {
                        spi: its.spi,
                        first: number,
                        last: number,
                    });
                    break;
                }
            }
        }
    }
    (groups, next)
}

/// What step 3 has found out about a packet that may be ESP of ours.
#[derive(Clone, Copy)]
struct Classified {
    spi: u32,
    /// The low half of its number.
    low: u32,
    /// Its place in the chunk.
    at: u8,
    udp: bool,
}

impl Classified {
    /// `None` for whatever else comes.
    #[inline(always)]
    fn of_esp(arena: &Arena<'_>, packet: &PacketBuf, at: u8, udp: bool) -> Option<Self> {
        let esp = Esp::parse(arena.get(packet.data_range())?)?;
        let (spi, low) = (esp.spi(), esp.sequence_low());
        (spi >= Spi::MIN).then_some(Self { spi, low, at, udp })
    }
}

/// Step 3 for what is no whole ESP packet. Of a control message the data becomes what follows the non-ESP marker.
#[cold]
fn classify_closely(
    tables: &Tables,
    arena: &Arena<'_>,
    packet: &mut PacketBuf,
    udp: Option<bool>,
) -> Verdict {
    let Some(udp) = udp else {
        return Verdict::Drop(DropReason::OuterMalformed);
    };
    let data = arena.get(packet.data_range()).unwrap_or_default();
    Verdict::Drop(match esp::spi(data) {
        None if data == KEEPALIVE && udp => DropReason::Keepalive,
        None => DropReason::EspTruncated,
        Some(0) if udp && packet.grow(-NON_ESP_MARKER_BYTES, 0) => return Verdict::Control,
        // RFC 4303 §2.1: 0 is for local use, 1 to 255 are IANA's.
        Some(spi) if spi < Spi::MIN => DropReason::ReservedSpi,
        Some(spi) => match tables.sad.find(spi).map(|sa| Gate::of(sa).admits(udp)) {
            None => DropReason::UnknownSpi,
            Some(Err(reason)) => reason,
            Some(Ok(())) => DropReason::EspTruncated,
        },
    })
}

impl<'t> Arrival<'t> {
    /// Step 5: takes a packet that is worth authenticating; another gets its verdict.
    #[inline(always)]
    fn take(
        &mut self,
        gate: Option<&Gate<'t>>,
        packet: &mut PacketBuf,
        its: &Classified,
        report: &mut Report,
    ) {
        let checked = gate.ok_or(DropReason::UnknownSpi).and_then(|gate| {
            gate.admits(its.udp)?;
            gate.check(its.low, its.at, &packet.data_range())
        });
        match checked {
            Ok((sealed, job)) => {
                self.packets.push(sealed);
                self.jobs.push(job);
            }
            Err(reason) => decide(packet, Verdict::Drop(reason), report),
        }
    }

    /// What has been taken since the last run ended was of this SA.
    #[inline]
    fn end_run(&mut self, sa: &'t InboundSa) {
        let begin = self.keys.last().map_or(0, |run| run.end);
        let Some(first) = self.packets.get(begin) else {
            return;
        };
        first.prefetch(sa);
        if sa.may_be_out_of_step() {
            self.suspect.get_or_insert((sa, begin));
        }
        let (key, end) = (&sa.key, self.packets.len());
        self.sas.push(sa);
        self.keys.push(Keyed { key, end });
    }
}

/// Steps 6 and 7 for all packets of a chunk that were opened, or not.
struct Finish<'b, 'm, 'a, 't> {
    tables: &'b Tables,
    arena: &'b mut Arena<'m>,
    chunk: &'b mut [PacketBuf],
    outers: &'b OuterSides<'b>,
    arrival: &'a mut Arrival<'t>,
    opened: Done,
    scribe: &'b Scribe,
    report: &'b mut Report,
}

impl Work for Finish<'_, '_, '_, '_> {
    #[inline(always)]
    fn run(self) {
        let Self {
            tables,
            arena,
            chunk,
            outers,
            arrival,
            opened,
            scribe,
            report,
        } = self;
        let (mut packets, mut begin) = (&mut arrival.packets[..], 0);
        for (sa, Keyed { end, .. }) in arrival.sas.iter().zip(&arrival.keys) {
            let (these, others) = packets.split_at_mut(*end - begin);
            let jobs = begin..*end;
            (packets, begin) = (others, *end);
            // 6: authenticate
            let authentic = Authentic::of_run(sa, these, (opened, jobs), |at| {
                let reason = DropReason::AuthenticationFailed;
                decide(&mut chunk[usize::from(at)], Verdict::Drop(reason), report);
            });
            // 6: commit
            let unique = authentic.commit();
            // 7: finish
            let mut carried = Carried::default();
            let mut recent = Recent { v4: None, v6: None };
            for (at, accepted) in unique.packets() {
                let packet = &mut chunk[usize::from(at)];
                let verdict = match accepted {
                    Ok(accepted) => {
                        let opened = open(accepted, arena, packet, &mut recent);
                        carried.add(packet, opened);
                        opened.map_or_else(Verdict::Drop, |()| Verdict::Forward)
                    }
                    Err(reason) => Verdict::Drop(reason),
                };
                decide(packet, verdict, report);
            }
            if carried.packets > 0 {
                sa.note_authentic(|event| report.raise(event));
                // Only the newest packet tells where the peer is: an old one may come late from where it was.
                if let Some(newest) = unique.newest() {
                    let packet = &chunk[usize::from(newest)];
                    note_origin(tables, sa, outers.of(packet), report);
                }
                carried.count((sa, scribe), report);
            }
        }
    }
}

/// Follows the peer to where its newest authentic packet comes from. Of what workers of the peer's send, perhaps from ports of
/// their own, only the address counts.
#[inline]
fn note_origin(tables: &Tables, sa: &InboundSa, outer: &Outer, report: &mut Report) {
    // Address and port; not what a socket adds to them (IPv6 scope, flow).
    let port_counts = outer.udp && !sa.of_worker;
    // What was no news is none until the tables change.
    let origin = origin(&outer.remote, port_counts) ^ tables.number.wrapping_mul(SCATTER);
    if sa.known_origin.load(Relaxed) != origin && !moved(tables, sa, outer, port_counts, report) {
        sa.known_origin.store(origin, Relaxed);
    }
}

/// An odd number without a pattern: the golden ratio's.
const SCATTER: u64 = 0x9e37_79b9_7f4a_7c15;

/// Stands for an address, and a port if that counts: for IPv4 for no other, for IPv6 as good as.
#[inline]
fn origin(remote: &SocketAddr, port_counts: bool) -> u64 {
    let port = if port_counts { remote.port() } else { 0 };
    let address = match remote.ip() {
        IpAddr::V4(v4) => u64::from(v4.to_bits()),
        IpAddr::V6(v6) => {
            let bits = v6.to_bits();
            let (network, host) = ((bits >> 64) as u64, bits as u64);
            let mixed = (network ^ SCATTER).wrapping_mul(SCATTER);
            (mixed ^ mixed >> 32 ^ host).wrapping_mul(SCATTER)
        }
    };
    address ^ u64::from(port) << 32 ^ 1 << 48 // not 0, from where nothing comes
}

/// Whether the peer is elsewhere than its tunnel knows, which is told then.
#[cold]
fn moved(
    tables: &Tables,
    sa: &InboundSa,
    outer: &Outer,
    port_counts: bool,
    report: &mut Report,
) -> bool {
    let Some(Tunnel {
        id,
        sender: Some(sender),
        roaming: true,
        ..
    }) = tables.tunnel(sa.tunnel)
    else {
        return false;
    };
    let (remote, known) = (outer.remote, sender.header.path().remote_socket());
    let moved = remote.ip() != known.ip() || port_counts && remote.port() != known.port();
    if moved {
        report.raise(SaEvent::EndpointMoved {
            tunnel: *id,
            remote,
        });
    }
    moved
}

/// What the last packet of each family was that an SA has let in: runs of one flow are asked for once.
struct Recent {
    v4: Option<KeyV4>,
    v6: Option<KeyV6>,
}

/// Step 7: from decrypted payload to inner packet.
#[inline(always)]
fn open(
    accepted: Accepted<'_>,
    arena: &mut Arena<'_>,
    packet: &mut PacketBuf,
    recent: &mut Recent,
) -> Result<(), DropReason> {
    let malformed = DropReason::DecryptedMalformed;
    let place = packet.data_range();
    let start = place.start + BEFORE_PAYLOAD_BYTES;
    let decrypted = arena.get_mut(start..place.end - ICV_BYTES);
    let decrypted = decrypted.ok_or(malformed)?; // cannot be: it was checked
    let opened = accepted.strip(decrypted)?;
    let inner = decrypted.get_mut(..opened.payload_bytes).ok_or(malformed)?;
    let head = let_in(accepted.sa(), inner, recent)?;
    if head.next_header != opened.next_header {
        return Err(malformed);
    }
    carry_ecn(inner, head.tos, packet.outer_tos)?;
    // RFC 4303 §2.7: what lies behind the inner packet is padding against traffic analysis.
    packet.set_edges(start as u32, (start + head.total_bytes) as u32);
    Ok(())
}

/// Whether the SA's selectors let an inner packet in (RFC 4301 §5.2 step 4).
#[inline(always)]
fn let_in(sa: &InboundSa, inner: &[u8], recent: &mut Recent) -> Result<Head, DropReason> {
    let Some((key, head)) = KeyV4::parse(inner) else {
        return let_other_in(sa, inner, recent);
    };
    if recent.v4 != Some(key) {
        if !sa.lets_in(&key) {
            return Err(DropReason::SelectorMismatch);
        }
        recent.v4 = Some(key);
    }
    Ok(head)
}

/// The same for packets that are not plain IPv4.
#[inline(never)]
fn let_other_in(sa: &InboundSa, inner: &[u8], recent: &mut Recent) -> Result<Head, DropReason> {
    let (key, (head, ends)) = match KeyV6::parse(inner) {
        Some((key, head)) if recent.v6 == Some(key) => return Ok(head),
        Some((key, head)) => (Some(key), (head, AnyEnds::of_v6(&key))),
        None => (
            None,
            look_closer(inner).ok_or(DropReason::DecryptedMalformed)?,
        ),
    };
    if !sa.selectors.let_in(&ends) {
        return Err(DropReason::SelectorMismatch);
    }
    recent.v6 = key.or(recent.v6);
    Ok(head)
}

#[cold]
fn look_closer(inner: &[u8]) -> Option<(Head, AnyEnds)> {
    let flow = Flow::parse(inner)?;
    Some((flow.head(), AnyEnds::of_flow(&flow)?))
}

impl Carried {
    #[inline(always)]
    fn add(&mut self, packet: &PacketBuf, opened: Result<(), DropReason>) {
        self.packets += 1;
        match opened {
            Ok(()) => self.bytes += packet.data_bytes() as u64,
            Err(DropReason::DummyPacket) => self.dummies += 1,
            Err(_) => {}
        }
    }

    #[inline]
    fn count(self, (sa, scribe): (&InboundSa, &Scribe), report: &mut Report) {
        if self.dummies > 0 {
            sa.dummies.fetch_add(self.dummies, Relaxed); // noted before they count, as outbound
        }
        sa.usage.add(scribe, self.packets, self.bytes, |reached| {
            report.raise(reached.event(sa.id));
        });
    }
}

#[inline]
fn decide(packet: &mut PacketBuf, verdict: Verdict, report: &mut Report) {
    packet.verdict = verdict;
    if let Verdict::Drop(reason) = verdict {
        report.count_drop(reason);
    }
}
