//! Selectors in the form in which packets are held against them: numbers of one family, ranges as first and width.

use super::{Decision, fib::Address};
use crate::{
    aead::prefetch_lines,
    wire::{Flow, KeyV4, KeyV6},
};
use esplane_api::{SelectorPair, TrafficSelector};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

/// Stands for the port of a packet that shows none; only selectors for any port hold it.
const NO_PORT: u32 = 1 << 16;
/// Stands for any protocol.
const ANY_PROTOCOL: u16 = 256;

/// What selectors want to know of a packet, seen from its sender.
#[derive(Clone, Copy)]
pub(crate) struct Ends<A> {
    pub source: A,
    pub destination: A,
    protocol: u8,
    source_port: u32,
    destination_port: u32,
}

/// [`Ends`] of either family.
#[derive(Clone, Copy)]
pub(crate) enum AnyEnds {
    V4(Ends<u32>),
    V6(Ends<u128>),
}

impl AnyEnds {
    /// Of a packet taken apart; `None` if it mixes families, which no packet does.
    pub fn of_flow(flow: &Flow) -> Option<Self> {
        let (source_port, destination_port) = flow.ports.unzip();
        let port = |port: Option<u16>| port.map_or(NO_PORT, u32::from);
        let (source_port, destination_port) = (port(source_port), port(destination_port));
        let protocol = flow.protocol;
        match (flow.source, flow.destination) {
            (IpAddr::V4(source), IpAddr::V4(destination)) => Some(Self::V4(Ends {
                source: source.to_bits(),
                destination: destination.to_bits(),
                protocol,
                source_port,
                destination_port,
            })),
            (IpAddr::V6(source), IpAddr::V6(destination)) => Some(Self::V6(Ends {
                source: source.to_bits(),
                destination: destination.to_bits(),
                protocol,
                source_port,
                destination_port,
            })),
            _ => None,
        }
    }

    /// Where the packet goes.
    pub fn destination(&self) -> IpAddr {
        match self {
            Self::V4(ends) => Ipv4Addr::from_bits(ends.destination).into(),
            Self::V6(ends) => Ipv6Addr::from_bits(ends.destination).into(),
        }
    }

    /// Of a plain packet, which shows its ports.
    #[inline]
    pub fn of_v4(key: &KeyV4) -> Self {
        Self::V4(Ends::shown(key.ends(), key.above()))
    }

    /// The same for IPv6.
    #[inline]
    pub fn of_v6(key: &KeyV6) -> Self {
        Self::V6(Ends::shown(key.ends(), key.above()))
    }
}

impl<A> Ends<A> {
    #[inline]
    fn shown(
        (source, destination): (A, A),
        (protocol, source_port, destination_port): (u8, u16, u16),
    ) -> Self {
        Self {
            source,
            destination,
            protocol,
            source_port: source_port.into(),
            destination_port: destination_port.into(),
        }
    }
}

/// A pair of selectors of one family.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Packed<A> {
    local: Range<A>,
    remote: Range<A>,
    local_ports: Range<u32>,
    remote_ports: Range<u32>,
    local_protocol: u16,
    remote_protocol: u16,
}

/// From `first` on, `width` more.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Range<A> {
    first: A,
    width: A,
}

impl<A: Address> Range<A> {
    fn new(first: A, last: A) -> Self {
        Self {
            first,
            width: last.minus(first),
        }
    }

    #[inline]
    fn holds(self, number: A) -> bool {
        number.minus(self.first) <= self.width
    }
}

impl<A: Address> Packed<A> {
    /// `convert` takes an address as a number, if it is of this family. `None` if one of them is not.
    fn new(pair: &SelectorPair, convert: impl Fn(IpAddr) -> Option<A>) -> Option<Self> {
        let addresses = |selector: &TrafficSelector| {
            Some(Range::new(
                convert(selector.first())?,
                convert(selector.last())?,
            ))
        };
        let ports = |selector: &TrafficSelector| {
            if selector.any_port() {
                Range::new(0, NO_PORT)
            } else {
                let (first, last) = selector.ports().into_inner();
                Range::new(u32::from(first), u32::from(last))
            }
        };
        let protocol =
            |selector: &TrafficSelector| selector.protocol().map_or(ANY_PROTOCOL, u16::from);
        Some(Self {
            local: addresses(&pair.local)?,
            remote: addresses(&pair.remote)?,
            local_ports: ports(&pair.local),
            remote_ports: ports(&pair.remote),
            local_protocol: protocol(&pair.local),
            remote_protocol: protocol(&pair.remote),
        })
    }

    /// Whether every packet to the remote network fits.
    pub fn asks_for_nothing_else(&self) -> bool {
        self.local.width == A::default().edge(0, true) && self.asks_for_addresses()
    }

    /// Whether every packet between the networks fits.
    fn asks_for_addresses(&self) -> bool {
        self.local_ports.width == NO_PORT
            && self.remote_ports.width == NO_PORT
            && self.local_protocol == ANY_PROTOCOL
            && self.remote_protocol == ANY_PROTOCOL
    }

    /// Whether a packet from our side to the far one fits.
    #[inline]
    pub fn fits_outbound(&self, ends: &Ends<A>) -> bool {
        self.local.holds(ends.source)
            && self.remote.holds(ends.destination)
            && self.local_ports.holds(ends.source_port)
            && self.remote_ports.holds(ends.destination_port)
            && self.fits_protocol(ends.protocol)
    }

    /// Whether a packet from the far side to ours fits.
    #[inline]
    pub fn fits_inbound(&self, ends: &Ends<A>) -> bool {
        self.remote.holds(ends.source)
            && self.local.holds(ends.destination)
            && self.remote_ports.holds(ends.source_port)
            && self.local_ports.holds(ends.destination_port)
            && self.fits_protocol(ends.protocol)
    }

    #[inline]
    fn fits_protocol(&self, protocol: u8) -> bool {
        let fits = |wanted| wanted == ANY_PROTOCOL || wanted == u16::from(protocol);
        fits(self.local_protocol) && fits(self.remote_protocol)
    }
}

pub(super) fn v4(address: IpAddr) -> Option<u32> {
    match address {
        IpAddr::V4(v4) => Some(v4.to_bits()),
        IpAddr::V6(_) => None,
    }
}

pub(super) fn v6(address: IpAddr) -> Option<u128> {
    match address {
        IpAddr::V6(v6) => Some(v6.to_bits()),
        IpAddr::V4(_) => None,
    }
}

/// A rule of one family.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct PackedRule<A> {
    pub selectors: Packed<A>,
    pub decision: Decision,
}

impl<A: Address> PackedRule<A> {
    pub fn new(
        selectors: &SelectorPair,
        decision: Decision,
        convert: impl Fn(IpAddr) -> Option<A>,
    ) -> Option<Self> {
        Some(Self {
            selectors: Packed::new(selectors, convert)?,
            decision,
        })
    }
}

/// What an inbound SA lets through: any of its pairs.
#[derive(Debug, Default)]
pub struct Selectors {
    v4: Box<[Packed<u32>]>,
    v6: Box<[Packed<u128>]>,
}

/// Selectors as most SAs have them: two networks of IPv4, and nothing else.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Networks {
    local: Range<u32>,
    remote: Range<u32>,
}

impl Networks {
    /// Whether a packet from the far side to ours fits.
    #[inline]
    pub fn hold_inbound(&self, key: &KeyV4) -> bool {
        let (source, destination) = key.ends();
        self.remote.holds(source) && self.local.holds(destination)
    }
}

impl Selectors {
    /// Asks for the first pair of each family.
    #[inline]
    pub fn prefetch(&self) {
        prefetch_lines::<1, _>(&*self.v4);
        prefetch_lines::<2, _>(&*self.v6);
    }

    /// Two networks that alone are enough, if there are such: a short cut.
    pub(crate) fn networks(&self) -> Option<Networks> {
        let plain = self.v4.iter().find(|pair| pair.asks_for_addresses())?;
        Some(Networks {
            local: plain.local,
            remote: plain.remote,
        })
    }

    /// From pairs; one that mixes families fits nothing.
    pub fn new(pairs: &[SelectorPair]) -> Self {
        Self {
            v4: pairs
                .iter()
                .filter_map(|pair| Packed::new(pair, v4))
                .collect(),
            v6: pairs
                .iter()
                .filter_map(|pair| Packed::new(pair, v6))
                .collect(),
        }
    }

    /// Whether a packet from the far side may pass (RFC 4301 §5.2 step 4).
    #[inline]
    pub(crate) fn let_in(&self, ends: &AnyEnds) -> bool {
        match ends {
            AnyEnds::V4(ends) => self.v4.iter().any(|pair| pair.fits_inbound(ends)),
            AnyEnds::V6(ends) => self.v6.iter().any(|pair| pair.fits_inbound(ends)),
        }
    }
}
