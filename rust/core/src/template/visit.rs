//! Walks over the tree of a template.

use super::ast::{Body, Expr, Kind};

/// Calls `found` for each expression directly inside of `expr`, in the order of evaluation but for `if else`.
pub(super) fn children(expr: &mut Expr, found: &mut impl FnMut(&mut Expr)) {
    match expr {
        Expr::None
        | Expr::Bool(_)
        | Expr::Int(_)
        | Expr::Float(_)
        | Expr::Text(_)
        | Expr::Name(_)
        | Expr::Function(_) => {}
        Expr::Sequence(_, items) | Expr::Concat(items) => items.iter_mut().for_each(found),
        Expr::Dict(pairs) => pairs.iter_mut().for_each(|(key, value)| {
            found(key);
            found(value);
        }),
        Expr::Attribute(value, ..) | Expr::Not(value) | Expr::Negative(value) | Expr::Positive(value) => found(value),
        Expr::Item(value, key) => {
            found(value);
            found(key);
        }
        Expr::Slice(value, bounds) => {
            found(value);
            bounds.iter_mut().flatten().for_each(found);
        }
        Expr::Binary(_, pair) | Expr::And(pair) | Expr::Or(pair) => {
            found(&mut pair.0);
            found(&mut pair.1);
        }
        Expr::Compare(first, rest) => {
            found(first);
            rest.iter_mut().for_each(|(_, value)| found(value));
        }
        Expr::Conditional(parts) => {
            found(&mut parts.0);
            found(&mut parts.1);
            parts.2.iter_mut().for_each(found);
        }
        Expr::Filter(value, call) => {
            found(value);
            call.arguments.iter_mut().for_each(&mut *found);
            call.named.iter_mut().for_each(|(_, value)| found(value));
        }
        Expr::Test(value, call) => {
            found(value);
            call.arguments.iter_mut().for_each(&mut *found);
            call.named.iter_mut().for_each(|(_, value)| found(value));
        }
        Expr::Call(call) => {
            found(&mut call.callee);
            call.arguments.iter_mut().for_each(&mut *found);
            call.named.iter_mut().for_each(|(_, value)| found(value));
        }
    }
}

/// Calls `found` for `expr` and every expression inside of it.
pub(super) fn visit(expr: &mut Expr, found: &mut dyn FnMut(&mut Expr)) {
    found(expr);
    children(expr, &mut |child| visit(child, found));
}

/// Calls `found` for every expression of `body` in which `loop` means the loop around `body`.
pub(super) fn walk(body: &mut Body, found: &mut dyn FnMut(&mut Expr)) {
    for statement in body {
        match &mut statement.kind {
            Kind::Text(_) | Kind::Break | Kind::Continue | Kind::Macro(..) => {}
            Kind::Print(value) | Kind::Set(_, value) => visit(value, found),
            Kind::SetBlock(_, filters, scoped) | Kind::FilterBlock(filters, scoped) => {
                for filter in filters {
                    filter.arguments.iter_mut().for_each(|value| visit(value, found));
                    filter.named.iter_mut().for_each(|(_, value)| visit(value, found));
                }
                walk(&mut scoped.body, found);
            }
            Kind::If(branches, otherwise) => {
                for (test, body) in branches {
                    visit(test, found);
                    walk(body, found);
                }
                walk(otherwise, found);
            }
            Kind::For(inner) => {
                visit(&mut inner.iterable, found);
                walk(&mut inner.otherwise.body, found);
            }
            Kind::With(values, scoped) => {
                values.iter_mut().for_each(|(_, value)| visit(value, found));
                walk(&mut scoped.body, found);
            }
            Kind::Generation(scoped) => walk(&mut scoped.body, found),
        }
    }
}
