//! Routes that only packets of some sources take, as rules (`ip rule`) and a table of our own.
//!
//! A network in which a peer itself lies, 0.0.0.0/0 above all, cannot be an ordinary route into the tunnel that leads
//! to this peer: its ESP would take it, too. What an IPsec policy protects has a source, though, and ESP's is another:
//!
//! ```text
//!   …
//!   4559: from 10.1.0.0/24 lookup main suppress_prefixlength 0     what has a narrower route takes that
//!   4560: from 10.1.0.0/24 lookup 430300007                        all else leads into the interface
//!   …
//!   32766: from all lookup main                                    ESP, IKE, and whatever has another source
//! ```

use super::{Action, Netlink, NetlinkError, ROUTE_PROTOCOL, route};
use esplane_api::IpPrefix;
use futures_util::TryStreamExt;
use rtnetlink::{
    IpVersion,
    packet_route::{
        route::{RouteAttribute, RouteHeader, RouteProtocol},
        rule::{RuleAction, RuleAttribute, RuleMessage},
    },
};
use std::fmt;

/// Tables of ours: this, and the number of the interface that they lead into.
const TABLES: u32 = 430_300_000;
/// The first of our rules, in the order in which the kernel tries them: longer networks first.
const FIRST_RULE: u32 = 4303;

/// Packets from `local` to `remote` lead into an interface, unless the main table has a narrower route than `remote`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct SourceRoute {
    /// Sources.
    pub local: IpPrefix,
    /// Destinations.
    pub remote: IpPrefix,
    /// The interface.
    pub link: u32,
}

impl fmt::Display for SourceRoute {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self {
            local,
            remote,
            link,
        } = self;
        write!(f, "from {local} to {remote} by interface {link}")
    }
}

impl Netlink {
    /// Adds it; what is there already, as after a crash, may stay.
    pub async fn add_source_route(&self, new: &SourceRoute) -> Result<(), NetlinkError> {
        let action = Action::AddSourceRoute(*new);
        let all = if new.remote.address().is_ipv4() {
            IpPrefix::ALL_V4
        } else {
            IpPrefix::ALL_V6
        };
        let mut everything = route(all, new.link, 0);
        let table = RouteAttribute::Table(TABLES + new.link);
        everything.header.table = RouteHeader::RT_TABLE_UNSPEC;
        everything.attributes.push(table);
        let request = self.handle.route().add(everything).replace();
        request
            .execute()
            .await
            .map_err(|error| action.clone().failed(error))?;
        for rule in rules(new) {
            let mut request = self.handle.rule().add();
            *request.message_mut() = rule;
            let added = request.execute().await;
            match added.map_err(|error| action.clone().failed(error)) {
                Ok(()) | Err(NetlinkError::Exists { .. }) => {}
                Err(error) => {
                    let _ = self.remove_source_route(new).await;
                    return Err(error);
                }
            }
        }
        Ok(())
    }

    /// Removes its rules. The table goes with the interface, and is asked for nothing meanwhile.
    pub async fn remove_source_route(&self, old: &SourceRoute) -> Result<(), NetlinkError> {
        let mut outcome = Ok(());
        // First what leads into the tunnel.
        for rule in rules(old).into_iter().rev() {
            let removed = self.handle.rule().del(rule).execute().await;
            match removed.map_err(|error| Action::RemoveSourceRoute(*old).failed(error)) {
                Err(error) if !error.is_gone() => outcome = Err(error),
                _ => {}
            }
        }
        outcome
    }

    /// Removes the rules of a daemon that was killed: those that lead into tables of interfaces that are gone, or of
    /// this one, which has none yet.
    pub async fn remove_leftover_source_routes(&self, link: u32) -> Result<(), NetlinkError> {
        for family in [IpVersion::V4, IpVersion::V6] {
            let all: Vec<RuleMessage> = self
                .handle
                .rule()
                .get(family)
                .execute()
                .try_collect()
                .await
                .map_err(|error| Action::ListRules.failed(error))?;
            for found in all.iter().filter_map(source_route) {
                let is_ours = found.link == link;
                if is_ours || self.link_by_index(found.link).await.is_err() {
                    self.remove_source_route(&found).await?;
                }
            }
        }
        Ok(())
    }
}

/// What a rule of ours is of, if it is one that leads into an interface.
fn source_route(rule: &RuleMessage) -> Option<SourceRoute> {
    let (mut local, mut remote, mut link, mut ours) = (None, None, None, false);
    for attribute in &rule.attributes {
        match attribute {
            RuleAttribute::Source(address) => local = Some(*address),
            RuleAttribute::Destination(address) => remote = Some(*address),
            RuleAttribute::Table(table) => link = table.checked_sub(TABLES),
            RuleAttribute::Protocol(protocol) => {
                ours = *protocol == RouteProtocol::Other(ROUTE_PROTOCOL);
            }
            _ => {}
        }
    }
    let local = IpPrefix::new(local?, rule.header.src_len).ok()?;
    let remote = match remote {
        Some(remote) => IpPrefix::new(remote, rule.header.dst_len).ok()?,
        None if local.address().is_ipv4() => IpPrefix::ALL_V4,
        None => IpPrefix::ALL_V6,
    };
    let link = link.filter(|_| ours)?;
    Some(SourceRoute {
        local,
        remote,
        link,
    })
}

/// The main table's narrower routes; then ours.
fn rules(of: &SourceRoute) -> [RuleMessage; 2] {
    let place = FIRST_RULE + 2 * (128 - u32::from(of.remote.length()));
    let mut narrower = rule(of, place);
    narrower.header.table = RouteHeader::RT_TABLE_MAIN;
    let longer_than = RuleAttribute::SuppressPrefixLen(of.remote.length().into());
    narrower.attributes.push(longer_than);
    let mut inside = rule(of, place + 1);
    inside.header.table = RouteHeader::RT_TABLE_UNSPEC;
    let table = RuleAttribute::Table(TABLES + of.link);
    inside.attributes.push(table);
    [narrower, inside]
}

fn rule(of: &SourceRoute, place: u32) -> RuleMessage {
    let mut rule = RuleMessage::default();
    rule.header.family = super::family(of.local.address());
    rule.header.action = RuleAction::ToTable;
    rule.header.src_len = of.local.length();
    rule.header.dst_len = of.remote.length();
    let protocol = RouteProtocol::Other(ROUTE_PROTOCOL);
    rule.attributes.push(RuleAttribute::Priority(place));
    rule.attributes.push(RuleAttribute::Protocol(protocol));
    rule.attributes
        .push(RuleAttribute::Source(of.local.address()));
    if of.remote.length() > 0 {
        rule.attributes
            .push(RuleAttribute::Destination(of.remote.address()));
    }
    rule
}
