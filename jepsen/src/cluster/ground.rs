//! What the machines of a run stand on: namespaces with a network of their own and a disk each, or, where that is not
//! permitted, this machine's loopback and its own disk.

use std::io::{self, Write};
use std::net::{IpAddr, Ipv4Addr};
use std::os::unix::fs::MetadataExt;
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use boomerang_task::locks::Mutex;
use boomerang_testkit::OwnAddress;
use tappers::{Interface, Tun};

use super::keeper::{Mark, Run, hold};
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
/// A disk after a power cut, until it takes the place of the one before.
const CUT: &str = "image.cut";

/// Where the machines are.
pub enum Ground {
    Namespaces(Namespaces),
    Loopback(Loopback),
}

pub struct Namespaces {
    pub wire: Wire,
    /// Of whatever is run to make them.
    mark: Mark,
    net: u8,
    nodes: usize,
    /// So that nobody else takes the same addresses.
    _net: UnixListener,
    /// Why disks are folders and not file systems of their own; nothing when they are.
    pub no_disks: Option<String>,
}

pub struct Loopback {
    /// Why not in namespaces.
    pub why: String,
    /// What machines listen on, so that nobody else takes it.
    addresses: Mutex<Vec<OwnAddress>>,
}

impl Ground {
    /// Namespaces for the machines of `nodes` nodes, one for etcd, and this process beside them.
    pub fn lay(run: &Run, nodes: usize, seed: u64) -> Self {
        match Namespaces::make(run, nodes, seed) {
            Ok(namespaces) => Ground::Namespaces(namespaces),
            Err(error) => Self::loopback(error.to_string()),
        }
    }

    /// No namespaces, and why.
    pub fn loopback(why: impl Into<String>) -> Self {
        Ground::Loopback(Loopback { why: why.into(), addresses: Mutex::default() })
    }

    pub fn wire(&self) -> Option<&Wire> {
        match self {
            Ground::Namespaces(namespaces) => Some(&namespaces.wire),
            Ground::Loopback(_) => None,
        }
    }

    /// Where receivers are.
    pub fn receiver_host(&self) -> IpAddr {
        match self {
            Ground::Namespaces(namespaces) => namespaces.address(namespaces.nodes + 2).into(),
            Ground::Loopback(_) => Ipv4Addr::LOCALHOST.into(),
        }
    }

    /// An address of a machine for something that listens there for as long as the run lasts.
    pub fn listen(&self, host: Host, port: u16) -> io::Result<String> {
        match self {
            Ground::Namespaces(namespaces) => Ok(format!("{}:{port}", namespaces.address(host))),
            Ground::Loopback(loopback) => {
                let own = OwnAddress::take()?;
                let address = own.to_string();
                loopback.addresses.lock().push(own);
                Ok(address)
            }
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
        if let Some(mark) = self.disks() {
            let image = folder.join("image");
            make_image(mark, &image)?;
            mount(mark, &image, &disk)?;
        }
        Ok(disk)
    }

    /// Makes the disk of a machine what it would be after a power cut: what was synced is there, what was not is not.
    /// Nothing may run on it.
    pub fn lose_unsynced(&self, folder: &Path) -> io::Result<()> {
        let Some(mark) = self.disks() else { return Err(io::Error::other("the machines have no disks of their own")) };
        let cut = folder.join(CUT);
        // What is in the image now is what the file system has sent to its disk; the rest is in memory alone, and goes
        // to the image that is thrown away.
        let copied = said(mark, Command::new("cp").arg("--sparse=always").arg(folder.join("image")).arg(&cut))
            .and_then(|_| said(mark, Command::new("umount").arg(folder.join("disk"))));
        if let Err(error) = copied {
            // The disk is as it was; the copy is not for anybody who mounts it later.
            let _ = std::fs::remove_file(cut);
            return Err(error);
        }
        self.have_disk(folder)
    }

    /// Mounts the disk of a machine if it is not. A node must not begin without: below the mount point is an empty folder,
    /// where it would have forgotten everything, and vote.
    pub fn have_disk(&self, folder: &Path) -> io::Result<()> {
        let Some(mark) = self.disks() else { return Ok(()) };
        let (image, cut, disk) = (folder.join("image"), folder.join(CUT), folder.join("disk"));
        if is_mounted(&disk)? {
            return Ok(());
        }
        // A power cut that came so far and no further.
        if cut.exists() {
            std::fs::rename(cut, &image)?;
        }
        mount(mark, &image, &disk)?;
        if is_mounted(&disk)? { Ok(()) } else { Err(io::Error::other("the disk is not mounted")) }
    }

    /// For whatever is done to disks; nothing where there are none.
    fn disks(&self) -> Option<&Mark> {
        match self {
            Ground::Namespaces(namespaces) if namespaces.no_disks.is_none() => Some(&namespaces.mark),
            _ => None,
        }
    }

    pub fn has_disks(&self) -> bool {
        self.disks().is_some()
    }
}

impl Namespaces {
    fn make(run: &Run, nodes: usize, seed: u64) -> io::Result<Self> {
        let mark = run.mark();
        let (net, held) = free_net(&mark)?;
        let links = Links::whole(nodes);
        let mut plugs = Vec::new();
        for host in 1..=nodes + 2 {
            let plug = plug(run, net, host, nodes)?;
            plugs.push(plug);
        }
        let wire = Wire::connect(plugs, links, seed)?;
        let no_disks = try_disk(&mark, run.folder()).err().map(|error| error.to_string());
        Ok(Self { wire, mark, net, nodes, _net: held, no_disks })
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
fn free_net(mark: &Mark) -> io::Result<(u8, UnixListener)> {
    let used = said(mark, Command::new("ip").args(["-o", "-4", "addr", "show"]))?;
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
        ip(&run.mark(), Command::new("ip"), &format!("netns add {namespace}\nlink set {device} netns {namespace}\n"))?;
        inside.args(["-n", &namespace]);
    }
    let up = format!(
        "link set lo up\n\
         addr add {address}/24 dev {device}\n\
         link set {device} mtu {MTU} txqueuelen {QUEUE} addrgenmode none up\n"
    );
    ip(&run.mark(), inside, &up)?;
    Ok(Plug { host, address, tun })
}

/// Has `ip` do all of these.
fn ip(mark: &Mark, mut command: Command, lines: &str) -> io::Result<()> {
    mark.adopt(&mut command);
    command.args(["-batch", "-"]).stdin(Stdio::piped()).stdout(Stdio::null()).stderr(Stdio::piped());
    let mut child = command.spawn().map_err(|error| io::Error::new(error.kind(), format!("iproute2: {error}")))?;
    child.stdin.take().expect("it is piped").write_all(lines.as_bytes())?;
    let output = child.wait_with_output()?;
    if output.status.success() {
        return Ok(());
    }
    Err(io::Error::other(format!("ip: {}", String::from_utf8_lossy(&output.stderr).trim())))
}

/// What a command says; an error when it fails. It is one of the run's: what it makes after everything was removed would
/// stay for ever.
fn said(mark: &Mark, command: &mut Command) -> io::Result<String> {
    mark.adopt(command);
    let program = command.get_program().to_string_lossy().into_owned();
    let output = command.stdin(Stdio::null()).output();
    let output = output.map_err(|error| io::Error::new(error.kind(), format!("{program}: {error}")))?;
    if output.status.success() {
        return Ok(String::from_utf8_lossy(&output.stdout).into_owned());
    }
    Err(io::Error::other(format!("{program}: {}", String::from_utf8_lossy(&output.stderr).trim())))
}

/// A file system in a file, so that it can be full, and what is synced is on it and what is not may be lost.
fn make_image(mark: &Mark, image: &Path) -> io::Result<()> {
    said(mark, Command::new("truncate").args(["-s", DISK]).arg(image))?;
    let lazy = "lazy_itable_init=1,lazy_journal_init=1";
    said(mark, Command::new("mkfs.ext4").args(["-q", "-m", "0", "-E", lazy]).arg(image)).map(drop)
}

fn mount(mark: &Mark, image: &Path, at: &Path) -> io::Result<()> {
    // Nothing but a sync makes anything durable: what the file system does by itself now and then waits for minutes.
    said(mark, Command::new("mount").args(["-o", "loop,noatime,commit=300"]).arg(image).arg(at)).map(drop)
}

/// Whether something else is seen there than the folder that is below.
fn is_mounted(at: &Path) -> io::Result<bool> {
    let parent = at.parent().ok_or_else(|| io::Error::other("nothing is above the root"))?;
    Ok(at.metadata()?.dev() != parent.metadata()?.dev())
}

fn try_disk(mark: &Mark, folder: &Path) -> io::Result<()> {
    let (image, at) = (folder.join("probe.image"), folder.join("probe"));
    std::fs::create_dir_all(&at)?;
    make_image(mark, &image)?;
    mount(mark, &image, &at)?;
    said(mark, Command::new("umount").arg(&at))?;
    std::fs::remove_file(image)
}
