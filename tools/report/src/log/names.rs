//! Each distinct label, kind and clock once, by number.

use hal::trace::{Bound, CommandKind};
use hal::{Clock, Label};
use std::collections::HashMap;
use std::sync::Arc;

#[derive(Debug, Default)]
pub(super) struct Names {
    labels: Vec<Label>,
    by_text: HashMap<Arc<str>, u32>,
    kinds: Vec<CommandKind>,
    bounds: Vec<Bound>,
    clocks: Vec<Clock>,
}

/// The number of a value in a short table, put there if it is new.
fn number<T: Copy + PartialEq>(table: &mut Vec<T>, value: T) -> u8 {
    let at = table.iter().position(|known| *known == value).unwrap_or_else(|| {
        table.push(value);
        table.len() - 1
    });
    // Each table is of an enum without data, of fewer than 256 values.
    at as u8
}

impl Names {
    pub(super) fn label(&mut self, label: &Label) -> u32 {
        if let Some(number) = self.by_text.get(label.as_str()) {
            return *number;
        }
        let number = self.labels.len() as u32;
        self.by_text.insert(label.as_str().into(), number);
        self.labels.push(label.clone());
        number
    }

    pub(super) fn kind(&mut self, kind: CommandKind) -> u8 {
        number(&mut self.kinds, kind)
    }

    pub(super) fn bound(&mut self, bound: Bound) -> u8 {
        number(&mut self.bounds, bound)
    }

    pub(super) fn clock(&mut self, clock: Clock) -> u8 {
        number(&mut self.clocks, clock)
    }

    pub(super) fn label_of(&self, number: u32) -> Option<Label> {
        self.labels.get(number as usize).cloned()
    }

    pub(super) fn kind_of(&self, number: u8) -> Option<CommandKind> {
        self.kinds.get(usize::from(number)).copied()
    }

    pub(super) fn bound_of(&self, number: u8) -> Option<Bound> {
        self.bounds.get(usize::from(number)).copied()
    }

    pub(super) fn clock_of(&self, number: u8) -> Option<Clock> {
        self.clocks.get(usize::from(number)).copied()
    }
}
