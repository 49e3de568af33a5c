//! Inbound: ESP in, clear packets out. Steps 3 to 7 of a packet's path.

use crate::{
    Arena, Batch, OuterHeaders, PacketBuf, Report, Verdict,
    aead::{Done, ICV_BYTES, Job, Keyed, Work, on_newer_cpus},
    batch::Outer,
    esp::{
        Jobs, Keys,
        decap::{Accepted, Authentic, Sealed},
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
    ptr,
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

/// Packets in a row of one SA.
struct Run<'t> {
    sa: &'t InboundSa,
    /// Where they end among the packets that wait.
    end: usize,
}

/// Everything of a chunk that is worth authenticating: runs one after the other, their packets, their jobs.
#[derive(Default)]
struct Arrival<'t> {
    runs: Chunk<Run<'t>>,
    packets: Chunk<Sealed>,
    jobs: Jobs,
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
            let keys = arrival.end_last_run();
            let suspect = self.keep_suspect(arena, &arrival);
            let mut opened = tables.aead.open(arena, &keys, &arrival.jobs);
            if let Some((sa, index)) = suspect
                && let Some(sealed) = arrival.packets.get_mut(index)
                && let Some(job) = arrival.jobs.get(index)
                && !opened.has(index)
                && sealed.resynchronise(sa, tables.aead, arena, *job, &self.kept)
            {
                opened = opened.with(index);
            }
            // 6, 7: commit, finish
            let arrival = (&mut arrival, opened, &self.scribe);
            finish(tables, arena, chunk, &outers, arrival, report);
        }
    }

    /// Where SAs have failed so often in a row that their high half may be lost, keeps the
    /// ciphertext of one packet of the chunk, to be tried with further high halves (RFC 4303
    /// Appendix A3).
    ///
    /// One packet a chunk: a flood of forgeries fills chunks, and so buys four more decryptions per
    /// 64.
    fn keep_suspect<'t>(
        &mut self,
        arena: &Arena<'_>,
        arrival: &Arrival<'t>,
    ) -> Option<(&'t InboundSa, usize)> {
        let mut first = 0;
        let out_of_step = |run: &&Run<'t>| {
            let suspect = run.sa.may_be_out_of_step();
            first = if suspect { first } else { run.end };
            suspect
        };
        let run = arrival.runs.iter().find(out_of_step)?;
        let job = arrival.jobs.get(first)?;
        let start = job.start as usize;
        let ciphertext = arena.get(start..start + job.bytes as usize + ICV_BYTES)?;
        if ciphertext.len() > ESP_BYTES_MAX {
            return None;
        }
        self.kept.clear();
        self.kept.extend_from_slice(ciphertext); // within the capacity it was made with
        Some((run.sa, first))
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
            let its = match classify(tables.settings.outer_headers, arena, outers, at, packet) {
                Ok(its) => its,
                Err(verdict) => {
                    decide(packet, verdict, report);
                    continue;
                }
            };
            // 4, 5: as long as all packets are of one SA, at once
            let (spi, sa) = *first.get_or_insert_with(|| (its.spi, tables.sad.find(its.spi)));
            if its.spi == spi && classified.is_empty() {
                arrival.take(arena, packet, &its, sa, report);
            } else {
                tables.sad.prefetch(its.spi);
                classified.push(its);
            }
        }
        if !classified.is_empty() {
            check_mixed(tables, arena, chunk, &classified, arrival, report);
        }
    }
}

/// Steps 4 and 5 for packets of several SAs: each step for all of them before the next, so that what a packet will need of its
/// SA is on its way while the others are looked at.
#[inline(never)]
fn check_mixed<'t>(
    tables: &'t Tables,
    arena: &Arena<'_>,
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
        let mut place = group.first;
        while let Some(its) = classified.get(usize::from(place)) {
            if let Some(packet) = chunk.get_mut(usize::from(its.at)) {
                arrival.take(arena, packet, its, sa, report);
            }
            place = next[usize::from(place)];
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

/// What step 3 has found out about a packet.
#[derive(Clone, Copy)]
struct Classified {
    spi: u32,
    udp: bool,
    /// Its place in the chunk.
    at: u8,
}

impl<'t> Arrival<'t> {
    /// Step 5: takes a packet that is worth authenticating; another gets its verdict.
    #[inline(always)]
    fn take(
        &mut self,
        arena: &Arena<'_>,
        packet: &mut PacketBuf,
        its: &Classified,
        sa: Option<&'t InboundSa>,
        report: &mut Report,
    ) {
        match check_one(arena, packet, its, sa) {
            Ok((sa, sealed, job)) => self.push(sa, sealed, job),
            Err(reason) => decide(packet, Verdict::Drop(reason), report),
        }
    }

    #[inline(always)]
    fn push(&mut self, sa: &'t InboundSa, sealed: Sealed, job: Job) {
        let same = matches!(self.runs.last(), Some(run) if ptr::eq(run.sa, sa));
        if !same {
            sealed.prefetch(sa);
            let end = self.packets.len();
            if let Some(before) = self.runs.last_mut() {
                before.end = end;
            }
            self.runs.push(Run { sa, end });
        }
        self.packets.push(sealed);
        self.jobs.push(job);
    }

    /// All packets are there; answers under which keys they came.
    fn end_last_run(&mut self) -> Keys<'t> {
        if let Some(last) = self.runs.last_mut() {
            last.end = self.packets.len();
        }
        let mut keys = Keys::new();
        for Run { sa, end } in &self.runs {
            keys.push(Keyed {
                key: &sa.key,
                end: *end,
            });
        }
        keys
    }
}

/// Step 3: finds the ESP packet. Its SPI, and whether it came in UDP, is the answer. The packet's data becomes the ESP
/// packet, or what follows the non-ESP marker.
#[inline(always)]
fn classify(
    mode: OuterHeaders,
    arena: &Arena<'_>,
    outers: &mut OuterSides<'_>,
    at: usize,
    packet: &mut PacketBuf,
) -> Result<Classified, Verdict> {
    let udp = match mode {
        OuterHeaders::ByKernel => outers.of(packet).udp,
        OuterHeaders::Written => outers
            .take_off(arena, at, packet)
            .ok_or(Verdict::Drop(DropReason::OuterMalformed))?,
    };
    let truncated = Verdict::Drop(DropReason::EspTruncated);
    let data = arena.get(packet.data_range()).ok_or(truncated)?;
    if data == KEEPALIVE && udp {
        return Err(Verdict::Drop(DropReason::Keepalive));
    }
    match esp::spi(data) {
        None => Err(truncated),
        Some(0) if udp && packet.grow(-NON_ESP_MARKER_BYTES, 0) => Err(Verdict::Control),
        // RFC 4303 §2.1: 0 is for local use, 1 to 255 are IANA's.
        Some(spi) if spi < Spi::MIN => Err(Verdict::Drop(DropReason::ReservedSpi)),
        Some(spi) => Ok(Classified {
            spi,
            udp,
            at: at as u8,
        }),
    }
}

/// Step 5: whether the packet is one that its SA may receive, and looks at the window.
#[inline(always)]
fn check_one<'t>(
    arena: &Arena<'_>,
    packet: &PacketBuf,
    its: &Classified,
    sa: Option<&'t InboundSa>,
) -> Result<(&'t InboundSa, Sealed, Job), DropReason> {
    let sa = sa.ok_or(DropReason::UnknownSpi)?;
    if sa.in_udp != its.udp {
        return Err(DropReason::EncapMismatch);
    }
    if sa.usage.ended() {
        return Err(DropReason::InboundLifetimeExpired);
    }
    let place = packet.data_range();
    let esp = arena.get(place.clone()).and_then(Esp::parse);
    let esp = esp.ok_or(DropReason::EspTruncated)?;
    // Infer the number, look at the window.
    match Sealed::check(sa, &esp, its.at, &place) {
        Ok((sealed, job)) => Ok((sa, sealed, job)),
        Err(reason) => {
            sa.replays.fetch_add(1, Relaxed);
            Err(reason)
        }
    }
}

/// Steps 6 and 7 for all packets of a chunk that were opened, or not.
fn finish(
    tables: &Tables,
    arena: &mut Arena<'_>,
    chunk: &mut [PacketBuf],
    outers: &OuterSides<'_>,
    (arrival, opened, scribe): (&mut Arrival<'_>, Done, &Scribe),
    report: &mut Report,
) {
    let (mut packets, mut begin) = (&mut arrival.packets[..], 0);
    for Run { sa, end } in &arrival.runs {
        let (these, others) = packets.split_at_mut(*end - begin);
        let jobs = begin..*end;
        (packets, begin) = (others, *end);
        // 6: authenticate
        let authentic = Authentic::of_run(sa, these, (opened, jobs), |at| {
            let reason = DropReason::AuthenticationFailed;
            decide(&mut chunk[usize::from(at)], Verdict::Drop(reason), report);
        });
        let run = (*sa, authentic, scribe);
        finish_run(tables, arena, chunk, outers, run, report);
    }
}

/// The same for one run of authentic packets.
#[inline]
fn finish_run(
    tables: &Tables,
    arena: &mut Arena<'_>,
    chunk: &mut [PacketBuf],
    outers: &OuterSides<'_>,
    (sa, authentic, scribe): (&InboundSa, Authentic<'_, '_>, &Scribe),
    report: &mut Report,
) {
    // 6: commit; 7: finish
    let mut carried = Carried::default();
    let mut last_let_in = (KeyV4::NONE, KeyV6::NONE);
    let newest = authentic.commit(|at, accepted| {
        let packet = &mut chunk[usize::from(at)];
        let verdict = match accepted {
            Ok(accepted) => {
                let verdict = match open(&accepted, arena, packet, &mut last_let_in) {
                    Ok(()) => Verdict::Forward,
                    Err(reason) => Verdict::Drop(reason),
                };
                carried.add(packet, verdict);
                verdict
            }
            Err(reason) => Verdict::Drop(reason),
        };
        decide(packet, verdict, report);
    });
    if carried.packets > 0 {
        sa.note_authentic(|event| report.raise(event));
        // Only the newest packet tells where the peer is: an old one may come late from where it was.
        if let Some(newest) = newest {
            let packet = &chunk[usize::from(newest)];
            note_origin(tables, sa, outers.of(packet), report);
        }
        carried.count((sa, scribe), report);
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

/// Step 7: from decrypted payload to inner packet.
#[inline]
fn open(
    accepted: &Accepted<'_>,
    arena: &mut Arena<'_>,
    packet: &mut PacketBuf,
    last_let_in: &mut (KeyV4, KeyV6),
) -> Result<(), DropReason> {
    let malformed = DropReason::DecryptedMalformed;
    let place = packet.data_range();
    let start = place.start + BEFORE_PAYLOAD_BYTES;
    let decrypted = arena.get_mut(start..place.end - ICV_BYTES);
    let decrypted = decrypted.ok_or(malformed)?; // cannot be: it was checked
    let opened = accepted.strip(decrypted)?;
    let inner = decrypted.get_mut(..opened.payload_bytes).ok_or(malformed)?;
    let head = let_in(accepted.sa(), inner, last_let_in)?;
    if head.next_header != opened.next_header {
        return Err(malformed);
    }
    carry_ecn(inner, head.tos, packet.outer_tos)?;
    // RFC 4303 §2.7: what lies behind the inner packet is padding against traffic analysis.
    packet.set_edges(start as u32, (start + head.total_bytes) as u32);
    Ok(())
}

/// Whether the SA's selectors let an inner packet in (RFC 4301 §5.2 step 4); for packets of one flow in a row, asked once.
#[inline]
fn let_in(
    sa: &InboundSa,
    inner: &[u8],
    (last_v4, last_v6): &mut (KeyV4, KeyV6),
) -> Result<Head, DropReason> {
    let (head, let_in) = if let Some((key, head)) = KeyV4::parse(inner) {
        if *last_v4 == key {
            return Ok(head);
        }
        *last_v4 = key;
        (head, sa.lets_in(&key))
    } else if let Some((key, head)) = KeyV6::parse(inner) {
        if *last_v6 == key {
            return Ok(head);
        }
        *last_v6 = key;
        (head, sa.selectors.let_in(&AnyEnds::of_v6(&key)))
    } else {
        let (head, ends) = look_closer(inner).ok_or(DropReason::DecryptedMalformed)?;
        (head, sa.selectors.let_in(&ends))
    };
    if let_in {
        Ok(head)
    } else {
        (*last_v4, *last_v6) = (KeyV4::NONE, KeyV6::NONE);
        Err(DropReason::SelectorMismatch)
    }
}

#[cold]
fn look_closer(inner: &[u8]) -> Option<(Head, AnyEnds)> {
    let flow = Flow::parse(inner)?;
    Some((flow.head(), AnyEnds::of_flow(&flow)?))
}

impl Carried {
    #[inline]
    fn add(&mut self, packet: &PacketBuf, verdict: Verdict) {
        self.packets += 1;
        if matches!(verdict, Verdict::Forward) {
            self.bytes += packet.data_bytes() as u64;
        }
        self.dummies += u64::from(verdict == Verdict::Drop(DropReason::DummyPacket));
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
