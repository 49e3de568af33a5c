use super::*;

#[test]
fn packets_lie_in_their_frames_with_room_on_both_sides() {
    let mut batch = Batch::new(2, 2048);
    assert!(batch.push(&[1, 2, 3], Outer::NONE) && batch.push(&[4], Outer::NONE));
    assert!(batch.is_full() && !batch.push(&[5], Outer::NONE));
    assert_eq!((batch.data(0), batch.data(1)), (&[1, 2, 3][..], &[4][..]));
    let packet = batch.packets()[1];
    assert_eq!(
        (packet.headroom(), packet.tailroom()),
        (128, 2048 - 128 - 1)
    );
}

#[test]
fn a_packet_that_does_not_fit_is_refused() {
    let mut batch = Batch::new(1, 256);
    assert!(!batch.push(&[0; 256 - 128 - 64 + 1], Outer::NONE));
    assert!(batch.push(&[0; 256 - 128 - 64], Outer::NONE));
}

#[test]
fn edges_move_only_within_the_frame() {
    let mut batch = Batch::new(1, 256);
    assert!(batch.push(&[7; 10], Outer::NONE));
    let packet = &mut batch.packets_mut()[0];
    assert!(packet.grow(128, 0) && !packet.grow(1, 0));
    assert!(packet.grow(-128, -10) && packet.data_bytes() == 0 && !packet.grow(-1, 0));
}

#[test]
fn each_packet_keeps_its_outer_side_whatever_happens_to_its_neighbours() {
    let outer = |port, tos| Outer {
        remote: ([192, 0, 2, 1], port).into(),
        tos,
        ..Outer::NONE
    };
    let mut expected = [
        outer(1, 0),
        outer(1, 3),
        outer(2, 0),
        outer(1, 0),
        outer(1, 0),
    ];
    let mut batch = Batch::new(5, 256);
    for outer in expected {
        assert!(batch.push(&[0], outer));
    }
    for (number, index) in (2..).zip([0, 3, 1, 4, 2, 0]) {
        for changed in [outer(number, 1), outer(1, 0)] {
            batch.set_outer(index, changed);
            expected[index] = changed;
            let got: Vec<_> = batch.packets().iter().map(|p| batch.outer_of(p)).collect();
            assert_eq!(got, expected);
        }
    }
    let [first, second, ..] = batch.packets() else {
        panic!("five were put in")
    };
    assert!(batch.same_outer(first, second));
}

#[test]
fn placed_packets_and_frames_follow_each_other() {
    let mut batch = Batch::with_arena(4, 256, 1100);
    batch.spare_room()[..4].copy_from_slice(&[1, 2, 3, 4]);
    batch.push_placed(0..2, 0..2, Outer::NONE);
    batch.push_placed(2..6, 2..4, Outer::NONE);
    assert!(batch.push(&[5], Outer::NONE));
    let used = 6 + 256;
    assert_eq!(
        (batch.used_bytes(), batch.spare_room().len()),
        (used, 1100 - used)
    );
    batch.push_placed(800..900, 850..850, Outer::NONE);
    let data: Vec<_> = (0..4).map(|index| batch.data(index)).collect();
    assert_eq!(data, [&[1, 2][..], &[3, 4], &[5], &[]]);
    batch.clear();
    assert!(batch.used_bytes() == 0 && batch.spare_frames().count() == 4);
}

#[test]
fn an_arena_without_a_frame_left_is_full() {
    let mut batch = Batch::new(4, 256);
    batch.push_placed(0..769, 0..769, Outer::NONE);
    assert!(batch.is_full() && !batch.push(&[1], Outer::NONE));
}

#[test]
#[should_panic(expected = "spare room")]
fn frames_do_not_overlap() {
    let mut batch = Batch::new(2, 256);
    assert!(batch.push(&[1], Outer::NONE));
    batch.push_placed(255..300, 256..300, Outer::NONE);
}

#[test]
fn spare_frames_are_taken_in_order() {
    let mut batch = Batch::new(3, 256);
    assert!(batch.push(&[1], Outer::NONE));
    for (value, frame) in (8..).zip(batch.spare_frames()) {
        frame[0] = value;
    }
    batch.push_received(1, Outer::NONE);
    batch.push_received(1, Outer::NONE);
    assert_eq!(
        (batch.data(0), batch.data(1), batch.data(2)),
        (&[1][..], &[8][..], &[9][..])
    );
}
