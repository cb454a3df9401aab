//! Rules over readings and windows.

pub mod expression;
