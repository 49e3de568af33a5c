//! From VICI's messages to the words of `model.rs`.
//!
//! Made for every charon from 5.9.8 on: keys that are not known are passed over, keys that an older one does not send
//! have a plain meaning, and what cannot be read is told apart from the rest: a child with a wrong SPI is left out and
//! named in [`Facts::problems`], its siblings are kept.

use super::{
    CharonStats, CharonVersion, ChildSa, ChildState, Connection, ConnectionChild, IkeSa, Mark,
    Message, Names, SelectorTextError, Trap, ViciEvent,
};
use esplane_api::{Spi, TrafficSelector};
use std::{
    net::{IpAddr, SocketAddr},
    str::FromStr,
    time::Duration,
};

/// charon's names of the events that [`Facts::event`] understands.
pub const EVENTS: [&str; 5] = [
    "ike-updown",
    "ike-rekey",
    "ike-update",
    "child-updown",
    "child-rekey",
];

/// Reads messages, and collects what could not be read.
#[derive(Debug)]
pub struct Facts<'a> {
    names: &'a Names,
    /// What could not be read since it was made.
    pub problems: Vec<FactError>,
}

/// What in a message of charon's could not be read.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("charon's `{message}`, `{at}`: {problem}")]
pub struct FactError {
    /// The event or command that brought it.
    pub message: String,
    /// Sections and key.
    pub at: String,
    /// What is wrong.
    pub problem: FactProblem,
}

/// What is wrong with a fact.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum FactProblem {
    /// Not there.
    #[error("is missing; charon 5.9.8 and later sends it")]
    Missing,
    /// Not what it should be.
    #[error("is `{text}`, not {expected}")]
    Not {
        /// As it came.
        text: String,
        /// What would be right.
        expected: &'static str,
    },
    /// A selector that Esplane does not have.
    #[error("{0}")]
    Selector(SelectorTextError),
}

impl<'a> Facts<'a> {
    /// Nothing read yet.
    pub fn new(names: &'a Names) -> Self {
        Self {
            names,
            problems: Vec::new(),
        }
    }

    /// One of [`EVENTS`]; `None` for another, or where its IKE_SA cannot be read.
    pub fn event(&mut self, event: &str, message: &Message) -> Option<ViciEvent> {
        let up = message.yes("up");
        let top = Section::top(event, message);
        let section = self.first(&top)?;
        Some(match event {
            "ike-updown" => ViciEvent::IkeUpDown {
                up,
                ike: self.ike_sa(&section)?,
            },
            "child-updown" => ViciEvent::ChildUpDown {
                up,
                ike: self.ike_sa(&section)?,
            },
            "ike-rekey" => {
                let [old, new] = self.old_and_new(&section)?;
                ViciEvent::IkeRekey {
                    old: self.ike_sa(&old)?,
                    new: self.ike_sa(&new)?,
                }
            }
            "ike-update" => {
                // The section still has the old ends; the new ones stand above it.
                let mut ike = self.ike_sa(&section)?;
                ike.local = self
                    .endpoint(&top, "local-host", "local-port")
                    .or(ike.local);
                ike.remote = self
                    .endpoint(&top, "remote-host", "remote-port")
                    .or(ike.remote);
                ViciEvent::IkeUpdate(ike)
            }
            "child-rekey" => {
                let children = self.within(&section, "child-sas")?;
                let child = self.first(&children)?;
                let [old, new] = self.old_and_new(&child)?;
                ViciEvent::ChildRekey {
                    ike: self.ike_sa_alone(&section)?,
                    old: self.child_sa(&old)?,
                    new: self.child_sa(&new)?,
                }
            }
            _ => return None,
        })
    }

    /// One IKE_SA of the dump `list-sas`.
    pub fn list_sa(&mut self, message: &Message) -> Option<IkeSa> {
        let section = self.first(&Section::top("list-sa", message))?;
        self.ike_sa(&section)
    }

    /// One connection of the dump `list-conns`.
    pub fn list_conn(&mut self, message: &Message) -> Option<Connection> {
        let section = self.first(&Section::top("list-conn", message))?;
        let children = section.message.section("children");
        Some(Connection {
            name: section.name.to_owned(),
            version: section.text("version"),
            local_addrs: section.texts("local_addrs"),
            remote_addrs: section.texts("remote_addrs"),
            children: children
                .into_iter()
                .flat_map(Message::sections)
                .map(|(name, child)| self.loaded_child(&section.under(name, child)))
                .collect(),
        })
    }

    /// One trap of the dump `list-policies`.
    pub fn list_policy(&mut self, message: &Message) -> Option<Trap> {
        let section = self.first(&Section::top("list-policy", message))?;
        let mut unsupported = Vec::new();
        let trap = Trap {
            ike: section.text("ike"),
            child: section.text("child"),
            mode: section.text("mode"),
            local_ts: self.selectors(&section, "local-ts", &mut unsupported),
            remote_ts: self.selectors(&section, "remote-ts", &mut unsupported),
        };
        for error in unsupported {
            self.problem::<()>(
                &section,
                "local-ts, remote-ts",
                FactProblem::Selector(error),
            );
        }
        Some(trap)
    }

    fn ike_sa(&mut self, section: &Section<'_>) -> Option<IkeSa> {
        let mut ike = self.ike_sa_alone(section)?;
        let Some(children) = section.message.section("child-sas") else {
            return Some(ike);
        };
        let children = section.under("child-sas", children);
        ike.children = children
            .message
            .sections()
            .filter_map(|(name, child)| self.child_sa(&children.under(name, child)))
            .collect();
        Some(ike)
    }

    fn ike_sa_alone(&mut self, section: &Section<'_>) -> Option<IkeSa> {
        Some(IkeSa {
            name: section.name.to_owned(),
            unique_id: self.required(section, "uniqueid", "a number", parse)?,
            state: section.text("state"),
            local: self.endpoint(section, "local-host", "local-port"),
            remote: self.endpoint(section, "remote-host", "remote-port"),
            local_id: section.text("local-id"),
            remote_id: section.text("remote-id"),
            nat_local: section.message.yes("nat-local"),
            nat_remote: section.message.yes("nat-remote"),
            children: Vec::new(),
        })
    }

    fn child_sa(&mut self, section: &Section<'_>) -> Option<ChildSa> {
        let mut unsupported_ts = Vec::new();
        let local_ts = self.selectors(section, "local-ts", &mut unsupported_ts);
        let remote_ts = self.selectors(section, "remote-ts", &mut unsupported_ts);
        let problems = self.problems.len();
        let child = ChildSa {
            // The section may be called `net-5`, the child is `net`.
            name: match section.message.text("name") {
                Some(name) => name.into_owned(),
                None => section.name.to_owned(),
            },
            unique_id: self.required(section, "uniqueid", "a number", parse)?,
            reqid: self.required(section, "reqid", "a number", parse)?,
            state: child_state(&section.text("state")),
            mode: section.text("mode"),
            protocol: section.text("protocol"),
            udp_encap: section.message.yes("encap"),
            spi_in: self.optional(section, "spi-in", "an SPI in hexadecimal", spi),
            spi_out: self.optional(section, "spi-out", "an SPI in hexadecimal", spi),
            mark_in: self.mark(section, "mark-in", "mark-mask-in"),
            mark_out: self.mark(section, "mark-out", "mark-mask-out"),
            if_ids: (
                self.optional(section, "if-id-in", HEX, hex),
                self.optional(section, "if-id-out", HEX, hex),
            ),
            algorithm: algorithm(section.message),
            esn: section.message.text("esn").is_some_and(|esn| esn == "1"),
            local_ts,
            remote_ts,
            unsupported_ts,
            rekey_in: self.optional(section, "rekey-time", SECONDS, seconds),
            expires_in: self.optional(section, "life-time", SECONDS, seconds),
        };
        // Half a child would be taken for a whole one.
        (self.problems.len() == problems).then_some(child)
    }

    fn loaded_child(&mut self, section: &Section<'_>) -> ConnectionChild {
        let rekey_time = self.optional(section, "rekey_time", SECONDS, seconds);
        ConnectionChild {
            name: section.name.to_owned(),
            mode: section.text("mode"),
            local_ts: section.texts("local-ts"),
            remote_ts: section.texts("remote-ts"),
            // charon says 0 for never.
            rekey_time: rekey_time.filter(|time| !time.is_zero()),
        }
    }

    fn selectors(
        &mut self,
        section: &Section<'_>,
        key: &str,
        unsupported: &mut Vec<SelectorTextError>,
    ) -> Vec<TrafficSelector> {
        let mut selectors = Vec::new();
        for text in section.message.list(key) {
            match self.names.selector(&text) {
                Ok(selector) => selectors.push(selector),
                Err(error) => unsupported.push(error),
            }
        }
        selectors
    }

    /// `None` also for `%any`: an end not yet known.
    fn endpoint(&mut self, section: &Section<'_>, host: &str, port: &str) -> Option<SocketAddr> {
        if section.message.text(host)?.starts_with('%') {
            return None;
        }
        let address: IpAddr = self.optional(section, host, "an address", parse)?;
        let port = self.optional(section, port, "a port", parse);
        Some(SocketAddr::new(address, port.unwrap_or(500)))
    }

    fn mark(&mut self, section: &Section<'_>, value: &str, mask: &str) -> Option<Mark> {
        let value = self.optional(section, value, HEX, hex)?;
        // charon leaves a full mask out.
        let mask = self.optional(section, mask, HEX, hex).unwrap_or(u32::MAX);
        Some(Mark { value, mask })
    }

    fn old_and_new<'m>(&mut self, section: &Section<'m>) -> Option<[Section<'m>; 2]> {
        let mut part = |key| {
            let part = self.within(section, key)?;
            let name = section.name;
            Some(Section { name, ..part })
        };
        Some([part("old")?, part("new")?])
    }

    fn first<'m>(&mut self, section: &Section<'m>) -> Option<Section<'m>> {
        match section.message.sections().next() {
            Some((name, message)) => Some(section.under(name, message)),
            None => self.problem(section, "a section", FactProblem::Missing),
        }
    }

    fn within<'m>(&mut self, section: &Section<'m>, key: &'m str) -> Option<Section<'m>> {
        match section.message.section(key) {
            Some(message) => Some(section.under(key, message)),
            None => self.problem(section, key, FactProblem::Missing),
        }
    }

    fn required<T>(
        &mut self,
        section: &Section<'_>,
        key: &str,
        expected: &'static str,
        read: fn(&str) -> Option<T>,
    ) -> Option<T> {
        match section.message.text(key) {
            Some(_) => self.optional(section, key, expected, read),
            None => self.problem(section, key, FactProblem::Missing),
        }
    }

    fn optional<T>(
        &mut self,
        section: &Section<'_>,
        key: &str,
        expected: &'static str,
        read: fn(&str) -> Option<T>,
    ) -> Option<T> {
        let text = section.message.text(key)?;
        read(&text).or_else(|| {
            let text = text.into_owned();
            self.problem(section, key, FactProblem::Not { text, expected })
        })
    }

    /// Writes it down; `None`, so that a reader can end with it.
    fn problem<T>(&mut self, section: &Section<'_>, key: &str, problem: FactProblem) -> Option<T> {
        self.problems.push(FactError {
            message: section.event.to_owned(),
            at: format!("{}{key}", section.path),
            problem,
        });
        None
    }
}

/// Where in which message.
#[derive(Clone)]
struct Section<'m> {
    event: &'m str,
    /// The names around and of it, each with a dot behind.
    path: String,
    name: &'m str,
    message: &'m Message,
}

impl<'m> Section<'m> {
    fn top(event: &'m str, message: &'m Message) -> Self {
        let (path, name) = (String::new(), "");
        Self {
            event,
            path,
            name,
            message,
        }
    }

    fn under(&self, name: &'m str, message: &'m Message) -> Self {
        Self {
            event: self.event,
            path: format!("{}{name}.", self.path),
            name,
            message,
        }
    }

    fn text(&self, key: &str) -> String {
        self.message.text(key).unwrap_or_default().into_owned()
    }

    fn texts(&self, key: &str) -> Vec<String> {
        self.message.list(key).map(Into::into).collect()
    }
}

const HEX: &str = "a number in hexadecimal";
const SECONDS: &str = "a number of seconds";

fn parse<T: FromStr>(text: &str) -> Option<T> {
    text.parse().ok()
}

fn hex(text: &str) -> Option<u32> {
    u32::from_str_radix(text, 16).ok()
}

fn spi(text: &str) -> Option<Spi> {
    Spi::new(hex(text)?).ok()
}

/// What is overdue is due now.
fn seconds(text: &str) -> Option<Duration> {
    let seconds: i64 = text.parse().ok()?;
    Some(Duration::from_secs(seconds.max(0).unsigned_abs()))
}

fn child_state(text: &str) -> ChildState {
    match text {
        "CREATED" | "ROUTED" | "INSTALLING" => ChildState::Coming,
        "INSTALLED" | "UPDATING" => ChildState::Installed,
        "REKEYING" | "REKEYED" => ChildState::Replaced,
        _ => ChildState::Leaving,
    }
}

/// `AES_CBC-128/HMAC_SHA2_256_128`, as `swanctl --list-sas` joins them.
fn algorithm(message: &Message) -> String {
    let part = |name, bits| {
        let name = message.text(name)?;
        Some(match message.text(bits) {
            Some(bits) => format!("{name}-{bits}"),
            None => name.into_owned(),
        })
    };
    let parts = [
        part("encr-alg", "encr-keysize"),
        part("integ-alg", "integ-keysize"),
    ];
    parts.into_iter().flatten().collect::<Vec<_>>().join("/")
}

/// The answer to `version`.
pub fn charon_version(message: &Message) -> CharonVersion {
    let text = |key| message.text(key).unwrap_or_default().into_owned();
    CharonVersion {
        daemon: text("daemon"),
        version: text("version"),
        release: text("release"),
    }
}

/// The answer to `stats`.
pub fn charon_stats(message: &Message) -> CharonStats {
    let within = |section: &str, key: &str| {
        let section = message.section(section)?;
        Some(section.text(key)?.into_owned())
    };
    let number = |key| within("ikesas", key).and_then(|text| text.parse().ok());
    CharonStats {
        running: within("uptime", "running").unwrap_or_default(),
        ike_sas: number("total").unwrap_or(0),
        half_open: number("half-open").unwrap_or(0),
        plugins: message.list("plugins").map(Into::into).collect(),
    }
}
