//! CHILD_SAs are replaced while numbered packets flow: in the recorded order, and in every other that can be.

mod common;
use Direction::{Inbound, Outbound};
use common::{orders::Happenings, *};
use esplane_api::Direction;
use proptest::prelude::*;
use std::time::Duration;

/// What one end's charon does when a CHILD_SA is rekeyed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Step {
    NewInbound,
    NewOutbound,
    OldOutboundGone,
    OldInboundGone,
    Told,
    /// The kernel answers.
    Answer,
}
use Step::*;

fn apply(end: &mut End, step: Step, old: &Negotiated, new: &Negotiated) {
    match step {
        NewInbound => end.add(new, Inbound),
        NewOutbound => end.add(new, Outbound),
        OldOutboundGone => end.delete(old, Outbound),
        OldInboundGone => end.delete(old, Inbound),
        Told => end.child_rekey(old, new),
        Answer => {
            end.answer_one();
        }
    }
}

/// As strongSwan 5.9.8 was seen to do it, east initiating.
const RECORDED: [(Side, Step); 10] = [
    (Side::West, NewInbound),
    (Side::West, NewOutbound),
    (Side::West, Told),
    (Side::East, NewInbound),
    (Side::East, NewOutbound),
    (Side::East, OldOutboundGone),
    (Side::East, Told),
    (Side::West, OldOutboundGone),
    (Side::West, OldInboundGone),
    (Side::East, OldInboundGone),
];

#[test]
fn a_rekey_as_recorded_loses_nothing() {
    let (old, new) = (Negotiated::new(1), Negotiated::new(2));
    let mut world = World::with(&old);
    for (side, step) in RECORDED {
        apply(world.end(side), step, &old, &new);
        world.end(side).check_oldest_sends();
        world.talk();
        assert!(world.nothing_held());
    }
    for end in [&world.west, &world.east] {
        assert_eq!(end.installed(Inbound).len(), 1);
        assert_eq!(end.installed(Outbound).len(), 1);
        assert_eq!(end.importer.children().len(), 1);
    }
}

/// Both ends' facts of one rekey. What must come before what: the kernel's facts keep their order, charon's word comes
/// whenever it comes; the initiator has the answer when the responder's inbound SA is there, and the responder hears the
/// DELETE when the initiator's is; the old inbound SAs go long after the old outbound ones.
fn rekey(initiator: Side) -> Happenings<(Side, Step)> {
    let mut all = Happenings::new();
    for side in [Side::West, Side::East] {
        let chain = [NewInbound, NewOutbound, OldOutboundGone, OldInboundGone];
        all = all
            .chain(&chain.map(|step| (side, step)))
            .chain(&[(side, Told)]);
    }
    let (ours, theirs) = (initiator, initiator.other());
    all.after((ours, NewInbound), &[(theirs, NewInbound)])
        .after((theirs, OldOutboundGone), &[(ours, NewInbound)])
        .after((ours, OldInboundGone), &[(theirs, OldOutboundGone)])
        .after((theirs, OldInboundGone), &[(ours, OldOutboundGone)])
}

#[test]
fn every_order_of_a_rekey_loses_nothing_and_stops_nothing() {
    let (old, new) = (Negotiated::new(1), Negotiated::new(2));
    for initiator in [Side::West, Side::East] {
        let orders = rekey(initiator).every_order(|order| {
            let mut world = World::with(&old);
            for (side, step) in order {
                apply(world.end(*side), *step, &old, &new);
                world.end(*side).check_oldest_sends();
                world.talk();
                assert!(world.nothing_held(), "{order:?}");
            }
            for end in [&mut world.west, &mut world.east] {
                end.later(Duration::from_secs(1));
                assert_eq!(end.installed(Inbound).len(), 1);
                assert_eq!(end.sender(), end.installed(Outbound).first().copied());
                assert_eq!(end.importer.children().len(), 1);
                assert_eq!(end.notice_texts().matches("sends with").count(), 1);
            }
        });
        assert!(orders > 1000, "{orders}");
    }
}

#[test]
fn a_slow_kernel_delays_packets_and_loses_none() {
    let (old, new) = (Negotiated::new(1), Negotiated::new(2));
    let (slow, other) = (Side::West, Side::East);
    for initiator in [slow, other] {
        let all = rekey(initiator)
            .chain(&[(slow, Answer)])
            .after((slow, Answer), &[(slow, NewOutbound)])
            // The other end's facts as they mostly come, so that there are not too many orders.
            .after((other, Told), &[(other, NewOutbound)])
            .after((other, OldOutboundGone), &[(other, Told)]);
        let mut waited = 0;
        let orders = all.every_order(|order| {
            let mut world = World::with(&old);
            world.end(slow).slow_kernel = true;
            for (side, step) in order {
                apply(world.end(*side), *step, &old, &new);
                world.talk();
                waited += world.end(slow).held.len();
            }
            assert!(world.nothing_held(), "{order:?}");
        });
        assert!(orders > 1000 && waited > 1000, "{orders} {waited}");
    }
}

#[test]
fn a_successor_that_comes_after_the_old_one_went_takes_over_what_waited() {
    // A responder that puts its outbound SA off until the old one is deleted.
    let (old, new) = (Negotiated::new(1), Negotiated::new(2));
    let mut world = World::with(&old);
    for (side, step) in [
        (Side::West, NewInbound),
        (Side::East, NewInbound),
        (Side::East, NewOutbound),
        (Side::East, OldOutboundGone),
        (Side::West, OldOutboundGone),
        (Side::West, Told),
        (Side::West, NewOutbound),
        (Side::East, Told),
    ] {
        apply(world.end(side), step, &old, &new);
        world.talk();
    }
    assert!(world.nothing_held());
}

#[test]
fn every_order_of_the_first_facts_brings_a_tunnel_up() {
    let first = Negotiated::new(1);
    for late in [Side::West, Side::East] {
        let all = Happenings::new()
            .chain(&[NewInbound, NewOutbound])
            .chain(&[Told])
            .chain(&[Answer]);
        let orders = all.every_order(|order| {
            let mut world = World::new();
            world.west.start();
            world.east.start();
            world.end(late.other()).establish(&first);
            world.end(late).slow_kernel = true;
            for step in order {
                match step {
                    Told => world.end(late).child_up(&first),
                    other => apply(world.end(late), *other, &first, &first),
                }
            }
            world.end(late).answer_one();
            world.talk();
            assert!(world.nothing_held(), "{order:?}");
        });
        assert_eq!(orders, 12);
    }
}

/// Both ends rekey at once: two successors, of which the second is redundant.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Collision {
    Inbound(u32),
    Outbound(u32),
    OutboundGone(u32),
    InboundGone(u32),
    Told(u32),
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(400))]
    #[test]
    fn both_ends_rekey_at_once(choices in proptest::collection::vec(any::<u16>(), 40), redundant in 2u32..4) {
        use Collision as C;
        let kept = 5 - redundant;
        let mut all = Happenings::new();
        for side in [Side::West, Side::East] {
            for number in [2, 3] {
                let both = [C::Inbound(number), C::Outbound(number)];
                all = all.chain(&both.map(|what| (side, what)));
            }
            all = all.chain(&[(side, C::Told(kept))]);
            for number in [1, redundant] {
                let both = [C::OutboundGone(number), C::InboundGone(number)];
                all = all.chain(&both.map(|what| (side, what)));
            }
        }
        for (side, other) in [(Side::West, Side::East), (Side::East, Side::West)] {
            for number in [1, redundant] {
                all = all
                    .after((side, C::OutboundGone(number)), &[
                        (other, C::Inbound(2)), (other, C::Inbound(3)),
                        (side, C::Outbound(2)), (side, C::Outbound(3)),
                    ])
                    .after((side, C::InboundGone(number)), &[(other, C::OutboundGone(number))]);
            }
        }
        let mut choices = choices.into_iter().cycle();
        let order = all.an_order(|of| usize::from(choices.next().unwrap()) % of);
        let children = [1, 2, 3].map(Negotiated::new);
        let child = |number: u32| &children[number as usize - 1];
        let mut world = World::with(child(1));
        for (side, what) in &order {
            let end = world.end(*side);
            match what {
                C::Inbound(number) => end.add(child(*number), Inbound),
                C::Outbound(number) => end.add(child(*number), Outbound),
                C::OutboundGone(number) => end.delete(child(*number), Outbound),
                C::InboundGone(number) => end.delete(child(*number), Inbound),
                C::Told(number) => end.child_rekey(child(1), child(*number)),
            }
            world.talk();
            prop_assert!(world.nothing_held(), "{:?}", order);
        }
        for end in [&world.west, &world.east] {
            prop_assert_eq!(end.installed(Outbound).len(), 1);
            prop_assert_eq!(end.importer.children().len(), 1);
        }
    }
}

#[test]
fn after_many_rekeys_nothing_is_left_of_the_old_ones() {
    let mut world = World::with(&Negotiated::new(1));
    for number in 1..60 {
        let (old, new) = (Negotiated::new(number), Negotiated::new(number + 1));
        for (side, step) in RECORDED {
            apply(world.end(side), step, &old, &new);
        }
        world.talk();
        world.west.later(Duration::from_secs(20));
        let children = world.west.importer.children();
        assert_eq!(children.len(), 1);
        assert!(
            children[0].unique_ids.len() <= 2,
            "{:?}",
            children[0].unique_ids
        );
    }
    // charon tells of the end of the last one only.
    let last = Negotiated::new(60);
    world.west.delete(&last, Outbound);
    world.west.delete(&last, Inbound);
    world.west.child_down(&last);
    assert!(world.west.writer.tunnels().is_empty() && world.west.importer.routes().is_empty());
}

#[test]
fn a_child_whose_end_nobody_tells_is_over_without_sas() {
    let (first, redundant) = (Negotiated::new(1), Negotiated::new(2));
    let mut world = World::with(&first);
    world.west.establish(&redundant);
    for of in [&first, &redundant] {
        world.west.delete(of, Outbound);
        world.west.delete(of, Inbound);
    }
    world.west.child_down(&first);
    assert_eq!(world.west.writer.tunnels().len(), 1, "a MOBIKE, perhaps");
    world.west.later(Duration::from_secs(11));
    assert!(world.west.writer.tunnels().is_empty() && world.west.importer.children().is_empty());
}
