//! What a kernel tells, and what a process that calls itself charon says.

use esplane_api::{AeadSuite, KeyMaterial, Limits, Now};
use esplane_control_vici::kernel::{ClientId, Kernel, frame};
use esplane_control_vici::xfrm::sa::{build_sa, parse_sa, usersa_id};
use esplane_control_vici::xfrm::wire::{Builder, HEADER_BYTES, flag, kind, messages, size};
use esplane_control_vici::xfrm::{
    SaKey, XfrmCipher, XfrmEncap, XfrmEvent, XfrmMode, XfrmRequest, XfrmSa, message,
};
use std::time::Duration;

/// A datagram of the kernel's. What is read as an SA with a key of ours, reads the same once written.
pub fn xfrm_datagram(datagram: &[u8]) {
    for one in messages(datagram).map_while(Result::ok) {
        let Ok(Some(event)) = message::parse_event(&one) else {
            continue;
        };
        // Nothing that is told prints a key, nor fails to print.
        let _ = format!("{event:?}");
        let XfrmEvent::Installed(sa) = event else {
            continue;
        };
        if let XfrmCipher::Aead(material) = &sa.cipher {
            let written = build_sa(kind::NEWSA, 0, 0, &sa).finish();
            let again = parse_sa(&written[HEADER_BYTES..]);
            let again = again
                .expect("what we write can be read")
                .expect("it is ESP's");
            let XfrmCipher::Aead(same) = &again.cipher else {
                panic!("{again:?}");
            };
            assert!(same.same_secret(material));
            assert_eq!(
                (again.key, again.encap, again.esn),
                (sa.key, sa.encap, sa.esn)
            );
        }
    }
}

/// Frames of charon's preload library to whoever plays the kernel's part. The first byte of each
/// piece says which kind it is; what it holds may be anything.
pub fn xfrm_client(input: &[u8]) {
    let mut kernel = Kernel::new(Box::new(|| 0xc0ff_ee77));
    let client = ClientId(1);
    kernel.handle_connected(client);
    let mut now = Now {
        monotonic: Duration::from_secs(1),
        unix: Duration::from_secs(1_700_000_000),
    };
    let kinds = [
        frame::Kind::Request,
        frame::Kind::State,
        frame::Kind::Join,
        frame::Kind::Ready,
        frame::Kind::Kept,
        frame::Kind::Hello,
    ];
    let hello = kernel.handle_frame(now, client, frame::Kind::Hello, frame::VERSION, &[1; 8]);
    hello.expect("the library's first word");
    let mut rest = input;
    while let [which, low, high, more @ ..] = rest {
        let length = usize::from(u16::from_le_bytes([*low, *high])).min(more.len());
        let (payload, after) = more.split_at(length);
        rest = after;
        if *which == 255 {
            now = now.after(Duration::from_secs(100));
            kernel.handle_timeout(now);
        } else {
            let kind = kinds[usize::from(*which) % kinds.len()];
            // A refused one is disconnected; here it goes on, to see more.
            let _ = kernel.handle_frame(now, client, kind, u64::from(*which), payload);
        }
        let outputs = std::iter::from_fn(|| kernel.poll_output()).count();
        assert!(outputs < 1000, "a frame is not answered without end");
    }
    let request = XfrmRequest::Expire {
        key: seed_sa().key,
        hard: true,
    };
    kernel.handle_request(now, &request);
    while kernel.poll_output().is_some() {}
}

pub(super) fn datagram_seeds() -> Vec<Vec<u8>> {
    let sa = seed_sa();
    let key = usersa_id(&sa.key);
    let other = XfrmSa {
        esn: false,
        window_packets: 16,
        ..seed_sa()
    };
    vec![
        build_sa(kind::NEWSA, 0, 0, &sa).finish().to_vec(),
        build_sa(kind::UPDSA, 0, 0, &other).finish().to_vec(),
        Builder::new(kind::DELSA, 0, 0, &key).finish().to_vec(),
        Builder::new(kind::FLUSHSA, 0, 0, &[50]).finish().to_vec(),
        message::expired(&sa, true).to_vec(),
    ]
}

pub(super) fn client_seeds() -> Vec<Vec<u8>> {
    let flags = flag::REQUEST | flag::ACK;
    let ask = |fixed: &[u8], kind| (0, Builder::new(kind, flags, 1, fixed).finish().to_vec());
    let id = usersa_id(&seed_sa().key);
    let new = build_sa(kind::NEWSA, flags, 1, &seed_sa())
        .finish()
        .to_vec();
    let spi = [
        &new[HEADER_BYTES..][..size::USERSA_INFO],
        &[0; 4],
        &[255; 4],
    ]
    .concat();
    let aevent = [&id[..], &[0; 24]].concat();
    let conversation = [
        (1, new.clone()),
        (2, 0xc3u32.to_ne_bytes().to_vec()),
        (3, Vec::new()),
        ask(&spi, kind::ALLOCSPI),
        (0, new),
        ask(&id, kind::GETSA),
        ask(&aevent, kind::GETAE),
        ask(&[0; size::USERPOLICY_INFO], kind::NEWPOLICY),
        ask(&[0; size::USERPOLICY_ID], kind::GETPOLICY),
        (255, Vec::new()),
        ask(&id, kind::DELSA),
    ];
    let mut bytes = Vec::new();
    for (which, payload) in conversation {
        bytes.push(which);
        bytes.extend_from_slice(&(payload.len() as u16).to_le_bytes());
        bytes.extend_from_slice(&payload);
    }
    vec![bytes]
}

fn seed_sa() -> XfrmSa {
    let secret: Vec<u8> = (1..=20).collect();
    XfrmSa {
        key: SaKey {
            destination: "2001:db8:b::1".parse().expect("an address"),
            spi: "0xc0ffee01".parse().expect("an SPI"),
            mark: (0xdead00, u32::MAX),
        },
        source: "2001:db8:a::1".parse().expect("an address"),
        reqid: 1,
        mode: XfrmMode::Tunnel,
        mark: None,
        if_id: Some(42),
        direction: None,
        cipher: XfrmCipher::Aead(KeyMaterial::new(AeadSuite::Aes128Gcm16, &secret).expect("a key")),
        esn: true,
        window_packets: 128,
        encap: Some(XfrmEncap {
            source_port: 4500,
            destination_port: 1024,
        }),
        soft: Limits {
            seconds: Some(50),
            ..Limits::NONE
        },
        hard: Limits::NONE,
        sequence_sent: 5,
        sequence_received: 6,
        packets: 7,
        bytes: 8,
        added_unix_seconds: 9,
    }
}
