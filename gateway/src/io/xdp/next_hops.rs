//! What the kernel knows of the next hop to each address in use, as a snapshot that drivers read without a lock.

use arc_swap::{ArcSwap, Guard};
use std::{collections::HashMap, net::IpAddr, sync::Arc};
use tokio::sync::mpsc;

/// Addresses that a driver may ask for before the answers come.
const QUESTIONS: usize = 256;

/// How a packet leaves an interface.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct NextHop {
    /// The interface's MAC address.
    pub from: [u8; 6],
    /// The router's, or the host's own.
    pub to: [u8; 6],
    /// Our address, where the packet does not say.
    pub source: IpAddr,
    /// The largest IP packet that may go there.
    pub mtu: usize,
}

/// Of each address that was asked for: how to get there, or that the kernel alone knows how.
pub type NextHops = HashMap<IpAddr, Option<NextHop>>;

/// The driver's end.
#[derive(Clone)]
pub struct HopsReader {
    table: Arc<ArcSwap<NextHops>>,
    questions: mpsc::Sender<IpAddr>,
}

/// What is known now: for one batch.
pub(super) struct HopsNow<'a> {
    table: Guard<Arc<NextHops>>,
    questions: &'a mpsc::Sender<IpAddr>,
    /// The last answer: runs of packets go to one address.
    last: Option<(IpAddr, Option<NextHop>)>,
}

/// A table, what reads it, and the questions of its readers.
pub fn next_hops() -> (Arc<ArcSwap<NextHops>>, HopsReader, mpsc::Receiver<IpAddr>) {
    let table = Arc::new(ArcSwap::from_pointee(NextHops::new()));
    let (questions, answered) = mpsc::channel(QUESTIONS);
    let reader = HopsReader {
        table: Arc::clone(&table),
        questions,
    };
    (table, reader, answered)
}

impl HopsReader {
    pub(super) fn now(&self) -> HopsNow<'_> {
        HopsNow {
            table: self.table.load(),
            questions: &self.questions,
            last: None,
        }
    }
}

impl HopsNow<'_> {
    /// How to get to `address`; `None`: leave it to the kernel. Asks about addresses not seen before.
    pub(super) fn find(&mut self, address: IpAddr) -> Option<NextHop> {
        if let Some((last, hop)) = self.last
            && last == address
        {
            return hop;
        }
        let known = self.table.get(&address).copied();
        if known.is_none() {
            // A full queue only means that it is asked again.
            let _ = self.questions.try_send(address);
        }
        let hop = known.flatten();
        self.last = Some((address, hop));
        hop
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_unknown_address_is_asked_for_once_a_run_and_found_when_it_is_known() {
        let (table, reader, mut questions) = next_hops();
        let there: IpAddr = "192.0.2.7".parse().unwrap();
        let mut hops = reader.now();
        assert_eq!((hops.find(there), hops.find(there)), (None, None));
        assert_eq!(questions.try_recv(), Ok(there));
        assert!(questions.try_recv().is_err());
        let hop = NextHop {
            from: [2; 6],
            to: [4; 6],
            source: "192.0.2.1".parse().unwrap(),
            mtu: 1500,
        };
        table.store(Arc::new(NextHops::from([(there, Some(hop))])));
        assert_eq!(hops.find(there), None, "one batch, one answer");
        assert_eq!(reader.now().find(there), Some(hop));
        // And one that only the kernel can reach is not asked for again.
        table.store(Arc::new(NextHops::from([(there, None)])));
        assert_eq!(reader.now().find(there), None);
        assert!(questions.try_recv().is_err());
    }
}
