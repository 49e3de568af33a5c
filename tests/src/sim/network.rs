use super::Random;
use std::{collections::BTreeMap, net::SocketAddr, time::Duration};

/// One UDP datagram on its way.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Datagram {
    /// The sender, as the receiver sees it.
    pub from: SocketAddr,
    /// The receiver.
    pub to: SocketAddr,
    /// The UDP payload.
    pub payload: Vec<u8>,
    /// The number of the inner packet inside. Known to the simulation only, not to the network.
    pub carries: Option<u64>,
}

/// How the network treats what it carries. Probabilities are from 0 to 1.
#[derive(Clone, Copy, Debug)]
pub struct Weather {
    /// A datagram never arrives.
    pub loss: f64,
    /// A datagram arrives twice.
    pub duplication: f64,
    /// A datagram takes up to ten times as long, so that later ones overtake it.
    pub reordering: f64,
    /// How long a datagram travels.
    pub delay: Duration,
    /// The largest UDP payload that arrives.
    pub payload_bytes_max: usize,
}

impl Weather {
    /// Nothing lost, nothing twice, everything in order after 10 ms.
    pub const FAIR: Self = Self {
        loss: 0.0,
        duplication: 0.0,
        reordering: 0.0,
        delay: Duration::from_millis(10),
        payload_bytes_max: 1472,
    };
    /// A bad link: 5 % lost, 2 % twice, 10 % out of order.
    pub const ROUGH: Self = Self {
        loss: 0.05,
        duplication: 0.02,
        reordering: 0.1,
        ..Self::FAIR
    };
    /// The cable is cut.
    pub const CUT: Self = Self {
        loss: 1.0,
        ..Self::FAIR
    };
}

/// Carries datagrams, remembers all of them.
pub struct Network {
    /// How it treats them from now on.
    pub weather: Weather,
    /// Everything that was ever sent, lost or not, as an eavesdropper sees it.
    pub capture: Vec<Datagram>,
    /// The numbers of the inner packets it has lost.
    pub lost: Vec<u64>,
    /// What was sent to an address where no gateway is.
    pub stray: Vec<Datagram>,
    in_flight: BTreeMap<(Duration, u64), Datagram>,
    serial: u64,
    random: Random,
}

impl Network {
    pub(super) fn new(seed: u64) -> Self {
        Self {
            weather: Weather::FAIR,
            capture: Vec::new(),
            lost: Vec::new(),
            stray: Vec::new(),
            in_flight: BTreeMap::new(),
            serial: 0,
            random: Random::new(seed),
        }
    }

    /// Sends one datagram on its way.
    pub(super) fn send(&mut self, now: Duration, datagram: Datagram) {
        self.capture.push(datagram.clone());
        if self.random.chance(self.weather.loss)
            || datagram.payload.len() > self.weather.payload_bytes_max
        {
            self.lost.extend(datagram.carries);
            return;
        }
        let copies = if self.random.chance(self.weather.duplication) {
            2
        } else {
            1
        };
        for _ in 0..copies {
            let factor = if self.random.chance(self.weather.reordering) {
                1 + self.random.below(10)
            } else {
                1
            };
            self.serial += 1;
            let arrival = now + self.weather.delay * factor as u32;
            self.in_flight
                .insert((arrival, self.serial), datagram.clone());
        }
    }

    /// When the next datagram arrives.
    pub(super) fn next_arrival(&self) -> Option<Duration> {
        self.in_flight.keys().next().map(|(arrival, _)| *arrival)
    }

    /// The next datagram that has arrived by `now`.
    pub(super) fn arrived(&mut self, now: Duration) -> Option<Datagram> {
        let entry = self.in_flight.first_entry()?;
        (entry.key().0 <= now).then(|| entry.remove())
    }

    /// Whether nothing is on its way.
    pub fn is_quiet(&self) -> bool {
        self.in_flight.is_empty()
    }
}
