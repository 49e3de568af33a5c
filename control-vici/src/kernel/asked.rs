//! What charon asks of the kernel, and above all of SAs.

use super::frame::Kind;
use super::sad::{self, SaRecord};
use super::{ClientId, Errno, Kernel, KernelNotice, KernelOutput, LARVAL_SECONDS};
use crate::xfrm::message::parse_error;
use crate::xfrm::sa::{at, parse_key, parse_key_before};
use crate::xfrm::wire::{
    Builder, HEADER_BYTES, Message, flag, kind, messages, need, put, size, u32_at,
};
use crate::xfrm::{SaKey, XfrmCipher, XfrmMode};
use esplane_api::{Now, Spi};
use std::time::Duration;
use zeroize::Zeroizing;

/// SAs at most; a gateway has some thousands.
const SAS_MAX: usize = 1 << 16;

impl Kernel {
    pub(super) fn serve(&mut self, now: Now, from: ClientId, socket: u64, datagram: &[u8]) {
        for one in messages(datagram) {
            let Ok(one) = one else { return };
            if let Err(errno) = self.answer(now, from, socket, &one) {
                self.acknowledge(from, socket, &one, errno);
            }
        }
    }

    fn answer(
        &mut self,
        now: Now,
        from: ClientId,
        socket: u64,
        one: &Message<'_>,
    ) -> Result<(), Errno> {
        let owner = self.clients.get(&from).map_or(0, |client| client.instance);
        match one.kind {
            kind::ALLOCSPI => return self.allocate_spi(now, from, socket, one),
            kind::GETSA if one.flags & flag::DUMP == flag::DUMP => {
                return self.dump(from, socket, one);
            }
            kind::GETSA | kind::GETAE => return self.tell_sa(from, socket, one),
            kind::GETSPDINFO => return self.tell_thresholds(from, socket, one),
            kind::GETPOLICY => return self.tell_policy(from, socket, one),
            kind::NEWSA => self.add_sa(now, from, owner, one.body, false)?,
            kind::UPDSA => self.add_sa(now, from, owner, one.body, true)?,
            kind::DELSA => {
                let named = parse_key(one.body)?.ok_or(Errno::SRCH)?;
                let key = self.sas.find(&named).ok_or(Errno::SRCH)?;
                self.forget(&key);
            }
            kind::FLUSHSA => {
                let all: Vec<SaKey> = self.sas.iter().map(|(key, _)| *key).collect();
                all.iter().for_each(|key| self.forget(key));
            }
            kind::NEWPOLICY => self.add_policy(from, owner, one.body, false)?,
            kind::UPDPOLICY => self.add_policy(from, owner, one.body, true)?,
            kind::DELPOLICY => self.delete_policy(one.body)?,
            kind::FLUSHPOLICY => self.flush_policies(),
            // Thresholds of the kernel's hash tables.
            kind::NEWSPDINFO => {}
            // MIGRATE, REPORT and others that change or ask what is not here.
            _ => return Err(Errno::OPNOTSUPP),
        }
        self.acknowledge(from, socket, one, Errno::DONE);
        Ok(())
    }

    fn allocate_spi(
        &mut self,
        now: Now,
        from: ClientId,
        socket: u64,
        one: &Message<'_>,
    ) -> Result<(), Errno> {
        need("xfrm_userspi_info", one.body, size::USERSPI_INFO)?;
        let (lowest, highest) = (u32_at(one.body, 224).max(Spi::MIN), u32_at(one.body, 228));
        if self.sas.len() >= SAS_MAX {
            return Err(Errno::NOBUFS);
        }
        let attributes = &one.body[size::USERSPI_INFO..];
        let mut body = Zeroizing::new([&one.body[..size::USERSA_INFO], attributes].concat());
        let spare = 64; // as many tries: the range is hardly ever half full
        let free = (0..spare).find_map(|_| {
            let width = u64::from(highest.checked_sub(lowest)?) + 1;
            let spi = lowest + (u64::from((self.random)()) % width) as u32;
            put(&mut body, at::SPI, &spi.to_be_bytes());
            let key = sad::key_of(&body).ok()??;
            self.sas.find(&key).is_none().then_some(key)
        });
        let key = free.ok_or(Errno::NOENT)?;
        let owner = self.clients.get(&from).map_or(0, |client| client.instance);
        self.last_id += 1;
        let mut record = SaRecord::new(now, owner, self.last_id, &body)?;
        record.hard_at = Some(now.monotonic + Duration::from_secs(LARVAL_SECONDS));
        let answer = record.message(0, one.sequence, one.port);
        self.sas.insert(key, record);
        self.keep(from, &key);
        self.send(from, Kind::Answer, socket, &answer);
        Ok(())
    }

    fn add_sa(
        &mut self,
        now: Now,
        from: ClientId,
        owner: u64,
        body: &[u8],
        update: bool,
    ) -> Result<(), Errno> {
        let key = sad::key_of(body)?.ok_or(Errno::OPNOTSUPP)?;
        let older = self.sas.find(&key);
        if older.is_none() && update {
            return Err(Errno::SRCH);
        }
        self.last_id += 1;
        let mut record = SaRecord::new(now, owner, self.last_id, body)?;
        self.refuse_foreign(&record)?;
        if let Some(older) = older
            .and_then(|key| self.sas.get(&key))
            .filter(|older| !older.is_larval())
        {
            match (update, older.same_secret(&record)) {
                // Asked again, after Esplane was away: done already.
                (false, true) => return Ok(()),
                (false, false) => return Err(Errno::EXIST),
                // Another key under the same name would be another SA.
                (true, false) => return Err(Errno::INVAL),
                (true, true) => record.continue_from(older)?,
            }
        }
        if older.is_none() && self.sas.len() >= SAS_MAX {
            return Err(Errno::NOBUFS);
        }
        if let Some(older) = older.and_then(|key| self.sas.remove(&key)) {
            self.drop_kept(older.owner, older.id);
        }
        self.sas.insert(key, record);
        self.keep(from, &key);
        self.installed(&key);
        Ok(())
    }

    /// Nobody but Esplane is here to carry it.
    fn refuse_foreign(&mut self, record: &SaRecord) -> Result<(), Errno> {
        let sa = record.told().ok_or(Errno::INVAL)?;
        let what = match (&sa.cipher, sa.mode) {
            (XfrmCipher::Aead(_), XfrmMode::Tunnel) => return Ok(()),
            (XfrmCipher::Unsupported(names), _) => names.clone(),
            (_, XfrmMode::Transport) => "transport mode".to_owned(),
            (_, XfrmMode::Other(number)) => format!("mode {number}"),
            (XfrmCipher::Concealed(_), _) => "a key of zeros".to_owned(),
            (XfrmCipher::Larval, _) => return Err(Errno::INVAL),
        };
        let notice = KernelNotice::Refused { what };
        self.outputs.push_back(KernelOutput::Notice(notice));
        Err(Errno::NOSYS)
    }

    fn tell_sa(&mut self, from: ClientId, socket: u64, one: &Message<'_>) -> Result<(), Errno> {
        let fixed = match one.kind {
            kind::GETAE => size::AEVENT_ID,
            _ => size::USERSA_ID,
        };
        let named = parse_key_before(one.body, fixed)?.ok_or(Errno::SRCH)?;
        let key = self.sas.find(&named).ok_or(Errno::SRCH)?;
        let record = self.sas.get(&key).ok_or(Errno::SRCH)?;
        let answer = match one.kind {
            kind::GETAE => record.progress_message(&key, one.sequence, one.port)?,
            _ => record.message(0, one.sequence, one.port),
        };
        self.send(from, Kind::Answer, socket, &answer);
        Ok(())
    }

    fn dump(&mut self, from: ClientId, socket: u64, one: &Message<'_>) -> Result<(), Errno> {
        let tell =
            |(_, record): (_, &SaRecord)| record.message(flag::MULTI, one.sequence, one.port);
        let parts: Vec<_> = self.sas.iter().map(tell).collect();
        for part in parts {
            self.send(from, Kind::Answer, socket, &part);
        }
        let done = Builder::new(kind::DONE, flag::MULTI, one.sequence, &[0; 4])
            .port(one.port)
            .finish();
        self.send(from, Kind::Answer, socket, &done);
        Ok(())
    }

    /// NLMSG_ERROR: the outcome, and the header of what it answers.
    fn acknowledge(&mut self, to: ClientId, socket: u64, one: &Message<'_>, errno: Errno) {
        let mut fixed = [0; 4 + HEADER_BYTES];
        put(&mut fixed, 0, &(-errno.0).to_ne_bytes());
        put(
            &mut fixed,
            4,
            &((HEADER_BYTES + one.body.len()) as u32).to_ne_bytes(),
        );
        put(&mut fixed, 8, &one.kind.to_ne_bytes());
        put(&mut fixed, 10, &one.flags.to_ne_bytes());
        put(&mut fixed, 12, &one.sequence.to_ne_bytes());
        put(&mut fixed, 16, &one.port.to_ne_bytes());
        debug_assert_eq!(parse_error(&fixed), Ok(errno.0));
        let message = Builder::new(kind::ERROR, flag::CAPPED, one.sequence, &fixed)
            .port(one.port)
            .finish();
        self.send(to, Kind::Answer, socket, &message);
    }
}
