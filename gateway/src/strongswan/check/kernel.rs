//! What the kernel tells of its SAs and policies, and which ESP it would take.

use esplane_api::{AeadSuite, KeyMaterial, Limits, Spi};
use esplane_control_vici::{
    check::{EspSupport, Lockdown, Looked},
    xfrm::{
        SaKey, XfrmCipher, XfrmMode, XfrmSa, message,
        sa::{self, parse_sa},
        wire::{self, attribute, flag, kind, messages, size},
    },
};
use netlink_sys::{Socket, SocketAddr, protocols::NETLINK_XFRM};
use nix::sched::{CloneFlags, unshare};
use rustix::io::Errno;
use std::{fs, io, net::IpAddr, thread, time::Duration};
use zeroize::Zeroizing;

/// The kernel fills dumps up to 32 KiB.
const RECEIVE_BYTES: usize = 1 << 17;
/// The kernel answers within the call.
const ANSWER_WITHIN: Duration = Duration::from_secs(5);
const LOCKDOWN: &str = "/sys/kernel/security/lockdown";

/// Every SA of this network namespace.
pub fn sas() -> Looked<Vec<XfrmSa>> {
    let mut sas = Vec::new();
    let dumped = dump(&message::dump(1), kind::NEWSA, |body| {
        sas.extend(parse_sa(body).ok().flatten());
    });
    looked(dumped, "SAs").map(|()| sas)
}

/// The reqid of every policy of this network namespace that has one.
pub fn policies() -> Looked<Vec<u32>> {
    let flags = flag::REQUEST | flag::DUMP;
    let fixed = [0; size::USERPOLICY_ID];
    let request = wire::Builder::new(kind::GETPOLICY, flags, 1, &fixed).finish();
    let mut reqids = Vec::new();
    let dumped = dump(&request, kind::NEWPOLICY, |body| {
        let attributes = body.get(size::USERPOLICY_INFO..).unwrap_or_default();
        // struct xfrm_user_tmpl: the reqid is its 12th word.
        if let Ok(Some(template)) = sa::find(attributes, attribute::TMPL)
            && template.len() >= size::USER_TMPL
        {
            reqids.push(wire::u32_at(template, 44));
        }
    });
    looked(dumped, "policies").map(|()| reqids)
}

/// Which ESP SAs the kernel takes: asks in a network namespace that only this question sees.
pub fn esp() -> Looked<EspSupport> {
    let asked = thread::spawn(|| {
        unshare(CloneFlags::CLONE_NEWNET).map_err(|error| {
            format!("no network namespace to try in ({error}); run this as root")
        })?;
        let socket = match open() {
            Ok(socket) => socket,
            Err(error) if is(&error, Errno::PROTONOSUPPORT) => {
                return Ok(EspSupport {
                    v4: false,
                    v6: false,
                    xfrm: false,
                });
            }
            Err(error) => return Err(format!("no NETLINK_XFRM socket: {error}")),
        };
        let takes = |ends: [&str; 2]| {
            takes(&socket, ends).map_err(|error| format!("NETLINK_XFRM: {error}"))
        };
        Ok(EspSupport {
            v4: takes(["192.0.2.1", "192.0.2.2"])?,
            v6: takes(["2001:db8::1", "2001:db8::2"])?,
            xfrm: true,
        })
    });
    match asked.join() {
        Ok(Ok(support)) => Looked::Found(support),
        Ok(Err(why)) => Looked::Unknown(why),
        Err(_) => Looked::Unknown("the question failed".to_owned()),
    }
}

/// What the kernel hides.
pub fn lockdown() -> Looked<Lockdown> {
    match fs::read_to_string(LOCKDOWN) {
        Ok(text) => read_lockdown(&text),
        // The file is there wherever the kernel has lockdown and securityfs is mounted.
        Err(error) if error.kind() == io::ErrorKind::NotFound => {
            match fs::read_to_string("/sys/kernel/security/lsm") {
                Ok(_) => Looked::Found(Lockdown::None),
                Err(_) => Looked::Unknown(format!(
                    "{LOCKDOWN} is not there, nor is securityfs mounted"
                )),
            }
        }
        Err(error) => Looked::Unknown(format!("{LOCKDOWN}: {error}")),
    }
}

/// `none [integrity] confidentiality`.
fn read_lockdown(text: &str) -> Looked<Lockdown> {
    let mut words = text.split_ascii_whitespace();
    match words.find(|word| word.starts_with('[')) {
        Some("[none]") => Looked::Found(Lockdown::None),
        Some("[integrity]") => Looked::Found(Lockdown::Integrity),
        Some("[confidentiality]") => Looked::Found(Lockdown::Confidentiality),
        _ => Looked::Unknown(format!("{LOCKDOWN} says `{}`", text.trim())),
    }
}

fn looked(dumped: io::Result<()>, what: &str) -> Looked<()> {
    match dumped {
        Ok(()) => Looked::Found(()),
        Err(error) => Looked::Unknown(format!(
            "the kernel does not show its {what}: {error}; this needs CAP_NET_ADMIN in charon's network namespace"
        )),
    }
}

fn open() -> io::Result<Socket> {
    let mut socket = Socket::new(NETLINK_XFRM)?;
    socket.bind_auto()?;
    rustix::net::sockopt::set_socket_timeout(
        &socket,
        rustix::net::sockopt::Timeout::Recv,
        Some(ANSWER_WITHIN),
    )?;
    Ok(socket)
}

/// Asks, and gives the body of every message of that kind.
fn dump(request: &[u8], wanted: u16, mut each: impl FnMut(&[u8])) -> io::Result<()> {
    let socket = open()?;
    socket.send_to(request, &SocketAddr::new(0, 0), 0)?;
    let mut received = Zeroizing::new(Vec::with_capacity(RECEIVE_BYTES));
    loop {
        received.clear();
        socket.recv_from(&mut *received, 0)?;
        for message in messages(&received) {
            let message = message.map_err(io::Error::other)?;
            match message.kind {
                kind::DONE => return Ok(()),
                kind::ERROR => return outcome(message.body),
                other if other == wanted => each(message.body),
                _ => {}
            }
        }
    }
}

/// Whether the kernel takes an SA of AES-GCM between these.
fn takes(socket: &Socket, [source, destination]: [&str; 2]) -> io::Result<bool> {
    let address = |text: &str| text.parse().map_err(io::Error::other);
    let suite = AeadSuite::Aes128Gcm16;
    let key = KeyMaterial::new(suite, &vec![1; suite.keying_material_bytes()]);
    let key = key.map_err(io::Error::other)?;
    let spi = Spi::new(Spi::MIN).map_err(io::Error::other)?;
    let sa = probe(address(source)?, address(destination)?, spi, key);
    let flags = flag::REQUEST | flag::ACK;
    let request = sa::build_sa(kind::NEWSA, flags, 1, &sa).finish();
    socket.send_to(&request, &SocketAddr::new(0, 0), 0)?;
    let mut received = Vec::with_capacity(RECEIVE_BYTES);
    socket.recv_from(&mut received, 0)?;
    let answer = messages(&received)
        .next()
        .transpose()
        .map_err(io::Error::other)?;
    let Some(answer) = answer.filter(|answer| answer.kind == kind::ERROR) else {
        return Err(io::Error::other("no answer to NEWSA"));
    };
    match outcome(answer.body) {
        Ok(()) => Ok(true),
        Err(error) if is(&error, Errno::PERM) => Err(error),
        // No ESP, no such address family, no such cipher.
        Err(_) => Ok(false),
    }
}

fn probe(source: IpAddr, destination: IpAddr, spi: Spi, key: KeyMaterial) -> XfrmSa {
    XfrmSa {
        key: SaKey {
            destination,
            spi,
            mark: (0, 0),
        },
        source,
        reqid: 1,
        mode: XfrmMode::Tunnel,
        mark: None,
        if_id: None,
        direction: None,
        cipher: XfrmCipher::Aead(key),
        esn: false,
        window_packets: 32,
        encap: None,
        soft: Limits::default(),
        hard: Limits::default(),
        sequence_sent: 0,
        sequence_received: 0,
        packets: 0,
        bytes: 0,
        added_unix_seconds: 0,
    }
}

fn outcome(body: &[u8]) -> io::Result<()> {
    match message::parse_error(body).map_err(io::Error::other)? {
        0 => Ok(()),
        number => Err(io::Error::from_raw_os_error(number)),
    }
}

fn is(error: &io::Error, errno: Errno) -> bool {
    error.raw_os_error() == Some(errno.raw_os_error())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_chosen_word_is_the_lockdown() {
        for (text, expected) in [
            ("[none] integrity confidentiality\n", Some(Lockdown::None)),
            (
                "none [integrity] confidentiality\n",
                Some(Lockdown::Integrity),
            ),
            (
                "none integrity [confidentiality]\n",
                Some(Lockdown::Confidentiality),
            ),
            ("none\n", None),
        ] {
            assert_eq!(read_lockdown(text).found().copied(), expected, "{text}");
        }
    }
}
