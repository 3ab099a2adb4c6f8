//! Agreement with what others computed: the golden files, transformers, and formulas worked by hand.

mod chat_templates;
mod conversations;
mod directories;
mod fast_paths;
mod generation;
mod gguf;
mod gguf_file;
mod golden;
mod learner;
mod models;
mod more_models;
mod objectives;
mod optimizers;
mod released;
mod rope_settings;
mod schedules;
mod shards;
mod smollm2;
mod steps;
mod warpers;
