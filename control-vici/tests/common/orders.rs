//! All orders in which things can happen, given what must come before what.

/// Things that happen, each with those that must have happened before it, by their places.
#[derive(Clone, Debug)]
pub struct Happenings<T> {
    pub things: Vec<(T, Vec<usize>)>,
}

impl<T: Copy + PartialEq> Happenings<T> {
    pub fn new() -> Self {
        Self { things: Vec::new() }
    }

    /// Things that happen in this order.
    pub fn chain(mut self, things: &[T]) -> Self {
        for (at, thing) in things.iter().enumerate() {
            let before = if at == 0 {
                vec![]
            } else {
                vec![self.things.len() - 1]
            };
            self.things.push((*thing, before));
        }
        self
    }

    /// This happens after those.
    pub fn after(mut self, thing: T, before: &[T]) -> Self {
        let places: Vec<usize> = before.iter().map(|thing| self.place(*thing)).collect();
        let at = self.place(thing);
        self.things[at].1.extend(places);
        self
    }

    fn place(&self, thing: T) -> usize {
        self.things
            .iter()
            .position(|(known, _)| *known == thing)
            .unwrap()
    }

    /// Calls `story` with every order; answers how many there are.
    pub fn every_order(&self, mut story: impl FnMut(&[T])) -> usize {
        let mut order = Vec::new();
        self.extend(&mut order, &mut story)
    }

    fn extend(&self, order: &mut Vec<usize>, story: &mut impl FnMut(&[T])) -> usize {
        if order.len() == self.things.len() {
            let things: Vec<T> = order.iter().map(|at| self.things[*at].0).collect();
            story(&things);
            return 1;
        }
        let mut orders = 0;
        for next in self.ready(order) {
            order.push(next);
            orders += self.extend(order, story);
            order.pop();
        }
        orders
    }

    /// One order, chosen by numbers.
    pub fn an_order(&self, mut choose: impl FnMut(usize) -> usize) -> Vec<T> {
        let mut order = Vec::new();
        while order.len() < self.things.len() {
            let ready = self.ready(&order);
            order.push(ready[choose(ready.len())]);
        }
        order.into_iter().map(|at| self.things[at].0).collect()
    }

    fn ready(&self, order: &[usize]) -> Vec<usize> {
        let is_ready = |at: &usize| {
            let (_, before) = &self.things[*at];
            !order.contains(at) && before.iter().all(|earlier| order.contains(earlier))
        };
        (0..self.things.len()).filter(is_ready).collect()
    }
}
