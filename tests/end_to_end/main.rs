//! The whole program on a tiny model: it trains, survives whatever stops it, and gives the same bytes again.
//!
//! | module | what it tests |
//! |---|---|
//! | `workplace` | nothing: a model, data, pipelines, and the binary run on them |
//! | `resume` | runs killed, interrupted and resumed end as runs that never were |
//! | `determinism` | the same seed gives the same bytes, another seed others |
//! | `damage` | a damaged checkpoint is refused, and nothing is changed |
//! | `composites` | operators made of others train and resume |
//! | `plain` | the fast paths give the plain path's numbers |
//! | `outside` | programs and servers outside join the graph |
//! | `rewiring` | other algorithms, by YAML alone |
//! | `relational` | pairs of the best and the worst candidates, and none that is outdated |
//! | `watch` | data that is edited while the run goes on |
//! | `inputs` | what a run reads is found by any name, and noted with its hash |
//! | `failures` | what goes wrong ends the run, and is named |
//! | `examples` | the programs under `examples` work |
//! | `server` | nothing: a server with OpenAI's HTTP interface |
//! | `segments` | which part of an answer is rewritten |
//! | `shipped` | the pipelines that ship train |
//! | `sweeps` | many runs of one pipeline, stopped and resumed |
//! | `trace` | when each node worked, as a file |
//! | `models` | the directories that a run writes are models |

mod composites;
mod damage;
mod determinism;
mod examples;
mod failures;
mod inputs;
mod models;
mod objectives;
mod outside;
mod plain;
mod relational;
mod resume;
mod rewiring;
mod segments;
mod server;
mod shipped;
mod sweeps;
mod trace;
mod watch;
mod workplace;
