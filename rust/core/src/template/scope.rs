//! Which variable a name means: every name of a template gets a place before it runs.
//!
//! Jinja's rule, which its compiler applies too: loops, macros and blocks that capture have variables of their own; what
//! they assign begins as what the scope around them has under that name, and is gone at their end. `{% if %}` has none.

use std::collections::HashMap;

use super::ast::{Body, Call, Expr, For, Function, Kind, Macro, Name, Place, Scoped, Target};
use super::failure::{Refusal, refuse};
use super::filters::Filter;
use super::order::{Order, assigned, targets};
use super::parser::Parsed;
use super::visit::{children, visit, walk};

/// A template whose names have places.
#[derive(Debug)]
pub(super) struct Program {
    pub body: Body,
    pub macros: Vec<Macro>,
    /// How many variables the template has outside of macros.
    pub num_places: usize,
    /// Names that the caller may give a value, and their places.
    pub context: Vec<(Box<str>, usize)>,
    /// Does it ask for the date?
    pub is_date_dependent: bool,
    /// Does it mark what the model writes?
    pub has_generation: bool,
}

/// Gives every name its place, and refuses what only the scopes can tell.
pub(super) fn resolve(mut parsed: Parsed) -> Result<Program, Refusal> {
    let macros = parsed.macros.drain(..).map(Some).collect();
    let mut resolver = Resolver { macros, ..Resolver::default() };
    let mut scope = Scope { order: Order::of(&mut parsed.body, &[]), ..Scope::default() };
    assigned(&parsed.body, &mut |name| {
        let is_hidden = scope.order.hides(name);
        let place = || if is_hidden { resolver.new_place() } else { resolver.context_place(name) };
        scope.places.entry(name.into()).or_insert_with(place);
    });
    resolver.scopes.push(scope);
    resolver.body(&mut parsed.body)?;
    Ok(Program {
        body: parsed.body,
        macros: resolver.macros.into_iter().map(|definition| definition.expect("every macro was put back")).collect(),
        num_places: resolver.num_root,
        context: resolver.context.into_iter().collect(),
        is_date_dependent: resolver.is_date_dependent,
        has_generation: resolver.has_generation,
    })
}

#[derive(Default)]
struct Scope {
    places: HashMap<Box<str>, Place>,
    order: Order,
}

#[derive(Default)]
struct Resolver {
    /// From the template itself to the innermost scope.
    scopes: Vec<Scope>,
    macros: Vec<Option<Macro>>,
    num_root: usize,
    /// Variables of the macro that is being resolved.
    num_local: Option<usize>,
    context: HashMap<Box<str>, usize>,
    is_date_dependent: bool,
    has_generation: bool,
    line: u32,
}

/// Collects the names of the namespaces that `body` sets attributes of.
fn namespaces_set(body: &Body, names: &mut Vec<Box<str>>) {
    for statement in body {
        match &statement.kind {
            Kind::Set(Target::Attribute(name, _), _) | Kind::SetBlock(Target::Attribute(name, _), ..) => {
                names.push(name.text.clone());
            }
            Kind::If(branches, otherwise) => {
                branches.iter().for_each(|(_, body)| namespaces_set(body, names));
                namespaces_set(otherwise, names);
            }
            Kind::For(inner) => {
                namespaces_set(&inner.scoped.body, names);
                namespaces_set(&inner.otherwise.body, names);
            }
            Kind::With(_, scoped) | Kind::Generation(scoped) => namespaces_set(&scoped.body, names),
            _ => {}
        }
    }
}

impl Resolver {
    fn new_place(&mut self) -> Place {
        let (count, place): (_, fn(usize) -> Place) = match &mut self.num_local {
            Some(count) => (count, Place::Local),
            None => (&mut self.num_root, Place::Root),
        };
        *count += 1;
        place(*count - 1)
    }

    /// The place of a name that no scope assigns: the caller's, or undefined.
    fn context_place(&mut self, name: &str) -> Place {
        if let Some(place) = self.context.get(name) {
            return Place::Root(*place);
        }
        self.context.insert(name.into(), self.num_root);
        self.num_root += 1;
        Place::Root(self.num_root - 1)
    }

    fn find(&self, name: &str) -> Option<Place> {
        self.scopes.iter().rev().find_map(|scope| scope.places.get(name).copied())
    }

    fn load(&mut self, name: &mut Name) {
        name.place = self.find(&name.text).unwrap_or_else(|| self.context_place(&name.text));
    }

    fn store(&mut self, target: &mut Target) {
        match target {
            Target::Name(name) | Target::Attribute(name, _) => self.load(name),
            Target::Tuple(parts) => parts.iter_mut().for_each(|part| self.store(part)),
        }
    }

    /// Resolves a body with variables of its own; `parameters` are assigned by whoever enters it.
    fn scoped(&mut self, scoped: &mut Scoped, parameters: &mut [&mut Target]) -> Result<(), Refusal> {
        self.enter(scoped, parameters);
        self.body(&mut scoped.body)?;
        self.scopes.pop();
        Ok(())
    }

    fn enter(&mut self, scoped: &mut Scoped, parameters: &mut [&mut Target]) {
        let mut scope = Scope::default();
        for target in parameters.iter() {
            targets(target, &mut |name| {
                let place = self.new_place();
                scope.places.insert(name.into(), place);
            });
        }
        let names: Vec<Box<str>> = scope.places.keys().cloned().collect();
        scope.order = Order::of(&mut scoped.body, &names);
        assigned(&scoped.body, &mut |name| {
            if !scope.places.contains_key(name) {
                let is_hidden = scope.order.hides(name) && !self.scopes.iter().any(|outer| outer.order.knows(name));
                let outer =
                    if is_hidden { None } else { Some(self.find(name).unwrap_or_else(|| self.context_place(name))) };
                let place = self.new_place();
                scoped.entry.push((place, outer));
                scope.places.insert(name.into(), place);
            }
        });
        self.scopes.push(scope);
        for target in parameters {
            self.store(target);
        }
    }

    fn body(&mut self, body: &mut Body) -> Result<(), Refusal> {
        for statement in body {
            self.line = statement.line;
            match &mut statement.kind {
                Kind::Text(_) | Kind::Break | Kind::Continue => {}
                Kind::Print(value) => self.expr(value)?,
                Kind::Set(target, value) => {
                    self.expr(value)?;
                    self.store(target);
                }
                Kind::SetBlock(target, filters, scoped) => {
                    self.filters(filters)?;
                    self.scoped(scoped, &mut [])?;
                    self.store(target);
                }
                Kind::FilterBlock(filters, scoped) => {
                    self.filters(filters)?;
                    self.scoped(scoped, &mut [])?;
                }
                Kind::If(branches, otherwise) => {
                    for (test, body) in branches {
                        self.expr(test)?;
                        self.body(body)?;
                    }
                    self.body(otherwise)?;
                }
                Kind::For(definition) => self.for_loop(definition)?,
                Kind::With(values, scoped) => {
                    for (_, value) in values.iter_mut() {
                        self.expr(value)?;
                    }
                    let mut targets: Vec<&mut Target> = values.iter_mut().map(|(target, _)| target).collect();
                    self.scoped(scoped, &mut targets)?;
                }
                Kind::Macro(name, index) => {
                    self.load(name);
                    self.macro_definition(*index)?;
                }
                Kind::Generation(scoped) => {
                    self.has_generation = true;
                    self.scoped(scoped, &mut [])?;
                }
            }
        }
        Ok(())
    }

    fn filters(&mut self, filters: &mut [Call<Filter>]) -> Result<(), Refusal> {
        filters.iter_mut().try_for_each(|filter| self.arguments(&mut filter.arguments, &mut filter.named))
    }

    fn for_loop(&mut self, definition: &mut For) -> Result<(), Refusal> {
        self.expr(&mut definition.iterable)?;
        self.scoped(&mut definition.otherwise, &mut [])?;
        self.enter(&mut definition.scoped, &mut [&mut definition.target]);
        // The place of `loop` exists in every loop, so that an inner loop hides the outer one; it is filled where it is read.
        let place = self.new_place();
        self.innermost().places.insert("loop".into(), place);
        let mut reads_loop = false;
        walk(&mut definition.scoped.body, &mut |expr| {
            reads_loop |= matches!(expr, Expr::Name(name) if &*name.text == "loop")
        });
        definition.loop_place = reads_loop.then_some(place);
        if let Some(condition) = &mut definition.condition {
            // A body that reads `loop` needs to know in advance which items pass, so the condition may not depend on the body.
            let mut changed = Vec::new();
            namespaces_set(&definition.scoped.body, &mut changed);
            let mut depends = false;
            visit(condition, &mut |expr| {
                depends |= match expr {
                    Expr::Name(name) => &*name.text == "loop" || (reads_loop && changed.contains(&name.text)),
                    Expr::Call(call) => reads_loop && !matches!(call.callee, Expr::Attribute(..)),
                    _ => false,
                }
            });
            if depends {
                return refuse(self.line, "a loop condition that depends on the loop is not supported");
            }
            self.expr(condition)?;
        }
        self.body(&mut definition.scoped.body)?;
        self.scopes.pop();
        Ok(())
    }

    fn innermost(&mut self) -> &mut Scope {
        self.scopes.last_mut().expect("the scope of the template itself is never left")
    }

    fn macro_definition(&mut self, index: usize) -> Result<(), Refusal> {
        let mut definition = self.macros[index].take().expect("a macro is defined once");
        self.num_local = Some(0);
        let mut parameters: Vec<Target> = definition.parameters.drain(..).map(Target::Name).collect();
        self.enter(&mut definition.scoped, &mut parameters.iter_mut().collect::<Vec<_>>());
        for default in &mut definition.defaults {
            self.expr(default)?;
        }
        self.body(&mut definition.scoped.body)?;
        self.scopes.pop();
        definition.num_places = self.num_local.take().unwrap_or(0);
        definition.parameters = parameters
            .into_iter()
            .map(|target| match target {
                Target::Name(name) => name,
                _ => unreachable!("parameters are names"),
            })
            .collect();
        self.macros[index] = Some(definition);
        Ok(())
    }

    fn arguments(&mut self, arguments: &mut [Expr], named: &mut [(Box<str>, Expr)]) -> Result<(), Refusal> {
        arguments.iter_mut().try_for_each(|value| self.expr(value))?;
        named.iter_mut().try_for_each(|(_, value)| self.expr(value))
    }

    fn expr(&mut self, expr: &mut Expr) -> Result<(), Refusal> {
        match expr {
            Expr::Name(name) => {
                if let Some((_, function)) = Function::ALL.iter().find(|(known, _)| **known == *name.text)
                    && self.find(&name.text).is_none()
                {
                    self.is_date_dependent |= *function == Function::StrftimeNow;
                    *expr = Expr::Function(*function);
                    return Ok(());
                }
                let is_special = matches!(
                    &*name.text,
                    "caller" | "varargs" | "kwargs" | "self" | "super" | "cycler" | "joiner" | "lipsum"
                );
                if is_special && self.find(&name.text).is_none() {
                    return refuse(self.line, format!("'{}' is not supported", name.text));
                }
                self.load(name);
            }
            Expr::Call(call) => {
                if let Expr::Name(name) = &call.callee
                    && self.find(&name.text).is_none()
                    && !Function::ALL.iter().any(|(known, _)| **known == *name.text)
                {
                    return refuse(self.line, format!("unknown or unsupported function '{}'", name.text));
                }
                self.expr(&mut call.callee)?;
                self.arguments(&mut call.arguments, &mut call.named)?;
            }
            _ => {
                let mut result = Ok(());
                children(expr, &mut |child| {
                    if result.is_ok() {
                        result = self.expr(child);
                    }
                });
                result?;
            }
        }
        Ok(())
    }
}
