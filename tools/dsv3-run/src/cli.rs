//! The command line. Help texts are written here and nowhere else.

use clap::builder::TypedValueParser;
use clap::{Args, Parser, Subcommand, ValueEnum};
use hal::{DeviceId, Topology};
use model::Numerics;
use model::config::ModelConfig;
use model::plan::{ParallelOptions, ParallelPlan, PlanError};
use std::path::PathBuf;
use std::time::Duration;

/// Run, time and check DeepSeek-V3 on a VACC-style accelerator or on its simulator.
///
/// Without a command, generates text: with no flags at all, an answer of the built-in tiny model
/// on the simulated VA16 card, and how long the card would have taken.
#[derive(Debug, Parser)]
#[command(
    name = "dsv3-run",
    version,
    args_conflicts_with_subcommands = true,
    subcommand_negates_reqs = true,
    after_help = EXAMPLES,
    max_term_width = 100
)]
pub(crate) struct Cli {
    #[command(subcommand)]
    pub(crate) command: Option<Command>,
    #[command(flatten)]
    pub(crate) generate: GenerateArgs,
}

const EXAMPLES: &str = "\
Examples:
  dsv3-run --backend sim                                 the built-in model and question
  dsv3-run --chat \"What is 17 + 25?\"                     a chat turn
  dsv3-run --model DIR --prompt \"Once upon\" --max-tokens 64
  dsv3-run --machine h800 --numerics bf16 --json -       machine-readable, on another machine
  dsv3-run --backend vacc --vacc-runtime libvaccrt.so    through a card's runtime library
  dsv3-run logits --token-ids 0,1022,267 --out logits.safetensors
  dsv3-run --tensor-parallel-size 4 --trace t.json       what ran when, for ui.perfetto.dev
  dsv3-run --record run.hal                              write every device command to a file,
  dsv3-run replay run.hal --backend vacc                 and run it again elsewhere: a bug report
  dsv3-run plan --config deepseek-v3 --tensor-parallel-size 32
  dsv3-run checkpoint inspect DIR                        is this checkpoint complete?
  dsv3-run conformance --filter \"collectives/*\"         does the backend keep the contract?
  dsv3-run perf op --machine h800 gemm --m 64 --n 7168 --k 2048
  dsv3-run perf step --tensor-parallel-size 32           the true 671B: how long would a step take?

Exit status: 0 success, 1 the run failed (device, runtime), 2 unusable input.";

#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    /// Write the logits of every token of a sequence to a safetensors file.
    Logits(LogitsArgs),
    /// Answer a list of questions and count exact matches.
    Eval(EvalArgs),
    /// Run a recording again, without the model, and compare what comes back.
    Replay(ReplayArgs),
    /// Explain a parallel plan: who holds what, memory, collectives; or why it is impossible.
    #[command(after_help = PLAN)]
    Plan(PlanArgs),
    /// Look into checkpoints, or make one with random weights.
    Checkpoint {
        #[command(subcommand)]
        command: CheckpointCommand,
    },
    /// How fast it would be: an operation, a step of the model, many steps; and published
    /// measurements against these times.
    Perf {
        #[command(subcommand)]
        command: crate::perf::PerfCommand,
    },
    /// List the dies that a backend offers, and what is assumed about them.
    Devices(DevicesArgs),
    /// Run the conformance suite: does a backend do what the contract says?
    Conformance(ConformanceArgs),
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum Backend {
    /// The simulator: values and time, no hardware.
    Sim,
    /// A card's runtime library, through the C ABI of vacc.h.
    Vacc,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum Switch {
    On,
    Off,
}

/// Which machine to run on, and how.
#[derive(Args, Clone, Debug)]
pub(crate) struct SystemArgs {
    /// What runs the commands.
    #[arg(long, value_enum, default_value = "sim")]
    pub(crate) backend: Backend,
    /// Simulated machine: va16 (the default), h800, or the path of a machine file.
    #[arg(long, value_name = "NAME|FILE")]
    pub(crate) machine: Option<String>,
    /// Whether to simulate time besides values; on by default.
    #[arg(long, value_enum)]
    pub(crate) timing: Option<Switch>,
    /// With --backend vacc: the runtime library; else VACC_RUNTIME, else libvaccrt.so on the
    /// loader's path. VACC_VISIBLE_DEVICES ("0,1,5") chooses the dies.
    #[arg(long, value_name = "FILE")]
    pub(crate) vacc_runtime: Option<PathBuf>,
    /// With --backend vacc: the library's own settings.
    #[arg(long, value_name = "KEY=VALUE;...")]
    pub(crate) vacc_config: Option<String>,
    /// Check every command before the device sees it: shapes, lifetimes, hazards, leaks.
    #[arg(long)]
    pub(crate) validate: bool,
    /// Host threads of the simulator; one per processor by default. Never changes a result.
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u16).range(1..=1024))]
    pub(crate) threads: Option<u16>,
    /// Inject a fault, e.g. "op=linear,label=layer 2,nth=5,action=fail". May be repeated.
    #[arg(long, value_name = "RULE")]
    pub(crate) fault: Vec<hal::fault::FaultRule>,
}

/// Which model, in which numbers.
#[derive(Args, Clone, Debug)]
pub(crate) struct ModelArgs {
    /// Folder of a checkpoint in the released DeepSeek-V3 layout; the built-in tiny model if absent.
    #[arg(long, value_name = "DIR")]
    pub(crate) model: Option<PathBuf>,
    /// fp8: DeepSeek's recipe; bf16: dequantised weights; f32: for comparison with other programs.
    #[arg(long, default_value = "fp8", value_name = "fp8|bf16|f32")]
    pub(crate) numerics: Numerics,
    /// Longest sequence, prompt and output together; by default as much as the request needs.
    #[arg(long, value_name = "TOKENS")]
    pub(crate) max_model_len: Option<usize>,
    /// Most tokens that one prefill step takes; longer prompts go in pieces.
    #[arg(long, value_name = "TOKENS", default_value_t = 512)]
    pub(crate) prefill_chunk: usize,
    /// Longest time that a step may take on this host before it counts as hanging.
    #[arg(long, value_name = "SECONDS", default_value_t = 600, value_parser = clap::value_parser!(u64).range(1..=86_400))]
    pub(crate) step_timeout: u64,
    #[command(flatten)]
    pub(crate) parallel: ParallelArgs,
    #[command(flatten)]
    pub(crate) system: SystemArgs,
    #[command(flatten)]
    pub(crate) recording: RecordingArgs,
    #[command(flatten)]
    pub(crate) trace: TraceArgs,
}

impl ModelArgs {
    pub(crate) fn step_timeout(&self) -> Duration {
        Duration::from_secs(self.step_timeout)
    }
}

/// How the model is spread over dies; `dsv3-run plan` explains a choice.
#[derive(Args, Clone, Debug)]
pub(crate) struct ParallelArgs {
    /// Dies that share heads, MLP columns and the vocabulary.
    #[arg(long, value_name = "N", default_value_t = 1)]
    pub(crate) tensor_parallel_size: usize,
    /// Stages that share the layers.
    #[arg(long, value_name = "N", default_value_t = 1)]
    pub(crate) pipeline_parallel_size: usize,
    /// Tensor groups that share the sequences; alone, each is an instance of its own.
    #[arg(long, value_name = "N", default_value_t = 1)]
    pub(crate) data_parallel_size: usize,
    /// Spread the routed experts over all dies of a stage, and send tokens to them. Tensor groups
    /// then split tokens between their dies outside attention.
    #[arg(long)]
    pub(crate) expert_parallel: bool,
    /// Copies of experts beyond one each; by default the fewest that divide evenly.
    #[arg(long, value_name = "N")]
    pub(crate) redundant_experts: Option<usize>,
    /// What hides behind what: with two-batch, a step goes through the model in two halves, and
    /// one's collectives hide behind the other's computation.
    #[arg(long, value_enum, default_value = "none")]
    pub(crate) overlap: Overlap,
    /// Issue norms, SwiGLUs and the quantisation of what they give one by one, even where the
    /// device has one op for both. Results are the same to the bit.
    #[arg(long)]
    pub(crate) no_fusion: bool,
    /// Issue every command by itself, as VACC runtimes without command lists do, rather than each
    /// die's commands of a step as one list. The results are the same.
    #[arg(long)]
    pub(crate) enforce_eager: bool,
}

impl ParallelArgs {
    /// The plan for a model on a machine: dispatch goes over hosts first where there are several.
    pub(crate) fn plan(
        &self,
        config: &ModelConfig,
        topology: &Topology,
    ) -> Result<ParallelPlan, PlanError> {
        let placements =
            (0..topology.dies() as u32).filter_map(|d| topology.placement(DeviceId(d)));
        let hosts: Vec<u32> = placements.map(|placement| placement.host).collect();
        let per_host = hosts.iter().filter(|host| Some(*host) == hosts.first()).count();
        let options = ParallelOptions {
            tensor: self.tensor_parallel_size,
            pipeline: self.pipeline_parallel_size,
            data: self.data_parallel_size,
            expert: self.expert_parallel,
            redundant_experts: self.redundant_experts,
            ranks_per_node: (per_host < hosts.len()).then_some(per_host),
        };
        ParallelPlan::new(config, options)
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum Overlap {
    None,
    TwoBatch,
}

impl From<Overlap> for model::engine::Overlap {
    fn from(overlap: Overlap) -> Self {
        match overlap {
            Overlap::None => model::engine::Overlap::None,
            Overlap::TwoBatch => model::engine::Overlap::TwoBatch,
        }
    }
}

/// Whether and how to record.
#[derive(Args, Clone, Debug)]
pub(crate) struct RecordingArgs {
    /// Write every command that reaches the device, the weights and inputs that are written and
    /// the bytes that are read back, to a file for `dsv3-run replay`: all that somebody without
    /// your model or card needs to see what you see. As large as the weights. A run that fails
    /// leaves a recording too. It holds the prompt and the command line. While recording, commands
    /// are issued one by one, so times are those of --enforce-eager.
    #[arg(long, value_name = "FILE")]
    pub(crate) record: Option<PathBuf>,
    /// With --record: also hash what every op writes, so that a replay names the first op whose
    /// result differs. Adds copies to the commands, so times are not those of a plain run.
    #[arg(long, requires = "record")]
    pub(crate) record_all: bool,
}

/// Whether to trace.
#[derive(Args, Clone, Debug)]
pub(crate) struct TraceArgs {
    /// Write what ran when, command by command, to a file for ui.perfetto.dev or chrome://tracing:
    /// a process per die, a thread per stream, arrows from what was waited for, the use of memory
    /// and links. Some 300 bytes a command; loading is not in it. A run that fails leaves no file.
    /// A generation then also reports how much of its communication hides behind computation.
    #[arg(long, value_name = "FILE")]
    pub(crate) trace: Option<PathBuf>,
}

#[derive(Args, Clone, Debug)]
pub(crate) struct GenerateArgs {
    #[command(flatten)]
    pub(crate) model: ModelArgs,
    /// A user's message, put through the checkpoint's chat template.
    #[arg(long, value_name = "TEXT", group = "input")]
    pub(crate) chat: Option<String>,
    /// Raw text to continue.
    #[arg(long, value_name = "TEXT", group = "input")]
    pub(crate) prompt: Option<String>,
    /// Token ids to continue, as they are.
    #[arg(long, value_name = "1,2,3", group = "input", value_parser = parse_ids)]
    pub(crate) token_ids: Option<TokenIds>,
    /// Most tokens to generate.
    #[arg(long, value_name = "N", default_value_t = 128)]
    pub(crate) max_tokens: usize,
    /// 0 chooses the most likely token; DeepSeek recommends 0.3 for V3-0324.
    #[arg(long, value_name = "T", default_value_t = 0.0, allow_negative_numbers = true)]
    pub(crate) temperature: f64,
    /// Sample from this many of the most likely tokens only.
    #[arg(long, value_name = "K")]
    pub(crate) top_k: Option<usize>,
    /// Sample from the most likely tokens that together have this probability.
    #[arg(long, value_name = "P", default_value_t = 1.0, allow_negative_numbers = true)]
    pub(crate) top_p: f64,
    /// Seed of the sampling; equal seeds give equal text.
    #[arg(long, value_name = "N", default_value_t = 0)]
    pub(crate) seed: u64,
    /// Go on after an end-of-sequence token.
    #[arg(long)]
    pub(crate) ignore_eos: bool,
    /// Write the result as one JSON object to a file, or with "-" to standard output and nothing
    /// else there.
    #[arg(long, value_name = "FILE|-")]
    pub(crate) json: Option<String>,
    /// Print the generated text and nothing else.
    #[arg(long, short)]
    pub(crate) quiet: bool,
}

#[derive(Args, Clone, Debug)]
pub(crate) struct LogitsArgs {
    #[command(flatten)]
    pub(crate) model: ModelArgs,
    /// The sequence.
    #[arg(long, value_name = "1,2,3", required = true, value_parser = parse_ids)]
    pub(crate) token_ids: TokenIds,
    /// File to write: "logits" [T, vocab] F32 and, where the checkpoint has an MTP layer,
    /// "mtp_logits" [T-1, vocab], row i from hidden state i and token i+1.
    #[arg(long, value_name = "FILE")]
    pub(crate) out: PathBuf,
}

#[derive(Args, Clone, Debug)]
pub(crate) struct EvalArgs {
    #[command(flatten)]
    pub(crate) model: ModelArgs,
    /// JSON list of {"question", "answer"}; the built-in model's own questions if absent.
    #[arg(long, value_name = "FILE")]
    pub(crate) questions: Option<PathBuf>,
    /// Ask only the first N.
    #[arg(long, value_name = "N")]
    pub(crate) limit: Option<usize>,
    /// Most tokens of an answer.
    #[arg(long, value_name = "N", default_value_t = 64)]
    pub(crate) max_tokens: usize,
    /// Print one JSON object and nothing else.
    #[arg(long)]
    pub(crate) json: bool,
}

#[derive(Debug, Subcommand)]
pub(crate) enum CheckpointCommand {
    /// Tensors, dtypes, sizes, parameters, and what is missing or unexpected against the config.
    Inspect {
        /// Folder of the checkpoint.
        #[arg(required_unless_present = "config", conflicts_with = "config")]
        dir: Option<PathBuf>,
        /// Describe a configuration without weights: tiny, 1gb, deepseek-v3, or a config.json.
        #[arg(long, value_name = "PRESET|FILE")]
        config: Option<String>,
        /// Print one JSON object and nothing else.
        #[arg(long)]
        json: bool,
    },
    /// Write a checkpoint with random weights in the released layout.
    Synth {
        /// tiny, 1gb, deepseek-v3, or the path of a config.json.
        #[arg(long, value_name = "PRESET|FILE")]
        config: String,
        /// Folder to make; must be empty or absent.
        #[arg(long, value_name = "DIR")]
        out: PathBuf,
        /// Seed of the weights.
        #[arg(long, value_name = "N", default_value_t = 0)]
        seed: u64,
        /// Most bytes in a shard, in MiB.
        #[arg(long, value_name = "MIB", default_value_t = 4096, value_parser = clap::value_parser!(u64).range(1..=1 << 20))]
        shard_mib: u64,
    },
}

#[derive(Args, Clone, Debug)]
pub(crate) struct DevicesArgs {
    #[command(flatten)]
    pub(crate) system: SystemArgs,
    /// Print one JSON object and nothing else.
    #[arg(long)]
    pub(crate) json: bool,
}

/// Makes the recorded commands again, in the recorded order, with the recorded weights and inputs,
/// on any backend, and compares every byte that the recorded run read back, and every failure.
#[derive(Args, Clone, Debug)]
#[command(after_help = REPLAY)]
pub(crate) struct ReplayArgs {
    /// A file that --record wrote.
    pub(crate) file: PathBuf,
    #[command(flatten)]
    pub(crate) system: SystemArgs,
    /// Accept floats that differ by at most this part of the largest magnitude in the same read,
    /// e.g. 1e-2 for another backend's rounding; by default every byte must be equal. Integers,
    /// token ids for one, must be equal always. Hashes of --record-all are then not judged.
    #[arg(long, value_name = "REL", value_parser = parse_tolerance)]
    pub(crate) tolerance: Option<::replay::Tolerance>,
    /// Longest wait for a command that completed at recording.
    #[arg(long, value_name = "SECONDS", default_value_t = 60, value_parser = clap::value_parser!(u64).range(1..=86_400))]
    pub(crate) timeout: u64,
    /// Replay a recording that has no end, because its process was killed (FILE.partial), as far as
    /// it goes.
    #[arg(long)]
    pub(crate) unfinished: bool,
    /// Print the commands as text, one a line, and run nothing.
    #[arg(long, conflicts_with_all = ["json", "tolerance"])]
    pub(crate) dump: bool,
    /// Print one JSON object and nothing else.
    #[arg(long)]
    pub(crate) json: bool,
}

#[derive(Args, Clone, Debug)]
pub(crate) struct ConformanceArgs {
    #[command(flatten)]
    pub(crate) system: SystemArgs,
    /// Only cases whose name contains this, or matches it where it has a "*".
    #[arg(long, value_name = "GLOB")]
    pub(crate) filter: Option<String>,
    /// Name the cases and run none.
    #[arg(long)]
    pub(crate) list: bool,
    /// Print one JSON object and nothing else.
    #[arg(long)]
    pub(crate) json: bool,
}

const REPLAY: &str = "\
Examples:
  dsv3-run --backend vacc --record run.hal               the run that goes wrong
  dsv3-run replay run.hal --backend vacc                 does the card give the same again?
  dsv3-run replay run.hal --tolerance 1e-2               does the simulator give nearly the same?
  dsv3-run replay run.hal --dump | less                  what was it told to do?
A difference is shown with the command that last wrote the bytes. If that is far from the cause,
record once more with --record-all: then the first op whose output differs is found.

Exit status: 0 everything as recorded (a recorded failure that happened again included),
1 differences, or a recorded failure that did not happen again, 2 unusable file.";

fn parse_tolerance(text: &str) -> Result<::replay::Tolerance, String> {
    let relative = text.parse().ok().and_then(::replay::Tolerance::new);
    relative.ok_or_else(|| format!("{text:?} is no tolerance; expected e.g. 1e-3"))
}

const PLAN: &str = "\
Examples:
  dsv3-run plan --config deepseek-v3 --tensor-parallel-size 32 --max-model-len 16384
  dsv3-run plan --config deepseek-v3 --data-parallel-size 32 --expert-parallel --batch 128
  dsv3-run plan --tensor-parallel-size 4 --overlap two-batch --batch 2 --schedule

Reads the configuration alone. Exit status: 0 the plan is possible and fits, 2 it is not or does not.";

/// Explains a plan from the configuration alone, in milliseconds.
#[derive(Args, Clone, Debug)]
pub(crate) struct PlanArgs {
    /// tiny, 1gb, deepseek-v3, a config.json or a folder with one; the built-in model if absent.
    #[arg(long, value_name = "PRESET|FILE|DIR")]
    pub(crate) config: Option<String>,
    /// Machine whose dies are to hold it: va16 (the default), h800, or the path of a machine file.
    #[arg(long, value_name = "NAME|FILE")]
    pub(crate) machine: Option<String>,
    /// fp8, bf16 or f32.
    #[arg(long, default_value = "fp8", value_name = "fp8|bf16|f32")]
    pub(crate) numerics: Numerics,
    /// Longest sequence, prompt and output together; 4096 by default.
    #[arg(long, value_name = "TOKENS")]
    pub(crate) max_model_len: Option<usize>,
    /// Most sequences at a time, over all data ranks.
    #[arg(long, value_name = "N", default_value_t = 4, value_parser = clap::value_parser!(u32).range(1..=1 << 20).map(|n| n as usize))]
    pub(crate) max_num_seqs: usize,
    /// Most tokens that one prefill step takes.
    #[arg(long, value_name = "TOKENS", default_value_t = 512)]
    pub(crate) prefill_chunk: usize,
    /// Whether to hold the MTP layer.
    #[arg(long)]
    pub(crate) mtp: bool,
    #[command(flatten)]
    pub(crate) parallel: ParallelArgs,
    /// Show a decode step of this many sequences on each data rank.
    #[arg(long, value_name = "N", default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..=1 << 20).map(|n| n as usize))]
    pub(crate) batch: usize,
    /// Show a prefill step of this many tokens instead.
    #[arg(long, value_name = "TOKENS", value_parser = clap::value_parser!(u32).range(1..=1 << 20).map(|n| n as usize))]
    pub(crate) prefill: Option<usize>,
    /// Print the step as a rank's schedule, one command a line, instead of the summary.
    #[arg(long, conflicts_with = "json")]
    pub(crate) schedule: bool,
    /// The rank whose schedule is printed.
    #[arg(long, value_name = "RANK", default_value_t = 0)]
    pub(crate) rank: usize,
    /// Print one JSON object and nothing else.
    #[arg(long)]
    pub(crate) json: bool,
}

/// Token ids from the command line.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct TokenIds(pub(crate) Vec<u32>);

/// Reads `1,2,3`; empty text is an empty list, which the engine refuses as an empty prompt.
fn parse_ids(text: &str) -> Result<TokenIds, String> {
    if text.trim().is_empty() {
        return Ok(TokenIds(Vec::new()));
    }
    let id = |part: &str| {
        part.trim()
            .parse()
            .map_err(|_| format!("{part:?} is no token id; expected e.g. 0,1022,267"))
    };
    text.split(',').map(id).collect::<Result<_, _>>().map(TokenIds)
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::CommandFactory;

    #[test]
    fn the_command_line_is_consistent() {
        Cli::command().debug_assert();
    }

    #[test]
    fn token_ids_are_read_or_refused() {
        assert_eq!(parse_ids("1, 2,3"), Ok(TokenIds(vec![1, 2, 3])));
        assert_eq!(parse_ids(""), Ok(TokenIds(vec![])));
        for bad in ["1,,2", "-1", "a", "4294967296"] {
            assert!(parse_ids(bad).is_err(), "{bad}");
        }
    }
}
