//! Inbound: ESP in, clear packets out. Steps 3 to 7 of a packet's path.

use crate::{
    Arena, Batch, OuterHeaders, PacketBuf, Report, Verdict,
    aead::{Done, ICV_BYTES, Job, Keyed},
    batch::Outer,
    esp::{
        Jobs, Keys,
        decap::{Accepted, Authentic, Sealed},
    },
    outbound::CHUNK_PACKETS,
    outer::OuterSides,
    sad::{InboundEntry, InboundSa},
    spd::AnyEnds,
    tables::{Tables, Tunnel},
    tunnel::carry_ecn,
    wire::{
        Esp, Flow, Head, KeyV4, KeyV6,
        esp::{self, BEFORE_PAYLOAD_BYTES},
    },
};
use arrayvec::ArrayVec;
use esplane_api::{DropReason, SaEvent, Spi};
use std::{ptr, sync::atomic::Ordering::Relaxed};

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
    /// Where one packet's ciphertext is kept while an SA may be out of step.
    kept: Vec<u8>,
}

/// Packets in a row of one SA.
struct Run<'t> {
    entry: &'t InboundEntry,
    /// Where they end among the packets that wait.
    end: usize,
}

/// Everything of a chunk that is worth authenticating: runs one after the other, their packets, their jobs.
#[derive(Default)]
struct Arrival<'t> {
    runs: Chunk<Run<'t>>,
    packets: Chunk<Sealed>,
    jobs: Jobs,
    /// As the runs are.
    keys: Keys<'t>,
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
            check(tables, arena, chunk, &mut outers, &mut arrival, report);
            // 6: authenticate and decrypt, the whole chunk in one call
            let suspect = self.keep_suspect(arena, &arrival);
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
            let arrival = (&mut arrival, opened);
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
            let suspect = run.entry.sa.may_be_out_of_step();
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
        Some((&run.entry.sa, first))
    }
}

/// Steps 3 to 5: which packets are worth authenticating. All others get their verdict here.
fn check<'t>(
    tables: &'t Tables,
    arena: &Arena<'_>,
    chunk: &mut [PacketBuf],
    outers: &mut OuterSides<'_>,
    arrival: &mut Arrival<'t>,
    report: &mut Report,
) {
    let mut last: Option<&'t InboundEntry> = None;
    for (at, packet) in chunk.iter_mut().enumerate() {
        if !matches!(packet.verdict, Verdict::Pending) {
            continue;
        }
        let checked = classify(tables.settings.outer_headers, arena, outers, at, packet)
            .and_then(|(spi, udp)| check_one(tables, arena, at, packet, (spi, udp), &mut last));
        match checked {
            Ok((entry, sealed, job)) => arrival.push(entry, sealed, job),
            Err(verdict) => decide(packet, verdict, report),
        }
    }
}

impl<'t> Arrival<'t> {
    #[inline]
    fn push(&mut self, entry: &'t InboundEntry, sealed: Sealed, job: Job) {
        self.packets.push(sealed);
        self.jobs.push(job);
        let end = self.packets.len();
        match self.runs.last_mut() {
            Some(run) if ptr::eq(run.entry, entry) => {
                run.end = end;
                if let Some(keyed) = self.keys.last_mut() {
                    keyed.end = end;
                }
            }
            _ => {
                // On its way while the chunk's other packets are looked at.
                let key = &entry.sa.key;
                key.prefetch();
                self.keys.push(Keyed { key, end });
                self.runs.push(Run { entry, end });
            }
        }
    }
}

/// Step 3: finds the ESP packet. Its SPI, and whether it came in UDP, is the answer. The packet's data becomes the ESP
/// packet, or what follows the non-ESP marker.
#[inline]
fn classify(
    mode: OuterHeaders,
    arena: &Arena<'_>,
    outers: &mut OuterSides<'_>,
    at: usize,
    packet: &mut PacketBuf,
) -> Result<(u32, bool), Verdict> {
    let udp = match mode {
        OuterHeaders::ByKernel => outers.of(packet).udp,
        OuterHeaders::Written => outers
            .take_off(arena, at, packet)
            .ok_or(Verdict::Drop(DropReason::OuterMalformed))?,
    };
    let data = arena.get(packet.data_range()).unwrap_or_default();
    if data == KEEPALIVE && udp {
        return Err(Verdict::Drop(DropReason::Keepalive));
    }
    match esp::spi(data) {
        None => Err(Verdict::Drop(DropReason::EspTruncated)),
        Some(0) if udp && packet.grow(-NON_ESP_MARKER_BYTES, 0) => Err(Verdict::Control),
        // RFC 4303 §2.1: 0 is for local use, 1 to 255 are IANA's.
        Some(spi) if spi < Spi::MIN => Err(Verdict::Drop(DropReason::ReservedSpi)),
        Some(spi) => Ok((spi, udp)),
    }
}

/// Steps 4 and 5: finds the SA and looks at its window.
#[inline]
fn check_one<'t>(
    tables: &'t Tables,
    arena: &Arena<'_>,
    at: usize,
    packet: &PacketBuf,
    (spi, udp): (u32, bool),
    last: &mut Option<&'t InboundEntry>,
) -> Result<(&'t InboundEntry, Sealed, Job), Verdict> {
    let drop = Verdict::Drop;
    // 4: runs of one SA are looked up once
    let entry = match *last {
        Some(entry) if entry.sa.id.spi.get() == spi => entry,
        _ => tables.sad.find(spi).ok_or(drop(DropReason::UnknownSpi))?,
    };
    *last = Some(entry);
    let sa = &*entry.sa;
    if sa.in_udp != udp {
        return Err(drop(DropReason::EncapMismatch));
    }
    if sa.usage.ended() {
        return Err(drop(DropReason::InboundLifetimeExpired));
    }
    let place = packet.data_range();
    let esp = arena.get(place.clone()).and_then(Esp::parse);
    let esp = esp.ok_or(drop(DropReason::EspTruncated))?;
    // 5: infer the number, look at the window
    match Sealed::check(sa, &esp, at as u8, &place) {
        Ok((sealed, job)) => Ok((entry, sealed, job)),
        Err(reason) => {
            sa.replays.fetch_add(1, Relaxed);
            Err(drop(reason))
        }
    }
}

/// Steps 6 and 7 for all packets of a chunk that were opened, or not.
fn finish(
    tables: &Tables,
    arena: &mut Arena<'_>,
    chunk: &mut [PacketBuf],
    outers: &OuterSides<'_>,
    (arrival, opened): (&mut Arrival<'_>, Done),
    report: &mut Report,
) {
    let (mut packets, mut begin) = (&mut arrival.packets[..], 0);
    for Run { entry, end } in &arrival.runs {
        let (these, others) = packets.split_at_mut(*end - begin);
        let jobs = begin..*end;
        (packets, begin) = (others, *end);
        // 6: authenticate
        let authentic = Authentic::of_run(entry, these, (opened, jobs), |at| {
            let reason = DropReason::AuthenticationFailed;
            decide(&mut chunk[usize::from(at)], Verdict::Drop(reason), report);
        });
        finish_run(tables, arena, chunk, outers, (entry, authentic), report);
    }
}

/// The same for one run of authentic packets.
#[inline]
fn finish_run(
    tables: &Tables,
    arena: &mut Arena<'_>,
    chunk: &mut [PacketBuf],
    outers: &OuterSides<'_>,
    (entry, authentic): (&InboundEntry, Authentic<'_, '_>),
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
        entry.sa.note_authentic(|event| report.raise(event));
        let tunnel = tables.tunnel(entry.tunnel);
        // Only the newest packet tells where the peer is: an old one may come late from where it was.
        if let (Some(newest), Some(tunnel)) = (newest, tunnel) {
            let packet = &chunk[usize::from(newest)];
            note_endpoint(tunnel, outers.of(packet), report);
        }
        carried.count(entry, tunnel, report);
    }
}

/// Follows the peer to where its newest authentic packet comes from.
#[inline]
fn note_endpoint(tunnel: &Tunnel, outer: &Outer, report: &mut Report) {
    let Tunnel {
        id,
        sender: Some(sender),
        roaming: true,
        ..
    } = tunnel
    else {
        return;
    };
    let (remote, known) = (outer.remote, sender.header.path().remote_socket());
    // Address and port; not what a socket adds to them (IPv6 scope, flow).
    if remote.ip() != known.ip() || outer.udp && remote.port() != known.port() {
        report.raise(SaEvent::EndpointMoved {
            tunnel: *id,
            remote,
        });
    }
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
    let decrypted = decrypted.unwrap_or_default(); // as it was checked to be, or of no length
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
    let (head, ends) = if let Some((key, head)) = KeyV4::parse(inner) {
        if *last_v4 == key {
            return Ok(head);
        }
        *last_v4 = key;
        (head, AnyEnds::of_v4(&key))
    } else if let Some((key, head)) = KeyV6::parse(inner) {
        if *last_v6 == key {
            return Ok(head);
        }
        *last_v6 = key;
        (head, AnyEnds::of_v6(&key))
    } else {
        look_closer(inner).ok_or(DropReason::DecryptedMalformed)?
    };
    if sa.selectors.let_in(&ends) {
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

    fn count(self, entry: &InboundEntry, tunnel: Option<&Tunnel>, report: &mut Report) {
        let sa = &entry.sa;
        sa.usage.add(self.packets, self.bytes, |reached| {
            report.raise(reached.event(sa.id));
        });
        if let Some(Tunnel { activity, .. }) = tunnel {
            let data_packets = self.packets - self.dummies;
            activity
                .received_data_packets
                .fetch_add(data_packets, Relaxed);
            if self.dummies > 0 {
                activity.received_dummies.fetch_add(self.dummies, Relaxed);
            }
        }
    }
}

#[inline]
fn decide(packet: &mut PacketBuf, verdict: Verdict, report: &mut Report) {
    packet.verdict = verdict;
    if let Verdict::Drop(reason) = verdict {
        report.count_drop(reason);
    }
}
