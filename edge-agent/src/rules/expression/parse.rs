//! From a text to an expression: sqlparser reads it as DataFusion does (its generic dialect), and what came out is given
//! types, or refused with the place and what would be understood.
//!
//! Understood: columns, `device`, numbers, 'text', TRUE, FALSE; + - * / %, comparisons, AND, OR, NOT, BETWEEN, IN (…),
//! IS [NOT] NULL, TRUE, FALSE, UNKNOWN; CASE in both forms (its results may be NULL), abs(x), prev(column).
//! Limits: [`TEXT_BYTES_MAX`], [`super::NESTING_MAX`], [`DEPTH_MAX`], [`NODES_MAX`]; BETWEEN and CASE x count what they look at more
//! than once.

use sqlparser::ast::{
    BinaryOperator, CaseWhen, Expr, Function, FunctionArg, FunctionArgExpr, FunctionArguments, Ident, UnaryOperator,
    Value as Literal,
};
use sqlparser::dialect::GenericDialect;
use sqlparser::parser::{Parser, ParserError};
use sqlparser::tokenizer::{Token, Tokenizer};
use wire::FieldType;
use wire::schema::DEVICE;

use super::refusal::{Refusal, at, check_nesting, refusal};
use super::same::{Same, compared, float, split, split_all};
use super::{Any, Bool, Case, Expression, Float, In, Int, Node, Operation, Place, Relation, Row, Text};

/// The longest text.
pub const TEXT_BYTES_MAX: usize = 4_096;
/// What sqlparser may take for its own depth: each of those levels is up to four of its.
const PARSER_DEPTH_MAX: usize = 64;
/// How deep operators may nest; a chain of ANDs or ORs is one level.
pub const DEPTH_MAX: usize = 48;
/// Operators, columns and constants in one expression.
pub const NODES_MAX: usize = 1_000;

const UNDERSTOOD: &str = "columns, device, numbers, 'text', TRUE, FALSE, + - * / %, = <> < <= > >=, AND, OR, NOT, BETWEEN, \
                          IN (…), IS NULL, IS TRUE, CASE, abs(x) and prev(column)";

/// The columns that an expression may name, in the order of the rows' values.
#[derive(Debug, Clone, Default)]
pub struct Columns(Vec<(String, FieldType)>);

impl Columns {
    /// Columns with their types.
    pub fn new(columns: impl IntoIterator<Item = (String, FieldType)>) -> Self {
        Self(columns.into_iter().collect())
    }

    /// Where a column stands, and its type.
    pub fn find(&self, name: &str) -> Option<(usize, FieldType)> {
        let index = self.0.iter().position(|(column, _)| column == name)?;
        Some((index, self.0[index].1))
    }

    /// Their names.
    pub fn names(&self) -> impl Iterator<Item = &str> {
        self.0.iter().map(|(name, _)| name.as_str())
    }

    fn nearest(&self, wrong: &str) -> String {
        let names = self.names().chain([DEVICE]);
        let near = names.max_by(|a, b| strsim::jaro_winkler(wrong, a).total_cmp(&strsim::jaro_winkler(wrong, b)));
        near.map(|near| format!("; did you mean `{near}`?")).unwrap_or_default()
    }
}

pub(super) fn parse(text: &str, columns: &Columns) -> Result<Expression, Refusal> {
    let refuse = |message: String| Refusal { place: None, message };
    if text.len() > TEXT_BYTES_MAX {
        return Err(refuse(format!("{} bytes are more than the {TEXT_BYTES_MAX} of an expression", text.len())));
    }
    let unread = |error: ParserError| match error {
        // It names line and column itself.
        ParserError::TokenizerError(text) | ParserError::ParserError(text) => refuse(text),
        ParserError::RecursionLimitExceeded => refuse("operators nest too deep".to_owned()),
    };
    let tokens = Tokenizer::new(&GenericDialect {}, text).tokenize_with_location();
    let tokens = tokens.map_err(|error| refuse(error.to_string()))?;
    check_nesting(&tokens)?;
    let parser = Parser::new(&GenericDialect {}).with_recursion_limit(PARSER_DEPTH_MAX);
    let mut parser = parser.with_tokens_with_locations(tokens);
    let tree = parser.parse_expr().map_err(unread)?;
    let rest = parser.peek_token();
    if rest.token != Token::EOF {
        let message = format!("`{}` does not belong to the expression before it", rest.token);
        return Err(Refusal { place: at(rest.span.start), message });
    }
    let mut reader = Reader { columns, nodes: 0, depth: 0, previous: Vec::new(), cases: 0 };
    let root = reader.any(&tree)?;
    Ok(Expression { root, previous: reader.previous })
}

fn kind(any: &Any) -> &'static str {
    match any {
        Any::Int(_) => "int64",
        Any::Float(_) => "float64",
        Any::Bool(_) => "bool",
        Any::Text(_) => "text",
    }
}

struct Reader<'c> {
    columns: &'c Columns,
    nodes: usize,
    depth: usize,
    previous: Vec<usize>,
    /// How many CASE were read.
    cases: usize,
}

impl Reader<'_> {
    /// Reads an expression of any type.
    fn any(&mut self, tree: &Expr) -> Result<Any, Refusal> {
        self.nodes += 1;
        self.depth += 1;
        if self.nodes > NODES_MAX {
            return Err(refusal(tree, format!("the expression has more than {NODES_MAX} parts")));
        }
        if self.depth > DEPTH_MAX {
            return Err(refusal(tree, format!("the expression nests deeper than {DEPTH_MAX} levels")));
        }
        let read = self.read(tree);
        self.depth -= 1;
        read
    }

    fn read(&mut self, tree: &Expr) -> Result<Any, Refusal> {
        Ok(match tree {
            Expr::Nested(inner) => self.any(inner)?,
            Expr::Identifier(ident) => self.column(tree, ident)?,
            Expr::Value(value) => literal(tree, &value.value, false)?,
            Expr::UnaryOp { op, expr } => self.unary(tree, op, expr)?,
            Expr::BinaryOp { left, op, right } => self.binary(tree, left, op, right)?,
            Expr::Between { expr, negated, low, high } => Any::Bool(self.between(expr, *negated, low, high)?),
            Expr::InList { expr, list, negated } => Any::Bool(self.in_list(expr, list, *negated)?),
            Expr::IsNull(expr) => Any::Bool(Bool::IsNull(Box::new(self.any(expr)?), false)),
            Expr::IsNotNull(expr) => Any::Bool(Bool::IsNull(Box::new(self.any(expr)?), true)),
            Expr::IsTrue(expr) => self.is(expr, Some(true), false)?,
            Expr::IsNotTrue(expr) => self.is(expr, Some(true), true)?,
            Expr::IsFalse(expr) => self.is(expr, Some(false), false)?,
            Expr::IsNotFalse(expr) => self.is(expr, Some(false), true)?,
            Expr::IsUnknown(expr) => self.is(expr, None, false)?,
            Expr::IsNotUnknown(expr) => self.is(expr, None, true)?,
            Expr::Case { operand, conditions, else_result, .. } => {
                self.case(tree, operand.as_deref(), conditions, else_result.as_deref())?
            }
            Expr::Function(function) => self.function(tree, function)?,
            _ => return Err(refusal(tree, format!("this is not understood; understood are {UNDERSTOOD}"))),
        })
    }

    fn column(&mut self, tree: &Expr, ident: &Ident) -> Result<Any, Refusal> {
        let name = self.name(tree, ident)?;
        if name == DEVICE {
            return Ok(Any::Text(Text::Device));
        }
        let (index, kind) = self.find(tree, &name)?;
        column(tree, Place::Now(index), kind)
    }

    fn name(&self, tree: &Expr, ident: &Ident) -> Result<String, Refusal> {
        match ident.quote_style {
            None => Ok(ident.value.to_ascii_lowercase()),
            Some('"') => Ok(ident.value.clone()),
            Some(_) => Err(refusal(tree, "a name stands as it is, or in \"…\"; a text in '…'")),
        }
    }

    fn find(&self, tree: &Expr, name: &str) -> Result<(usize, FieldType), Refusal> {
        let none = || refusal(tree, format!("there is no column `{name}`{}", self.columns.nearest(name)));
        self.columns.find(name).ok_or_else(none)
    }

    fn condition(&mut self, tree: &Expr) -> Result<Bool, Refusal> {
        match self.any(tree)? {
            Any::Bool(node) => Ok(node),
            other => Err(refusal(tree, format!("a condition belongs here, and this is {}", kind(&other)))),
        }
    }

    fn is(&mut self, tree: &Expr, wanted: Option<bool>, negated: bool) -> Result<Any, Refusal> {
        Ok(Any::Bool(Bool::Is(Box::new(self.condition(tree)?), wanted, negated)))
    }

    fn unary(&mut self, tree: &Expr, operator: &UnaryOperator, inner: &Expr) -> Result<Any, Refusal> {
        match operator {
            UnaryOperator::Not => Ok(Any::Bool(Bool::Not(Box::new(self.condition(inner)?)))),
            UnaryOperator::Minus => {
                // -9223372036854775808 is a number, and 9223372036854775808 is none.
                if let Expr::Value(value) = inner {
                    return literal(tree, &value.value, true);
                }
                match self.any(inner)? {
                    Any::Int(node) if is_constant(&node) => {
                        let row = Row { device: "", values: &[], previous: &[] };
                        let negative = node.value(&row).ok().flatten().and_then(i64::checked_neg);
                        negative
                            .map(|value| Any::Int(Int::Literal(value)))
                            .ok_or_else(|| refusal(inner, "this constant has no negative within int64"))
                    }
                    Any::Int(node) => Ok(Any::Int(Int::Negative(Box::new(node)))),
                    Any::Float(node) => Ok(Any::Float(Float::Negative(Box::new(node)))),
                    other => Err(refusal(inner, format!("- belongs before a number, and this is {}", kind(&other)))),
                }
            }
            UnaryOperator::Plus => match self.any(inner)? {
                number @ (Any::Int(_) | Any::Float(_)) => Ok(number),
                other => Err(refusal(inner, format!("+ belongs before a number, and this is {}", kind(&other)))),
            },
            other => Err(refusal(inner, format!("`{other}` is not understood; understood are {UNDERSTOOD}"))),
        }
    }

    fn binary(&mut self, tree: &Expr, left: &Expr, operator: &BinaryOperator, right: &Expr) -> Result<Any, Refusal> {
        let operation = match operator {
            BinaryOperator::And | BinaryOperator::Or => return self.chain(tree, operator),
            BinaryOperator::Plus => Operation::Add,
            BinaryOperator::Minus => Operation::Subtract,
            BinaryOperator::Multiply => Operation::Multiply,
            BinaryOperator::Divide => Operation::Divide,
            BinaryOperator::Modulo => Operation::Remainder,
            other => {
                let relation = relation(other).ok_or_else(|| {
                    refusal(tree, format!("`{other}` is not understood; understood are {UNDERSTOOD}"))
                })?;
                return Ok(Any::Bool(self.compare(left, relation, right)?));
            }
        };
        let sides = (self.any(left)?, self.any(right)?);
        Ok(match sides {
            (Any::Int(left), Any::Int(right)) => Any::Int(Int::Arithmetic(operation, Box::new((left, right)))),
            (left @ (Any::Int(_) | Any::Float(_)), right @ (Any::Int(_) | Any::Float(_))) => {
                Any::Float(Float::Arithmetic(operation, Box::new((float(left), float(right)))))
            }
            (left, right) => {
                let message = format!("`{operator}` goes between numbers, not {} and {}", kind(&left), kind(&right));
                return Err(refusal(tree, message));
            }
        })
    }

    /// All operands of a chain of ANDs, or of ORs: it leans to the left, and may be long.
    fn chain(&mut self, tree: &Expr, operator: &BinaryOperator) -> Result<Any, Refusal> {
        let (mut operands, mut rest) = (Vec::new(), tree);
        while let Expr::BinaryOp { left, op, right } = rest
            && op == operator
        {
            operands.push(&**right);
            rest = left;
        }
        operands.push(rest);
        let parts = operands.into_iter().rev().map(|operand| self.condition(operand)).collect::<Result<Vec<_>, _>>()?;
        Ok(Any::Bool(if *operator == BinaryOperator::And { Bool::All(parts) } else { Bool::AnyOf(parts) }))
    }

    fn compare(&mut self, left: &Expr, relation: Relation, right: &Expr) -> Result<Bool, Refusal> {
        let same = self.same(&[Some(left), Some(right)])?;
        Ok(compared(same, relation))
    }

    fn between(&mut self, tree: &Expr, negated: bool, low: &Expr, high: &Expr) -> Result<Bool, Refusal> {
        // One type for all three, as DataFusion does.
        let low = self.same(&[Some(tree), Some(low), Some(high)])?;
        let high = self.same_again(tree, &low)?;
        let (low, high) = split(low, high);
        let both = Bool::All(vec![compared(low, Relation::GreaterOrEqual), compared(high, Relation::LessOrEqual)]);
        Ok(if negated { Bool::Not(Box::new(both)) } else { both })
    }

    /// The expression once more, in the type of the first.
    fn same_again(&mut self, tree: &Expr, like: &Same) -> Result<Same, Refusal> {
        let again = self.any(tree)?;
        Ok(match (like, again) {
            (Same::Float(_), number) => Same::Float(vec![Some(float(number))]),
            (_, Any::Int(node)) => Same::Int(vec![Some(node)]),
            (_, Any::Float(node)) => Same::Float(vec![Some(node)]),
            (_, Any::Bool(node)) => Same::Bool(vec![Some(node)]),
            (_, Any::Text(node)) => Same::Text(vec![Some(node)]),
        })
    }

    fn in_list(&mut self, tree: &Expr, list: &[Expr], negated: bool) -> Result<Bool, Refusal> {
        fn of<N>(all: Vec<Option<N>>, negated: bool) -> Box<In<N>> {
            let mut all = all.into_iter().flatten();
            let needle = all.next().expect("the first is the needle");
            Box::new(In { needle, list: all.collect(), negated })
        }
        if list.is_empty() {
            return Err(refusal(tree, "IN () has nothing to compare with"));
        }
        let cases = self.cases;
        let all = std::iter::once(Some(tree)).chain(list.iter().map(Some)).collect::<Vec<_>>();
        let all = self.same(&all)?;
        if self.cases > cases {
            // DataFusion 55 takes a list of nothing but CASE for constant: it evaluates it for no row at all.
            return Err(refusal(tree, "CASE does not stand within IN: write comparisons with OR"));
        }
        Ok(match all {
            Same::Int(all) => Bool::InInt(of(all, negated)),
            Same::Float(all) => Bool::InFloat(of(all, negated)),
            Same::Bool(all) => Bool::InTruth(of(all, negated)),
            Same::Text(all) => Bool::InText(of(all, negated)),
        })
    }

    fn case(
        &mut self,
        tree: &Expr,
        operand: Option<&Expr>,
        branches: &[CaseWhen],
        otherwise: Option<&Expr>,
    ) -> Result<Any, Refusal> {
        fn of<N>(conditions: Vec<Bool>, mut results: Vec<Option<N>>) -> Box<Case<N>> {
            let otherwise = results.pop().flatten();
            Box::new(Case { branches: conditions.into_iter().zip(results).collect(), otherwise })
        }
        self.cases += 1;
        let mut conditions = Vec::new();
        match operand {
            None => {
                for branch in branches {
                    conditions.push(self.condition(&branch.condition)?);
                }
            }
            Some(operand) => {
                let all = branches.iter().map(|branch| Some(&branch.condition));
                let same = self.same(&std::iter::once(Some(operand)).chain(all).collect::<Vec<_>>())?;
                let mut again = Vec::new();
                for _ in branches {
                    // A NULL looks at no branch: what stands there may fail.
                    let present = Bool::IsNull(Box::new(self.any(operand)?), true);
                    again.push((present, self.same_again(operand, &same)?));
                }
                let equal = split_all(same, again.into_iter());
                conditions.extend(
                    equal.into_iter().map(|(present, pair)| Bool::All(vec![present, compared(pair, Relation::Equal)])),
                );
            }
        }
        let not_null = |tree: &Expr| !is_null(tree);
        let results = branches.iter().map(|branch| Some(&branch.result)).chain([otherwise]);
        let results = results.map(|result| result.filter(|tree| not_null(tree))).collect::<Vec<_>>();
        if results.iter().all(Option::is_none) {
            return Err(refusal(tree, "all results of this CASE are NULL: it has no type"));
        }
        Ok(match self.same(&results)? {
            Same::Int(results) => Any::Int(Int::Case(of(conditions, results))),
            Same::Float(results) => Any::Float(Float::Case(of(conditions, results))),
            Same::Bool(results) => Any::Bool(Bool::Case(of(conditions, results))),
            Same::Text(results) => Any::Text(Text::Case(of(conditions, results))),
        })
    }

    /// Reads expressions that must be of one type: int64 beside float64 becomes float64.
    fn same(&mut self, trees: &[Option<&Expr>]) -> Result<Same, Refusal> {
        let mut read = Vec::new();
        for tree in trees {
            read.push(tree.map(|tree| self.any(tree)).transpose()?);
        }
        let first = read.iter().flatten().next().map_or("", kind);
        let number = |any: &Any| matches!(any, Any::Int(_) | Any::Float(_));
        for (tree, any) in trees.iter().zip(&read) {
            let (Some(tree), Some(any)) = (tree, any) else { continue };
            if kind(any) != first && !(number(any) && matches!(first, "int64" | "float64")) {
                return Err(refusal(tree, format!("this is {}, and what it goes with is {first}", kind(any))));
            }
        }
        Ok(Same::new(read))
    }

    fn function(&mut self, tree: &Expr, function: &Function) -> Result<Any, Refusal> {
        let unknown = || refusal(tree, format!("this function is not understood; understood are {UNDERSTOOD}"));
        let plain = function.filter.is_none()
            && function.over.is_none()
            && function.null_treatment.is_none()
            && function.within_group.is_empty()
            && !function.uses_odbc_syntax
            && function.parameters == FunctionArguments::None;
        let [name] = function.name.0.as_slice() else { return Err(unknown()) };
        let name = self.name(tree, name.as_ident().ok_or_else(unknown)?)?;
        let FunctionArguments::List(list) = &function.args else { return Err(unknown()) };
        if !plain || list.duplicate_treatment.is_some() || !list.clauses.is_empty() {
            return Err(unknown());
        }
        let argument = match list.args.as_slice() {
            [FunctionArg::Unnamed(FunctionArgExpr::Expr(argument))] => argument,
            _ if matches!(name.as_str(), "abs" | "prev") => {
                return Err(refusal(tree, format!("{name} has one argument")));
            }
            _ => return Err(unknown()),
        };
        match name.as_str() {
            "abs" => match self.any(argument)? {
                Any::Int(node) => Ok(Any::Int(Int::Absolute(Box::new(node)))),
                Any::Float(node) => Ok(Any::Float(Float::Absolute(Box::new(node)))),
                other => Err(refusal(argument, format!("abs is of a number, and this is {}", kind(&other)))),
            },
            "prev" => {
                let Expr::Identifier(ident) = argument else {
                    return Err(refusal(argument, "prev is of a column: prev(temperature)"));
                };
                let name = self.name(argument, ident)?;
                let (index, kind) = self.find(argument, &name)?;
                if !self.previous.contains(&index) {
                    self.previous.push(index);
                }
                column(argument, Place::Before(index), kind)
            }
            _ => Err(unknown()),
        }
    }
}

fn column(tree: &Expr, place: Place, kind: FieldType) -> Result<Any, Refusal> {
    match kind {
        FieldType::Int64 => Ok(Any::Int(Int::Column(place))),
        FieldType::Float64 => Ok(Any::Float(Float::Column(place))),
        FieldType::Bool => Ok(Any::Bool(Bool::Column(place))),
        FieldType::Text => Ok(Any::Text(Text::Column(place))),
        FieldType::Timestamp | FieldType::Binary => {
            Err(refusal(tree, format!("a {kind} cannot be looked at here: float64, int64, bool and text can")))
        }
    }
}

fn literal(tree: &Expr, value: &Literal, negative: bool) -> Result<Any, Refusal> {
    match value {
        Literal::Number(digits, false) => number(tree, digits, negative),
        _ if negative => Err(refusal(tree, "- belongs before a number")),
        Literal::SingleQuotedString(text) => Ok(Any::Text(Text::Literal(text.clone()))),
        Literal::Boolean(value) => Ok(Any::Bool(Bool::Literal(*value))),
        Literal::Null => {
            Err(refusal(tree, "NULL stands only in IS NULL and as a result of CASE; nothing is equal to it"))
        }
        _ => Err(refusal(tree, format!("this constant is not understood; understood are {UNDERSTOOD}"))),
    }
}

fn number(tree: &Expr, digits: &str, negative: bool) -> Result<Any, Refusal> {
    let signed = if negative { format!("-{digits}") } else { digits.to_owned() };
    if let Ok(value) = signed.parse::<i64>() {
        return Ok(Any::Int(Int::Literal(value)));
    }
    if digits.bytes().all(|byte| byte.is_ascii_digit()) {
        // DataFusion would take some for unsigned numbers, which no stream has.
        return Err(refusal(tree, format!("{signed} is beyond int64; as a float64 it is {signed}.0")));
    }
    match signed.parse::<f64>() {
        Ok(value) if value.is_finite() => Ok(Any::Float(Float::Literal(value))),
        _ => Err(refusal(tree, format!("{signed} is no number that a float64 holds"))),
    }
}

fn relation(operator: &BinaryOperator) -> Option<Relation> {
    Some(match operator {
        BinaryOperator::Eq => Relation::Equal,
        BinaryOperator::NotEq => Relation::NotEqual,
        BinaryOperator::Lt => Relation::Less,
        BinaryOperator::LtEq => Relation::LessOrEqual,
        BinaryOperator::Gt => Relation::Greater,
        BinaryOperator::GtEq => Relation::GreaterOrEqual,
        _ => return None,
    })
}

fn is_null(tree: &Expr) -> bool {
    match tree {
        Expr::Value(value) => value.value == Literal::Null,
        Expr::Nested(inner) => is_null(inner),
        _ => false,
    }
}

fn is_constant(node: &Int) -> bool {
    match node {
        Int::Literal(_) => true,
        Int::Arithmetic(_, sides) => is_constant(&sides.0) && is_constant(&sides.1),
        Int::Negative(of) | Int::Absolute(of) => is_constant(of),
        Int::Column(_) | Int::Case(_) => false,
    }
}
