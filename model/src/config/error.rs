//! What can be wrong with a `config.json`.

/// Why a configuration was refused.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
#[non_exhaustive]
pub enum ConfigError {
    /// The text is not JSON.
    #[error("not valid JSON at line {line}, column {column}: {message}")]
    Json {
        /// 1-based line.
        line: usize,
        /// 1-based column.
        column: usize,
        /// The parser's words.
        message: String,
    },
    /// The text is JSON but not `{...}`.
    #[error("the top level must be a JSON object, found {found}")]
    NotAnObject {
        /// What stands there.
        found: String,
    },
    /// A field without a safe default is absent or null.
    #[error("{field} is missing; it is required {why}")]
    Missing {
        /// Dotted path of the field.
        field: String,
        /// When it is required.
        why: &'static str,
    },
    /// A field has the wrong JSON type.
    #[error("{field} is {found}, but must be {expected}")]
    WrongType {
        /// Dotted path of the field.
        field: String,
        /// The value, shortened.
        found: String,
        /// The types that are accepted.
        expected: &'static str,
    },
    /// A value that is legal in the format and not implemented here.
    #[error("{field} = {value} is not supported; accepted: {accepted}")]
    Unsupported {
        /// Dotted path of the field.
        field: String,
        /// The value, shortened.
        value: String,
        /// The values that are accepted.
        accepted: &'static str,
    },
    /// A value that no model can have.
    #[error("{field} = {value} is impossible: {reason}")]
    Invalid {
        /// Dotted path of the field.
        field: String,
        /// The value.
        value: String,
        /// The rule it breaks.
        reason: String,
    },
}

/// What serde_json has to say, without the position, which the errors here state themselves.
pub(crate) fn json_message(error: &serde_json::Error) -> String {
    let text = error.to_string();
    match text.rfind(" at line ") {
        Some(position) => text[..position].to_owned(),
        None => text,
    }
}
