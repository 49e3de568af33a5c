//! One TCP connection as fast as it goes, its content checked byte by byte.

use super::{Ends, MARKER, Pattern, Stop, TCP_BUFFER_BYTES};
use crate::demo::namespaces::Namespace;
use serde::Serialize;
use socket2::{Domain, Protocol, Socket, Type};
use std::{
    io::{self, ErrorKind::*, Read, Write},
    net::{Shutdown, SocketAddr, TcpStream},
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering::Relaxed},
    },
    thread::JoinHandle,
    time::{Duration, Instant},
};

/// The stream repeats a block of this many pseudo-random bytes. A prime: nothing that is shifted,
/// repeated or lost by whole packets or pages goes unnoticed.
const BLOCK_BYTES: usize = 1_048_573;
/// Bytes per system call.
const CHUNK_BYTES: usize = 128 * 1024;
/// How long neither end may wait for the other.
const PATIENCE: Duration = Duration::from_secs(10);

/// What the connection carried.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize)]
pub struct TcpResult {
    /// Over the middle 80 % of its time, payload only.
    pub gbit_per_second: f64,
    /// Payload bytes sent.
    pub bytes_sent: u64,
    /// Payload bytes received.
    pub bytes_received: u64,
    /// Whether each byte was the right one.
    pub intact: bool,
    /// Segments the sender's kernel sent again.
    pub retransmitted_segments: u64,
}

impl TcpResult {
    /// Whether all bytes arrived unharmed. (Retransmissions are TCP's own business.)
    pub fn is_perfect(&self) -> bool {
        self.intact && self.bytes_sent > 0 && self.bytes_received == self.bytes_sent
    }
}

/// The connection under way.
pub struct TcpBulk {
    /// Bytes sent, segments sent again.
    sender: JoinHandle<io::Result<(u64, u64)>>,
    receiver: JoinHandle<io::Result<Received>>,
    received: Arc<AtomicU64>,
}

struct Received {
    intact: bool,
    /// Bytes received by then.
    samples: Vec<(Instant, u64)>,
    total: u64,
}

impl TcpBulk {
    /// Connects and starts sending.
    pub fn start(
        from: &Namespace,
        to: &Namespace,
        ends: Ends,
        stop: Arc<Stop>,
    ) -> io::Result<Self> {
        let received = Arc::new(AtomicU64::new(0));
        let block: Arc<[u8]> = block().into();
        let listener = to.enter(|| {
            let socket = socket(ends)?;
            socket.bind(&SocketAddr::new(ends.to, 0).into())?;
            socket.listen(1)?;
            Ok(socket)
        })?;
        let target = listener.local_addr()?;
        let receiver = to.spawn("tcp-rx", {
            let (block, received) = (block.clone(), received.clone());
            move || receive(&listener, &block, &received)
        })?;
        let sender = from.spawn("tcp-tx", move || {
            let socket = socket(ends)?;
            socket.bind(&SocketAddr::new(ends.from, 0).into())?;
            socket.connect(&target)?;
            let sent = send(&socket.into(), &block, &stop)?;
            Ok((sent, retransmitted_segments()?))
        })?;
        Ok(Self {
            sender,
            receiver,
            received,
        })
    }

    /// Bytes received so far.
    pub fn progress(&self) -> u64 {
        self.received.load(Relaxed)
    }

    /// Waits for the last byte. Call it after the stop.
    pub fn finish(self) -> io::Result<TcpResult> {
        let joined = self.sender.join();
        let (bytes_sent, retransmitted_segments) =
            joined.unwrap_or_else(|panic| std::panic::resume_unwind(panic))?;
        let joined = self.receiver.join();
        let received = joined.unwrap_or_else(|panic| std::panic::resume_unwind(panic))?;
        Ok(TcpResult {
            gbit_per_second: middle_rate(&received.samples),
            bytes_sent,
            bytes_received: received.total,
            intact: received.intact,
            retransmitted_segments,
        })
    }
}

/// A socket with fixed buffers, which bound what is in flight.
fn socket(ends: Ends) -> io::Result<Socket> {
    let socket = Socket::new(
        Domain::for_address((ends.from, 0).into()),
        Type::STREAM,
        Some(Protocol::TCP),
    )?;
    // The kernel doubles the number for its own bookkeeping; of a receive buffer, half is offered
    // as window.
    socket.set_send_buffer_size(TCP_BUFFER_BYTES)?;
    socket.set_recv_buffer_size(TCP_BUFFER_BYTES)?;
    socket.set_read_timeout(Some(PATIENCE))?;
    socket.set_write_timeout(Some(PATIENCE))?;
    Ok(socket)
}

fn send(mut stream: &TcpStream, block: &[u8], stop: &Stop) -> io::Result<u64> {
    let mut sent = 0;
    while !stop.is_over() {
        let at = (sent % BLOCK_BYTES as u64) as usize;
        let end = BLOCK_BYTES.min(at + CHUNK_BYTES);
        sent += retried(|| stream.write(&block[at..end]))? as u64;
    }
    stream.shutdown(Shutdown::Write)?;
    Ok(sent)
}

fn receive(listener: &Socket, block: &[u8], received: &AtomicU64) -> io::Result<Received> {
    let (socket, _) = retried(|| listener.accept())?;
    socket.set_read_timeout(Some(PATIENCE))?;
    let mut stream: TcpStream = socket.into();
    let mut buffer = vec![0; CHUNK_BYTES];
    let mut outcome = Received {
        intact: true,
        samples: vec![(Instant::now(), 0)],
        total: 0,
    };
    loop {
        let at = (outcome.total % BLOCK_BYTES as u64) as usize;
        let most = CHUNK_BYTES.min(BLOCK_BYTES - at);
        let bytes = retried(|| stream.read(&mut buffer[..most]))?;
        outcome.intact &= buffer[..bytes] == block[at..at + bytes];
        outcome.total += bytes as u64;
        received.store(outcome.total, Relaxed);
        let last = outcome.samples.last().map(|(at, _)| at.elapsed());
        if last > Some(Duration::from_millis(50)) || bytes == 0 {
            outcome.samples.push((Instant::now(), outcome.total));
        }
        if bytes == 0 {
            return Ok(outcome);
        }
    }
}

/// Of all connections in this thread's namespace, of which ours is the only one: two lines `Tcp:`,
/// names and values.
fn retransmitted_segments() -> io::Result<u64> {
    let table = std::fs::read_to_string("/proc/thread-self/net/snmp")?;
    let mut lines = table.lines().filter(|line| line.starts_with("Tcp:"));
    let (names, values) = (lines.next().unwrap_or(""), lines.next().unwrap_or(""));
    let mut columns = names.split_whitespace().zip(values.split_whitespace());
    let value = columns.find(|(name, _)| *name == "RetransSegs");
    Ok(value.and_then(|(_, value)| value.parse().ok()).unwrap_or(0))
}

/// Goes on after a signal.
fn retried<T>(mut call: impl FnMut() -> io::Result<T>) -> io::Result<T> {
    loop {
        match call() {
            Err(error) if error.kind() == Interrupted => {}
            outcome => return outcome,
        }
    }
}

/// The rate between a tenth and nine tenths of the time, free of slow start and farewell.
fn middle_rate(samples: &[(Instant, u64)]) -> f64 {
    let (Some((start, _)), Some((end, _))) = (samples.first(), samples.last()) else {
        return 0.0;
    };
    let tenth = (*end - *start) / 10;
    let from = samples.iter().find(|(at, _)| *at >= *start + tenth);
    let to = samples.iter().rfind(|(at, _)| *at <= *end - tenth);
    match (from, to) {
        (Some((from, before)), Some((to, after))) if to > from => {
            (after - before) as f64 * 8.0 / (*to - *from).as_secs_f64() / 1e9
        }
        _ => 0.0,
    }
}

fn block() -> Vec<u8> {
    let mut block = vec![0; BLOCK_BYTES];
    Pattern(0x7c9).fill(&mut block);
    for place in block.chunks_exact_mut(512) {
        place[..MARKER.len()].copy_from_slice(&MARKER);
    }
    block
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_rate_is_that_of_the_middle() {
        let start = Instant::now();
        let at = |seconds: u64| start + Duration::from_secs(seconds);
        // Nothing in the first second, 1 Gbit/s for eight, nothing in the last.
        let samples: Vec<_> = (0..=10)
            .map(|second| (at(second), 125_000_000 * second.clamp(1, 9)))
            .collect();
        assert!((middle_rate(&samples) - 1.0).abs() < 1e-9);
        assert_eq!(middle_rate(&samples[..1]), 0.0);
        assert_eq!(middle_rate(&[]), 0.0);
    }
}
