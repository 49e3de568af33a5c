//! What all peers of an engine share.

use crate::{
    NodeConfig, Notice, NoticeEvent, Output, PeerLabel, PublicKey,
    random::Random,
    wire::{MARKER, Spis},
};
use esplane_api::{Direction, DropCounters, DropReason, SaCommand, Spi, TunnelId};
use std::{
    collections::{BTreeMap, BTreeSet, VecDeque},
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr},
};
use zeroize::Zeroizing;

/// This node's keys and generator, what it has given out, and what it wants done.
pub(crate) struct Context {
    pub node: NodeConfig,
    pub public_key: PublicKey,
    pub random: Random,
    pub outputs: VecDeque<Output>,
    pub drops: DropCounters,
    reserved: BTreeSet<Spi>,
    spis: BTreeSet<Spi>,
    indices: BTreeMap<u32, TunnelId>,
}

impl Context {
    pub(crate) fn new(mut node: NodeConfig) -> Self {
        let seed = Zeroizing::new(std::mem::take(&mut node.seed));
        Self {
            public_key: node.private_key.public_key(),
            random: Random::from_seed(*seed),
            outputs: VecDeque::new(),
            drops: DropCounters::default(),
            reserved: node.reserved_spis.iter().copied().collect(),
            spis: BTreeSet::new(),
            indices: BTreeMap::new(),
            node,
        }
    }

    pub(crate) fn drop_message(&mut self, reason: DropReason) {
        self.drops.add(reason, 1);
    }

    /// Sends a message behind its non-ESP marker.
    pub(crate) fn send(&mut self, to: SocketAddr, message: &[u8]) {
        self.outputs.push_back(Output::Send {
            to,
            datagram: [&MARKER, message].concat(),
        });
    }

    /// Has the commands carried out, and keeps account of the SPIs in them.
    pub(crate) fn commands(&mut self, commands: Vec<SaCommand>) {
        if commands.is_empty() {
            return;
        }
        for command in &commands {
            if let SaCommand::Remove(sa) = command
                && sa.direction == Direction::Inbound
            {
                self.spis.remove(&sa.spi);
            }
        }
        self.outputs.push_back(Output::Commands(commands));
    }

    pub(crate) fn dummy(&mut self, tunnel: TunnelId) {
        self.outputs.push_back(Output::SendDummy(tunnel));
    }

    pub(crate) fn notice(&mut self, peer: Option<PeerLabel>, event: NoticeEvent) {
        self.outputs
            .push_back(Output::Notice(Notice { peer, event }));
    }

    pub(crate) fn reserve_spis(&mut self, spis: &[Spi]) {
        self.reserved.extend(spis);
    }

    pub(crate) fn release_reserved_spis(&mut self, spis: &[Spi]) {
        for spi in spis {
            self.reserved.remove(spi);
        }
    }

    /// An inbound SPI that nobody has (RFC 4303 §2.1: the receiver chooses), until it is given back
    /// or its SA removed.
    fn allocate_spi(&mut self) -> Spi {
        loop {
            if let Ok(spi) = Spi::new(self.random.number())
                && !self.reserved.contains(&spi)
                && self.spis.insert(spi)
            {
                return spi;
            }
        }
    }

    /// So many of them.
    pub(crate) fn allocate_spis(&mut self, count: u8) -> Spis {
        Spis {
            first: self.allocate_spi(),
            more: (1..count).map(|_| self.allocate_spi()).collect(),
        }
    }

    pub(crate) fn release_spis(&mut self, spis: impl IntoIterator<Item = Spi>) {
        for spi in spis {
            self.spis.remove(&spi);
        }
    }

    /// Our name for a handshake, until it is given back.
    pub(crate) fn allocate_index(&mut self, peer: TunnelId) -> u32 {
        loop {
            let index = self.random.number();
            if let std::collections::btree_map::Entry::Vacant(free) = self.indices.entry(index) {
                free.insert(peer);
                return index;
            }
        }
    }

    pub(crate) fn release_index(&mut self, index: u32) {
        self.indices.remove(&index);
    }

    pub(crate) fn peer_of_index(&self, index: u32) -> Option<TunnelId> {
        self.indices.get(&index).copied()
    }

    /// Our own address towards `remote`: the configured one if it is of that family, else whichever
    /// the kernel chooses.
    pub(crate) fn local_towards(&self, remote: IpAddr) -> IpAddr {
        match (self.node.local, remote) {
            (Some(local), remote) if local.is_ipv4() == remote.is_ipv4() => local,
            (_, IpAddr::V4(_)) => Ipv4Addr::UNSPECIFIED.into(),
            (_, IpAddr::V6(_)) => Ipv6Addr::UNSPECIFIED.into(),
        }
    }
}
