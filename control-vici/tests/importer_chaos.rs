//! Facts in any order, also in orders that no charon and no kernel produces: nothing panics, the dataplane refuses nothing, no number
//! is used twice or before it is stored; and once the facts agree, the dataplane has what they say.

mod common;
use Direction::{Inbound, Outbound};
use common::*;
use esplane_api::*;
use esplane_control_vici::{vici::*, xfrm::*};
use proptest::prelude::*;
use std::time::Duration;

#[derive(Clone, Debug)]
enum Fact {
    Add(u32, Direction),
    AddElsewhere(u32, Direction, u8),
    AddUnmarked(u32, Direction),
    AddLarval(u32),
    AddAgainWithAnotherKey(u32, Direction),
    Delete(u32, Direction),
    DeleteSome(u8),
    Up(u32),
    Down(u32),
    Rekey(u32, u32),
    IkeDown(u32),
    IkeRekey(u32, u32),
    Lost,
    CharonList(u8),
    KernelList,
    Flushed,
    HardExpired(u8),
    Traps(bool),
    Milliseconds(u16),
    Second,
    SlowKernel(bool),
    BrokenKernel(bool),
    Answer,
    LoseAnswers,
    Happens(u8, u8),
    RefuseNext,
    Restart,
    Packet(u8),
}

fn fact() -> impl Strategy<Value = Fact> {
    use Fact::*;
    let number = 1u32..5;
    let direction = prop_oneof![Just(Inbound), Just(Outbound)];
    let sa = (number.clone(), direction);
    prop_oneof![
        8 => sa.clone().prop_map(|(n, d)| Add(n, d)),
        2 => (sa.clone(), 1u8..4).prop_map(|((n, d), at)| AddElsewhere(n, d, at)),
        1 => sa.clone().prop_map(|(n, d)| AddUnmarked(n, d)),
        1 => number.clone().prop_map(AddLarval),
        1 => sa.clone().prop_map(|(n, d)| AddAgainWithAnotherKey(n, d)),
        4 => sa.prop_map(|(n, d)| Delete(n, d)),
        2 => any::<u8>().prop_map(DeleteSome),
        6 => number.clone().prop_map(Up),
        2 => number.clone().prop_map(Down),
        3 => (number.clone(), number.clone()).prop_map(|(a, b)| Rekey(a, b)),
        1 => number.clone().prop_map(IkeDown),
        1 => (number.clone(), number).prop_map(|(a, b)| IkeRekey(a, b)),
        1 => Just(Lost),
        2 => any::<u8>().prop_map(CharonList),
        2 => Just(KernelList),
        1 => Just(Flushed),
        1 => any::<u8>().prop_map(HardExpired),
        1 => any::<bool>().prop_map(Traps),
        3 => any::<u16>().prop_map(Milliseconds),
        2 => Just(Second),
        1 => any::<bool>().prop_map(SlowKernel),
        1 => any::<bool>().prop_map(BrokenKernel),
        3 => Just(Answer),
        1 => Just(LoseAnswers),
        4 => (any::<u8>(), any::<u8>()).prop_map(|(what, whom)| Happens(what, whom)),
        1 => Just(RefuseNext),
        1 => Just(Restart),
        8 => any::<u8>().prop_map(Packet),
    ]
}

/// 1 and 2 follow each other, 3 has the reqid of 1 with another name, 4 is another child.
fn negotiated(number: u32) -> Negotiated {
    let one = Negotiated::new(number);
    match number {
        3 => Negotiated {
            connection: "twin",
            ike: 3,
            ..one
        },
        4 => Negotiated {
            child: "lab",
            reqid: 4,
            ike: 4,
            esn: false,
            udp: true,
            networks: (vec!["10.1.0.0/16"], vec!["10.4.0.0/16"]),
            ..one
        },
        _ => one,
    }
}

fn chosen(mask: u8) -> Vec<Negotiated> {
    (1..5)
        .filter(|number| mask & (1 << number) != 0)
        .map(negotiated)
        .collect()
}

/// An SA that is there keeps its counter, as in the kernel.
fn keep_counter(end: &End, sa: &mut XfrmSa) {
    let secret = |sa: &XfrmSa| match &sa.cipher {
        XfrmCipher::Aead(key) => Some(key.dangerous_key().to_vec()),
        _ => None,
    };
    let known = end
        .sadb
        .sas
        .get(&sa.key)
        .filter(|known| secret(known) == secret(sa));
    sa.sequence_sent = known.map_or(0, |known| known.sequence_sent);
}

fn happen(end: &mut End, fact: &Fact) {
    match fact {
        Fact::Add(number, direction) => {
            let mut sa = end.sa(&negotiated(*number), *direction);
            keep_counter(end, &mut sa);
            end.add_sa(sa);
        }
        Fact::AddElsewhere(number, direction, at) => {
            let mut sa = end.sa(&negotiated(*number), *direction);
            match direction {
                Inbound => sa.key.destination = ip(&format!("192.0.2.{}", 100 + at)),
                Outbound => sa.key.destination = ip(&format!("192.0.2.{}", 200 + at)),
            }
            // Its counter comes along, as charon copies it.
            let known = end
                .sadb
                .sas
                .values()
                .find(|known| known.key.spi == sa.key.spi);
            sa.sequence_sent = known.map_or(0, |known| known.sequence_sent);
            end.add_sa(sa);
        }
        Fact::AddUnmarked(number, direction) => {
            let mut sa = end.sa(&negotiated(*number), *direction);
            (sa.mark, sa.key.mark) = (None, (0, 0));
            end.add_sa(sa);
        }
        Fact::AddLarval(number) => {
            let mut sa = end.sa(&negotiated(*number), Inbound);
            sa.cipher = XfrmCipher::Larval;
            end.add_sa(sa);
        }
        Fact::AddAgainWithAnotherKey(number, direction) => {
            let mut sa = end.sa(&negotiated(*number), *direction);
            let seed = 0x80 + *number as u8 * 2 + *direction as u8;
            sa.cipher =
                XfrmCipher::Aead(KeyMaterial::new(AeadSuite::Aes128Gcm16, &[seed; 20]).unwrap());
            keep_counter(end, &mut sa);
            end.add_sa(sa);
        }
        Fact::Delete(number, direction) => end.delete(&negotiated(*number), *direction),
        Fact::DeleteSome(at) => {
            let keys: Vec<SaKey> = end.sadb.sas.keys().copied().collect();
            if let Some(key) = keys.get(usize::from(*at) % keys.len().max(1)) {
                end.delete_key(*key);
            }
        }
        Fact::Up(number) => end.child_up(&negotiated(*number)),
        Fact::Down(number) => end.child_down(&negotiated(*number)),
        Fact::Rekey(old, new) => end.child_rekey(&negotiated(*old), &negotiated(*new)),
        Fact::IkeDown(number) => {
            let ike = end.ike(&negotiated(*number), Vec::new());
            end.vici(ViciEvent::IkeUpDown { up: false, ike });
        }
        Fact::IkeRekey(old, new) => {
            let (old, mut new) = (
                end.ike(&negotiated(*old), Vec::new()),
                end.ike(&negotiated(*new), Vec::new()),
            );
            new.unique_id += 10;
            end.vici(ViciEvent::IkeRekey { old, new });
        }
        Fact::Lost => end.vici(ViciEvent::Lost),
        Fact::CharonList(mask) => {
            let all = chosen(*mask);
            end.charon_snapshot(&all.iter().collect::<Vec<_>>());
        }
        Fact::KernelList => end.kernel_snapshot(),
        Fact::Flushed => {
            end.sadb.sas.clear();
            end.xfrm(XfrmEvent::Flushed);
        }
        Fact::HardExpired(at) => {
            let keys: Vec<SaKey> = end.sadb.sas.keys().copied().collect();
            if let Some(key) = keys.get(usize::from(*at) % keys.len().max(1)).copied() {
                end.sadb.sas.remove(&key);
                end.xfrm(XfrmEvent::Expired { key, hard: true });
            }
        }
        Fact::Traps(on) => {
            let of = negotiated(1);
            let trap = Trap {
                ike: of.connection.into(),
                child: of.child.into(),
                mode: "TUNNEL".into(),
                local_ts: vec!["10.1.0.0/16".parse().unwrap()],
                remote_ts: vec!["10.2.0.0/16".parse().unwrap()],
            };
            end.vici(ViciEvent::Traps(on.then_some(trap).into_iter().collect()));
        }
        Fact::Milliseconds(some) => end.later(Duration::from_millis(u64::from(*some))),
        Fact::Second => end.second(),
        Fact::SlowKernel(slow) => end.slow_kernel = *slow,
        Fact::BrokenKernel(broken) => end.sadb.broken = *broken,
        Fact::Answer => {
            end.answer_one();
        }
        Fact::LoseAnswers => end.replies.clear(),
        Fact::Happens(what, whom) => {
            let tunnels = end.writer.tunnels();
            let sas = end.writer.sas();
            let Some(tunnel) = tunnels.get(usize::from(*whom) % tunnels.len().max(1)) else {
                return;
            };
            let tunnel = tunnel.id;
            let sa = sas.get(usize::from(*whom) % sas.len().max(1));
            let sa = sa.map_or(
                SaId {
                    tunnel,
                    direction: Outbound,
                    spi: Spi::new(0x777).unwrap(),
                },
                |sa| sa.id,
            );
            let unit = LifetimeUnit::Packets;
            let remote = format!("192.0.2.2:{}", 61000 + u32::from(*whom))
                .parse()
                .unwrap();
            end.event(match what % 7 {
                0 => SaEvent::SaNeeded { tunnel },
                1 => SaEvent::SoftExpired { sa, unit },
                2 => SaEvent::HardExpired { sa, unit },
                3 => SaEvent::SequenceLow { sa, next: 1 << 20 },
                4 => SaEvent::SequenceExhausted { sa },
                5 => SaEvent::FirstReceived { sa },
                _ => SaEvent::EndpointMoved { tunnel, remote },
            });
        }
        Fact::RefuseNext => end.refuse_next = 1,
        Fact::Restart => {
            // What a MOBIKE has taken out of the kernel just now, charon still lists.
            let all = chosen(u8::MAX);
            end.restart(&all.iter().collect::<Vec<_>>());
        }
        Fact::Packet(number) => {
            let destination = if number % 2 == 0 {
                [10, 2, 0, 9]
            } else {
                [10, 4, 0, 9]
            };
            end.seal(&udp([10, 1, 0, 7], destination, 53, &[*number]));
            end.held.clear();
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(1000))]
    #[test]
    fn any_facts_in_any_order(facts in proptest::collection::vec(fact(), 1..60), finally in any::<u8>()) {
        let mut end = End::new(Side::West);
        end.chaos = true;
        for fact in &facts {
            happen(&mut end, fact);
        }
        // At last all agree: these children, and the kernel has their SAs.
        (end.slow_kernel, end.sadb.broken, end.refuse_next) = (false, false, 0);
        let all = chosen(finally);
        let references: Vec<&Negotiated> = all.iter().collect();
        end.sadb.sas.clear();
        end.kernel_snapshot();
        end.vici(ViciEvent::Traps(Vec::new()));
        end.charon_snapshot(&references);
        for of in &all {
            end.add(of, Inbound);
            end.add(of, Outbound);
        }
        end.charon_snapshot(&references);
        end.later(Duration::from_secs(5));
        let mut expected: Vec<Spi> = all.iter().map(|of| end.sa(of, Inbound).key.spi).collect();
        let mut found = end.installed(Inbound);
        expected.sort();
        found.sort();
        prop_assert_eq!(found, expected);
        for of in &all {
            // Each sends, or charon has been asked for a successor that may.
            let spi = end.sa(of, Outbound).key.spi;
            let asked = end.asked.contains(&ViciRequest::RekeyChild { unique_id: of.number })
                || end.told.iter().any(|told| matches!(told, XfrmRequest::Expire { key, .. } if key.spi == spi));
            prop_assert!(end.installed(Outbound).contains(&spi) || asked, "{} is nowhere", spi);
        }
        for tunnel in end.writer.tunnels() {
            let sas = end.writer.sas();
            let mut outbound = sas.iter().filter(|sa| sa.id.tunnel == tunnel.id && sa.id.direction == Outbound);
            prop_assert!(outbound.clone().count() == 0 || outbound.any(|sa| sa.active));
        }
        // And at the very last all is gone.
        end.sadb.sas.clear();
        end.kernel_snapshot();
        end.charon_snapshot(&[]);
        end.later(Duration::from_secs(60));
        prop_assert!(end.writer.tunnels().is_empty(), "{:#?}", end.importer.children());
        prop_assert!(end.importer.routes().is_empty() && end.importer.children().is_empty());
        prop_assert_eq!(end.importer.poll_timeout(), None);
    }
}
