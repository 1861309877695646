//! Flows that share links fairly.
//!
//! Max-min fairness by progressive filling (Bertsekas and Gallager, Data Networks, 1992, section
//! 6.5.2): all rates grow together; the port that fills first fixes its flows, and the others grow
//! on. When a flow ends, the rest share anew.

/// Bytes from somewhere to somewhere, through ports.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Flow {
    /// Ports it passes, by number.
    pub(crate) ports: [usize; 2],
    /// Bytes left.
    pub(crate) bytes: f64,
}

/// Seconds until all flows have ended, all starting at once. `capacity` is bytes per second of each
/// port.
pub(crate) fn completion(mut flows: Vec<Flow>, capacity: &[f64]) -> f64 {
    let mut now = 0.0;
    flows.retain(|f| f.bytes > 0.0);
    while !flows.is_empty() {
        let rates = fair_rates(&flows, capacity);
        let next = flows.iter().zip(&rates).map(|(f, r)| f.bytes / r).fold(f64::INFINITY, f64::min);
        now += next;
        let mut rate = rates.iter();
        flows.retain_mut(|flow| {
            let moved = rate.next().map_or(0.0, |r| r * next);
            let ended = flow.bytes - moved <= flow.bytes * 1e-9;
            flow.bytes -= moved;
            !ended
        });
    }
    now
}

/// The max-min fair rate of each flow.
pub(crate) fn fair_rates(flows: &[Flow], capacity: &[f64]) -> Vec<f64> {
    let mut rates = vec![0.0; flows.len()];
    let mut fixed = vec![false; flows.len()];
    let mut left: Vec<f64> = capacity.to_vec();
    let mut open = flows.len();
    while open > 0 {
        let mut users = vec![0u32; capacity.len()];
        for (flow, _) in flows.iter().zip(&fixed).filter(|(_, fixed)| !**fixed) {
            for &port in &flow.ports {
                users[port] += 1;
            }
        }
        let share = |port: usize| left[port] / f64::from(users[port]);
        let used = (0..capacity.len()).filter(|&p| users[p] > 0);
        let least = used.map(share).fold(f64::INFINITY, f64::min);
        let full: Vec<bool> =
            (0..capacity.len()).map(|p| users[p] > 0 && share(p) <= least * (1.0 + 1e-9)).collect();
        for (i, flow) in flows.iter().enumerate() {
            if fixed[i] || !flow.ports.iter().any(|&p| full[p]) {
                continue;
            }
            (rates[i], fixed[i]) = (least, true);
            open -= 1;
            for &port in &flow.ports {
                left[port] = (left[port] - least).max(0.0);
            }
        }
    }
    rates
}

#[cfg(test)]
mod tests {
    use super::*;

    fn flow(a: usize, b: usize, bytes: f64) -> Flow {
        Flow { ports: [a, b], bytes }
    }

    #[test]
    fn the_textbook_example() {
        // Two flows share port 0; one of them and a third share port 1, which is wider.
        let flows = [flow(0, 2, 1.0), flow(0, 1, 1.0), flow(1, 3, 1.0)];
        let rates = fair_rates(&flows, &[1.0, 2.0, 9.0, 9.0]);
        assert_eq!(rates, [0.5, 0.5, 1.5]);
    }

    #[test]
    fn what_a_flow_leaves_goes_to_the_others() {
        // Equal shares until the short one ends at 2 s; then the long one has the port alone.
        let flows = vec![flow(0, 1, 1.0), flow(0, 2, 3.0)];
        let seconds = completion(flows, &[1.0, 9.0, 9.0]);
        assert!((seconds - 4.0).abs() < 1e-6, "{seconds}");
        assert_eq!(completion(vec![flow(0, 1, 0.0)], &[1.0, 1.0]), 0.0);
    }
}
