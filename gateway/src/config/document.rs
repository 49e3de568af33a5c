//! The configuration as it is written: names and shapes only, every value with its place in the file.
//!
//! Values stay texts and numbers here; `resolve.rs` gives them their meaning. So one wrong value
//! does not hide the next, and each is reported where it stands.

use serde::Deserialize;
use serde_saphyr::Spanned;
use std::{fmt, path::PathBuf};
use zeroize::Zeroizing;

/// A value and where it stands.
pub(super) type At<T> = Spanned<T>;

/// The whole file.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Document {
    pub name: At<String>,
    pub state_dir: Option<PathBuf>,
    pub private_key_file: Option<At<PathBuf>>,
    pub listen: Option<At<String>>,
    pub interface: InterfaceDocument,
    pub install_routes: Option<bool>,
    pub route_metric: Option<At<u64>>,
    pub workers: Option<At<String>>,
    pub worker_ports: Option<At<String>>,
    pub busy_poll: Option<bool>,
    pub outer: Option<DriverDocument>,
    pub inner: Option<DriverDocument>,
    #[serde(default)]
    pub peers: Vec<At<PeerDocument>>,
    #[serde(default)]
    pub static_sas: Vec<At<StaticSaDocument>>,
    #[serde(default, deserialize_with = "present")]
    pub strongswan: Option<StrongswanDocument>,
    #[serde(default)]
    pub api: ApiDocument,
    #[serde(default)]
    pub log: LogDocument,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct InterfaceDocument {
    pub name: At<String>,
    #[serde(default)]
    pub addresses: Vec<At<String>>,
    pub mtu: Option<At<String>>,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct DriverDocument {
    pub xdp: XdpDocument,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct XdpDocument {
    pub interface: At<String>,
    pub queues: Option<At<String>>,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct PeerDocument {
    pub name: At<String>,
    pub public_key: At<String>,
    pub endpoint: Option<At<String>>,
    pub routes: At<Vec<At<String>>>,
    pub psk_file: Option<At<PathBuf>>,
    pub suites: Option<At<Vec<At<String>>>>,
    pub kem: Option<At<String>>,
    pub initiate: Option<At<String>>,
    pub keepalive_seconds: Option<At<u64>>,
    pub dead_after_seconds: Option<At<u64>>,
    #[serde(default)]
    pub rekey: RekeyDocument,
    pub esn: Option<bool>,
    pub window_packets: Option<At<u64>>,
    pub parallel_sas: Option<At<u64>>,
    pub df: Option<At<String>>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct RekeyDocument {
    pub seconds: Option<At<u64>>,
    pub bytes: Option<At<u64>>,
    pub packets: Option<At<u64>>,
}

/// One manually keyed tunnel; also the body of `POST /v1/static-sas`.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct StaticSaDocument {
    pub name: At<String>,
    pub local: Option<At<String>>,
    pub remote: At<String>,
    pub udp: Option<UdpDocument>,
    pub suite: At<String>,
    pub esn: Option<bool>,
    pub window_packets: Option<At<u64>>,
    pub df: Option<At<String>>,
    pub inbound: KeyDocument,
    pub outbound: KeyDocument,
    #[serde(default)]
    pub routes: Vec<At<String>>,
    #[serde(default)]
    pub selectors: Vec<At<SelectorDocument>>,
    pub lifetime: Option<At<LifetimeDocument>>,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct UdpDocument {
    pub local_port: Option<At<u64>>,
    pub remote_port: Option<At<u64>>,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct KeyDocument {
    pub spi: At<String>,
    pub key: Option<At<SecretText>>,
    pub key_file: Option<At<PathBuf>>,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct SelectorDocument {
    pub local: At<String>,
    pub remote: At<String>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct LifetimeDocument {
    #[serde(default)]
    pub soft: esplane_api::Limits,
    #[serde(default)]
    pub hard: esplane_api::Limits,
}

#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct StrongswanDocument {
    pub mode: Option<At<String>>,
    pub mark: Option<At<String>>,
    pub vici: Option<At<String>>,
    pub socket: Option<At<String>>,
    pub port: Option<At<u64>>,
    pub routes: Option<bool>,
    pub df: Option<At<String>>,
    pub window_packets: Option<At<u64>>,
    #[serde(default)]
    pub connections: Vec<At<String>>,
}

/// A key without a value stands for all defaults: whoever writes `strongswan:` wants it.
fn present<'de, T, D>(deserializer: D) -> Result<Option<T>, D::Error>
where
    T: Deserialize<'de> + Default,
    D: serde::Deserializer<'de>,
{
    Option::deserialize(deserializer).map(|value: Option<T>| Some(value.unwrap_or_default()))
}

#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct ApiDocument {
    pub listen: Option<At<String>>,
    pub socket: Option<At<String>>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct LogDocument {
    pub level: Option<At<String>>,
    pub format: Option<At<String>>,
}

/// A key written into the file: wiped on drop, never shown.
pub(super) struct SecretText(Zeroizing<String>);

impl<'de> Deserialize<'de> for SecretText {
    fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        String::deserialize(deserializer).map(|text| Self(Zeroizing::new(text)))
    }
}

impl SecretText {
    pub(super) fn dangerous_text(&self) -> &str {
        &self.0
    }
}

impl fmt::Debug for SecretText {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("[redacted]")
    }
}
