use serde::{Serialize, Serializer, ser::SerializeMap};
use std::{
    fmt,
    ops::{AddAssign, Index},
};

/// The step at which a packet was dropped.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum DropStage {
    /// On its way from clear to ESP.
    Outbound,
    /// On its way from ESP to clear.
    Inbound,
    /// A message of a key exchange.
    Handshake,
}

macro_rules! drop_reasons {
    ($($stage:ident { $($(#[$doc:meta])* $reason:ident = $name:literal: $meaning:literal,)+ })+) => {
        /// Why a packet went no further. One reason, one counter, one test.
        #[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
        #[repr(u8)]
        pub enum DropReason {
            $($(
                #[doc = $meaning]
                $(#[$doc])*
                $reason,
            )+)+
        }

        impl DropReason {
            /// Every reason, in the order of the packet's path.
            pub const ALL: &'static [Self] = &[$($(Self::$reason,)+)+];
            /// How many there are.
            pub const COUNT: usize = Self::ALL.len();

            /// The name in metrics, logs and JSON.
            pub const fn name(self) -> &'static str {
                match self { $($(Self::$reason => $name,)+)+ }
            }

            /// One sentence for the operator.
            pub const fn meaning(self) -> &'static str {
                match self { $($(Self::$reason => $meaning,)+)+ }
            }

            /// Where on its way the packet was.
            pub const fn stage(self) -> DropStage {
                match self { $($(Self::$reason => DropStage::$stage,)+)+ }
            }
        }
    };
}

drop_reasons! {
    Outbound {
        InnerOverrun = "inner_overrun": "It came from the private network faster than this machine took it: the kernel's queue for us was full",
        InnerMalformed = "inner_malformed": "Not an IPv4 or IPv6 packet, or its lengths contradict each other",
        NoPolicy = "no_policy": "No policy covers the packet; a route leads here that no peer announces",
        LinkLocal = "link_local": "Multicast or a neighbour's message that belongs to the link alone (MLD, mDNS, fe80::/10): no tunnel carries it, as it should be",
        PolicyDiscard = "policy_discard": "A policy says to discard the packet",
        BypassUnavailable = "bypass_unavailable": "A policy says to pass the packet in clear, and this driver has no way to do so",
        HoldQueueFull = "hold_queue_full": "No SA yet, and the queue of packets waiting for one is full",
        HoldTimeout = "hold_timeout": "No SA came while the packet waited for one",
        SequenceExhausted = "sequence_exhausted": "The SA has no sequence number left to send with (RFC 4303 §3.3.3)",
        OutboundLifetimeExpired = "outbound_lifetime_expired": "The SA's hard lifetime is over and no successor sends yet",
        InnerTooBig = "inner_too_big": "The packet leaves no room for the ESP trailer in its buffer; lower the inner MTU",
        TransmitFailed = "transmit_failed": "The kernel refused to send the ESP packet (no route, too big for the path, interface down)",
        TransmitQueueFull = "transmit_queue_full": "The kernel's send queue stayed full",
    }
    Inbound {
        OuterOverrun = "outer_overrun": "It came from the public network faster than this machine took it: the kernel's buffer for us was full",
        OuterMalformed = "outer_malformed": "The outer IP or UDP header is truncated, a fragment, or contradicts itself",
        EspTruncated = "esp_truncated": "Too short to hold ESP header, IV, trailer and ICV, or not a multiple of four",
        ReservedSpi = "reserved_spi": "SPI 1 to 255 is reserved (RFC 4303 §2.1)",
        Keepalive = "keepalive": "A NAT keepalive (RFC 3948 §2.3): it has done its work by arriving",
        UnknownSpi = "unknown_spi": "No inbound SA has this SPI: the peer restarted, or the SA is gone",
        EncapMismatch = "encap_mismatch": "Plain ESP for an SA that expects UDP encapsulation, or the other way round",
        InboundLifetimeExpired = "inbound_lifetime_expired": "The SA's hard lifetime is over",
        ReplayTooOld = "replay_too_old": "The sequence number lies behind the replay window",
        ReplayDuplicate = "replay_duplicate": "The sequence number has been received before",
        AuthenticationFailed = "authentication_failed": "The ICV is wrong: damaged, forged, or sealed with another key",
        BadPadding = "bad_padding": "The padding is not 1, 2, 3, … or longer than the packet (RFC 4303 §2.4)",
        DummyPacket = "dummy_packet": "A dummy packet (next header 59, RFC 4303 §2.6): discarded as it should be",
        UnsupportedNextHeader = "unsupported_next_header": "The payload is neither IPv4, IPv6 nor a dummy; transport mode is not supported",
        DecryptedMalformed = "decrypted_malformed": "The decrypted payload is no valid IP packet",
        SelectorMismatch = "selector_mismatch": "The decrypted packet lies outside the SA's traffic selectors (RFC 4301 §5.2)",
        CongestionLost = "congestion_lost": "A router marked congestion and the inner packet cannot say so (RFC 6040 §4.2)",
        DeliverFailed = "deliver_failed": "The inner interface refused the decrypted packet",
        ReceiveTruncated = "receive_truncated": "The packet was larger than the receive buffer",
    }
    Handshake {
        HandshakeMalformed = "handshake_malformed": "Truncated, of unknown type, or its lengths contradict each other",
        HandshakeVersion = "handshake_version": "Of a protocol version this node does not speak",
        HandshakeBadMac = "handshake_bad_mac": "The first MAC is wrong: the sender does not know our public key",
        HandshakeCookieNeeded = "handshake_cookie_needed": "Under load and without a valid cookie; a cookie was sent back",
        HandshakeRateLimited = "handshake_rate_limited": "More handshake messages from this address or peer than allowed",
        HandshakeDecryptFailed = "handshake_decrypt_failed": "Noise decryption failed: wrong static key, wrong pre-shared key, or damaged",
        HandshakeUnknownPeer = "handshake_unknown_peer": "Authentic, but its static key is none of our peers'",
        HandshakeReplayed = "handshake_replayed": "The timestamp is not newer than the last one from this peer",
        HandshakeUnexpected = "handshake_unexpected": "An answer that came late or twice, or a message that lost a simultaneous initiation: harmless",
        HandshakeSettings = "handshake_settings": "Suites, selectors, KEM or other settings of both ends do not agree",
        ControlQueueFull = "control_queue_full": "The control plane was too busy to take the message",
    }
}

impl DropReason {
    /// Whether the packet is one that every healthy tunnel drops now and then by design.
    pub const fn is_expected(self) -> bool {
        matches!(
            self,
            Self::Keepalive | Self::DummyPacket | Self::LinkLocal | Self::HandshakeUnexpected
        )
    }
}

impl fmt::Display for DropReason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// A counter for each [`DropReason`]. Serialized as a map of those that are not zero.
#[derive(Clone, Copy, PartialEq, Eq)]
pub struct DropCounters([u64; DropReason::COUNT]);

impl Default for DropCounters {
    fn default() -> Self {
        Self([0; DropReason::COUNT])
    }
}

impl DropCounters {
    /// Counts `packets` more.
    pub fn add(&mut self, reason: DropReason, packets: u64) {
        self.0[reason as usize] += packets;
    }

    /// All reasons with their counts, zeros included.
    pub fn iter(&self) -> impl Iterator<Item = (DropReason, u64)> + '_ {
        DropReason::ALL
            .iter()
            .map(|reason| (*reason, self[*reason]))
    }

    /// The sum over all reasons that are not [expected](DropReason::is_expected).
    pub fn unexpected(&self) -> u64 {
        self.iter()
            .filter(|(reason, _)| !reason.is_expected())
            .map(|(_, count)| count)
            .sum()
    }
}

impl Index<DropReason> for DropCounters {
    type Output = u64;
    fn index(&self, reason: DropReason) -> &u64 {
        &self.0[reason as usize]
    }
}

impl AddAssign for DropCounters {
    fn add_assign(&mut self, other: Self) {
        for (mine, theirs) in self.0.iter_mut().zip(other.0) {
            *mine += theirs;
        }
    }
}

impl fmt::Debug for DropCounters {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_map()
            .entries(self.iter().filter(|(_, count)| *count > 0))
            .finish()
    }
}

impl Serialize for DropCounters {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let mut map = serializer.serialize_map(None)?;
        for (reason, count) in self.iter().filter(|(_, count)| *count > 0) {
            map.serialize_entry(reason.name(), &count)?;
        }
        map.end()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::HashSet;

    #[test]
    fn names_are_unique_and_fit_a_metric_label() {
        let names: HashSet<_> = DropReason::ALL.iter().map(|reason| reason.name()).collect();
        assert_eq!(names.len(), DropReason::COUNT);
        for name in names {
            assert!(
                name.chars().all(|c| c.is_ascii_lowercase() || c == '_'),
                "{name}"
            );
        }
        for (index, reason) in DropReason::ALL.iter().enumerate() {
            assert_eq!(*reason as usize, index);
        }
    }

    #[test]
    fn expected_drops_do_not_count_as_loss() {
        let mut counters = DropCounters::default();
        counters.add(DropReason::Keepalive, 3);
        assert_eq!(counters.unexpected(), 0);
        counters.add(DropReason::NoPolicy, 2);
        counters += counters;
        assert_eq!(
            (counters.unexpected(), counters[DropReason::Keepalive]),
            (4, 6)
        );
    }
}
