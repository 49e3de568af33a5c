//! The dataplane on standard input and output, for tests against other implementations of ESP.
//!
//! One command a line, one reply a line. Packets are hexadecimal.
//!
//! | command | reply |
//! |---|---|
//! | `sa out spi=0x1001 suite=aes128gcm16 key=HEX esn=on local=192.0.2.1 remote=192.0.2.2` | `ok` |
//! | `sa in …`, as above; further: `udp=4500:4500` (local:remote), `window=64`, `first=1` | `ok` |
//! | `seal HEX`: an inner IP packet | `ok HEX`: the outer IP packet, or `drop REASON` |
//! | `dummy`: seals a dummy packet | `ok HEX` |
//! | `open HEX`: an outer IP packet | `ok HEX`: the inner packet, or `drop REASON` |
//! | `reset`: forgets all SAs | `ok` |
//! | anything wrong | `error TEXT` |
//!
//! `key` is key and salt; `local` and `remote` are outer addresses seen from here. The outbound SA
//! installed last sends. Selectors allow everything. `ESPLANE_AEAD` names an AEAD implementation, as for the daemon.

use esplane_api::{
    AeadSuite, DfPolicy, Direction, Esn, KeyMaterial, Lifetime, Now, OuterPath, Policy,
    PolicyAction, SaCommand, SaParams, SelectorPair, SequenceStart, TrafficSelector, TunnelId,
    TunnelParams, UdpEncap, WindowSize,
};
use esplane_dataplane::{
    Aead, Batch, Inbound, Outbound, Outer, OuterHeaders, Report, Settings, TableWriter, Verdict,
};
use std::{
    collections::BTreeMap,
    env,
    error::Error,
    io::{self, BufRead, Write},
};

const TUNNEL: TunnelId = TunnelId(1);
/// Frames that hold the largest IP packet and all around it.
const FRAME_BYTES: usize = 66_000;

type Reply = Result<String, Box<dyn Error>>;

fn main() -> Result<(), Box<dyn Error>> {
    let aead = match env::var("ESPLANE_AEAD") {
        Ok(name) => Aead::named(&name)?,
        Err(_) => Aead::detect(),
    };
    let mut gateway = Gateway::new(aead);
    let mut output = io::stdout().lock();
    for line in io::stdin().lock().lines() {
        let reply = gateway
            .answer(&line?)
            .unwrap_or_else(|error| format!("error {error}"));
        writeln!(output, "{reply}")?;
        output.flush()?;
    }
    Ok(())
}

struct Gateway {
    aead: Aead,
    writer: TableWriter,
    batch: Batch,
    report: Report,
}

impl Gateway {
    fn new(aead: Aead) -> Self {
        let outer_headers = OuterHeaders::Written;
        let mut writer = TableWriter::new(Settings { outer_headers }, aead);
        writer
            .apply(Now::default(), vec![SaCommand::DefineTunnel(tunnel())])
            .expect("an empty table takes any tunnel");
        Self {
            aead,
            writer,
            batch: Batch::new(1, FRAME_BYTES),
            report: Report::new(),
        }
    }

    fn answer(&mut self, line: &str) -> Reply {
        match line.split_whitespace().collect::<Vec<_>>()[..] {
            ["sa", direction, ref fields @ ..] => self.install(direction, fields),
            ["seal", packet] => self.seal(packet),
            ["dummy"] => self.dummy(),
            ["open", packet] => self.open(packet),
            ["reset"] => {
                *self = Self::new(self.aead);
                Ok("ok".into())
            }
            _ => Err("unknown command; use sa, seal, dummy, open or reset".into()),
        }
    }

    fn install(&mut self, direction: &str, fields: &[&str]) -> Reply {
        let params = sa(direction, fields)?;
        let (direction, spi) = (params.direction, params.spi);
        let mut commands = vec![SaCommand::Install(params)];
        if direction == Direction::Outbound {
            commands.push(SaCommand::Activate {
                tunnel: TUNNEL,
                spi,
            });
        }
        self.writer.apply(Now::default(), commands)?;
        Ok("ok".into())
    }

    fn seal(&mut self, packet: &str) -> Reply {
        self.fill(packet)?;
        let tables = self.writer.tables();
        Outbound::new(1).process(&tables, &mut self.batch, &mut self.report);
        self.result()
    }

    fn dummy(&mut self) -> Reply {
        self.batch.clear();
        let tables = self.writer.tables();
        Outbound::new(1).dummy(&tables, TUNNEL, &mut self.batch, &mut self.report);
        self.result()
    }

    fn open(&mut self, packet: &str) -> Reply {
        self.fill(packet)?;
        let tables = self.writer.tables();
        Inbound::new(1).process(&tables, &mut self.batch, &mut self.report);
        self.result()
    }

    fn fill(&mut self, packet: &str) -> Result<(), Box<dyn Error>> {
        self.batch.clear();
        if !self.batch.push(&bytes(packet)?, Outer::NONE) {
            return Err("the packet is too long".into());
        }
        Ok(())
    }

    fn result(&self) -> Reply {
        let packet = self.batch.packets().first().ok_or("no outbound SA")?;
        match packet.verdict {
            Verdict::Forward => Ok(format!("ok {}", hex(self.batch.data(0)))),
            Verdict::Drop(reason) => Ok(format!("drop {reason}")),
            other => Err(format!("verdict {other:?}").into()),
        }
    }
}

fn tunnel() -> TunnelParams {
    let any = [TrafficSelector::ANY_V4, TrafficSelector::ANY_V6];
    let policy = |any| Policy {
        selectors: SelectorPair {
            local: any,
            remote: any,
        },
        action: PolicyAction::Protect(TUNNEL),
        priority: 0,
    };
    TunnelParams {
        id: TUNNEL,
        name: "peer".into(),
        policies: any.map(policy).into(),
        roaming: false,
        df: DfPolicy::Copy,
    }
}

fn sa(direction: &str, fields: &[&str]) -> Result<SaParams, Box<dyn Error>> {
    let direction = match direction {
        "in" => Direction::Inbound,
        "out" => Direction::Outbound,
        other => return Err(format!("`{other}` is no direction; use in or out").into()),
    };
    let fields: BTreeMap<_, _> = fields
        .iter()
        .filter_map(|field| field.split_once('='))
        .collect();
    let get = |name: &str| fields.get(name).copied();
    let need = |name: &str| get(name).ok_or(format!("{name}= is missing"));
    let encap = match get("udp").unwrap_or("none") {
        "none" => None,
        ports => {
            let (local, remote) = ports
                .split_once(':')
                .ok_or("udp= takes LOCAL:REMOTE or none")?;
            Some(UdpEncap {
                local_port: local.parse()?,
                remote_port: remote.parse()?,
            })
        }
    };
    let suite: AeadSuite = need("suite")?.parse()?;
    Ok(SaParams {
        tunnel: TUNNEL,
        direction,
        spi: need("spi")?.parse()?,
        key: KeyMaterial::new(suite, &bytes(need("key")?)?)?,
        esn: match need("esn")? {
            "on" => Esn::On,
            "off" => Esn::Off,
            other => return Err(format!("esn={other}; use on or off").into()),
        },
        window: WindowSize::new(get("window").unwrap_or("4096").parse()?)?,
        path: OuterPath::new(need("local")?.parse()?, need("remote")?.parse()?, encap)?,
        selectors: tunnel()
            .policies
            .iter()
            .map(|policy| policy.selectors)
            .collect(),
        lifetime: Lifetime::UNLIMITED,
        sequence: SequenceStart {
            first: get("first").unwrap_or("1").parse()?,
            reserved_until: None,
        },
        worker: None,
    })
}

fn bytes(hex: &str) -> Result<Vec<u8>, Box<dyn Error>> {
    if !hex.is_ascii() || !hex.len().is_multiple_of(2) {
        return Err("a packet or key is an even number of hexadecimal digits".into());
    }
    let pairs = (0..hex.len()).step_by(2);
    Ok(pairs
        .map(|at| u8::from_str_radix(&hex[at..at + 2], 16))
        .collect::<Result<_, _>>()?)
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}
