//! A VICI message: named values, lists and sections in the order in which they came.
//!
//! ```text
//!   1 SECTION_START name     3 KEY_VALUE name value     4 LIST_START name
//!   2 SECTION_END                                       5 LIST_ITEM value     6 LIST_END
//!   name: one byte of length, then text · value: two bytes of length, big-endian, then bytes
//! ```
//!
//! Parsing allocates nothing that the bytes do not hold: a length is checked against what is left
//! before anything is copied, and sections nest no deeper than [`Message::MAX_DEPTH`].

use std::{borrow::Cow, fmt};

const SECTION_START: u8 = 1;
const SECTION_END: u8 = 2;
const KEY_VALUE: u8 = 3;
const LIST_START: u8 = 4;
const LIST_ITEM: u8 = 5;
const LIST_END: u8 = 6;

/// What stands under a name.
#[derive(Clone, PartialEq, Eq)]
pub enum Value {
    /// A value; text nearly always.
    Bytes(Vec<u8>),
    /// Values without names.
    List(Vec<Vec<u8>>),
    /// A message in the message.
    Section(Message),
}

/// A message, or a section of one.
#[derive(Clone, Default, PartialEq, Eq)]
pub struct Message {
    entries: Vec<(String, Value)>,
}

/// Why bytes are no message, and where.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("VICI message, byte {offset}{}: {problem}", Within(.section))]
pub struct MessageError {
    /// Where in the message.
    pub offset: usize,
    /// The sections around it, outermost first, joined by dots.
    pub section: String,
    /// What is wrong.
    pub problem: MessageProblem,
}

/// What is wrong with a message.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum MessageProblem {
    /// An element type out of its place, or none at all.
    #[error("element {found} cannot stand here; {expected} can")]
    Element {
        /// The element's type.
        found: u8,
        /// What would be right.
        expected: &'static str,
    },
    /// A length that reaches past the end.
    #[error("{what} of {wanted} bytes, but only {left} are left")]
    Truncated {
        /// A name, a value, a length.
        what: &'static str,
        /// Its length.
        wanted: usize,
        /// What is there.
        left: usize,
    },
    /// A section or list without its end.
    #[error("the message ends within a {0}")]
    Unclosed(&'static str),
    /// A name that is not text.
    #[error("a name that is not UTF-8")]
    Name,
    /// Too many sections in sections.
    #[error("sections nested deeper than {} levels", Message::MAX_DEPTH)]
    Depth,
}

/// Why a message cannot be sent.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum EncodeError {
    /// VICI has one byte for the length of a name.
    #[error("the name `{0}` has {len} bytes; VICI carries 255", len = .0.len())]
    Name(String),
    /// VICI has two bytes for the length of a value.
    #[error("the value of `{name}` has {bytes} bytes; VICI carries 65535")]
    Value {
        /// Whose.
        name: String,
        /// How many.
        bytes: usize,
    },
    /// charon takes no larger packets.
    #[error("a packet of {0} bytes; charon takes {max}", max = super::Packet::MAX_BYTES)]
    Packet(usize),
}

impl Message {
    /// How deep sections may nest; charon uses four levels.
    pub const MAX_DEPTH: usize = 16;

    /// An empty one.
    pub fn new() -> Self {
        Self::default()
    }

    /// The same with one more value.
    #[must_use]
    pub fn with(mut self, name: &str, value: impl fmt::Display) -> Self {
        let value = Value::Bytes(value.to_string().into_bytes());
        self.entries.push((name.to_owned(), value));
        self
    }

    /// The same with one more list.
    #[must_use]
    pub fn with_list<T: fmt::Display>(
        mut self,
        name: &str,
        items: impl IntoIterator<Item = T>,
    ) -> Self {
        let items = items.into_iter().map(|item| item.to_string().into_bytes());
        let value = Value::List(items.collect());
        self.entries.push((name.to_owned(), value));
        self
    }

    /// The same with one more section.
    #[must_use]
    pub fn with_section(mut self, name: &str, section: Message) -> Self {
        self.entries
            .push((name.to_owned(), Value::Section(section)));
        self
    }

    /// Everything in order.
    pub fn entries(&self) -> impl Iterator<Item = (&str, &Value)> {
        self.entries
            .iter()
            .map(|(name, value)| (name.as_str(), value))
    }

    /// Whether nothing is in it.
    pub fn is_empty(&self) -> bool {
        self.entries.is_empty()
    }

    /// The value of this name as text, what is not UTF-8 replaced.
    pub fn text(&self, name: &str) -> Option<Cow<'_, str>> {
        self.entries().find_map(|(key, value)| match value {
            Value::Bytes(bytes) if key == name => Some(String::from_utf8_lossy(bytes)),
            _ => None,
        })
    }

    /// Whether this name says `yes`.
    pub fn yes(&self, name: &str) -> bool {
        self.text(name).is_some_and(|text| text == "yes")
    }

    /// The items of this list as text; nothing if there is none.
    pub fn list(&self, name: &str) -> impl Iterator<Item = Cow<'_, str>> {
        self.entries()
            .filter_map(move |(key, value)| match value {
                Value::List(items) if key == name => Some(items),
                _ => None,
            })
            .flatten()
            .map(|item| String::from_utf8_lossy(item))
    }

    /// The section of this name.
    pub fn section(&self, name: &str) -> Option<&Message> {
        self.sections()
            .find_map(|(key, section)| (key == name).then_some(section))
    }

    /// All sections in order.
    pub fn sections(&self) -> impl Iterator<Item = (&str, &Message)> {
        self.entries().filter_map(|(key, value)| match value {
            Value::Section(section) => Some((key, section)),
            _ => None,
        })
    }

    /// Reads one message that takes all of the bytes.
    pub fn parse(bytes: &[u8]) -> Result<Self, MessageError> {
        Parser { bytes, at: 0 }.message()
    }

    /// Appends the message as it travels.
    pub fn encode(&self, out: &mut Vec<u8>) -> Result<(), EncodeError> {
        for (name, value) in &self.entries {
            match value {
                Value::Bytes(bytes) => {
                    out.push(KEY_VALUE);
                    encode_name(name, out)?;
                    encode_value(name, bytes, out)?;
                }
                Value::List(items) => {
                    out.push(LIST_START);
                    encode_name(name, out)?;
                    for item in items {
                        out.push(LIST_ITEM);
                        encode_value(name, item, out)?;
                    }
                    out.push(LIST_END);
                }
                Value::Section(section) => {
                    out.push(SECTION_START);
                    encode_name(name, out)?;
                    section.encode(out)?;
                    out.push(SECTION_END);
                }
            }
        }
        Ok(())
    }
}

/// As `swanctl --raw` prints it.
impl fmt::Debug for Message {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_map().entries(self.entries()).finish()
    }
}

impl fmt::Debug for Value {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Bytes(bytes) => String::from_utf8_lossy(bytes).fmt(f),
            Self::List(items) => f
                .debug_list()
                .entries(items.iter().map(|item| String::from_utf8_lossy(item)))
                .finish(),
            Self::Section(section) => section.fmt(f),
        }
    }
}

/// A name as it travels, here and before a message.
pub(super) fn encode_name(name: &str, out: &mut Vec<u8>) -> Result<(), EncodeError> {
    let length = u8::try_from(name.len()).map_err(|_| EncodeError::Name(name.to_owned()))?;
    out.push(length);
    out.extend_from_slice(name.as_bytes());
    Ok(())
}

fn encode_value(name: &str, value: &[u8], out: &mut Vec<u8>) -> Result<(), EncodeError> {
    let length = u16::try_from(value.len()).map_err(|_| EncodeError::Value {
        name: name.to_owned(),
        bytes: value.len(),
    })?;
    out.extend_from_slice(&length.to_be_bytes());
    out.extend_from_slice(value);
    Ok(())
}

struct Within<'a>(&'a str);

impl fmt::Display for Within<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.0 {
            "" => Ok(()),
            section => write!(f, " in `{section}`"),
        }
    }
}

struct Parser<'a> {
    bytes: &'a [u8],
    at: usize,
}

impl Parser<'_> {
    fn message(mut self) -> Result<Message, MessageError> {
        // Around the innermost section; each with the name it will stand under.
        let mut open: Vec<(String, Message)> = Vec::new();
        let mut message = Message::new();
        let mut start = 0;
        let result = loop {
            start = match self.element(&mut open, &mut message) {
                Ok(true) => self.at,
                Ok(false) if open.is_empty() => return Ok(message),
                Ok(false) => break MessageProblem::Unclosed("section"),
                Err(problem) => break problem,
            }
        };
        // The outermost has no name; each name belongs to the section within.
        let names: Vec<&str> = open.iter().map(|(name, _)| name.as_str()).collect();
        Err(MessageError {
            offset: start,
            section: names.join("."),
            problem: result,
        })
    }

    /// Reads one element; false at the end of the bytes.
    fn element(
        &mut self,
        open: &mut Vec<(String, Message)>,
        message: &mut Message,
    ) -> Result<bool, MessageProblem> {
        let Some(&element) = self.bytes.get(self.at) else {
            return Ok(false);
        };
        self.at += 1;
        match element {
            SECTION_START => {
                let name = self.name()?;
                if open.len() == Message::MAX_DEPTH {
                    return Err(MessageProblem::Depth);
                }
                open.push((name, std::mem::take(message)));
            }
            SECTION_END if !open.is_empty() => {
                if let Some((name, around)) = open.pop() {
                    let section = std::mem::replace(message, around);
                    message.entries.push((name, Value::Section(section)));
                }
            }
            KEY_VALUE => {
                let name = self.name()?;
                let value = Value::Bytes(self.value()?);
                message.entries.push((name, value));
            }
            LIST_START => {
                let name = self.name()?;
                let items = self.items()?;
                message.entries.push((name, Value::List(items)));
            }
            found => {
                return Err(MessageProblem::Element {
                    found,
                    expected: if open.is_empty() {
                        "1 (section), 3 (value) or 4 (list)"
                    } else {
                        "1 (section), 2 (end of the section), 3 (value) or 4 (list)"
                    },
                });
            }
        }
        Ok(true)
    }

    fn items(&mut self) -> Result<Vec<Vec<u8>>, MessageProblem> {
        let mut items = Vec::new();
        loop {
            match self.bytes.get(self.at) {
                Some(&LIST_ITEM) => {
                    self.at += 1;
                    items.push(self.value()?);
                }
                Some(&LIST_END) => {
                    self.at += 1;
                    return Ok(items);
                }
                Some(&found) => {
                    return Err(MessageProblem::Element {
                        found,
                        expected: "5 (item) or 6 (end of the list)",
                    });
                }
                None => return Err(MessageProblem::Unclosed("list")),
            }
        }
    }

    fn name(&mut self) -> Result<String, MessageProblem> {
        let length = self.take("the length of a name", 1)?[0];
        let name = self.take("a name", usize::from(length))?;
        str::from_utf8(name)
            .map(str::to_owned)
            .map_err(|_| MessageProblem::Name)
    }

    fn value(&mut self) -> Result<Vec<u8>, MessageProblem> {
        let length = self.take("the length of a value", 2)?;
        let length = u16::from_be_bytes([length[0], length[1]]);
        Ok(self.take("a value", usize::from(length))?.to_vec())
    }

    fn take(&mut self, what: &'static str, wanted: usize) -> Result<&[u8], MessageProblem> {
        let left = self.bytes.len() - self.at;
        if wanted > left {
            return Err(MessageProblem::Truncated { what, wanted, left });
        }
        let start = self.at;
        self.at += wanted;
        Ok(&self.bytes[start..self.at])
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn encoded(message: &Message) -> Vec<u8> {
        let mut bytes = Vec::new();
        message.encode(&mut bytes).unwrap();
        bytes
    }

    /// The example of strongSwan's own VICI documentation, byte for byte.
    #[test]
    fn the_documented_example_is_read_and_written() {
        let message = Message::new().with("key1", "value1").with_section(
            "section1",
            Message::new()
                .with_section("sub-section", Message::new().with("key2", "value2"))
                .with_list("list1", ["item1", "item2"]),
        );
        let bytes = [
            &b"\x03\x04key1\x00\x06value1\x01\x08section1"[..],
            b"\x01\x0bsub-section\x03\x04key2\x00\x06value2\x02",
            b"\x04\x05list1\x05\x00\x05item1\x05\x00\x05item2\x06\x02",
        ]
        .concat();
        assert_eq!(encoded(&message), bytes);
        assert_eq!(Message::parse(&bytes), Ok(message.clone()));
        let section = message.section("section1").unwrap();
        assert_eq!(message.text("key1").unwrap(), "value1");
        assert_eq!(
            section.list("list1").collect::<Vec<_>>(),
            ["item1", "item2"]
        );
        let sub = section.section("sub-section").unwrap();
        assert_eq!(sub.text("key2").unwrap(), "value2");
        assert_eq!(sub.text("key1"), None);
    }

    #[test]
    fn wrong_bytes_are_refused_with_place_and_reason() {
        for (bytes, says) in [
            (
                &b"\x03\x04key1\x00\x09value1"[..],
                "byte 0: a value of 9 bytes, but only 6 are left",
            ),
            (
                b"\x01\x01a\x03\x09k",
                "byte 3 in `a`: a name of 9 bytes, but only 1 are left",
            ),
            (
                b"\x01\x01a\x01\x01b\x07",
                "byte 6 in `a.b`: element 7 cannot stand here",
            ),
            (
                b"\x02",
                "element 2 cannot stand here; 1 (section), 3 (value) or 4 (list) can",
            ),
            (b"\x05\x00\x00", "element 5 cannot stand here"),
            (b"\x04\x01l\x03", "element 3 cannot stand here; 5 (item)"),
            (
                b"\x01\x01a",
                "byte 3 in `a`: the message ends within a section",
            ),
            (b"\x04\x01l\x05\x00\x00", "the message ends within a list"),
            (b"\x03\x01\xff\x00\x00", "a name that is not UTF-8"),
            (
                b"\x03\x01k\x00",
                "the length of a value of 2 bytes, but only 1 are left",
            ),
            (&b"\x01\x00".repeat(17), "nested deeper than 16"),
        ] {
            let error = Message::parse(bytes).unwrap_err().to_string();
            assert!(error.contains(says), "{error} does not say {says}");
        }
    }

    #[test]
    fn what_vici_cannot_carry_is_not_sent() {
        let name = "n".repeat(256);
        let error = Message::new().with(&name, "").encode(&mut Vec::new());
        assert_eq!(error, Err(EncodeError::Name(name)));
        let value = "v".repeat(65536);
        let error = Message::new().with("k", value).encode(&mut Vec::new());
        assert!(
            error
                .unwrap_err()
                .to_string()
                .contains("`k` has 65536 bytes")
        );
    }
}
