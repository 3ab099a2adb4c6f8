//! Agreement with what others computed: the golden files, transformers, and formulas worked by hand.

mod chat_templates;
mod conversations;
mod generation;
mod golden;
mod learner;
mod models;
mod objectives;
mod optimizers;
mod schedules;
mod steps;
mod warpers;
