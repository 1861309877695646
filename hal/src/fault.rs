//! Fault injection: rules that make chosen commands slow, wrong or endless, so that error paths
//! are tested like any other.

use crate::DeviceId;
use parking_lot::Mutex;
use std::collections::HashMap;
use std::str::FromStr;
use std::sync::Arc;
use std::time::Duration;

/// What happens to a command that a rule matches.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum FaultAction {
    /// It runs as always.
    Pass,
    /// It takes this much longer, on the device's clock.
    Delay(Duration),
    /// It fails, with this text.
    Fail(Arc<str>),
    /// It never completes.
    Hang,
    /// Its device is lost.
    Lose,
}

/// Matches commands. Conditions that are absent match everything.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct FaultMatch {
    /// Only on this die.
    pub device: Option<DeviceId>,
    /// Only commands of this kind, by the name that traces use: `linear`, `all_reduce`, `transfer`.
    pub command: Option<String>,
    /// Only commands whose label contains this.
    pub label: Option<String>,
}

/// A match, which of the matching commands it means, and what then happens.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct FaultRule {
    /// Which commands.
    pub matches: FaultMatch,
    /// The how-many-th matching command on its die, from 0; `None` means each of them. Counted per
    /// die in submission order, so that the result does not depend on how dies are scheduled.
    pub nth: Option<u64>,
    /// What happens.
    pub action: FaultAction,
}

/// A rule's text that cannot be understood.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error(
    "fault rule {rule:?}: {problem}; expected KEY=VALUE pairs such as \
     \"device=3,op=linear,label=layer 4,nth=5,action=fail:bad parity\" with action \
     pass|delay:MICROSECONDS|fail[:TEXT]|hang|lose"
)]
pub struct FaultRuleError {
    rule: String,
    problem: String,
}

impl FromStr for FaultRule {
    type Err = FaultRuleError;

    /// Reads `device=D,op=NAME,label=TEXT,nth=N,action=ACTION`, in any order; only `action` must be
    /// there.
    fn from_str(text: &str) -> Result<Self, FaultRuleError> {
        let error = |problem: String| FaultRuleError { rule: text.to_string(), problem };
        let mut matches = FaultMatch::default();
        let (mut nth, mut action) = (None, None);
        for pair in text.split(',') {
            let (key, value) =
                pair.split_once('=').ok_or_else(|| error(format!("{pair:?} is no KEY=VALUE")))?;
            let number =
                || value.parse::<u64>().map_err(|_| error(format!("{key} {value:?} is no number")));
            match key.trim() {
                "device" => {
                    let id = u32::try_from(number()?)
                        .map_err(|_| error(format!("device {value} is too large")))?;
                    matches.device = Some(DeviceId(id));
                }
                "op" => matches.command = Some(value.trim().to_string()),
                "label" => matches.label = Some(value.to_string()),
                "nth" => nth = Some(number()?),
                "action" => action = Some(parse_action(value).map_err(error)?),
                other => return Err(error(format!("unknown key {other:?}"))),
            }
        }
        let action = action.ok_or_else(|| error("it has no action".to_string()))?;
        Ok(FaultRule { matches, nth, action })
    }
}

fn parse_action(text: &str) -> Result<FaultAction, String> {
    let (name, argument) = match text.split_once(':') {
        Some((name, argument)) => (name.trim(), Some(argument)),
        None => (text.trim(), None),
    };
    match (name, argument) {
        ("pass", None) => Ok(FaultAction::Pass),
        ("hang", None) => Ok(FaultAction::Hang),
        ("lose", None) => Ok(FaultAction::Lose),
        ("fail", text) => Ok(FaultAction::Fail(text.unwrap_or("rule").into())),
        ("delay", Some(micros)) => micros
            .trim()
            .parse()
            .map(|m| FaultAction::Delay(Duration::from_micros(m)))
            .map_err(|_| format!("delay {micros:?} is no number of microseconds")),
        _ => Err(format!("unknown action {text:?}")),
    }
}

/// Rules in order; the first that matches decides. Share one plan between the dies of a system.
#[derive(Debug, Default)]
pub struct FaultPlan {
    rules: Vec<Counted>,
}

/// A rule, and how many commands it has matched on each die.
#[derive(Debug)]
struct Counted {
    rule: FaultRule,
    matched: Mutex<HashMap<DeviceId, u64>>,
}

impl FaultPlan {
    /// A plan of these rules.
    pub fn new(rules: impl IntoIterator<Item = FaultRule>) -> Self {
        let counted = |rule| Counted { rule, matched: Mutex::default() };
        FaultPlan { rules: rules.into_iter().map(counted).collect() }
    }

    /// The rules, in order.
    pub fn rules(&self) -> impl Iterator<Item = &FaultRule> {
        self.rules.iter().map(|counted| &counted.rule)
    }

    /// Decides about the next command of a die. Called once per command, in submission order.
    pub fn decide(&self, device: DeviceId, command: &str, label: &str) -> FaultAction {
        let mut decided = FaultAction::Pass;
        for Counted { rule, matched } in &self.rules {
            let m = &rule.matches;
            let matches = m.device.is_none_or(|d| d == device)
                && m.command.as_deref().is_none_or(|c| c == command)
                && m.label.as_deref().is_none_or(|l| label.contains(l));
            if !matches {
                continue;
            }
            let mut matched = matched.lock();
            let seen = matched.entry(device).or_default();
            let count = *seen;
            *seen += 1;
            // Later rules still count this command, so that `nth` means the same whatever stands
            // before it in the plan.
            if decided == FaultAction::Pass && rule.nth.is_none_or(|n| n == count) {
                decided = rule.action.clone();
            }
        }
        decided
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rules_read_from_text() {
        let rule: FaultRule =
            "device=3,op=linear,label=layer 4,nth=5,action=fail:bad".parse().unwrap();
        assert_eq!(
            rule,
            FaultRule {
                matches: FaultMatch {
                    device: Some(DeviceId(3)),
                    command: Some("linear".into()),
                    label: Some("layer 4".into()),
                },
                nth: Some(5),
                action: FaultAction::Fail("bad".into()),
            }
        );
        for bad in ["", "device=3", "action=explode", "nth=x,action=hang", "action=delay", "a=b"] {
            let error = bad.parse::<FaultRule>().unwrap_err().to_string();
            assert!(error.contains("expected KEY=VALUE"), "{error}");
        }
    }

    #[test]
    fn nth_counts_per_die() {
        let plan = FaultPlan::new(["op=linear,nth=1,action=hang".parse().unwrap()]);
        let ask = |die, op| plan.decide(DeviceId(die), op, "");
        assert_eq!(ask(0, "linear"), FaultAction::Pass);
        assert_eq!(ask(1, "linear"), FaultAction::Pass);
        assert_eq!(ask(0, "rope"), FaultAction::Pass);
        assert_eq!(ask(0, "linear"), FaultAction::Hang);
        assert_eq!(ask(0, "linear"), FaultAction::Pass);
        assert_eq!(ask(1, "linear"), FaultAction::Hang);
    }
}
