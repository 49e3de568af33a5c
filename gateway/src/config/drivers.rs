//! `outer`, `inner`: network cards that packets pass without the kernel's stack.

use super::{
    document::{At, DriverDocument},
    problem::Problems,
    resolve::{auto_or_number, interface_name},
};
use std::num::NonZeroU32;

const MAX_QUEUES: u64 = 256;

/// An interface that is driven over AF_XDP.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct XdpInterface {
    /// Its name.
    pub name: String,
    /// How many of its queues, from the first on; `None`: all.
    pub queues: Option<NonZeroU32>,
}

/// `None` on a side: the kernel's sockets, the TUN interface.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Drivers {
    /// Towards the public network.
    pub outer: Option<XdpInterface>,
    /// Towards the private network.
    pub inner: Option<XdpInterface>,
}

/// Both sides; `None` if something is wrong with one, which is reported.
pub(super) fn drivers(
    p: &mut Problems<'_>,
    outer: Option<&DriverDocument>,
    inner: Option<&DriverDocument>,
) -> Option<Drivers> {
    let outer = outer.map(|document| xdp(p, document, "outer"));
    let inner_side = inner.map(|document| xdp(p, document, "inner"));
    let drivers = Drivers {
        outer: transposed(outer)?,
        inner: transposed(inner_side)?,
    };
    if let (Some(one), Some(other), Some(document)) = (&drivers.outer, &drivers.inner, inner)
        && one.name == other.name
    {
        let at: &At<String> = &document.xdp.interface;
        p.add(at.referenced, "inner.xdp.interface", format_args!(
            "`{}` is the outer interface too; the two sides need an interface each, or leave `inner` out: the kernel then routes between it and the tunnels", other.name
        ));
        return None;
    }
    Some(drivers)
}

/// Nothing, or something right; `None` if it is wrong.
fn transposed(side: Option<Option<XdpInterface>>) -> Option<Option<XdpInterface>> {
    match side {
        None => Some(None),
        Some(None) => None,
        Some(found) => Some(found),
    }
}

fn xdp(p: &mut Problems<'_>, document: &DriverDocument, side: &str) -> Option<XdpInterface> {
    let name = interface_name(p, &document.xdp.interface, &format!("{side}.xdp.interface"));
    let path = format!("{side}.xdp.queues");
    let queues = auto_or_number(p, document.xdp.queues.as_ref(), &path, 1..=MAX_QUEUES)?;
    Some(XdpInterface {
        name: name?,
        queues: queues.and_then(|count| NonZeroU32::new(count as u32)),
    })
}
