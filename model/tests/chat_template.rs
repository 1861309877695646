//! Chat templates: the tiny checkpoint's own against the recorded prompts, and a template with
//! everything that DeepSeek-V3's uses against what Python's Jinja2 3.1.6 renders under the settings
//! of transformers.

use std::path::{Path, PathBuf};

use model::chat::{ChatError, ChatTemplate, Message, RenderOptions};
use model::tokenizer::{AddBos, Tokenizer};
use serde_json::{Map, Value, json};

fn tiny(file: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../models/tiny-dsv3").join(file)
}

fn read(file: &str) -> Vec<u8> {
    std::fs::read(tiny(file)).unwrap()
}

fn template(text: &str) -> ChatTemplate {
    ChatTemplate::new(text, Some("<B>"), Some("<E>")).unwrap()
}

fn render(text: &str, messages: &[Message]) -> Result<String, ChatError> {
    template(text).render(messages, &RenderOptions::default())
}

fn hello() -> Vec<Message> {
    vec![Message::user("hello")]
}

fn with_value(value: Value) -> RenderOptions {
    let variables = Map::from_iter([("v".to_owned(), value)]);
    RenderOptions { variables, ..RenderOptions::default() }
}

#[test]
fn tiny_prompts_equal_the_recorded_ids() {
    let config = read("tokenizer_config.json");
    let tokenizer = Tokenizer::from_bytes(&read("tokenizer.json"), Some(&config), None).unwrap();
    let template = ChatTemplate::from_config(&config, None).unwrap();
    let reference: Value = serde_json::from_slice(&read("reference.json")).unwrap();
    let completions = reference["completions"].as_array().unwrap();
    assert_eq!(completions.len(), 8);
    for completion in completions {
        let prompt = completion["prompt"].as_str().unwrap();
        let text = template.render(&[Message::user(prompt)], &RenderOptions::default()).unwrap();
        let ids = tokenizer.encode(&text, AddBos::Never).unwrap();
        assert_eq!(json!(ids), completion["prompt_token_ids"], "{prompt}");
    }
}

/// Not the released text, but each construct of it and each behaviour: system messages gathered and
/// joined, tool calls with and without content, tool results, no marker after them, `</think>`.
const V3_STYLE: &str = r#"
{%- if not add_generation_prompt is defined %}
    {% set add_generation_prompt = false %}
{% endif %}
{%- set ns = namespace(system='', first_system=true, after_tool=false) %}
{%- for message in messages if message['role'] == 'system' %}
    {%- set ns.system = ns.system + ('' if ns.first_system else '\n\n') + message['content'] %}
    {%- set ns.first_system = false %}
{%- endfor %}
{{- bos_token }}{{ ns.system }}
{%- for message in messages %}
    {%- if message['role'] == 'user' %}
        {%- set ns.after_tool = false %}
        {{- '<｜User｜>' + message['content'] }}
    {%- elif message['role'] == 'assistant' and message.tool_calls is defined %}
        {{- '<｜Assistant｜>' + ('' if message['content'] is none else message['content']) }}
        {{- '<｜tool▁calls▁begin｜>' }}
        {%- for call in message['tool_calls'] %}
            {{- '' if loop.first else '\n' }}
            {{- '<｜tool▁call▁begin｜>' + call['type'] + '<｜tool▁sep｜>' + call['function']['name'] }}
            {{- '\n```json\n' + call['function']['arguments'] + '\n```<｜tool▁call▁end｜>' }}
        {%- endfor %}
        {{- '<｜tool▁calls▁end｜>' + eos_token }}
    {%- elif message['role'] == 'assistant' %}
        {%- set answer = message['content'] %}
        {%- if '</think>' in answer %}
            {%- set answer = answer.split('</think>')[-1].strip() %}
        {%- endif %}
        {%- if ns.after_tool %}{{ '<｜tool▁outputs▁end｜>' }}{% else %}{{ '<｜Assistant｜>' }}{% endif %}
        {{- answer + eos_token }}
        {%- set ns.after_tool = false %}
    {%- elif message['role'] == 'tool' %}
        {%- if not ns.after_tool %}{{ '<｜tool▁outputs▁begin｜>' }}{% endif %}
        {{- '<｜tool▁output▁begin｜>' + message['content'][:40] + '<｜tool▁output▁end｜>' }}
        {%- set ns.after_tool = true %}
    {%- endif %}
{%- endfor %}
{%- if ns.after_tool %}{{ '<｜tool▁outputs▁end｜>' }}{% endif %}
{%- if add_generation_prompt and not ns.after_tool %}{{ '<｜Assistant｜>' }}{% endif %}
"#;

const V3_MESSAGES: &str = r#"[
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Weather in 北京? <b>"},
    {"role": "assistant", "content": null, "tool_calls": [
        {"type": "function", "function": {"name": "get", "arguments": "{\"city\": \"北京\"}"}},
        {"type": "function", "function": {"name": "now", "arguments": "{}"}}]},
    {"role": "tool", "content": "sunny"},
    {"role": "tool", "content": "12:00"},
    {"role": "assistant", "content": "Sunny."},
    {"role": "system", "content": "Be polite."},
    {"role": "user", "content": "Thanks"},
    {"role": "assistant", "content": "<think>hm</think>\nYou are welcome."},
    {"role": "user", "content": "Bye\n"}
]"#;

#[test]
fn v3_constructs_render_as_in_python() {
    let messages: Vec<Message> = serde_json::from_str(V3_MESSAGES).unwrap();
    let expected = "<B>Be brief.\n\nBe polite.<｜User｜>Weather in 北京? <b><｜Assistant｜><｜tool▁calls▁begin｜><｜tool▁call▁begin｜>function<｜tool▁sep｜>get\n```json\n{\"city\": \"北京\"}\n```<｜tool▁call▁end｜>\n<｜tool▁call▁begin｜>function<｜tool▁sep｜>now\n```json\n{}\n```<｜tool▁call▁end｜><｜tool▁calls▁end｜><E><｜tool▁outputs▁begin｜><｜tool▁output▁begin｜>sunny<｜tool▁output▁end｜><｜tool▁output▁begin｜>12:00<｜tool▁output▁end｜><｜tool▁outputs▁end｜>Sunny.<E><｜User｜>Thanks<｜Assistant｜>You are welcome.<E><｜User｜>Bye\n<｜Assistant｜>";
    let text = render(V3_STYLE, &messages).unwrap();
    assert_eq!(text, expected);
    assert_eq!(text.matches("<B>").count(), 1);
    let closed = RenderOptions { add_generation_prompt: false, ..RenderOptions::default() };
    let text = template(V3_STYLE).render(&messages, &closed).unwrap();
    assert_eq!(text, expected.strip_suffix("<｜Assistant｜>").unwrap());
    let ends_in_tool = render(V3_STYLE, &messages[..5]).unwrap();
    assert!(ends_in_tool.ends_with("<｜tool▁outputs▁end｜>"), "{ends_in_tool}");
}

#[test]
fn tojson_writes_what_python_writes() {
    let value = json!({
        "a": 1,
        "b": [1.0, 1e16, 1e-5, -2.5e-7, 1e22, 0.1, 1e15, 1e-4],
        "c": {},
        "d": [],
        "e": [{}, [null, true, false]],
        "ü": "é<'\"\n>"
    });
    let cases = [
        (
            "{{ v|tojson }}",
            "{\"a\": 1, \"b\": [1.0, 1e+16, 1e-05, -2.5e-07, 1e+22, 0.1, 1000000000000000.0, 0.0001], \"c\": {}, \"d\": [], \"e\": [{}, [null, true, false]], \"ü\": \"é<'\\\"\\n>\"}",
        ),
        (
            "{{ v|tojson(indent=2) }}",
            "{\n  \"a\": 1,\n  \"b\": [\n    1.0,\n    1e+16,\n    1e-05,\n    -2.5e-07,\n    1e+22,\n    0.1,\n    1000000000000000.0,\n    0.0001\n  ],\n  \"c\": {},\n  \"d\": [],\n  \"e\": [\n    {},\n    [\n      null,\n      true,\n      false\n    ]\n  ],\n  \"ü\": \"é<'\\\"\\n>\"\n}",
        ),
    ];
    for (text, expected) in cases {
        let out = template(text).render(&hello(), &with_value(value.clone())).unwrap();
        assert_eq!(out, expected);
    }
}

#[test]
fn values_print_by_their_python_names() {
    let text = "{{ none }} {{ true }} {{ undefined_name }} {{ 1.0 }} {{ 'a<b' }}";
    assert_eq!(render(text, &hello()).unwrap(), "None True  1.0 a<b");
}

#[test]
fn blocks_are_trimmed_as_in_transformers() {
    let text = "{% for m in messages %}\n    {% if true %}\n{{ m.content }}\n    {% endif %}\n\
                {% endfor %}\n";
    assert_eq!(render(text, &hello()).unwrap(), "hello\n");
}

#[test]
fn given_variables_reach_the_template_but_replace_none_of_ours() {
    let variables = json!({"tools": [{"name": "f"}], "messages": [], "bos_token": "no"});
    let Value::Object(variables) = variables else { unreachable!() };
    let options = RenderOptions { variables, ..RenderOptions::default() };
    let text = "{{ bos_token }}{{ messages|length }}{{ tools|tojson }}{{ add_generation_prompt }}";
    let out = template(text).render(&hello(), &options).unwrap();
    assert_eq!(out, r#"<B>1[{"name": "f"}]True"#);
}

#[test]
fn an_absent_special_token_prints_nothing() {
    let template = ChatTemplate::new("[{{ bos_token }}{{ eos_token }}]", None, None).unwrap();
    assert_eq!(template.render(&hello(), &RenderOptions::default()).unwrap(), "[]");
}

#[test]
fn the_time_comes_from_the_caller_only() {
    let text = "{{ strftime_now('%Y-%m-%d') }}";
    let error = render(text, &hello()).unwrap_err().to_string();
    assert!(error.contains("strftime_now") && error.contains("not provided"), "{error}");
    let clock = |format: &str| (format == "%Y-%m-%d").then(|| "2025-03-24".to_owned());
    let options = RenderOptions::default();
    let out = template(text).with_clock(clock).render(&hello(), &options).unwrap();
    assert_eq!(out, "2025-03-24");
    let error = template("{{ strftime_now('%s') }}").with_clock(clock).render(&hello(), &options);
    assert!(error.unwrap_err().to_string().contains("\"%s\""));
}

#[test]
fn mistakes_are_told_with_the_template_line() {
    let only = |text: &str| render(text, &hello()).unwrap_err();
    let refused = only("{{ bos_token }}\n\n{{ raise_exception('roles must alternate') }}");
    assert!(
        matches!(&refused, ChatError::Refused { line: 3, message } if message == "roles must alternate"),
        "{refused:?}"
    );
    let failed = only("\n{{ 'x' + none }}");
    assert!(matches!(&failed, ChatError::Render { line: 2, .. }), "{failed:?}");
    let syntax = ChatTemplate::new("a\n{% if %}", None, None).unwrap_err();
    assert!(matches!(&syntax, ChatError::Syntax { line: 2, .. }), "{syntax:?}");
    assert!(!syntax.to_string().contains("(in "), "{syntax}");
    assert!(matches!(only("{{ nosuch|tojson }}"), ChatError::Render { line: 1, .. }));
    assert!(matches!(render("", &[]), Err(ChatError::NoMessages)));
}

#[test]
fn an_endless_template_is_stopped() {
    let text = "{% for a in range(9999) %}{% for b in range(9999) %}{% endfor %}{% endfor %}";
    assert!(matches!(render(text, &hello()), Err(ChatError::TooLong { messages: 1 })));
}

#[test]
fn a_long_conversation_is_within_the_bound() {
    let messages: Vec<_> = (0..2000)
        .flat_map(|i| [Message::user(format!("q{i}")), Message::assistant(format!("a{i}"))])
        .collect();
    let text = render(V3_STYLE, &messages).unwrap();
    assert!(text.ends_with("<｜User｜>q1999<｜Assistant｜>a1999<E><｜Assistant｜>"));
}

#[test]
fn a_template_is_found_where_checkpoints_keep_it() {
    let from = |config: Value, file: Option<&str>| {
        ChatTemplate::from_config(&serde_json::to_vec(&config).unwrap(), file)
            .map(|template| template.render(&hello(), &RenderOptions::default()).unwrap())
    };
    let named =
        json!([{"name": "tool_use", "template": "t"}, {"name": "default", "template": "d"}]);
    assert_eq!(from(json!({"chat_template": "c"}), None).unwrap(), "c");
    assert_eq!(from(json!({"chat_template": "c"}), Some("f")).unwrap(), "f");
    assert_eq!(from(json!({"chat_template": named}), None).unwrap(), "d");
    let object = json!({"bos_token": {"content": "<s>"}, "chat_template": "{{ bos_token }}"});
    assert_eq!(from(object, None).unwrap(), "<s>");
    let error = from(json!({"chat_template": null}), None).unwrap_err();
    assert!(matches!(error, ChatError::NoTemplate) && error.to_string().contains("--prompt"));
    assert!(matches!(from(json!({"chat_template": [1]}), None), Err(ChatError::TemplateForm)));
    assert!(matches!(ChatTemplate::from_config(b"{", None), Err(ChatError::Config(_))));
}
