//! Compiles `native/ops.cpp` against the headers of the libtorch that torch-sys found, and sets the run path as for
//! the other crates.

#[path = "../../build.rs"]
mod libtorch;

fn main() {
    libtorch::main();
    println!("cargo:rerun-if-changed=build.rs");
    println!("cargo:rerun-if-changed=native/ops.cpp");
    let Some(libraries) = std::env::var_os("DEP_TCH_LIBTORCH_LIB").map(std::path::PathBuf::from) else { return };
    // Headers lie beside the libraries, in a wheel as in a libtorch of its own, unless told otherwise as for torch-sys.
    println!("cargo:rerun-if-env-changed=LIBTORCH_INCLUDE");
    let root = std::env::var_os("LIBTORCH_INCLUDE").map(std::path::PathBuf::from);
    let headers = root.unwrap_or_else(|| libraries.parent().unwrap_or(&libraries).to_path_buf()).join("include");
    println!("cargo:rerun-if-env-changed=LIBTORCH_CXX11_ABI");
    let abi = std::env::var("LIBTORCH_CXX11_ABI").unwrap_or_else(|_| "1".into());
    cc::Build::new()
        .cpp(true)
        .std("c++17")
        .opt_level(1) // calls into libtorch, no arithmetic of its own
        .warnings(false)
        .cargo_warnings(false) // of libtorch's headers
        .include(&headers)
        .include(headers.join("torch/csrc/api/include"))
        .define("_GLIBCXX_USE_CXX11_ABI", abi.as_str())
        .file("native/ops.cpp")
        .compile("sapo_flow_native");
}
