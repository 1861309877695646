//! Events as lines of JSON.

use super::arrows::Arrows;
use super::number::{Decimal, duration};
use hal::StreamId;
use hal::trace::{Span, WaitedFor};
use std::fmt;
use std::io::{self, Write};

/// A stream, as viewers know it.
#[derive(Clone, Debug)]
pub(super) struct Thread {
    pub(super) process: u64,
    pub(super) number: u64,
    pub(super) order: u32,
    pub(super) name: String,
}

/// A file of events, being written.
pub(super) struct Events<'a> {
    out: &'a mut dyn Write,
    count: u64,
}

/// Text as a JSON string.
struct Quoted<'a>(&'a str);

impl fmt::Display for Quoted<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let text = serde_json::to_string(self.0).map_err(|_| fmt::Error)?;
        f.write_str(&text)
    }
}

/// Ends a process's or thread's own fields: `"pid":1,"tid":2,"ts":3.4`.
struct At<'a>(&'a Thread, u64);

impl fmt::Display for At<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let At(Thread { process, number, .. }, picos) = self;
        write!(f, "\"pid\":{process},\"tid\":{number},\"ts\":{}", Decimal::micros(*picos))
    }
}

impl<'a> Events<'a> {
    pub(super) fn begin(
        out: &'a mut dyn Write,
        about: &[(String, String)],
    ) -> io::Result<Events<'a>> {
        write!(out, "{{\"displayTimeUnit\":\"ns\",\"otherData\":{{")?;
        for (at, (name, value)) in about.iter().enumerate() {
            let comma = if at > 0 { "," } else { "" };
            write!(out, "{comma}{}:{}", Quoted(name), Quoted(value))?;
        }
        write!(out, "}},\"traceEvents\":[")?;
        Ok(Events { out, count: 0 })
    }

    /// Ends the file; how many events it has.
    pub(super) fn end(self) -> io::Result<u64> {
        writeln!(self.out, "\n]}}")?;
        self.out.flush()?;
        Ok(self.count)
    }

    fn event(&mut self, fields: fmt::Arguments<'_>) -> io::Result<()> {
        let comma = if self.count > 0 { "," } else { "" };
        self.count += 1;
        write!(self.out, "{comma}\n{{{fields}}}")
    }

    /// Names the process that a thread belongs to.
    pub(super) fn process(&mut self, thread: &Thread, name: &str) -> io::Result<()> {
        let pid = thread.process;
        self.event(format_args!(
            "\"ph\":\"M\",\"name\":\"process_name\",\"pid\":{pid},\"args\":{{\"name\":{}}}",
            Quoted(name)
        ))?;
        self.event(format_args!(
            "\"ph\":\"M\",\"name\":\"process_sort_index\",\"pid\":{pid},\"args\":{{\"sort_index\":{pid}}}"
        ))
    }

    /// Names a thread.
    pub(super) fn thread(&mut self, thread: &Thread) -> io::Result<()> {
        let Thread { process, number, order, name } = thread;
        self.event(format_args!(
            "\"ph\":\"M\",\"name\":\"thread_name\",\"pid\":{process},\"tid\":{number},\"args\":{{\"name\":{}}}",
            Quoted(name)
        ))?;
        self.event(format_args!(
            "\"ph\":\"M\",\"name\":\"thread_sort_index\",\"pid\":{process},\"tid\":{number},\"args\":{{\"sort_index\":{order}}}"
        ))
    }

    /// A command: a complete event.
    pub(super) fn command<'t>(
        &mut self,
        thread: &Thread,
        span: &Span,
        thread_of: &dyn Fn(StreamId) -> Option<&'t Thread>,
        arrows: &Arrows,
    ) -> io::Result<()> {
        let took = span.duration();
        let at = At(thread, span.start);
        let shown = Decimal::micros(duration(span.start, span.end));
        let (name, kind) = (Quoted(span.label.as_str()), span.kind.name());
        let args = Args { span, took, thread_of, arrows };
        self.event(format_args!(
            "\"ph\":\"X\",\"name\":{name},\"cat\":\"{kind}\",{at},\"dur\":{shown},\"args\":{{{args}}}"
        ))
    }

    /// Where an arrow begins: inside the last event of its thread.
    pub(super) fn arrow_begin(
        &mut self,
        thread: &Thread,
        why: &str,
        number: u64,
        picos: u64,
    ) -> io::Result<()> {
        let at = At(thread, picos);
        self.event(format_args!(
            "\"ph\":\"s\",\"name\":\"{why}\",\"cat\":\"wait\",\"id\":{number},{at}"
        ))
    }

    /// Where an arrow ends: at the next event of its thread.
    pub(super) fn arrow_end(
        &mut self,
        thread: &Thread,
        why: &str,
        number: u64,
        picos: u64,
    ) -> io::Result<()> {
        let at = At(thread, picos);
        self.event(format_args!(
            "\"ph\":\"f\",\"name\":\"{why}\",\"cat\":\"wait\",\"id\":{number},{at}"
        ))
    }

    /// A counter's value from now on, in thousandths.
    pub(super) fn counter(
        &mut self,
        thread: &Thread,
        name: &str,
        picos: u64,
        thousandths: u64,
    ) -> io::Result<()> {
        let (at, value) = (At(thread, picos), Decimal::millis(thousandths));
        self.event(format_args!(
            "\"ph\":\"C\",\"name\":\"{name}\",{at},\"args\":{{\"GB/s\":{value}}}"
        ))
    }
}

/// What a viewer shows of a command besides its name and time.
struct Args<'a, 't> {
    span: &'a Span,
    took: u64,
    thread_of: &'a dyn Fn(StreamId) -> Option<&'t Thread>,
    arrows: &'a Arrows,
}

impl fmt::Display for Args<'_, '_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Span { sequence, operations, bytes, bound, ready, start, .. } = *self.span;
        write!(f, "\"sequence\":{sequence},\"picoseconds\":{}", self.took)?;
        if operations > 0 {
            let rate = Decimal::tera_per_second(operations, self.took);
            write!(f, ",\"operations\":{operations},\"TFLOPS\":{rate}")?;
        }
        if bytes > 0 {
            let rate = Decimal::giga_per_second(bytes, self.took);
            write!(f, ",\"bytes\":{bytes},\"GB/s\":{rate}")?;
        }
        if self.took > 0 {
            write!(f, ",\"bound by\":\"{}\"", bound.name())?;
        }
        if start > ready {
            write!(f, ",\"waited us\":{}", Decimal::micros(start - ready))?;
        }
        match self.span.waited_for {
            Some(WaitedFor::Command { stream, sequence }) => {
                let name = (self.thread_of)(stream).map_or(String::new(), |t| t.name.clone() + " ");
                let text = format!("{}, {name}command {sequence}", stream.device);
                write!(f, ",\"waited for\":{}", Quoted(&text))
            }
            Some(WaitedFor::Ranks { communicator, round }) => {
                let number = self.arrows.communicator(communicator);
                write!(f, ",\"communicator\":{number},\"round\":{round}")
            }
            _ => Ok(()),
        }
    }
}
