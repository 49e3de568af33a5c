//! Two engines get to know each other, and refuse whom they do not.

mod common;
use common::*;

#[test]
fn the_first_packet_starts_a_handshake_and_is_delivered() {
    let mut world = World::pair(1, |_, _| {});
    let number = world.send_data(0);
    world.run_for(seconds(1));
    assert!(world.is_established());
    world.assert_keys_match();
    world.assert_delivered(&[(0, number)]);
    assert_eq!((world.count_sent(1), world.count_sent(2)), (1, 1));
}
