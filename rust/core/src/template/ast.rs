//! The tree of a template: what the parser builds, the scoping completes and the interpreter walks.

use super::filters::Filter;
use super::methods::Attribute;
use super::predicates::Predicate;
use super::value::SequenceKind;

/// Statements in order.
pub(super) type Body = Vec<Statement>;

/// One statement and its line.
#[derive(Debug)]
pub(super) struct Statement {
    pub line: u32,
    pub kind: Kind,
}

#[derive(Debug)]
pub(super) enum Kind {
    /// Text as it stands.
    Text(Box<str>),
    /// `{{ … }}`
    Print(Expr),
    /// `{% set target = value %}`
    Set(Target, Expr),
    /// `{% set target | filters %} … {% endset %}`
    SetBlock(Target, Vec<Call<Filter>>, Scoped),
    /// `{% filter … %} … {% endfilter %}`
    FilterBlock(Vec<Call<Filter>>, Scoped),
    /// `{% if %}` and its `{% elif %}`, then `{% else %}`.
    If(Vec<(Expr, Body)>, Body),
    For(Box<For>),
    /// `{% with a = 1 %} … {% endwith %}`; the values see the scope around it.
    With(Vec<(Target, Expr)>, Scoped),
    /// Binds a macro, given by its number, to its name.
    Macro(Name, usize),
    /// `{% generation %} … {% endgeneration %}`: what the model writes.
    Generation(Scoped),
    Break,
    Continue,
}

/// A body with variables of its own.
#[derive(Debug, Default)]
pub(super) struct Scoped {
    pub body: Body,
    pub entry: Entry,
}

/// How the variables that a scope assigns begin: each as what the scope around it has under that name, if anything.
pub(super) type Entry = Vec<(Place, Option<Place>)>;

#[derive(Debug)]
pub(super) struct For {
    pub target: Target,
    pub iterable: Expr,
    /// `for … if condition`
    pub condition: Option<Expr>,
    pub scoped: Scoped,
    /// Where `loop` lives, if the body uses it.
    pub loop_place: Option<Place>,
    /// `{% else %}`: runs if there was nothing to iterate over.
    pub otherwise: Scoped,
}

/// A macro; its parameters are its first local variables.
#[derive(Debug)]
pub(super) struct Macro {
    pub name: Box<str>,
    pub parameters: Vec<Name>,
    /// Defaults of the last parameters.
    pub defaults: Vec<Expr>,
    pub scoped: Scoped,
    pub num_places: usize,
}

/// Where a variable lives while the template runs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Place {
    /// A variable of the template itself or of the caller.
    Root(usize),
    /// A variable of the running macro.
    Local(usize),
}

/// A variable as it is written, and where it lives once the scopes are known.
#[derive(Debug)]
pub(super) struct Name {
    pub text: Box<str>,
    pub place: Place,
}

/// What can be assigned to.
#[derive(Debug)]
pub(super) enum Target {
    Name(Name),
    /// `{% set namespace.attribute = … %}`
    Attribute(Name, Box<str>),
    Tuple(Vec<Target>),
}

/// A filter, test or function and what it is called with.
#[derive(Debug)]
pub(super) struct Call<T> {
    pub callee: T,
    pub arguments: Vec<Expr>,
    pub named: Vec<(Box<str>, Expr)>,
}

#[derive(Debug)]
pub(super) enum Expr {
    None,
    Bool(bool),
    Int(i128),
    Float(f64),
    Text(Box<str>),
    Name(Name),
    /// A function that the environment provides.
    Function(Function),
    Sequence(SequenceKind, Vec<Expr>),
    Dict(Vec<(Expr, Expr)>),
    /// `value.name`
    Attribute(Box<Expr>, Attribute, Box<str>),
    /// `value[key]`
    Item(Box<Expr>, Box<Expr>),
    /// `value[start:stop:step]`
    Slice(Box<Expr>, Box<[Option<Expr>; 3]>),
    Not(Box<Expr>),
    Negative(Box<Expr>),
    Positive(Box<Expr>),
    Binary(Operator, Box<(Expr, Expr)>),
    /// `a ~ b ~ c`
    Concat(Vec<Expr>),
    /// `a < b < c`
    Compare(Box<Expr>, Vec<(Comparison, Expr)>),
    And(Box<(Expr, Expr)>),
    Or(Box<(Expr, Expr)>),
    /// `then if test else otherwise`
    Conditional(Box<(Expr, Expr, Option<Expr>)>),
    Filter(Box<Expr>, Box<Call<Filter>>),
    Test(Box<Expr>, Box<Call<Predicate>>),
    Call(Box<Call<Expr>>),
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Operator {
    Add,
    Subtract,
    Multiply,
    Divide,
    FloorDivide,
    Modulo,
    Power,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Comparison {
    Equal,
    NotEqual,
    Less,
    LessOrEqual,
    Greater,
    GreaterOrEqual,
    In,
    NotIn,
}

/// The functions that `transformers` gives to templates.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Function {
    Range,
    Dict,
    Namespace,
    RaiseException,
    StrftimeNow,
}

impl Function {
    pub const ALL: [(&'static str, Self); 5] = [
        ("range", Self::Range),
        ("dict", Self::Dict),
        ("namespace", Self::Namespace),
        ("raise_exception", Self::RaiseException),
        ("strftime_now", Self::StrftimeNow),
    ];
}
