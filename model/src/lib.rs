//! DeepSeek-V3: configuration, checkpoint, tokenizer, graph and engine.
//!
//! Depends on [`hal`] and on no backend: whatever implements [`hal::Device`] runs the model.
//!
//! From the files to the text: [`checkpoint`] and [`config`] say what the model is, [`weights`]
//! brings it to a die, [`graph`] writes the model down as ops over values, [`engine`] binds those
//! to memory and issues them, [`sampling`] chooses tokens, [`tokenizer`] and [`chat`] turn text
//! into ids and back.

pub mod chat;
pub mod checkpoint;
pub mod config;
pub mod engine;
pub mod graph;
pub mod numerics;
pub mod plan;
pub mod sampling;
pub mod schedule;
pub mod tokenizer;
pub mod weights;

pub use numerics::Numerics;
