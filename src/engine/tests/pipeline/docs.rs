//! Reference pages of operators.

use sapo_flow_engine::OperatorSpec;
use sapo_flow_engine::docs::{OperatorDoc, operators_table};

use crate::toy::{Buffer, Learner, Source, registry};

#[test]
fn text() {
    assert_eq!(
        OperatorDoc::of(&OperatorSpec::of::<Source>()).to_text(),
        "\
prompt_source: A toy prompt_source.

Does nothing.

Outputs

    prompts: Prompts
        rows

With

    path: text, required
        Where the rows are.
    batch_size: an integer, default 8
        Rows a step.
    columns: a list, each item text, default []
        Names of columns.

Example

    toy:
      op: prompt_source
"
    );
}

#[test]
fn markdown() {
    assert_eq!(
        OperatorDoc::of(&OperatorSpec::of::<Buffer>()).to_markdown(),
        "\
## `replay_buffer`

A toy replay_buffer.

Does nothing.

### Inputs

| port | carries |  | what |
|---|---|---|---|
| `pairs` | Pairs | many | what to keep |

### Outputs

| port | carries |  | what |
|---|---|---|---|
| `pairs` | Pairs |  | what is drawn |
| `metrics` | Metrics |  | sizes |

### Example

```yaml
toy:
  op: replay_buffer
```
"
    );
}

#[test]
fn json_and_nested_parameters() {
    let doc = OperatorDoc::of(&OperatorSpec::of::<Learner>());
    let names: Vec<&str> = doc.parameters.iter().map(|parameter| parameter.name.as_str()).collect();
    assert_eq!(
        names,
        [
            "objective",
            "beta",
            "optimizer",
            "optimizer.name",
            "optimizer.learning_rate",
            "optimizer.betas",
            "optimizer.momentum",
        ]
    );
    let json = serde_json::to_value(&doc).unwrap();
    assert_eq!(json["parameters"][0]["expects"], "`orpo` or `dpo`");
    assert_eq!(json["parameters"][0]["required"], true);
    assert_eq!(json["parameters"][3]["expects"], "`adamw` or `sgd`");
    assert_eq!(json["outputs"][1]["types"][0], "Metrics");
    assert_eq!(json["schema"]["required"][0], "objective");
}

#[test]
fn the_table_lists_all() {
    let table = operators_table(&registry());
    let lines: Vec<&str> = table.lines().collect();
    assert_eq!(lines.len(), 2 + registry().iter().count());
    assert_eq!(lines[0], "| operator | takes | emits | what it does |");
    assert_eq!(lines[3], "| `segment_sampler` | `prompts`, `weights` | `pairs` | A toy segment_sampler. |");
}
