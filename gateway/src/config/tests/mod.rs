//! Stories of configurations: good ones, and everything that can be wrong with one.

mod right;
mod wrong;

use super::*;
use std::{fs, os::unix::fs::PermissionsExt};
use tempfile::TempDir;

/// A directory with a node's key, as an operator would have it.
struct Home(TempDir);

impl Home {
    fn new() -> Self {
        let home = Self(TempDir::new().unwrap());
        home.file("node.key", 0o600, &secret(1));
        home.file(
            "good.psk",
            0o600,
            "cHJlLXNoYXJlZCBrZXkgb2YgdGhpcnR5LXR3byBCeXQ=\n",
        );
        home.file("open.key", 0o640, &secret(1));
        home.file("text.key", 0o600, "correct horse battery staple\n");
        home.file("huge.key", 0o600, &"A".repeat(5000));
        home.file("sa.key", 0o600, &format!("0x{}\n", "7f".repeat(20)));
        home
    }

    fn file(&self, name: &str, mode: u32, content: &str) {
        let path = self.0.path().join(name);
        fs::write(&path, content).unwrap();
        fs::set_permissions(path, fs::Permissions::from_mode(mode)).unwrap();
    }

    fn config(&self, text: &str) -> Result<Config, ConfigError> {
        Config::from_text(&self.0.path().join("esplane.yaml"), &filled(text))
    }
}

fn secret(seed: u8) -> String {
    StaticSecretKey::generate([seed; 32])
        .dangerous_to_base64()
        .to_string()
}

fn public(seed: u8) -> String {
    StaticSecretKey::generate([seed; 32])
        .public_key()
        .to_string()
}

/// Puts keys in: `$1` is this node's public key, `$2` and `$3` are others', `$A` and `$B` are keys of
/// static SAs.
fn filled(text: &str) -> String {
    text.replace("$1", &public(1))
        .replace("$2", &public(2))
        .replace("$3", &public(3))
        .replace("$A", &"a1".repeat(20))
        .replace("$B", &"b2".repeat(20))
}

const HEAD: &str = "\
name: node
interface: { name: esp0, addresses: [10.1.0.1/16] }
private_key_file: node.key
";
const PEER: &str = "peers:\n- { name: p, public_key: $2, routes: [10.2.0.0/16] }\n";
/// Ends open, so that a row can go on.
const PEER_WITH: &str = "peers:\n- { name: p, public_key: $2, routes: [10.2.0.0/16], ";
const SA_WITH: &str = "static_sas:\n- { name: s, remote: 192.0.2.2, suite: aes128gcm16, inbound: {spi: 0x1001, key: $A}, outbound: {spi: 0x2001, key: $B}, routes: [10.9.0.0/16], ";
