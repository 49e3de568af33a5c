//! One worker's queues of both sides, over one memory, so that a frame may come by one and leave by another.

use super::{
    XdpError, XdpSocket, failed,
    socket::{Binding, RING, lacks_zero_copy},
    umem::{MTU_MAX, Umem},
};
use esplane_dataplane::Batch;
use std::{io, ops::Range, os::fd::AsFd, sync::Arc, thread, time::Duration};

/// A queue may be taken for a moment after its last owner has gone.
const BUSY_RETRIES: u32 = 40;
const BUSY_WAIT: Duration = Duration::from_millis(50);

/// A queue to be opened.
#[derive(Clone, Debug)]
pub struct Queue {
    /// Its interface's name.
    pub interface: String,
    /// Its interface's number.
    pub link: u32,
    /// The largest IP packet that the interface takes.
    pub mtu: u32,
    /// Its own number there.
    pub number: u32,
}

/// One worker's queues.
pub struct WorkerQueues {
    /// Of the private side.
    pub inner: Vec<XdpSocket>,
    /// Of the public side.
    pub outer: Vec<XdpSocket>,
    /// What its batches lie in.
    pub frames: Frames,
}

/// Frames for both directions of one worker: a frame comes and leaves in one of them for good, so each batch has its own.
///
/// There are enough for a direction's fill rings, what its way out may hold, and a batch: whatever waits elsewhere, all
/// fill rings can be full.
pub struct Frames {
    umem: Arc<Umem>,
    leaving: Range<usize>,
    arriving: Range<usize>,
}

impl Frames {
    /// The batch of what leaves and the batch of what arrives, each for so many packets, at most what
    /// [`WorkerQueues::open`] was told.
    pub fn batches(self, capacity: usize) -> (Batch, Batch) {
        let batch = |frames| {
            // SAFETY: the two ranges are disjoint, `self` is gone afterwards, and the sockets give the kernel what the
            // batches lend or let go, no other (`socket.rs`).
            let memory = unsafe { self.umem.memory() };
            Batch::lent(capacity, self.umem.frame_bytes(), memory, frames)
        };
        (batch(self.leaving.clone()), batch(self.arriving.clone()))
    }
}

impl WorkerQueues {
    /// Opens these queues, for batches of so many packets of up to `mtu` bytes inside.
    ///
    /// All of them copy if one cannot do without: the kernel wants it alike over one memory.
    pub fn open(
        inner: &[Queue],
        outer: &[Queue],
        batch_packets: usize,
        mtu: u32,
    ) -> Result<Self, XdpError> {
        let mtus = inner.iter().chain(outer).map(|queue| queue.mtu);
        let largest = mtus.max().unwrap_or_default().max(mtu);
        if let Some(queue) = (inner.iter().chain(outer)).find(|queue| queue.mtu as usize > MTU_MAX)
        {
            return Err(XdpError::Mtu {
                interface: queue.interface.clone(),
                mtu: queue.mtu,
            });
        }
        if mtu as usize > MTU_MAX {
            return Err(XdpError::InnerMtu { mtu });
        }
        let frames = |from: &[Queue], to: &[Queue]| {
            (from.len() + usize::from(!to.is_empty())) * RING as usize + batch_packets
        };
        let (leaving, arriving) = (frames(inner, outer), frames(outer, inner));
        let umem = || Umem::new(leaving + arriving, largest as usize).map(Arc::new);
        let (mut zero_copy, mut tries) = (true, 0);
        loop {
            let umem = umem().map_err(|error| {
                let first = inner.first().or(outer.first());
                let interface = first.map_or("", |queue| &queue.interface);
                failed("get memory", interface, error)
            })?;
            match open_over(&umem, inner, outer, zero_copy) {
                Ok((inner, outer)) => {
                    let frames = Frames {
                        umem,
                        leaving: 0..leaving,
                        arriving: leaving..leaving + arriving,
                    };
                    return Ok(Self {
                        inner,
                        outer,
                        frames,
                    });
                }
                Err((_, _, error)) if zero_copy && lacks_zero_copy(&error) => zero_copy = false,
                Err((_, _, error))
                    if error.raw_os_error() == Some(libc::EBUSY) && tries < BUSY_RETRIES =>
                {
                    tries += 1;
                    thread::sleep(BUSY_WAIT);
                }
                Err((doing, interface, error)) => return Err(failed(doing, &interface, error)),
            }
        }
    }
}

type Failure = (&'static str, String, io::Error);

/// All sockets; the first names the memory, the others are told to share it.
fn open_over(
    umem: &Arc<Umem>,
    inner: &[Queue],
    outer: &[Queue],
    zero_copy: bool,
) -> Result<(Vec<XdpSocket>, Vec<XdpSocket>), Failure> {
    let mut sockets: Vec<XdpSocket> = Vec::new();
    for queue in inner.iter().chain(outer) {
        let binding = match sockets.first() {
            None => Binding::First { zero_copy },
            Some(first) => Binding::Sharing {
                with: first.as_fd(),
                zero_copy,
            },
        };
        let socket = XdpSocket::open(queue, umem, binding)
            .map_err(|(doing, error)| (doing, queue.interface.clone(), error))?;
        sockets.push(socket);
    }
    let outer = sockets.split_off(inner.len());
    Ok((sockets, outer))
}
