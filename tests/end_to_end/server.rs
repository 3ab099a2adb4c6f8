//! tests/openai_server.py as a process of its own.

use std::io::{BufRead, BufReader};
use std::path::Path;
use std::process::{Child, Command, Stdio};

use serde_json::Value;

/// A server that runs until this is dropped.
pub struct Server {
    process: Child,
    /// Where it listens.
    pub port: u16,
    directory: tempfile::TempDir,
}

impl Server {
    /// Start the server and wait until it listens.
    pub fn start(arguments: &[&str]) -> Self {
        let directory = tempfile::tempdir().expect("a temporary directory can be made");
        // This file serves the tests of two packages.
        let here = Path::new(env!("CARGO_MANIFEST_DIR"));
        let scripts = ["tests/openai_server.py", "../tests/openai_server.py"].map(|script| here.join(script));
        let script = scripts.iter().find(|script| script.is_file()).expect("the script is there");
        let mut command = Command::new("python3");
        command.arg(script).arg("--log").arg(directory.path().join("requests.jsonl")).args(arguments);
        let mut process = command.stdout(Stdio::piped()).spawn().expect("python3 is there");
        let mut line = String::new();
        BufReader::new(process.stdout.take().expect("it is piped")).read_line(&mut line).expect("it speaks UTF-8");
        let port = line.trim().parse().unwrap_or_else(|_| panic!("expected a port, found {line:?}"));
        Server { process, port, directory }
    }

    /// What it was asked, in order of arrival.
    pub fn requests(&self) -> Vec<Value> {
        let text = std::fs::read_to_string(self.directory.path().join("requests.jsonl")).unwrap_or_default();
        text.lines().map(|line| serde_json::from_str(line).expect("a line is JSON")).collect()
    }

    /// End it; the port is then nobody's.
    pub fn stop(&mut self) {
        self.process.kill().expect("it is ours");
        self.process.wait().expect("it is ours");
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        // It may be gone already.
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}
