//! A charon, as the preload library passes it on, and an importer; between them the kernel's part.

mod stories;

use crate::kernel::frame::{self, Kind};
use crate::kernel::{ClientId, Kernel, KernelNotice, KernelOutput};
use crate::vici::Mark;
use crate::xfrm::message::{self, parse_error};
use crate::xfrm::sa::{at, build_sa, find, parse_sa, usersa_id, with_mark};
use crate::xfrm::wire::{
    Builder, attribute, flag, kind, messages, put, size, u16_at, u32_at, u64_at,
};
use crate::xfrm::{
    Progress, SaKey, XfrmCipher, XfrmEncap, XfrmEvent, XfrmMode, XfrmReply, XfrmRequest, XfrmSa,
};
use esplane_api::{AeadSuite, KeyMaterial, Limits, Now};
use std::{collections::BTreeMap, time::Duration};

/// What charon's events socket subscribes to: ACQUIRE, EXPIRE, MIGRATE, MAPPING.
const EVENTS: u32 = 1 | 1 << 1 | 1 << 6 | 1 << 7;
/// Its two sockets.
const ASKS: u64 = 1;
const LISTENS: u64 = 2;

/// The kernel's part with one charon, and what came out of it.
struct Story {
    now: Now,
    kernel: Kernel,
    client: ClientId,
    instance: u64,
    sequence: u32,
    /// What the library keeps.
    kept: BTreeMap<u64, Vec<u8>>,
    /// Whether it says so.
    keeps_its_word: bool,
    answers: Vec<(u64, Vec<u8>)>,
    events: Vec<XfrmEvent>,
    snapshot: Option<Vec<XfrmSa>>,
    notices: Vec<KernelNotice>,
}

impl Story {
    fn new() -> Self {
        let mut story = Self {
            now: Now {
                monotonic: Duration::from_secs(1000),
                unix: Duration::from_secs(1_700_000_000),
            },
            kernel: kernel(),
            client: ClientId(1),
            instance: 77,
            sequence: 200,
            kept: BTreeMap::new(),
            keeps_its_word: true,
            answers: Vec::new(),
            events: Vec::new(),
            snapshot: None,
            notices: Vec::new(),
        };
        story.connect();
        story
    }

    /// Esplane is killed and starts again; charon's process lives.
    fn esplane_restarts(&mut self) {
        self.kernel = kernel();
        self.connect();
    }

    /// charon's process ends, and another starts.
    fn charon_restarts(&mut self) {
        self.kernel.handle_disconnected(self.client);
        self.kept.clear();
        self.instance += 1;
        self.connect();
    }

    fn connect(&mut self) {
        self.client = ClientId(self.client.0 + 1);
        self.kernel.handle_connected(self.client);
        self.says(Kind::Hello, frame::VERSION, &self.instance.to_ne_bytes());
        self.says(Kind::Join, ASKS, &0u32.to_ne_bytes());
        self.says(Kind::Join, LISTENS, &EVENTS.to_ne_bytes());
        for (id, state) in self.kept.clone() {
            self.says(Kind::State, id, &state);
        }
        self.says(Kind::Ready, 0, &[]);
    }

    fn says(&mut self, kind: Kind, id: u64, payload: &[u8]) {
        self.kernel
            .handle_frame(self.now, self.client, kind, id, payload)
            .unwrap();
        self.settle();
    }

    fn settle(&mut self) {
        while let Some(output) = self.kernel.poll_output() {
            match output {
                KernelOutput::Event(XfrmEvent::Snapshot(sas)) => self.snapshot = Some(sas),
                KernelOutput::Event(event) => self.events.push(event),
                KernelOutput::Notice(notice) => self.notices.push(notice),
                KernelOutput::Send { client, frame } => {
                    assert_eq!(client, self.client);
                    self.hear(&frame.0);
                }
            }
        }
    }

    fn hear(&mut self, bytes: &[u8]) {
        let frame = frame::read(bytes)
            .unwrap_or_else(|_| panic!())
            .expect("a whole frame");
        assert_eq!(frame.bytes, bytes.len());
        match frame.kind {
            Kind::Keep => {
                self.kept.insert(frame.id, frame.payload.to_vec());
            }
            Kind::Drop => {
                self.kept.remove(&frame.id);
            }
            Kind::Sync if self.keeps_its_word => self.says(Kind::Kept, frame.id, &[]),
            Kind::Sync => {}
            Kind::Answer => self.answers.push((frame.id, frame.payload.to_vec())),
            other => panic!("{other:?} is the library's to say"),
        }
    }

    /// charon asks; what it is answered.
    fn asks(&mut self, request: Builder) -> Vec<Vec<u8>> {
        self.answers.clear();
        let bytes = request.finish();
        self.says(Kind::Request, ASKS, &bytes);
        let answers = std::mem::take(&mut self.answers);
        answers
            .into_iter()
            .filter(|(socket, _)| *socket == ASKS)
            .map(|(_, bytes)| bytes)
            .collect()
    }

    /// charon asks for something to be done; `errno`.
    fn does(&mut self, request: Builder) -> i32 {
        let answers = self.asks(request);
        let [answer] = &answers[..] else {
            panic!("{} answers", answers.len())
        };
        let one = messages(answer).next().unwrap().unwrap();
        assert_eq!((one.kind, one.sequence), (kind::ERROR, self.sequence));
        parse_error(one.body).unwrap()
    }

    fn sequence(&mut self) -> u32 {
        self.sequence += 1;
        self.sequence
    }

    fn adds(&mut self, message: u16, sa: &XfrmSa) -> i32 {
        let sequence = self.sequence();
        self.does(build_sa(message, flag::REQUEST | flag::ACK, sequence, sa))
    }

    fn names(&mut self, message: u16, key: &SaKey) -> Builder {
        let flags = flag::REQUEST | flag::ACK;
        let fixed = match message {
            kind::GETAE => [&usersa_id(key)[..], &[0; 24]].concat(),
            _ => usersa_id(key).to_vec(),
        };
        with_mark(
            Builder::new(message, flags, self.sequence(), &fixed),
            key.mark,
        )
    }

    /// The body of GETSA's answer.
    fn looks_at(&mut self, key: &SaKey) -> Option<Vec<u8>> {
        let request = self.names(kind::GETSA, key);
        let answers = self.asks(request);
        let one = messages(&answers[0]).next().unwrap().unwrap();
        (one.kind == kind::NEWSA).then(|| one.body.to_vec())
    }

    /// What charon's events socket was told.
    fn told(&mut self) -> Vec<Vec<u8>> {
        let answers = std::mem::take(&mut self.answers);
        assert!(answers.iter().all(|(socket, _)| *socket == LISTENS));
        answers.into_iter().map(|(_, bytes)| bytes).collect()
    }

    fn requests(&mut self, request: XfrmRequest) {
        self.kernel.handle_request(self.now, &request);
        self.settle();
    }

    fn stores(&mut self, key: SaKey, sent: Option<u64>, packets: u64) -> XfrmReply {
        self.events.clear();
        self.requests(XfrmRequest::Store {
            key,
            progress: Progress {
                sent,
                packets,
                bytes: packets * 100,
                ..Progress::default()
            },
        });
        let [XfrmEvent::Reply(reply)] = self.events[..] else {
            panic!("{:?}", self.events)
        };
        reply
    }

    fn passes(&mut self, seconds: u64) {
        self.now = self.now.after(Duration::from_secs(seconds));
        while self
            .kernel
            .poll_timeout()
            .is_some_and(|at| at <= self.now.monotonic)
        {
            self.kernel.handle_timeout(self.now);
            self.settle();
        }
    }

    /// The SAs of the last snapshot.
    fn snapshot(&self) -> &[XfrmSa] {
        self.snapshot.as_deref().expect("a snapshot")
    }
}

fn kernel() -> Kernel {
    let mut last = 0u32;
    Kernel::new(Box::new(move || {
        last = last.wrapping_add(0x9e37_79b9);
        last
    }))
}

fn key(destination: &str, spi: &str) -> SaKey {
    SaKey {
        destination: destination.parse().unwrap(),
        spi: spi.parse().unwrap(),
        mark: (0, 0),
    }
}

fn sa(key: SaKey) -> XfrmSa {
    let secret: Vec<u8> = (1..=36).collect();
    XfrmSa {
        key,
        source: "198.51.100.1".parse().unwrap(),
        reqid: 1,
        mode: XfrmMode::Tunnel,
        mark: (key.mark.1 != 0).then_some(Mark {
            value: key.mark.0,
            mask: key.mark.1,
        }),
        if_id: None,
        direction: None,
        cipher: XfrmCipher::Aead(KeyMaterial::new(AeadSuite::Aes256Gcm16, &secret).unwrap()),
        esn: true,
        window_packets: 32,
        encap: Some(XfrmEncap {
            source_port: 4500,
            destination_port: 4500,
        }),
        soft: Limits {
            seconds: Some(3000),
            ..Limits::NONE
        },
        hard: Limits {
            seconds: Some(3600),
            ..Limits::NONE
        },
        sequence_sent: 0,
        sequence_received: 0,
        packets: 0,
        bytes: 0,
        added_unix_seconds: 0,
    }
}

fn outbound() -> XfrmSa {
    sa(key("203.0.113.1", "0xc0ffee01"))
}

fn larval_request(story: &mut Story) -> Builder {
    let mut larval = outbound();
    larval.cipher = XfrmCipher::Larval;
    let mut fixed = [0; size::USERSPI_INFO];
    let message = build_sa(kind::NEWSA, 0, 0, &larval).finish();
    put(&mut fixed, 0, &message[16..16 + size::USERSA_INFO]);
    put(&mut fixed, 56, &[198, 51, 100, 1]);
    put(&mut fixed, at::SPI, &[0; 4]);
    put(&mut fixed, 224, &0xc000_0000u32.to_ne_bytes());
    put(&mut fixed, 228, &0xcfff_ffffu32.to_ne_bytes());
    Builder::new(kind::ALLOCSPI, flag::REQUEST, story.sequence(), &fixed)
}
