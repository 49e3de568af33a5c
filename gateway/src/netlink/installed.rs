use super::{Netlink, NetlinkError, SourceRoute};
use esplane_api::IpPrefix;
use std::net::IpAddr;

/// What this process has added to the kernel's tables, to be taken back.
///
/// It removes exactly what went through it, newest first, and does not mind what is gone already.
/// Removing is asynchronous and thus not done on drop; what hangs on a TUN device of this process
/// goes with the device even after a crash.
pub struct Installed {
    netlink: Netlink,
    entries: Vec<Entry>,
}

/// One thing added.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Entry {
    Address {
        link: u32,
        address: IpAddr,
        prefix_length: u8,
    },
    Route {
        prefix: IpPrefix,
        link: u32,
        metric: u32,
    },
    SourceRoute(SourceRoute),
}

impl Installed {
    /// Nothing so far.
    pub fn new(netlink: Netlink) -> Self {
        Self {
            netlink,
            entries: Vec::new(),
        }
    }

    /// The connection, for requests that need no undoing.
    pub fn netlink(&self) -> &Netlink {
        &self.netlink
    }

    /// How many things are to be taken back.
    pub fn len(&self) -> usize {
        self.entries.len()
    }

    /// Whether nothing is to be taken back.
    pub fn is_empty(&self) -> bool {
        self.entries.is_empty()
    }

    /// As [`Netlink::add_address`]. One that was there already is left there at the end, too.
    pub async fn add_address(
        &mut self,
        link: u32,
        address: IpAddr,
        prefix_length: u8,
    ) -> Result<(), NetlinkError> {
        let added = self.netlink.add_address(link, address, prefix_length).await;
        match added {
            Err(NetlinkError::Exists { .. }) => return Ok(()),
            outcome => outcome?,
        }
        self.entries.push(Entry::Address {
            link,
            address,
            prefix_length,
        });
        Ok(())
    }

    /// As [`Netlink::add_route`].
    pub async fn add_route(
        &mut self,
        prefix: IpPrefix,
        link: u32,
        metric: u32,
    ) -> Result<(), NetlinkError> {
        self.netlink.add_route(prefix, link, metric).await?;
        self.entries.push(Entry::Route {
            prefix,
            link,
            metric,
        });
        Ok(())
    }

    /// Removes one route added through this journal, as a reload does.
    pub async fn remove_route(
        &mut self,
        prefix: IpPrefix,
        link: u32,
        metric: u32,
    ) -> Result<(), NetlinkError> {
        let entry = Entry::Route {
            prefix,
            link,
            metric,
        };
        self.remove(entry).await?;
        self.entries.retain(|other| *other != entry);
        Ok(())
    }

    /// As [`Netlink::add_source_route`].
    pub async fn add_source_route(&mut self, route: SourceRoute) -> Result<(), NetlinkError> {
        self.netlink.add_source_route(&route).await?;
        self.entries.push(Entry::SourceRoute(route));
        Ok(())
    }

    /// Removes one added through this journal.
    pub async fn remove_source_route(&mut self, route: SourceRoute) -> Result<(), NetlinkError> {
        let entry = Entry::SourceRoute(route);
        self.remove(entry).await?;
        self.entries.retain(|other| *other != entry);
        Ok(())
    }

    /// Removes one address added through this journal, as a reload does.
    pub async fn remove_address(
        &mut self,
        link: u32,
        address: IpAddr,
        prefix_length: u8,
    ) -> Result<(), NetlinkError> {
        let entry = Entry::Address {
            link,
            address,
            prefix_length,
        };
        self.remove(entry).await?;
        self.entries.retain(|other| *other != entry);
        Ok(())
    }

    /// Takes everything back, the newest first. Goes on past a failure; what failed is returned and
    /// stays in the journal.
    pub async fn remove_all(&mut self) -> Vec<NetlinkError> {
        let mut failures = Vec::new();
        let mut left = Vec::new();
        while let Some(entry) = self.entries.pop() {
            if let Err(error) = self.remove(entry).await {
                failures.push(error);
                left.push(entry);
            }
        }
        left.reverse();
        self.entries = left;
        failures
    }

    async fn remove(&self, entry: Entry) -> Result<(), NetlinkError> {
        let netlink = &self.netlink;
        let outcome = match entry {
            Entry::Address {
                link,
                address,
                prefix_length,
            } => netlink.remove_address(link, address, prefix_length).await,
            Entry::Route {
                prefix,
                link,
                metric,
            } => netlink.remove_route(prefix, link, metric).await,
            Entry::SourceRoute(route) => netlink.remove_source_route(&route).await,
        };
        match outcome {
            Err(error) if error.is_gone() => Ok(()),
            outcome => outcome,
        }
    }
}
