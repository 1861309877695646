//! The checkpoint's chat template: a conversation becomes the prompt text that the model was
//! tuned on.
//!
//! Templates are Jinja2, written for transformers' `apply_chat_template`; this renders them with
//! minijinja under the same settings (`trim_blocks`, `lstrip_blocks`, Python string methods,
//! `raise_exception`, `strftime_now`, `tojson` in the form of Python's `json.dumps`).
//!
//! The rendered text contains its own BOS: encode it with
//! [`AddBos::Never`](crate::tokenizer::AddBos::Never).
//!
//! Two traps of DeepSeek-V3's own template: it ignores `tools` (a tool-calling server needs another
//! template), and control tokens written in a message's content take effect as such.
//!
//! A template's run time is bounded, its memory is not: a template is trusted as much as the
//! checkpoint it came with and must not be accepted from a request.

use minijinja::value::{Kwargs, Value as Jinja};
use minijinja::{AutoEscape, Environment, ErrorKind};
use minijinja_contrib::pycompat::unknown_method_callback;
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

use crate::tokenizer::{NamedToken, TokenizerConfig, TokenizerError};

const NAME: &str = "chat_template";

/// Template instructions per rendering: about a second of work, where DeepSeek-V3's template needs
/// some tens for each message.
const FUEL: u64 = 10_000_000;

/// Why a chat could not be turned into a prompt.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ChatError {
    /// The checkpoint is not made for chat.
    #[error(
        "the checkpoint has no chat template (no chat_template in tokenizer_config.json), as base \
         models have none; give the text to continue with --prompt instead"
    )]
    NoTemplate,
    /// `tokenizer_config.json` cannot be read.
    #[error(transparent)]
    Config(#[from] TokenizerError),
    /// `chat_template` is neither a template nor a list of named ones with a `default`.
    #[error(
        "chat_template in tokenizer_config.json must be a template or a list of \
         {{\"name\", \"template\"}} objects, one of them named \"default\""
    )]
    TemplateForm,
    /// The template is not valid Jinja.
    #[error("the chat template is malformed at line {line}: {message}")]
    Syntax {
        /// Line in the template, from 1.
        line: usize,
        /// What the parser says.
        message: String,
    },
    /// A conversation without messages.
    #[error("the conversation has no messages; give at least one")]
    NoMessages,
    /// The template refused the conversation (`raise_exception`).
    #[error("the chat template refuses this conversation: {message} (template line {line})")]
    Refused {
        /// Line in the template, from 1.
        line: usize,
        /// The template author's words.
        message: String,
    },
    /// The template ran for too long.
    #[error(
        "the chat template was stopped after {FUEL} instructions; it loops without end, or the \
         conversation of {messages} messages is too long for it"
    )]
    TooLong {
        /// Length of the conversation.
        messages: usize,
    },
    /// The template failed, mostly because a message lacks a field that it needs.
    #[error("the chat template failed at line {line}: {message}")]
    Render {
        /// Line in the template, from 1.
        line: usize,
        /// What the interpreter says.
        message: String,
    },
}

/// One message of a conversation.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Message {
    /// `system`, `user`, `assistant` or `tool`; what others mean is up to the template.
    pub role: String,
    /// The text. `None` (null) in an assistant message that only calls tools.
    #[serde(default)]
    pub content: Option<String>,
    /// Further fields that the template may read, such as `tool_calls`.
    #[serde(flatten)]
    pub extra: Map<String, Value>,
}

impl Message {
    /// A message with text and no further fields.
    pub fn new(role: impl Into<String>, content: impl Into<String>) -> Self {
        Self { role: role.into(), content: Some(content.into()), extra: Map::new() }
    }

    /// A message of the user.
    pub fn user(content: impl Into<String>) -> Self {
        Self::new("user", content)
    }

    /// An earlier answer of the model.
    pub fn assistant(content: impl Into<String>) -> Self {
        Self::new("assistant", content)
    }

    /// An instruction that stands before the conversation.
    pub fn system(content: impl Into<String>) -> Self {
        Self::new("system", content)
    }
}

/// What a template is given besides the messages.
#[derive(Clone, Debug, PartialEq)]
pub struct RenderOptions {
    /// End with the marker after which the model answers. True for generation (the default).
    pub add_generation_prompt: bool,
    /// Further variables, such as `tools`. Those that this module sets take precedence.
    pub variables: Map<String, Value>,
}

impl Default for RenderOptions {
    fn default() -> Self {
        Self { add_generation_prompt: true, variables: Map::new() }
    }
}

/// A compiled chat template.
#[derive(Clone, Debug)]
pub struct ChatTemplate {
    environment: Environment<'static>,
    bos: Jinja,
    eos: Jinja,
}

impl ChatTemplate {
    /// Compiles `template`. `bos` and `eos` are the texts of the two tokens
    /// ([`Tokenizer::bos_token`](crate::tokenizer::Tokenizer::bos_token)); `None` leaves the
    /// variable undefined, which prints as nothing.
    ///
    /// # Errors
    /// [`ChatError::Syntax`].
    pub fn new(template: &str, bos: Option<&str>, eos: Option<&str>) -> Result<Self, ChatError> {
        let mut environment = Environment::new();
        environment.set_trim_blocks(true);
        environment.set_lstrip_blocks(true);
        environment.set_auto_escape_callback(|_| AutoEscape::None);
        environment.set_unknown_method_callback(unknown_method_callback);
        environment.set_fuel(Some(FUEL));
        environment.add_filter("tojson", tojson);
        environment.add_function("raise_exception", raise_exception);
        environment.add_function("strftime_now", no_clock);
        environment.add_template_owned(NAME, template.to_owned()).map_err(|error| {
            ChatError::Syntax { line: error.line().unwrap_or(1), message: describe(&error) }
        })?;
        let variable = |token: Option<&str>| token.map_or(Jinja::UNDEFINED, Jinja::from);
        Ok(Self { environment, bos: variable(bos), eos: variable(eos) })
    }

    /// Compiles the template in the contents of `tokenizer_config.json`, or of the separate file
    /// `chat_template.jinja`, which takes precedence where a checkpoint has one.
    ///
    /// # Errors
    /// [`ChatError::NoTemplate`] if there is neither, and all those of [`new`](Self::new).
    pub fn from_config(
        tokenizer_config_json: &[u8],
        chat_template_jinja: Option<&str>,
    ) -> Result<Self, ChatError> {
        let config = TokenizerConfig::parse(Some(tokenizer_config_json))?;
        let template = match (chat_template_jinja, &config.chat_template) {
            (Some(template), _) => template,
            (None, None | Some(Value::Null)) => return Err(ChatError::NoTemplate),
            (None, Some(Value::String(template))) => template,
            (None, Some(other)) => named_default(other).ok_or(ChatError::TemplateForm)?,
        };
        let text = |token: &Option<NamedToken>| token.as_ref().map(|t| t.text().to_owned());
        let (bos, eos) = (text(&config.bos_token), text(&config.eos_token));
        Self::new(template, bos.as_deref(), eos.as_deref())
    }

    /// Lets the template ask for the current time: `clock` gets the format of Python's `strftime`
    /// and returns the text, or `None` for a format that it does not know.
    ///
    /// Without it `strftime_now` is an error: the prompt, and so the output, would otherwise depend
    /// on the day.
    #[must_use]
    pub fn with_clock(
        mut self,
        clock: impl Fn(&str) -> Option<String> + Send + Sync + 'static,
    ) -> Self {
        self.environment.add_function("strftime_now", move |format: &str| {
            clock(format).ok_or_else(|| {
                let message = format!("strftime_now does not know the time format {format:?}");
                minijinja::Error::new(ErrorKind::InvalidOperation, message)
            })
        });
        self
    }

    /// The prompt text of a conversation, BOS included.
    ///
    /// # Errors
    /// If there are no messages, or the template refuses them or fails.
    pub fn render(
        &self,
        messages: &[Message],
        options: &RenderOptions,
    ) -> Result<String, ChatError> {
        if messages.is_empty() {
            return Err(ChatError::NoMessages);
        }
        let own = [
            ("messages", Jinja::from_serialize(messages)),
            ("add_generation_prompt", options.add_generation_prompt.into()),
            ("bos_token", self.bos.clone()),
            ("eos_token", self.eos.clone()),
        ];
        let given = options.variables.iter();
        let variables: Jinja = given
            .map(|(name, value)| (name.as_str(), Jinja::from_serialize(value)))
            .chain(own)
            .collect();
        self.environment
            .get_template(NAME)
            .and_then(|template| template.render(variables))
            .map_err(|error| render_error(&error, messages.len()))
    }
}

fn named_default(templates: &Value) -> Option<&str> {
    let field = |template: &'_ Value, name| template.get(name).and_then(Value::as_str).is_some();
    templates
        .as_array()?
        .iter()
        .filter(|template| field(template, "template"))
        .find(|template| template.get("name").and_then(Value::as_str) == Some("default"))?
        .get("template")?
        .as_str()
}

fn render_error(error: &minijinja::Error, messages: usize) -> ChatError {
    let line = error.line().unwrap_or(1);
    if error.kind() == ErrorKind::OutOfFuel {
        return ChatError::TooLong { messages };
    }
    let mut cause = std::error::Error::source(error);
    while let Some(inner) = cause {
        if let Some(Refusal(message)) = inner.downcast_ref() {
            return ChatError::Refused { line, message: message.clone() };
        }
        cause = inner.source();
    }
    ChatError::Render { line, message: describe(error) }
}

/// The error without minijinja's "(in chat_template:1)", which our own messages say better.
fn describe(error: &minijinja::Error) -> String {
    match error.detail() {
        Some(detail) => format!("{}: {detail}", error.kind()),
        None => error.kind().to_string(),
    }
}

/// Marks an error as raised by the template itself.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
struct Refusal(String);

fn raise_exception(message: String) -> Result<String, minijinja::Error> {
    let error = minijinja::Error::new(ErrorKind::InvalidOperation, message.clone());
    Err(error.with_source(Refusal(message)))
}

fn no_clock(_format: &str) -> Result<String, minijinja::Error> {
    Err(minijinja::Error::new(
        ErrorKind::InvalidOperation,
        "the template asks for the current time (strftime_now), which was not provided",
    ))
}

/// `tojson` as transformers defines it: `json.dumps(value, ensure_ascii=False, indent=None)`, with
/// none of the HTML escapes of Jinja's own filter.
fn tojson(value: &Jinja, options: Kwargs) -> Result<String, minijinja::Error> {
    let invalid = |message: String| minijinja::Error::new(ErrorKind::InvalidOperation, message);
    if value.is_undefined() {
        return Err(invalid("tojson of an undefined value".into()));
    }
    let indent: Option<usize> = options.get("indent")?;
    if options.get::<Option<bool>>("ensure_ascii")? == Some(true) {
        return Err(invalid("tojson(ensure_ascii=true) is not supported".into()));
    }
    options.assert_all_used()?;
    python_json::dumps(value, indent).map_err(|error| {
        minijinja::Error::new(ErrorKind::BadSerialization, "tojson").with_source(error)
    })
}

/// The text form of Python's `json.dumps`: it separates by `, ` and `: ` and writes exponents with a
/// sign and two digits, all of which reaches the prompt.
mod python_json {
    use std::io::{self, Write};

    use serde::Serialize;
    use serde_json::ser::Formatter;

    pub(super) fn dumps(
        value: &impl Serialize,
        indent: Option<usize>,
    ) -> Result<String, serde_json::Error> {
        let mut out = Vec::new();
        let style = Style { indent, depth: 0, empty: true };
        value.serialize(&mut serde_json::Serializer::with_formatter(&mut out, style))?;
        Ok(String::from_utf8_lossy(&out).into_owned())
    }

    struct Style {
        indent: Option<usize>,
        depth: usize,
        /// Whether the container just begun or ended has no items.
        empty: bool,
    }

    impl Style {
        fn begin(&mut self, out: &mut (impl Write + ?Sized), bracket: &str) -> io::Result<()> {
            self.depth += 1;
            self.empty = true;
            out.write_all(bracket.as_bytes())
        }

        fn item(&mut self, out: &mut (impl Write + ?Sized), first: bool) -> io::Result<()> {
            self.empty = false;
            match (first, self.indent) {
                (true, None) => Ok(()),
                (true, Some(_)) => self.new_line(out),
                (false, None) => out.write_all(b", "),
                (false, Some(_)) => {
                    out.write_all(b",")?;
                    self.new_line(out)
                }
            }
        }

        fn end(&mut self, out: &mut (impl Write + ?Sized), bracket: &str) -> io::Result<()> {
            self.depth -= 1;
            if !self.empty && self.indent.is_some() {
                self.new_line(out)?;
            }
            self.empty = false;
            out.write_all(bracket.as_bytes())
        }

        fn new_line(&self, out: &mut (impl Write + ?Sized)) -> io::Result<()> {
            write!(out, "\n{:1$}", "", self.depth * self.indent.unwrap_or(0))
        }
    }

    impl Formatter for Style {
        fn begin_array<W: ?Sized + Write>(&mut self, out: &mut W) -> io::Result<()> {
            self.begin(out, "[")
        }

        fn end_array<W: ?Sized + Write>(&mut self, out: &mut W) -> io::Result<()> {
            self.end(out, "]")
        }

        fn begin_array_value<W: ?Sized + Write>(
            &mut self,
            out: &mut W,
            first: bool,
        ) -> io::Result<()> {
            self.item(out, first)
        }

        fn begin_object<W: ?Sized + Write>(&mut self, out: &mut W) -> io::Result<()> {
            self.begin(out, "{")
        }

        fn end_object<W: ?Sized + Write>(&mut self, out: &mut W) -> io::Result<()> {
            self.end(out, "}")
        }

        fn begin_object_key<W: ?Sized + Write>(
            &mut self,
            out: &mut W,
            first: bool,
        ) -> io::Result<()> {
            self.item(out, first)
        }

        fn begin_object_value<W: ?Sized + Write>(&mut self, out: &mut W) -> io::Result<()> {
            out.write_all(b": ")
        }

        fn write_f64<W: ?Sized + Write>(&mut self, out: &mut W, value: f64) -> io::Result<()> {
            // Rust's Debug and Python's repr agree on the digits and on when to use an exponent.
            let text = format!("{value:?}");
            let Some((mantissa, exponent)) = text.split_once('e') else {
                return out.write_all(text.as_bytes());
            };
            match exponent.strip_prefix('-') {
                Some(digits) => write!(out, "{mantissa}e-{digits:0>2}"),
                None => write!(out, "{mantissa}e+{exponent:0>2}"),
            }
        }
    }
}
