//! Where tensors live, and how this process uses its processors and memory.

use std::ffi::{CStr, c_int, c_void};
use std::sync::OnceLock;

use tch::kind::Element;
use tch::{Cuda, Device, Tensor};

use crate::native::disable_cudnn_attention;
use crate::{Error, Result};

/// A device as it is written.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Named {
    /// `auto`: CUDA where there is one.
    Auto,
    /// `cpu`.
    Cpu,
    /// `cuda:N`, or `cuda` for the first one.
    Cuda(usize),
}

impl std::str::FromStr for Named {
    type Err = Error;

    fn from_str(name: &str) -> Result<Self> {
        match name {
            "auto" => Ok(Named::Auto),
            "cpu" => Ok(Named::Cpu),
            "cuda" => Ok(Named::Cuda(0)),
            _ => name.strip_prefix("cuda:").and_then(|index| index.parse().ok()).map(Named::Cuda).ok_or_else(|| {
                Error::Argument(format!("device `{name}`: expected `auto`, `cpu`, `cuda` or `cuda:N` with a number N"))
            }),
        }
    }
}

/// The device of that name, which must be there: see [`Named`].
pub fn parse(name: &str) -> Result<Device> {
    let index = match name.parse()? {
        Named::Cpu => return Ok(Device::Cpu),
        Named::Auto => return Ok(if cuda_devices().is_ok() { Device::Cuda(0) } else { Device::Cpu }),
        Named::Cuda(index) => index,
    };
    let devices = cuda_devices().map_err(|reason| Error::Argument(format!("device `{name}`: {reason}")))?;
    if index >= devices {
        return Err(Error::Argument(format!("device `{name}`: this machine has {devices} CUDA device(s)")));
    }
    Ok(Device::Cuda(index))
}

/// A device's name as [`parse`] reads it: `cpu` or `cuda:N`.
pub fn name(device: Device) -> String {
    match device {
        Device::Cuda(index) => format!("cuda:{index}"),
        Device::Cpu => "cpu".to_owned(),
        other => format!("{other:?}").to_lowercase(),
    }
}

/// Numbers as a tensor of one dimension on a device. On their way to a GPU they pass through pinned memory, so that the host
/// does not wait for all that the GPU still has to do; what is done with them there comes after.
///
/// # Errors
/// When the device has no room for them.
pub fn upload<T: Element>(numbers: &[T], device: Device) -> Result<Tensor> {
    let tensor = Tensor::f_from_slice(numbers)?;
    match device {
        Device::Cpu => Ok(tensor),
        // libtorch keeps pinned memory until copies from it are done. It warns of `pin_memory` with a device, and tch has
        // none without.
        Device::Cuda(_) => {
            Ok(tensor.f_internal_pin_memory(device)?.f_to_device_(device, tensor.kind(), true, false)?)
        }
        other => Ok(tensor.f_to_device(other)?),
    }
}

/// Whether a device computes products of bfloat16 numbers faster than of float32.
///
/// GPUs do from compute capability 8.0, with which the instructions came in 2020.
///
/// Of processors, those with AMX do, and AMD's with AVX512_BF16. Intel's with the latter alone do not: 150 against 260 GFLOPS in
/// float32 were measured on two cores of one; and those without either are many times slower.
pub fn is_fast_in_bfloat16(device: Device) -> bool {
    match device {
        Device::Cpu => std::fs::read_to_string("/proc/cpuinfo").is_ok_and(|text| cpu_is_fast_in_bfloat16(&text)),
        Device::Cuda(index) => compute_capability_major(index).is_none_or(|major| major >= 8),
        _ => false,
    }
}

/// The first number of a GPU's compute capability, by CUDA's runtime, which comes with libtorch's library; none where that
/// does not tell.
fn compute_capability_major(index: usize) -> Option<c_int> {
    type GetAttribute = unsafe extern "C" fn(*mut c_int, c_int, c_int) -> c_int;
    /// `cudaDevAttrComputeCapabilityMajor`
    const ATTRIBUTE: c_int = 75;
    let device = c_int::try_from(index).ok()?;
    let mut major = 0;
    // Safety: the function of that name has this type in every version of the runtime; it writes one number and returns 0, or
    // an error.
    unsafe {
        let found = libc::dlsym(libc::RTLD_DEFAULT, c"cudaDeviceGetAttribute".as_ptr());
        if found.is_null() {
            return None;
        }
        let get = std::mem::transmute::<*mut c_void, GetAttribute>(found);
        (get(&mut major, ATTRIBUTE, device) == 0).then_some(major)
    }
}

/// By what the kernel says of its processors; all are taken to be as the first.
fn cpu_is_fast_in_bfloat16(cpuinfo: &str) -> bool {
    let field = |name: &str| {
        let line = cpuinfo.lines().find(|line| line.starts_with(name))?;
        line.split_once(':').map(|(_, value)| value.trim())
    };
    let has = |flag: &str| field("flags").is_some_and(|flags| flags.split(' ').any(|found| found == flag));
    has("amx_bf16") || has("avx512_bf16") && field("vendor_id") == Some("AuthenticAMD")
}

/// Sets how many processors libtorch uses for work that the calling thread starts. Each device thread has its own
/// number.
pub fn set_threads(threads: usize) {
    tch::set_num_threads(i32::try_from(threads.max(1)).unwrap_or(i32::MAX));
}

/// Sizes of products that oneDNN, and the wrapper by which libtorch calls it in each thread, keep ready, by what they read from the
/// environment when they are first called. Left alone they keep 1024, and take 0.7 MB for each: a run whose sequences
/// have many lengths goes on growing for hundreds of steps. A step has some 50; a size that comes again takes a third of a
/// millisecond.
const PRODUCTS_KEPT: &str = "128";
const PRODUCTS_KEPT_BY: [&[&str]; 2] =
    [&["ONEDNN_PRIMITIVE_CACHE_CAPACITY", "DNNL_PRIMITIVE_CACHE_CAPACITY"], &["LRU_CACHE_CAPACITY"]];

static OWN_VARIABLES: OnceLock<Vec<&str>> = OnceLock::new();

/// Variables of the environment that are set for this process alone: not meant for programs that it starts.
pub fn own_variables() -> &'static [&'static str] {
    OWN_VARIABLES.get().map_or(&[], Vec::as_slice)
}

/// Makes this process keep the memory that tensors have freed, instead of handing that of a step back to the kernel and
/// paying for its pages again at the next: large tensors have a heap of their own, and the C allocator keeps the rest. To be
/// called once, before threads start.
///
/// What oneDNN keeps of the products that it has made is bounded: the last 128 sizes, in each thread.
pub fn keep_memory() {
    let unset = PRODUCTS_KEPT_BY.iter().filter(|names| names.iter().all(|name| std::env::var_os(name).is_none()));
    for name in OWN_VARIABLES.get_or_init(|| unset.map(|names| names[0]).collect()) {
        // Safety: no other thread reads or writes the environment yet.
        unsafe { std::env::set_var(name, PRODUCTS_KEPT) };
    }
    crate::heap::place_tensors();
    #[cfg(all(target_os = "linux", target_env = "gnu"))]
    // Safety: mallopt only changes parameters of the allocator.
    unsafe {
        libc::mallopt(libc::M_MMAP_MAX, 0);
        libc::mallopt(libc::M_TRIM_THRESHOLD, libc::c_int::MAX);
        libc::mallopt(libc::M_TOP_PAD, 64 << 20);
        libc::mallopt(libc::M_ARENA_MAX, 1);
    }
}

/// The number of CUDA devices, or why there are none.
///
/// libtorch decides once in a process whether it has CUDA, and the linker drops `libtorch_cuda.so` since nothing names
/// it: it has to be opened before anything asks.
fn cuda_devices() -> std::result::Result<usize, String> {
    static DEVICES: OnceLock<std::result::Result<usize, String>> = OnceLock::new();
    DEVICES
        .get_or_init(|| {
            open_library(c"libtorch_cuda.so")?;
            disable_cudnn_attention().map_err(|error| error.to_string())?;
            match Cuda::device_count() {
                count if count > 0 && Cuda::is_available() => Ok(count as usize),
                _ => Err("libtorch finds no CUDA device".to_owned()),
            }
        })
        .clone()
}

/// Opens a shared library for the rest of the process and makes its symbols and initialisers take effect.
fn open_library(name: &CStr) -> std::result::Result<(), String> {
    // Safety: libtorch's libraries are made to be loaded this way (Python does); dlerror's text is copied at once.
    unsafe {
        if !libc::dlopen(name.as_ptr(), libc::RTLD_NOW | libc::RTLD_GLOBAL).is_null() {
            return Ok(());
        }
        let reason = libc::dlerror();
        let reason = if reason.is_null() { "unknown reason".into() } else { CStr::from_ptr(reason).to_string_lossy() };
        Err(format!("this libtorch is without CUDA ({reason})"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_of_devices() {
        assert_eq!(parse("cpu").unwrap(), Device::Cpu);
        assert_eq!((name(Device::Cpu).as_str(), name(Device::Cuda(1)).as_str()), ("cpu", "cuda:1"));
        assert!(matches!(parse("auto").unwrap(), Device::Cpu | Device::Cuda(0)));
    }

    #[test]
    fn processors_that_are_fast_in_bfloat16() {
        let cpu =
            |vendor: &str, flags: &str| format!("processor\t: 0\nvendor_id\t: {vendor}\nflags\t\t: fpu {flags}\n\n");
        let fast = |vendor: &str, flags: &str| cpu_is_fast_in_bfloat16(&cpu(vendor, flags));
        assert!(fast("GenuineIntel", "avx512_bf16 amx_bf16 amx_tile"));
        assert!(fast("AuthenticAMD", "avx2 avx512_bf16 vnni"));
        assert!(!fast("GenuineIntel", "avx2 avx512_bf16"));
        assert!(!fast("AuthenticAMD", "avx2"));
        assert!(!cpu_is_fast_in_bfloat16(""));
    }

    #[test]
    fn an_unknown_device_is_an_error_that_lists_the_names() {
        for name in ["gpu", "cuda:", "cuda:x", "CPU"] {
            let message = parse(name).unwrap_err().to_string();
            assert!(message.contains(name) && message.contains("`auto`, `cpu`, `cuda` or `cuda:N`"), "{message}");
        }
    }

    #[test]
    fn a_missing_cuda_device_is_an_error() {
        let message = parse("cuda:4096").unwrap_err().to_string();
        assert!(message.starts_with("device `cuda:4096`: "), "{message}");
    }
}
