//! The SAs, as the kernel would hold them: each is the body of the NEWSA that describes it now.

use crate::xfrm::sa::{at, build_replay, find, find_mark, parse_sa};
use crate::xfrm::wire::{
    Builder, HEADER_BYTES, WireError, array_at, attribute, attributes, flag, kind, put, size,
    u64_at,
};
use crate::xfrm::{
    Progress,
    message::{replay_with, sequence_sent},
};
use crate::xfrm::{SaKey, XfrmCipher, XfrmSa};
use esplane_api::Now;
use std::{collections::BTreeMap, time::Duration};
use zeroize::Zeroizing;

/// One SA.
pub struct SaRecord {
    /// What the process that keeps it calls it.
    pub id: u64,
    /// Which process installed it.
    pub owner: u64,
    /// `struct xfrm_usersa_info` and attributes, without `LASTUSED`.
    body: Zeroizing<Vec<u8>>,
    /// When it last carried a packet, in seconds since 1970.
    pub last_used: u64,
    /// When it is to be renewed; `None` once that is said.
    pub soft_at: Option<Duration>,
    /// When it ends.
    pub hard_at: Option<Duration>,
}

impl SaRecord {
    /// From what a NEWSA, UPDSA or a kept record says. Its age counts from the `add_time` that it
    /// holds, else from now.
    pub fn new(now: Now, owner: u64, id: u64, body: &[u8]) -> Result<Self, WireError> {
        let attribute_bytes = &body[size::USERSA_INFO..];
        let last_used = match find(attribute_bytes, attribute::LASTUSED)? {
            Some(value) if value.len() >= 8 => u64_at(value, 0),
            _ => 0,
        };
        let carried = match find(attribute_bytes, attribute::LTIME_VAL)? {
            // MOBIKE: the SA goes on under other addresses.
            Some(value) if value.len() >= 32 => array_at::<32>(value, 0),
            _ => array_at(body, at::CARRIED),
        };
        let mut kept = without(body, &[attribute::LASTUSED, attribute::LTIME_VAL])?;
        put(&mut kept, at::CARRIED, &carried);
        let unix = now.unix.as_secs();
        let added = match u64_at(&kept, at::CARRIED + 16) {
            0 => unix,
            added => added,
        };
        put(&mut kept, at::CARRIED + 16, &added.to_ne_bytes());
        let attribute_bytes = &kept[size::USERSA_INFO..];
        if find(attribute_bytes, attribute::REPLAY_ESN_VAL)?.is_none()
            && find(attribute_bytes, attribute::REPLAY_VAL)?.is_none()
        {
            let window = u32::from(kept[at::WINDOW]);
            let (kind, value) = build_replay(0, 0, window, false);
            kept = with(&kept, kind, &value)?;
        }
        let due = |seconds: u64| {
            let left = added.saturating_add(seconds).saturating_sub(unix);
            (seconds != 0 && seconds != u64::MAX).then(|| now.monotonic + Duration::from_secs(left))
        };
        let (soft, hard) = (
            u64_at(&kept, at::LIMITS + 32),
            u64_at(&kept, at::LIMITS + 40),
        );
        Ok(Self {
            id,
            owner,
            last_used,
            soft_at: due(soft),
            hard_at: due(hard),
            body: kept,
        })
    }

    /// As the importer is told of it.
    pub fn told(&self) -> Option<XfrmSa> {
        parse_sa(&self.body).ok().flatten()
    }

    /// As charon is told of it, and as it is kept: NEWSA, with what has been carried.
    pub fn message(&self, flags: u16, sequence: u32, port: u32) -> Zeroizing<Vec<u8>> {
        let builder = Builder::new(kind::NEWSA, flags, sequence, &self.body).port(port);
        match self.last_used {
            0 => builder.finish(),
            last => builder
                .attribute(attribute::LASTUSED, &last.to_ne_bytes())
                .finish(),
        }
    }

    /// The answer to GETAE: replay state and what has been carried.
    pub fn progress_message(
        &self,
        key: &SaKey,
        sequence: u32,
        port: u32,
    ) -> Result<Zeroizing<Vec<u8>>, WireError> {
        let mut fixed = [0; size::AEVENT_ID];
        put(&mut fixed, 0, &crate::xfrm::sa::usersa_id(key));
        put(&mut fixed, 24, &self.body[at::SOURCE..at::SOURCE + 16]);
        put(&mut fixed, 44, &self.body[at::REQID..at::REQID + 4]);
        let (kind_of_replay, value) = replay_with(&self.body, &Progress::default())?;
        Ok(Builder::new(kind::NEWAE, 0, sequence, &fixed)
            .port(port)
            .attribute(kind_of_replay, &value)
            .attribute(
                attribute::LTIME_VAL,
                &self.body[at::CARRIED..at::CARRIED + 32],
            )
            .finish())
    }

    /// Takes what has been carried and reserved; whether anything has changed.
    pub fn store(&mut self, now: Now, progress: &Progress) -> Result<bool, WireError> {
        let unix = now.unix.as_secs();
        let before = (
            u64_at(&self.body, at::CARRIED + 8),
            u64_at(&self.body, at::CARRIED),
        );
        let (attribute_kind, value) = replay_with(&self.body, progress)?;
        let there = find(&self.body[size::USERSA_INFO..], attribute_kind)?;
        let replay_stays = there == Some(&value[..]);
        if before == (progress.packets, progress.bytes) && replay_stays {
            return Ok(false);
        }
        if progress.packets > before.0 {
            self.last_used = unix;
            if u64_at(&self.body, at::CARRIED + 24) == 0 {
                put(&mut self.body, at::CARRIED + 24, &unix.to_ne_bytes());
            }
        }
        put(&mut self.body, at::CARRIED, &progress.bytes.to_ne_bytes());
        put(
            &mut self.body,
            at::CARRIED + 8,
            &progress.packets.to_ne_bytes(),
        );
        if !replay_stays {
            self.body = with(&self.body, attribute_kind, &value)?;
        }
        Ok(true)
    }

    /// The last number that was reserved.
    pub fn sequence_sent(&self) -> Result<u64, WireError> {
        sequence_sent(&self.body)
    }

    /// The template it serves.
    pub fn reqid(&self) -> u32 {
        u32::from_ne_bytes(array_at(&self.body, at::REQID))
    }

    /// Whether only its SPI is reserved.
    pub fn is_larval(&self) -> bool {
        self.told()
            .is_some_and(|sa| matches!(sa.cipher, XfrmCipher::Larval))
    }

    /// Whether both are one SA: same key, same algorithm.
    pub fn same_secret(&self, other: &Self) -> bool {
        let cipher = |record: &Self| record.told().map(|sa| sa.cipher);
        match (cipher(self), cipher(other)) {
            (Some(XfrmCipher::Aead(a)), Some(XfrmCipher::Aead(b))) => a.same_secret(&b),
            _ => false,
        }
    }

    /// Takes over what another, the same SA under older parameters, has carried and reserved.
    pub fn continue_from(&mut self, older: &Self) -> Result<(), WireError> {
        put(
            &mut self.body,
            at::CARRIED,
            &older.body[at::CARRIED..at::CARRIED + 32],
        );
        self.last_used = older.last_used;
        let (attribute_kind, value) = replay_with(&older.body, &Progress::default())?;
        self.body = without(
            &self.body,
            &[attribute::REPLAY_VAL, attribute::REPLAY_ESN_VAL],
        )?;
        self.body = with(&self.body, attribute_kind, &value)?;
        Ok(())
    }
}

/// All of them.
#[derive(Default)]
pub struct Sad(BTreeMap<SaKey, SaRecord>);

impl Sad {
    /// The SA that a request names: by address and SPI, and where its own mark has a mask, by that
    /// (`xfrm_state_lookup`).
    pub fn find(&self, named: &SaKey) -> Option<SaKey> {
        let lowest = SaKey {
            mark: (0, 0),
            ..*named
        };
        let highest = SaKey {
            mark: (u32::MAX, u32::MAX),
            ..*named
        };
        let asked = named.mark.0 & named.mark.1;
        self.0
            .range(lowest..=highest)
            .map(|(key, _)| *key)
            .find(|key| asked & key.mark.1 == key.mark.0)
    }

    /// That one.
    pub fn get(&self, key: &SaKey) -> Option<&SaRecord> {
        self.0.get(key)
    }

    /// That one, to be changed.
    pub fn get_mut(&mut self, key: &SaKey) -> Option<&mut SaRecord> {
        self.0.get_mut(key)
    }

    /// Adds or replaces.
    pub fn insert(&mut self, key: SaKey, record: SaRecord) {
        self.0.insert(key, record);
    }

    /// Takes it out.
    pub fn remove(&mut self, key: &SaKey) -> Option<SaRecord> {
        self.0.remove(key)
    }

    /// All, in order.
    pub fn iter(&self) -> impl Iterator<Item = (&SaKey, &SaRecord)> {
        self.0.iter()
    }

    /// All, to be changed.
    pub fn iter_mut(&mut self) -> impl Iterator<Item = (&SaKey, &mut SaRecord)> {
        self.0.iter_mut()
    }

    /// How many.
    pub fn len(&self) -> usize {
        self.0.len()
    }
}

/// The key of an SA that is told by a NEWSA's body.
pub fn key_of(body: &[u8]) -> Result<Option<SaKey>, WireError> {
    let Some(sa) = parse_sa(body)? else {
        return Ok(None);
    };
    let mark = find_mark(&body[size::USERSA_INFO..])?;
    Ok(Some(SaKey { mark, ..sa.key }))
}

/// A body with one attribute replaced or added.
fn with(body: &[u8], attribute_kind: u16, value: &[u8]) -> Result<Zeroizing<Vec<u8>>, WireError> {
    let bare = without(body, &[attribute_kind])?;
    let whole = Builder::new(kind::NEWSA, 0, 0, &bare)
        .attribute(attribute_kind, value)
        .finish();
    Ok(Zeroizing::new(whole[HEADER_BYTES..].to_vec()))
}

/// A body without some attributes.
fn without(body: &[u8], unwanted: &[u16]) -> Result<Zeroizing<Vec<u8>>, WireError> {
    let mut builder = Builder::new(kind::NEWSA, flag::REQUEST, 0, &body[..size::USERSA_INFO]);
    for one in attributes(&body[size::USERSA_INFO..]) {
        let (attribute_kind, value) = one?;
        if !unwanted.contains(&attribute_kind) {
            builder = builder.attribute(attribute_kind, value);
        }
    }
    Ok(Zeroizing::new(builder.finish()[HEADER_BYTES..].to_vec()))
}
