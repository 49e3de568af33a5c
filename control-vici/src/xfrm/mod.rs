//! XFRM, the kernel's SA database over netlink: what it tells, and what it can be told.

mod model;

pub use model::{
    SaKey, XfrmCipher, XfrmEncap, XfrmEvent, XfrmMode, XfrmReply, XfrmRequest, XfrmSa,
};
