//! One line as soon as a case is measured, or one JSON object at the end.

use super::{cases::Case, measure::Measured, reference, scene::Size};
use serde_json::{Value, json};
use std::io::{self, Write};

/// Where the results go.
pub struct Report<'w, W> {
    output: &'w mut W,
    json: bool,
    aead: &'static str,
    core_ghz: f64,
    results: Vec<Value>,
}

impl<'w, W: Write> Report<'w, W> {
    pub fn new(output: &'w mut W, json: bool, aead: &'static str, core_ghz: f64) -> Self {
        Self {
            output,
            json,
            aead,
            core_ghz,
            results: Vec::new(),
        }
    }

    pub fn begin(&mut self) -> io::Result<()> {
        if self.json {
            return Ok(());
        }
        writeln!(
            self.output,
            "AEAD {}, core at {:.2} GHz, one core, minima over windows of 64 packets; peers in cycles too\n\n\
             {:<14} {:>6} {:<17} {:>6} {:>3} {:>9} {:>9} {:>9} {:>8} {:>8}  peers",
            self.aead,
            self.core_ghz,
            "name",
            "bytes",
            "suite",
            "SAs",
            "w",
            "cycles",
            "ns",
            "median",
            "Mpps",
            "Gbit/s"
        )
    }

    pub fn add(&mut self, case: &Case, measured: Measured) -> io::Result<()> {
        let Measured {
            ns,
            median_ns,
            cycles,
        } = measured;
        let mpps = 1000.0 / ns;
        let gbit_per_second = case.size.map(|size| size.mean() * 8.0 / ns);
        let suite = case.suite.map_or("", |suite| suite.name());
        if self.json {
            let size = case.size.map(|size| match size {
                Size::Bytes(bytes) => json!(bytes),
                Size::Imix => json!("imix"),
            });
            self.results.push(json!({
                "name": case.name, "variant": case.variant, "size": size, "suite": suite, "sas": case.sas,
                "workers": case.workers, "ns": ns, "median_ns": median_ns, "cycles": cycles, "mpps": mpps,
                "gbit_per_second": gbit_per_second,
            }));
            return Ok(());
        }
        let size = case.size.map_or(String::new(), |size| match size {
            Size::Bytes(bytes) => bytes.to_string(),
            Size::Imix => "IMIX".to_owned(),
        });
        let gbit = gbit_per_second.map_or(String::new(), |gbit| format!("{gbit:.2}"));
        let mut peers: Vec<String> = case
            .size
            .map_or(Vec::new(), |size| reference::peers(case.name, size))
            .into_iter()
            .filter(|_| {
                case.suite == Some(esplane_api::AeadSuite::Aes128Gcm16)
                    && case.sas == 1
                    && case.workers == 1
            })
            .map(|(peer, theirs)| format!("{peer} {theirs:.0} ({:.2}x)", theirs / cycles))
            .collect();
        if !case.variant.is_empty() {
            peers.push(case.variant.clone());
        }
        writeln!(
            self.output,
            "{:<14} {size:>6} {suite:<17} {:>6} {:>3} {cycles:>9.1} {ns:>9.1} {median_ns:>9.1} {mpps:>8.2} {gbit:>8}  {}",
            case.name,
            case.sas,
            case.workers,
            peers.join(", ")
        )?;
        self.output.flush()
    }

    pub fn end(self) -> io::Result<()> {
        if !self.json {
            return Ok(());
        }
        let all = json!({ "core_ghz": self.core_ghz, "aead": self.aead, "results": self.results });
        writeln!(self.output, "{all}")
    }
}
