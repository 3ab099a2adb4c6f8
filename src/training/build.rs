//! Compiles `native/*.cpp` against the headers of the libtorch that torch-sys found, and sets the run path as for
//! the other crates.

#[path = "../../build.rs"]
mod libtorch;

fn main() {
    libtorch::main();
    println!("cargo:rerun-if-changed=build.rs");
    let Some(libraries) = std::env::var_os("DEP_TCH_LIBTORCH_LIB").map(std::path::PathBuf::from) else { return };
    // Headers lie beside the libraries, in a wheel as in a libtorch of its own, unless told otherwise as for torch-sys.
    println!("cargo:rerun-if-env-changed=LIBTORCH_INCLUDE");
    let root = std::env::var_os("LIBTORCH_INCLUDE").map(std::path::PathBuf::from);
    let headers = root.unwrap_or_else(|| libraries.parent().unwrap_or(&libraries).to_path_buf()).join("include");
    println!("cargo:rerun-if-env-changed=LIBTORCH_CXX11_ABI");
    let abi = std::env::var("LIBTORCH_CXX11_ABI").unwrap_or_else(|_| "1".into());
    for header in ["calls.h", "guarded.h", "kernels.h", "numbers.h", "products.h"] {
        println!("cargo:rerun-if-changed=native/{header}");
    }
    let x86_64 = std::env::var("CARGO_CFG_TARGET_ARCH").is_ok_and(|arch| arch == "x86_64");
    // Calls into libtorch, with no arithmetic of their own; attention moves numbers about.
    let calls = [
        ("ops.cpp", 1),
        ("heap.cpp", 1),
        ("fused.cpp", 1),
        ("decode.cpp", 1),
        ("graph.cpp", 1),
        ("stream.cpp", 1),
        ("products.cpp", 1),
        ("attention.cpp", 3),
    ];
    for (name, optimisation) in calls {
        let mut build = compiler(name);
        if x86_64 {
            build.define("SAPO_X86_64", None);
        }
        build
            .opt_level(optimisation)
            .include(&headers)
            .include(headers.join("torch/csrc/api/include"))
            .define("_GLIBCXX_USE_CXX11_ABI", abi.as_str())
            .compile(&format!("sapo_flow_{}", name.replace('.', "_")));
    }
    compile_arithmetic(x86_64);
}

fn compiler(name: &str) -> cc::Build {
    println!("cargo:rerun-if-changed=native/{name}");
    let mut build = cc::Build::new();
    build.cpp(true).std("c++17").warnings(false).cargo_warnings(false).file(format!("native/{name}"));
    build
}

/// Once for each set of instructions; which of them is used is decided where it runs.
fn compile_arithmetic(x86_64: bool) {
    let sets: &[(&str, &[&str])] = match x86_64 {
        true => &[
            ("baseline", &[]),
            ("avx2", &["-march=x86-64-v3"]),
            ("avx512", &["-march=x86-64-v4", "-mprefer-vector-width=512"]),
        ],
        false => &[("baseline", &[])],
    };
    for (name, table) in [("kernels", "SAPO_KERNELS"), ("decoding", "SAPO_DECODING")] {
        for (set, flags) in sets {
            let mut build = compiler(&format!("{name}.cpp"));
            for flag in
                ["-fopenmp-simd", "-fno-math-errno", "-fno-trapping-math", "-ffp-contract=fast"].iter().chain(*flags)
            {
                build.flag(flag);
            }
            build.opt_level(3).define(table, format!("{name}_{set}").as_str());
            if x86_64 {
                build.define("SAPO_X86_64", None);
            }
            build.compile(&format!("sapo_flow_{name}_{set}"));
        }
    }
}
