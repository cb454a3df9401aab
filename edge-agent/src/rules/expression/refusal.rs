//! What is not understood, and where; and what is refused before it is read.

use sqlparser::ast::Expr;
use sqlparser::keywords::Keyword;
use sqlparser::tokenizer::{Location, Token, TokenWithSpan};

/// How deep parentheses and CASE may nest. Where a text is wrong, sqlparser tries each CASE ( and NOT ( again as a function,
/// so the time that it takes doubles with each level.
pub const NESTING_MAX: usize = 12;
/// What is not understood.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{}{message}", shown(*place))]
pub struct Refusal {
    /// Line and column, from 1.
    pub place: Option<(u64, u64)>,
    pub message: String,
}

/// Not as a place in the file, where the expression stands somewhere.
fn shown(place: Option<(u64, u64)>) -> String {
    match place {
        None => String::new(),
        Some((1, column)) => format!("at its character {column}: "),
        Some((line, column)) => format!("in its line {line}, at character {column}: "),
    }
}

pub(super) fn check_nesting(tokens: &[TokenWithSpan]) -> Result<(), Refusal> {
    let mut nesting = 0_usize;
    for token in tokens {
        match &token.token {
            Token::LParen => nesting += 1,
            Token::Word(word) if word.keyword == Keyword::CASE => nesting += 1,
            Token::RParen => nesting = nesting.saturating_sub(1),
            Token::Word(word) if word.keyword == Keyword::END => nesting = nesting.saturating_sub(1),
            _ => {}
        }
        if nesting > NESTING_MAX {
            let message = format!("parentheses and CASE nest deeper than {NESTING_MAX} levels");
            return Err(Refusal { place: at(token.span.start), message });
        }
    }
    Ok(())
}

pub(super) fn at(start: Location) -> Option<(u64, u64)> {
    (start.line > 0).then_some((start.line, start.column))
}

/// Where an expression begins. Down the left side only, and without recursion: a chain of operators is long.
fn place(mut tree: &Expr) -> Option<(u64, u64)> {
    loop {
        tree = match tree {
            Expr::Identifier(ident) => return at(ident.span.start),
            Expr::CompoundIdentifier(idents) => return at(idents.first()?.span.start),
            Expr::Value(value) => return at(value.span.start),
            Expr::Function(function) => return at(function.name.0.first()?.as_ident()?.span.start),
            Expr::Case { case_token, .. } => return at(case_token.0.span.start),
            Expr::BinaryOp { left, .. } | Expr::AnyOp { left, .. } | Expr::AllOp { left, .. } => left,
            Expr::IsDistinctFrom(left, _) | Expr::IsNotDistinctFrom(left, _) => left,
            Expr::Like { expr, .. } | Expr::ILike { expr, .. } | Expr::SimilarTo { expr, .. } => expr,
            Expr::RLike { expr, .. } | Expr::InSubquery { expr, .. } | Expr::InList { expr, .. } => expr,
            Expr::Between { expr, .. } | Expr::UnaryOp { expr, .. } | Expr::Cast { expr, .. } => expr,
            Expr::Nested(expr) | Expr::IsNull(expr) | Expr::IsNotNull(expr) | Expr::IsTrue(expr) => expr,
            Expr::IsNotTrue(expr) | Expr::IsFalse(expr) | Expr::IsNotFalse(expr) => expr,
            Expr::IsUnknown(expr) | Expr::IsNotUnknown(expr) => expr,
            Expr::Ceil { expr, .. } | Expr::Floor { expr, .. } | Expr::Extract { expr, .. } => expr,
            _ => return None,
        };
    }
}

pub(super) fn refusal(tree: &Expr, message: impl Into<String>) -> Refusal {
    Refusal { place: place(tree), message: message.into() }
}
