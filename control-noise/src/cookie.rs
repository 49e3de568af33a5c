//! MAC1, MAC2 and cookies: what a stranger must show before any public-key work is done for it.
//!
//! MAC1 is keyed with the receiver's public key: whoever sends it knows at least whom it talks to, and
//! a port scan gets no answer. Under load a message must also carry MAC2, keyed with a cookie that we
//! sent to its source address: then the address is not forged, and can be rate-limited. The cookie is
//! computed from the address and a secret, so nothing is stored for a stranger. All as WireGuard does.

use crate::{
    PublicKey,
    random::Random,
    timers::{COOKIE_SECRET_AGE, COOKIE_USABLE},
    wire::{COOKIE_BYTES, COOKIE_NONCE_BYTES, CookieReply, Initiation, MAC_BYTES, cookie_reply},
};
use blake2::{
    Blake2s256, Blake2sMac,
    digest::{Digest, KeyInit, Mac, consts::U16},
};
use chacha20poly1305::{XChaCha20Poly1305, aead::Aead, aead::Payload};
use std::{
    net::{IpAddr, SocketAddr},
    time::Duration,
};
use subtle::ConstantTimeEq;
use zeroize::Zeroizing;

const LABEL_MAC1: &[u8] = b"esplane 1 mac1";
const LABEL_COOKIE: &[u8] = b"esplane 1 cookie";

type Tag = [u8; MAC_BYTES];

/// The two keys that anyone can compute who knows a node's public key.
#[derive(Clone)]
pub(crate) struct PublicMacs {
    mac1_key: [u8; 32],
    cookie_key: [u8; 32],
}

impl PublicMacs {
    pub(crate) fn of(receiver: &PublicKey) -> Self {
        let key = |label: &[u8]| {
            let mut hash = Blake2s256::new();
            hash.update(label);
            hash.update(receiver.as_bytes());
            hash.finalize().into()
        };
        Self {
            mac1_key: key(LABEL_MAC1),
            cookie_key: key(LABEL_COOKIE),
        }
    }

    /// Appends MAC1 over all that is there.
    pub(crate) fn append_mac1(&self, message: &mut Vec<u8>) -> Tag {
        let mac1 = mac(&self.mac1_key, &[message]);
        message.extend_from_slice(&mac1);
        mac1
    }

    pub(crate) fn is_mac1(&self, under_mac1: &[u8], mac1: &[u8]) -> bool {
        mac(&self.mac1_key, &[under_mac1]).ct_eq(mac1).into()
    }

    fn seal_cookie(
        &self,
        nonce: &[u8; COOKIE_NONCE_BYTES],
        mac1: &[u8],
        cookie: &Tag,
    ) -> Option<Vec<u8>> {
        let payload = Payload {
            msg: cookie,
            aad: mac1,
        };
        self.cookie_cipher().encrypt(nonce.into(), payload).ok()
    }

    /// The cookie in a reply to the message that carried `mac1`; `None` if it is not one.
    pub(crate) fn open_cookie(&self, reply: &CookieReply, mac1: &Tag) -> Option<Tag> {
        let payload = Payload {
            msg: reply.sealed,
            aad: mac1,
        };
        let cookie = self
            .cookie_cipher()
            .decrypt(reply.nonce.into(), payload)
            .ok()?;
        cookie.try_into().ok()
    }

    fn cookie_cipher(&self) -> XChaCha20Poly1305 {
        chacha20poly1305::KeyInit::new((&self.cookie_key).into())
    }
}

/// What the receiver of initiations keeps: two secrets, and nothing per sender.
pub(crate) struct CookieMint {
    ours: PublicMacs,
    secret: Zeroizing<[u8; 32]>,
    previous: Zeroizing<[u8; 32]>,
    since: Duration,
}

impl CookieMint {
    pub(crate) fn new(own: &PublicKey, random: &mut Random) -> Self {
        Self {
            ours: PublicMacs::of(own),
            secret: Zeroizing::new(random.bytes()),
            previous: Zeroizing::new(random.bytes()),
            since: Duration::ZERO,
        }
    }

    pub(crate) fn is_mac1(&self, under_mac1: &[u8], mac1: &[u8]) -> bool {
        self.ours.is_mac1(under_mac1, mac1)
    }

    /// Whether the sender has shown a cookie that we sent to its address.
    pub(crate) fn is_mac2(
        &mut self,
        now: Duration,
        from: SocketAddr,
        message: &Initiation,
        random: &mut Random,
    ) -> bool {
        self.rotate(now, random);
        [&self.secret, &self.previous].into_iter().any(|secret| {
            let cookie = cookie_for(secret, from);
            bool::from(mac(&cookie, &[message.under_mac2]).ct_eq(message.mac2))
        })
    }

    /// The answer to an initiation without a cookie: 76 bytes for at least 148.
    pub(crate) fn reply(
        &mut self,
        now: Duration,
        from: SocketAddr,
        message: &Initiation,
        random: &mut Random,
    ) -> Option<Vec<u8>> {
        self.rotate(now, random);
        let nonce = random.bytes();
        let sealed =
            self.ours
                .seal_cookie(&nonce, message.mac1, &cookie_for(&self.secret, from))?;
        Some(cookie_reply(message.index, &nonce, &sealed))
    }

    fn rotate(&mut self, now: Duration, random: &mut Random) {
        if now.saturating_sub(self.since) >= COOKIE_SECRET_AGE {
            self.previous = std::mem::replace(&mut self.secret, Zeroizing::new(random.bytes()));
            self.since = now;
        }
    }
}

/// What the sender of initiations keeps for one receiver.
#[derive(Clone, Copy)]
pub(crate) struct HeldCookie {
    cookie: Tag,
    received: Duration,
}

impl HeldCookie {
    pub(crate) fn new(cookie: [u8; COOKIE_BYTES], received: Duration) -> Self {
        Self { cookie, received }
    }

    pub(crate) fn is_same(&self, cookie: &[u8; COOKIE_BYTES]) -> bool {
        self.cookie == *cookie
    }
}

/// Appends MAC2: over all that is there with the cookie we hold, zeros if we hold none.
pub(crate) fn append_mac2(message: &mut Vec<u8>, held: Option<HeldCookie>, now: Duration) {
    let mac2 = match held {
        Some(held) if now.saturating_sub(held.received) < COOKIE_USABLE => {
            mac(&held.cookie, &[message])
        }
        _ => [0; MAC_BYTES],
    };
    message.extend_from_slice(&mac2);
}

fn cookie_for(secret: &[u8; 32], from: SocketAddr) -> Tag {
    let port = from.port().to_be_bytes();
    match from.ip() {
        IpAddr::V4(ip) => mac(secret, &[&[4], &ip.octets(), &port]),
        IpAddr::V6(ip) => mac(secret, &[&[6], &ip.octets(), &port]),
    }
}

/// Keyed BLAKE2s with 16 bytes of output. Keys of 16 and 32 bytes only, which it always takes.
fn mac(key: &[u8], parts: &[&[u8]]) -> Tag {
    let Ok(mut mac) = <Blake2sMac<U16> as KeyInit>::new_from_slice(key) else {
        return [0; MAC_BYTES]; // cannot happen: BLAKE2s takes keys of up to 32 bytes
    };
    for part in parts {
        Mac::update(&mut mac, part);
    }
    mac.finalize().into_bytes().into()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{StaticSecretKey, wire::Message};

    fn initiation(cookie: Option<HeldCookie>, now: Duration) -> Vec<u8> {
        let mut message = crate::wire::initiation_header(7, 0).to_vec();
        message.extend_from_slice(&[9; 96]);
        PublicMacs::of(&receiver()).append_mac1(&mut message);
        append_mac2(&mut message, cookie, now);
        message
    }

    fn receiver() -> PublicKey {
        StaticSecretKey::generate([3; 32]).public_key()
    }

    fn parse(message: &[u8]) -> Initiation<'_> {
        match Message::parse(message) {
            Ok(Message::Initiation(initiation)) => initiation,
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn a_cookie_opens_the_door_for_its_address_and_time_only() {
        let random = &mut Random::from_seed([1; 32]);
        let mut mint = CookieMint::new(&receiver(), random);
        let (here, elsewhere) = (
            "192.0.2.1:4500".parse().unwrap(),
            "192.0.2.1:4501".parse().unwrap(),
        );
        let start = Duration::from_secs(1000);
        let first = initiation(None, start);
        assert!(!mint.is_mac2(start, here, &parse(&first), random));

        let reply = mint.reply(start, here, &parse(&first), random).unwrap();
        let Ok(Message::CookieReply(reply)) = Message::parse(&reply) else {
            panic!("no cookie reply");
        };
        let mac1 = parse(&first).mac1.try_into().unwrap();
        let macs = PublicMacs::of(&receiver());
        assert!(
            macs.open_cookie(&reply, &[0; 16]).is_none(),
            "it answers one message only"
        );
        let cookie = HeldCookie::new(macs.open_cookie(&reply, &mac1).unwrap(), start);

        let shown = initiation(Some(cookie), start);
        assert!(mint.is_mac2(start, here, &parse(&shown), random));
        assert!(!mint.is_mac2(start, elsewhere, &parse(&shown), random));
        let later = start + COOKIE_USABLE - Duration::from_secs(1);
        assert!(mint.is_mac2(
            later,
            here,
            &parse(&initiation(Some(cookie), later)),
            random
        ));
        let too_late = start + COOKIE_USABLE;
        assert_eq!(
            initiation(Some(cookie), too_late)[132..],
            [0; 16],
            "not shown any more"
        );
        for turn in 1..=2 {
            let still_good = mint.is_mac2(
                start + COOKIE_SECRET_AGE * turn,
                here,
                &parse(&shown),
                random,
            );
            assert_eq!(
                still_good,
                turn < 2,
                "the secret is forgotten with the second rotation"
            );
        }
    }
}
