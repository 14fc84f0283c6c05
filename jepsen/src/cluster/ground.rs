//! What the machines of a run stand on: namespaces with a network of their own and a disk each, or, where that is not
//! permitted, this machine's loopback and its own disk.

use std::io::{self, Write};
use std::net::{IpAddr, Ipv4Addr, TcpListener};
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use tappers::{Interface, Tun};

use super::keeper::{Run, hold};
use super::links::{Host, Links};
use super::wire::{MTU, Plug, Wire};

/// The machines are at `10.77.K.n`; this process is one of them.
const NET: [u8; 2] = [10, 77];
const CLIENTS: u8 = 200;
const ETCD: u8 = 100;
/// Packets that wait for the switch; behind them the kernel would lose some that nobody asked to lose.
const QUEUE: u32 = 5_000;
/// Room on a node's disk: enough for a run, and filled within a second.
const DISK: &str = "768M";

/// Where the machines are.
pub enum Ground {
    Namespaces(Namespaces),
    /// Why not in namespaces.
    Loopback(String),
}

pub struct Namespaces {
    pub wire: Wire,
    net: u8,
    nodes: usize,
    /// So that nobody else takes the same addresses.
    _net: UnixListener,
    /// Why disks are folders and not file systems of their own; nothing when they are.
    pub no_disks: Option<String>,
}

impl Ground {
    /// Namespaces for the machines of `nodes` nodes, one for etcd, and this process beside them.
    pub fn lay(run: &Run, nodes: usize, seed: u64) -> Self {
        match Namespaces::make(run, nodes, seed) {
            Ok(namespaces) => Ground::Namespaces(namespaces),
            Err(error) => Ground::Loopback(error.to_string()),
        }
    }

    pub fn wire(&self) -> Option<&Wire> {
        match self {
            Ground::Namespaces(namespaces) => Some(&namespaces.wire),
            Ground::Loopback(_) => None,
        }
    }

    /// Where clients and receivers are.
    pub fn receiver_host(&self) -> IpAddr {
        match self {
            Ground::Namespaces(namespaces) => namespaces.address(namespaces.nodes + 2).into(),
            Ground::Loopback(_) => Ipv4Addr::LOCALHOST.into(),
        }
    }

    /// An address of a machine for something that listens; the same for as long as the run lasts.
    pub fn listen(&self, host: Host, port: u16) -> io::Result<String> {
        match self {
            Ground::Namespaces(namespaces) => Ok(format!("{}:{port}", namespaces.address(host))),
            Ground::Loopback(_) => Ok(TcpListener::bind("127.0.0.1:0")?.local_addr()?.to_string()),
        }
    }

    /// A command that runs on a machine. It becomes the program: the process number stays the same.
    pub fn command(&self, run: &Run, host: Host, program: &Path) -> Command {
        let mut command = match self {
            Ground::Namespaces(_) => {
                // Not `ip netns exec`, which gives the process a copy of all mounts: no disk could be taken away
                // any more.
                let mut command = Command::new("nsenter");
                command.arg(format!("--net=/run/netns/{}", run.namespace(&host.to_string()))).arg(program);
                command
            }
            Ground::Loopback(_) => Command::new(program),
        };
        run.adopt(&mut command);
        command
    }

    /// The disk of a machine, in `folder`. Returns where it is.
    pub fn disk(&self, folder: &Path) -> io::Result<PathBuf> {
        let disk = folder.join("disk");
        std::fs::create_dir_all(&disk)?;
        if self.has_disks() {
            mount(&folder.join("image"), &disk)?;
        }
        Ok(disk)
    }

    /// Makes the disk of a machine what it would be after a power cut: what was synced is there, what was not is not.
    /// Nothing may run on it.
    pub fn lose_unsynced(&self, folder: &Path) -> io::Result<()> {
        let (image, cut, disk) = (folder.join("image"), folder.join("image.cut"), folder.join("disk"));
        // What is in the image now is what the file system has sent to its disk; the rest is in memory alone, and goes
        // to the image that is thrown away.
        said(Command::new("cp").arg("--sparse=always").arg(&image).arg(&cut))?;
        said(Command::new("umount").arg(&disk))?;
        std::fs::rename(&cut, &image)?;
        mount(&image, &disk)
    }

    pub fn has_disks(&self) -> bool {
        matches!(self, Ground::Namespaces(namespaces) if namespaces.no_disks.is_none())
    }
}

impl Namespaces {
    fn make(run: &Run, nodes: usize, seed: u64) -> io::Result<Self> {
        let (net, held) = free_net()?;
        let links = Links::whole(nodes);
        let mut plugs = Vec::new();
        for host in 1..=nodes + 2 {
            let plug = plug(run, net, host, nodes)?;
            plugs.push(plug);
        }
        let wire = Wire::connect(plugs, links, seed)?;
        let no_disks = try_disk(run.folder()).err().map(|error| error.to_string());
        Ok(Self { wire, net, nodes, _net: held, no_disks })
    }

    fn address(&self, host: Host) -> Ipv4Addr {
        address(self.net, host, self.nodes)
    }
}

fn address(net: u8, host: Host, nodes: usize) -> Ipv4Addr {
    let last = match host {
        host if host == nodes + 1 => ETCD,
        host if host == nodes + 2 => CLIENTS,
        host => u8::try_from(host).expect("there are fewer nodes than addresses"),
    };
    Ipv4Addr::new(NET[0], NET[1], net, last)
}

/// A network that nobody on this machine uses.
fn free_net() -> io::Result<(u8, UnixListener)> {
    let used = said(Command::new("ip").args(["-o", "-4", "addr", "show"]))?;
    let free = |net: &u8| !used.contains(&format!(" {}.{}.{net}.", NET[0], NET[1]));
    (1..=250)
        .filter(free)
        .find_map(|net| Some((net, hold(&format!("net-{net}")).ok()?)))
        .ok_or_else(|| io::Error::other(format!("no network {}.{}.K.0/24 is free", NET[0], NET[1])))
}

/// Makes one machine's namespace and its device. That of this process stays where this process is.
fn plug(run: &Run, net: u8, host: Host, nodes: usize) -> io::Result<Plug> {
    let device = format!("bj{net}-{host}");
    let address = address(net, host, nodes);
    let tun = Tun::new_named(Interface::new(&device)?)
        .map_err(|error| io::Error::new(error.kind(), format!("no TUN device: {error}")))?;
    let mut inside = Command::new("ip");
    if host != nodes + 2 {
        let namespace = run.namespace(&host.to_string());
        ip(Command::new("ip"), &format!("netns add {namespace}\nlink set {device} netns {namespace}\n"))?;
        inside.args(["-n", &namespace]);
    }
    let up = format!(
        "link set lo up\n\
         addr add {address}/24 dev {device}\n\
         link set {device} mtu {MTU} txqueuelen {QUEUE} addrgenmode none up\n"
    );
    ip(inside, &up)?;
    Ok(Plug { host, address, tun })
}

/// Has `ip` do all of these.
fn ip(mut command: Command, lines: &str) -> io::Result<()> {
    command.args(["-batch", "-"]).stdin(Stdio::piped()).stdout(Stdio::null()).stderr(Stdio::piped());
    let mut child = command.spawn().map_err(|error| io::Error::new(error.kind(), format!("iproute2: {error}")))?;
    child.stdin.take().expect("it is piped").write_all(lines.as_bytes())?;
    let output = child.wait_with_output()?;
    if output.status.success() {
        return Ok(());
    }
    Err(io::Error::other(format!("ip: {}", String::from_utf8_lossy(&output.stderr).trim())))
}

/// What a command says; an error when it fails.
fn said(command: &mut Command) -> io::Result<String> {
    let program = command.get_program().to_string_lossy().into_owned();
    let output = command.stdin(Stdio::null()).output();
    let output = output.map_err(|error| io::Error::new(error.kind(), format!("{program}: {error}")))?;
    if output.status.success() {
        return Ok(String::from_utf8_lossy(&output.stdout).into_owned());
    }
    Err(io::Error::other(format!("{program}: {}", String::from_utf8_lossy(&output.stderr).trim())))
}

/// A file system in a file, so that it can be full, and what is synced is on it and what is not may be lost.
fn mount(image: &Path, at: &Path) -> io::Result<()> {
    if !image.exists() {
        said(Command::new("truncate").args(["-s", DISK]).arg(image))?;
        let lazy = "lazy_itable_init=1,lazy_journal_init=1";
        said(Command::new("mkfs.ext4").args(["-q", "-m", "0", "-E", lazy]).arg(image))?;
    }
    // Nothing but a sync makes anything durable: what the file system does by itself now and then waits for minutes.
    said(Command::new("mount").args(["-o", "loop,noatime,commit=300"]).arg(image).arg(at)).map(drop)
}

fn try_disk(folder: &Path) -> io::Result<()> {
    let (image, at) = (folder.join("probe.image"), folder.join("probe"));
    std::fs::create_dir_all(&at)?;
    mount(&image, &at)?;
    said(Command::new("umount").arg(&at))?;
    std::fs::remove_file(image)
}
