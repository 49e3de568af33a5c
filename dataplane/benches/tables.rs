//! What a change of the tables costs, by how many tunnels there are: `cargo bench -p esplane-dataplane --bench tables`.
//!
//! A rekey is three changes, each a snapshot of its own: both new SAs come, the new one sends, both old ones go.

use divan::Bencher;
use esplane_api::{
    AeadSuite, DfPolicy, Direction, Esn, IpPrefix, KeyMaterial, Lifetime, Now, OuterPath, Policy,
    PolicyAction, SaCommand, SaId, SaParams, SelectorPair, SequenceStart, Spi, TunnelId,
    TunnelParams, UdpEncap, WindowSize,
};
use esplane_dataplane::{Aead, OuterHeaders, Settings, TableWriter};
use std::{
    cell::RefCell,
    net::{IpAddr, Ipv4Addr},
};

fn main() {
    divan::main();
}

const TUNNELS: [u32; 4] = [10, 1_000, 10_000, 100_000];

#[divan::bench(args = TUNNELS, sample_count = 50, sample_size = 1)]
fn a_rekey(bencher: Bencher, tunnels: u32) {
    let world = RefCell::new(World::new(tunnels));
    bencher.bench_local(|| world.borrow_mut().rekey());
}

#[divan::bench(args = TUNNELS, sample_count = 50, sample_size = 1)]
fn a_tunnel_comes_and_goes(bencher: Bencher, tunnels: u32) {
    let world = RefCell::new(World::new(tunnels));
    bencher.bench_local(|| world.borrow_mut().come_and_go());
}

#[divan::bench(args = TUNNELS, sample_count = 50, sample_size = 1)]
fn an_endpoint_moves(bencher: Bencher, tunnels: u32) {
    let world = RefCell::new(World::new(tunnels));
    bencher.bench_local(|| world.borrow_mut().move_endpoint());
}

struct World {
    writer: TableWriter,
    tunnels: u32,
    /// Grows with each key that was made.
    keys: u32,
    /// Which tunnel changes next.
    turn: u32,
    /// The SPIs of each tunnel, in and out.
    spis: Vec<(Spi, Spi)>,
}

impl World {
    fn new(tunnels: u32) -> Self {
        let settings = Settings {
            outer_headers: OuterHeaders::ByKernel,
        };
        let mut world = Self {
            writer: TableWriter::new(settings, Aead::detect()),
            tunnels,
            keys: 0,
            turn: 0,
            spis: Vec::new(),
        };
        let mut commands = Vec::new();
        for number in 0..tunnels {
            commands.push(define(number));
            let (spis, both) = world.install(number);
            commands.extend(both);
            world.spis.push(spis);
        }
        world.apply(commands);
        world
    }

    fn next(&mut self) -> u32 {
        self.turn = self.turn.wrapping_add(7919);
        self.turn % self.tunnels
    }

    fn rekey(&mut self) {
        let number = self.next();
        let tunnel = id(number);
        let (new, both) = self.install(number);
        self.apply(both.into());
        self.apply(vec![SaCommand::Activate { tunnel, spi: new.1 }]);
        let old = std::mem::replace(&mut self.spis[number as usize], new);
        let remove = |direction, spi| {
            SaCommand::Remove(SaId {
                tunnel,
                direction,
                spi,
            })
        };
        self.apply(vec![
            remove(Direction::Inbound, old.0),
            remove(Direction::Outbound, old.1),
        ]);
    }

    fn come_and_go(&mut self) {
        let (_, both) = self.install(self.tunnels);
        let mut commands = vec![define(self.tunnels)];
        commands.extend(both);
        self.apply(commands);
        self.apply(vec![SaCommand::RemoveTunnel(id(self.tunnels))]);
    }

    fn move_endpoint(&mut self) {
        let (tunnel, port) = (id(self.next()), 1024 + (self.turn % 60_000) as u16);
        self.apply(vec![SaCommand::MoveEndpoint {
            tunnel,
            remote: (Ipv4Addr::new(192, 0, 2, 77), port).into(),
        }]);
    }

    fn apply(&mut self, commands: Vec<SaCommand>) {
        let now = Now::default();
        self.writer.apply(now, commands).expect("valid commands");
    }

    fn install(&mut self, number: u32) -> ((Spi, Spi), [SaCommand; 2]) {
        let mut one = |direction| {
            self.keys += 1;
            let spi = Spi::new(0x1000 + self.keys).expect("not reserved");
            (spi, SaCommand::Install(params(number, direction, spi)))
        };
        let (inbound, outbound) = (one(Direction::Inbound), one(Direction::Outbound));
        ((inbound.0, outbound.0), [inbound.1, outbound.1])
    }
}

fn id(number: u32) -> TunnelId {
    TunnelId(number + 1)
}

fn selectors(number: u32) -> SelectorPair {
    let network = Ipv4Addr::from_bits(0x0a00_0000 + number * 64);
    SelectorPair::to(IpPrefix::truncated(IpAddr::V4(network), 26))
}

fn define(number: u32) -> SaCommand {
    SaCommand::DefineTunnel(TunnelParams {
        id: id(number),
        name: format!("bench-{number}"),
        policies: vec![Policy {
            selectors: selectors(number),
            action: PolicyAction::Protect(id(number)),
            priority: 0,
        }],
        roaming: true,
        df: DfPolicy::Clear,
    })
}

fn params(number: u32, direction: Direction, spi: Spi) -> SaParams {
    let suite = AeadSuite::Aes128Gcm16;
    let mut secret = vec![7; suite.keying_material_bytes()];
    secret[..4].copy_from_slice(&spi.get().to_be_bytes());
    let (local, remote) = (Ipv4Addr::new(192, 0, 2, 1), Ipv4Addr::new(192, 0, 2, 2));
    let (local, remote) = (IpAddr::V4(local), IpAddr::V4(remote));
    let encap = UdpEncap {
        local_port: 4500,
        remote_port: 4500,
    };
    SaParams {
        tunnel: id(number),
        direction,
        spi,
        key: KeyMaterial::new(suite, &secret).expect("the right length"),
        esn: Esn::On,
        window: WindowSize::DEFAULT,
        path: OuterPath::new(local, remote, Some(encap)).expect("of one family"),
        selectors: vec![selectors(number)],
        lifetime: Lifetime::UNLIMITED,
        sequence: SequenceStart::FRESH,
        worker: None,
    }
}
