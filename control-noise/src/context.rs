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
            let number = self.random.number();
            if let Some(spi) = self.take_spi(number) {
                return spi;
            }
        }
    }

    /// If it is one and nobody has it.
    fn take_spi(&mut self, number: u32) -> Option<Spi> {
        let spi = Spi::new(number).ok()?;
        (!self.reserved.contains(&spi) && self.spis.insert(spi)).then_some(spi)
    }

    /// So many of them, in a row as far as they are free: receivers spread SPIs over their workers by the remainder, so each
    /// worker gets as many as any other.
    pub(crate) fn allocate_spis(&mut self, count: u8) -> Spis {
        let first = self.allocate_spi();
        let following = (1..).map(|step| first.get().wrapping_add(step));
        let free = following.filter_map(|number| self.take_spi(number));
        Spis {
            first,
            more: free.take(usize::from(count).saturating_sub(1)).collect(),
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{LoadPolicy, StaticSecretKey};

    fn context(seed: u8, reserved_spis: Vec<Spi>) -> Context {
        Context::new(NodeConfig {
            private_key: StaticSecretKey::generate([1; 32]),
            listen_port: 4500,
            local: None,
            seed: [seed; 32],
            worker_ports: Vec::new(),
            reserved_spis,
            under_load: LoadPolicy::default(),
        })
    }

    #[test]
    fn spis_of_one_handshake_are_as_many_for_each_worker() {
        for seed in 0..50 {
            let spis = context(seed, Vec::new()).allocate_spis(12);
            for workers in [2, 3, 4, 6, 12] {
                for worker in 0..workers {
                    let of_worker = spis.all().filter(|spi| spi.get() % workers == worker);
                    assert_eq!(of_worker.count() as u32, 12 / workers, "{spis:?}");
                }
            }
        }
    }

    #[test]
    fn an_spi_that_somebody_has_is_passed_over() {
        let first = context(7, Vec::new()).allocate_spi().get();
        let taken = Spi::new(first + 2).unwrap();
        let mut context = context(7, vec![taken]);
        let spis = context.allocate_spis(4);
        let numbers: Vec<u32> = spis.all().map(|spi| spi.get() - first).collect();
        assert_eq!(numbers, [0, 1, 3, 4]);
        // And so are the reserved ones, over the end of all numbers.
        assert_eq!(context.take_spi(255), None);
        assert_eq!(context.take_spi(first), None);
        context.release_spis(spis.all());
        assert!(context.take_spi(first).is_some());
    }
}
