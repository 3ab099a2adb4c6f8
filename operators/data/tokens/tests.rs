//! Files of tokenized rows: written, read back, read by others, and refused.

use safetensors::SafeTensors;
use sapo_flow_engine::record::Values;

use super::*;

fn rows() -> Vec<Prompt> {
    let mut values = Values::new();
    values.insert("score".into(), 0.1);
    values.insert_text("kind".into(), "a\n\"b\"".into());
    let prompt = |row, prompt_ids: &[u32], chosen_ids: &[u32], rejected_ids: Option<&[u32]>| Prompt {
        source: String::new(),
        ..crate::testing::prompt(row, prompt_ids, chosen_ids, rejected_ids)
    };
    vec![
        prompt(0, &[1, 2, 3], &[4], None),
        Prompt { values, ..prompt(3, &[5], &[6, 70_000], Some(&[8])) },
        prompt(u64::from(u32::MAX) + 1, &[9], &[u32::MAX], Some(&[])),
    ]
}

fn write(path: &Path, rows: &[Prompt]) -> Tokens {
    let mut writer = Writer::File(Box::new(FileWriter::begin(path).unwrap()));
    // In two parts, as a large data set comes.
    let (first, rest) = rows.split_at(1);
    writer.add(first.to_vec()).unwrap();
    assert!(!path.exists(), "a file that is under way must not be found");
    writer.add(rest.to_vec()).unwrap();
    writer.finish(&Report { read: 7, too_long: 4, ..Report::default() }, "d1").unwrap()
}

#[test]
fn rows_come_back_as_they_were() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("made/tokens.safetensors");
    let written = write(&path, &rows());
    let Tokens::File(found) = written else { panic!("expected a file") };
    assert_eq!((found.about().report.read, found.about().report.too_long), (7, 4));
    assert_eq!(found.about().digest, "d1");
    let found = Tokens::File(Box::new(TokenFile::open(&path).unwrap()));
    assert_eq!((found.len(), found.with_rejected()), (3, 2));
    assert_eq!(Vec::from_iter(found.all().unwrap().iter().map(|row| Prompt::clone(row))), rows());
    assert_eq!(*found.row(2).unwrap(), rows()[2]);
    assert_eq!(std::fs::read_dir(path.parent().unwrap()).unwrap().count(), 1, "nothing else is left behind");
}

/// Read by the library of the format, as another program would.
#[test]
fn the_file_is_a_safetensors_file() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("tokens.safetensors");
    write(&path, &rows());
    let bytes = std::fs::read(&path).unwrap();
    let tensors = SafeTensors::deserialize(&bytes).unwrap();
    let ids = tensors.tensor("ids").unwrap();
    let ids: Vec<u32> = ids.data().as_chunks().0.iter().map(|id| u32::from_le_bytes(*id)).collect();
    assert_eq!(ids, [1, 2, 3, 4, 5, 6, 70_000, 8, 9, u32::MAX]);
    let index = tensors.tensor("index").unwrap();
    assert_eq!(index.shape(), [3, 6]);
    let index: Vec<u64> = index.data().as_chunks().0.iter().map(|number| u64::from_le_bytes(*number)).collect();
    assert_eq!(index[..6], [0, 0, 3, 1, u64::MAX, 0]);
    assert_eq!(index[12..17], [1 << 32, 8, 1, 1, 0]);
    let values = tensors.tensor("values").unwrap();
    assert_eq!(index[11], values.data().len() as u64);
    let values: serde_json::Value = serde_json::from_slice(values.data()).unwrap();
    assert_eq!(values, json!({"score": 0.1, "kind": "a\n\"b\""}));
}

#[test]
fn what_is_no_whole_file_is_refused() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("tokens.safetensors");
    write(&path, &rows());
    let bytes = std::fs::read(&path).unwrap();
    let error = |content: &[u8]| {
        std::fs::write(&path, content).unwrap();
        TokenFile::open(&path).unwrap_err().to_string()
    };
    assert!(error(&bytes[..bytes.len() - 1]).ends_with("its length is not what its header says"));
    assert!(error(&bytes[..100]).contains("tokens.safetensors: "));
    assert!(error(&[0; HEADER as usize]).contains("not a file of tokenized rows"));
    let mut other = bytes.clone();
    let about = other.windows(7).position(|bytes| bytes == b"\"about\"").unwrap();
    other[about + 2] = b'o';
    let error = error(&other);
    assert!(error.ends_with("`about` is missing"), "{error}");
}
