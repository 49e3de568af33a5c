//! The importer: facts of charon and the kernel in, commands for the dataplane out. Pure: no socket, no clock.
