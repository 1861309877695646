//! What commands of lists have in common: an op, and what follows from it.
//!
//! The ranks of a tensor group run the same ops at the same shapes under the same names. One copy for
//! all of them stays in a cache; of copies of their own, none would.

use super::work::{Halt, compute};
use crate::cost::Cost;
use crate::kernels::Arg;
use crate::memory::{self, Extent, SimTensor};
use crate::system::Shared;
use hal::op::AttentionWork;
use hal::{Label, Op, OpKind, TensorDesc};
use parking_lot::Mutex;
use std::collections::HashMap;
use std::hash::{DefaultHasher, Hash, Hasher};
use std::sync::{Arc, OnceLock, Weak};

/// An op that runs again and again, wherever its operands lie.
#[derive(Debug)]
pub(crate) struct Recipe {
    args: Op<Arg>,
    desc: Op<TensorDesc>,
    pub(crate) label: Label,
    /// Where neither values nor the launch have a say in it.
    cost: OnceLock<Cost>,
}

impl Recipe {
    pub(crate) fn kind(&self) -> OpKind {
        self.desc.kind()
    }

    /// What a run costs, unless it said so itself.
    pub(crate) fn usual_cost(&self) -> &Cost {
        self.cost.get().unwrap_or(&Cost::NOTHING)
    }

    /// Runs it over these operands, with this amount of work if it is attention. Says what it cost
    /// if that is not as usual.
    pub(super) fn run(
        &self,
        operands: &[Extent],
        attention: Option<AttentionWork>,
        system: &Shared,
    ) -> Result<Option<Cost>, Halt> {
        let routing = system.values(|| compute(&self.args, operands, system))?;
        if !system.mode.timed() {
            return Ok(None);
        }
        let cost = &system.cost;
        Ok(match (attention, routing) {
            (None, None) => {
                self.cost.get_or_init(|| cost.op(&self.desc, None));
                None
            }
            (None, routing) => Some(cost.op(&self.desc, routing)),
            (Some(work), routing) => {
                let mut desc = self.desc.clone();
                match &mut desc {
                    Op::MlaPrefill(op) => op.work = work,
                    Op::MlaDecode(op) => op.work = work,
                    _ => {}
                }
                Some(cost.op(&desc, routing))
            }
        })
    }
}

/// The recipes of a system that are in use.
#[derive(Debug, Default)]
pub(crate) struct Recipes(Mutex<HashMap<u64, Vec<Weak<Recipe>>>>);

impl Recipes {
    /// The recipe of an op under a name.
    pub(super) fn get(&self, op: &Op<SimTensor>, label: &Label) -> Arc<Recipe> {
        let desc = op.desc();
        let mut known = self.0.lock();
        let alike = known.entry(hash(&desc, label)).or_default();
        let same =
            |recipe: &Arc<Recipe>| recipe.desc == desc && recipe.label.as_str() == label.as_str();
        if let Some(recipe) = alike.iter().filter_map(Weak::upgrade).find(same) {
            return recipe;
        }
        alike.retain(|recipe| recipe.strong_count() > 0);
        let (label, cost) = (label.clone(), OnceLock::new());
        let recipe = Arc::new(Recipe { args: memory::args(op), desc, label, cost });
        alike.push(Arc::downgrade(&recipe));
        // As many that nobody has any more as there are others, at most.
        if known.len() == known.capacity() {
            known.retain(|_, alike| alike.iter().any(|recipe| recipe.strong_count() > 0));
        }
        recipe
    }
}

/// Equal for equal ops under equal names. Attributes have no part in it: they hardly differ where all
/// else is equal.
fn hash(desc: &Op<TensorDesc>, label: &Label) -> u64 {
    let mut hasher = DefaultHasher::new();
    (desc.kind(), label.as_str()).hash(&mut hasher);
    desc.visit(|_, _, operand| operand.hash(&mut hasher));
    hasher.finish()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::memory::Memory;
    use hal::op::Add;
    use hal::{DType, DeviceId};

    fn add(columns: usize) -> Op<SimTensor> {
        let desc = TensorDesc::new(DType::F32, &[2, columns]);
        let tensor = || SimTensor {
            memory: Arc::new(Memory::new(DeviceId(0), desc.bytes(), false).unwrap()),
            offset: 0,
            desc,
        };
        Add { a: tensor(), b: tensor(), out: tensor() }.into()
    }

    #[test]
    fn equal_ops_under_one_name_share_a_recipe() {
        let (recipes, label) = (Recipes::default(), Label::from("residual"));
        let first = recipes.get(&add(8), &label);
        assert!(Arc::ptr_eq(&first, &recipes.get(&add(8), &Label::from("residual".to_string()))));
        assert!(!Arc::ptr_eq(&first, &recipes.get(&add(16), &label)));
        assert!(!Arc::ptr_eq(&first, &recipes.get(&add(8), &Label::from("sum"))));
    }

    #[test]
    fn recipes_that_nobody_has_are_forgotten() {
        let (recipes, label) = (Recipes::default(), Label::from("residual"));
        for columns in 1..1000 {
            recipes.get(&add(columns), &label);
        }
        assert!(recipes.0.lock().len() < 100, "{}", recipes.0.lock().len());
    }
}
