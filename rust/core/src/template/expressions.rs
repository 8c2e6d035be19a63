//! Tokens → expressions, with Jinja's precedence: `if else`, `or`, `and`, `not`, comparisons, `+ -`, `~`, `* / // %`, `**`,
//! signs, then attributes, calls, filters and tests.

use super::ast::{Call, Comparison, Expr, Operator};
use super::lexer::Kind;
use super::methods::Attribute;
use super::parser::{Parse, Parser, variable};
use super::predicates::Predicate;
use super::value::SequenceKind;

/// Positional and named arguments of a call.
type Arguments = (Vec<Expr>, Vec<(Box<str>, Expr)>);

impl Parser {
    /// An expression or, where commas follow, a tuple that ends at `)`, the tag's end or a name in `ends`.
    pub fn tuple(&mut self, with_conditional: bool, ends: &[&str]) -> Parse<Expr> {
        let mut items = vec![self.expression(with_conditional)?];
        let mut is_tuple = false;
        while self.skip_op(",") {
            is_tuple = true;
            if self.at_tuple_end(ends) {
                break;
            }
            items.push(self.expression(with_conditional)?);
        }
        Ok(if is_tuple { Expr::Sequence(SequenceKind::Tuple, items) } else { items.remove(0) })
    }

    fn at_tuple_end(&self, ends: &[&str]) -> bool {
        matches!(self.peek(), Kind::PrintEnd | Kind::BlockEnd)
            || self.at_op(")")
            || ends.iter().any(|end| self.at_name(end))
    }

    /// One expression; `with_conditional`: may it be `a if b else c`?
    pub fn expression(&mut self, with_conditional: bool) -> Parse<Expr> {
        self.deeper(|parser| if with_conditional { parser.conditional() } else { parser.or() })
    }

    fn conditional(&mut self) -> Parse<Expr> {
        let mut value = self.or()?;
        while self.skip_name("if") {
            let test = self.or()?;
            let otherwise =
                if self.skip_name("else") { Some(self.deeper(|parser| parser.conditional())?) } else { None };
            value = Expr::Conditional(Box::new((test, value, otherwise)));
        }
        Ok(value)
    }

    fn or(&mut self) -> Parse<Expr> {
        let mut left = self.and()?;
        while self.skip_name("or") {
            left = Expr::Or(Box::new((left, self.and()?)));
        }
        Ok(left)
    }

    fn and(&mut self) -> Parse<Expr> {
        let mut left = self.not()?;
        while self.skip_name("and") {
            left = Expr::And(Box::new((left, self.not()?)));
        }
        Ok(left)
    }

    fn not(&mut self) -> Parse<Expr> {
        if self.skip_name("not") {
            return Ok(Expr::Not(Box::new(self.deeper(|parser| parser.not())?)));
        }
        self.compare()
    }

    fn compare(&mut self) -> Parse<Expr> {
        let first = self.sum()?;
        let mut rest = Vec::new();
        loop {
            let comparison = match self.peek() {
                Kind::Op("==") => Comparison::Equal,
                Kind::Op("!=") => Comparison::NotEqual,
                Kind::Op("<") => Comparison::Less,
                Kind::Op("<=") => Comparison::LessOrEqual,
                Kind::Op(">") => Comparison::Greater,
                Kind::Op(">=") => Comparison::GreaterOrEqual,
                Kind::Name(name) if name == "in" => Comparison::In,
                Kind::Name(name) if name == "not" && matches!(self.peek_second(), Kind::Name(next) if next == "in") => {
                    self.next();
                    Comparison::NotIn
                }
                _ => break,
            };
            self.next();
            rest.push((comparison, self.sum()?));
        }
        Ok(if rest.is_empty() { first } else { Expr::Compare(Box::new(first), rest) })
    }

    fn sum(&mut self) -> Parse<Expr> {
        let mut left = self.concat()?;
        loop {
            let operator = match self.peek() {
                Kind::Op("+") => Operator::Add,
                Kind::Op("-") => Operator::Subtract,
                _ => return Ok(left),
            };
            self.next();
            left = Expr::Binary(operator, Box::new((left, self.concat()?)));
        }
    }

    fn concat(&mut self) -> Parse<Expr> {
        let mut parts = vec![self.product()?];
        while self.skip_op("~") {
            parts.push(self.product()?);
        }
        Ok(if parts.len() == 1 { parts.remove(0) } else { Expr::Concat(parts) })
    }

    fn product(&mut self) -> Parse<Expr> {
        let mut left = self.power()?;
        loop {
            let operator = match self.peek() {
                Kind::Op("*") => Operator::Multiply,
                Kind::Op("/") => Operator::Divide,
                Kind::Op("//") => Operator::FloorDivide,
                Kind::Op("%") => Operator::Modulo,
                _ => return Ok(left),
            };
            self.next();
            left = Expr::Binary(operator, Box::new((left, self.power()?)));
        }
    }

    fn power(&mut self) -> Parse<Expr> {
        let mut left = self.unary(true)?;
        while self.skip_op("**") {
            left = Expr::Binary(Operator::Power, Box::new((left, self.unary(true)?)));
        }
        Ok(left)
    }

    fn unary(&mut self, with_filters: bool) -> Parse<Expr> {
        let sign = match self.peek() {
            Kind::Op("-") => Some(Expr::Negative as fn(Box<Expr>) -> Expr),
            Kind::Op("+") => Some(Expr::Positive as fn(Box<Expr>) -> Expr),
            _ => None,
        };
        let value = match sign {
            Some(sign) => {
                self.next();
                sign(Box::new(self.deeper(|parser| parser.unary(false))?))
            }
            None => self.primary()?,
        };
        let value = self.postfix(value)?;
        if with_filters { self.filters_and_tests(value) } else { Ok(value) }
    }

    fn primary(&mut self) -> Parse<Expr> {
        let line_start = self.peek().clone();
        match line_start {
            Kind::Name(name) => {
                self.next();
                Ok(match name.as_str() {
                    "true" | "True" => Expr::Bool(true),
                    "false" | "False" => Expr::Bool(false),
                    "none" | "None" => Expr::None,
                    _ => variable(name.into()),
                })
            }
            Kind::Text(mut text) => {
                self.next();
                while let Kind::Text(more) = self.peek() {
                    text.push_str(more);
                    self.next();
                }
                Ok(Expr::Text(text.into()))
            }
            Kind::Int(number) => {
                self.next();
                Ok(Expr::Int(number))
            }
            Kind::Float(number) => {
                self.next();
                Ok(Expr::Float(number))
            }
            Kind::Op("(") => {
                self.next();
                if self.skip_op(")") {
                    return Ok(Expr::Sequence(SequenceKind::Tuple, Vec::new()));
                }
                let value = self.tuple(true, &[])?;
                self.expect_op(")")?;
                Ok(value)
            }
            Kind::Op("[") => {
                self.next();
                let mut items = Vec::new();
                while !self.at_op("]") {
                    if !items.is_empty() {
                        self.expect_op(",")?;
                        if self.at_op("]") {
                            break;
                        }
                    }
                    items.push(self.expression(true)?);
                }
                self.expect_op("]")?;
                Ok(Expr::Sequence(SequenceKind::List, items))
            }
            Kind::Op("{") => {
                self.next();
                let mut items = Vec::new();
                while !self.at_op("}") {
                    if !items.is_empty() {
                        self.expect_op(",")?;
                        if self.at_op("}") {
                            break;
                        }
                    }
                    let key = self.expression(true)?;
                    self.expect_op(":")?;
                    items.push((key, self.expression(true)?));
                }
                self.expect_op("}")?;
                Ok(Expr::Dict(items))
            }
            _ => self.expected("an expression"),
        }
    }

    fn postfix(&mut self, mut value: Expr) -> Parse<Expr> {
        loop {
            if self.skip_op(".") {
                value = match self.peek() {
                    Kind::Int(index) => {
                        let index = Expr::Int(*index);
                        self.next();
                        Expr::Item(Box::new(value), Box::new(index))
                    }
                    _ => {
                        let name = self.expect_name()?;
                        if name.starts_with("__") {
                            return self.refuse(format!("the attribute '{name}' is not supported"));
                        }
                        Expr::Attribute(Box::new(value), Attribute::named(&name), name)
                    }
                };
            } else if self.skip_op("[") {
                value = self.subscript(value)?;
                self.expect_op("]")?;
            } else if self.at_op("(") {
                value = self.call(value)?;
            } else {
                return Ok(value);
            }
        }
    }

    fn subscript(&mut self, value: Expr) -> Parse<Expr> {
        let start = if self.at_op(":") { None } else { Some(self.expression(true)?) };
        if !self.at_op(":") {
            if self.at_op(",") {
                return self.refuse("a subscript of several values is not supported");
            }
            let key = start.map_or_else(|| self.expected("a subscript"), Ok)?;
            return Ok(Expr::Item(Box::new(value), Box::new(key)));
        }
        self.next();
        let stop = if self.at_op(":") || self.at_op("]") { None } else { Some(self.expression(true)?) };
        let step = if self.skip_op(":") && !self.at_op("]") { Some(self.expression(true)?) } else { None };
        Ok(Expr::Slice(Box::new(value), Box::new([start, stop, step])))
    }

    fn call(&mut self, callee: Expr) -> Parse<Expr> {
        if let Expr::Attribute(_, attribute, name) = &callee
            && !attribute.is_callable()
        {
            return self.refuse(format!("unknown or unsupported method '{name}'"));
        }
        let (arguments, named) = self.arguments()?;
        Ok(Expr::Call(Box::new(Call { callee, arguments, named })))
    }

    /// `(a, b, name=c)`
    pub fn arguments(&mut self) -> Parse<Arguments> {
        self.expect_op("(")?;
        let (mut arguments, mut named) = (Vec::new(), Vec::<(Box<str>, Expr)>::new());
        while !self.at_op(")") {
            if !(arguments.is_empty() && named.is_empty()) {
                self.expect_op(",")?;
                if self.at_op(")") {
                    break;
                }
            }
            if self.at_op("*") || self.at_op("**") {
                return self.refuse("arguments unpacked with '*' are not supported");
            }
            if matches!(self.peek(), Kind::Name(_)) && matches!(self.peek_second(), Kind::Op("=")) {
                let name = self.expect_name()?;
                self.next();
                if named.iter().any(|(earlier, _)| *earlier == name) {
                    return self.refuse(format!("the argument '{name}' is given twice"));
                }
                named.push((name, self.expression(true)?));
            } else if named.is_empty() {
                arguments.push(self.expression(true)?);
            } else {
                return self.refuse("a positional argument follows a named one");
            }
        }
        self.expect_op(")")?;
        Ok((arguments, named))
    }

    fn filters_and_tests(&mut self, mut value: Expr) -> Parse<Expr> {
        loop {
            if self.at_op("|") {
                for filter in self.filters(false)? {
                    value = Expr::Filter(Box::new(value), Box::new(filter));
                }
            } else if self.skip_name("is") {
                value = self.test(value)?;
            } else if self.at_op("(") {
                value = self.call(value)?;
            } else {
                return Ok(value);
            }
        }
    }

    fn test(&mut self, value: Expr) -> Parse<Expr> {
        let negated = self.skip_name("not");
        let name = self.expect_name()?;
        let Some(callee) = Predicate::named(&name) else {
            return self.refuse(format!("unknown or unsupported test '{name}'"));
        };
        let (arguments, named) = match self.peek() {
            Kind::Op("(") => self.arguments()?,
            Kind::Name(next) if matches!(next.as_str(), "else" | "or" | "and") => Default::default(),
            Kind::Name(next) if next == "is" => return self.refuse("tests can't be chained with 'is'"),
            Kind::Name(_) | Kind::Text(_) | Kind::Int(_) | Kind::Float(_) | Kind::Op("[" | "{") => {
                let argument = self.deeper(|parser| parser.primary())?;
                (vec![self.postfix(argument)?], Vec::new())
            }
            _ => Default::default(),
        };
        let test = Expr::Test(Box::new(value), Box::new(Call { callee, arguments, named }));
        Ok(if negated { Expr::Not(Box::new(test)) } else { test })
    }
}
