//! A TUN queue that speaks super-packets (`IFF_VNET_HDR`).
//!
//! ```text
//!   read ─▶ staging │vnet│ IP │ TCP │ up to 64 KiB │ ─ split ─▶ │ESP│IP│TCP│…│ICV│ESP│IP│TCP│…│ICV│… of the batch
//!             └─ what the batch has no room for waits for the next receipt
//!           Between the packets there is just what ESP will write there: sealed they are one piece, which leaves as it lies.
//!
//!   writev ◀─ │vnet│ IP │ TCP │ made anew, the payloads where they lie ◀─ coalesce ─ frames
//! ```

use super::{
    Traffic,
    offload::{
        VNET_BYTES, VnetHeader,
        coalesce::{Coalescer, Group, SEGMENTS_MAX},
        split::{Split, finish_checksum},
    },
    room_bytes,
    tun::{TunOffloads, write},
};
use arrayvec::ArrayVec;
use esplane_api::{DropCounters, DropReason};
use esplane_dataplane::{
    batch::{Batch, Outer, Verdict},
    esp::encap::sealed_bytes,
    wire::esp::BEFORE_PAYLOAD_BYTES,
};
use std::{
    io::{self, IoSlice},
    ops::Range,
    os::fd::BorrowedFd,
};
use tracing::info;

/// The vnet header and the longest packet (IPv6 does not count its own header), with one byte to spare.
const STAGING_BYTES: usize = VNET_BYTES + 40 + (1 << 16);

/// What one queue needs for super-packets.
#[derive(Debug)]
pub(super) struct SuperPackets {
    staging: Box<[u8]>,
    /// The super-packet being split, and where it lies.
    pending: Option<(Split, Range<usize>)>,
    coalescer: Coalescer,
    /// Whether the kernel has refused one: told once.
    refused: bool,
}

impl SuperPackets {
    pub(super) fn new(offloads: TunOffloads) -> Self {
        Self {
            staging: vec![0; STAGING_BYTES].into_boxed_slice(),
            pending: None,
            coalescer: Coalescer::new(offloads.tso, offloads.uso),
            refused: false,
        }
    }

    /// Like `Driver::receive`.
    pub(super) fn receive(
        &mut self,
        file: BorrowedFd<'_>,
        batch: &mut Batch,
        drops: &mut DropCounters,
    ) -> io::Result<()> {
        let mut refused = 0;
        loop {
            self.split_pending(batch);
            if batch.is_full() || refused >= batch.capacity() {
                return Ok(());
            }
            match rustix::io::read(file, &mut *self.staging) {
                Ok(bytes) => {
                    if let Err((reason, packets)) = self.take(bytes, batch) {
                        drops.add(reason, packets as u64);
                        refused += 1;
                    }
                }
                Err(rustix::io::Errno::AGAIN) => return Ok(()),
                Err(rustix::io::Errno::INTR) => {}
                Err(error) => return Err(error.into()),
            }
        }
    }

    /// Makes packets of the pending super-packet until all are made or the batch is full.
    fn split_pending(&mut self, batch: &mut Batch) {
        let Some((split, range)) = &mut self.pending else {
            return;
        };
        let packet = &self.staging[range.clone()];
        while split.left() > 0 {
            if batch.is_full() {
                return;
            }
            if batch.is_lent() {
                // Sealed, each leaves by itself: a frame for each.
                let frame = batch.next_frame();
                let Some(bytes) = frame.and_then(|frame| split.next(packet, frame)) else {
                    break; // not so, either
                };
                batch.push_received(bytes, Outer::NONE);
                continue;
            }
            let start = batch.used_bytes();
            let place = batch.spare_room().get_mut(BEFORE_PAYLOAD_BYTES..);
            let Some(bytes) = place.and_then(|place| split.next(packet, place)) else {
                break; // not so: it fits into a frame, and there was room for one
            };
            let data = start + BEFORE_PAYLOAD_BYTES;
            batch.push_placed(
                start..start + sealed_bytes(bytes),
                data..data + bytes,
                Outer::NONE,
            );
        }
        self.pending = None;
    }

    /// Takes what was read: a packet into the batch, or a super-packet to be split. An error says why not,
    /// and how many packets that costs. The batch has room for one packet.
    fn take(&mut self, bytes: usize, batch: &mut Batch) -> Result<(), (DropReason, usize)> {
        let malformed = (DropReason::InnerMalformed, 1);
        let room = room_bytes(batch);
        let read = &mut self.staging[..bytes];
        let (header, packet) = read.split_first_chunk_mut().ok_or(malformed)?;
        let header = VnetHeader::parse(header).ok_or(malformed)?;
        if header.kind.is_some() {
            let split = Split::new(&header, packet).ok_or(malformed)?;
            if split.longest() >= room {
                return Err((DropReason::InnerTooBig, split.left()));
            }
            self.pending = Some((split, VNET_BYTES..bytes));
            return Ok(());
        }
        if packet.len() >= room {
            return Err((DropReason::InnerTooBig, 1));
        }
        if !finish_checksum(&header, packet) {
            return Err(malformed);
        }
        match batch.push(packet, Outer::NONE) {
            true => Ok(()),
            false => Err((DropReason::InnerTooBig, 1)),
        }
    }

    /// Like `Driver::transmit`.
    pub(super) fn transmit(
        &mut self,
        file: BorrowedFd<'_>,
        batch: &Batch,
        drops: &mut DropCounters,
    ) -> Traffic {
        self.coalescer.clear();
        for (index, packet) in batch.packets().iter().enumerate() {
            if packet.verdict == Verdict::Forward {
                let data = |index: u16| batch.data(usize::from(index));
                self.coalescer.add(index as u16, data);
            }
        }
        let mut sent = Traffic::default();
        for group in self.coalescer.groups() {
            if let Some(error) = write_together(file, batch, group, &mut sent) {
                if !self.refused {
                    info!("the kernel has refused a super-packet ({error}): its packets go singly");
                }
                self.refused = true;
            } else if group.members.len() > 1 {
                continue;
            }
            // Alone, or refused together: each by itself, so that each is sent or counted.
            for member in &group.members {
                let data = batch.data(usize::from(*member));
                let alone = [IoSlice::new(&[0; VNET_BYTES]), IoSlice::new(data)];
                match write(file, &alone) {
                    Ok(()) => sent.add(data.len()),
                    Err(_) => drops.add(DropReason::DeliverFailed, 1),
                }
            }
        }
        sent
    }
}

/// Writes a group of several as one super-packet. An error if the kernel does not take it.
fn write_together(
    file: BorrowedFd<'_>,
    batch: &Batch,
    group: &Group,
    sent: &mut Traffic,
) -> Option<io::Error> {
    let data = |member: &u16| batch.data(usize::from(*member));
    let first = data(group.members.first()?);
    let (header, payload) = (group.super_header(first)?, group.payload_at()?);
    let mut parts: ArrayVec<IoSlice<'_>, { 1 + SEGMENTS_MAX }> = ArrayVec::new();
    parts.push(IoSlice::new(&header));
    for member in &group.members {
        parts.push(IoSlice::new(&data(member)[payload..]));
    }
    if let Err(error) = write(file, &parts) {
        return Some(error);
    }
    for member in &group.members {
        sent.add(data(member).len());
    }
    None
}
