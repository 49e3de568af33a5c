//! The outer header.
use esplane_api::{AeadSuite, OuterPath};

/// Bytes of SPI and sequence number.
const ESP_HEADER_BYTES: usize = 8;

/// The largest inner packet that leaves unfragmented through a path of `outer_mtu` bytes.
pub fn max_inner_bytes(outer_mtu: usize, path: &OuterPath, suite: AeadSuite) -> usize {
    let ip_bytes = if path.remote().is_ipv4() { 20 } else { 40 };
    let udp_bytes = if path.encap().is_some() { 8 } else { 0 };
    let around = ip_bytes + udp_bytes + ESP_HEADER_BYTES + suite.iv_bytes() + suite.icv_bytes();
    // RFC 4303 §2.4: payload, pad length and next header together are a multiple of four.
    let encrypted = outer_mtu.saturating_sub(around) & !3;
    encrypted.saturating_sub(2)
}
