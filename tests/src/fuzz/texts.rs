//! Texts people write: the configuration file and the values in it.

use esplane_api::{AeadSuite, IpPrefix, Spi, TrafficSelector};
use esplane_control_vici::check::settings::Settings;
use esplane_gateway::config::Config;
use std::{fmt::Display, path::Path, str::FromStr};

/// Any file as a configuration: refused with a place in it, or fine.
pub fn config_file(data: &[u8]) {
    let text = String::from_utf8_lossy(data);
    // No key file can be found, so that no input reads this machine's files.
    if let Err(error) = Config::from_text(Path::new("/nonexistent/esplane.yaml"), &text) {
        assert!(
            error.to_string().contains("esplane.yaml"),
            "an error without its file: {error}"
        );
    }
}

/// Any file as strongSwan's settings, which includes itself wherever it includes: refused with a place in it, or every
/// value has one.
pub fn strongswan_settings(data: &[u8]) {
    let text = String::from_utf8_lossy(data);
    let mut include = |_: &str, _: &str| vec![("again.conf".to_owned(), text.clone().into_owned())];
    let lines = text.lines().count().max(1) + 1;
    match Settings::parse("swanctl.conf", &text, &mut include) {
        Err(error) => assert!((1..=lines).contains(&error.place.line), "{error}"),
        Ok(settings) => {
            for path in [
                &["connections"][..],
                &["connections", "site", "children", "net"],
                &["a"],
            ] {
                let Some(section) = settings.section(path) else {
                    continue;
                };
                let place = section.place().expect("where a section begins");
                assert!((1..=lines).contains(&place.line), "{place}");
                for key in ["local_ts", "mark_in", "x"] {
                    if let Some(value) = section.value(key) {
                        assert!((1..=lines).contains(&value.place.line), "{value:?}");
                        assert!(!value.text.is_empty());
                    }
                }
            }
        }
    }
}

/// Any text as a value: what parses prints to a text that parses to the same.
pub fn values(data: &[u8]) {
    let text = String::from_utf8_lossy(data);
    prints_back::<IpPrefix>(&text);
    prints_back::<TrafficSelector>(&text);
    prints_back::<Spi>(&text);
    prints_back::<AeadSuite>(&text);
}

fn prints_back<T: FromStr + Display + PartialEq>(text: &str) {
    if let Ok(value) = text.parse::<T>() {
        assert!(
            value.to_string().parse().ok() == Some(value),
            "{text:?} does not print back"
        );
    }
}

pub(super) fn config_seeds() -> Vec<Vec<u8>> {
    vec![include_bytes!("../../../gateway/examples/esplane.yaml").to_vec()]
}

pub(super) fn value_seeds() -> Vec<Vec<u8>> {
    [
        "10.1.0.0/16",
        "2001:db8::/32[udp/1000-2000]",
        "10.1.0.5-10.1.0.9[tcp]",
        "0xc0ffee01",
        "aes256gcm16",
    ]
    .map(|text| text.as_bytes().to_vec())
    .to_vec()
}

pub(super) fn settings_seeds() -> Vec<Vec<u8>> {
    [
        "connections {\n  site : more, defaults {\n    children { net { local_ts = 10.1.0.0/16[tcp/80] # ours\n x = \"a\\n\" b } }\n  }\n}\ndefaults { mark_in = 7\n mark_in = }\n",
        "a { x = 1 }\ninclude conf.d/*.conf\na { include \"b c\" }\n",
    ]
    .map(|text| text.as_bytes().to_vec())
    .to_vec()
}
