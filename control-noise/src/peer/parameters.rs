//! From a peer's configuration and a handshake's outcome to what the dataplane is told.

use super::Peer;
use crate::{
    PeerConfig,
    context::Context,
    timers::{OVERTIME, PENDING_YOUNG},
    turnover::{Role, Sas, Schedule},
    wire::Spis,
};
use esplane_api::{
    AeadSuite, Direction, Esn, KeyMaterial, Lifetime, Limits, Now, OuterPath, Policy, PolicyAction,
    SaCommand, SaParams, SequenceStart, TunnelParams, UdpEncap,
};
use std::{net::SocketAddr, time::Duration};

/// Hard limits lie at least this far past soft ones, so that a successor has time to come at any speed.
const SLACK_PACKETS: u64 = 1 << 26;
const SLACK_BYTES: u64 = 1 << 36;
/// With 32-bit numbers a successor is asked for when half of them are used.
const SOFT_PACKETS_WITHOUT_ESN: u64 = 1 << 31;

impl Peer {
    /// The tunnel with one policy for each selector pair.
    pub(crate) fn definition(&self) -> SaCommand {
        let policy = |selectors| Policy {
            selectors,
            action: PolicyAction::Protect(self.config.id),
            priority: 0,
        };
        SaCommand::DefineTunnel(TunnelParams {
            id: self.config.id,
            name: self.config.name.clone(),
            policies: self.config.selectors.iter().copied().map(policy).collect(),
            roaming: true,
            df: self.config.df,
        })
    }

    /// The initiator replaces its SAs up to a tenth early; the responder only if that has not happened.
    pub(super) fn schedule(&self, ctx: &mut Context, now: Now, role: Role) -> Schedule {
        let lifetime = Duration::from_secs(self.config.rekey.seconds.into());
        let jitter = ctx.random.up_to(lifetime / 10);
        let rekey_after = match role {
            Role::Initiator => lifetime - jitter,
            Role::Responder => lifetime + (lifetime / 4).max(PENDING_YOUNG) + jitter,
        };
        Schedule {
            rekey_at: now.monotonic + rekey_after,
            ends_at: now.monotonic + lifetime + OVERTIME,
        }
    }

    /// The SAs of a handshake. Of the peer's we use no more than we offer it ourselves: the fallback SA, and one for each of
    /// the workers from 1 on (worker 0 has the fallback SA), from a port of its own where it has one.
    pub(super) fn negotiated(
        &self,
        ctx: &Context,
        path: OuterPath,
        suite: AeadSuite,
        inbound: (&Spis, Vec<KeyMaterial>),
        outbound: (&Spis, Vec<KeyMaterial>),
    ) -> Sas {
        let sa = |direction, spi, key, path, worker| SaParams {
            tunnel: self.config.id,
            direction,
            spi,
            key,
            esn: self.config.esn,
            window: self.config.window,
            path,
            selectors: self.config.selectors.clone(),
            lifetime: self.lifetime(),
            sequence: SequenceStart::FRESH,
            worker,
        };
        let most = usize::from(self.config.parallel_sas);
        let (inbound, outbound) = (
            inbound.0.all().zip(inbound.1),
            outbound.0.all().zip(outbound.1),
        );
        let inbound = inbound.zip(0..).map(|((spi, key), place)| {
            let worker = (place > 0).then_some(place);
            sa(Direction::Inbound, spi, key, path, worker)
        });
        let outbound = outbound.take(most).zip(0..).map(|((spi, key), place)| {
            let worker = (place > 0).then_some(place);
            let path = from_port_of(ctx, path, worker);
            sa(Direction::Outbound, spi, key, path, worker)
        });
        Sas {
            inbound: inbound.collect(),
            outbound: outbound.collect(),
            suite,
        }
    }

    /// Bytes and packets are counted by the dataplane. Seconds are ours; its own limit is only the
    /// last resort, should we stop.
    fn lifetime(&self) -> Lifetime {
        let rekey = &self.config.rekey;
        let soft_packets = match self.config.esn {
            Esn::On => rekey.packets,
            Esn::Off => Some(
                rekey
                    .packets
                    .unwrap_or(u64::MAX)
                    .min(SOFT_PACKETS_WITHOUT_ESN),
            ),
        };
        let hard =
            |soft: Option<u64>, slack: u64| soft.map(|soft| soft.saturating_add(soft.max(slack)));
        let soft = Limits {
            bytes: rekey.bytes,
            packets: soft_packets,
            seconds: None,
        };
        let hard = Limits {
            bytes: hard(soft.bytes, SLACK_BYTES),
            packets: hard(soft.packets, SLACK_PACKETS),
            seconds: Some(u64::from(rekey.seconds) + OVERTIME.as_secs() + 1),
        };
        Lifetime::new(soft, hard).unwrap_or(Lifetime::UNLIMITED) // limits of 0 were refused by check_peers
    }
}

/// What of the configuration the SAs that exist were made with.
pub(super) fn same_sas(one: &PeerConfig, other: &PeerConfig) -> bool {
    let same_psk = match (&one.psk, &other.psk) {
        (Some(one), Some(other)) => one.same_secret(other),
        (one, other) => one.is_none() && other.is_none(),
    };
    same_psk
        && (one.public_key, &one.suites, one.esn, one.kem)
            == (other.public_key, &other.suites, other.esn, other.kem)
}

/// The path as a worker takes it.
fn from_port_of(ctx: &Context, path: OuterPath, worker: Option<u16>) -> OuterPath {
    let place = worker.and_then(|worker| worker.checked_sub(1));
    let port = place.and_then(|place| ctx.node.worker_ports.get(usize::from(place)));
    port.and_then(|port| path.from_port(*port).ok())
        .unwrap_or(path)
}

/// From us to there, ESP in UDP between the same ports as the handshake's.
pub(super) fn path(ctx: &Context, to: SocketAddr) -> Option<OuterPath> {
    let encap = UdpEncap {
        local_port: ctx.node.listen_port,
        remote_port: to.port(),
    };
    OuterPath::new(ctx.local_towards(to.ip()), to.ip(), Some(encap)).ok()
}
