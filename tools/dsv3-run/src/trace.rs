//! Watching a run: totals by op, and `--trace`.

use crate::cli::{Switch, SystemArgs, TraceArgs};
use crate::output::{bytes, seconds};
use crate::system::Running;
use anyhow::{Context, ensure};
use hal::trace::{Span, TraceSink};
use hal::{Device, Stream};
use model::engine::Engine;
use report::trace::Names;
use report::{PartialFile, Recorded, SpanLog};
use std::io::{BufWriter, Write};
use std::path::Path;
use std::sync::Arc;
use std::time::Instant;

/// A trace file, from before the run until it is written.
#[derive(Debug)]
pub(crate) struct Tracing {
    log: Arc<SpanLog>,
    file: PartialFile,
    watched: Watched,
}

/// The devices that are watched, and what they tell.
type Watched = Vec<(Arc<dyn Device>, Arc<dyn TraceSink>)>;

/// Hands each span to several.
#[derive(Debug)]
struct Each(Vec<Arc<dyn TraceSink>>);

impl TraceSink for Each {
    fn record(&self, span: &Span) {
        self.0.iter().for_each(|sink| sink.record(span));
    }
}

impl Tracing {
    /// Begins the file, before anything is loaded or run.
    pub(crate) fn prepare(
        args: &TraceArgs,
        system: &SystemArgs,
    ) -> anyhow::Result<Option<Tracing>> {
        let Some(path) = &args.trace else { return Ok(None) };
        ensure!(
            system.timing != Some(Switch::Off),
            "--trace says when each command ran, and with --timing off there are no times"
        );
        Tracing::create(path).map(Some)
    }

    /// Begins the file.
    pub(crate) fn create(path: &Path) -> anyhow::Result<Tracing> {
        let what = || format!("--trace {}", path.display());
        let file = PartialFile::create(path).with_context(what)?;
        let folder = path.parent().filter(|folder| !folder.as_os_str().is_empty());
        let log = SpanLog::new(folder.unwrap_or(Path::new("."))).with_context(what)?;
        Ok(Tracing { log: Arc::new(log), file, watched: Vec::new() })
    }

    /// Where spans go.
    pub(crate) fn sink(&self) -> &dyn TraceSink {
        &*self.log
    }

    /// Makes sure that the devices can be traced at all.
    pub(crate) fn check(&self, devices: &[Arc<dyn Device>]) -> anyhow::Result<()> {
        let what = || format!("--trace {}", self.file.path().display());
        for device in devices {
            let properties = device.properties();
            ensure!(
                properties.clock.is_some(),
                "--trace: {} of backend {} has no clock that can be read, so it cannot be traced",
                properties.id,
                properties.backend
            );
            device.set_trace(Some(self.log.clone())).with_context(what)?;
            device.set_trace(None).with_context(what)?;
        }
        Ok(())
    }

    /// What completes from now on belongs to the next phase of the run.
    ///
    /// # Errors
    ///
    /// A device's, which has to tell first of all that has completed.
    pub(crate) fn next_phase(&self) -> hal::Result<()> {
        self.watched.iter().try_for_each(|(device, _)| device.set_trace(None))?;
        self.log.next_phase();
        self.watched.iter().try_for_each(|(device, sink)| device.set_trace(Some(sink.clone())))
    }

    /// Writes the file.
    pub(crate) fn finish(mut self, names: &Names) -> anyhow::Result<Recorded> {
        let began = Instant::now();
        let path = self.file.path().to_path_buf();
        let what = || format!("--trace {}", path.display());
        let recorded = self.log.close().with_context(what)?;
        let mut out = BufWriter::with_capacity(1 << 16, self.file.file());
        let events = report::trace::write(&recorded, names, &mut out).with_context(what)?;
        drop(out);
        let size = self.file.file().metadata().with_context(what)?.len();
        self.file.keep().with_context(what)?;
        let text = format!(
            "traced {} commands: {events} events, {}, in {} (written in {}); see ui.perfetto.dev",
            recorded.len(),
            bytes(size),
            path.display(),
            seconds(began.elapsed().as_secs_f64())
        );
        writeln!(std::io::stderr(), "{text}")?;
        Ok(recorded)
    }
}

impl Running {
    /// Has what the engine runs from now on watched: by `sink`, and for `--trace`. Whether it is: a
    /// device may have a clock and not say what took how long. That is an error with `--trace` only.
    pub(crate) fn watch(
        &mut self,
        engine: &Engine,
        sink: Option<Arc<dyn TraceSink>>,
    ) -> anyhow::Result<bool> {
        let mut sinks: Vec<_> = sink.into_iter().collect();
        sinks.extend(self.trace.iter().map(|trace| trace.log.clone() as Arc<dyn TraceSink>));
        if sinks.is_empty() {
            return Ok(false);
        }
        let each: Arc<dyn TraceSink> = Arc::new(Each(sinks));
        let mut watched = Watched::new();
        for device in engine.devices().filter(|device| device.properties().clock.is_some()) {
            match device.set_trace(Some(each.clone())) {
                Err(hal::Error::Unsupported { .. }) if self.trace.is_none() => return Ok(false),
                other => other?,
            }
            watched.push((device.clone(), each.clone()));
        }
        if let Some(trace) = &mut self.trace {
            trace.watched = watched;
        }
        Ok(true)
    }

    /// Ends the watch, and writes the trace file if there is to be one; its spans.
    pub(crate) fn end_watch(&mut self, engine: &Engine) -> anyhow::Result<Option<Recorded>> {
        for device in engine.devices() {
            device.set_trace(None)?;
        }
        let Some(trace) = self.trace.take() else { return Ok(None) };
        trace.finish(&names(engine)).map(Some)
    }
}

/// What a trace is of, its program first.
pub(crate) fn about<const N: usize>(what: [(&str, String); N]) -> Vec<(String, String)> {
    let program = ("program", concat!("dsv3-run ", env!("CARGO_PKG_VERSION")).to_string());
    let all = std::iter::once(program).chain(what);
    all.map(|(name, value)| (name.to_string(), value)).collect()
}

fn names(engine: &Engine) -> Names {
    let mut names = Names { about: about([]), ..Names::default() };
    let about = |name: &str, value: String| (name.to_string(), value);
    if let Some(properties) = engine.devices().next().map(|device| device.properties()) {
        names.about.push(about("machine", properties.name.clone()));
        names.about.push(about("backend", properties.backend.to_string()));
        names.about.extend(properties.clock.map(|clock| about("clock", clock.to_string())));
    }
    let placed = engine.devices().map(|device| device.properties()).map(|p| (p.id, p.placement));
    names.dies.extend(placed);
    let stream = |stream: &Arc<dyn Stream>| (stream.id(), stream.label().to_string());
    names.streams.extend(engine.streams().map(stream));
    names
}
