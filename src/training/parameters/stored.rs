//! The safetensors format: headers checked before anything is read, tensors read and written one by one.

use std::fs::File;
use std::io::{Read, Seek, SeekFrom};
use std::path::Path;

use safetensors::Dtype;
use safetensors::tensor::{Metadata, TensorInfo, View};
use tch::{Device, Kind, Tensor};

use crate::{Error, Result};

/// A safetensors file's header: 8 bytes of length, then JSON. Tensors are read one by one afterwards, so that a model
/// is never in memory twice.
pub(super) struct SafetensorsFile {
    pub metadata: Metadata,
    /// Where the tensors' data begin, in bytes.
    pub data_start: u64,
}

impl SafetensorsFile {
    /// Reads and checks the header.
    pub fn open(path: &Path) -> Result<Self> {
        const MAX_HEADER_BYTES: u64 = 100 << 20;
        let io = || Error::io(path);
        let invalid = |message: String| Error::invalid(path, message);
        let mut file = File::open(path).map_err(io())?;
        let file_bytes = file.metadata().map_err(io())?.len();
        let mut length = [0; 8];
        file.read_exact(&mut length).map_err(|_| invalid("too short for a safetensors file".into()))?;
        let header_bytes = u64::from_le_bytes(length);
        if header_bytes > MAX_HEADER_BYTES || header_bytes + 8 > file_bytes {
            return Err(invalid(format!("not a safetensors file: its header would have {header_bytes} bytes")));
        }
        let mut header = vec![0; header_bytes as usize];
        file.read_exact(&mut header).map_err(io())?;
        let metadata: Metadata = serde_json::from_slice(&header)
            .map_err(|error| invalid(format!("unreadable safetensors header: {error}")))?;
        let data_start = header_bytes + 8;
        let expected = data_start + metadata.data_len() as u64;
        if file_bytes != expected {
            return Err(invalid(format!(
                "expected {expected} bytes by its header, found {file_bytes}: is it truncated?"
            )));
        }
        Ok(SafetensorsFile { metadata, data_start })
    }
}

/// One tensor of the file, as it is stored.
pub(super) fn read_tensor(
    file: &mut File,
    path: &Path,
    data_start: u64,
    name: &str,
    info: &TensorInfo,
) -> Result<Tensor> {
    let kind = kind_of(info.dtype)
        .ok_or_else(|| Error::invalid(path, format!("tensor `{name}` has unsupported dtype {:?}", info.dtype)))?;
    // A header is refused whose places do not hold as much as shapes and types say.
    let (begin, _) = info.data_offsets;
    let mut tensor = Tensor::f_empty(shape_of(info), (kind, Device::Cpu))?;
    file.seek(SeekFrom::Start(data_start + begin as u64)).map_err(Error::io(path))?;
    file.read_exact(bytes_mut(&mut tensor)).map_err(Error::io(path))?;
    Ok(tensor)
}

/// Refuses weights that are no fractions: integers are codes of something else, such as quantised weights.
pub(super) fn check_float(path: &Path, name: &str, info: &TensorInfo) -> Result<()> {
    match info.dtype {
        Dtype::F32 | Dtype::BF16 | Dtype::F16 | Dtype::F64 => Ok(()),
        other => {
            let message = format!("tensor `{name}`: expected dtype F32, BF16, F16 or F64, found {other:?}");
            Err(Error::invalid(path, message))
        }
    }
}

fn kind_of(dtype: Dtype) -> Option<Kind> {
    Some(match dtype {
        Dtype::F32 => Kind::Float,
        Dtype::BF16 => Kind::BFloat16,
        Dtype::F16 => Kind::Half,
        Dtype::F64 => Kind::Double,
        Dtype::I64 => Kind::Int64,
        Dtype::I32 => Kind::Int,
        Dtype::U8 => Kind::Uint8,
        Dtype::BOOL => Kind::Bool,
        _ => return None,
    })
}

/// A tensor on its way into a file; converted and brought to the CPU only when its turn comes.
pub(super) struct Stored {
    tensor: Tensor,
    kind: Kind,
    dtype: Dtype,
    shape: Vec<usize>,
}

impl Stored {
    pub fn new(tensor: &Tensor, kind: Option<Kind>) -> Result<Self> {
        let kind = kind.unwrap_or_else(|| tensor.kind());
        let dtype = match kind {
            Kind::Float => Dtype::F32,
            Kind::BFloat16 => Dtype::BF16,
            Kind::Half => Dtype::F16,
            Kind::Double => Dtype::F64,
            Kind::Int64 => Dtype::I64,
            Kind::Int => Dtype::I32,
            Kind::Uint8 => Dtype::U8,
            Kind::Bool => Dtype::BOOL,
            other => return Err(Error::Argument(format!("tensors of kind {other:?} cannot be stored"))),
        };
        let shape = tensor.size().iter().map(|&size| size as usize).collect();
        Ok(Stored { tensor: tensor.detach(), kind, dtype, shape })
    }
}

impl View for Stored {
    fn dtype(&self) -> Dtype {
        self.dtype
    }
    fn shape(&self) -> &[usize] {
        &self.shape
    }
    fn data(&self) -> std::borrow::Cow<'_, [u8]> {
        if self.tensor.device() == Device::Cpu && self.tensor.kind() == self.kind && self.tensor.is_contiguous() {
            return bytes(&self.tensor).into();
        }
        let tensor = self.tensor.to_kind(self.kind).to_device(Device::Cpu).contiguous();
        bytes(&tensor).to_vec().into()
    }
    fn data_len(&self) -> usize {
        self.tensor.numel() * self.kind.elt_size_in_bytes()
    }
}

/// A contiguous CPU tensor's memory.
fn bytes(tensor: &Tensor) -> &[u8] {
    match byte_length(tensor) {
        0 => &[],
        // Safety: that many bytes are there, and they stay where they are while the tensor is borrowed.
        length => unsafe { std::slice::from_raw_parts(tensor.data_ptr().cast(), length) },
    }
}

/// The memory of a contiguous CPU tensor that nobody else has.
fn bytes_mut(tensor: &mut Tensor) -> &mut [u8] {
    match byte_length(tensor) {
        0 => &mut [],
        // Safety: as above; nothing reads them before they are written.
        length => unsafe { std::slice::from_raw_parts_mut(tensor.data_ptr().cast(), length) },
    }
}

fn byte_length(tensor: &Tensor) -> usize {
    tensor.numel() * tensor.kind().elt_size_in_bytes()
}

/// A stored tensor's shape.
pub(super) fn shape_of(info: &TensorInfo) -> Vec<i64> {
    info.shape.iter().map(|&size| size as i64).collect()
}
