//! Inbound: ESP in, clear packets out. Steps 3 to 7 of a packet's path.

use crate::{
    Batch, OuterHeaders, PacketBuf, Report, Verdict,
    aead::{ICV_BYTES, Job},
    batch::Outer,
    esp::{
        Jobs,
        decap::{Accepted, Sealed},
    },
    outbound::CHUNK_PACKETS,
    sad::InboundEntry,
    spd::AnyEnds,
    tables::{Tables, Tunnel},
    tunnel::carry_ecn,
    wire::{Esp, Flow, Ipv4, Ipv6, Udp, esp, protocol},
};
use arrayvec::ArrayVec;
use esplane_api::{DropReason, SaEvent, Spi};
use std::{net::SocketAddr, ops::Range, ptr, sync::atomic::Ordering::Relaxed};

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

/// A packet that waits for the AEAD, beside its job.
struct Waiting<'t> {
    /// Its place in the chunk.
    at: usize,
    sealed: Sealed<'t>,
}

/// What a run of packets of one SA has carried; counted when the run ends.
#[derive(Default)]
struct Carried<'t> {
    entry: Option<&'t InboundEntry>,
    packets: u64,
    data_packets: u64,
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
        let (arena, packets) = batch.parts_mut();
        for chunk in packets.chunks_mut(self.chunk_packets) {
            // 3, 4, 5: classify, look up, check
            let (mut waiting, mut jobs) = (Chunk::new(), Jobs::new());
            check(tables, arena, chunk, &mut waiting, &mut jobs, report);
            // 6: authenticate and decrypt, the whole chunk in one call
            let suspect = self.keep_suspect(arena, &waiting, &jobs);
            tables.aead.open(arena, &mut jobs);
            if let Some(index) = suspect
                && let (Some(waiting), Some(job)) = (waiting.get_mut(index), jobs.get_mut(index))
                && !job.ok
            {
                waiting
                    .sealed
                    .resynchronise(tables.aead, arena, job, &self.kept);
            }
            // 6, 7: commit, finish
            finish(tables, arena, chunk, &mut waiting, &jobs, report);
        }
    }

    /// Where SAs have failed so often in a row that their high half may be lost, keeps the
    /// ciphertext of one packet of the chunk, to be tried with further high halves (RFC 4303
    /// Appendix A3).
    ///
    /// One packet a chunk: a flood of forgeries fills chunks, and so buys four more decryptions per
    /// 64.
    fn keep_suspect(
        &mut self,
        arena: &[u8],
        waiting: &[Waiting<'_>],
        jobs: &[Job<'_>],
    ) -> Option<usize> {
        let suspect = waiting
            .iter()
            .position(|waiting| waiting.sealed.entry.sa.may_be_out_of_step())?;
        let place = &jobs.get(suspect)?.payload;
        let ciphertext = arena.get(place.start..place.end + ICV_BYTES)?;
        if ciphertext.len() > ESP_BYTES_MAX {
            return None;
        }
        self.kept.clear();
        self.kept.extend_from_slice(ciphertext); // within the capacity it was made with
        Some(suspect)
    }
}

/// Steps 3 to 5: which packets are worth authenticating. All others get their verdict here.
fn check<'t>(
    tables: &'t Tables,
    arena: &[u8],
    chunk: &mut [PacketBuf],
    waiting: &mut Chunk<Waiting<'t>>,
    jobs: &mut Jobs<'t>,
    report: &mut Report,
) {
    let mut last: Option<&'t InboundEntry> = None;
    for (at, packet) in chunk.iter_mut().enumerate() {
        if packet.verdict != Verdict::Pending {
            continue;
        }
        let checked = classify(tables.settings.outer_headers, arena, packet)
            .and_then(|spi| check_one(tables, arena, packet, spi, &mut last, jobs));
        match checked {
            Ok(sealed) => waiting.push(Waiting { at, sealed }),
            Err(verdict) => decide(packet, verdict, report),
        }
    }
}

/// Step 3: finds the ESP packet, whose SPI is the answer. The packet's data becomes the ESP packet,
/// or what follows the non-ESP marker.
fn classify(mode: OuterHeaders, arena: &[u8], packet: &mut PacketBuf) -> Result<u32, Verdict> {
    if mode == OuterHeaders::Written {
        take_off_outer(arena, packet).ok_or(Verdict::Drop(DropReason::OuterMalformed))?;
    }
    let data = arena.get(packet.data_range()).unwrap_or_default();
    if packet.outer.udp && data == KEEPALIVE {
        return Err(Verdict::Drop(DropReason::Keepalive));
    }
    match esp::spi(data) {
        None => Err(Verdict::Drop(DropReason::EspTruncated)),
        Some(0) if packet.outer.udp && packet.grow(-NON_ESP_MARKER_BYTES, 0) => {
            Err(Verdict::Control)
        }
        // RFC 4303 §2.1: 0 is for local use, 1 to 255 are IANA's.
        Some(spi) if spi < Spi::MIN => Err(Verdict::Drop(DropReason::ReservedSpi)),
        Some(spi) => Ok(spi),
    }
}

/// Takes off outer IP and UDP header and notes what they say. `None` where they are malformed, a
/// fragment (RFC 4303 §3.4.1), or of another protocol.
fn take_off_outer(arena: &[u8], packet: &mut PacketBuf) -> Option<()> {
    let whole = arena.get(packet.data_range())?;
    let (local, remote, tos, above, payload, total_bytes) = match whole.first()? >> 4 {
        4 => {
            let ip = Ipv4::parse(whole).filter(|ip| !ip.is_fragment())?;
            let (local, remote) = (ip.destination().into(), ip.source().into());
            (
                local,
                remote,
                ip.tos(),
                ip.protocol(),
                ip.payload(),
                ip.total_bytes(),
            )
        }
        6 => {
            let ip = Ipv6::parse(whole)?;
            let upper = ip.upper().filter(|upper| !upper.is_fragment)?;
            let (local, remote) = (ip.destination().into(), ip.source().into());
            let tos = ip.traffic_class();
            (
                local,
                remote,
                tos,
                upper.protocol,
                upper.payload,
                ip.total_bytes(),
            )
        }
        _ => return None,
    };
    let (port, local_port, data) = match above {
        protocol::ESP => (0, 0, payload),
        protocol::UDP => {
            let udp = Udp::parse(payload)?;
            (udp.source_port(), udp.destination_port(), udp.payload())
        }
        _ => return None,
    };
    packet.outer = Outer {
        local,
        remote: SocketAddr::new(remote, port),
        local_port,
        udp: above == protocol::UDP,
        tos,
        df: false,
    };
    // The payload ends where the IP packet ends; UDP may end before that.
    let udp_slack = payload.len()
        - data.len()
        - if packet.outer.udp {
            crate::wire::udp::HEADER_BYTES
        } else {
            0
        };
    let behind = whole.len() - total_bytes + udp_slack;
    let before = whole.len() - behind - data.len();
    packet
        .grow(-(before as i32), -(behind as i32))
        .then_some(())
}

/// Steps 4 and 5: finds the SA and looks at its window.
fn check_one<'t>(
    tables: &'t Tables,
    arena: &[u8],
    packet: &PacketBuf,
    spi: u32,
    last: &mut Option<&'t InboundEntry>,
    jobs: &mut Jobs<'t>,
) -> Result<Sealed<'t>, Verdict> {
    let drop = Verdict::Drop;
    // 4: runs of one SA are looked up once
    let entry = match *last {
        Some(entry) if entry.sa.id.spi.get() == spi => entry,
        _ => tables.sad.find(spi).ok_or(drop(DropReason::UnknownSpi))?,
    };
    *last = Some(entry);
    let sa = &entry.sa;
    if sa.in_udp != packet.outer.udp {
        return Err(drop(DropReason::EncapMismatch));
    }
    if sa.usage.ended() {
        return Err(drop(DropReason::InboundLifetimeExpired));
    }
    let at = packet.data_range();
    let esp = arena.get(at.clone()).and_then(Esp::parse);
    let esp = esp.ok_or(drop(DropReason::EspTruncated))?;
    // 5: infer the number, look at the window
    Sealed::check(entry, &esp, &at, jobs).map_err(|reason| {
        sa.replays.fetch_add(1, Relaxed);
        drop(reason)
    })
}

/// Steps 6 and 7 for all packets of a chunk that were opened, or not.
fn finish<'t>(
    tables: &'t Tables,
    arena: &mut [u8],
    chunk: &mut [PacketBuf],
    waiting: &mut Chunk<Waiting<'t>>,
    jobs: &[Job<'t>],
    report: &mut Report,
) {
    let mut carried = Carried::default();
    for (Waiting { at, sealed }, job) in waiting.drain(..).zip(jobs) {
        let packet = &mut chunk[at];
        let accepted = match sealed
            .authenticate(job)
            .and_then(|authentic| authentic.commit())
        {
            Ok(accepted) => accepted,
            Err(reason) => {
                decide(packet, Verdict::Drop(reason), report);
                continue;
            }
        };
        let entry = accepted.entry;
        if !carried.entry.is_some_and(|last| ptr::eq(last, entry)) {
            std::mem::take(&mut carried).count(tables, report);
            carried.entry = Some(entry);
        }
        note_authentic(tables, packet, &accepted, report);
        let verdict = match open(&accepted, arena, packet, &job.payload) {
            Ok(()) => Verdict::Forward,
            Err(reason) => Verdict::Drop(reason),
        };
        carried.add(packet, verdict);
        decide(packet, verdict, report);
    }
    carried.count(tables, report);
}

/// What follows from an authentic packet, whatever it carries.
fn note_authentic(
    tables: &Tables,
    packet: &PacketBuf,
    accepted: &Accepted<'_>,
    report: &mut Report,
) {
    accepted
        .entry
        .sa
        .note_authentic(|event| report.raise(event));
    // Only the newest packet tells where the peer is: an old one may come late from where it was.
    let tunnel = tables.tunnel(accepted.entry.tunnel);
    let Some(Tunnel {
        id,
        sender: Some(sender),
        roaming: true,
        ..
    }) = tunnel
    else {
        return;
    };
    let (remote, known) = (packet.outer.remote, sender.header.path().remote_socket());
    // Address and port; not what a socket adds to them (IPv6 scope, flow).
    let moved = remote.ip() != known.ip() || packet.outer.udp && remote.port() != known.port();
    if accepted.newest && moved {
        report.raise(SaEvent::EndpointMoved {
            tunnel: *id,
            remote,
        });
    }
}

/// Step 7: from decrypted payload to inner packet.
fn open(
    accepted: &Accepted<'_>,
    arena: &mut [u8],
    packet: &mut PacketBuf,
    at: &Range<usize>,
) -> Result<(), DropReason> {
    let malformed = DropReason::DecryptedMalformed;
    let opened = accepted.strip(arena.get(at.clone()).unwrap_or_default(), at)?;
    let inner = arena.get_mut(opened.payload.clone()).ok_or(malformed)?;
    let flow = Flow::parse(inner).ok_or(malformed)?;
    if flow.next_header() != opened.next_header {
        return Err(malformed);
    }
    // RFC 4301 §5.2 step 4
    let ends = AnyEnds::of_flow(&flow).ok_or(malformed)?;
    if !accepted.entry.sa.selectors.let_in(&ends) {
        return Err(DropReason::SelectorMismatch);
    }
    carry_ecn(inner, flow.tos, packet.outer.tos)?;
    // RFC 4303 §2.7: what lies behind the inner packet is padding against traffic analysis.
    let data = packet.data_range();
    let front = opened.payload.start - data.start;
    let back = data.len() - front - flow.total_bytes;
    if packet.grow(-(front as i32), -(back as i32)) {
        Ok(())
    } else {
        Err(malformed)
    }
}

impl Carried<'_> {
    fn add(&mut self, packet: &PacketBuf, verdict: Verdict) {
        self.packets += 1;
        if verdict == Verdict::Forward {
            self.bytes += packet.data_bytes() as u64;
        }
        self.data_packets += u64::from(verdict != Verdict::Drop(DropReason::DummyPacket));
    }

    fn count(self, tables: &Tables, report: &mut Report) {
        let Some(InboundEntry { sa, tunnel }) = self.entry else {
            return;
        };
        sa.usage.add(self.packets, self.bytes, |reached| {
            report.raise(reached.event(sa.id));
        });
        if let Some(Tunnel { activity, .. }) = tables.tunnel(*tunnel) {
            activity.received_packets.fetch_add(self.packets, Relaxed);
            activity
                .received_data_packets
                .fetch_add(self.data_packets, Relaxed);
        }
    }
}

fn decide(packet: &mut PacketBuf, verdict: Verdict, report: &mut Report) {
    packet.verdict = verdict;
    if let Verdict::Drop(reason) = verdict {
        report.count_drop(reason);
    }
}
