//! What a real kernel told is read as what it meant; what is written here reads back.

use super::sa::{build_sa, parse_sa};
use super::wire::{HEADER_BYTES, WireError, attribute, flag, kind, messages, size};
use super::{Progress, message};
use super::{SaKey, XfrmCipher, XfrmEncap, XfrmEvent, XfrmMode, XfrmSa};
use crate::vici::Mark;
use esplane_api::{AeadSuite, Direction, Limits};

const RECORDED: &str = include_str!("recorded.txt");

/// The datagram of that name.
pub(super) fn datagram(what: &str, name: &str) -> Vec<u8> {
    let line = RECORDED
        .lines()
        .find(|line| line.split(' ').take(2).eq([what, name]))
        .unwrap_or_else(|| panic!("{what} {name} is recorded"));
    unhex(line.split(' ').next_back().unwrap())
}

/// What the dump came in.
pub(super) fn dump() -> Vec<Vec<u8>> {
    let lines = RECORDED.lines();
    lines
        .filter_map(|line| line.strip_prefix("dump "))
        .map(unhex)
        .collect()
}

fn unhex(text: &str) -> Vec<u8> {
    (0..text.len())
        .step_by(2)
        .map(|at| u8::from_str_radix(&text[at..at + 2], 16).unwrap())
        .collect()
}

fn event(name: &str) -> XfrmEvent {
    let datagram = datagram("event", name);
    let mut all = messages(&datagram);
    let one = all.next().unwrap().unwrap();
    assert!(all.next().is_none());
    message::parse_event(&one).unwrap().expect("an event")
}

fn installed(name: &str) -> XfrmSa {
    match event(name) {
        XfrmEvent::Installed(sa) => sa,
        other => panic!("{name}: {other:?}"),
    }
}

fn key(destination: &str, spi: &str) -> SaKey {
    SaKey {
        destination: destination.parse().unwrap(),
        spi: spi.parse().unwrap(),
        mark: (0, 0),
    }
}

/// 01 02 03 …, the key of every recorded SA.
fn counting(bytes: u8) -> Vec<u8> {
    (1..=bytes).collect()
}

fn assert_aead(sa: &XfrmSa, suite: AeadSuite) {
    let XfrmCipher::Aead(material) = &sa.cipher else {
        panic!("{:?}", sa.cipher);
    };
    assert_eq!(material.suite(), suite);
    let whole = [material.dangerous_key(), &material.dangerous_salt()].concat();
    assert_eq!(whole, counting(suite.keying_material_bytes() as u8));
}

#[test]
fn a_plain_sa_with_a_small_window() {
    let sa = installed("gcm128");
    assert_eq!(sa.key, key("203.0.113.1", "0xc0ffee01"));
    assert_eq!(sa.source.to_string(), "198.51.100.1");
    assert_eq!((sa.reqid, sa.mode, sa.esn), (7, XfrmMode::Tunnel, false));
    assert_eq!((sa.window_packets, sa.encap, sa.mark), (32, None, None));
    assert_eq!((sa.soft, sa.hard), (Limits::NONE, Limits::NONE));
    assert!(sa.added_unix_seconds > 1_700_000_000);
    assert_aead(&sa, AeadSuite::Aes128Gcm16);
}

#[test]
fn esn_nat_traversal_mark_and_limits() {
    let sa = installed("gcm256-esn-nat-mark");
    let mark = (0x00de_ad00, u32::MAX);
    assert_eq!(
        sa.key,
        SaKey {
            mark,
            ..key("198.51.100.1", "0xc0ffee02")
        }
    );
    assert_eq!(
        sa.mark,
        Some(Mark {
            value: mark.0,
            mask: mark.1
        })
    );
    assert!(sa.esn);
    assert_eq!(sa.window_packets, 128);
    let ports = XfrmEncap {
        source_port: 4500,
        destination_port: 1024,
    };
    assert_eq!(sa.encap, Some(ports));
    let (soft, hard) = (
        Limits {
            bytes: Some(1_000_000),
            packets: Some(3000),
            seconds: Some(3000),
        },
        Limits {
            bytes: Some(2_000_000),
            packets: Some(4000),
            seconds: Some(3600),
        },
    );
    assert_eq!((sa.soft, sa.hard), (soft, hard));
    assert_aead(&sa, AeadSuite::Aes256Gcm16);
}

#[test]
fn ipv6_with_an_interface_id_and_a_large_window_without_esn() {
    let sa = installed("chacha-v6-ifid");
    assert_eq!(sa.key, key("2001:db8:b::1", "0xc0ffee03"));
    assert_eq!(sa.source.to_string(), "2001:db8:a::1");
    assert_eq!(
        (sa.if_id, sa.window_packets, sa.esn),
        (Some(42), 256, false)
    );
    assert_aead(&sa, AeadSuite::ChaCha20Poly1305);
}

#[test]
fn what_esplane_does_not_have_is_named() {
    let named = |name| match installed(name).cipher {
        XfrmCipher::Unsupported(text) => text,
        other => panic!("{other:?}"),
    };
    assert_eq!(named("cbc-hmac"), "cbc(aes)/hmac(sha256)");
    assert_eq!(
        named("gcm-icv96"),
        "rfc4106(gcm(aes)) (key 160, ICV 96 bits)"
    );
    assert_eq!(installed("gcm-icv96").mode, XfrmMode::Transport);
}

#[test]
fn a_dump_holds_them_all_and_the_reserved_spi() {
    let datagram = dump().concat();
    let parts: Vec<_> = messages(&datagram).map(Result::unwrap).collect();
    assert!(
        parts
            .iter()
            .all(|part| part.sequence == 1 && part.flags & flag::MULTI != 0)
    );
    let (done, sas) = parts.split_last().unwrap();
    assert_eq!(done.kind, kind::DONE);
    let sas: Vec<_> = sas
        .iter()
        .map(|one| parse_sa(one.body).unwrap().unwrap())
        .collect();
    assert_eq!(sas.len(), 6);
    let larval = sas.iter().find(|sa| sa.reqid == 13).unwrap();
    assert!(matches!(larval.cipher, XfrmCipher::Larval));
    assert_eq!(larval.key.spi.to_string(), "0xc0000000");
}

#[test]
fn what_goes_names_the_one_that_went() {
    let XfrmEvent::Removed(gone) = event("deleted") else {
        panic!()
    };
    assert_eq!(gone, installed("gcm256-esn-nat-mark").key);
    for (name, ended) in [("soft-expired", false), ("hard-expired", true)] {
        let XfrmEvent::Expired { key, hard } = event(name) else {
            panic!()
        };
        assert_eq!((key, hard), (installed("gcm128").key, ended));
        // What the kernel said to a request of the form that `message::expire` has.
        let answer = datagram("ack", &format!("{}e", name.strip_suffix("ed").unwrap()));
        let answer = messages(&answer).next().unwrap().unwrap();
        assert_eq!(answer.kind, kind::ERROR);
        assert_eq!(message::parse_error(answer.body).unwrap(), 0);
    }
    assert!(matches!(event("flushed"), XfrmEvent::Flushed));
}

#[test]
fn a_kernel_under_lockdown_shows_zeros_for_keys() {
    let mut datagram = datagram("event", "gcm128");
    let at = datagram
        .windows(20)
        .position(|part| part == counting(20))
        .unwrap();
    datagram[at..at + 20].fill(0);
    let one = messages(&datagram).next().unwrap().unwrap();
    let sa = parse_sa(one.body).unwrap().unwrap();
    assert!(
        matches!(sa.cipher, XfrmCipher::Concealed(AeadSuite::Aes128Gcm16)),
        "{:?}",
        sa.cipher
    );
}

#[test]
fn no_secret_is_printed() {
    for name in ["gcm128", "gcm256-esn-nat-mark", "chacha-v6-ifid"] {
        let printed = format!("{:?}", event(name));
        assert!(printed.contains("[redacted]"), "{printed}");
        assert!(
            !printed.contains("5, 6, 7") && !printed.contains("05060708"),
            "{printed}"
        );
    }
}

#[test]
fn numbers_are_stored_in_the_form_that_the_sa_has() {
    let progress = Progress {
        sent: Some(7 << 32 | 9),
        received: None,
        packets: 11,
        bytes: 1300,
    };
    let stored = |name: &str, progress: &Progress| {
        let datagram = datagram("event", name);
        let found = messages(&datagram).next().unwrap().unwrap().body.to_vec();
        let key = installed(name).key;
        message::store(5, &key, &found, progress)
    };
    let bytes = stored("gcm256-esn-nat-mark", &progress).unwrap();
    let one = messages(&bytes).next().unwrap().unwrap();
    assert_eq!(one.kind, kind::NEWAE);
    assert_eq!(one.flags, flag::REQUEST | flag::ACK | flag::REPLACE);
    let find = |wanted| super::sa::find(&one.body[size::AEVENT_ID..], wanted).unwrap();
    let replay = find(attribute::REPLAY_ESN_VAL).unwrap();
    // The bitmap is as long as the SA's, or the kernel refuses.
    assert_eq!(replay.len(), size::REPLAY_ESN + 128 / 8);
    assert_eq!(
        super::sa::ReplayEsn::read(replay).unwrap().sent,
        7 << 32 | 9
    );
    let carried = find(attribute::LTIME_VAL).unwrap();
    assert_eq!(super::wire::u64_at(carried, 0), 1300);
    assert_eq!(super::wire::u64_at(carried, 8), 11);
    assert!(
        super::wire::u64_at(carried, 16) > 1_700_000_000,
        "its age stays"
    );
    assert_eq!(
        find(attribute::MARK).unwrap()[..4],
        0x00de_ad00u32.to_ne_bytes()
    );

    // 32-bit numbers cannot hold more, in either form.
    for name in ["gcm128", "chacha-v6-ifid"] {
        let refusal = stored(name, &progress);
        assert!(matches!(refusal, Err(WireError::Value { .. })), "{name}");
        let fits = Progress {
            sent: Some(u64::from(u32::MAX)),
            ..progress
        };
        assert!(stored(name, &fits).is_ok(), "{name}");
    }
}

#[test]
fn what_is_written_reads_back() {
    for name in ["gcm128", "gcm256-esn-nat-mark", "chacha-v6-ifid"] {
        for direction in [None, Some(Direction::Inbound), Some(Direction::Outbound)] {
            let mut sa = installed(name);
            sa.direction = direction;
            sa.sequence_sent = if sa.esn { 3 << 32 | 5 } else { 5 };
            sa.sequence_received = if sa.esn { 4 << 32 | 6 } else { 6 };
            (sa.packets, sa.bytes) = (8, 9000);
            let bytes = build_sa(kind::NEWSA, 0, 0, &sa).finish();
            let read = parse_sa(&bytes[HEADER_BYTES..]).unwrap().unwrap();
            // Neither prints its key; that is compared apart.
            assert_eq!(format!("{sa:?}"), format!("{read:?}"));
            let (XfrmCipher::Aead(a), XfrmCipher::Aead(b)) = (&sa.cipher, &read.cipher) else {
                panic!("{name}");
            };
            assert!(a.same_secret(b));
        }
    }
}
