//! What files say: strongSwan's, the system's, and those of /proc.

use esplane_control_vici::{
    check::{
        Looked,
        settings::{Included, Settings, SettingsError},
    },
    vici::Names,
};
use std::{
    fs, io,
    path::{Path, PathBuf},
};

/// Larger ones are no configuration.
const FILE_BYTES_MAX: u64 = 4 << 20;

/// Why a file that was named cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum FileError {
    /// Not there, or not ours to read.
    #[error("{}: {error}", .path.display())]
    Read {
        /// Which.
        path: PathBuf,
        /// Why.
        error: io::Error,
    },
    /// Not in strongSwan's form.
    #[error(transparent)]
    Settings(#[from] SettingsError),
}

/// The file that is named, which must be there, else the usual one, which may be missing.
pub fn settings(named: Option<&Path>, usual: &str) -> Result<Looked<Settings>, FileError> {
    let path = named.unwrap_or(Path::new(usual));
    let text = match (read(path), named) {
        (Ok(text), _) => text,
        (Err(error), None) => return Ok(Looked::Unknown(format!("{usual}: {error}"))),
        (Err(error), Some(path)) => {
            let path = path.to_owned();
            return Err(FileError::Read { path, error });
        }
    };
    let settings = Settings::parse(&path.to_string_lossy(), &text, &mut included);
    Ok(Looked::Found(settings?))
}

/// What this host calls protocols and services; files that are not there name nothing.
pub fn names() -> Names {
    let text = |path| read(Path::new(path)).unwrap_or_default();
    Names::from_files(&text("/etc/protocols"), &text("/etc/services"))
}

/// The UDP ports of this network namespace that somebody is bound to.
pub fn udp_ports() -> Looked<Vec<u16>> {
    let mut ports = Vec::new();
    for path in ["/proc/net/udp", "/proc/net/udp6"] {
        match fs::read_to_string(path) {
            Ok(text) => ports.extend(text.lines().skip(1).filter_map(local_port)),
            // A kernel without IPv6.
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            Err(error) => return Looked::Unknown(format!("{path}: {error}")),
        }
    }
    Looked::Found(ports)
}

/// `  sl  local_address …`: the second word is ADDRESS:PORT in hexadecimal.
fn local_port(line: &str) -> Option<u16> {
    let (_, port) = line.split_ascii_whitespace().nth(1)?.split_once(':')?;
    u16::from_str_radix(port, 16).ok()
}

/// Whether charon's process has mapped mode B's library.
pub fn is_preloaded(process: Option<i32>) -> Looked<bool> {
    let Some(process) = process else {
        return Looked::Unknown("the socket does not tell charon's process".to_owned());
    };
    let path = format!("/proc/{process}/maps");
    match fs::read_to_string(&path) {
        Ok(maps) => Looked::Found(maps.contains("/libesplane_preload.so")),
        Err(error) => Looked::Unknown(format!("{path}: {error}")),
    }
}

fn read(path: &Path) -> io::Result<String> {
    let size = fs::metadata(path)?.len();
    if size > FILE_BYTES_MAX {
        let text = format!("{size} bytes are no configuration");
        return Err(io::Error::new(io::ErrorKind::FileTooLarge, text));
    }
    Ok(String::from_utf8_lossy(&fs::read(path)?).into_owned())
}

/// The files of a pattern, in order; one that cannot be read is passed over, as charon does.
fn included(pattern: &str, from: &str) -> Vec<Included> {
    let directory = Path::new(from).parent().unwrap_or(Path::new("/"));
    let mut paths = vec![PathBuf::new()];
    for part in directory.join(pattern).components() {
        let part = part.as_os_str().to_string_lossy();
        paths = match part.contains(['*', '?']) {
            false => paths.iter().map(|path| path.join(&*part)).collect(),
            true => paths
                .iter()
                .flat_map(|path| matching(path, &part))
                .collect(),
        };
    }
    let read = |path: PathBuf| {
        let text = read(&path).ok()?;
        Some((path.to_string_lossy().into_owned(), text))
    };
    paths.into_iter().filter_map(read).collect()
}

fn matching(directory: &Path, pattern: &str) -> Vec<PathBuf> {
    let entries = fs::read_dir(directory).into_iter().flatten().flatten();
    let mut paths: Vec<PathBuf> = entries
        .filter(|entry| {
            let name = entry.file_name();
            let name = name.to_string_lossy();
            // As glob(7): a leading dot is not matched by a star.
            !name.starts_with('.') && glob(pattern.as_bytes(), name.as_bytes())
        })
        .map(|entry| entry.path())
        .collect();
    paths.sort();
    paths
}

/// `*` and `?`; the last star is tried again one byte further, so no pattern takes long.
fn glob(pattern: &[u8], name: &[u8]) -> bool {
    let (mut p, mut n) = (0, 0);
    let mut star = None;
    while n < name.len() {
        match pattern.get(p) {
            Some(b'*') => {
                star = Some((p, n));
                p += 1;
            }
            Some(&c) if c == b'?' || c == name[n] => {
                p += 1;
                n += 1;
            }
            _ => {
                let Some((at, from)) = star else {
                    return false;
                };
                star = Some((at, from + 1));
                (p, n) = (at + 1, from + 1);
            }
        }
    }
    pattern[p..].iter().all(|c| *c == b'*')
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn patterns_match_as_in_glob() {
        for (pattern, name, matches) in [
            ("*.conf", "site.conf", true),
            ("*.conf", "site.conf.bak", false),
            ("*", "", true),
            ("a?c*e", "abcde", true),
            ("a?c*e", "abcd", false),
            ("*a*b", "xaxxbxb", true),
            ("site.conf", "site.conf", true),
            ("?", "", false),
        ] {
            assert_eq!(
                glob(pattern.as_bytes(), name.as_bytes()),
                matches,
                "{pattern} {name}"
            );
        }
    }

    #[test]
    fn a_configuration_is_read_with_what_it_includes() {
        let directory = tempfile::tempdir().unwrap();
        let at = |name: &str| directory.path().join(name);
        fs::create_dir(at("conf.d")).unwrap();
        fs::write(at("swanctl.conf"), "include conf.d/*.conf\n").unwrap();
        for (name, value) in [
            ("20-b.conf", 2),
            ("10-a.conf", 1),
            ("c.bak", 3),
            (".d.conf", 4),
        ] {
            fs::write(at("conf.d").join(name), format!("a {{ x = {value} }}\n")).unwrap();
        }
        let settings = settings(Some(&at("swanctl.conf")), "").unwrap();
        let section = settings.found().unwrap().section(&["a"]).unwrap();
        let setting = section.value("x").unwrap();
        assert_eq!(setting.text, "2");
        assert!(setting.place.to_string().ends_with("conf.d/20-b.conf:1"));
    }

    #[test]
    fn a_file_that_is_named_must_be_there_and_right() {
        let directory = tempfile::tempdir().unwrap();
        let file = directory.path().join("swanctl.conf");
        let error = settings(Some(&file), "").unwrap_err();
        assert!(
            error.to_string().contains("swanctl.conf: No such file"),
            "{error}"
        );
        fs::write(&file, "a {\n").unwrap();
        let error = settings(Some(&file), "").unwrap_err();
        assert!(
            error.to_string().contains("swanctl.conf:1: the section"),
            "{error}"
        );
        let usual = settings(None, "/nonexistent/swanctl.conf").unwrap();
        assert!(matches!(usual, Looked::Unknown(why) if why.contains("/nonexistent/swanctl.conf")));
    }

    #[test]
    fn ports_are_read_from_the_kernels_table() {
        let line = "  123: 00000000:1194 00000000:0000 07 00000000:00000000 00:00000000 00000000     0        0 1 2 0 0";
        assert_eq!(local_port(line), Some(4500));
        assert_eq!(local_port("nonsense"), None);
    }
}
