//! What holds for all children: charon's plugins, the kernel, the port.

use super::{Finding, Lockdown, Looked, Survey, Verdict, Way, finding};
use std::fmt::Display;

/// The oldest charon that Esplane was run with.
const TESTED: [u32; 3] = [5, 9, 8];
/// `charon.port_nat_t`, unless it is set.
const NAT_PORT: u16 = 4500;

/// `interface.name` of esplane.yaml, unless it is set.
const INTERFACE: &str = "esp0";

/// Which charon, on which kernel, with how much to do.
pub fn headline(survey: &Survey) -> String {
    let version = &survey.version;
    let count = |count: usize, one: &str, more: &str| match count {
        1 => format!("1 {one}"),
        count => format!("{count} {more}"),
    };
    let children: usize = survey.connections.iter().map(|it| it.children.len()).sum();
    let sas: usize = survey.sas.iter().map(|it| it.children.len()).sum();
    format!(
        "{} {} on Linux {}, up for {}: {} with {}, {} up",
        version.daemon,
        version.version,
        version.release,
        survey.stats.running,
        count(survey.connections.len(), "connection", "connections"),
        count(children, "child", "children"),
        count(sas, "CHILD_SA", "CHILD_SAs"),
    )
}

/// By the kernel, where that can be.
pub fn way(survey: &Survey) -> Way {
    let no_esp = matches!(&survey.kernel_esp, Looked::Found(esp) if !esp.v4);
    let hidden = survey.lockdown.found() == Some(&Lockdown::Confidentiality);
    let preloaded = survey.preloaded == Looked::Found(true);
    match preloaded || no_esp || hidden {
        true => Way::Preload,
        false => Way::Kernel,
    }
}

/// charon's port for ESP in UDP.
pub fn nat_port(survey: &Survey) -> u16 {
    let value = charon_setting(survey, &[], "port_nat_t");
    value.and_then(|text| text.parse().ok()).unwrap_or(NAT_PORT)
}

/// A value of strongswan.conf; charon-systemd's own section comes before charon's.
fn charon_setting<'a>(survey: &'a Survey, path: &[&str], key: &str) -> Option<&'a str> {
    let settings = survey.strongswan_conf.found()?;
    [survey.version.daemon.as_str(), "charon"]
        .iter()
        .find_map(|daemon| {
            let path: Vec<&str> = [daemon].into_iter().chain(path).copied().collect();
            let setting = settings.section(&path)?.value(key)?;
            Some(setting.text.as_str())
        })
}

/// Everything about the host.
pub fn findings(survey: &Survey, way: Way) -> Vec<Finding> {
    let mut findings = vec![version(survey), keys(survey)];
    findings.extend(match way {
        Way::Kernel => vec![esp(survey), lockdown(survey), kernel_sas(survey)],
        Way::Preload => vec![preload(survey), install_routes(survey)],
    });
    findings.push(port(survey));
    findings.extend(interface(survey));
    if let (Looked::Unknown(why), Way::Kernel) = (&survey.swanctl_conf, way) {
        findings.push(finding(
            Verdict::Note,
            "swanctl.conf",
            format!("{why}; without it only SAs that are up tell of marks and policies, since VICI does not"),
        ));
    }
    findings
}

fn version(survey: &Survey) -> Finding {
    let text = &survey.version.version;
    let parts = text.split(|c: char| !c.is_ascii_digit());
    let numbers: Vec<u32> = parts.filter_map(|part| part.parse().ok()).take(3).collect();
    match numbers.as_slice() < &TESTED[..] {
        true => finding(
            Verdict::Note,
            "version",
            format!("strongSwan {text} is older than 5.9.8, the oldest that Esplane was run with"),
        ),
        false => finding(Verdict::Ok, "version", format!("strongSwan {text}")),
    }
}

fn keys(survey: &Survey) -> Finding {
    let has = |plugin: &str| survey.stats.plugins.iter().any(|it| it == plugin);
    match (has("kernel-netlink"), has("kernel-libipsec")) {
        (true, false) => finding(
            Verdict::Ok,
            "keys",
            "charon hands its keys to NETLINK_XFRM (plugin kernel-netlink)",
        ),
        (_, true) => finding(
            Verdict::Missing,
            "keys",
            "charon encrypts by itself (plugin kernel-libipsec), so that nobody else gets its keys; in strongswan.conf: `charon { plugins { kernel-libipsec { load = no } } }`, and start charon again",
        ),
        (false, false) => finding(
            Verdict::Missing,
            "keys",
            format!(
                "charon has not loaded the plugin kernel-netlink, which hands keys over; put it into `charon.load` or `load = yes` into charon.plugins.kernel-netlink, and start charon again (loaded: {})",
                survey.stats.plugins.join(" ")
            ),
        ),
    }
}

fn esp(survey: &Survey) -> Finding {
    let by = "asked in a network namespace made for that";
    match &survey.kernel_esp {
        Looked::Unknown(why) => finding(Verdict::Note, "kernel ESP", format!("cannot tell: {why}")),
        Looked::Found(esp) if !esp.xfrm => finding(
            Verdict::Missing,
            "kernel ESP",
            "the kernel has no XFRM (CONFIG_XFRM_USER, module xfrm_user); use mode B: `--mode preload`",
        ),
        Looked::Found(esp) if !esp.v4 => finding(
            Verdict::Missing,
            "kernel ESP",
            format!(
                "the kernel takes no ESP SA ({by}): modules esp4 and esp6 are missing; install them, or use mode B: `--mode preload`"
            ),
        ),
        Looked::Found(esp) if !esp.v6 => finding(
            Verdict::Note,
            "kernel ESP",
            format!(
                "the kernel takes ESP SAs between IPv4 addresses, none between IPv6 ones: module esp6 is missing ({by})"
            ),
        ),
        Looked::Found(_) => finding(
            Verdict::Ok,
            "kernel ESP",
            format!("the kernel takes AES-GCM SAs for IPv4 and IPv6 ({by})"),
        ),
    }
}

fn lockdown(survey: &Survey) -> Finding {
    let topic = "lockdown";
    match &survey.lockdown {
        Looked::Unknown(why) => finding(
            Verdict::Note,
            topic,
            format!(
                "cannot tell: {why}; if it is `confidentiality`, keys read as zeros, and Esplane says so"
            ),
        ),
        Looked::Found(Lockdown::Confidentiality) => finding(
            Verdict::Missing,
            topic,
            "the kernel is locked down for confidentiality and shows zeros in place of keys; boot without lockdown=confidentiality, or use mode B: `--mode preload`",
        ),
        Looked::Found(Lockdown::Integrity) => {
            finding(Verdict::Ok, topic, "integrity only: keys can be read")
        }
        Looked::Found(Lockdown::None) => finding(Verdict::Ok, topic, "none: keys can be read"),
    }
}

fn kernel_sas(survey: &Survey) -> Finding {
    match (&survey.kernel_sas, &survey.kernel_policies) {
        (Looked::Found(sas), Looked::Found(policies)) => finding(
            Verdict::Ok,
            "XFRM",
            format!(
                "the kernel shows {} and {}",
                counted(sas.len(), "SA"),
                counted(policies.len(), "policy")
            ),
        ),
        (Looked::Unknown(why), _) | (_, Looked::Unknown(why)) => {
            finding(Verdict::Missing, "XFRM", why.clone())
        }
    }
}

fn counted(count: usize, one: &str) -> impl Display {
    match (count, one) {
        (1, one) => format!("1 {one}"),
        (count, "policy") => format!("{count} policies"),
        (count, one) => format!("{count} {one}s"),
    }
}

fn preload(survey: &Survey) -> Finding {
    let why = match (survey.way, &survey.kernel_esp) {
        (Some(_), _) => "as asked",
        (None, Looked::Found(esp)) if !esp.xfrm => "since the kernel has no XFRM",
        (None, Looked::Found(esp)) if !esp.v4 => {
            "since the kernel takes no ESP SA (modules esp4, esp6; asked in a network namespace made for that)"
        }
        (None, _) if survey.preloaded == Looked::Found(true) => "as it is set up",
        (None, _) => "since the kernel is locked down for confidentiality and hides keys",
    };
    let way = format!(
        "charon hands its keys to Esplane by a preloaded library, {why}; the kernel's marks and policies do not matter"
    );
    match &survey.preloaded {
        Looked::Found(true) => finding(Verdict::Ok, "mode B", way),
        Looked::Found(false) => finding(
            Verdict::Missing,
            "mode B",
            format!("{way}; but charon runs without the library"),
        ),
        Looked::Unknown(reason) => finding(
            Verdict::Unknown,
            "mode B",
            format!("{way}; whether charon has the library cannot be told: {reason}"),
        ),
    }
}

fn install_routes(survey: &Survey) -> Finding {
    let missing = "`install_routes = no` is not in strongswan.conf, section charon: else charon's own routes (table 220) lead around Esplane";
    match (
        charon_setting(survey, &[], "install_routes"),
        &survey.strongswan_conf,
    ) {
        (Some("no" | "0" | "false" | "off" | "disabled"), _) => finding(
            Verdict::Ok,
            "routes",
            "charon installs no routes of its own (strongswan.conf)",
        ),
        (None, Looked::Unknown(why)) => finding(
            Verdict::Unknown,
            "routes",
            format!("{why}; make sure that strongswan.conf has `charon {{ install_routes = no }}`"),
        ),
        _ => finding(Verdict::Missing, "routes", missing),
    }
}

/// charon looks at every interface that is not ignored, and tells its peers of their addresses (MOBIKE).
fn interface(survey: &Survey) -> Option<Finding> {
    let names = |key| charon_setting(survey, &[], key).map(|text| text.split(',').map(str::trim));
    let ignored =
        names("interfaces_ignore").is_some_and(|mut names| names.any(|name| name == INTERFACE));
    let unused =
        names("interfaces_use").is_some_and(|mut names| names.all(|name| name != INTERFACE));
    (!ignored && !unused).then(|| {
        finding(
            Verdict::Note,
            "interface",
            format!("charon takes addresses on Esplane's interface for its own ways out; if you give it any, put `interfaces_ignore = {INTERFACE}` into the section charon of strongswan.conf"),
        )
    })
}

fn port(survey: &Survey) -> Finding {
    let topic = format!("port {}", nat_port(survey));
    let port = nat_port(survey);
    let configured = match port {
        NAT_PORT => String::new(),
        port => format!("; give esplane.yaml `strongswan: {{port: {port}}}`"),
    };
    match &survey.udp_ports {
        _ if port == 0 => finding(
            Verdict::Missing,
            "port 4500",
            "charon.port_nat_t is 0: charon takes any port, which Esplane cannot know; set it to 4500",
        ),
        Looked::Unknown(why) => finding(
            Verdict::Note,
            &topic,
            format!("cannot tell who listens: {why}"),
        ),
        Looked::Found(ports) if ports.contains(&port) => finding(
            Verdict::Ok,
            &topic,
            format!("charon listens there; Esplane receives ESP in UDP beside it{configured}"),
        ),
        Looked::Found(_) => finding(
            Verdict::Missing,
            &topic,
            format!(
                "nobody listens there, so ESP in UDP has no port: load the plugin socket-default, or run this in charon's network namespace{configured}"
            ),
        ),
    }
}
