use super::*;
use proptest::{
    collection::{btree_set, vec},
    prelude::*,
};

fn spi() -> impl Strategy<Value = Spi> {
    (Spi::MIN..).prop_map(|number| Spi::new(number).unwrap())
}

fn kem() -> impl Strategy<Value = KemPolicy> {
    prop_oneof![
        Just(KemPolicy::Off),
        Just(KemPolicy::MlKem512),
        Just(KemPolicy::MlKem768)
    ]
}

fn suites() -> impl Strategy<Value = Vec<AeadSuite>> {
    proptest::sample::subsequence(AeadSuite::ALL.to_vec(), 1..=3).prop_shuffle()
}

fn spis() -> impl Strategy<Value = Spis> {
    btree_set(spi(), 1..=MOST_SAS).prop_map(|all| {
        let mut all = all.into_iter();
        let first = all.next().expect("at least one");
        Spis {
            first,
            more: all.collect(),
        }
    })
}

fn offer() -> impl Strategy<Value = Offer> {
    let timestamp =
        (any::<u64>(), 0..1_000_000_000u32).prop_map(|(seconds, nanoseconds)| Timestamp {
            seconds,
            nanoseconds,
        });
    let esn = prop_oneof![Just(Esn::On), Just(Esn::Off)];
    (
        timestamp,
        spis(),
        suites(),
        esn,
        any::<Option<u32>>(),
        kem(),
        vec(any::<u8>(), 0..1200),
    )
        .prop_map(
            |(timestamp, spis, suites, esn, window_packets, kem, kem_key)| Offer {
                timestamp,
                spis,
                suites,
                esn,
                window_packets,
                kem,
                kem_key,
            },
        )
}

fn answer() -> impl Strategy<Value = Answer> {
    let accepted = (
        spis(),
        suites(),
        any::<Option<u32>>(),
        vec(any::<u8>(), 0..1100),
    )
        .prop_map(
            |(spis, suites, window_packets, kem_ciphertext)| Answer::Accepted {
                spis,
                suite: suites[0],
                window_packets,
                kem_ciphertext,
            },
        );
    let refused = prop_oneof![
        Just(Disagreement::Suites),
        Just(Disagreement::Esn),
        Just(Disagreement::Kem),
        Just(Disagreement::Unknown)
    ];
    prop_oneof![accepted, refused.prop_map(Answer::Refused)]
}

/// Nearly right messages: magic, version and length as they should be, so that the rest is reached.
fn nearly_a_message() -> impl Strategy<Value = Vec<u8>> {
    (any::<u8>(), vec(any::<u8>(), HEADER_BYTES..300)).prop_map(|(kind, mut bytes)| {
        let length = bytes.len() - HEADER_BYTES;
        bytes[..HEADER_BYTES].copy_from_slice(&header(kind % 6, 7, length));
        bytes
    })
}

proptest! {
    #[test]
    fn no_bytes_make_the_parsers_panic(bytes in vec(any::<u8>(), 0..2000)) {
        let _ = Message::parse(&bytes);
        let _ = Offer::parse(&bytes);
        let _ = Answer::parse(&bytes);
    }

    #[test]
    fn what_parses_lies_within_the_datagram_and_covers_it(bytes in nearly_a_message()) {
        match Message::parse(&bytes) {
            Ok(Message::Initiation(message)) => {
                prop_assert_eq!([message.under_mac2, message.mac2].concat(), bytes.clone());
                prop_assert_eq!([message.under_mac1, message.mac1, message.mac2].concat(), bytes.clone());
                prop_assert_eq!([message.header, message.noise].concat(), message.under_mac1);
            }
            Ok(Message::Response(message)) => {
                prop_assert_eq!([message.under_mac1, message.mac1].concat(), bytes.clone());
                prop_assert_eq!(message.noise, &message.under_mac1[HEADER_BYTES..]);
            }
            Ok(Message::CookieReply(reply)) => {
                prop_assert_eq!(cookie_reply(reply.index, reply.nonce, reply.sealed), bytes.clone());
            }
            Err(reason) => prop_assert_eq!(reason, DropReason::HandshakeMalformed),
        }
    }

    #[test]
    fn offers_come_back_as_they_went(offer in offer()) {
        prop_assert_eq!(Offer::parse(&offer.encode()), Ok(offer));
    }

    #[test]
    fn answers_come_back_as_they_went(answer in answer()) {
        prop_assert_eq!(Answer::parse(&answer.encode()), Ok(answer));
    }

    #[test]
    fn every_truncation_is_malformed(offer in offer(), answer in answer(), cut in any::<prop::sample::Index>()) {
        let bytes = offer.encode();
        prop_assert!(Offer::parse(&bytes[..cut.index(bytes.len())]).is_err());
        let bytes = answer.encode();
        prop_assert!(Answer::parse(&bytes[..cut.index(bytes.len())]).is_err());
    }

    #[test]
    fn unknown_fields_are_skipped_unless_critical(offer in offer(), kind in 9..128u8, value in vec(any::<u8>(), 0..50)) {
        let mut bytes = Vec::new();
        put(&mut bytes, kind, &value);
        bytes.extend(offer.encode());
        prop_assert_eq!(Offer::parse(&bytes), Ok(offer));
        bytes[0] |= CRITICAL;
        prop_assert_eq!(Offer::parse(&bytes), Err(PayloadError::Unknown));
    }

    #[test]
    fn timestamps_grow_whatever_the_clock_does(clock in vec((0..4u64, 0..3u32), 1..50)) {
        let mut last = None;
        for (seconds, nanoseconds) in clock {
            let next = Timestamp::after(last, Duration::new(seconds, nanoseconds));
            prop_assert!(last.is_none_or(|last| last < next));
            last = Some(next);
        }
    }
}

fn example() -> Offer {
    Offer {
        timestamp: Timestamp {
            seconds: 1,
            nanoseconds: 2,
        },
        spis: Spis {
            first: Spi::new(0x0102_0304).unwrap(),
            more: vec![Spi::new(0x0506_0708).unwrap()],
        },
        suites: vec![AeadSuite::ChaCha20Poly1305, AeadSuite::Aes128Gcm16],
        esn: Esn::On,
        window_packets: Some(4096),
        kem: KemPolicy::MlKem512,
        kem_key: vec![0xaa, 0xbb],
    }
}

/// Pins the encoding that the documentation shows.
#[test]
fn an_offer_byte_by_byte() {
    let mut expected = vec![0x81, 0, 12, 0, 0, 0, 0, 0, 0, 0, 1, 0, 0, 0, 2];
    expected.extend([0x82, 0, 4, 1, 2, 3, 4]);
    expected.extend([0x08, 0, 4, 5, 6, 7, 8]);
    expected.extend([0x83, 0, 2, 3, 1]);
    expected.extend([0x84, 0, 1, 1]);
    expected.extend([0x07, 0, 4, 0, 0, 16, 0]);
    expected.extend([0x85, 0, 3, 1, 0xaa, 0xbb]);
    assert_eq!(example().encode(), expected);
}

#[test]
fn doubled_missing_and_impossible_fields_are_malformed() {
    let good = example().encode();
    let mut doubled = good.clone();
    doubled.extend([0x84, 0, 1, 1]);
    assert_eq!(Offer::parse(&doubled), Err(PayloadError::Malformed));
    assert_eq!(
        Offer::parse(&good[15..]),
        Err(PayloadError::Malformed),
        "no timestamp"
    );
    // Position, what stands there instead: a reserved SPI, one SPI twice, no width, nanoseconds past the second.
    for (range, bytes) in [
        (18..22, &[0, 0, 0, 255][..]),
        (25..29, &[1, 2, 3, 4]),
        (37..38, &[2]),
        (11..15, &[0xff; 4]),
    ] {
        let mut wrong = good.clone();
        wrong[range].copy_from_slice(bytes);
        assert_eq!(
            Offer::parse(&wrong),
            Err(PayloadError::Malformed),
            "{bytes:?}"
        );
    }
}

#[test]
fn suites_of_the_future_are_not_chosen_and_kems_of_the_future_are_refused() {
    let mut bytes = example().encode();
    bytes[32] = 200;
    assert_eq!(
        Offer::parse(&bytes).unwrap().suites,
        [AeadSuite::Aes128Gcm16]
    );
    let kem = bytes.len() - 3;
    bytes[kem] = 9;
    assert_eq!(Offer::parse(&bytes), Err(PayloadError::Unknown));
}

#[test]
fn ike_finds_no_version_of_its_own_in_our_messages() {
    // RFC 7296 §3.1: next payload and version are bytes 16 and 17 behind the marker, the length 24 to 27.
    let header = initiation_header(u32::MAX, 1000);
    assert_eq!(header[16..18], [0, 0]);
}
