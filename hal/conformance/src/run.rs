//! Running cases, and what came of them.

use crate::backend::{Backend, Exclusion, Feature, glob};
use crate::lab::{Lab, Verdict};
use serde::Serialize;
use std::fmt;
use std::sync::Arc;
use std::sync::mpsc::{RecvTimeoutError, channel};
use std::time::{Duration, Instant};

type Body = Arc<dyn Fn(&Lab) -> Verdict + Send + Sync>;

/// One thing that a backend must do.
#[derive(Clone)]
pub struct Case {
    /// `family/what/details`.
    pub name: String,
    dies: usize,
    /// It poisons streams, loses dies or counts memory: it gets a system of its own.
    alone: bool,
    needs: Vec<Feature>,
    body: Body,
}

impl fmt::Debug for Case {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.name)
    }
}

impl Case {
    pub(crate) fn new(
        name: impl Into<String>,
        body: impl Fn(&Lab) -> Verdict + Send + Sync + 'static,
    ) -> Case {
        Case { name: name.into(), dies: 1, alone: false, needs: Vec::new(), body: Arc::new(body) }
    }

    pub(crate) fn dies(mut self, dies: usize) -> Case {
        self.dies = dies;
        self
    }

    pub(crate) fn alone(mut self) -> Case {
        self.alone = true;
        self
    }

    pub(crate) fn needs(mut self, features: &[Feature]) -> Case {
        self.needs.extend(features);
        self
    }

    /// The part of the name before the first `/`.
    pub fn family(&self) -> &str {
        family(&self.name)
    }
}

/// How a case went.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Outcome {
    /// The backend does it.
    Passed,
    /// It does not.
    Failed,
    /// It was not run: the reason is in the result.
    Skipped,
    /// It failed, as the backend's list says.
    ExpectedFailure,
    /// It passed although the backend's list says that it fails. This counts as a failure.
    UnexpectedPass,
}

impl Outcome {
    /// Whether the suite fails because of it.
    pub fn is_bad(self) -> bool {
        matches!(self, Outcome::Failed | Outcome::UnexpectedPass)
    }
}

/// What came of one case.
#[derive(Clone, Debug, Serialize)]
pub struct CaseResult {
    /// Its name.
    pub name: String,
    /// How it went.
    pub outcome: Outcome,
    /// Why it failed or was skipped; empty where it passed.
    pub reason: String,
    /// Seconds of host time.
    pub seconds: f64,
}

impl CaseResult {
    /// The part of the name before the first `/`.
    pub fn family(&self) -> &str {
        family(&self.name)
    }
}

fn family(name: &str) -> &str {
    name.split('/').next().unwrap_or_default()
}

/// How the cases of one family went.
#[derive(Clone, Debug, Default, PartialEq, Serialize)]
pub struct Summary {
    /// The part of the names before the first `/`.
    pub family: String,
    /// How many passed.
    pub passed: usize,
    /// How many failed that were not expected to.
    pub failed: usize,
    /// How many were not run.
    pub skipped: usize,
    /// How many failed as listed.
    pub expected_failures: usize,
    /// How many passed that are listed as failing.
    pub unexpected_passes: usize,
    /// Seconds of host time.
    pub seconds: f64,
}

impl Summary {
    /// Counts one more case.
    pub fn add(&mut self, result: &CaseResult) {
        let count = match result.outcome {
            Outcome::Passed => &mut self.passed,
            Outcome::Failed => &mut self.failed,
            Outcome::Skipped => &mut self.skipped,
            Outcome::ExpectedFailure => &mut self.expected_failures,
            Outcome::UnexpectedPass => &mut self.unexpected_passes,
        };
        *count += 1;
        self.seconds += result.seconds;
    }
}

/// What came of all.
#[derive(Clone, Debug, Serialize)]
pub struct Report {
    /// The backend's name.
    pub backend: String,
    /// Every case that the filter let through.
    pub results: Vec<CaseResult>,
}

impl Report {
    /// How many had this outcome.
    pub fn count(&self, outcome: Outcome) -> usize {
        self.results.iter().filter(|r| r.outcome == outcome).count()
    }

    /// The results family by family, in the order in which they ran.
    pub fn families(&self) -> Vec<Summary> {
        let mut all: Vec<Summary> = Vec::new();
        for result in &self.results {
            if all.last().is_none_or(|last| last.family != result.family()) {
                let family = result.family().to_string();
                all.push(Summary { family, ..Summary::default() });
            }
            if let Some(last) = all.last_mut() {
                last.add(result);
            }
        }
        all
    }

    /// Those because of which the suite fails.
    pub fn bad(&self) -> impl Iterator<Item = &CaseResult> {
        self.results.iter().filter(|r| r.outcome.is_bad())
    }
}

/// Which cases to run, and how.
#[derive(Clone, Debug)]
pub struct Options {
    /// Only names that contain this, or match it where it has a `*`.
    pub filter: Option<String>,
    /// How long one case may take before it counts as hanging.
    pub limit: Duration,
    /// Stop at the first failure.
    pub fail_fast: bool,
}

impl Default for Options {
    fn default() -> Self {
        Options { filter: None, limit: Duration::from_secs(60), fail_fast: false }
    }
}

impl Options {
    /// Whether a case of this name is run.
    pub fn lets_through(&self, name: &str) -> bool {
        self.filter.as_deref().is_none_or(|filter| match filter.contains('*') {
            true => glob(filter, name),
            false => name.contains(filter),
        })
    }
}

/// Runs the suite. `on_result` hears of each case as it ends.
pub fn run(
    backend: &dyn Backend,
    options: &Options,
    on_result: &mut dyn FnMut(&CaseResult),
) -> Report {
    let lists = Lists {
        dies: backend.dies(),
        features: backend.features(),
        unsupported: backend.unsupported(),
        expected: backend.expected_failures(),
    };
    let mut shared: Option<Arc<Lab>> = None;
    let mut results = Vec::new();
    for case in crate::cases().into_iter().filter(|c| options.lets_through(&c.name)) {
        let began = Instant::now();
        let (outcome, reason) = match lists.skip(&case) {
            Some(reason) => (Outcome::Skipped, reason),
            None => {
                let verdict = execute(backend, &case, &mut shared, options.limit);
                lists.judge(&case, verdict)
            }
        };
        let seconds = began.elapsed().as_secs_f64();
        let result = CaseResult { name: case.name, outcome, reason, seconds };
        on_result(&result);
        let stop = options.fail_fast && outcome.is_bad();
        results.push(result);
        if stop {
            break;
        }
    }
    Report { backend: backend.name(), results }
}

struct Lists {
    dies: usize,
    features: Vec<Feature>,
    unsupported: Vec<Exclusion>,
    expected: Vec<Exclusion>,
}

impl Lists {
    fn skip(&self, case: &Case) -> Option<String> {
        if let Some(listed) = self.unsupported.iter().find(|e| e.matches(&case.name)) {
            return Some(format!("unsupported: {}", listed.reason));
        }
        if case.dies > self.dies {
            return Some(format!("needs {} dies, there are {}", case.dies, self.dies));
        }
        let missing = case.needs.iter().find(|f| !self.features.contains(f))?;
        Some(format!("needs {missing}"))
    }

    fn judge(&self, case: &Case, verdict: Result<(), String>) -> (Outcome, String) {
        let listed = self.expected.iter().find(|e| e.matches(&case.name));
        match (verdict, listed) {
            (Ok(()), None) => (Outcome::Passed, String::new()),
            (Err(reason), None) => (Outcome::Failed, reason),
            (Err(reason), Some(e)) => (Outcome::ExpectedFailure, format!("{}: {reason}", e.reason)),
            (Ok(()), Some(e)) => {
                let text = format!("listed as failing ({}), and passes: take it off", e.reason);
                (Outcome::UnexpectedPass, text)
            }
        }
    }
}

/// Runs one case on a thread of its own. A system in which something went wrong is not used again.
fn execute(
    backend: &dyn Backend,
    case: &Case,
    shared: &mut Option<Arc<Lab>>,
    limit: Duration,
) -> Result<(), String> {
    let open = || backend.open().map(Lab::new).map_err(|e| format!("opening a system: {e}"));
    let lab = match (case.alone, &*shared) {
        (true, _) => Arc::new(open()?),
        (false, Some(lab)) => lab.clone(),
        (false, None) => shared.insert(Arc::new(open()?)).clone(),
    };
    let body = case.body.clone();
    let (done, verdict) = channel();
    let spawned = std::thread::Builder::new().name(case.name.clone()).spawn(move || {
        let verdict = body(&lab).map_err(|finding| finding.0);
        drop(lab);
        // Nobody listens any more if the limit has passed.
        let _ = done.send(verdict);
    });
    let thread = spawned.map_err(|e| format!("starting a thread: {e}"))?;
    let verdict = match verdict.recv_timeout(limit) {
        Ok(verdict) => verdict,
        Err(RecvTimeoutError::Timeout) => Err(format!("hangs: not done after {limit:?}")),
        Err(RecvTimeoutError::Disconnected) => Err(match thread.join() {
            Ok(()) => "ended without a verdict".to_string(),
            Err(panic) => {
                let text = panic.downcast_ref::<&str>().map(|s| (*s).to_string());
                let text = text.or_else(|| panic.downcast_ref::<String>().cloned());
                format!("panicked: {}", text.unwrap_or_default())
            }
        }),
    };
    if verdict.is_err() {
        *shared = None;
    }
    verdict
}
