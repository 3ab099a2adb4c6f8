//! A model's tensors by name, and their safetensors files in Hugging Face's layout.

mod index;
mod stored;

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::fs::File;
use std::path::{Path, PathBuf};

use indexmap::IndexMap;
use safetensors::tensor::TensorInfo;
use tch::{Device, Kind, Tensor};

use crate::error::TensorDifferences;
use crate::{Error, Result};
use index::WeightFiles;
use stored::{SafetensorsFile, Stored, check_float, read_tensor, shape_of};

/// The file that a model with a single file of weights has.
pub const WEIGHTS_FILE: &str = "model.safetensors";

/// Named tensors in a fixed order: the weights of a model, or something of the same shape (gradients, moments).
///
/// Weights are apart from the architecture, so that one decoder serves the policy, its average and the reference.
#[derive(Debug, Default)]
pub struct ParameterSet {
    tensors: IndexMap<String, Tensor>,
}

// Safety: libtorch's tensors count references atomically and reading one from several threads is allowed. Nothing here
// writes to a tensor through a shared reference; whoever updates tensors in place must be the set's only user.
unsafe impl Sync for ParameterSet {}

impl FromIterator<(String, Tensor)> for ParameterSet {
    fn from_iter<T: IntoIterator<Item = (String, Tensor)>>(tensors: T) -> Self {
        ParameterSet { tensors: tensors.into_iter().collect() }
    }
}

impl ParameterSet {
    /// The tensor called `name`.
    pub fn get(&self, name: &str) -> Result<&Tensor> {
        self.tensors.get(name).ok_or_else(|| Error::Argument(format!("there is no parameter `{name}`")))
    }

    /// Takes the tensor called `name` out.
    pub fn take(&mut self, name: &str) -> Result<Tensor> {
        let taken = self.tensors.shift_remove(name);
        taken.ok_or_else(|| Error::Argument(format!("there is no parameter `{name}`")))
    }

    /// Names and tensors, in order.
    pub fn iter(&self) -> impl ExactSizeIterator<Item = (&str, &Tensor)> {
        self.tensors.iter().map(|(name, tensor)| (name.as_str(), tensor))
    }

    /// Names and tensors to be changed in place, in order.
    pub fn iter_mut(&mut self) -> impl ExactSizeIterator<Item = (&str, &mut Tensor)> {
        self.tensors.iter_mut().map(|(name, tensor)| (name.as_str(), tensor))
    }

    /// Names, in order.
    pub fn names(&self) -> impl ExactSizeIterator<Item = &str> {
        self.tensors.keys().map(String::as_str)
    }

    /// Number of tensors.
    pub fn len(&self) -> usize {
        self.tensors.len()
    }

    /// Whether there are no tensors.
    pub fn is_empty(&self) -> bool {
        self.tensors.is_empty()
    }

    /// Number of parameters: elements of all tensors.
    pub fn count(&self) -> usize {
        self.tensors.values().map(Tensor::numel).sum()
    }

    /// Size of all tensors in bytes.
    pub fn bytes(&self) -> usize {
        self.tensors.values().map(|tensor| tensor.numel() * tensor.kind().elt_size_in_bytes()).sum()
    }

    /// A copy in memory of its own, without gradients.
    pub fn deep_copy(&self) -> Self {
        let copy = |tensor: &Tensor| {
            let tensor = tensor.detach();
            let mut copy = tensor.empty_like();
            copy.copy_(&tensor);
            copy
        };
        self.tensors.iter().map(|(name, tensor)| (name.clone(), copy(tensor))).collect()
    }

    /// The same tensors under a second handle: what is written to one set shows in the other.
    pub fn shallow_clone(&self) -> Self {
        self.tensors.iter().map(|(name, tensor)| (name.clone(), tensor.shallow_clone())).collect()
    }

    /// The tensors as `kind`, without gradients; those that are of this kind already are shared, not copied.
    pub fn to_kind(&self, kind: Kind) -> Self {
        self.tensors.iter().map(|(name, tensor)| (name.clone(), tensor.detach().to_kind(kind))).collect()
    }

    /// The tensors on a device, without gradients; those that are there already are shared, not copied.
    pub fn to_device(&self, device: Device) -> Result<Self> {
        let moved = |(name, tensor): (&String, &Tensor)| Ok((name.clone(), tensor.detach().f_to_device(device)?));
        self.tensors.iter().map(moved).collect()
    }

    /// Reads a model directory's weights: exactly the `expected` names and shapes, in that order, converted to `kind`.
    ///
    /// The files are `model.safetensors`, or those that `model.safetensors.index.json` lists. Old checkpoints' stored
    /// rope frequencies, and a head next to tied embeddings, are skipped as transformers does.
    pub fn load(directory: &Path, expected: &[(String, Vec<i64>)], device: Device, kind: Kind) -> Result<Self> {
        Self::load_files(directory, WeightFiles::of(directory)?, expected, device, Some(kind))
    }

    /// The kind of all tensors of a model's weights; f32 where there are none.
    pub fn kind(&self) -> Kind {
        self.iter().next().map_or(Kind::Float, |(_, tensor)| tensor.kind())
    }

    /// Reads one file of weights like that, exactly the `expected` names and shapes, in that order, of the kinds stored.
    pub fn load_file(path: &Path, expected: &[(String, Vec<i64>)], device: Device) -> Result<Self> {
        Self::load_files(path, WeightFiles::one(path), expected, device, None)
    }

    fn load_files(
        origin: &Path,
        files: WeightFiles,
        expected: &[(String, Vec<i64>)],
        device: Device,
        kind: Option<Kind>,
    ) -> Result<Self> {
        let mut sources: Sources = BTreeMap::new();
        for path in &files.paths {
            let file = SafetensorsFile::open(path)?;
            for (name, info) in file.metadata.tensors() {
                let source = (path.clone(), file.data_start, info.clone());
                if let Some((other, ..)) = sources.insert(name.clone(), source) {
                    return Err(files.stands_twice(&name, &other, path));
                }
            }
        }
        let differences = compare(expected, &sources);
        if !differences.is_empty() {
            return Err(Error::Tensors { path: origin.to_path_buf(), differences });
        }
        for (name, _) in expected {
            let Some((path, _, info)) = sources.get(name) else { continue };
            files.check(name, path)?;
            // What is not trained may count something, and is kept as it is.
            if kind.is_some() {
                check_float(path, name, info)?;
            }
        }
        let mut open = HashMap::new();
        let mut tensors = IndexMap::with_capacity(expected.len());
        for (name, _) in expected {
            let Some((path, data_start, info)) = sources.get(name) else { continue };
            let file = match open.entry(path) {
                std::collections::hash_map::Entry::Occupied(entry) => entry.into_mut(),
                std::collections::hash_map::Entry::Vacant(entry) => {
                    entry.insert(File::open(path).map_err(Error::io(path))?)
                }
            };
            let tensor = read_tensor(file, path, *data_start, name, info)?;
            let kind = kind.unwrap_or(tensor.kind());
            tensors.insert(name.clone(), tensor.f_to_device(device)?.f_to_kind(kind)?);
        }
        Ok(ParameterSet { tensors })
    }

    /// Reads all tensors of one safetensors file as they are stored, in the order of their names.
    pub fn read(path: &Path, device: Device) -> Result<Self> {
        let file = SafetensorsFile::open(path)?;
        let mut reader = File::open(path).map_err(Error::io(path))?;
        let infos: BTreeMap<_, _> = file.metadata.tensors().into_iter().collect();
        let read = |(name, info): (String, &TensorInfo)| {
            let tensor = read_tensor(&mut reader, path, file.data_start, &name, info)?;
            Ok((name, tensor.f_to_device(device)?))
        };
        infos.into_iter().map(read).collect()
    }

    /// Writes one safetensors file, with the tensors converted to `kind` where one is given.
    pub fn write(&self, path: &Path, kind: Option<Kind>) -> Result<()> {
        let views = self.tensors.iter().map(|(name, tensor)| Ok((name, Stored::new(tensor, kind)?)));
        let views = views.collect::<Result<Vec<_>>>()?;
        // transformers wants to know which framework wrote the file.
        let metadata = HashMap::from([("format".to_owned(), "pt".to_owned())]);
        safetensors::serialize_to_file(views, Some(metadata), path)
            .map_err(|error| Error::invalid(path, format!("could not be written: {error}")))
    }
}

/// By name, a tensor's file, where its data begin there, in bytes, and its place among them.
type Sources = BTreeMap<String, (PathBuf, u64, TensorInfo)>;

/// What a checkpoint lacks, and what it has too much.
fn compare(expected: &[(String, Vec<i64>)], sources: &Sources) -> TensorDifferences {
    let mut differences = TensorDifferences::default();
    for (name, shape) in expected {
        match sources.get(name) {
            None => differences.missing.push(name.clone()),
            Some((_, _, info)) => {
                let found = shape_of(info);
                if found != *shape {
                    differences.shapes.push((name.clone(), shape.clone(), found));
                }
            }
        }
    }
    let known: BTreeSet<&str> = expected.iter().map(|(name, _)| name.as_str()).collect();
    let superfluous = |name: &str| name == "lm_head.weight" || name.ends_with(".rotary_emb.inv_freq");
    let unexpected = sources.keys().filter(|name| !known.contains(name.as_str()) && !superfluous(name));
    differences.unexpected = unexpected.cloned().collect();
    differences
}

#[cfg(test)]
mod tests {
    use super::*;

    fn set() -> ParameterSet {
        let tensors = [
            ("weights", Tensor::from_slice(&[1f32, 0.1, -3.0, 1e-8]).view([2, 2])),
            ("steps", Tensor::from_slice(&[1i64 << 40])),
            ("transposed", Tensor::arange(6, (Kind::Double, Device::Cpu)).view([2, 3]).tr()),
            ("nothing", Tensor::zeros([0, 3], (Kind::Float, Device::Cpu))),
        ];
        tensors.into_iter().map(|(name, tensor)| (name.to_owned(), tensor)).collect()
    }

    #[test]
    fn sizes() {
        let set = set();
        assert_eq!((set.len(), set.count(), set.bytes()), (4, 11, 4 * 4 + 8 + 6 * 8));
    }

    #[test]
    fn what_is_written_is_read_again() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("state.safetensors");
        set().write(&path, None).unwrap();
        let read = ParameterSet::read(&path, Device::Cpu).unwrap();
        let names: Vec<&str> = read.names().collect();
        assert_eq!(names, ["nothing", "steps", "transposed", "weights"]);
        for (name, tensor) in read.iter() {
            assert_eq!(tensor, set().get(name).unwrap(), "{name}");
        }
    }

    #[test]
    fn a_file_of_weights_is_read_in_the_order_expected() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("weights.safetensors");
        set().write(&path, None).unwrap();
        let mut expected: Vec<_> = set().iter().map(|(name, tensor)| (name.to_owned(), tensor.size())).collect();
        let read = ParameterSet::load_file(&path, &expected, Device::Cpu).unwrap();
        assert_eq!(read.names().collect::<Vec<_>>(), ["weights", "steps", "transposed", "nothing"]);
        assert_eq!(read.get("transposed").unwrap().kind(), Kind::Double);
        expected[1].0 = "bias".into();
        let error = ParameterSet::load_file(&path, &expected, Device::Cpu).unwrap_err().to_string();
        assert!(error.contains("bias") && error.contains("steps"), "{error}");
    }

    #[test]
    fn the_same_tensors_make_the_same_file() {
        let directory = tempfile::tempdir().unwrap();
        let bytes = |name: &str| {
            set().write(&directory.path().join(name), Some(Kind::BFloat16)).unwrap();
            std::fs::read(directory.path().join(name)).unwrap()
        };
        assert_eq!(bytes("a"), bytes("b"));
    }

    #[test]
    fn copies_are_apart_and_clones_are_not() {
        let mut set = set();
        let (copy, clone) = (set.deep_copy(), set.shallow_clone());
        for (_, tensor) in set.iter_mut() {
            let _ = tensor.fill_(7);
        }
        assert_eq!(copy.get("weights").unwrap().double_value(&[0, 0]), 1.0);
        assert_eq!(clone.get("weights").unwrap().double_value(&[0, 0]), 7.0);
    }

    #[test]
    fn an_unknown_name_and_an_unwritable_path_are_errors() {
        assert_eq!(set().get("bias").unwrap_err().to_string(), "there is no parameter `bias`");
        let message = set().write(Path::new("no/such/folder/file"), None).unwrap_err().to_string();
        assert!(message.starts_with("no/such/folder/file: could not be written"), "{message}");
    }
}
