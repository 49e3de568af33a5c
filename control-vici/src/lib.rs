//! Takes over what an unmodified strongSwan negotiates by IKEv2.
//!
//! VICI hands out no keys. They come from the kernel's SA database, to which charon gives them;
//! names and traffic selectors come from VICI; both are joined on the SPI.
//!
//! ```text
//!   charon ──unix socket──▶ vici/  ──ViciEvent──▶┐                      ┌──SaCommand──▶ dataplane
//!     │                     ◀─ViciRequest────────┤   importer/ (pure)   │
//!     │ NETLINK_XFRM                             │   one Child per      │
//!     ▼                                          │   CHILD_SA           │
//!   kernel ──netlink──────▶ xfrm/  ──XfrmEvent──▶┘                      └◀─SaEvent────── dataplane
//!                           ◀─XfrmRequest (counters, EXPIRE, ACQUIRE)
//! ```
//!
//! | room | holds | knows |
//! |---|---|---|
//! | `vici/` | what charon tells ([`vici::IkeSa`], [`vici::ViciEvent`]), its codec, its client | a unix socket |
//! | `xfrm/` | what the kernel tells ([`xfrm::XfrmSa`], [`xfrm::XfrmEvent`]), its codec, its client | a netlink socket |
//! | `check/` | what is missing for the takeover, for `esplane strongswan check` | neither socket nor file |
//! | `kernel/` | the kernel's part for a charon whose kernel has no ESP (mode B), in place of `xfrm/`'s client; `preload/` is the library in charon that leads there | a unix socket |
//! | `importer/` | facts in, `SaCommand`s out | neither socket nor clock |
#![forbid(unsafe_code)]

pub mod check;
pub mod importer;
pub mod kernel;
pub mod vici;
pub mod xfrm;
