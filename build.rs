//! Lets binaries, tests and examples find libtorch without LD_LIBRARY_PATH: the library folder that torch-sys was
//! built against becomes the run path.

fn main() {
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
}
