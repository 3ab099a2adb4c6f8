//! Lets the binary and its tests find libtorch without LD_LIBRARY_PATH: the library folder that torch-sys was
//! built against becomes the run path.

fn main() {
    if let Ok(folder) = std::env::var("DEP_TCH_LIBTORCH_LIB") {
        println!("cargo:rustc-link-arg=-Wl,-rpath,{folder}");
    }
}
