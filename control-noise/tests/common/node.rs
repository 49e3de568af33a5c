//! A node: its engine, and a dataplane that does what commands say and complains of every command that a real one would refuse.

use super::*;

/// The SAs of one tunnel as a dataplane has them.
#[derive(Default)]
pub struct Sas {
    pub inbound: BTreeMap<Spi, Inbound>,
    pub outbound: Vec<SaParams>,
    pub active: Option<Spi>,
    /// What sends for one worker alone.
    pub of_workers: BTreeMap<u16, Spi>,
    pub activity: (u64, u64, u64),
    pub(super) held: VecDeque<u64>,
}

pub struct Inbound {
    pub params: SaParams,
    pub(super) seen: bool,
}

pub struct Node {
    pub engine: Engine,
    pub address: SocketAddr,
    pub unix_offset: i64,
    pub tunnels: BTreeMap<TunnelId, Sas>,
    pub definitions: BTreeMap<TunnelId, usize>,
    pub notices: Vec<Notice>,
    /// Numbers of the data packets that came out here.
    pub delivered: BTreeSet<u64>,
    pub undeliverable: u64,
    /// Every outbound key ever installed here.
    pub(super) keys: Vec<KeyMaterial>,
    pub most_inbound: usize,
    pub(super) sent_per_sa: BTreeMap<Spi, u64>,
}

impl Sas {
    pub(super) fn activity(&self, tunnel: TunnelId) -> TunnelActivity {
        TunnelActivity {
            tunnel,
            sent_data_packets: self.activity.0,
            received_data_packets: self.activity.1,
            received_packets: self.activity.2,
        }
    }
}

impl Node {
    pub fn has_notice(&self, matches: impl Fn(&NoticeEvent) -> bool) -> bool {
        self.notices.iter().any(|notice| matches(&notice.event))
    }

    pub fn notice_texts(&self) -> String {
        self.notices
            .iter()
            .map(|notice| format!("{notice}\n"))
            .collect()
    }

    pub(super) fn open(
        &mut self,
        from: SocketAddr,
        spi: Spi,
        key: &KeyMaterial,
        number: Option<u64>,
    ) -> Vec<SaEvent> {
        let found = self
            .tunnels
            .iter_mut()
            .find(|(_, sas)| sas.inbound.contains_key(&spi));
        let Some((tunnel, sas)) = found else {
            self.undeliverable += 1;
            return Vec::new();
        };
        let sa = sas.inbound.get_mut(&spi).unwrap();
        if !sa.params.key.same_secret(key) {
            self.undeliverable += 1;
            return Vec::new();
        }
        let mut events = Vec::new();
        if !std::mem::replace(&mut sa.seen, true) {
            events.push(SaEvent::FirstReceived {
                sa: SaId {
                    tunnel: *tunnel,
                    direction: Direction::Inbound,
                    spi,
                },
            });
        }
        sas.activity.2 += 1;
        if let Some(number) = number {
            sas.activity.1 += 1;
            self.delivered.insert(number);
        }
        if sas
            .outbound
            .iter()
            .any(|sa| sa.path.remote_socket() != from)
        {
            events.push(SaEvent::EndpointMoved {
                tunnel: *tunnel,
                remote: from,
            });
        }
        events
    }

    pub(super) fn apply(&mut self, commands: Vec<SaCommand>) {
        assert!(!commands.is_empty());
        for command in commands {
            match command {
                SaCommand::DefineTunnel(tunnel) => {
                    self.tunnels.entry(tunnel.id).or_default();
                    self.definitions.insert(tunnel.id, tunnel.policies.len());
                }
                SaCommand::RemoveTunnel(id) => {
                    self.tunnels
                        .remove(&id)
                        .expect("only a defined tunnel is removed");
                    self.definitions.remove(&id);
                }
                SaCommand::Install(sa) => self.install(sa),
                SaCommand::Activate { tunnel, spi } => {
                    let sas = self.tunnels.get_mut(&tunnel).unwrap();
                    let sa = sas.outbound.iter().find(|sa| sa.spi == spi);
                    match sa.expect("only an installed SA is activated").worker {
                        None => sas.active = Some(spi),
                        Some(worker) => _ = sas.of_workers.insert(worker, spi),
                    }
                }
                SaCommand::Remove(SaId {
                    tunnel,
                    direction: Direction::Inbound,
                    spi,
                }) => {
                    let removed = self.tunnels.get_mut(&tunnel).unwrap().inbound.remove(&spi);
                    assert!(removed.is_some(), "only an installed SA is removed");
                }
                SaCommand::Remove(SaId {
                    tunnel,
                    direction: Direction::Outbound,
                    spi,
                }) => {
                    let sas = self.tunnels.get_mut(&tunnel).unwrap();
                    let before = sas.outbound.len();
                    sas.outbound.retain(|sa| sa.spi != spi);
                    assert_eq!(
                        sas.outbound.len() + 1,
                        before,
                        "only an installed SA is removed"
                    );
                    sas.of_workers.retain(|_, other| *other != spi);
                    if sas.active == Some(spi) {
                        let mut fallback = sas.outbound.iter().filter(|sa| sa.worker.is_none());
                        sas.active = fallback.next().map(|sa| sa.spi);
                    }
                }
                SaCommand::MoveEndpoint { tunnel, remote } => {
                    for sa in &mut self.tunnels.get_mut(&tunnel).unwrap().outbound {
                        sa.path = sa.path.moved_to(remote).unwrap();
                    }
                }
                SaCommand::Retire { .. } | SaCommand::ExtendSequence { .. } => {
                    panic!("this engine has no use for it")
                }
            }
        }
        for sas in self.tunnels.values() {
            let workers: BTreeSet<_> = sas.outbound.iter().map(|sa| sa.worker).collect();
            assert_eq!(
                workers.len(),
                sas.outbound.len(),
                "one outbound SA each is enough"
            );
            self.most_inbound = self.most_inbound.max(sas.inbound.len());
        }
    }

    pub(super) fn install(&mut self, sa: SaParams) {
        let sas = self
            .tunnels
            .get_mut(&sa.tunnel)
            .expect("an SA needs a defined tunnel");
        match sa.direction {
            Direction::Inbound => {
                let spi = sa.spi;
                let before = sas.inbound.insert(
                    spi,
                    Inbound {
                        params: sa,
                        seen: false,
                    },
                );
                assert!(before.is_none(), "inbound SPIs are unique");
            }
            Direction::Outbound => {
                assert!(sas.outbound.iter().all(|other| other.spi != sa.spi));
                assert!(
                    !self.keys.iter().any(|key| key.same_secret(&sa.key)),
                    "no key is ever used twice"
                );
                self.keys.push(sa.key.clone());
                self.sent_per_sa.insert(sa.spi, 0);
                match sa.worker {
                    None => _ = sas.active.get_or_insert(sa.spi),
                    Some(worker) => _ = sas.of_workers.entry(worker).or_insert(sa.spi),
                }
                sas.outbound.push(sa);
            }
        }
    }

    pub(super) fn release_held(&mut self) -> Vec<(TunnelId, u64)> {
        let ready = self
            .tunnels
            .iter_mut()
            .filter(|(_, sas)| sas.active.is_some());
        ready
            .flat_map(|(id, sas)| {
                sas.held
                    .drain(..)
                    .map(|number| (*id, number))
                    .collect::<Vec<_>>()
            })
            .collect()
    }
}
