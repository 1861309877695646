//! How fast commands go that run on a die at the same time.
//!
//! Each command asks for a share of each resource, the one that it takes when it has the die for
//! itself. Where the shares of a resource add up to more than there is, those who ask for little get
//! it, and the others get equal parts of the rest: max-min fairness (Bertsekas and Gallager, Data
//! Networks, 1992, section 6.5.2). A command goes as fast as its scarcest resource lets it, and leaves
//! what it then does not use of the others to the others.
//!
//! Everything is an integer, so that a program's times do not depend on when it began, nor on the
//! order in which this is worked out.

use hal::LinkKind;

/// What the commands of a die share.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Resource {
    /// Cores.
    Compute,
    /// Bandwidth of device memory.
    Memory,
    /// The port to other dies of the card.
    OnCard,
    /// The port to other cards of the host.
    InHost,
    /// The port to other hosts.
    Network,
}

impl Resource {
    /// Every resource.
    pub const ALL: [Resource; RESOURCES] = [
        Resource::Compute,
        Resource::Memory,
        Resource::OnCard,
        Resource::InHost,
        Resource::Network,
    ];

    /// The port of a kind of link; [`None`] inside a die.
    pub fn port(kind: LinkKind) -> Option<Resource> {
        match kind {
            LinkKind::SameDie => None,
            LinkKind::OnCard => Some(Resource::OnCard),
            LinkKind::InHost => Some(Resource::InHost),
            LinkKind::Network => Some(Resource::Network),
        }
    }
}

const RESOURCES: usize = 5;

/// The whole of a resource.
const WHOLE: u32 = 1 << 16;

/// The rate of a command that has all that it asks for, per picosecond.
pub(super) const FULL: u64 = 1 << 32;

/// Which part of each resource of its die a command uses while it runs alone.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct Shares([u32; RESOURCES]);

impl Shares {
    /// Nothing: it slows nobody, and nobody slows it.
    pub const NONE: Shares = Shares([0; RESOURCES]);

    /// The same with another part of one resource, from 0 to 1.
    #[must_use]
    pub fn with(mut self, resource: Resource, part: f64) -> Self {
        self.0[resource as usize] = (part.clamp(0.0, 1.0) * f64::from(WHOLE)).round() as u32;
        self
    }

    /// The part of a resource, from 0 to 1.
    pub fn of(&self, resource: Resource) -> f64 {
        f64::from(self.0[resource as usize]) / f64::from(WHOLE)
    }
}

/// A command that runs on a die.
#[derive(Clone, Copy, Debug)]
pub(super) struct Claim {
    /// What it asks for.
    pub(super) shares: Shares,
    /// Its rate, where something else than this die has decided it.
    pub(super) rate: Option<u64>,
}

/// The rate of each command, in parts of [`FULL`].
pub(super) fn rates(claims: &[Claim], rates: &mut Vec<u64>) {
    rates.clear();
    rates.extend(claims.iter().map(|claim| claim.rate.unwrap_or(FULL)));
    let mut left = [u64::from(WHOLE) * FULL; RESOURCES];
    let mut open: Vec<usize> = Vec::with_capacity(claims.len());
    for (at, claim) in claims.iter().enumerate() {
        match claim.rate {
            Some(rate) => take(&mut left, &claim.shares, rate),
            None => open.push(at),
        }
    }
    while !open.is_empty() {
        let mut slowest: Option<(u64, usize)> = None;
        for (resource, &left) in left.iter().enumerate() {
            let Some(level) = level(claims, &open, resource, left) else { continue };
            for (place, &at) in open.iter().enumerate() {
                let share = u64::from(claims[at].shares.0[resource]);
                if share * FULL <= level {
                    continue;
                }
                let rate = (level / share).max(1);
                if slowest.is_none_or(|(least, _)| rate < least) {
                    slowest = Some((rate, place));
                }
            }
        }
        let Some((rate, place)) = slowest else { return };
        let at = open.remove(place);
        rates[at] = rate;
        take(&mut left, &claims[at].shares, rate);
    }
}

fn take(left: &mut [u64; RESOURCES], shares: &Shares, rate: u64) {
    for (left, &share) in left.iter_mut().zip(&shares.0) {
        *left = left.saturating_sub(u64::from(share) * rate);
    }
}

/// What each command may use of a resource at most; [`None`] if there is enough for all.
fn level(claims: &[Claim], open: &[usize], resource: usize, left: u64) -> Option<u64> {
    let mut asked: Vec<u32> =
        open.iter().map(|&at| claims[at].shares.0[resource]).filter(|&share| share > 0).collect();
    let sum: u64 = asked.iter().map(|&share| u64::from(share)).sum();
    if sum * FULL <= left {
        return None;
    }
    asked.sort_unstable();
    let mut left = left;
    let mut others = asked.len() as u64;
    for share in asked {
        let wanted = u64::from(share) * FULL;
        if wanted > left / others {
            return Some(left / others);
        }
        left -= wanted;
        others -= 1;
    }
    None
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn claim(shares: Shares) -> Claim {
        Claim { shares, rate: None }
    }

    fn of(claims: &[Claim]) -> Vec<f64> {
        let mut out = Vec::new();
        rates(claims, &mut out);
        out.iter().map(|&rate| rate as f64 / FULL as f64).collect()
    }

    fn shares(parts: [f64; RESOURCES]) -> Shares {
        let with = |s: Shares, (resource, part): (Resource, f64)| s.with(resource, part);
        Resource::ALL.into_iter().zip(parts).fold(Shares::NONE, with)
    }

    #[test]
    fn equals_halve_and_who_asks_for_little_gets_it() {
        let all = claim(shares([0.0, 1.0, 0.0, 0.0, 0.0]));
        let some = claim(shares([0.0, 0.25, 0.0, 1.0, 0.0]));
        assert_eq!(of(&[all]), [1.0]);
        assert_eq!(of(&[all, all]), [0.5, 0.5]);
        assert_eq!(of(&[all, some]), [0.75, 1.0]);
        assert_eq!(of(&[some, all, all]), [1.0, 0.375, 0.375]);
    }

    #[test]
    fn what_the_slow_leave_goes_to_the_others() {
        // The first is held to a half by the third at resource 0, so that the second gets the rest of
        // resource 1: 1 - 0.6 / 2.
        let first = claim(shares([1.0, 0.6, 0.0, 0.0, 0.0]));
        let second = claim(shares([0.0, 1.0, 0.0, 0.0, 0.0]));
        let third = claim(shares([1.0, 0.0, 0.0, 0.0, 0.0]));
        let got = of(&[first, second, third]);
        assert!((got[0] - 0.5).abs() < 1e-4 && (got[2] - 0.5).abs() < 1e-4, "{got:?}");
        assert!((got[1] - 0.7).abs() < 1e-4, "{got:?}");
        // A rate that others decided is taken as it is.
        let held = Claim { rate: Some(FULL / 4), ..first };
        let got = of(&[held, second]);
        assert!((got[0] - 0.25).abs() < 1e-4 && (got[1] - 0.85).abs() < 1e-4, "{got:?}");
    }

    proptest! {
        #[test]
        fn no_resource_is_overdrawn_and_nobody_could_go_faster(
            asked in prop::collection::vec(prop::array::uniform5(0u32..=WHOLE), 1..6)
        ) {
            let claims: Vec<Claim> = asked.iter().map(|&shares| claim(Shares(shares))).collect();
            let mut got = Vec::new();
            rates(&claims, &mut got);
            let used = |resource: usize| -> u64 {
                claims.iter().zip(&got).map(|(c, &r)| u64::from(c.shares.0[resource]) * r).sum()
            };
            let whole = u64::from(WHOLE) * FULL;
            for resource in 0..RESOURCES {
                prop_assert!(used(resource) <= whole);
            }
            for (claim, &rate) in claims.iter().zip(&got) {
                prop_assert!((1..=FULL).contains(&rate));
                // Slower than alone only by a resource of which all ask for too much together. (Others that
                // something else slows later on may leave a little of it.)
                let too_much = (0..RESOURCES).any(|resource| {
                    let asked: u64 = claims.iter().map(|c| u64::from(c.shares.0[resource])).sum();
                    claim.shares.0[resource] > 0 && asked > u64::from(WHOLE)
                });
                prop_assert!(rate == FULL || too_much);
            }
            // And where one resource alone is short, none of it is left, to the rounding of a rate.
            let short: Vec<usize> = (0..RESOURCES)
                .filter(|&r| claims.iter().map(|c| u64::from(c.shares.0[r])).sum::<u64>() > u64::from(WHOLE))
                .collect();
            if let [resource] = short[..] {
                prop_assert!(whole - used(resource) <= 8 * u64::from(WHOLE));
            }
        }
    }
}
