//! Which names a scope assigns, and which of them it assigns before it reads them: for those Jinja hides what the caller
//! gave, even from loops and macros inside of the scope that come earlier.

use std::collections::HashSet;

use super::ast::{Body, Expr, Kind, Target};
use super::visit::visit;

/// The names that one scope reads and assigns, scopes inside of it left out.
#[derive(Clone, Default)]
pub(super) struct Order {
    known: HashSet<Box<str>>,
    hidden: HashSet<Box<str>>,
}

impl Order {
    /// The order in `body`, whose `parameters` are assigned by whoever enters it.
    pub fn of(body: &mut Body, parameters: &[Box<str>]) -> Self {
        let mut order = Self { known: parameters.iter().cloned().collect(), ..Self::default() };
        order.body(body);
        order
    }

    /// Is `name` assigned before it is read, and on no branch alone?
    pub fn hides(&self, name: &str) -> bool {
        self.hidden.contains(name)
    }

    /// Does the scope read or assign `name`?
    pub fn knows(&self, name: &str) -> bool {
        self.known.contains(name)
    }

    fn body(&mut self, body: &mut Body) {
        for statement in body {
            match &mut statement.kind {
                Kind::Text(_) | Kind::Break | Kind::Continue | Kind::Generation(_) => {}
                Kind::Print(value) => self.read(value),
                Kind::Set(target, value) => {
                    self.read(value);
                    self.assign(target);
                }
                Kind::SetBlock(target, ..) => self.assign(target),
                Kind::FilterBlock(filters, _) => {
                    let arguments = filters.iter_mut().flat_map(|filter| &mut filter.arguments);
                    arguments.for_each(|value| self.read(value));
                }
                Kind::If(branches, otherwise) => self.branches(branches, otherwise),
                Kind::For(definition) => self.read(&mut definition.iterable),
                Kind::With(values, _) => values.iter_mut().for_each(|(_, value)| self.read(value)),
                Kind::Macro(name, _) => self.assign_name(&name.text),
            }
        }
    }

    fn branches(&mut self, branches: &mut [(Expr, Body)], otherwise: &mut Body) {
        let Some(((test, body), rest)) = branches.split_first_mut() else {
            return self.body(otherwise);
        };
        self.read(test);
        let mut taken = [(); 3].map(|()| self.clone());
        taken[0].body(body);
        for (test, body) in rest {
            taken[1].read(test);
            taken[1].body(body);
        }
        taken[2].body(otherwise);
        // A name that a branch assigns may come from the caller on the other branches.
        for branch in taken {
            self.known.extend(branch.known);
        }
    }

    fn read(&mut self, expr: &mut Expr) {
        visit(expr, &mut |expr| {
            if let Expr::Name(name) = expr {
                self.known.insert(name.text.clone());
            }
        });
    }

    fn assign(&mut self, target: &Target) {
        match target {
            Target::Name(name) => self.assign_name(&name.text),
            Target::Attribute(name, _) => drop(self.known.insert(name.text.clone())),
            Target::Tuple(parts) => parts.iter().for_each(|part| self.assign(part)),
        }
    }

    fn assign_name(&mut self, name: &str) {
        if self.known.insert(name.into()) {
            self.hidden.insert(name.into());
        }
    }
}

/// Calls `found` for each name that `body` assigns in its own scope.
pub(super) fn assigned(body: &Body, found: &mut impl FnMut(&str)) {
    for statement in body {
        match &statement.kind {
            Kind::Set(target, _) | Kind::SetBlock(target, ..) => targets(target, found),
            Kind::Macro(name, _) => found(&name.text),
            Kind::If(branches, otherwise) => {
                branches.iter().for_each(|(_, body)| assigned(body, found));
                assigned(otherwise, found);
            }
            _ => {}
        }
    }
}

/// Calls `found` for each name that `target` assigns.
pub(super) fn targets(target: &Target, found: &mut impl FnMut(&str)) {
    match target {
        Target::Name(name) => found(&name.text),
        Target::Attribute(..) => {}
        Target::Tuple(parts) => parts.iter().for_each(|part| targets(part, found)),
    }
}
