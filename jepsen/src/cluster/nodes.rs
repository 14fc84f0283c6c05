//! What is done to one machine: its node started and ended in several ways, its disk, its clock.

use std::io;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::atomic::Ordering;
use std::time::Duration;

use boomerang::sabotage;
use boomerang_testkit::Process;
use futures::future::try_join_all;

use super::ground::Ground;
use super::links::Host;
use super::machine::{Addresses, Machine, Skew};
use super::{Cluster, ClusterError, PASSWORD, machine_name};

impl Cluster {
    /// Starts the node of a machine, unless it runs; not without its disk. See [`Cluster::wait_until_ready`].
    pub async fn start_node(&self, host: Host) -> Result<(), ClusterError> {
        let machine = self.machine(host)?;
        let _busy = machine.busy.lock().await;
        if machine.view().pid.is_some() {
            return Ok(());
        }
        let have = self.on_disk(machine, Ground::have_disk).await;
        have.map_err(ClusterError::io(format!("have the disk of machine {host}")))?;
        let binary = self.inner.settings.binaries.join("boomerang");
        let mut command = self.with_run(|run| self.inner.ground.command(run, host, &binary));
        self.serve(&mut command, machine);
        let skewed = machine.skewed();
        let started = Process::start(format!("node {}", machine.node()), &mut command, &machine.log);
        let process =
            machine.occupy(started.map_err(ClusterError::io(format!("start the node of machine {host}")))?, skewed);
        let cluster = self.weak();
        // Whoever waits for it or not: it is ready from then on.
        tokio::spawn(async move {
            if process.started(Duration::MAX).await.is_ok()
                && let Some(cluster) = cluster.get()
                && let Ok(machine) = cluster.machine(host)
            {
                machine.now_ready_if(&process);
            }
        });
        Ok(())
    }

    fn serve(&self, command: &mut Command, machine: &Machine) {
        let settings = &self.inner.settings;
        let Addresses { tcp, http, peer } = &machine.addresses;
        command.args(["serve", "--node-id", &machine.node().to_string(), "--data-dir"]).arg(machine.data_dir());
        command.args(["--tcp-addr", tcp, "--http-addr", http, "--peer-addr", peer]);
        command.args(["--etcd", &self.inner.etcd.place.url(), "--bootstrap-expect", &settings.nodes.to_string()]);
        command.args(["--replicas", &settings.replicas.to_string(), "--shards", &settings.shards.to_string()]);
        command.args(["--node-grace", &format!("{}ms", settings.node_grace.as_millis())]);
        command.args(self.inner.certs.flags(&machine_name(machine.host)));
        // Clients are in this process, and nobody else is on the wire between.
        command.args(["--callback-allow", &self.receiver_host().to_string(), "--insecure-plaintext"]);
        command.args(["--admin-password", PASSWORD, "--test-clock"]).arg(machine.clock_file());
        if !settings.sabotage.is_empty() {
            let names: Vec<&str> = settings.sabotage.iter().map(|fault| fault.name()).collect();
            command.env(sabotage::VARIABLE, names.join(","));
        }
    }

    /// Whether the node is gone, or ends by itself within this time.
    pub async fn has_ended(&self, host: Host, within: Duration) -> Result<bool, ClusterError> {
        match self.machine(host)?.process() {
            Some(process) => Ok(process.wait(within).await.is_some()),
            None => Ok(true),
        }
    }

    /// Until the node of a machine has said that it is ready.
    pub async fn wait_until_ready(&self, host: Host, within: Duration) -> Result<(), ClusterError> {
        let machine = self.machine(host)?;
        let process = machine.process().ok_or_else(|| ClusterError::Down(machine.node()))?;
        process.started(within).await?;
        Ok(())
    }

    /// As if the power of the process had been cut; what it wrote stays.
    pub async fn kill_node(&self, host: Host) -> Result<(), ClusterError> {
        let machine = self.machine(host)?;
        let _busy = machine.busy.lock().await;
        if let Some(process) = machine.vacate() {
            process.kill().await;
        }
        Ok(())
    }

    /// As if the power of these machines had been cut at one moment: what was not synced is lost. Their nodes are down
    /// afterwards, also when it fails. Needs disks.
    pub async fn cut_power(&self, hosts: &[Host]) -> Result<(), ClusterError> {
        try_join_all(hosts.iter().map(|host| self.kill_node(*host))).await?;
        for host in hosts {
            let machine = self.machine(*host)?;
            let _busy = machine.busy.lock().await;
            let lost = self.on_disk(machine, Ground::lose_unsynced).await;
            lost.map_err(ClusterError::io(format!("cut the power of machine {host}")))?;
        }
        Ok(())
    }

    /// Commands take a while.
    async fn on_disk(&self, machine: &Machine, what: fn(&Ground, &Path) -> io::Result<()>) -> io::Result<()> {
        let (cluster, folder) = (self.clone(), machine.disk.with_file_name(""));
        let doing = tokio::task::spawn_blocking(move || what(&cluster.inner.ground, &folder));
        doing.await.expect("what is done to a disk does not panic")
    }

    /// Asks the node to stop; its exit code, if it did so in time and by itself.
    pub async fn terminate_node(&self, host: Host, within: Duration) -> Result<Option<i32>, ClusterError> {
        let machine = self.machine(host)?;
        let _busy = machine.busy.lock().await;
        Ok(machine.terminate(within).await)
    }

    pub fn pause_node(&self, host: Host) -> Result<(), ClusterError> {
        self.machine(host).map(|machine| machine.pause(true))
    }

    pub fn continue_node(&self, host: Host) -> Result<(), ClusterError> {
        self.machine(host).map(|machine| machine.pause(false))
    }

    /// Kills the node of a machine and removes all that it knew; the next that starts there is another. Returns both
    /// numbers. The node is down afterwards and the number another, also when it fails.
    pub async fn wipe_node(&self, host: Host) -> Result<(u64, u64), ClusterError> {
        self.kill_node(host).await?;
        let machine = self.machine(host)?;
        let _busy = machine.busy.lock().await;
        let (old, new) = (machine.node(), self.inner.next_node.fetch_add(1, Ordering::Relaxed));
        let data = machine.data_dir();
        // First of all: nobody may begin as the old one on half of what it knew.
        machine.renumber(new);
        std::fs::remove_dir_all(data).map_err(ClusterError::io(format!("wipe the disk of machine {host}")))?;
        Ok((old, new))
    }

    /// Sets the clocks of a machine wrong, or right again. A node that runs follows slowly; a start takes them as they
    /// are.
    pub fn set_clock(&self, host: Host, skew: Skew) -> Result<(), ClusterError> {
        let set = self.machine(host)?.set_clock(skew);
        set.map_err(ClusterError::io(format!("set the clock of machine {host}")))
    }

    /// Whether the node of a machine began, or went on, while its clock was wrong.
    pub fn clock_touched(&self, host: Host) -> Result<bool, ClusterError> {
        self.machine(host).map(Machine::clock_touched)
    }

    /// The data folder of the node of a machine.
    pub fn data_dir(&self, host: Host) -> Result<PathBuf, ClusterError> {
        self.machine(host).map(Machine::data_dir)
    }

    /// A fault fills the disk of a machine, or has made room again: until then, its node may end by a storage error.
    pub fn fill_disk(&self, host: Host, full: bool) -> Result<(), ClusterError> {
        self.machine(host).map(|machine| machine.fill(full))
    }

    /// What the data folder is on.
    pub fn disk(&self, host: Host) -> Result<&Path, ClusterError> {
        self.machine(host).map(|machine| machine.disk.as_path())
    }
}
