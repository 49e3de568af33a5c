//! Sequence numbers of keys that outlive the process.
//!
//! The IV of an ESP packet is its sequence number (RFC 4106 §3.1), so a number used twice under one
//! key gives the key away. A static key stays the same over restarts; its numbers must go on. Before
//! any number is used, a file says durably up to where numbers may be used; after a restart, or a
//! power cut, sending goes on behind that.
//!
//! ```text
//!   STATE_DIR/sequence/lock                     held while a daemon runs
//!   STATE_DIR/sequence/FINGERPRINT.reserved     one per key:
//!
//!       esplane sequence reservation 1
//!       spi 0x0000c0de                          for people
//!       reserved_until 8388608
//!       check 5d0b…                             over the lines above
//! ```
//!
//! The file's name is a fingerprint of suite, key and salt, not of the SPI: the same key under
//! another SPI counts on, and two SAs cannot use one key at once. A file is replaced as a whole:
//! written aside, synced, renamed, directory synced.

use blake2::{Blake2s256, Digest};
use esplane_api::{KeyMaterial, SaId, SaParams, SequenceStart, Spi};
use std::{
    collections::HashMap,
    fs::{self, DirBuilder, File, OpenOptions, TryLockError},
    io::{self, Write},
    os::unix::fs::{DirBuilderExt, OpenOptionsExt},
    path::{Path, PathBuf},
};

/// Numbers reserved at once for an SA with 32-bit numbers: a thousand crashes use them up.
pub const CHUNK_32: u64 = 1 << 22;
/// Numbers reserved at once with ESN: seconds of traffic at full speed, and still so few that
/// a receiver who infers the high half follows the jump after a crash (RFC 4303 Appendix A2).
pub const CHUNK_ESN: u64 = 1 << 26;

const MAGIC: &str = "esplane sequence reservation 1";

/// The reservations of one daemon, locked against any other.
///
/// Synchronous file code: a few milliseconds a call, so not for a worker nor the async runtime.
#[derive(Debug)]
pub struct ReservationStore {
    directory: PathBuf,
    /// Locked as long as it is open.
    _lock: File,
    live: HashMap<SaId, Live>,
}

/// A reservation in use.
#[derive(Debug)]
struct Live {
    path: PathBuf,
    spi: Spi,
    /// Up to where the key was used before.
    used_until: u64,
    reserved_until: u64,
    chunk: u64,
    last: u64,
}

/// Why numbers could not be reserved. The SA must not send then.
#[derive(Debug, thiserror::Error)]
pub enum ReservationError {
    /// Another daemon uses the directory.
    #[error(
        "{}: another esplane uses this state directory; two would use the same numbers. Stop it, or give each its own directory and keys", .0.display()
    )]
    Locked(PathBuf),
    /// The disk does not do as told.
    #[error(
        "{}: cannot {doing}: {source}; without a durable reservation a static key must not be used", path.display()
    )]
    Io {
        /// What was tried.
        doing: &'static str,
        /// Where.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// The file is damaged.
    #[error(
        "{}: damaged ({problem}), so it is not known which sequence numbers have been used; give SA {spi} a new key at both ends, or restore the file",
        path.display()
    )]
    Corrupt {
        /// The file.
        path: PathBuf,
        /// The SA that wants it.
        spi: Spi,
        /// What is wrong with it.
        problem: &'static str,
    },
    /// All numbers are reserved.
    #[error(
        "SA {spi} has used up its sequence numbers (RFC 4303 §3.3.3); give it a new key at both ends"
    )]
    Exhausted {
        /// The SA.
        spi: Spi,
    },
    /// One key, two SAs.
    #[error(
        "{sa} has the same key as {other}; two SAs would use the same numbers under one key: give each its own"
    )]
    KeyInUse {
        /// The SA that asks.
        sa: SaId,
        /// The one that has it.
        other: SaId,
    },
    /// It never began.
    #[error("{0} has no reservation to extend")]
    Unknown(SaId),
}

type Result<T> = std::result::Result<T, ReservationError>;

impl ReservationStore {
    /// Opens the reservations below a state directory, making it (mode 0700) where needed.
    pub fn open(state_directory: &Path) -> Result<Self> {
        let directory = state_directory.join("sequence");
        DirBuilder::new()
            .recursive(true)
            .mode(0o700)
            .create(&directory)
            .map_err(|source| failed("make the directory", &directory, source))?;
        let path = directory.join("lock");
        let lock = OpenOptions::new()
            .write(true)
            .create(true)
            .truncate(false)
            .mode(0o600)
            .open(&path)
            .map_err(|source| failed("open the lock file", &path, source))?;
        match lock.try_lock() {
            Ok(()) => {}
            Err(TryLockError::WouldBlock) => return Err(ReservationError::Locked(directory)),
            Err(TryLockError::Error(source)) => return Err(failed("lock", &path, source)),
        }
        // The entry of a directory just made must be as durable as what will be in it.
        sync_directory(state_directory)?;
        Ok(Self {
            directory,
            _lock: lock,
            live: HashMap::new(),
        })
    }

    /// Reserves the first numbers of an outbound SA, behind all that its key may ever have used. The
    /// answer goes into [`SaParams::sequence`].
    pub fn begin(&mut self, sa: &SaParams) -> Result<SequenceStart> {
        self.begin_with(sa, &mut |_| Ok(()))
    }

    /// Reserves more, in answer to [`esplane_api::SaEvent::SequenceLow`]; the answer goes into
    /// [`esplane_api::SaCommand::ExtendSequence`].
    pub fn extend(&mut self, sa: SaId) -> Result<u64> {
        self.extend_with(sa, &mut |_| Ok(()))
    }

    /// Ends a reservation. `last_sent` is the last number that was used, if that is certain: no worker
    /// sends with this SA any more, and none will. The numbers behind it are then given back; else all that
    /// were reserved count as used.
    pub fn finish(&mut self, sa: SaId, last_sent: Option<u64>) -> Result<()> {
        let Some(live) = self.live.remove(&sa) else {
            return Ok(());
        };
        // An SA that has sent nothing says 0, and its key may be older than it.
        match last_sent.map(|last| last.max(live.used_until)) {
            Some(last) if last < live.reserved_until => {
                store(&live.path, live.spi, last, &mut |_| Ok(()))
            }
            _ => Ok(()),
        }
    }

    fn begin_with(&mut self, sa: &SaParams, hook: Hook<'_>) -> Result<SequenceStart> {
        let id = sa.id();
        let name = format!("{}.reserved", fingerprint(&sa.key));
        let path = self.directory.join(name);
        let user = self.live.iter().find(|(_, live)| live.path == path);
        if let Some((other, _)) = user {
            return Err(ReservationError::KeyInUse {
                sa: id,
                other: *other,
            });
        }
        let last = sa.esn.last_sequence();
        let chunk = if last > u64::from(u32::MAX) {
            CHUNK_ESN
        } else {
            CHUNK_32
        };
        let used_until = load(&path, sa.spi)?.unwrap_or(0);
        let reserved_until = next_reservation(used_until, chunk, last, sa.spi)?;
        store(&path, sa.spi, reserved_until, hook)?;
        self.live.insert(
            id,
            Live {
                path,
                spi: sa.spi,
                used_until,
                reserved_until,
                chunk,
                last,
            },
        );
        Ok(SequenceStart {
            first: used_until + 1,
            reserved_until: Some(reserved_until),
        })
    }

    fn extend_with(&mut self, sa: SaId, hook: Hook<'_>) -> Result<u64> {
        let live = self
            .live
            .get_mut(&sa)
            .ok_or(ReservationError::Unknown(sa))?;
        let reserved_until =
            next_reservation(live.reserved_until, live.chunk, live.last, live.spi)?;
        store(&live.path, live.spi, reserved_until, hook)?;
        live.reserved_until = reserved_until;
        Ok(reserved_until)
    }
}

/// One chunk further, or as far as the numbers go.
fn next_reservation(used_until: u64, chunk: u64, last: u64, spi: Spi) -> Result<u64> {
    if used_until >= last {
        return Err(ReservationError::Exhausted { spi });
    }
    Ok(used_until.saturating_add(chunk).min(last))
}

/// Names a key without giving it away: keys have at least 128 bits of entropy, so no one finds them
/// from their hash.
fn fingerprint(key: &KeyMaterial) -> String {
    let mut hash = Blake2s256::new();
    hash.update(b"esplane sequence reservation of a key");
    hash.update(key.suite().name());
    hash.update(key.dangerous_key());
    hash.update(key.dangerous_salt());
    hex(&hash.finalize()[..16])
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

fn contents(spi: Spi, reserved_until: u64) -> String {
    let body = format!("{MAGIC}\nspi {spi}\nreserved_until {reserved_until}\n");
    let check = hex(&Blake2s256::digest(&body)[..8]);
    format!("{body}check {check}\n")
}

/// Up to where the key's numbers may have been used; `None` if never.
fn load(path: &Path, spi: Spi) -> Result<Option<u64>> {
    let text = match fs::read(path) {
        Ok(bytes) => String::from_utf8(bytes).unwrap_or_default(),
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        Err(source) => return Err(failed("read", path, source)),
    };
    let corrupt = |problem| ReservationError::Corrupt {
        path: path.to_owned(),
        spi,
        problem,
    };
    let mut lines = text.lines();
    if lines.next() != Some(MAGIC) {
        return Err(corrupt("the first line is not that of a reservation"));
    }
    let field = |line: Option<&str>, name: &str| {
        line.and_then(|line| line.strip_prefix(name))
            .map(str::to_owned)
    };
    let stored_spi: Spi = field(lines.next(), "spi ")
        .and_then(|spi| spi.parse().ok())
        .ok_or_else(|| corrupt("there is no `spi` in its place"))?;
    let reserved_until = field(lines.next(), "reserved_until ")
        .and_then(|number| number.parse().ok())
        .ok_or_else(|| corrupt("there is no `reserved_until` in its place"))?;
    // Whatever else may have happened to it, the text must be the very one that was written.
    if text != contents(stored_spi, reserved_until) {
        return Err(corrupt("the check sum is wrong"));
    }
    Ok(Some(reserved_until))
}

/// The steps of a durable write. A test may "crash" before any of them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Step {
    Create,
    Write,
    SyncFile,
    Rename,
    SyncDirectory,
    Done,
}

type Hook<'a> = &'a mut dyn FnMut(Step) -> io::Result<()>;

/// Replaces the file as a whole: at any moment it holds the old number or the new one, and once this returns,
/// the new one for good.
fn store(path: &Path, spi: Spi, reserved_until: u64, hook: Hook<'_>) -> Result<()> {
    let aside = path.with_extension("new");
    let text = contents(spi, reserved_until);
    let replace = |hook: Hook<'_>| -> io::Result<()> {
        hook(Step::Create)?;
        let mut file = OpenOptions::new()
            .write(true)
            .create(true)
            .truncate(true)
            .mode(0o600)
            .open(&aside)?;
        hook(Step::Write)?;
        file.write_all(text.as_bytes())?;
        hook(Step::SyncFile)?;
        file.sync_all()?;
        hook(Step::Rename)?;
        fs::rename(&aside, path)
    };
    replace(hook).map_err(|source| failed("write", path, source))?;
    let hooked = |step, hook: Hook<'_>| hook(step).map_err(|source| failed("sync", path, source));
    hooked(Step::SyncDirectory, hook)?;
    sync_directory(path.parent().unwrap_or(Path::new(".")))?;
    hooked(Step::Done, hook)
}

fn sync_directory(path: &Path) -> Result<()> {
    File::open(path)
        .and_then(|directory| directory.sync_all())
        .map_err(|source| failed("sync the directory", path, source))
}

fn failed(doing: &'static str, path: &Path, source: io::Error) -> ReservationError {
    ReservationError::Io {
        doing,
        path: path.to_owned(),
        source,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use esplane_api::{AeadSuite, Direction, Esn, Lifetime, OuterPath, TunnelId, WindowSize};
    use std::ops::RangeInclusive;

    fn outbound(spi: u32, key: u8, esn: Esn) -> SaParams {
        let path = OuterPath::new(
            "192.0.2.1".parse().unwrap(),
            "192.0.2.2".parse().unwrap(),
            None,
        );
        SaParams {
            tunnel: TunnelId(1),
            direction: Direction::Outbound,
            spi: Spi::new(spi).unwrap(),
            key: KeyMaterial::new(AeadSuite::Aes128Gcm16, &[key; 20]).unwrap(),
            esn,
            window: WindowSize::DEFAULT,
            path: path.unwrap(),
            selectors: Vec::new(),
            lifetime: Lifetime::UNLIMITED,
            sequence: SequenceStart::FRESH,
            worker: None,
        }
    }

    fn numbers(start: SequenceStart) -> RangeInclusive<u64> {
        start.first..=start.reserved_until.unwrap()
    }

    /// The file of a key, wherever it is.
    fn file_of(state: &Path, sa: &SaParams) -> PathBuf {
        let name = format!("{}.reserved", fingerprint(&sa.key));
        state.join("sequence").join(name)
    }

    #[test]
    fn a_restart_goes_on_behind_all_that_was_reserved() {
        let state = tempfile::tempdir().unwrap();
        let sa = outbound(0x100, 7, Esn::On);
        let mut store = ReservationStore::open(state.path()).unwrap();
        assert_eq!(numbers(store.begin(&sa).unwrap()), 1..=CHUNK_ESN);
        assert_eq!(store.extend(sa.id()).unwrap(), 2 * CHUNK_ESN);
        drop(store); // killed
        let mut store = ReservationStore::open(state.path()).unwrap();
        assert_eq!(
            numbers(store.begin(&sa).unwrap()),
            2 * CHUNK_ESN + 1..=3 * CHUNK_ESN
        );
    }

    #[test]
    fn an_orderly_end_gives_unused_numbers_back() {
        let state = tempfile::tempdir().unwrap();
        let sa = outbound(0x100, 7, Esn::Off);
        let mut store = ReservationStore::open(state.path()).unwrap();
        store.begin(&sa).unwrap();
        store.finish(sa.id(), Some(1000)).unwrap();
        assert_eq!(store.begin(&sa).unwrap().first, 1001);
        // Nothing was sent this time; that must not bring older numbers back.
        store.finish(sa.id(), Some(0)).unwrap();
        assert_eq!(store.begin(&sa).unwrap().first, 1001);
        store.finish(sa.id(), None).unwrap();
        assert_eq!(store.begin(&sa).unwrap().first, 1000 + CHUNK_32 + 1);
    }

    #[test]
    fn one_key_counts_once_whatever_the_spi() {
        let state = tempfile::tempdir().unwrap();
        let mut store = ReservationStore::open(state.path()).unwrap();
        let (first, second) = (outbound(0x100, 7, Esn::Off), outbound(0x200, 7, Esn::Off));
        store.begin(&first).unwrap();
        let error = store.begin(&second).unwrap_err();
        assert!(
            matches!(error, ReservationError::KeyInUse { .. }),
            "{error}"
        );
        store.finish(first.id(), None).unwrap();
        assert_eq!(store.begin(&second).unwrap().first, CHUNK_32 + 1);
        // Another key has numbers of its own.
        assert_eq!(store.begin(&outbound(0x300, 8, Esn::Off)).unwrap().first, 1);
    }

    #[test]
    fn a_crash_at_any_step_never_lets_a_number_be_used_twice() {
        use Step::*;
        for crash_at in [Create, Write, SyncFile, Rename, SyncDirectory, Done] {
            let state = tempfile::tempdir().unwrap();
            let sa = outbound(0x100, 7, Esn::Off);
            let mut used: Vec<RangeInclusive<u64>> = Vec::new();
            for round in 0..3 {
                let mut store = ReservationStore::open(state.path()).unwrap();
                let mut crash = |step| match step == crash_at && round > 0 {
                    true => Err(io::Error::other("power cut")),
                    false => Ok(()),
                };
                match store.begin_with(&sa, &mut crash) {
                    Ok(start) => used.push(numbers(start)),
                    Err(error) => assert!(round > 0, "{error}"),
                }
                if round == 0 {
                    let failed = store.extend_with(sa.id(), &mut |step| match step == crash_at {
                        true => Err(io::Error::other("power cut")),
                        false => Ok(()),
                    });
                    assert!(failed.is_err());
                    // What could not be reserved is not in use, and trying again is allowed.
                    let until = store.extend(sa.id()).unwrap();
                    used.push(CHUNK_32 + 1..=until);
                }
            }
            let mut store = ReservationStore::open(state.path()).unwrap();
            used.push(numbers(store.begin(&sa).unwrap()));
            for pair in used.windows(2) {
                assert!(pair[0].end() < pair[1].start(), "{crash_at:?}: {used:?}");
            }
        }
    }

    #[test]
    fn the_last_number_of_32_bits_is_reserved_and_none_after_it() {
        let state = tempfile::tempdir().unwrap();
        let sa = outbound(0x100, 7, Esn::Off);
        let mut reservations = ReservationStore::open(state.path()).unwrap();
        let path = file_of(state.path(), &sa);
        let nearly = u64::from(u32::MAX) - 10;
        store(&path, sa.spi, nearly, &mut |_| Ok(())).unwrap();
        let start = reservations.begin(&sa).unwrap();
        assert_eq!(numbers(start), nearly + 1..=u64::from(u32::MAX));
        for _ in 0..2 {
            let error = reservations.extend(sa.id()).unwrap_err();
            assert!(matches!(error, ReservationError::Exhausted { .. }));
            assert!(error.to_string().contains("new key"), "{error}");
        }
        reservations.finish(sa.id(), None).unwrap();
        let error = reservations.begin(&sa).unwrap_err();
        assert!(matches!(error, ReservationError::Exhausted { .. }));
    }

    #[test]
    fn a_damaged_file_is_refused_whatever_the_damage() {
        let state = tempfile::tempdir().unwrap();
        let sa = outbound(0x100, 7, Esn::Off);
        let mut store = ReservationStore::open(state.path()).unwrap();
        store.begin(&sa).unwrap();
        store.finish(sa.id(), None).unwrap();
        let path = file_of(state.path(), &sa);
        let good = fs::read(&path).unwrap();
        for at in 0..good.len() {
            let mut bad = good.clone();
            bad[at] ^= 1;
            fs::write(&path, &bad).unwrap();
            let error = store.begin(&sa).unwrap_err();
            assert!(
                matches!(error, ReservationError::Corrupt { .. }),
                "byte {at}"
            );
            fs::write(&path, &good[..at]).unwrap();
            assert!(store.begin(&sa).is_err(), "cut to {at} bytes");
        }
        fs::write(&path, &good).unwrap();
        assert_eq!(store.begin(&sa).unwrap().first, CHUNK_32 + 1);
    }

    #[test]
    fn a_second_daemon_is_refused_as_long_as_the_first_lives() {
        let state = tempfile::tempdir().unwrap();
        let first = ReservationStore::open(state.path()).unwrap();
        let error = ReservationStore::open(state.path()).unwrap_err();
        assert!(error.to_string().contains("another esplane"), "{error}");
        drop(first);
        assert!(ReservationStore::open(state.path()).is_ok());
    }

    #[test]
    fn the_file_does_not_contain_the_key() {
        let key = KeyMaterial::new(AeadSuite::Aes128Gcm16, &[0xab; 20]).unwrap();
        let name = fingerprint(&key);
        assert!(name.len() == 32 && !name.contains("abab"));
        let other = KeyMaterial::new(AeadSuite::Aes128Gcm16, &[0xac; 20]).unwrap();
        assert_ne!(name, fingerprint(&other));
    }
}
