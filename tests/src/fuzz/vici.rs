//! charon's socket.

use esplane_control_vici::vici::{
    Facts, Names, Packet, PacketReader, charon_stats, charon_version,
};

/// Any bytes as a stream of packets: the same however they are cut, written again as they came, and facts or
/// problems in what they say.
pub fn vici_stream(data: &[u8]) {
    let whole = read(data, data.len().max(1));
    assert_eq!(whole, read(data, 5), "the cut decides what is read");
    let (packets, _) = whole;
    let written: Vec<u8> = packets
        .iter()
        .flat_map(|packet| packet.encode().expect("what was read"))
        .collect();
    assert!(
        data.starts_with(&written),
        "a packet is written otherwise than it came"
    );
    let names = Names::from_files("skip 57\n", "http 80/tcp\n");
    for packet in packets {
        let (Packet::Event(_, message) | Packet::Response(message) | Packet::Request(_, message)) =
            packet
        else {
            continue;
        };
        for event in esplane_control_vici::vici::EVENTS {
            let mut facts = Facts::new(&names);
            if facts.event(event, &message).is_none() {
                assert!(
                    !facts.problems.is_empty(),
                    "an event that tells nothing says why"
                );
            }
        }
        let mut facts = Facts::new(&names);
        for child in facts.list_sa(&message).iter().flat_map(|sa| &sa.children) {
            // Nothing is lost, and pairs are of one family.
            assert!(child.selectors().len() <= child.local_ts.len() * child.remote_ts.len());
        }
        facts.list_conn(&message);
        facts.list_policy(&message);
        charon_version(&message);
        charon_stats(&message);
    }
}

/// The packets up to the first error, and whether there was one.
fn read(data: &[u8], cut: usize) -> (Vec<Packet>, bool) {
    let mut reader = PacketReader::default();
    let mut packets = Vec::new();
    for piece in data.chunks(cut) {
        reader.push(piece);
        loop {
            match reader.next_packet() {
                Ok(Some(packet)) => packets.push(packet),
                Ok(None) => break,
                Err(_) => return (packets, true),
            }
        }
    }
    (packets, false)
}

/// What charon 5.9.8 sent, a packet each.
pub(super) fn seeds() -> Vec<Vec<u8>> {
    let recorded = [
        &include_bytes!("../../../control-vici/src/vici/recorded/charon-5.9.8-events.bin")[..],
        include_bytes!("../../../control-vici/src/vici/recorded/charon-5.9.8-commands.bin"),
        include_bytes!("../../../control-vici/src/vici/recorded/charon-5.9.8-controls.bin"),
    ];
    let (packets, broken) = read(&recorded.concat(), 1 << 20);
    assert!(!broken);
    let mut seeds: Vec<Vec<u8>> = packets
        .iter()
        .map(|packet| packet.encode().expect("recorded"))
        .collect();
    seeds.dedup();
    seeds
}
