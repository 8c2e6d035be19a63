//! Rows become the steps of an epoch, and the rows of a step become the micro-batches of each rank.
//!
//! Integers only. A *row* is a pack (or a single sample when not packed); rows come in shuffled order from
//! [`crate::pack`]. A *step* is the set of rows of one global batch. Which rows form step `k` depends on row costs,
//! rows per step, seed and epoch, never on the number of ranks; only [`assign`] knows ranks. So a run may go on with
//! another number of ranks and see the same samples in the same steps.
//!
//! A step lasts as long as its slowest rank, and attention makes full packs differ in cost. So rows of near-equal cost
//! are put into one step: the rows of a window of some 64 steps are sorted by cost, cut into steps, and the steps
//! shuffled. A row strays from its random place by no more than its window, and the order of steps tells nothing of
//! cost.

use std::cmp::Reverse;
use std::num::{NonZeroU64, NonZeroUsize};

use crate::random::{Purpose, Random};

/// Least number of steps among which rows are sorted by cost, unless the epoch has fewer.
const WINDOW_STEPS: usize = 64;

/// What a sample of `L` tokens costs: `linear · L + quadratic · L²`, in any unit.
///
/// For a decoder in FLOPs, forward: `linear` = 2 · parameters and `quadratic` = 2 · hidden size · layers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct CostModel {
    /// Cost of a token by itself.
    pub linear: u64,
    /// Cost of a token and one that it may attend to.
    pub quadratic: u64,
}

impl CostModel {
    /// What to plan with when the plan must not depend on the model: attention costs as much as all else at 20,000
    /// tokens. Decoders have 8,000 (0.6B) to 61,000 (8B), and full packs come in nearly the same order of cost for all.
    pub const REFERENCE: CostModel = CostModel { linear: 20_000, quadratic: 1 };
}

/// The cost of a row that holds samples of these lengths (tokens); stays at [`u64::MAX`] if it would exceed it.
pub fn row_cost(lengths: impl IntoIterator<Item = u32>, model: CostModel) -> u64 {
    lengths.into_iter().map(u64::from).fold(0, |cost, length| {
        let per_token = model.quadratic.saturating_mul(length).saturating_add(model.linear);
        per_token.saturating_mul(length).saturating_add(cost)
    })
}

/// The steps of one epoch, each a set of row numbers. Every row is in exactly one step; all steps have the same
/// number of rows but the last, which has what is left.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct StepPlanner {
    rows: Vec<u32>,
    num_rows_per_step: usize,
}

impl StepPlanner {
    /// Plans an epoch over rows numbered as in `row_costs` (any unit, at most [`u32::MAX`] rows).
    pub fn new(row_costs: &[u64], num_rows_per_step: NonZeroUsize, seed: u64, epoch: u64) -> StepPlanner {
        let num_rows_per_step = num_rows_per_step.get();
        let num_steps = row_costs.len().div_ceil(num_rows_per_step);
        // Windows of equal size, 64 to 127 steps, so that no short one at the end is badly balanced.
        let num_windows = (num_steps / WINDOW_STEPS).max(1);
        let start = |window: usize| row_costs.len().min(num_steps * window / num_windows * num_rows_per_step);

        let mut random = Random::new(seed, epoch, Purpose::Steps);
        let mut rows = Vec::with_capacity(row_costs.len());
        for window in 0..num_windows {
            let mut sorted: Vec<u32> = (start(window) as u32..start(window + 1) as u32).collect();
            sorted.sort_unstable_by_key(|&row| (row_costs[row as usize], row));
            // The short step goes last, but may have any cost: it is cut out at a random place.
            let num_short = sorted.len() % num_rows_per_step;
            let place = random.below(sorted.len() / num_rows_per_step + 1) * num_rows_per_step;
            let (cheaper, rest) = sorted.split_at(place);
            let (short, dearer) = rest.split_at(num_short);
            let mut steps: Vec<&[u32]> =
                cheaper.chunks(num_rows_per_step).chain(dearer.chunks(num_rows_per_step)).collect();
            random.shuffle(&mut steps);
            rows.extend(steps.into_iter().flatten());
            rows.extend(short);
        }
        StepPlanner { rows, num_rows_per_step }
    }

    /// Number of steps of the epoch; the same for every seed and epoch.
    pub fn num_steps(&self) -> usize {
        self.rows.len().div_ceil(self.num_rows_per_step)
    }

    /// The row numbers of a step, never none.
    ///
    /// # Panics
    /// If `step >= self.num_steps()`.
    pub fn step(&self, step: usize) -> &[u32] {
        let start = step * self.num_rows_per_step;
        &self.rows[start..self.rows.len().min(start + self.num_rows_per_step)]
    }

    /// The steps in order.
    pub fn steps(&self) -> impl ExactSizeIterator<Item = &[u32]> {
        self.rows.chunks(self.num_rows_per_step)
    }
}

/// Deals the rows of a step to ranks: `result[rank][micro_batch]` is a list of row numbers.
///
/// Ranks have equal cost as nearly as one pass finds, numbers of rows that differ by at most one, and the same number
/// of micro-batches, which is the least possible. A micro-batch has `rows_per_micro_batch` rows, except that the last
/// ones of a rank have fewer, or none, when rows run out. Micro-batches of a rank fall in cost, so ranks that wait for
/// each other after every micro-batch wait little, and rows padded to one width are of similar length.
pub fn assign(
    rows: &[u32],
    row_costs: &[u64],
    world_size: NonZeroUsize,
    rows_per_micro_batch: NonZeroUsize,
) -> Vec<Vec<Vec<u32>>> {
    let (world_size, rows_per_micro_batch) = (world_size.get(), rows_per_micro_batch.get());
    let num_micro_batches = rows.len().div_ceil(world_size).div_ceil(rows_per_micro_batch);
    balanced_ranks(rows, row_costs, world_size)
        .into_iter()
        .map(|rank| {
            let mut micro_batches: Vec<Vec<u32>> = rank.chunks(rows_per_micro_batch).map(<[u32]>::to_vec).collect();
            micro_batches.resize(num_micro_batches, Vec::new());
            micro_batches
        })
        .collect()
}

/// Longest processing time first, in rounds: of the next `world_size` rows the dearest goes to the rank with the least
/// cost so far, and so on. A round keeps the numbers of rows equal, and two ranks never differ by more than the dearest
/// row costs.
fn balanced_ranks(rows: &[u32], row_costs: &[u64], world_size: usize) -> Vec<Vec<u32>> {
    let mut rows = rows.to_vec();
    rows.sort_unstable_by_key(|&row| (Reverse(row_costs[row as usize]), row));
    let mut ranks = vec![Vec::new(); world_size];
    let mut costs = vec![0_u128; world_size];
    let mut by_cost: Vec<usize> = (0..world_size).collect();
    for round in rows.chunks(world_size) {
        by_cost.sort_unstable_by_key(|&rank| (costs[rank], rank));
        for (&row, &rank) in round.iter().zip(&by_cost) {
            ranks[rank].push(row);
            costs[rank] += u128::from(row_costs[row as usize]);
        }
    }
    ranks
}

/// How long steps wait for their slowest rank: the mean over steps of (dearest rank ÷ mean rank - 1), 0 at best.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Imbalance {
    /// Rows in the order they come, dealt out in turn.
    pub before: f64,
    /// Rows as planned and assigned.
    pub after: f64,
}

/// What planning and assigning gain on `world_size` ranks. `row_costs` may be another model's than the plan's.
pub fn imbalance(planner: &StepPlanner, row_costs: &[u64], world_size: NonZeroUsize) -> Imbalance {
    let world_size = world_size.get();
    let cost = |rank: &mut dyn Iterator<Item = &u32>| rank.map(|&row| u128::from(row_costs[row as usize])).sum();
    let mean = |step_imbalances: &mut dyn Iterator<Item = f64>| {
        step_imbalances.sum::<f64>() / planner.num_steps().max(1) as f64
    };
    let in_order: Vec<u32> = (0..planner.rows.len() as u32).collect();
    Imbalance {
        before: mean(&mut in_order.chunks(planner.num_rows_per_step).map(|step| {
            step_imbalance((0..world_size).map(|rank| cost(&mut step.iter().skip(rank).step_by(world_size))))
        })),
        after: mean(&mut planner.steps().map(|step| {
            let ranks = balanced_ranks(step, row_costs, world_size);
            step_imbalance(ranks.iter().map(|rank| cost(&mut rank.iter())))
        })),
    }
}

/// Dearest rank ÷ mean rank - 1; 0 when nothing costs anything.
fn step_imbalance(rank_costs: impl ExactSizeIterator<Item = u128>) -> f64 {
    let num_ranks = rank_costs.len() as u128;
    let (sum, max) = rank_costs.fold((0, 0), |(sum, max), cost: u128| (sum + cost, cost.max(max)));
    if sum == 0 { 0.0 } else { (max * num_ranks - sum) as f64 / sum as f64 }
}

/// The epoch of a global step, and its step in that epoch; all count from 0.
pub fn locate(step: u64, num_steps_per_epoch: NonZeroU64) -> (u64, u64) {
    (step / num_steps_per_epoch, step % num_steps_per_epoch)
}

/// Steps of a whole run: `max_steps` if given, else `num_epochs` epochs, a part of a step counting as one.
///
/// `num_epochs` counts to a millionth, so that 1.1 epochs of 10 steps are 11 steps, which floating point would make 12.
/// It gives no steps if it is not a positive number.
pub fn total_steps(num_steps_per_epoch: u64, num_epochs: f64, max_steps: Option<u64>) -> u64 {
    const MILLION: u128 = 1_000_000;
    max_steps.unwrap_or_else(|| {
        let millionths = (num_epochs * MILLION as f64).round() as u64; // saturates; not a number gives 0
        let steps = (u128::from(num_steps_per_epoch) * u128::from(millionths)).div_ceil(MILLION);
        u64::try_from(steps).unwrap_or(u64::MAX)
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::collection::vec;
    use proptest::prelude::*;

    const MODEL: CostModel = CostModel { linear: 10, quadratic: 3 };

    fn size(number: usize) -> NonZeroUsize {
        NonZeroUsize::new(number).unwrap()
    }

    fn sorted(rows: impl IntoIterator<Item = u32>) -> Vec<u32> {
        let mut rows: Vec<u32> = rows.into_iter().collect();
        rows.sort_unstable();
        rows
    }

    /// Costs of rows as they come out of a shuffle: many distinct ones.
    fn scattered_costs(num_rows: u64) -> Vec<u64> {
        let mut random = Random::new(1, 2, Purpose::Samples);
        (0..num_rows).map(|_| 1_000 + random.below(9_000) as u64).collect()
    }

    proptest! {
        /// Each row is in exactly one step, and only the last step is smaller.
        #[test]
        fn steps_partition_the_rows(costs in vec(0_u64..50, 0..2_000), per_step in 1_usize..20, seed: u64, epoch: u64) {
            let planner = StepPlanner::new(&costs, size(per_step), seed, epoch);
            prop_assert_eq!(sorted(planner.steps().flatten().copied()), (0..costs.len() as u32).collect::<Vec<_>>());
            prop_assert_eq!(planner.steps().len(), planner.num_steps());
            for (number, step) in planner.steps().enumerate() {
                prop_assert_eq!(step, planner.step(number));
                prop_assert!(step.len() == per_step || number + 1 == planner.num_steps() && !step.is_empty());
            }
        }

        /// A row is planned within its window, so a plan never depends on rows far away.
        #[test]
        fn rows_stay_in_their_window(per_step in 1_usize..5, num_rows in 0_u64..3_000, seed: u64) {
            let planner = StepPlanner::new(&scattered_costs(num_rows), size(per_step), seed, 0);
            for (place, &row) in planner.rows.iter().enumerate() {
                prop_assert!((row as usize).abs_diff(place) < (2 * WINDOW_STEPS) * per_step);
            }
        }

        /// Every row of a step goes to one rank, all ranks get the same, least, number of micro-batches, rows are spread
        /// evenly, and micro-batches are full until a rank's rows run out.
        #[test]
        fn assignment_partitions_a_step(
            costs in vec(0_u64..1_000, 0..60), world_size in 1_usize..9, per_micro_batch in 1_usize..5,
        ) {
            let rows: Vec<u32> = (0..costs.len() as u32).rev().collect();
            let ranks = assign(&rows, &costs, size(world_size), size(per_micro_batch));
            prop_assert_eq!(sorted(ranks.iter().flatten().flatten().copied()), sorted(rows.iter().copied()));
            prop_assert_eq!(ranks.len(), world_size);
            let num_micro_batches = costs.len().div_ceil(world_size * per_micro_batch);
            for rank in &ranks {
                prop_assert_eq!(rank.len(), num_micro_batches);
                let num_rows: usize = rank.iter().map(Vec::len).sum();
                prop_assert!(num_rows == costs.len() / world_size || num_rows == costs.len().div_ceil(world_size));
                for (number, micro_batch) in rank.iter().enumerate() {
                    let expected = num_rows.saturating_sub(number * per_micro_batch).min(per_micro_batch);
                    prop_assert_eq!(micro_batch.len(), expected);
                }
            }
        }

        /// Ranks differ in cost by no more than the dearest row, whatever the order in which rows are given.
        #[test]
        fn assignment_balances(costs in vec(0_u64..1_000, 1..60), world_size in 1_usize..9) {
            let rows: Vec<u32> = (0..costs.len() as u32).collect();
            let reversed: Vec<u32> = rows.iter().rev().copied().collect();
            let ranks = balanced_ranks(&rows, &costs, world_size);
            prop_assert_eq!(&ranks, &balanced_ranks(&reversed, &costs, world_size));
            let totals = ranks.iter().map(|rank| rank.iter().map(|&row| costs[row as usize]).sum::<u64>());
            let (min, max) = totals.fold((u64::MAX, 0), |(min, max), total| (min.min(total), max.max(total)));
            prop_assert!(max - min <= *costs.iter().max().unwrap());
        }

        /// A row costs what its samples cost one by one.
        #[test]
        fn costs_add_up(lengths in vec(1_u32..100_000, 0..20)) {
            let sum = lengths.iter().map(|&length| u64::from(length)).map(|length| 10 * length + 3 * length * length).sum::<u64>();
            prop_assert_eq!(row_cost(lengths, MODEL), sum);
        }
    }

    /// The same arguments give the same steps; another seed or epoch gives others.
    #[test]
    fn seed_and_epoch_decide_the_order() {
        let costs = scattered_costs(1_000);
        let plan = |seed, epoch| StepPlanner::new(&costs, size(4), seed, epoch);
        assert_eq!(plan(42, 0), plan(42, 0));
        assert!([(42, 1), (43, 0), (0, 42)].iter().all(|&(seed, epoch)| plan(seed, epoch) != plan(42, 0)));
    }

    /// A plan made today is the plan made on any machine and by any later version: these steps are pinned.
    #[test]
    fn steps_of_a_seed_never_change() {
        let planner = StepPlanner::new(&[5, 1, 4, 1, 5, 9, 2, 6, 5, 3, 5], size(2), 42, 3);
        assert_eq!(planner.rows, [6, 9, 2, 0, 4, 8, 7, 5, 1, 3, 10]);
        assert_eq!(assign(&[5, 2, 7, 0], &[5, 1, 4, 1, 5, 9, 2, 6], size(2), size(1)), [[[5], [2]], [[7], [0]]]);
    }

    /// The last, smaller step is neither always the cheapest nor always the dearest.
    #[test]
    fn the_last_step_has_any_cost() {
        let costs: Vec<u64> = (0..41).collect();
        let mut firsts: Vec<u32> =
            (0..200).map(|epoch| StepPlanner::new(&costs, size(4), 42, epoch).step(10)[0]).collect();
        firsts.sort_unstable();
        firsts.dedup();
        assert_eq!(firsts, (0..=40).step_by(4).collect::<Vec<u32>>());
    }

    /// Planning brings rows of spread costs to near balance, and the report says so.
    #[test]
    fn planning_balances_ranks() {
        let costs = scattered_costs(6_400);
        let planner = StepPlanner::new(&costs, size(8), 42, 0);
        let imbalance = imbalance(&planner, &costs, size(8));
        assert!(imbalance.before > 0.5 && imbalance.after < 0.02, "{imbalance:?}");
    }

    /// The report measures the dearest rank against the mean rank, over all steps.
    #[test]
    fn imbalance_is_the_mean_over_steps() {
        // In order: ranks cost (1, 3) and (1, 3), a half too much. As planned: (1, 1) and (3, 3).
        let planner = StepPlanner::new(&[1, 3, 1, 3], size(2), 42, 0);
        let expected = Imbalance { before: 0.5, after: 0.0 };
        assert_eq!(imbalance(&planner, &[1, 3, 1, 3], size(2)), expected);
        // One rank waits for nobody, and free rows keep nobody waiting.
        assert_eq!(imbalance(&planner, &[1, 3, 1, 3], size(1)), Imbalance { before: 0.0, after: 0.0 });
        assert_eq!(imbalance(&planner, &[0; 4], size(2)), Imbalance { before: 0.0, after: 0.0 });
    }

    /// Costs beyond 64 bits stay at the top instead of wrapping round, and sums of such costs do not overflow.
    #[test]
    fn huge_costs_saturate() {
        let huge = CostModel { linear: u64::MAX, quadratic: u64::MAX };
        assert_eq!(row_cost([u32::MAX, 1], huge), u64::MAX);
        let ranks = balanced_ranks(&[0, 1, 2, 3], &[u64::MAX; 4], 2);
        assert!(ranks.iter().all(|rank| rank.len() == 2));
    }

    /// Global steps count through epochs without a gap.
    #[test]
    fn steps_are_located() {
        let located: Vec<(u64, u64)> = (0..5).map(|step| locate(step, NonZeroU64::new(2).unwrap())).collect();
        assert_eq!(located, [(0, 0), (0, 1), (1, 0), (1, 1), (2, 0)]);
    }

    /// Epochs round up to whole steps, decimal fractions are exact, and a maximum overrides them.
    #[test]
    fn total_steps_round_up() {
        let cases =
            [(10, 1.1, 11), (10, 1.01, 11), (3, 0.1, 1), (7, 3.0, 21), (10, 0.3, 3), (1_000_000, 2.9, 2_900_000)];
        for (per_epoch, num_epochs, expected) in cases {
            assert_eq!(total_steps(per_epoch, num_epochs, None), expected, "{num_epochs} epochs of {per_epoch}");
        }
        assert_eq!(total_steps(10, 3.0, Some(4)), 4);
        assert_eq!([0.0, -1.0, f64::NAN].map(|num_epochs| total_steps(10, num_epochs, None)), [0; 3]);
        assert_eq!(total_steps(u64::MAX, f64::INFINITY, None), u64::MAX);
    }
}
