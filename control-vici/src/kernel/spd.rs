//! The policies. Esplane's own follow from traffic selectors; charon's are kept, so that what it
//! added can be asked for, changed and taken away again.

use crate::xfrm::sa::{find, find_mark};
use crate::xfrm::wire::{Builder, WireError, attribute, kind, need, put, size, u32_at, u64_at};
use std::collections::BTreeMap;
use zeroize::Zeroizing;

/// Where `use_time` is in `struct xfrm_userpolicy_info`.
const USE_TIME: usize = 56 + 64 + 24;
const DIRECTION: usize = 160;

/// What names a policy: selector, direction, mark, interface id.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord)]
pub struct PolicyKey {
    selector: [u8; size::SELECTOR],
    direction: u8,
    mark: (u32, u32),
    if_id: u32,
}

impl PolicyKey {
    /// Of NEWPOLICY and UPDPOLICY.
    pub fn of_policy(body: &[u8]) -> Result<Self, WireError> {
        need("xfrm_userpolicy_info", body, size::USERPOLICY_INFO)?;
        Self::new(body, body[DIRECTION], &body[size::USERPOLICY_INFO..])
    }

    /// Of GETPOLICY and DELPOLICY.
    pub fn of_id(body: &[u8]) -> Result<Self, WireError> {
        need("xfrm_userpolicy_id", body, size::USERPOLICY_ID)?;
        Self::new(body, body[60], &body[size::USERPOLICY_ID..])
    }

    fn new(body: &[u8], direction: u8, attribute_bytes: &[u8]) -> Result<Self, WireError> {
        let mut selector = [0; size::SELECTOR];
        selector.copy_from_slice(&body[..size::SELECTOR]);
        let if_id = match find(attribute_bytes, attribute::IF_ID)? {
            Some(value) if value.len() >= 4 => u32_at(value, 0),
            _ => 0,
        };
        let mark = find_mark(attribute_bytes)?;
        Ok(Self {
            selector,
            direction,
            mark,
            if_id,
        })
    }
}

/// One policy.
pub struct PolicyRecord {
    /// What the process that keeps it calls it.
    pub id: u64,
    /// Which process installed it.
    pub owner: u64,
    /// `struct xfrm_userpolicy_info` and attributes.
    body: Vec<u8>,
}

impl PolicyRecord {
    /// From the body of NEWPOLICY or UPDPOLICY.
    pub fn new(owner: u64, id: u64, body: &[u8]) -> Self {
        Self {
            id,
            owner,
            body: body.to_vec(),
        }
    }

    /// Whether it is this very one.
    pub fn is(&self, body: &[u8]) -> bool {
        self.body == body
    }

    /// Which SAs serve it: the reqid of its first template; 0 where it has none.
    pub fn reqid(&self) -> u32 {
        match find(&self.body[size::USERPOLICY_INFO..], attribute::TMPL) {
            Ok(Some(value)) if value.len() >= size::USER_TMPL => u32_at(value, 44),
            _ => 0,
        }
    }

    /// As charon is told of it, and as it is kept: NEWPOLICY.
    pub fn message(
        &self,
        flags: u16,
        sequence: u32,
        port: u32,
        last_used: u64,
    ) -> Zeroizing<Vec<u8>> {
        let mut body = self.body.clone();
        let last_used = last_used.max(u64_at(&body, USE_TIME));
        put(&mut body, USE_TIME, &last_used.to_ne_bytes());
        Builder::new(kind::NEWPOLICY, flags, sequence, &body)
            .port(port)
            .finish()
    }
}

/// All of them.
#[derive(Default)]
pub struct Spd(pub BTreeMap<PolicyKey, PolicyRecord>);
