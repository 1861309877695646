use super::*;
use crate::cost::Cost;
use proptest::prelude::*;

fn cost(picos: u64, shares: Shares) -> Cost {
    Cost { picos, shares, ..Cost::NOTHING }
}

fn memory(picos: u64, part: f64) -> Step {
    Step::Run(cost(picos, Shares::NONE.with(Resource::Memory, part)))
}

/// Plays, and answers start and end of each command, stream by stream.
fn played(timeline: &mut Timeline) -> Vec<Vec<(u64, u64)>> {
    timeline.play();
    let mut times: Vec<Vec<(u64, u64)>> = Vec::new();
    for done in timeline.take_done() {
        let stream = done.stream.0 as usize;
        times.resize(times.len().max(stream + 1), Vec::new());
        times[stream].push((done.start, done.end));
        assert_eq!(times[stream].len() as u64, done.value, "commands end in order");
        assert!(done.ready <= done.start);
    }
    times
}

#[test]
fn a_command_starts_after_its_stream_its_wait_and_the_host() {
    let mut timeline = Timeline::new(1);
    let (a, b) = (timeline.stream(0), timeline.stream(0));
    timeline.push(a, 5, 0, memory(10, 0.1));
    timeline.push(a, 0, 3, memory(10, 0.1));
    timeline.push(b, 0, 0, Step::Wait { stream: a, value: 1 });
    timeline.push(b, 40, 0, memory(1, 0.1));
    let times = played(&mut timeline);
    assert_eq!(times[0], [(5, 15), (15, 28)], "a delay lengthens");
    assert_eq!(times[1], [(15, 15), (40, 41)]);
    assert_eq!(
        (timeline.end(a, 1), timeline.end(a, 2), timeline.end(a, 3)),
        (Some(15), Some(28), None)
    );
}

#[test]
fn what_runs_at_the_same_time_shares_the_die() {
    let mut timeline = Timeline::new(2);
    let (a, b, elsewhere) = (timeline.stream(0), timeline.stream(0), timeline.stream(1));
    timeline.push(a, 0, 0, memory(100, 1.0));
    timeline.push(b, 0, 0, memory(50, 1.0));
    timeline.push(elsewhere, 0, 0, memory(100, 1.0));
    let times = played(&mut timeline);
    // Halves until the short one is done at 100; then the long one has 50 left for itself.
    assert_eq!((times[0][0].1, times[1][0].1), (150, 100));
    assert_eq!(times[2][0].1, 100, "another die is another die");
}

#[test]
fn a_collective_goes_as_fast_as_its_slowest_die_and_leaves_the_rest() {
    let mut timeline = Timeline::new(2);
    let streams: Vec<_> = (0..2).map(|die| timeline.stream(die)).collect();
    let busy = timeline.stream(1);
    let whole = cost(100, Shares::NONE.with(Resource::Memory, 1.0));
    for &stream in &streams {
        timeline.push(stream, 0, 0, Step::Meet { key: ([0, 0], 0), size: 2, cost: whole });
    }
    // Half the memory of die 1 is taken, so that the collective needs twice as long there and so on both.
    timeline.push(busy, 0, 0, memory(1000, 1.0));
    // Die 0 has the other half free for what comes meanwhile.
    let spare = timeline.stream(0);
    timeline.push(spare, 0, 0, memory(60, 0.5));
    let times = played(&mut timeline);
    assert_eq!(times[0][0], (0, 200));
    assert_eq!(times[1][0], (0, 200));
    assert_eq!(times[3][0], (0, 60), "what the collective cannot use is not lost");
    assert_eq!(times[2][0], (0, 1100));
}

#[test]
fn the_last_rank_decides_when_a_collective_begins() {
    let mut timeline = Timeline::new(3);
    let streams: Vec<_> = (0..3).map(|die| timeline.stream(die)).collect();
    for (at, &stream) in streams.iter().enumerate() {
        timeline.push(stream, 10 * at as u64, 0, memory(7, 0.5));
        let cost = cost(5, Shares::NONE);
        timeline.push(stream, 0, 0, Step::Meet { key: ([1, 2], 3), size: 3, cost });
    }
    for times in played(&mut timeline) {
        assert_eq!(times[1], (27, 32));
    }
}

#[test]
fn sends_begin_when_both_sides_are_there() {
    let mut timeline = Timeline::new(2);
    let (a, b) = (timeline.stream(0), timeline.stream(1));
    let pair = |n| (([0, 0], 0, 1, n), 10);
    timeline.push(a, 0, 0, Step::Pairs { pairs: vec![pair(1), pair(2)] });
    timeline.push(b, 4, 0, Step::Pairs { pairs: vec![pair(1)] });
    timeline.push(b, 0, 0, Step::Pairs { pairs: vec![pair(2)] });
    let times = played(&mut timeline);
    assert_eq!(times[1], [(4, 14), (14, 24)]);
    assert_eq!(times[0], [(4, 24)], "a batch ends with its last transfer");
}

#[test]
fn ranks_that_never_come_are_given_up() {
    let mut timeline = Timeline::new(2);
    let (a, b) = (timeline.stream(0), timeline.stream(1));
    let meet = Step::Meet { key: ([0, 0], 0), size: 2, cost: cost(9, Shares::NONE) };
    timeline.push(a, 1, 0, meet);
    timeline.push(b, 2, 0, Step::Pairs { pairs: vec![(([0, 0], 1, 0, 0), 3)] });
    timeline.push(b, 0, 0, Step::Wait { stream: a, value: 1 });
    assert!(!timeline.play_until(b, 2));
    assert!(timeline.give_up_on_others());
    assert!(timeline.play_until(b, 2));
    assert_eq!(
        (timeline.end(a, 1), timeline.end(b, 1), timeline.end(b, 2)),
        (Some(10), Some(5), Some(10))
    );
    assert!(!timeline.give_up_on_others());
}

/// A random program: for each die and lane, commands; waits and collectives only where they make sense.
#[derive(Clone, Debug)]
struct Random {
    dies: u32,
    /// Die, lane, picoseconds, shares, whether all dies meet here.
    commands: Vec<(u32, usize, u64, [f64; 3], bool)>,
}

fn random() -> impl Strategy<Value = Random> {
    let shares = prop::array::uniform3(0.0..=1.0f64);
    let command = (0u32..3, 0usize..2, 0u64..5000, shares, prop::bool::weighted(0.3));
    prop::collection::vec(command, 1..40).prop_map(|commands| Random { dies: 3, commands })
}

impl Random {
    fn costs(&self) -> impl Iterator<Item = (u32, usize, bool, Cost)> {
        self.commands.iter().map(|&(die, lane, picos, [compute, memory, link], meets)| {
            let shares = Shares::NONE
                .with(Resource::Compute, compute)
                .with(Resource::Memory, memory)
                .with(Resource::InHost, link);
            (die, lane, meets, cost(picos, shares))
        })
    }

    /// Ends of all commands, where every command is `scale` times as long and issued `later`, and
    /// streams are filled one after the other or all together.
    fn ends(&self, later: u64, together: bool) -> Vec<Vec<u64>> {
        let mut timeline = Timeline::new(self.dies as usize);
        let streams: Vec<StreamIndex> =
            (0..self.dies).flat_map(|die| [die, die]).map(|die| timeline.stream(die)).collect();
        let mut steps: Vec<Vec<Step>> = vec![Vec::new(); streams.len()];
        for (number, (die, lane, meets, cost)) in self.costs().enumerate() {
            if meets {
                let key = ([lane as u64, 0], number as u64);
                for die in 0..self.dies {
                    steps[2 * die as usize + lane].push(Step::Meet { key, size: self.dies, cost });
                }
            } else {
                steps[2 * die as usize + lane].push(Step::Run(cost));
            }
        }
        if together {
            let longest = steps.iter().map(Vec::len).max().unwrap_or(0);
            for at in 0..longest {
                for (stream, steps) in streams.iter().zip(&steps).rev() {
                    if let Some(step) = steps.get(at) {
                        timeline.push(*stream, later, 0, step.clone());
                    }
                }
            }
        } else {
            for (stream, steps) in streams.iter().zip(&steps) {
                for step in steps {
                    timeline.push(*stream, later, 0, step.clone());
                }
            }
        }
        timeline.play();
        let mut ends = vec![Vec::new(); streams.len()];
        for done in timeline.take_done() {
            ends[done.stream.0 as usize].push(done.end);
        }
        for (ends, steps) in ends.iter().zip(&steps) {
            assert_eq!(ends.len(), steps.len(), "everything ends");
        }
        ends
    }
}

proptest! {
    #[test]
    fn times_do_not_depend_on_when_or_in_which_order_commands_are_pushed(program in random()) {
        let ends = program.ends(0, false);
        prop_assert_eq!(&ends, &program.ends(0, true));
        // A shift of everything is a shift.
        let later = 123_456_789;
        let shifted = program.ends(later, false);
        for (ends, shifted) in ends.iter().zip(&shifted) {
            for (end, shifted) in ends.iter().zip(shifted) {
                prop_assert_eq!(end + later, *shifted);
            }
        }
    }

    #[test]
    fn no_die_does_more_than_it_can_and_nothing_is_slower_than_one_after_the_other(program in random()) {
        let ends = program.ends(0, false);
        let end = ends.iter().flatten().copied().max().unwrap_or(0);
        for die in 0..program.dies {
            for resource in Resource::ALL {
                let used: f64 = program
                    .costs()
                    .filter(|(d, _, meets, _)| *meets || *d == die)
                    .map(|(.., cost)| cost.picos as f64 * cost.shares.of(resource))
                    .sum();
                prop_assert!(used <= end as f64 * 1.001 + 50.0, "{die} {resource:?}: {used} in {end}");
            }
        }
        let all: u64 = program.costs().map(|(.., cost)| cost.picos).sum();
        // Rates are rounded down to a part in 2^32 of a command's own.
        prop_assert!(end as f64 <= all as f64 * 1.001 + 50.0, "{end} > {all}");
    }
}
