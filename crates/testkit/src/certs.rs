//! Certificates of the nodes of one cluster, made as a person would make them.

use std::io;
use std::path::{Path, PathBuf};
use std::process::Command;

use crate::{log_end, without_settings};

const LOG_LINES: usize = 5;

/// A folder of them.
#[derive(Debug, Clone)]
pub struct Certs(PathBuf);

impl Certs {
    /// By `boomerang certs`, for nodes of these names, each on `hosts`. Those that are there already stay. Blocks.
    pub fn make<'a>(
        boomerang: &Path,
        folder: &Path,
        nodes: impl IntoIterator<Item = (String, &'a str)>,
    ) -> io::Result<Self> {
        let certs = Self(folder.to_owned());
        let missing = nodes.into_iter().filter(|(name, _)| !certs.file(name, "pem").exists());
        let nodes: Vec<String> = missing.map(|(name, hosts)| format!("{name},{hosts}")).collect();
        if nodes.is_empty() {
            return Ok(certs);
        }
        std::fs::create_dir_all(folder)?;
        let log = folder.join("log");
        let mut command = Command::new(boomerang);
        without_settings(&mut command);
        command.arg("certs").arg("--out").arg(folder);
        for node in &nodes {
            command.args(["--node", node]);
        }
        let file = std::fs::File::create(&log)?;
        let made = command.stdin(std::process::Stdio::null()).stdout(file.try_clone()?).stderr(file).status()?;
        if !made.success() {
            return Err(io::Error::other(format!("no certificates: {}", log_end(&log, LOG_LINES))));
        }
        Ok(certs)
    }

    /// For `boomerang serve`, as the node of this name.
    pub fn flags(&self, name: &str) -> [String; 6] {
        let file = |name, ending| self.file(name, ending).display().to_string();
        let flag = str::to_owned;
        [
            flag("--peer-cert"),
            file(name, "pem"),
            flag("--peer-key"),
            file(name, "key"),
            flag("--peer-ca"),
            file("ca", "pem"),
        ]
    }

    fn file(&self, name: &str, ending: &str) -> PathBuf {
        self.0.join(format!("{name}.{ending}"))
    }
}
