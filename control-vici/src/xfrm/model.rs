//! What the kernel tells of its SAs, in Rust's words. Names follow `ip xfrm state`.

use crate::vici::Mark;
use esplane_api::{AeadSuite, Direction, KeyMaterial, Limits, SelectorPair, Spi};
use std::net::{IpAddr, SocketAddr};

/// What names an SA in the kernel's database: `struct xfrm_usersa_id` and its mark.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct SaKey {
    /// Where its packets go.
    pub destination: IpAddr,
    /// Its SPI.
    pub spi: Spi,
    /// Its mark: value and mask; 0 and 0 for none.
    pub mark: (u32, u32),
}

/// One ESP SA of the kernel's database: `struct xfrm_usersa_info` and its attributes.
#[derive(Clone, Debug)]
pub struct XfrmSa {
    /// Its name there.
    pub key: SaKey,
    /// Where its packets come from.
    pub source: IpAddr,
    /// Which policy's template it serves.
    pub reqid: u32,
    /// Tunnel, transport…
    pub mode: XfrmMode,
    /// Its mark.
    pub mark: Option<Mark>,
    /// Its interface id.
    pub if_id: Option<u32>,
    /// Which way it goes, where the kernel says (`XFRMA_SA_DIR`, Linux 6.10 and later).
    pub direction: Option<Direction>,
    /// What it encrypts with.
    pub cipher: XfrmCipher,
    /// Whether it has extended sequence numbers (`XFRM_STATE_ESN`).
    pub esn: bool,
    /// The replay window in packets; 0 for none.
    pub window_packets: u32,
    /// The UDP ports, where ESP travels in UDP.
    pub encap: Option<XfrmEncap>,
    /// Soft limits.
    pub soft: Limits,
    /// Hard limits.
    pub hard: Limits,
    /// The last number sent, as the kernel knows it; in mode A what we have reserved there.
    pub sequence_sent: u64,
    /// The highest number received, as the kernel knows it; in mode A what we have stored there.
    pub sequence_received: u64,
    /// Packets carried, as the kernel knows it; in mode A what we have stored there.
    pub packets: u64,
    /// Bytes carried, likewise.
    pub bytes: u64,
    /// When it was added, in seconds since 1970.
    pub added_unix_seconds: u64,
}

/// The ports of ESP in UDP, as the packets of that SA carry them.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct XfrmEncap {
    /// The source port.
    pub source_port: u16,
    /// The destination port.
    pub destination_port: u16,
}

/// An SA's mode.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum XfrmMode {
    /// Whole packets are carried.
    Tunnel,
    /// Payloads are carried.
    Transport,
    /// Another, by its number in the kernel.
    Other(u8),
}

/// What an SA encrypts with.
#[derive(Clone, Debug)]
pub enum XfrmCipher {
    /// Nothing yet: an SPI is reserved, no key negotiated.
    Larval,
    /// One that Esplane has.
    Aead(KeyMaterial),
    /// One that Esplane has, but the kernel shows zeros in place of the key: lockdown "confidentiality".
    Concealed(AeadSuite),
    /// One that Esplane does not have, by the kernel's names: `cbc(aes)/hmac(sha256)`.
    Unsupported(String),
}

/// What the kernel tells.
#[expect(clippy::large_enum_variant, reason = "a few of them each negotiation")]
#[derive(Clone, Debug)]
pub enum XfrmEvent {
    /// Everything there is now, after subscribing or after a gap: replaces all that was known.
    Snapshot(Vec<XfrmSa>),
    /// An SA was added or changed (NEWSA, UPDSA).
    Installed(XfrmSa),
    /// An SA was removed (DELSA).
    Removed(SaKey),
    /// All SAs were removed (FLUSHSA).
    Flushed,
    /// An SA reached a limit in the kernel (EXPIRE). After a hard one it is gone; no DELSA follows.
    Expired {
        /// Which.
        key: SaKey,
        /// Whether it has ended.
        hard: bool,
    },
    /// What became of a request; answers come in the order of the requests.
    Reply(XfrmReply),
}

/// What became of a request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct XfrmReply {
    /// The SA it was about.
    pub key: SaKey,
    /// Whether the kernel did as told; it does not where the SA is gone.
    pub done: bool,
    /// The number that is stored there now, where [`XfrmRequest::Store`] asked for it.
    pub sequence_sent: Option<u64>,
}

/// What an SA is to hold from now on.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Progress {
    /// Outbound: the last number reserved, where it is to change. Inbound: `None`.
    pub sent: Option<u64>,
    /// Inbound: the highest number received, so that a restarted Esplane takes nothing twice. Outbound: `None`.
    pub received: Option<u64>,
    /// Packets carried.
    pub packets: u64,
    /// Bytes carried.
    pub bytes: u64,
}

/// What the kernel can be told.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum XfrmRequest {
    /// Store a number as sent, and what was carried (`NEWAE`): charon shows it, and a restarted
    /// Esplane continues behind it.
    Store {
        /// The SA.
        key: SaKey,
        /// What it is to hold.
        progress: Progress,
    },
    /// Tell charon that a limit is reached (`EXPIRE`): soft, it rekeys; hard, it replaces.
    Expire {
        /// The SA.
        key: SaKey,
        /// Whether it has ended.
        hard: bool,
    },
    /// Tell charon that the peer's packets come from elsewhere now (`MAPPING`: its NAT has rebound). Only
    /// whoever plays the kernel can; a real kernel refuses.
    PeerMoved {
        /// The inbound SA that has seen it.
        key: SaKey,
        /// Where the peer is now.
        remote: SocketAddr,
    },
    /// Tell charon that packets wait for an SA (`ACQUIRE`): it initiates the child with this reqid.
    /// Has no reply: packets that go on waiting are told again.
    Acquire {
        /// The reqid of the trap policy's template.
        reqid: u32,
        /// The ends of the tunnel.
        ends: (IpAddr, IpAddr),
        /// What the packets have in common.
        selectors: SelectorPair,
    },
}
