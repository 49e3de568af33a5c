//! One child: what is known of it, from where, and which lines are missing.

use super::{
    Addition, ChildReport, ChildVerdict, Finding, Survey, Verdict, Way, finding,
    proposals::{self, Proposed},
    settings::{Setting, View},
};
use crate::vici::{
    ChildSa, ChildState, Connection, ConnectionChild, IkeSa, Mark, SelectorProblem,
    SelectorTextError,
};

use std::net::{IpAddr, SocketAddr};

/// What was found out of one child.
pub struct Examined<'a> {
    /// What is said of it.
    pub report: ChildReport,
    /// Its CHILD_SAs that the kernel itself may use.
    pub old_sas: Vec<&'a ChildSa>,
    /// Whether the newest of its CHILD_SAs is one of these, so that a fresh one is needed.
    pub needs_fresh: bool,
    /// Whether charon knows whom to call.
    pub can_initiate: bool,
}

/// Every child of every loaded connection.
pub fn all(survey: &Survey, way: Way) -> Vec<Examined<'_>> {
    let children = survey.connections.iter().flat_map(|connection| {
        let children = connection.children.iter();
        children.map(move |child| (connection, child))
    });
    children
        .filter(|(connection, child)| {
            survey.only.is_empty()
                || survey
                    .only
                    .iter()
                    .any(|name| name.fits(&connection.name, &child.name))
        })
        .map(|(connection, child)| Child::find(survey, connection, child).examine(way))
        .collect()
}

/// Whether both SAs of a CHILD_SA carry the mark in the kernel.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Marked {
    Yes,
    No,
    /// The kernel does not have them.
    Absent,
    /// The kernel could not be looked at.
    Unseen,
}

/// What is known of one child.
struct Child<'a> {
    survey: &'a Survey,
    connection: &'a Connection,
    loaded: &'a ConnectionChild,
    /// Its section of swanctl.conf.
    file: Option<View<'a>>,
    /// Its CHILD_SAs that are up, the newest last.
    up: Vec<&'a ChildSa>,
    findings: Vec<Finding>,
    lines: Vec<String>,
    remove: Vec<String>,
}

impl<'a> Child<'a> {
    fn find(survey: &'a Survey, connection: &'a Connection, loaded: &'a ConnectionChild) -> Self {
        let path = ["connections", &connection.name, "children", &loaded.name];
        let file = survey.swanctl_conf.found();
        let of_it = |ike: &&IkeSa| ike.name == connection.name;
        let mut up: Vec<&ChildSa> = survey
            .sas
            .iter()
            .filter(of_it)
            .flat_map(|ike| &ike.children)
            .collect();
        up.retain(|child| child.name == loaded.name && child.state == ChildState::Installed);
        up.sort_by_key(|child| child.unique_id);
        Self {
            survey,
            connection,
            loaded,
            file: file.and_then(|settings| settings.section(&path)),
            up,
            findings: Vec::new(),
            lines: Vec::new(),
            remove: Vec::new(),
        }
    }

    fn examine(mut self, way: Way) -> Examined<'a> {
        let carried = self.mode(way);
        let mut old_sas = Vec::new();
        if carried {
            self.selectors();
            self.routes();
            if way == Way::Kernel {
                old_sas = self.used_by_kernel();
                self.policies();
                self.marks();
                self.seen_in_kernel(&old_sas);
                self.hw_offload();
                self.inactivity();
                self.interface();
            }
            self.algorithm();
            self.ipcomp();
        }
        let state = self.state(carried, &old_sas);
        Examined {
            needs_fresh: self
                .up
                .last()
                .is_some_and(|newest| old_sas.contains(newest)),
            can_initiate: self
                .connection
                .remote_addrs
                .iter()
                .any(|it| !it.starts_with('%') && !it.contains('/')),
            old_sas,
            report: self.report(state),
        }
    }

    fn state(&self, carried: bool, old_sas: &[&ChildSa]) -> ChildVerdict {
        let any = |verdict| self.findings.iter().any(|it| it.verdict == verdict);
        match () {
            () if !carried => ChildVerdict::Left,
            () if any(Verdict::Missing) => ChildVerdict::Change,
            () if any(Verdict::Unknown) => ChildVerdict::Unknown,
            () if !old_sas.is_empty() => ChildVerdict::OldSas,
            () => ChildVerdict::Ready,
        }
    }

    fn report(self, state: ChildVerdict) -> ChildReport {
        let (connection, child) = (self.connection.name.clone(), self.loaded.name.clone());
        let add = Addition {
            section: format!("connections.{connection}.children.{child}"),
            place: self
                .file
                .and_then(|file| file.place().map(ToString::to_string)),
            lines: self.lines,
            remove: self.remove,
        };
        ChildReport {
            connection,
            child,
            local: self.loaded.local_ts.clone(),
            remote: self.loaded.remote_ts.clone(),
            state,
            findings: self.findings,
            add: (!add.lines.is_empty() || !add.remove.is_empty()).then_some(add),
        }
    }

    /// Whether it is of the kind that Esplane carries.
    fn mode(&mut self, way: Way) -> bool {
        match self.loaded.mode.as_str() {
            "TUNNEL" => {
                self.say(Verdict::Ok, "mode", "tunnel (list-conns)");
                return true;
            }
            mode @ ("PASS" | "DROP") => self.say(
                Verdict::Note,
                "mode",
                format!(
                    "{}: a policy of the kernel's without SAs",
                    mode.to_lowercase()
                ),
            ),
            mode => {
                let who = match way {
                    Way::Kernel => "so the kernel goes on with this one",
                    Way::Preload => "and nobody carries this one",
                };
                let mode = mode.to_lowercase();
                self.say(
                    Verdict::Note,
                    "mode",
                    format!("{mode} (list-conns): Esplane carries whole packets, {who}; `mode = tunnel` at both ends would bring it here"),
                );
            }
        }
        false
    }

    fn selectors(&mut self) {
        let texts = self.loaded.local_ts.iter().chain(&self.loaded.remote_ts);
        let mut wrong: Vec<SelectorTextError> = texts
            .filter_map(|text| self.survey.names.selector(text).err())
            .filter(|error| error.problem != SelectorProblem::Dynamic)
            .collect();
        while let Some(first) = wrong.first() {
            let problem = first.problem.clone();
            let (same, others) = wrong
                .into_iter()
                .partition::<Vec<_>, _>(|it| it.problem == problem);
            let texts: Vec<String> = same
                .into_iter()
                .map(|it| format!("`{}`", it.text))
                .collect();
            let text = format!(
                "{} {problem}; this is not carried: change it at both ends",
                texts.join(", ")
            );
            self.say(Verdict::Missing, "selectors", text);
            wrong = others;
        }
    }

    /// ESP to the peer must not be routed into the tunnel that carries it.
    fn routes(&mut self) {
        let (survey, connection) = (self.survey, self.connection);
        let of_it = survey.sas.iter().filter(|ike| ike.name == connection.name);
        let ends = of_it.map(|ike| (ike.local, ike.remote));
        let (ours, theirs): (Vec<_>, Vec<_>) = ends.unzip();
        let all = |up: Vec<Option<SocketAddr>>, configured: &[String]| -> Vec<IpAddr> {
            let configured = configured.iter().filter_map(|text| text.parse().ok());
            let up = up.into_iter().flatten().map(|end| end.ip());
            up.chain(configured).collect()
        };
        let ours = all(ours, &connection.local_addrs);
        let theirs = all(theirs, &connection.remote_addrs);
        let around = |selectors: &'a [String], ends: &[IpAddr]| {
            selectors.iter().find(|text| {
                let selector = survey.names.selector(text);
                selector.is_ok_and(|selector| ends.iter().any(|end| selector.contains(*end)))
            })
        };
        let Some(remote) = around(&self.loaded.remote_ts, &theirs) else {
            return;
        };
        let note = match around(&self.loaded.local_ts, &ours) {
            None => format!(
                "the peer's own address lies in {remote}, so Esplane leads packets there by their source, which is in local_ts (`ip rule`): those of this machine itself only if they have such an address"
            ),
            Some(local) => format!(
                "the peer's own address lies in {remote}, and ours in {local}, so Esplane sets no route for that: set those that you want into its interface (esp0) yourself"
            ),
        };
        self.say(Verdict::Note, "routes", note);
    }

    /// Those that are up and that the kernel itself may use, as far as it shows.
    fn used_by_kernel(&self) -> Vec<&'a ChildSa> {
        let used =
            |child: &ChildSa| self.mark_of(child) == Marked::No || self.policies_of(child) > 0;
        self.up
            .iter()
            .copied()
            .filter(|child| used(child))
            .collect()
    }

    /// Whether both SAs carry the mark in the kernel.
    fn mark_of(&self, child: &ChildSa) -> Marked {
        let Some(sas) = self.survey.kernel_sas.found() else {
            return Marked::Unseen;
        };
        let mut marks = [child.spi_in, child.spi_out].map(|spi| {
            let sa = sas.iter().find(|sa| Some(sa.key.spi) == spi)?;
            Some(sa.mark == Some(self.survey.mark))
        });
        marks.sort();
        match marks {
            [None, _] => Marked::Absent,
            [Some(false), _] => Marked::No,
            [Some(true), _] => Marked::Yes,
        }
    }

    fn policies_of(&self, child: &ChildSa) -> usize {
        let policies = self.survey.kernel_policies.found().into_iter().flatten();
        policies.filter(|reqid| **reqid == child.reqid).count()
    }

    fn policies(&mut self) {
        let topic = "policies";
        let why = "with policies charon routes these networks around Esplane (table 220), and the kernel takes their packets";
        if self.is_set("policies", "no") {
            self.say(Verdict::Ok, topic, "none, `policies = no` (swanctl.conf)");
        } else if self.file.is_some() {
            self.miss("policies", "no", topic, why);
        } else if let Some(child) = self.up.last() {
            let unique_id = child.unique_id;
            match self.policies_of(child) {
                0 if self.survey.kernel_policies.found().is_some() => {
                    self.say(
                        Verdict::Ok,
                        topic,
                        format!("none in the kernel for #{unique_id}"),
                    );
                }
                0 => self.say(Verdict::Unknown, topic, "the kernel's could not be seen"),
                count => {
                    let text = format!("{count} in the kernel for #{unique_id}; {why}");
                    self.miss("policies", "no", topic, &text);
                }
            }
        } else {
            self.cannot_tell(topic);
        }
    }

    fn marks(&mut self) {
        let mark = self.survey.mark;
        let text = format!("{:#010x}/{:#010x}", mark.value, mark.mask);
        let topic = "marks";
        if self.file.is_some() {
            let right = |key| self.setting(key).and_then(|it| parse_mark(&it.text)) == Some(mark);
            let missing: Vec<(&str, &str)> = [("mark_in", &*text), ("mark_out", &*text)]
                .into_iter()
                .filter(|(key, _)| !right(key))
                .chain((!self.is_set("mark_in_sa", "yes")).then_some(("mark_in_sa", "yes")))
                .collect();
            if missing.is_empty() {
                return self.say(
                    Verdict::Ok,
                    topic,
                    format!("{text} on both SAs (swanctl.conf)"),
                );
            }
            let had: Vec<String> = ["mark_in", "mark_out"]
                .into_iter()
                .filter_map(|key| self.setting(key))
                .map(|it| format!("{} at {}", it.text, it.place))
                .collect();
            let why = match (missing[0].0, had.is_empty()) {
                ("mark_in_sa", _) => "without mark_in_sa the kernel decrypts what comes in, and drops it".to_owned(),
                (_, true) => "a mark that no packet has keeps the kernel from using the SAs itself: two that send with one key would use the same nonces".to_owned(),
                (_, false) => format!("the mark has to be one that no packet has, not {}; routes and VTI devices that used the old one go with it", had.join(", ")),
            };
            for (key, value) in &missing {
                self.lines.push(format!("{key} = {value}"));
            }
            self.say(Verdict::Missing, topic, why);
        } else if let Some(child) = self.up.last() {
            let unique_id = child.unique_id;
            match self.mark_of(child) {
                Marked::Yes => self.say(
                    Verdict::Ok,
                    topic,
                    format!("{text} on both SAs of #{unique_id} (kernel)"),
                ),
                Marked::No => {
                    let of_vici = [child.mark_in, child.mark_out].contains(&Some(mark));
                    let why = match of_vici {
                        true => {
                            "charon shows the mark, but the kernel's SAs are without it: mark_in_sa is missing"
                        }
                        false => {
                            "the kernel's SAs are without the mark that no packet has, so the kernel uses them itself"
                        }
                    };
                    self.lines.extend([
                        format!("mark_in = {text}"),
                        format!("mark_out = {text}"),
                        "mark_in_sa = yes".to_owned(),
                    ]);
                    self.say(Verdict::Missing, topic, why);
                }
                // Told by `seen_in_kernel`.
                Marked::Absent | Marked::Unseen => {}
            }
        } else {
            self.cannot_tell(topic);
        }
    }

    /// What the kernel shows of the newest CHILD_SA, whatever the file says.
    fn seen_in_kernel(&mut self, old_sas: &[&ChildSa]) {
        let Some(newest) = self.up.last() else {
            return;
        };
        let number = format!("#{}", newest.unique_id);
        match self.mark_of(newest) {
            Marked::Unseen => self.say(
                Verdict::Unknown,
                "SAs",
                format!("{number} is up, but the kernel's SAs could not be seen"),
            ),
            Marked::Absent => self.say(
                Verdict::Missing,
                "SAs",
                format!("{number} is up, but this kernel does not have its SAs: run this in charon's network namespace"),
            ),
            Marked::Yes | Marked::No if !old_sas.is_empty() => self.say(
                Verdict::Note,
                "SAs",
                format!("the kernel itself may use {}; a rekey keeps that, fresh SAs do not have it", numbers(old_sas)),
            ),
            Marked::Yes | Marked::No => {
                self.say(Verdict::Ok, "SAs", format!("{number} is in the kernel, which does not use it itself"));
            }
        }
    }

    fn algorithm(&mut self) {
        let topic = "algorithm";
        if let Some(setting) = self.setting("ah_proposals") {
            let place = setting.place.to_string();
            self.remove
                .push(format!("the line `ah_proposals` at {place}"));
            return self.say(
                Verdict::Missing,
                topic,
                "AH; Esplane carries ESP: the peer has to as well",
            );
        }
        let proposals = self.setting("esp_proposals").map(|it| it.text.clone());
        let looked = proposals::look_at(proposals.as_deref());
        let peer = "the peer has to allow one of these too, so ask there first";
        let negotiated = self
            .up
            .last()
            .map(|child| (child.algorithm.clone(), child.esn, child.unique_id));
        match (negotiated, looked) {
            (Some((algorithm, esn, unique_id)), looked) if proposals::is_supported(&algorithm) => {
                let esn = if esn { " with ESN" } else { "" };
                self.say(Verdict::Ok, topic, format!("{algorithm}{esn}, negotiated for #{unique_id}"));
                if let Proposed::Narrow(list) = looked {
                    self.say(Verdict::Note, "", format!("esp_proposals allows others too; only these are carried: {list}"));
                }
            }
            (Some((algorithm, _, unique_id)), Proposed::Supported) => self.say(
                Verdict::Note,
                topic,
                format!("{algorithm} for #{unique_id}, which Esplane does not have; esp_proposals is right, so the next is"),
            ),
            (Some((algorithm, _, unique_id)), Proposed::Narrow(list) | Proposed::Replace(list)) => {
                let why = format!("{algorithm} for #{unique_id}, which Esplane does not have; {peer}");
                self.miss("esp_proposals", &list, topic, &why);
            }
            (None, Proposed::Supported) => {
                self.say(Verdict::Ok, topic, format!("{} (swanctl.conf)", proposals.unwrap_or_default()));
            }
            (None, Proposed::Narrow(list)) => self.say(
                Verdict::Note,
                topic,
                format!("esp_proposals allows what Esplane does not have; only these are carried: {list}"),
            ),
            (None, Proposed::Replace(list)) if self.file.is_some() => {
                let why = match proposals {
                    Some(proposals) => format!("{proposals}, of which Esplane has none; {peer}"),
                    None => format!("charon's default, which leads to AES-CBC with some peers; {peer}"),
                };
                self.miss("esp_proposals", &list, topic, &why);
            }
            (None, Proposed::Replace(_)) => self.cannot_tell(topic),
        }
    }

    fn ipcomp(&mut self) {
        if self.is_set("ipcomp", "yes") {
            self.miss("ipcomp", "no", "ipcomp", "Esplane does not compress");
        }
    }

    fn hw_offload(&mut self) {
        if self.setting("hw_offload").is_some_and(|it| it.text != "no") {
            let why = "the SAs would be given to the network card, which sends with them";
            self.miss("hw_offload", "no", "hw_offload", why);
        }
    }

    /// charon asks the kernel when an SA was last used, and nothing can tell the kernel.
    fn inactivity(&mut self) {
        let is_on = |text: &str| {
            !text
                .trim_end_matches(|c: char| c.is_ascii_alphabetic())
                .eq("0")
        };
        if self.setting("inactivity").is_some_and(|it| is_on(&it.text)) {
            let why = "charon would end tunnels in use, since only the kernel can tell when an SA was last used; mode B can (`--mode preload`)";
            self.miss("inactivity", "0", "inactivity", why);
        }
    }

    fn interface(&mut self) {
        let in_file = self.setting("if_id_out").map(|it| it.text.clone());
        let up = self.up.last().and_then(|child| child.if_ids.1);
        if let Some(number) = in_file.or(up.map(|number| number.to_string())) {
            self.say(
                Verdict::Note,
                "if_id_out",
                format!("{number}: packets no longer pass its XFRM interface; Esplane routes the peer's networks to its own, so take your routes to that interface away"),
            );
        }
    }

    fn say(&mut self, verdict: Verdict, topic: &str, text: impl Into<String>) {
        self.findings.push(finding(verdict, topic, text));
    }

    /// A line is missing, or says something else.
    fn miss(&mut self, key: &str, value: &str, topic: &str, why: &str) {
        let why = match self.setting(key) {
            Some(setting) if topic != "algorithm" => {
                format!("now `{key} = {}` at {}; {why}", setting.text, setting.place)
            }
            _ => why.to_owned(),
        };
        self.lines.push(format!("{key} = {value}"));
        self.say(Verdict::Missing, topic, why);
    }

    fn cannot_tell(&mut self, topic: &str) {
        let text = match self.survey.swanctl_conf.found() {
            Some(_) => {
                "charon has this child, swanctl.conf does not, and no CHILD_SA of it is up; negotiate it once, or name its file with --swanctl-conf (what ipsec.conf and NetworkManager load cannot carry marks: write it into swanctl.conf)"
            }
            None => {
                "VICI does not tell, swanctl.conf could not be read, and no CHILD_SA of it is up; negotiate it once, or name the file with --swanctl-conf"
            }
        };
        self.say(Verdict::Unknown, topic, text);
    }

    fn setting(&self, key: &str) -> Option<&'a Setting> {
        self.file.as_ref()?.value(key)
    }

    fn is_set(&self, key: &str, wanted: &str) -> bool {
        let same = |text: &str| match wanted {
            "yes" => matches!(text, "yes" | "true" | "enabled" | "1"),
            "no" => matches!(text, "no" | "false" | "disabled" | "0"),
            wanted => text == wanted,
        };
        self.setting(key)
            .is_some_and(|it| same(&it.text.to_ascii_lowercase()))
    }
}

/// `#6, #7`, as swanctl writes them.
pub fn numbers(children: &[&ChildSa]) -> String {
    let numbers: Vec<String> = children
        .iter()
        .map(|it| format!("#{}", it.unique_id))
        .collect();
    numbers.join(", ")
}

/// `VALUE` or `VALUE/MASK`, decimal or hexadecimal; `%unique` is none.
fn parse_mark(text: &str) -> Option<Mark> {
    let number = |text: &str| match text.strip_prefix("0x") {
        Some(digits) => u32::from_str_radix(digits, 16).ok(),
        None => text.parse().ok(),
    };
    let (value, mask) = match text.split_once('/') {
        Some((value, mask)) => (number(value)?, number(mask)?),
        None => (number(text)?, u32::MAX),
    };
    Some(Mark { value, mask })
}
