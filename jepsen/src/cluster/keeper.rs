//! Who cleans up, even when the harness is killed.
//!
//! A run is a folder and a mark. The mark is a variable in the environment of every process of the run; namespaces and
//! mounts carry the run's name. The keeper is a shell that reads a pipe until the harness has closed it, which the kernel does
//! for whoever dies, and then ends every process with the mark, and removes mounts, namespaces and the folder. An ordinary stop goes
//! the same way, so that this way is walked every time. It is a process group of its own: what is typed at the terminal
//! does not end it.
//!
//! If even the keeper was killed, the next run sweeps up: a run that lives holds a name that vanishes with it.

use std::collections::BTreeSet;
use std::io;
use std::os::linux::net::SocketAddrExt;
use std::os::unix::net::{SocketAddr, UnixListener};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};

use boomerang_testkit::without_settings;

/// Begins the name of every folder of a run.
const FOLDER: &str = "boomerang-jepsen-";
/// Begins the name of every namespace of a run.
const NAMESPACE: &str = "bj-";
/// Where `ip` keeps them.
const NAMESPACES: &str = "/run/netns";
/// Marks every process of a run.
const MARK: &str = "JEPSEN_RUN";

/// Waits for the end of its input, then removes everything of the run `$KEEPER_OF` with the folder `$KEEPER_FOLDER`. Twice in a row
/// nothing has to be found: a process may be about to begin.
const SCRIPT: &str = r#"
trap '' INT TERM HUP
read -r _
marked() { grep -lsxz "JEPSEN_RUN=$KEEPER_OF" /proc/[0-9]*/environ | cut -d/ -f3; }
quiet=0 looks=0
while [ "$quiet" -lt 2 ] && [ "$looks" -lt 200 ]; do
    looks=$((looks + 1)) quiet=$((quiet + 1))
    for pid in $(marked); do kill -9 "$pid" 2>/dev/null && quiet=0; done
    sleep 0.05
done
sed -n "s|^[^ ]* \($KEEPER_FOLDER/[^ ]*\) .*|\1|p" /proc/mounts | while read -r mount; do umount "$mount" || umount -l "$mount"; done
for namespace in /run/netns/bj-"$KEEPER_OF"-*; do
    if [ -e "$namespace" ]; then ip netns del "${namespace##*/}"; fi
done
rm -rf --one-file-system "$KEEPER_FOLDER"
"#;

/// What every process of a run carries; cheap to clone.
#[derive(Debug, Clone)]
pub struct Mark {
    id: String,
}

impl Mark {
    /// Makes the process one of this run: it ends with it. What the caller's environment says to Boomerang is not for it.
    pub fn adopt(&self, command: &mut Command) {
        without_settings(command);
        command.env(MARK, &self.id).process_group(0);
    }
}

/// What a run is called, and what is kept of it on this machine.
pub struct Run {
    mark: Mark,
    folder: PathBuf,
    /// Held while the run lives.
    _alive: UnixListener,
    keeper: Option<Child>,
}

impl Run {
    /// Sweeps up after dead runs, and begins a new one.
    pub fn begin() -> io::Result<Self> {
        static COUNT: AtomicU32 = AtomicU32::new(0);
        sweep();
        let id = format!("{}-{}", std::process::id(), COUNT.fetch_add(1, Ordering::Relaxed));
        let alive = hold(&format!("run-{id}"))?;
        let folder = std::env::temp_dir().join(format!("{FOLDER}{id}"));
        std::fs::create_dir_all(&folder)?;
        let keeper = keeper(&id, &folder).stdin(Stdio::piped()).spawn()?;
        Ok(Self { mark: Mark { id }, folder, _alive: alive, keeper: Some(keeper) })
    }

    /// Everything of the run is in here.
    pub fn folder(&self) -> &Path {
        &self.folder
    }

    pub fn namespace(&self, machine: &str) -> String {
        format!("{NAMESPACE}{}-{machine}", self.mark.id)
    }

    /// For whoever starts processes of this run without holding it.
    pub fn mark(&self) -> Mark {
        self.mark.clone()
    }

    /// See [`Mark::adopt`].
    pub fn adopt(&self, command: &mut Command) {
        self.mark.adopt(command);
    }

    /// Removes everything; returns when it is gone.
    pub fn end(&mut self) {
        let Some(mut keeper) = self.keeper.take() else { return };
        drop(keeper.stdin.take());
        match keeper.wait() {
            Ok(status) if status.success() => {}
            other => tracing::warn!(run = self.mark.id, ?other, "not everything of this run could be removed"),
        }
    }
}

impl Drop for Run {
    fn drop(&mut self) {
        self.end();
    }
}

fn keeper(id: &str, folder: &Path) -> Command {
    let mut command = Command::new("sh");
    command.args(["-c", SCRIPT]).env("KEEPER_OF", id).env("KEEPER_FOLDER", folder).env_remove(MARK);
    command.stdout(Stdio::null()).process_group(0);
    command
}

/// Removes what dead runs have left: folders with what is mounted in them, and namespaces, also those whose folder is gone.
fn sweep() {
    let folders = names(&std::env::temp_dir()).into_iter().filter_map(|name| of_folder(&name));
    let namespaces = names(Path::new(NAMESPACES)).into_iter().filter_map(|name| of_namespace(&name));
    for id in folders.chain(namespaces).collect::<BTreeSet<_>>() {
        let Ok(_dead) = hold(&format!("run-{id}")) else { continue };
        tracing::info!(run = id, "sweeping up after a run that is dead");
        let folder = std::env::temp_dir().join(format!("{FOLDER}{id}"));
        let _ = keeper(&id, &folder).stdin(Stdio::null()).status();
    }
}

/// What is in a folder; nothing when it is not there.
fn names(folder: &Path) -> Vec<String> {
    let entries = std::fs::read_dir(folder).into_iter().flatten().flatten();
    entries.filter_map(|entry| entry.file_name().into_string().ok()).collect()
}

/// The run that a folder is of.
fn of_folder(name: &str) -> Option<String> {
    name.strip_prefix(FOLDER).filter(|id| is_id(id)).map(str::to_owned)
}

/// The run that a namespace is of.
fn of_namespace(name: &str) -> Option<String> {
    let (id, _machine) = name.strip_prefix(NAMESPACE)?.rsplit_once('-')?;
    is_id(id).then(|| id.to_owned())
}

/// Whether a run may be called so: whatever else begins with the same letters is somebody else's.
fn is_id(id: &str) -> bool {
    let number = |part: &str| !part.is_empty() && part.bytes().all(|byte| byte.is_ascii_digit());
    id.split_once('-').is_some_and(|(process, count)| number(process) && number(count))
}

/// A name that one process on this machine has at a time, and nobody when that process is gone.
pub fn hold(name: &str) -> io::Result<UnixListener> {
    UnixListener::bind_addr(&SocketAddr::from_abstract_name(format!("boomerang-jepsen-{name}"))?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_carries_the_mark_ends_with_the_run() {
        let mut run = Run::begin().unwrap();
        let folder = run.folder().to_owned();
        std::fs::write(folder.join("file"), "something").unwrap();
        let mut command = Command::new("sleep");
        command.arg("1000");
        run.adopt(&mut command);
        let mut child = command.spawn().unwrap();
        let mut other = Command::new("sleep").arg("1000").spawn().unwrap();
        // Nothing is swept that lives.
        sweep();
        assert!(child.try_wait().unwrap().is_none() && folder.join("file").exists());
        run.end();
        assert!(child.wait().unwrap().code().is_none(), "killed");
        assert!(!folder.exists());
        assert!(other.try_wait().unwrap().is_none(), "another process is let alone");
        other.kill().unwrap();
        other.wait().unwrap();
    }

    #[test]
    fn what_is_left_tells_of_which_run_it_is() {
        assert_eq!(of_folder("boomerang-jepsen-77-0").as_deref(), Some("77-0"));
        assert_eq!(of_namespace("bj-77-0-12").as_deref(), Some("77-0"));
        for others in ["bj-12", "bj-77-0", "bj--1", "bj-a-0-1", "77-0-1"] {
            assert_eq!(of_namespace(others), None, "{others}");
        }
        assert_eq!(of_folder("boomerang-jepsen-report"), None);
    }

    #[test]
    fn a_name_is_held_once() {
        let held = hold("test-of-a-name").unwrap();
        assert!(hold("test-of-a-name").is_err());
        drop(held);
        hold("test-of-a-name").unwrap();
    }
}
