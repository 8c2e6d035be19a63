//! Tokens → statements. What Jinja knows and we don't is refused here, with its line.

use super::ast::{Body, Call, Expr, For, Kind as StatementKind, Macro, Name, Place, Scoped, Statement, Target};
use super::failure::{Refusal, refuse};
use super::filters::Filter;
use super::lexer::{Kind, Token, tokenize};

/// How deep statements and expressions may nest.
const MAX_DEPTH: usize = 100;

/// Tags that Jinja has and chat templates have no use for.
const UNSUPPORTED: [&str; 8] = ["block", "extends", "include", "import", "from", "autoescape", "call", "print"];

/// The tree of a template whose names have no places yet.
#[derive(Debug, Default)]
pub(super) struct Parsed {
    pub body: Body,
    pub macros: Vec<Macro>,
}

/// Reads a whole template.
pub(super) fn parse(source: &str) -> Result<Parsed, Refusal> {
    let mut parser = Parser {
        tokens: tokenize(source)?,
        at: 0,
        depth: 0,
        macros: Vec::new(),
        in_macro: false,
        in_loop: false,
        in_capture: false,
    };
    let body = parser.body(&[])?;
    Ok(Parsed { body, macros: parser.macros })
}

pub(super) struct Parser {
    tokens: Vec<Token>,
    at: usize,
    depth: usize,
    macros: Vec<Macro>,
    in_macro: bool,
    /// Is there a loop that `break` could leave?
    in_loop: bool,
    /// Does the output go into a variable or a filter?
    in_capture: bool,
}

pub(super) type Parse<T> = Result<T, Refusal>;

impl Parser {
    pub fn peek(&self) -> &Kind {
        &self.tokens[self.at].kind
    }

    pub fn peek_second(&self) -> &Kind {
        &self.tokens[(self.at + 1).min(self.tokens.len() - 1)].kind
    }

    pub fn line(&self) -> u32 {
        self.tokens[self.at].line
    }

    pub fn next(&mut self) -> Kind {
        let last = self.tokens.len() - 1;
        let kind = std::mem::replace(&mut self.tokens[self.at].kind, Kind::End);
        self.at = (self.at + 1).min(last);
        kind
    }

    pub fn refuse<T>(&self, reason: impl Into<String>) -> Parse<T> {
        refuse(self.line(), reason)
    }

    pub fn at_op(&self, operator: &str) -> bool {
        matches!(self.peek(), Kind::Op(found) if *found == operator)
    }

    pub fn at_name(&self, name: &str) -> bool {
        matches!(self.peek(), Kind::Name(found) if found == name)
    }

    pub fn skip_op(&mut self, operator: &str) -> bool {
        let found = self.at_op(operator);
        if found {
            self.next();
        }
        found
    }

    pub fn skip_name(&mut self, name: &str) -> bool {
        let found = self.at_name(name);
        if found {
            self.next();
        }
        found
    }

    pub fn expect_op(&mut self, operator: &str) -> Parse<()> {
        if self.skip_op(operator) { Ok(()) } else { self.expected(&format!("'{operator}'")) }
    }

    pub fn expect_name(&mut self) -> Parse<Box<str>> {
        match self.peek() {
            Kind::Name(_) => match self.next() {
                Kind::Name(name) => Ok(name.into()),
                _ => unreachable!("the token was a name"),
            },
            _ => self.expected("a name"),
        }
    }

    pub fn expected<T>(&self, what: &str) -> Parse<T> {
        let found = match self.peek() {
            Kind::Data(_) => "text".to_owned(),
            Kind::PrintBegin => "'{{'".into(),
            Kind::PrintEnd => "'}}'".into(),
            Kind::BlockBegin => "'{%'".into(),
            Kind::BlockEnd => "'%}'".into(),
            Kind::Name(name) => format!("'{name}'"),
            Kind::Text(text) => format!("the string '{text}'"),
            Kind::Int(number) => number.to_string(),
            Kind::Float(number) => number.to_string(),
            Kind::Op(operator) => format!("'{operator}'"),
            Kind::End => "the end of the template".into(),
        };
        self.refuse(format!("expected {what}, found {found}"))
    }

    /// Runs `parse` one level deeper.
    pub fn deeper<T>(&mut self, parse: impl FnOnce(&mut Self) -> Parse<T>) -> Parse<T> {
        if self.depth == MAX_DEPTH {
            return self.refuse(format!("nested deeper than {MAX_DEPTH} levels"));
        }
        self.depth += 1;
        let result = parse(self);
        self.depth -= 1;
        result
    }

    /// Statements up to a tag named in `ends`, whose name is left to be read; to the end of the template if `ends` is empty.
    fn body(&mut self, ends: &[&str]) -> Parse<Body> {
        let mut body = Body::new();
        loop {
            let line = self.line();
            let kind = match self.next() {
                Kind::Data(text) => StatementKind::Text(text.into()),
                Kind::PrintBegin => {
                    let value = self.tuple(true, &[])?;
                    if self.next() != Kind::PrintEnd {
                        return refuse(line, "expected '}}' at the end of the expression");
                    }
                    StatementKind::Print(value)
                }
                Kind::BlockBegin => {
                    if ends.iter().any(|end| self.at_name(end)) {
                        return Ok(body);
                    }
                    let statement = self.deeper(|parser| parser.statement())?;
                    self.block_end()?;
                    statement
                }
                _ if ends.is_empty() => return Ok(body),
                _ => {
                    return refuse(
                        line,
                        format!("expected {{% {} %}}, found the end of the template", ends[ends.len() - 1]),
                    );
                }
            };
            body.push(Statement { line, kind });
        }
    }

    fn block_end(&mut self) -> Parse<()> {
        if *self.peek() != Kind::BlockEnd {
            return self.expected("'%}'");
        }
        self.next();
        Ok(())
    }

    /// The body of a block: its opening tag's end, statements, and the name of the closing tag.
    fn block(&mut self, ends: &[&str]) -> Parse<(Body, Box<str>)> {
        self.skip_op(":");
        self.block_end()?;
        let body = self.body(ends)?;
        Ok((body, self.expect_name()?))
    }

    /// The tag behind `{%`, up to its last `%}`.
    fn statement(&mut self) -> Parse<StatementKind> {
        let line = self.line();
        let tag = self.expect_name()?;
        Ok(match &*tag {
            "set" => self.set()?,
            "if" => self.if_chain()?,
            "for" => self.for_loop()?,
            "macro" => self.macro_definition(line)?,
            "with" => self.with()?,
            "filter" => {
                let filters = self.filters(true)?;
                StatementKind::FilterBlock(filters, self.captured("endfilter")?)
            }
            "generation" => {
                if self.in_macro || self.in_capture {
                    return refuse(
                        line,
                        "{% generation %} inside a macro or a captured block has no place in the text",
                    );
                }
                StatementKind::Generation(self.captured("endgeneration")?)
            }
            "break" | "continue" if !self.in_loop => return refuse(line, format!("'{tag}' outside of a loop")),
            "break" => StatementKind::Break,
            "continue" => StatementKind::Continue,
            tag if UNSUPPORTED.contains(&tag) => return refuse(line, format!("{{% {tag} %}} is not supported")),
            tag => return refuse(line, format!("unknown tag '{tag}'")),
        })
    }

    /// The body of a block whose output is not written but kept.
    fn captured(&mut self, end: &str) -> Parse<Scoped> {
        let outer = (std::mem::replace(&mut self.in_loop, false), std::mem::replace(&mut self.in_capture, true));
        let (body, _) = self.block(&[end])?;
        (self.in_loop, self.in_capture) = outer;
        Ok(Scoped { body, ..Scoped::default() })
    }

    fn set(&mut self) -> Parse<StatementKind> {
        let target = self.targets(true, &[])?;
        if self.skip_op("=") {
            return Ok(StatementKind::Set(target, self.tuple(true, &[])?));
        }
        let filters = self.filters(false)?;
        Ok(StatementKind::SetBlock(target, filters, self.captured("endset")?))
    }

    fn if_chain(&mut self) -> Parse<StatementKind> {
        let mut branches = Vec::new();
        loop {
            let test = self.tuple(false, &[])?;
            let (body, end) = self.block(&["elif", "else", "endif"])?;
            branches.push((test, body));
            match &*end {
                "elif" => {}
                "else" => return Ok(StatementKind::If(branches, self.block(&["endif"])?.0)),
                _ => return Ok(StatementKind::If(branches, Body::new())),
            }
        }
    }

    fn for_loop(&mut self) -> Parse<StatementKind> {
        let target = self.targets(false, &["in"])?;
        if !self.skip_name("in") {
            return self.expected("'in'");
        }
        let iterable = self.tuple(false, &["recursive"])?;
        let condition = if self.skip_name("if") { Some(self.expression(true)?) } else { None };
        if self.at_name("recursive") {
            return self.refuse("a recursive loop is not supported");
        }
        let outer = std::mem::replace(&mut self.in_loop, true);
        let (body, end) = self.block(&["endfor", "else"])?;
        self.in_loop = outer;
        let otherwise = if &*end == "else" { self.block(&["endfor"])?.0 } else { Body::new() };
        Ok(StatementKind::For(Box::new(For {
            target,
            iterable,
            condition,
            scoped: Scoped { body, ..Scoped::default() },
            loop_place: None,
            otherwise: Scoped { body: otherwise, ..Scoped::default() },
        })))
    }

    fn with(&mut self) -> Parse<StatementKind> {
        let mut values = Vec::new();
        while *self.peek() != Kind::BlockEnd {
            if !values.is_empty() {
                self.expect_op(",")?;
            }
            let target = self.targets(false, &[])?;
            self.expect_op("=")?;
            values.push((target, self.expression(true)?));
        }
        let (body, _) = self.block(&["endwith"])?;
        Ok(StatementKind::With(values, Scoped { body, ..Scoped::default() }))
    }

    fn macro_definition(&mut self, line: u32) -> Parse<StatementKind> {
        if self.in_macro || self.in_loop {
            return refuse(line, "a macro inside a macro or a loop is not supported");
        }
        let name = self.expect_name()?;
        self.expect_op("(")?;
        let (mut parameters, mut defaults) = (Vec::new(), Vec::new());
        while !self.at_op(")") {
            if !parameters.is_empty() {
                self.expect_op(",")?;
            }
            parameters.push(self.name()?);
            if self.skip_op("=") {
                defaults.push(self.expression(true)?);
            } else if !defaults.is_empty() {
                return self.refuse("a parameter without a default follows one with a default");
            }
        }
        self.expect_op(")")?;
        let outer = (std::mem::replace(&mut self.in_macro, true), std::mem::replace(&mut self.in_loop, false));
        let (body, _) = self.block(&["endmacro"])?;
        (self.in_macro, self.in_loop) = outer;
        let scoped = Scoped { body, ..Scoped::default() };
        self.macros.push(Macro { name: name.clone(), parameters, defaults, scoped, num_places: 0 });
        Ok(StatementKind::Macro(unplaced(name), self.macros.len() - 1))
    }

    fn name(&mut self) -> Parse<Name> {
        let name = self.expect_name()?;
        if matches!(&*name, "true" | "false" | "none" | "True" | "False" | "None") {
            return self.refuse(format!("can't assign to '{name}'"));
        }
        Ok(unplaced(name))
    }

    /// One target or a tuple of them, up to a name in `ends` or what can't belong to a target.
    fn targets(&mut self, with_attributes: bool, ends: &[&str]) -> Parse<Target> {
        let mut targets = vec![self.target(with_attributes, ends)?];
        let mut is_tuple = false;
        while self.skip_op(",") {
            is_tuple = true;
            if matches!(self.peek(), Kind::BlockEnd) || self.at_op(")") || ends.iter().any(|end| self.at_name(end)) {
                break;
            }
            targets.push(self.target(with_attributes, ends)?);
        }
        Ok(if is_tuple { Target::Tuple(targets) } else { targets.remove(0) })
    }

    fn target(&mut self, with_attributes: bool, ends: &[&str]) -> Parse<Target> {
        if self.skip_op("(") {
            let inner = self.deeper(|parser| parser.targets(with_attributes, ends))?;
            self.expect_op(")")?;
            return Ok(inner);
        }
        let name = self.name()?;
        if with_attributes && self.skip_op(".") {
            let attribute = self.expect_name()?;
            if attribute.starts_with('_') {
                return self.refuse(format!("a namespace can't have the attribute '{attribute}'"));
            }
            return Ok(Target::Attribute(name, attribute));
        }
        Ok(Target::Name(name))
    }

    /// `| filter | filter(…)`; `inline`: the first one stands without its bar.
    pub fn filters(&mut self, mut inline: bool) -> Parse<Vec<Call<Filter>>> {
        let mut filters = Vec::new();
        while std::mem::take(&mut inline) || self.skip_op("|") {
            let name = self.expect_name()?;
            let Some(callee) = Filter::named(&name) else {
                return self.refuse(format!("unknown or unsupported filter '{name}'"));
            };
            let (arguments, named) = if self.at_op("(") { self.arguments()? } else { Default::default() };
            callee.check_names(&arguments).or_else(|reason| self.refuse(reason))?;
            filters.push(Call { callee, arguments, named });
        }
        Ok(filters)
    }
}

/// A name whose place is not known yet.
pub(super) fn unplaced(text: Box<str>) -> Name {
    Name { text, place: Place::Root(usize::MAX) }
}

/// An expression that is only a name.
pub(super) fn variable(text: Box<str>) -> Expr {
    Expr::Name(unplaced(text))
}
