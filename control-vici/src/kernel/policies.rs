//! What charon asks of policies.

use super::frame::Kind;
use super::sad::SaRecord;
use super::spd::{PolicyKey, PolicyRecord};
use super::{ClientId, Errno, Kernel};
use crate::xfrm::wire::{Builder, Message, attribute, kind};

/// Policies at most; three or so for each child.
const POLICIES_MAX: usize = 1 << 16;

impl Kernel {
    pub(super) fn add_policy(
        &mut self,
        from: ClientId,
        owner: u64,
        body: &[u8],
        update: bool,
    ) -> Result<(), Errno> {
        let key = PolicyKey::of_policy(body)?;
        let older = self.policies.0.get(&key);
        if !update && older.is_some_and(|older| older.is(body)) {
            return Ok(()); // asked again, after Esplane was away
        }
        let older = older.map(|older| (older.owner, older.id));
        match older {
            Some(_) if !update => return Err(Errno::EXIST),
            None if self.policies.0.len() >= POLICIES_MAX => return Err(Errno::NOBUFS),
            _ => {}
        }
        if let Some((owner, id)) = older {
            self.drop_kept(owner, id);
        }
        self.last_id += 1;
        let record = PolicyRecord::new(owner, self.last_id, body);
        let message = record.message(0, 0, 0, 0);
        self.send(from, Kind::Keep, self.last_id, &message);
        self.policies.0.insert(key, record);
        Ok(())
    }

    pub(super) fn take_policy(&mut self, owner: u64, id: u64, body: &[u8]) -> Result<(), Errno> {
        let key = PolicyKey::of_policy(body)?;
        self.policies
            .0
            .insert(key, PolicyRecord::new(owner, id, body));
        Ok(())
    }

    pub(super) fn delete_policy(&mut self, body: &[u8]) -> Result<(), Errno> {
        let key = PolicyKey::of_id(body)?;
        let record = self.policies.0.remove(&key).ok_or(Errno::NOENT)?;
        self.drop_kept(record.owner, record.id);
        Ok(())
    }

    pub(super) fn flush_policies(&mut self) {
        for (_, record) in std::mem::take(&mut self.policies.0) {
            self.drop_kept(record.owner, record.id);
        }
    }

    /// With the time at which one of its SAs was last used.
    pub(super) fn tell_policy(
        &mut self,
        from: ClientId,
        socket: u64,
        one: &Message<'_>,
    ) -> Result<(), Errno> {
        let key = PolicyKey::of_id(one.body)?;
        let policy = self.policies.0.get(&key).ok_or(Errno::NOENT)?;
        let serving = self
            .sas
            .iter()
            .filter(|(_, sa)| sa.reqid() == policy.reqid());
        let last_used = serving.map(|(_, sa): (_, &SaRecord)| sa.last_used).max();
        let answer = policy.message(0, one.sequence, one.port, last_used.unwrap_or(0));
        self.send(from, Kind::Answer, socket, &answer);
        Ok(())
    }

    /// The kernel's thresholds of its hash tables, as they are in a kernel; charon asks before it changes them.
    pub(super) fn tell_thresholds(
        &mut self,
        from: ClientId,
        socket: u64,
        one: &Message<'_>,
    ) -> Result<(), Errno> {
        let answer = Builder::new(kind::NEWSPDINFO, 0, one.sequence, &[0; 4])
            .port(one.port)
            .attribute(attribute::SPD_IPV4_THRESHOLD, &[32, 32])
            .attribute(attribute::SPD_IPV6_THRESHOLD, &[128, 128])
            .finish();
        self.send(from, Kind::Answer, socket, &answer);
        Ok(())
    }
}
