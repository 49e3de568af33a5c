//! Long-lived static keys come to where numbers end.
