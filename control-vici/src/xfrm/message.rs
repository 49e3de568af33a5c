//! Messages: what the kernel tells, read; what it is asked, written.

use super::sa::{ReplayEsn, at, find, find_mark, parse_key, parse_sa, usersa_id, with_mark};
use super::wire::{
    Builder, Message, PROTO_ESP, STATE_ESN, UNLIMITED, WireError, array_at, attribute, family_of,
    flag, kind, need, put, put_address, size, u16_at, u32_at,
};
use super::{Progress, SaKey, XfrmEvent, XfrmSa};
use esplane_api::{SelectorPair, TrafficSelector};
use std::net::{IpAddr, SocketAddr};
use zeroize::Zeroizing;

/// `XFRM_POLICY_OUT`.
const POLICY_OUT: u8 = 1;

/// Reads what is told to all who listen. `None` for what is not about an ESP SA.
pub fn parse_event(message: &Message<'_>) -> Result<Option<XfrmEvent>, WireError> {
    let body = message.body;
    Ok(match message.kind {
        kind::NEWSA | kind::UPDSA => parse_sa(body)?.map(XfrmEvent::Installed),
        kind::DELSA => parse_key(body)?.map(XfrmEvent::Removed),
        kind::FLUSHSA => {
            need("xfrm_usersa_flush", body, 1)?;
            // 0 and 255 (IPSEC_PROTO_ANY) are every protocol.
            matches!(body[0], 0 | PROTO_ESP | 255).then_some(XfrmEvent::Flushed)
        }
        kind::EXPIRE => parse_expire(body)?.map(|(key, hard)| XfrmEvent::Expired { key, hard }),
        _ => None,
    })
}

/// Reads `struct xfrm_user_expire`: whose limit, and whether it has ended.
pub fn parse_expire(body: &[u8]) -> Result<Option<(SaKey, bool)>, WireError> {
    need("xfrm_user_expire", body, size::USER_EXPIRE)?;
    let mut id = [0; size::USERSA_ID];
    put(&mut id, 0, &body[at::DESTINATION..at::DESTINATION + 20]);
    put(&mut id, 20, &u16_at(body, at::FAMILY).to_ne_bytes());
    id[22] = body[at::PROTO];
    let hard = body[size::USERSA_INFO] != 0;
    Ok(match parse_key(&id)? {
        None => None,
        Some(key) => {
            let mark = find_mark(&body[size::USER_EXPIRE..])?;
            Some((SaKey { mark, ..key }, hard))
        }
    })
}

/// The outcome in `NLMSG_ERROR`: 0 for done, else `errno`.
pub fn parse_error(body: &[u8]) -> Result<i32, WireError> {
    need("NLMSG_ERROR", body, 4)?;
    Ok(i32::from_ne_bytes(array_at(body, 0)).saturating_neg())
}

/// Asks for every SA.
pub fn dump(sequence: u32) -> Zeroizing<Vec<u8>> {
    Builder::new(
        kind::GETSA,
        flag::REQUEST | flag::DUMP,
        sequence,
        &[0; size::USERSA_ID],
    )
    .finish()
}

/// Asks for one SA.
pub fn get(sequence: u32, key: &SaKey) -> Zeroizing<Vec<u8>> {
    with_mark(
        Builder::new(kind::GETSA, flag::REQUEST, sequence, &usersa_id(key)),
        key.mark,
    )
    .finish()
}

/// Stores in an SA that is there: `NEWAE`. Starts from the SA as `GETSA` has just told it, so that
/// its window and its times stay.
pub fn store(
    sequence: u32,
    key: &SaKey,
    found: &[u8],
    progress: &Progress,
) -> Result<Zeroizing<Vec<u8>>, WireError> {
    need("xfrm_usersa_info", found, size::USERSA_INFO)?;
    let mut fixed = [0; size::AEVENT_ID];
    put(&mut fixed, 0, &usersa_id(key));
    let flags = flag::REQUEST | flag::ACK | flag::REPLACE;
    let mut builder = Builder::new(kind::NEWAE, flags, sequence, &fixed);
    let mut carried: [u8; 32] = array_at(found, at::CARRIED);
    put(&mut carried, 0, &progress.bytes.to_ne_bytes());
    put(&mut carried, 8, &progress.packets.to_ne_bytes());
    builder = builder.attribute(attribute::LTIME_VAL, &carried);
    if progress.sent.is_some() || progress.received.is_some() {
        let (kind, value) = replay_with(found, progress)?;
        builder = builder.attribute(kind, &value);
    }
    Ok(with_mark(builder, key.mark).finish())
}

/// The replay state of an SA (the body of NEWSA), with other numbers: the attribute and its value.
pub fn replay_with(found: &[u8], progress: &Progress) -> Result<(u16, Vec<u8>), WireError> {
    need("xfrm_usersa_info", found, size::USERSA_INFO)?;
    let esn = found[at::FLAGS] & STATE_ESN != 0;
    for number in [progress.sent, progress.received].into_iter().flatten() {
        if !esn && number > u64::from(u32::MAX) {
            let part = "a sequence number of an SA without ESN";
            return Err(WireError::Value {
                part,
                value: number,
            });
        }
    }
    let there = &found[size::USERSA_INFO..];
    // An SA with the wide form keeps it, ESN or not; the kernel ignores the narrow one there.
    if let Some(value) = find(there, attribute::REPLAY_ESN_VAL)? {
        ReplayEsn::read(value)?;
        let mut value = value.to_vec();
        if let Some(sent) = progress.sent {
            ReplayEsn::put_sent(&mut value, sent);
        }
        if let Some(received) = progress.received {
            ReplayEsn::put_received(&mut value, received);
        }
        return Ok((attribute::REPLAY_ESN_VAL, value));
    }
    let mut value = vec![0; 12];
    if let Some(there) = find(there, attribute::REPLAY_VAL)? {
        need("XFRMA_REPLAY_VAL", there, 12)?;
        value.copy_from_slice(&there[..12]);
    }
    for (at, number) in [(0, progress.sent), (4, progress.received)] {
        if let Some(number) = number {
            put(&mut value, at, &(number as u32).to_ne_bytes());
        }
    }
    Ok((attribute::REPLAY_VAL, value))
}

/// Says that a limit of an SA is reached.
pub fn expire(sequence: u32, key: &SaKey, hard: bool) -> Zeroizing<Vec<u8>> {
    let fixed = user_expire(key, hard);
    let flags = flag::REQUEST | flag::ACK;
    with_mark(
        Builder::new(kind::EXPIRE, flags, sequence, &fixed),
        key.mark,
    )
    .finish()
}

/// What all who listen are told when a limit is reached.
pub fn expired(sa: &XfrmSa, hard: bool) -> Zeroizing<Vec<u8>> {
    let mut fixed = user_expire(&sa.key, hard);
    put_address(&mut fixed, at::SOURCE, sa.source);
    put(&mut fixed, at::REQID, &sa.reqid.to_ne_bytes());
    with_mark(Builder::new(kind::EXPIRE, 0, 0, &fixed), sa.key.mark).finish()
}

/// What all who listen are told when a peer's address has changed; `None` for what is not ESP in UDP.
pub fn mapping(sa: &XfrmSa, remote: SocketAddr) -> Option<Zeroizing<Vec<u8>>> {
    let encap = sa.encap?;
    if remote.is_ipv4() != sa.key.destination.is_ipv4() {
        return None;
    }
    let mut fixed = [0; size::USER_MAPPING];
    put(&mut fixed, 0, &usersa_id(&sa.key));
    put(&mut fixed, 24, &sa.reqid.to_ne_bytes());
    put_address(&mut fixed, 28, sa.source);
    put_address(&mut fixed, 44, remote.ip());
    put(&mut fixed, 60, &encap.source_port.to_be_bytes());
    put(&mut fixed, 62, &remote.port().to_be_bytes());
    Some(Builder::new(kind::MAPPING, 0, 0, &fixed).finish())
}

/// `struct xfrm_user_expire` that only names its SA.
fn user_expire(key: &SaKey, hard: bool) -> [u8; size::USER_EXPIRE] {
    let mut fixed = [0; size::USER_EXPIRE];
    put(&mut fixed, at::DESTINATION, &usersa_id(key)[..20]);
    fixed[at::PROTO] = PROTO_ESP;
    put(
        &mut fixed,
        at::FAMILY,
        &family_of(key.destination).to_ne_bytes(),
    );
    fixed[size::USERSA_INFO] = u8::from(hard);
    fixed
}

/// Says that packets wait for an SA. `ends`: ours, the peer's.
pub fn acquire(
    sequence: u32,
    reqid: u32,
    ends: (IpAddr, IpAddr),
    selectors: &SelectorPair,
) -> Zeroizing<Vec<u8>> {
    let (source, destination) = ends;
    let selector = selector(selectors);
    let mut fixed = [0; size::USER_ACQUIRE];
    put_address(&mut fixed, 0, destination);
    fixed[20] = PROTO_ESP;
    put_address(&mut fixed, 24, source);
    put(&mut fixed, 40, &selector);
    put(&mut fixed, 96, &selector); // the policy begins with its own
    for limit in 0..4 {
        put(
            &mut fixed,
            96 + size::SELECTOR + 8 * limit,
            &UNLIMITED.to_ne_bytes(),
        );
    }
    fixed[96 + 160] = POLICY_OUT;
    for algorithms in [264, 268, 272] {
        put(&mut fixed, algorithms, &u32::MAX.to_ne_bytes());
    }
    let flags = flag::REQUEST | flag::ACK;
    Builder::new(kind::ACQUIRE, flags, sequence, &fixed)
        .attribute(attribute::TMPL, &template(reqid, ends))
        .finish()
}

/// `struct xfrm_user_tmpl` of a tunnel with ESP.
fn template(reqid: u32, (source, destination): (IpAddr, IpAddr)) -> [u8; size::USER_TMPL] {
    let mut template = [0; size::USER_TMPL];
    put_address(&mut template, 0, destination);
    template[20] = PROTO_ESP;
    put(&mut template, 24, &family_of(destination).to_ne_bytes());
    put_address(&mut template, 28, source);
    put(&mut template, 44, &reqid.to_ne_bytes());
    template[48] = 1; // tunnel
    for algorithms in [52, 56, 60] {
        put(&mut template, algorithms, &u32::MAX.to_ne_bytes());
    }
    template
}

/// `struct xfrm_selector` of packets from our side to the far one: the smallest networks around both.
fn selector(pair: &SelectorPair) -> [u8; size::SELECTOR] {
    let mut bytes = [0; size::SELECTOR];
    let port = |selector: &TrafficSelector| {
        let ports = selector.ports();
        match ports.start() == ports.end() {
            true => (*ports.start(), u16::MAX),
            false => (0, 0),
        }
    };
    put_address(&mut bytes, 0, pair.remote.first());
    put_address(&mut bytes, 16, pair.local.first());
    for (at, (port, mask)) in [(32, port(&pair.remote)), (36, port(&pair.local))] {
        put(&mut bytes, at, &port.to_be_bytes());
        put(&mut bytes, at + 2, &mask.to_be_bytes());
    }
    put(
        &mut bytes,
        40,
        &family_of(pair.remote.first()).to_ne_bytes(),
    );
    bytes[42] = prefix_length(&pair.remote);
    bytes[43] = prefix_length(&pair.local);
    bytes[44] = pair
        .remote
        .protocol()
        .or(pair.local.protocol())
        .unwrap_or(0);
    bytes
}

/// How many bits all addresses of a selector have in common.
fn prefix_length(selector: &TrafficSelector) -> u8 {
    match (selector.first(), selector.last()) {
        (IpAddr::V4(a), IpAddr::V4(b)) => (a.to_bits() ^ b.to_bits()).leading_zeros() as u8,
        (IpAddr::V6(a), IpAddr::V6(b)) => (a.to_bits() ^ b.to_bits()).leading_zeros() as u8,
        _ => 0, // cannot be made: both ends share a family
    }
}

/// The last number sent, of an SA as `GETSA` tells it.
pub fn sequence_sent(found: &[u8]) -> Result<u64, WireError> {
    need("xfrm_usersa_info", found, size::USERSA_INFO)?;
    let there = &found[size::USERSA_INFO..];
    if let Some(value) = find(there, attribute::REPLAY_ESN_VAL)? {
        return Ok(ReplayEsn::read(value)?.sent);
    }
    Ok(match find(there, attribute::REPLAY_VAL)? {
        Some(value) => {
            need("XFRMA_REPLAY_VAL", value, 12)?;
            u32_at(value, 0).into()
        }
        None => 0,
    })
}
