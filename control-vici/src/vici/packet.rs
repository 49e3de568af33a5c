//! Packets on charon's socket: a length, a type, for some types a name, for some a message.
//!
//! [`PacketReader`] takes bytes as they come and gives whole packets: it does no I/O, so that the
//! client's reads can be cancelled anywhere without losing a byte.

use super::message::{EncodeError, Message, MessageError, encode_name};

/// One packet, of either direction.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Packet {
    /// A command with its arguments.
    Request(String, Message),
    /// What became of the command.
    Response(Message),
    /// charon does not know the command.
    UnknownCommand,
    /// Asks for an event.
    Register(String),
    /// Asks for an event no longer.
    Unregister(String),
    /// charon will do so.
    Confirmed,
    /// charon does not know the event.
    UnknownEvent,
    /// Something happened.
    Event(String, Message),
}

/// Why bytes are no packets. The rest of the stream cannot be understood either.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum PacketError {
    /// Longer than charon ever sends.
    #[error("VICI packet of {0} bytes; charon sends 1 to {max}: is this charon's VICI socket?", max = Packet::MAX_BYTES)]
    Length(u32),
    /// A type that VICI does not have.
    #[error("VICI packet of type {0}; there are 0 to 7: is this charon's VICI socket?")]
    Type(u8),
    /// Ends within its name.
    #[error("VICI packet of type {0} ends within its name")]
    NameTruncated(u8),
    /// Its name is no text.
    #[error("VICI packet of type {0} with a name that is not UTF-8")]
    Name(u8),
    /// Bytes behind a packet that carries none.
    #[error("VICI packet of type {kind} carries {bytes} bytes where none belong")]
    Surplus {
        /// Its type.
        kind: u8,
        /// How many.
        bytes: usize,
    },
    /// Its message is wrong.
    #[error(transparent)]
    Message(#[from] MessageError),
}

impl Packet {
    /// charon's own limit, both ways (without the four bytes of length).
    pub const MAX_BYTES: usize = 512 * 1024;

    /// The whole packet as it travels, its length first.
    pub fn encode(&self) -> Result<Vec<u8>, EncodeError> {
        let mut out = vec![0; 4];
        let (kind, name, message) = match self {
            Self::Request(name, message) => (0, Some(name), Some(message)),
            Self::Response(message) => (1, None, Some(message)),
            Self::UnknownCommand => (2, None, None),
            Self::Register(name) => (3, Some(name), None),
            Self::Unregister(name) => (4, Some(name), None),
            Self::Confirmed => (5, None, None),
            Self::UnknownEvent => (6, None, None),
            Self::Event(name, message) => (7, Some(name), Some(message)),
        };
        out.push(kind);
        if let Some(name) = name {
            encode_name(name, &mut out)?;
        }
        if let Some(message) = message {
            message.encode(&mut out)?;
        }
        let bytes = out.len() - 4;
        if bytes > Self::MAX_BYTES {
            return Err(EncodeError::Packet(bytes));
        }
        out[..4].copy_from_slice(&(bytes as u32).to_be_bytes());
        Ok(out)
    }

    /// Reads a packet without its length.
    pub fn parse(bytes: &[u8]) -> Result<Self, PacketError> {
        let (&kind, rest) = bytes.split_first().ok_or(PacketError::Length(0))?;
        let (name, rest) = match kind {
            0 | 3 | 4 | 7 => take_name(kind, rest)?,
            _ => (String::new(), rest),
        };
        let bare = |packet| match rest.len() {
            0 => Ok(packet),
            bytes => Err(PacketError::Surplus { kind, bytes }),
        };
        match kind {
            0 => Ok(Self::Request(name, Message::parse(rest)?)),
            1 => Ok(Self::Response(Message::parse(rest)?)),
            2 => bare(Self::UnknownCommand),
            3 => bare(Self::Register(name)),
            4 => bare(Self::Unregister(name)),
            5 => bare(Self::Confirmed),
            6 => bare(Self::UnknownEvent),
            7 => Ok(Self::Event(name, Message::parse(rest)?)),
            other => Err(PacketError::Type(other)),
        }
    }
}

fn take_name(kind: u8, bytes: &[u8]) -> Result<(String, &[u8]), PacketError> {
    let (&length, rest) = bytes
        .split_first()
        .ok_or(PacketError::NameTruncated(kind))?;
    let (name, rest) = rest
        .split_at_checked(usize::from(length))
        .ok_or(PacketError::NameTruncated(kind))?;
    let name = str::from_utf8(name).map_err(|_| PacketError::Name(kind))?;
    Ok((name.to_owned(), rest))
}

/// Bytes in, packets out. Holds less than one packet and one read.
#[derive(Debug, Default)]
pub struct PacketReader {
    bytes: Vec<u8>,
    /// What of `bytes` was given out.
    taken: usize,
}

impl PacketReader {
    /// Takes bytes as they came.
    pub fn push(&mut self, bytes: &[u8]) {
        // Moved to the front once a read, not once a packet.
        self.bytes.drain(..std::mem::take(&mut self.taken));
        self.bytes.extend_from_slice(bytes);
    }

    /// The next whole packet. An error is for good: where the next packet starts is unknown.
    pub fn next_packet(&mut self) -> Result<Option<Packet>, PacketError> {
        let Some((length, rest)) = self.bytes[self.taken..].split_first_chunk::<4>() else {
            return Ok(None);
        };
        let length = u32::from_be_bytes(*length);
        if length == 0 || length as usize > Packet::MAX_BYTES {
            return Err(PacketError::Length(length));
        }
        let Some(packet) = rest.get(..length as usize) else {
            return Ok(None);
        };
        let packet = Packet::parse(packet)?;
        self.taken += 4 + length as usize;
        Ok(Some(packet))
    }

    /// Whether the bytes end within a packet.
    pub fn is_within_packet(&self) -> bool {
        self.taken < self.bytes.len()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn all_kinds() -> Vec<Packet> {
        let message = Message::new().with("up", "yes");
        vec![
            Packet::Request("version".into(), Message::new()),
            Packet::Response(message.clone()),
            Packet::UnknownCommand,
            Packet::Register("child-updown".into()),
            Packet::Unregister("child-updown".into()),
            Packet::Confirmed,
            Packet::UnknownEvent,
            Packet::Event("child-updown".into(), message),
        ]
    }

    #[test]
    fn packets_arrive_whole_however_the_bytes_are_cut() {
        let packets = all_kinds();
        let stream: Vec<u8> = packets.iter().flat_map(|p| p.encode().unwrap()).collect();
        assert_eq!(stream[..13], *b"\x00\x00\x00\x09\x00\x07version");
        for size in [1, 2, 3, 7, 64, stream.len()] {
            let mut reader = PacketReader::default();
            let mut seen = Vec::new();
            for bytes in stream.chunks(size) {
                reader.push(bytes);
                while let Some(packet) = reader.next_packet().unwrap() {
                    seen.push(packet);
                }
            }
            assert_eq!(seen, packets, "in pieces of {size}");
            assert!(!reader.is_within_packet());
        }
    }

    #[test]
    fn a_length_is_refused_before_anything_is_kept_for_it() {
        for (bytes, says) in [
            (*b"\xff\xff\xff\xff", "4294967295 bytes"),
            (*b"\x00\x08\x00\x01", "524289 bytes"),
            (*b"\x00\x00\x00\x00", "0 bytes"),
            (*b"HTTP", "is this charon's VICI socket?"),
        ] {
            let mut reader = PacketReader::default();
            reader.push(&bytes);
            let error = reader.next_packet().unwrap_err().to_string();
            assert!(error.contains(says), "{error}");
        }
    }

    #[test]
    fn wrong_packets_are_refused_by_name() {
        for (bytes, says) in [
            (&b"\x08"[..], "type 8"),
            (b"\x07", "type 7 ends within its name"),
            (b"\x07\x05ab", "type 7 ends within its name"),
            (b"\x03\x01\xff", "not UTF-8"),
            (b"\x05!", "type 5 carries 1 bytes"),
            (b"\x01\x03", "the length of a name"),
        ] {
            let error = Packet::parse(bytes).unwrap_err().to_string();
            assert!(error.contains(says), "{error}");
        }
        let large = Message::new().with_list("l", std::iter::repeat_n("x".repeat(60_000), 9));
        let error = Packet::Response(large).encode().unwrap_err();
        assert!(error.to_string().contains("charon takes 524288"), "{error}");
    }
}
