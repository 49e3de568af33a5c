//! What others need for the same, in core cycles a packet: VPP 26.06's ESP nodes and whole IP paths with its best engine, and
//! Vita's ESP; AES-128-GCM, tunnel mode, measured on one core of the Sapphire Rapids class at 3.0 GHz, minima
//! over many short windows.

use super::scene::Size;

/// GHz of the machine they were measured on.
const GHZ: f64 = 3.0;
const SIZES: [usize; 6] = [64, 128, 256, 512, 1024, 1400];

/// Nanoseconds at each of [`SIZES`], then for IMIX where it was measured.
type Row = ([f64; 6], Option<f64>);

const VPP_ENCRYPT: Row = ([50.0, 55.2, 71.9, 87.1, 118.0, 130.0], Some(71.4));
const VPP_DECRYPT: Row = ([51.4, 53.8, 66.7, 81.4, 108.0, 119.0], Some(69.0));
const VPP_OUTBOUND: Row = ([77.8, 83.0, 100.0, 116.0, 147.0, 158.0], Some(101.0));
const VPP_INBOUND: Row = ([90.8, 93.3, 107.0, 122.0, 148.0, 158.0], Some(111.0));
const VITA_ENCAPSULATE: Row = ([91.2, 96.7, 116.0, 160.0, 252.0, 362.0], None);
const VITA_DECAPSULATE: Row = ([91.5, 83.3, 111.0, 159.0, 252.0, 341.0], None);
/// Both directions on one core, in millions of packets a second.
const VPP_LOOP: [(usize, f64); 4] = [(64, 5.0), (256, 3.9), (1024, 2.44), (1400, 2.28)];
const VITA_LOOP: [(usize, f64); 6] = [
    (64, 3.19),
    (128, 2.66),
    (256, 2.65),
    (512, 2.05),
    (1024, 1.32),
    (1400, 1.02),
];
const IPSEC_MB_SEAL: [(usize, f64); 7] = [
    (64, 43.0),
    (128, 52.0),
    (256, 90.0),
    (512, 136.0),
    (1024, 223.0),
    (1408, 290.0),
    (8960, 1509.0),
];

/// A peer's name and its cycles for the benchmark `name`, best known peer first.
pub fn peers(name: &str, size: Size) -> Vec<(&'static str, f64)> {
    let rows: &[(&'static str, Row)] = match name {
        "esp-encap" => &[("VPP", VPP_ENCRYPT), ("Vita", VITA_ENCAPSULATE)],
        "esp-decap" => &[("VPP", VPP_DECRYPT), ("Vita", VITA_DECAPSULATE)],
        "outbound-path" => &[("VPP", VPP_OUTBOUND)],
        "inbound-path" => &[("VPP", VPP_INBOUND)],
        "aead-seal" => return ipsec_mb(size),
        "loop" => return loops(size),
        _ => &[],
    };
    rows.iter()
        .filter_map(|(peer, (sizes, imix))| {
            let ns = match size {
                Size::Imix => *imix,
                Size::Bytes(bytes) => SIZES
                    .iter()
                    .position(|known| *known == bytes)
                    .map(|at| sizes[at]),
            };
            Some((*peer, ns? * GHZ))
        })
        .collect()
}

/// Millions of packets a second, turned into cycles.
fn loops(size: Size) -> Vec<(&'static str, f64)> {
    let of = |peer, row: &[(usize, f64)]| {
        let known = row.iter().find(|(bytes, _)| size == Size::Bytes(*bytes));
        known.map(|(_, mpps)| (peer, 1000.0 / mpps * GHZ))
    };
    let known = [of("VPP", &VPP_LOOP), of("Vita", &VITA_LOOP)];
    known.into_iter().flatten().collect()
}

fn ipsec_mb(size: Size) -> Vec<(&'static str, f64)> {
    let known = IPSEC_MB_SEAL
        .iter()
        .find(|(bytes, _)| size == Size::Bytes(*bytes));
    known
        .map(|(_, cycles)| ("ipsec-mb", *cycles))
        .into_iter()
        .collect()
}
