//! `esp_proposals`: which of its algorithms Esplane has, and the nearest that it has.

use esplane_api::AeadSuite;

/// Keywords of charon's that encrypt or authenticate; what else a proposal has are groups and ESN.
const CIPHERS_AND_HASHES: [&str; 16] = [
    "aes", "camellia", "3des", "des", "blowfish", "cast128", "null", "serpent", "twofish",
    "chacha20", "sha", "md5", "default", "rc5", "idea", "sm4",
];

/// What an `esp_proposals` can lead to.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Proposed {
    /// Only what Esplane has.
    Supported,
    /// Some of what Esplane has; the same without the rest.
    Narrow(String),
    /// Nothing that Esplane has; the same groups with what it has.
    Replace(String),
}

/// Looks at the value of `esp_proposals`; none is charon's default.
pub fn look_at(value: Option<&str>) -> Proposed {
    let proposals: Vec<&str> = value
        .into_iter()
        .flat_map(|value| value.split(','))
        .map(str::trim)
        .filter(|proposal| !proposal.is_empty())
        .collect();
    let supported: Vec<String> = proposals.iter().filter_map(|text| narrow(text)).collect();
    if supported.is_empty() {
        let tail = proposals
            .first()
            .map_or_else(String::new, |text| tail(text));
        let suites = [AeadSuite::Aes256Gcm16, AeadSuite::Aes128Gcm16];
        let suites = suites.map(|suite| format!("{suite}{tail}"));
        return Proposed::Replace(suites.join(", "));
    }
    match supported.iter().map(String::as_str).eq(proposals) {
        true => Proposed::Supported,
        false => Proposed::Narrow(supported.join(", ")),
    }
}

/// Whether charon's name of a negotiated algorithm is one of Esplane's.
pub fn is_supported(algorithm: &str) -> bool {
    matches!(
        algorithm,
        "AES_GCM_16-128" | "AES_GCM_16-256" | "CHACHA20_POLY1305" | "CHACHA20_POLY1305-256"
    )
}

/// The proposal without the algorithms that Esplane lacks; `None` if nothing encrypts then.
fn narrow(proposal: &str) -> Option<String> {
    let words = proposal.split('-');
    let kept: Vec<&str> = words
        .filter(|word| is_suite(word) || is_tail(word))
        .collect();
    kept.iter()
        .any(|word| is_suite(word))
        .then(|| kept.join("-"))
}

fn is_suite(word: &str) -> bool {
    let word = word.to_ascii_lowercase();
    // charon takes the bits of the ICV as well as its bytes.
    let word = word
        .strip_suffix("gcm128")
        .map_or(word.clone(), |aes| format!("{aes}gcm16"));
    AeadSuite::ALL.iter().any(|suite| suite.name() == word)
}

fn is_tail(word: &str) -> bool {
    let word = word.to_ascii_lowercase();
    !CIPHERS_AND_HASHES
        .iter()
        .any(|start| word.starts_with(start))
        && !word.starts_with("prf")
}

/// The groups and ESN of a proposal, with a dash before each.
fn tail(proposal: &str) -> String {
    let words = proposal.split('-').filter(|word| is_tail(word));
    words.map(|word| format!("-{word}")).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn groups_stay_and_algorithms_that_are_not_there_go() {
        let replace = |text: &str| Proposed::Replace(text.to_owned());
        let narrow = |text: &str| Proposed::Narrow(text.to_owned());
        for (proposals, expected) in [
            (Some("aes256gcm16-ecp256-esn"), Proposed::Supported),
            (
                Some("aes128gcm16, chacha20poly1305-x25519"),
                Proposed::Supported,
            ),
            (Some("aes256gcm128-modp2048"), Proposed::Supported),
            (None, replace("aes256gcm16, aes128gcm16")),
            (Some("default"), replace("aes256gcm16, aes128gcm16")),
            (
                Some("aes128-sha256-ecp256-esn"),
                replace("aes256gcm16-ecp256-esn, aes128gcm16-ecp256-esn"),
            ),
            (
                Some("aes256-sha512-x25519-ke1_mlkem768"),
                replace("aes256gcm16-x25519-ke1_mlkem768, aes128gcm16-x25519-ke1_mlkem768"),
            ),
            (Some("aes192gcm16"), replace("aes256gcm16, aes128gcm16")),
            (
                Some("aes256gcm16-aes192gcm16-ecp384, aes128-sha1"),
                narrow("aes256gcm16-ecp384"),
            ),
            (Some("aes128-sha256, aes128gcm16"), narrow("aes128gcm16")),
        ] {
            assert_eq!(look_at(proposals), expected, "{proposals:?}");
        }
    }
}
