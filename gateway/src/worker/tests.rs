//! Workers between drivers made of queues.

use super::*;
use crate::io::{Descriptors, frame_bytes};
use esplane_api::{
    AeadSuite, DfPolicy, Direction, DropCounters, Esn, KeyMaterial, Lifetime, Now, OuterPath,
    Policy, PolicyAction, SaCommand, SaParams, SelectorPair, SequenceStart, Spi, TrafficSelector,
    TunnelId, TunnelParams, UdpEncap, WindowSize,
};
use esplane_dataplane::{OuterHeaders, Settings, TableWriter};
use std::{
    collections::VecDeque,
    os::fd::AsFd,
    sync::{Mutex, atomic::AtomicU64, mpsc as std_mpsc},
};

const TUNNEL: TunnelId = TunnelId(7);
const PATIENCE: Duration = Duration::from_secs(20);

type Arrivals = Arc<Mutex<VecDeque<(Vec<u8>, Outer)>>>;

/// A driver whose packets a test puts in and takes out.
struct QueueDriver {
    arriving: Arrivals,
    arrived: Waker,
    leaving: std_mpsc::Sender<(Vec<u8>, Outer)>,
    /// What the kernel would have thrown away.
    lost: Arc<AtomicU64>,
    /// Done instead of receiving, once there is something to receive.
    fault: Option<fn() -> io::Result<()>>,
}

/// The test's end of it.
struct QueueEnd {
    arriving: Arrivals,
    arrived: Waker,
    leaving: std_mpsc::Receiver<(Vec<u8>, Outer)>,
    lost: Arc<AtomicU64>,
}

fn queue_driver(fault: Option<fn() -> io::Result<()>>) -> (QueueDriver, QueueEnd) {
    let (arriving, arrived) = (Arc::default(), Waker::new().unwrap());
    let (sender, leaving) = std_mpsc::channel();
    let lost = Arc::<AtomicU64>::default();
    let driver = QueueDriver {
        arriving: Arc::clone(&arriving),
        arrived: arrived.clone(),
        leaving: sender,
        lost: Arc::clone(&lost),
        fault,
    };
    let end = QueueEnd {
        arriving,
        arrived,
        leaving,
        lost,
    };
    (driver, end)
}

impl QueueEnd {
    fn put(&self, packets: impl IntoIterator<Item = (Vec<u8>, Outer)>) {
        self.arriving.lock().unwrap().extend(packets);
        self.arrived.wake();
    }

    fn take(&self) -> (Vec<u8>, Outer) {
        self.leaving
            .recv_timeout(PATIENCE)
            .expect("a packet leaves")
    }
}

impl Driver for QueueDriver {
    fn receive(&mut self, batch: &mut Batch, _: &mut DropCounters) -> io::Result<()> {
        self.arrived.clear();
        let mut arriving = self.arriving.lock().unwrap();
        if let (Some(fault), false) = (self.fault, arriving.is_empty()) {
            drop(arriving);
            return fault();
        }
        while !batch.is_full()
            && let Some((data, outer)) = arriving.pop_front()
        {
            assert!(batch.push(&data, outer));
        }
        Ok(())
    }

    fn transmit(&mut self, batch: &mut Batch, _: &mut DropCounters) -> Traffic {
        let mut sent = Traffic::default();
        for (index, packet) in batch.packets().iter().enumerate() {
            if packet.verdict == Verdict::Forward {
                sent.add(packet.data_bytes());
                let _test_is_over = self
                    .leaving
                    .send((batch.data(index).to_vec(), batch.outer_of(packet)));
            }
        }
        sent
    }

    fn count_lost(&mut self, drops: &mut DropCounters) {
        drops.add(
            DropReason::OuterOverrun,
            self.lost.swap(0, Ordering::Relaxed),
        );
    }

    fn poll_descriptors(&self) -> Descriptors<'_> {
        Descriptors::from_iter([self.arrived.as_fd()])
    }
}

/// One worker and all that a test needs around it.
struct Bench {
    writer: TableWriter,
    tables: Arc<ArcSwap<Tables>>,
    counters: Arc<WorkerCounters>,
    worker: WorkerHandle,
    inner: QueueEnd,
    outer: QueueEnd,
    control: mpsc::Receiver<ToControl>,
}

impl Bench {
    fn new(control_queue: usize) -> Self {
        Self::with_fault(control_queue, None)
    }

    fn with_fault(control_queue: usize, fault: Option<fn() -> io::Result<()>>) -> Self {
        let settings = Settings {
            outer_headers: OuterHeaders::ByKernel,
        };
        let writer = TableWriter::new(
            settings,
            crate::aead::choose().expect("a name this CPU knows"),
        );
        let tables = Arc::new(ArcSwap::new(writer.tables()));
        let counters = Arc::new(WorkerCounters::new());
        let (inner_driver, inner) = queue_driver(fault);
        let (outer_driver, outer) = queue_driver(None);
        let (sender, control) = mpsc::channel(control_queue);
        let worker = spawn(WorkerSetup {
            index: 3,
            inner: Box::new(inner_driver),
            outer: Box::new(outer_driver),
            tables: Arc::clone(&tables),
            control: sender,
            counters: Arc::clone(&counters),
            pin_to_core: Some(0),
            busy_poll: false,
            batch_packets: 4,
            frame_bytes: frame_bytes(1400),
            frames: None,
            hold: HoldLimits::default(),
        });
        Self {
            writer,
            tables,
            counters,
            worker: worker.unwrap(),
            inner,
            outer,
            control,
        }
    }

    /// Publishes new tables without waking the worker.
    fn apply(&mut self, commands: Vec<SaCommand>) {
        self.writer.apply(Now::default(), commands).unwrap();
        self.tables.store(self.writer.tables());
    }

    fn wait_until(&self, what: &str, condition: impl Fn(&WorkerSnapshot) -> bool) {
        let start = Instant::now();
        while !condition(&self.counters.snapshot()) {
            let counters = self.counters.snapshot();
            assert!(start.elapsed() < PATIENCE, "never {what}: {counters:?}");
            thread::sleep(Duration::from_millis(1));
        }
    }
}

fn define() -> SaCommand {
    let selectors = SelectorPair {
        local: TrafficSelector::ANY_V4,
        remote: "10.2.0.0/16".parse().unwrap(),
    };
    SaCommand::DefineTunnel(TunnelParams {
        id: TUNNEL,
        name: "far".to_owned(),
        policies: vec![Policy {
            selectors,
            action: PolicyAction::Protect(TUNNEL),
            priority: 0,
        }],
        roaming: false,
        df: DfPolicy::Clear,
    })
}

fn outbound() -> SaCommand {
    let encap = Some(UdpEncap {
        local_port: 4500,
        remote_port: 4501,
    });
    let (local, remote) = ("192.0.2.1".parse().unwrap(), "192.0.2.2".parse().unwrap());
    SaCommand::Install(SaParams {
        tunnel: TUNNEL,
        direction: Direction::Outbound,
        spi: Spi::new(0xc0de).unwrap(),
        key: KeyMaterial::new(AeadSuite::Aes128Gcm16, &[9; 20]).unwrap(),
        esn: Esn::On,
        window: WindowSize::DEFAULT,
        path: OuterPath::new(local, remote, encap).unwrap(),
        selectors: vec![SelectorPair {
            local: TrafficSelector::ANY_V4,
            remote: TrafficSelector::ANY_V4,
        }],
        lifetime: Lifetime::UNLIMITED,
        sequence: SequenceStart::FRESH,
        worker: None,
    })
}

/// An IPv4 packet into the tunnel that is recognised by its length.
fn inner_packet(number: usize) -> (Vec<u8>, Outer) {
    let mut packet = vec![0; 40 + 4 * number];
    let bytes = packet.len() as u16;
    packet[..4].copy_from_slice(&[0x45, 0, (bytes >> 8) as u8, bytes as u8]);
    packet[8..10].copy_from_slice(&[64, 17]);
    packet[12..20].copy_from_slice(&[10, 1, 0, 1, 10, 2, 0, 1]);
    let sum: u32 = packet[..20]
        .chunks(2)
        .map(|pair| u32::from(u16::from_be_bytes([pair[0], pair[1]])))
        .sum();
    let sum = !((sum >> 16) as u16 + sum as u16);
    packet[10..12].copy_from_slice(&sum.to_be_bytes());
    (packet, Outer::NONE)
}

/// Which [`inner_packet`] an ESP packet of AES-GCM holds: 34 to 37 bytes go to ESP, IV, trailer and ICV.
fn number_of(esp: &[u8]) -> usize {
    (esp.len() - 34 - 40) / 4
}

#[test]
fn held_packets_leave_before_newer_ones_once_there_is_an_sa() {
    let mut bench = Bench::new(16);
    bench.apply(vec![define()]);
    bench.inner.put((0..10).map(inner_packet));
    bench.wait_until("held", |counters| counters.held_packets == 10);
    let event = bench.control.blocking_recv().unwrap();
    assert!(matches!(
        event,
        ToControl::Event(SaEvent::SaNeeded { tunnel: TUNNEL })
    ));
    // Newer packets arrive at the same moment as the SA, and nobody rings.
    bench.apply(vec![outbound()]);
    bench.inner.put((10..20).map(inner_packet));
    for number in 0..20 {
        let (esp, outer) = bench.outer.take();
        assert_eq!(number_of(&esp), number);
        assert_eq!(outer.remote, "192.0.2.2:4501".parse().unwrap());
    }
    bench.worker.stop();
    bench.worker.join().unwrap();
    let counters = bench.counters.snapshot();
    assert_eq!(
        (counters.inner_received.packets, counters.outer_sent.packets),
        (20, 20)
    );
    assert_eq!((counters.held_packets, counters.drops.unexpected()), (0, 0));
}

#[test]
fn a_wake_after_the_tables_changed_is_enough_to_release_held_packets() {
    let mut bench = Bench::new(16);
    bench.apply(vec![define()]);
    bench.inner.put((0..3).map(inner_packet));
    bench.wait_until("held", |counters| counters.held_packets == 3);
    // A change that helps nothing keeps them, in order.
    bench.apply(vec![define()]);
    bench.worker.wake();
    bench.apply(vec![outbound()]);
    bench.worker.wake();
    for number in 0..3 {
        assert_eq!(number_of(&bench.outer.take().0), number);
    }
}

#[test]
fn packets_held_when_the_worker_ends_are_counted() {
    let mut bench = Bench::new(16);
    bench.apply(vec![define()]);
    bench.inner.put((0..3).map(inner_packet));
    bench.worker.stop();
    bench.worker.join().unwrap();
    let counters = bench.counters.snapshot();
    assert_eq!(
        counters.inner_received.packets, 3,
        "what had arrived is still carried"
    );
    assert_eq!(counters.drops[DropReason::HoldTimeout], 3);
}

#[test]
fn control_messages_reach_the_control_side_and_too_many_are_counted() {
    let mut bench = Bench::new(2);
    let from: SocketAddr = "198.51.100.7:4500".parse().unwrap();
    let outer = Outer {
        remote: from,
        udp: true,
        ..Outer::NONE
    };
    bench
        .outer
        .put((0..5).map(|number| (vec![0, 0, 0, 0, number], outer)));
    bench.wait_until("counted", |counters| {
        counters.drops[DropReason::ControlQueueFull] == 3
    });
    for number in 0..2 {
        match bench.control.blocking_recv().unwrap() {
            ToControl::Datagram { from: sender, data } => {
                assert_eq!((sender, data), (from, vec![number]));
            }
            other => panic!("{other:?}"),
        }
    }
}

#[test]
fn an_event_waits_for_room_at_the_control_side() {
    let mut bench = Bench::new(1);
    let outer = Outer {
        udp: true,
        ..Outer::NONE
    };
    bench.outer.put([(vec![0, 0, 0, 0, 1], outer)]);
    bench.wait_until("received", |counters| counters.inbound_batches == 1);
    bench.apply(vec![define()]);
    bench.inner.put([inner_packet(0)]);
    bench.wait_until("held", |counters| counters.held_packets == 1);
    assert!(matches!(
        bench.control.blocking_recv(),
        Some(ToControl::Datagram { .. })
    ));
    assert!(matches!(
        bench.control.blocking_recv(),
        Some(ToControl::Event(_))
    ));
}

#[test]
fn an_event_raised_with_every_batch_is_told_once_in_a_while() {
    let mut bench = Bench::new(1000);
    bench.apply(vec![define()]);
    for round in 1..=50 {
        bench.inner.put([inner_packet(0)]);
        bench.wait_until("received", |counters| counters.outbound_batches == round);
    }
    let told = std::iter::from_fn(|| bench.control.try_recv().ok()).count();
    assert!((1..50).contains(&told), "{told} times");
}

#[test]
fn what_the_kernel_has_lost_is_counted_soon_after_work_though_none_follows() {
    let bench = Bench::new(16);
    for round in 1..=2 {
        bench.outer.lost.store(5, Ordering::Relaxed);
        bench.inner.put([inner_packet(0)]);
        bench.wait_until("counted", |counters| {
            counters.drops[DropReason::OuterOverrun] == 5 * round
        });
    }
    assert_eq!(bench.counters.snapshot().inner_received.packets, 2);
}

#[test]
fn a_worker_without_work_sleeps() {
    let bench = Bench::new(1);
    bench.wait_until("asleep", |counters| counters.sleeps == 0);
    for rings in 1..=3 {
        bench.worker.wake();
        bench.wait_until("awake and asleep again", |counters| {
            counters.sleeps >= rings
        });
    }
    // One sleep for each ring and nothing between: it does not spin.
    assert!(bench.counters.snapshot().sleeps <= 3);
}

#[test]
fn a_worker_that_panics_says_so() {
    fn bug() -> io::Result<()> {
        panic!("out of cheese")
    }
    let mut bench = Bench::with_fault(1, Some(bug));
    bench.inner.put([inner_packet(0)]);
    let told = bench.control.blocking_recv();
    assert!(
        matches!(&told, Some(ToControl::WorkerFailed { worker: 3, error: WorkerError::Panicked(text) })
            if text == "out of cheese"),
        "{told:?}"
    );
    let error = bench.worker.join().unwrap_err();
    assert!(error.to_string().contains("out of cheese"), "{error}");
}

#[test]
fn a_worker_whose_interface_is_gone_says_so() {
    fn gone() -> io::Result<()> {
        Err(io::Error::from_raw_os_error(libc::EBADFD))
    }
    let mut bench = Bench::with_fault(1, Some(gone));
    bench.inner.put([inner_packet(0)]);
    let told = bench.control.blocking_recv();
    assert!(
        matches!(
            &told,
            Some(ToControl::WorkerFailed {
                worker: 3,
                error: WorkerError::Inner(_)
            })
        ),
        "{told:?}"
    );
    assert!(bench.worker.join().is_err());
}
