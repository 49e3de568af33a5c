//! Tunnels by their slots, in pages: a snapshot more copies the list of pages and the pages that change.

use super::Tunnel;
use crate::spd::TunnelSlot;
use std::sync::Arc;

/// Slots of one page.
const PAGE_SLOTS: usize = 64;

type Page = [Option<Arc<Tunnel>>; PAGE_SLOTS];

/// What is at each slot. A clone shares all of it.
#[derive(Clone, Default)]
pub(super) struct Places {
    pages: Arc<[Arc<Page>]>,
}

impl Places {
    #[inline]
    pub fn get(&self, slot: TunnelSlot) -> Option<&Arc<Tunnel>> {
        let slot = slot.0 as usize;
        self.pages.get(slot / PAGE_SLOTS)?[slot % PAGE_SLOTS].as_ref()
    }

    pub fn set(&mut self, slot: TunnelSlot, tunnel: Option<Arc<Tunnel>>) {
        let slot = slot.0 as usize;
        if self.pages.len() <= slot / PAGE_SLOTS {
            let wanted = (slot / PAGE_SLOTS + 1).next_power_of_two();
            let more = std::iter::repeat_with(|| Arc::new([const { None }; PAGE_SLOTS]));
            let all = self.pages.iter().cloned().chain(more);
            self.pages = all.take(wanted).collect();
        }
        let page = &mut Arc::make_mut(&mut self.pages)[slot / PAGE_SLOTS];
        Arc::make_mut(page)[slot % PAGE_SLOTS] = tunnel;
    }
}
