//! How long a statement may be where length becomes depth: a chain of operators (`a OR b OR …`), joins or UNIONs
//! is a tree as deep as it is long, and what walks or frees that tree recurses. Past the end of the stack the whole
//! process would end, so such a chain is refused before it is parsed.
//!
//! Every level of a tree costs at least one word or operator; numbers, texts, commas and parentheses add none
//! (nested parentheses have the parser's own limit). So long lists of constants pass, as many as the statement's
//! bytes allow.

use datafusion::sql::sqlparser::dialect::Dialect;
use datafusion::sql::sqlparser::tokenizer::{Token, Tokenizer};

use crate::engine::QueryError;

/// Words and operators of one statement. [`STACK_BYTES`] is enough for a tree of this depth.
const WORDS_MAX: usize = 5_000;

/// Stack of a thread that plans or runs statements: several times what the deepest tree needs in a debug build.
pub(crate) const STACK_BYTES: usize = 64 << 20;

/// Refuses a statement that could become too deep a tree. What cannot be split into words passes: the
/// parser, with the same dialect, says why.
pub(crate) fn check(dialect: &dyn Dialect, sql: &str) -> Result<(), QueryError> {
    let Ok(tokens) = Tokenizer::new(dialect, sql).tokenize() else {
        return Ok(());
    };
    let words = tokens.iter().filter(|token| deepens(token)).count();
    if words > WORDS_MAX {
        let message = format!(
            "the statement has {words} words and operators, and may have {WORDS_MAX}: \
             in place of a long chain of conditions, use IN (...) or a join"
        );
        return Err(QueryError::Invalid { message });
    }
    Ok(())
}

fn deepens(token: &Token) -> bool {
    !matches!(
        token,
        Token::Comma
            | Token::LParen
            | Token::RParen
            | Token::Number(..)
            | Token::SingleQuotedString(_)
            | Token::Whitespace(_)
            | Token::EOF
    )
}
