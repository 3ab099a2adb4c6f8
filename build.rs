//! Lets binaries, tests and examples find libtorch without LD_LIBRARY_PATH: the library folder that torch-sys was
//! built against becomes the run path. Its version goes into run manifests.

use std::fs;
use std::path::Path;

/// Also called by the build script of the training core.
pub fn main() {
    println!("cargo:rerun-if-changed=build.rs");
    let Some(folder) = std::env::var_os("DEP_TCH_LIBTORCH_LIB").map(std::path::PathBuf::from) else { return };
    // First as given, which may be a link that its owner points elsewhere; then where it leads to now, so that a
    // binary goes on working when its checkout is moved.
    println!("cargo:rustc-link-arg=-Wl,-rpath,{}", folder.display());
    if let Ok(resolved) = folder.canonicalize()
        && resolved != folder
    {
        println!("cargo:rustc-link-arg=-Wl,-rpath,{}", resolved.display());
    }
    println!("cargo:rustc-env=SAPO_FLOW_LIBTORCH={}", version(&folder).unwrap_or_else(|| "unknown".into()));
}

/// The version that libtorch's headers give.
fn version(libraries: &Path) -> Option<String> {
    let headers = libraries.parent()?.join("include/torch/headeronly/version.h");
    let text = fs::read_to_string(headers).ok()?;
    let number = |part: &str| {
        let line = text.lines().find_map(|line| line.strip_prefix(&format!("#define TORCH_VERSION_{part} ")))?;
        Some(line.trim().to_owned())
    };
    Some(format!("{}.{}.{}", number("MAJOR")?, number("MINOR")?, number("PATCH")?))
}
